"""Bases of other families than LLaMA, by folder, with small random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from invar_ray.cli import doctor
from invar_ray.errors import ModelError
from invar_ray.models.base import load_tokenizer, resolve_named
from invar_ray.models.encoder import EncoderSpec, open_encoder
from invar_ray.models.generator import Generator
from invar_ray.models.loading import open_model
from invar_ray.models.trunk import lora_targets
from invar_ray.training.export import export_adapter
from tests.support import open_folder, save_llama
from tests.unit.models.test_encoder_base import Run

LLAMA = ["k_proj", "o_proj", "q_proj", "v_proj"]
FAMILIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    # family -> what is its own in its shape, and the layers that get an adapter
    "Qwen2": ({}, LLAMA),
    "Qwen3": ({"head_dim": 8}, LLAMA),
    "Mistral": ({"sliding_window": 16}, LLAMA),
    "Gemma": ({"head_dim": 8}, LLAMA),
    "Gemma2": ({"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}, LLAMA),
    "Phi": ({}, ["dense", "k_proj", "q_proj", "v_proj"]),
    "Phi3": ({"pad_token_id": 1}, ["o_proj", "qkv_proj"]),
}


def save(folder: Path, family: str) -> Path:
    """A random model of two layers, in a folder as ``save_pretrained`` writes it."""
    save_llama(folder)  # its tokenizer
    sizes = json.loads((folder / "config.json").read_text())
    names = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads max_position_embeddings bos_token_id eos_token_id""".split()
    shape = {name: sizes[name] for name in names} | FAMILIES[family][0]
    shape["vocab_size"] += 8  # some families' tokenizers bring tokens of their own
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(initializer_range=0.2, **shape)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_embeds_exports_and_answers(tmp_path: Path, family: str) -> None:
    folder = save(tmp_path / family, family)
    (check,) = doctor.check_model(str(folder))
    assert check.status == "ok", check.detail
    run = Run(tmp_path / "run", folder, "model.pooling=mean")
    assert sorted(lora_targets(open_folder(folder))) == FAMILIES[family][1]
    adapter, losses = run.trained(3)
    assert losses[-1] < losses[0]
    encoder = open_encoder(EncoderSpec.from_json(adapter.info["encoder"]), run.store)
    long = "The ferry leaves at five in the morning."  # a query of no more tokens than fit
    texts = ["who?", long]
    found = encoder.encode_queries(texts)
    alone = np.concatenate([encoder.encode_queries([text]) for text in texts])
    np.testing.assert_allclose(found, alone, atol=1e-5)
    exported = export_adapter(adapter, tmp_path / "out", merged=True)
    package = pytest.importorskip("sentence_transformers")
    theirs = package.SentenceTransformer(str(exported.merged), device="cpu")
    for ours, other in (
        (found, theirs.encode_query(texts)),
        (
            encoder.encode_passages([("Arvon", text) for text in texts]),
            theirs.encode_document([f"Arvon {text}" for text in texts]),
        ),
    ):
        assert ((ours * other).sum(axis=1) >= 0.9999).all()
    model, tokenizer = open_model(resolve_named(str(folder)), None)
    answer = Generator(model, tokenizer, 64).generate(["Question: who? Answer:"], max_new_tokens=4)
    assert 1 <= answer[0].num_tokens <= 4


def test_doctor_refuses_what_training_refuses(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    save_llama(folder)
    (folder / "model.safetensors").unlink()
    config = transformers.GPT2Config(vocab_size=600, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    (check,) = doctor.check_model(str(folder))
    assert check.status == "fail"
    assert "GPT2LMHeadModel, which training refuses" in check.detail
    with pytest.raises(ModelError, match="is a GPT2LMHeadModel"):
        open_folder(folder)
    assert load_tokenizer(str(folder)).eos_token == "</s>"
