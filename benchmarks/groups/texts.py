"""What the groups share: texts of mixed lengths, and a base of a published shape."""

from __future__ import annotations

from pathlib import Path

import torch

from invar_ray.corpus import facts


def mixed_lengths(count: int) -> list[str]:
    """Joins of one to four neighbours of the demo corpus, in turn, each after another number: from
    some 40 to some 250 tokens, all different.
    """
    documents = [document.text for document in facts.documents()]
    joined = []
    for number in range(count):
        at, length = number * 7 % len(documents), number % 4 + 1
        joined.append(f"{number}. " + " ".join(documents[at : at + length]))
    return joined


def write_smollm2_shape(folder: Path, layers: int = 30) -> str:
    """A model of SmolLM2-135M's shape with random weights, and a tokenizer; returns its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from invar_ray.models.tiny import minilm_tokenizer

    torch.manual_seed(0)
    tokenizer = minilm_tokenizer()
    shape = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
