"""Answers a second: our generator against transformers' ``generate`` on the same weights, prompts,
batch size and precision.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import OURS, Contest, Measured, Side
from benchmarks.groups.texts import mixed_lengths, write_smollm2_shape

NEW_TOKENS = 16
PASSAGES = 3


def contests(full: bool, folder: Path) -> list[Contest]:
    """One by one and in a batch, in both precisions."""
    base = write_smollm2_shape(folder / "base")
    found = []
    for precision, batch, count in (
        ("fp32", 1, 8 if full else 2),
        ("fp32", 16, 32 if full else 16),
        ("bf16", 16, 32 if full else 16),
    ):
        given = {"base": base, "precision": precision, "batch": batch, "count": count}
        sides = Side(OURS, "answer:ours", given), Side("generate", "answer:peer", given)
        name = f"answer {precision} batch {batch}"
        target = 1.3 if batch == 1 else 1.5
        found.append(Contest(name, "answer", count, sides, target, tolerance=0.0))
    return found


def _prompts(count: int) -> list[str]:
    from invar_ray.text.prompts import format_answer_prompt

    texts = mixed_lengths(count * PASSAGES)
    return [
        format_answer_prompt(
            f"What is said about number {at}?",
            [(f"Text {k}", texts[at * PASSAGES + k][:400]) for k in range(PASSAGES)],
        )
        for at in range(count)
    ]


def ours(base: str, precision: str, batch: int, count: int) -> Callable[[], Measured]:
    """Our generator over the bare base."""
    from invar_ray.config import ModelConfig
    from invar_ray.models.base import resolve_base
    from invar_ray.models.generator import Generator
    from invar_ray.models.loading import open_model

    resolved = resolve_base(ModelConfig(base=base), None)
    generator, prompts = Generator(*open_model(resolved, None, precision)), _prompts(count)

    def work() -> Measured:
        tokens = 0
        for at in range(0, count, batch):
            made = generator.generate(prompts[at : at + batch], max_new_tokens=NEW_TOKENS)
            tokens += sum(len(one.token_logprobs) for one in made)
        return Measured(proof=[float(tokens)])

    return work


def peer(base: str, precision: str, batch: int, count: int) -> Callable[[], Measured]:
    """``generate`` as its documentation shows it: padded left, greedy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from invar_ray.models.precision import torch_dtype

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch_dtype(precision)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    prompts = _prompts(count)

    @torch.inference_mode()
    def work() -> Measured:
        tokens = 0
        for at in range(0, count, batch):
            given = tokenizer(prompts[at : at + batch], padding=True, return_tensors="pt")
            given.pop("token_type_ids", None)
            made = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
            new = made[:, given["input_ids"].shape[1] :]
            tokens += new.numel()
            tokenizer.batch_decode(new, skip_special_tokens=True)
        return Measured(proof=[float(tokens)])

    return work
