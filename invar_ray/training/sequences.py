"""What stage 2 trains on: prompts with retrieved passages, and the answers that they end in.

Everything about a step follows from (seed, step), as in stage 1.  Shape legend: B sequences, T tokens, P packed rows,
L tokens of one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from invar_ray.artifacts import Artifact
from invar_ray.config import GeneratorConfig
from invar_ray.losses.answer import IGNORED
from invar_ray.models.batching import packs
from invar_ray.models.generator import encode_prompt
from invar_ray.text.answers import contains_answer
from invar_ray.text.prompts import REFUSAL, fit_prompt, format_answer_prompt, format_target

_SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class PromptAndTarget:
    """A prompt and the text that must follow it."""

    prompt: str
    target: str


class HitSet:
    """A ``hits`` artifact in memory: for each training question its wordings and the passages each of them
    retrieved.
    """

    def __init__(self, artifact: Artifact) -> None:
        rows: list[dict[str, Any]] = pq.read_table(artifact.path("hits.parquet")).to_pylist()
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def sequence(
        self, number: int, config: GeneratorConfig, tokenizer: PreTrainedTokenizerBase, rng: random.Random
    ) -> PromptAndTarget:
        """One training sequence; what varies (METHOD "Stage 2") is drawn from ``rng``.

        The target names the first passage that holds the answer; where none does, the target is the fixed refusal.
        """
        row = self.rows[number]
        wording = rng.randrange(len(row["wordings"])) if config.use_rewrites else 0
        passages = [(hit["title"], hit["text"]) for hit in row["hits"][wording][: config.top_k]]
        answers: list[str] = row["answers"]
        distractors = [passage for passage in passages if not _holds(passage, answers)]
        if rng.random() < config.distractor_share and distractors:
            passages = distractors
        elif config.vary_top_k and len(passages) > 1:
            keep = rng.randint(1, len(passages))
            gold = next((passage for passage in passages if _holds(passage, answers)), None)
            passages = passages[:keep]
            if gold is not None and gold not in passages:
                passages[-1] = gold
        question = row["wordings"][wording]
        passages = _fitting(question, passages, answers, tokenizer, config.max_tokens - config.max_new_tokens)
        if config.shuffle_passages:
            rng.shuffle(passages)
        place = next((index for index, passage in enumerate(passages, 1) if _holds(passage, answers)), None)
        target = REFUSAL if place is None else format_target(answers[0], place)
        return PromptAndTarget(format_answer_prompt(question, passages), target)

    def step_rows(self, seed: int, step: int, size: int) -> list[int]:
        """Numbers of the questions of a step: epochs of shuffled passes, without gaps."""
        total = len(self.rows)
        wanted: list[int] = []
        position = step * size
        while len(wanted) < size:
            epoch, offset = divmod(position + len(wanted), total)
            order = list(range(total))
            random.Random(seed * _SEED_STRIDE + epoch).shuffle(order)
            wanted += order[offset : offset + size - len(wanted)]
        return wanted


def tokenize_sequences(
    sequences: Sequence[PromptAndTarget], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [B, T], mask [B, T] and labels [B, T] (``IGNORED`` outside the target), padded right.

    The target ends in the end token; a prompt that leaves it too little room loses tokens from its left, which
    :func:`invar_ray.text.prompts.fit_prompt` makes rare.
    """
    eos = int(tokenizer.eos_token_id)
    rows: list[tuple[list[int], int]] = []
    for sequence in sequences:
        prompt = encode_prompt(tokenizer, sequence.prompt)
        words = tokenizer(f" {sequence.target}", add_special_tokens=False)["input_ids"]
        target = [*words[: max_tokens - 1], eos]
        prompt = prompt[max(0, len(prompt) + len(target) - max_tokens) :]
        rows.append(([*prompt, *target], len(prompt)))
    width = max(len(ids) for ids, _ in rows)
    ids_tensor = torch.full((len(rows), width), int(tokenizer.pad_token_id), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    for index, (ids, prompt_length) in enumerate(rows):
        ids_tensor[index, : len(ids)] = torch.tensor(ids)
        mask[index, : len(ids)] = 1
        labels[index, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
    return ids_tensor, mask, labels


def pack_sequences(ids: Tensor, mask: Tensor, labels: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Put short rows behind each other, so that less is padding.

    Args:
        ids, mask, labels: [B, T] as :func:`tokenize_sequences` gives them.
        capacity: tokens of a packed row; a sequence that is longer is a row of its own.

    Returns:
        ids, segments and labels [P, L], P <= B: segment n > 0 is the n-th sequence of its row, 0 is padding.  No token
        may see another segment than its own (:func:`segment_inputs`), and the first token of a sequence is never a
        target, so the sum of the losses is that of the unpacked rows.
    """
    lengths: list[int] = mask.sum(dim=1).tolist()
    groups = packs(lengths, capacity)
    width = max(sum(lengths[row] for row in rows) for rows in groups)
    shape = (len(groups), width)
    packed = ids.new_full(shape, 0), mask.new_zeros(shape), labels.new_full(shape, IGNORED)
    for number, rows in enumerate(groups):
        start = 0
        for segment, row in enumerate(rows, start=1):
            place = slice(start, start + lengths[row])
            packed[0][number, place] = ids[row, : lengths[row]]
            packed[1][number, place] = segment
            packed[2][number, place] = labels[row, : lengths[row]]
            packed[2][number, start] = IGNORED
            start = place.stop
    return packed


def segment_inputs(segments: Tensor) -> dict[str, Tensor]:
    """What keeps packed sequences apart: ``position_ids`` [P, L], which begin anew at each sequence, and a boolean
    ``attention_mask`` [P, 1, L, L], causal within a segment.

    Rows of one sequence each need neither: then an ordinary [P, L] mask comes back.
    """
    if int(segments.max()) <= 1:
        return {"attention_mask": segments}
    length = segments.shape[1]
    places = torch.arange(length, device=segments.device)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = torch.where(begins, places, 0).cummax(dim=1).values  # [P, L]
    same = segments[:, :, None] == segments[:, None, :]  # [P, L, L]; padding sees padding, so that no row is empty
    return {
        "position_ids": places - starts,
        "attention_mask": (same & (places[:, None] >= places[None, :]))[:, None],
    }


def _fitting(
    question: str,
    passages: list[tuple[str, str]],
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    budget: int,
) -> list[tuple[str, str]]:
    """What fits, dropped by rank; the first that holds the answer goes before all others, or its question would be
    taught to be refused.
    """
    gold = next((passage for passage in passages if _holds(passage, answers)), None)
    order = passages if gold is None else [gold, *(passage for passage in passages if passage is not gold)]
    fitted = fit_prompt(question, order, lambda text: len(encode_prompt(tokenizer, text)), budget)
    kept = list(fitted.passages)
    return kept if gold is None else sorted(kept, key=lambda passage: _rank(passage, passages))


def _rank(passage: tuple[str, str], passages: list[tuple[str, str]]) -> int:
    # A first passage that alone is too long comes back cut: it is its own, and first.
    return passages.index(passage) if passage in passages else 0


def _holds(passage: tuple[str, str], answers: Sequence[str]) -> bool:
    return contains_answer(f"{passage[0]} {passage[1]}", answers)
