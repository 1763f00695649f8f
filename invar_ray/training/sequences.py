"""What stage 2 trains on: prompts with retrieved passages, and the answers that they end in.

Everything about a step follows from (seed, step), as in stage 1.  Shape legend: B sequences, T
tokens, P packed rows, L tokens of one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from invar_ray.config import ExperimentalGenerator, GeneratorConfig
from invar_ray.losses.answer import IGNORED
from invar_ray.models.batching import packs
from invar_ray.models.generator import encode_prompt
from invar_ray.store.artifacts import Artifact
from invar_ray.text.answers import contains_answer
from invar_ray.text.prompts import REFUSAL, fit_prompt, format_answer_prompt, format_target
from invar_ray.text.sentences import sentences_of
from invar_ray.text.tokens import text_ids

_SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class PromptAndTarget:
    """A prompt and the text that must follow it."""

    prompt: str
    target: str


@dataclass(frozen=True)
class _Shown:
    """A passage as a prompt shows it.

    Attributes:
        answers: the question's gold answers that stand in it, in their order.
        is_gold: it is of a gold document.
    """

    title: str
    text: str
    answers: tuple[str, ...]
    is_gold: bool


class ReadingSet:
    """A ``readings`` artifact in memory: for each training question its wordings and the passages
    each of them retrieved, in all windows.
    """

    def __init__(self, artifact: Artifact) -> None:
        rows: list[dict[str, Any]] = pq.read_table(artifact.path("readings.parquet")).to_pylist()
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def sequence(
        self,
        number: int,
        config: GeneratorConfig,
        extra: ExperimentalGenerator,
        tokenizer: PreTrainedTokenizerBase,
        rng: random.Random,
    ) -> PromptAndTarget:
        """One training sequence; what varies (METHOD "Stage 2") is drawn from ``rng``: wording,
        window, whether an oracle is among the passages, their number and their order.

        The target is the answer that stands in the passage cited: one of a gold document, where any
        holds an answer. Where none does, the target is the fixed refusal; in oracle-free examples,
        and where no passage fits, it is the first answer, which cites nothing.

        Every other question that is to be refused keeps its passages without the sentences that
        hold an answer (:func:`silenced`), the others lose these passages: a corpus can lack what is
        asked, or say other things about it.  Those behind ``top_k`` take the empty places, so that
        a prompt's length tells less which it is.
        """
        row = self.rows[number]
        wording = rng.randrange(len(row["wordings"])) if extra.use_rewrites else 0
        found = row["hits"][wording]
        window = (
            rng.randrange(max((len(hit["texts"]) for hit in found), default=1))
            if extra.vary_windows
            else 0
        )
        every = [_shown(hit, window, row) for hit in found]
        passages = every[: config.top_k]
        distractors = [passage for passage in passages if not passage.answers]
        draw = rng.random()
        refuses = draw < config.distractor_share
        hides = draw < config.distractor_share + extra.oracle_free_share
        if hides:
            if refuses and rng.random() < 0.5:
                every = [_silent(passage, row["answers"]) for passage in every]
            without = [passage for passage in every if not passage.answers][: config.top_k]
            hides = bool(without)
        if hides:
            passages = without
        elif extra.insert_oracle and row.get("oracle") and len(distractors) == len(passages):
            oracle = _shown(row["oracle"], window, row)
            passages = [*passages[: config.top_k - 1], oracle]
        if extra.vary_top_k and len(passages) > 1:
            keep = rng.randint(1, len(passages))
            best = _best(passages)
            passages, left = passages[:keep], passages[keep:]
            if best in left:
                passages[-1] = left[left.index(best)]
        question = row["wordings"][wording]
        passages = _fitting(
            question, passages, row["answers"], tokenizer, config.max_tokens - config.max_new_tokens
        )
        if extra.shuffle_passages:
            rng.shuffle(passages)
        best = _best(passages)
        if best is not None:
            target = format_target(best.answers[0], passages.index(best) + 1)
        elif not passages or (hides and not refuses):
            target = format_target(row["answers"][0], None)
        else:
            target = REFUSAL
        return PromptAndTarget(
            format_answer_prompt(question, [(one.title, one.text) for one in passages]), target
        )

    def step_rows(self, seed: int, step: int, size: int) -> list[int]:
        """Numbers of the questions of a step: epochs of shuffled passes, without gaps."""
        total = len(self.rows)
        wanted: list[int] = []
        position = step * size
        while len(wanted) < size:
            epoch, offset = divmod(position + len(wanted), total)
            order = _shuffled(total, seed * _SEED_STRIDE + epoch)
            wanted += order[offset : offset + size - len(wanted)]
        return wanted


@lru_cache(maxsize=2)
def _shuffled(total: int, seed: int) -> tuple[int, ...]:
    order = list(range(total))
    random.Random(seed).shuffle(order)
    return tuple(order)


def tokenize_sequences(
    sequences: Sequence[PromptAndTarget], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [B, T], mask [B, T] and labels [B, T] (``IGNORED`` outside the target), padded
    right.

    The target ends in the end token; a prompt that leaves it too little room loses tokens from its
    left, which :func:`invar_ray.text.prompts.fit_prompt` makes rare.
    """
    eos = int(tokenizer.eos_token_id)
    rows: list[tuple[list[int], int]] = []
    for sequence in sequences:
        prompt = encode_prompt(tokenizer, sequence.prompt)
        words = text_ids(tokenizer, [f" {sequence.target}"], framed=False)[0]
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


def pack_sequences(
    ids: Tensor, mask: Tensor, labels: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Put short rows behind each other, so that less is padding.

    Args:
        ids, mask, labels: [B, T] as :func:`tokenize_sequences` gives them.
        capacity: tokens of a packed row; a sequence that is longer is a row of its own.

    Returns:
        ids, segments and labels [P, L], P <= B: segment n > 0 is the n-th sequence of its row, 0 is
        padding.  No token may see another segment than its own (:func:`segment_inputs`), and the
        first token of a sequence is never a target, so the sum of the losses is that of the
        unpacked rows.
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
    """What keeps packed sequences apart: ``position_ids`` [P, L], which begin anew at each
    sequence, and a boolean ``attention_mask`` [P, 1, L, L], causal within a segment.

    Rows of one sequence each need neither, and get nothing: padding stands on the right, where no
    token sees it, and without a mask attention takes its fast kernels.
    """
    if int(segments.max()) <= 1:
        return {}
    length = segments.shape[1]
    places = torch.arange(length, device=segments.device)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = torch.where(begins, places, 0).cummax(dim=1).values  # [P, L]
    # [P, L, L]; padding sees padding, so that no row is empty
    same = segments[:, :, None] == segments[:, None, :]
    return {
        "position_ids": places - starts,
        "attention_mask": (same & (places[:, None] >= places[None, :]))[:, None],
    }


def _fitting(
    question: str,
    passages: list[_Shown],
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    budget: int,
) -> list[_Shown]:
    """What fits, dropped by rank; the one to be cited goes before all others, or its question would
    be taught to be refused.
    """
    best = _best(passages)
    first = [] if best is None else [passages.index(best)]
    order = [*first, *(rank for rank in range(len(passages)) if rank not in first)]
    given = [(passages[rank].title, passages[rank].text) for rank in order]
    fitted = fit_prompt(question, given, lambda text: len(encode_prompt(tokenizer, text)), budget)
    kept = {
        order[place]: text for place, (_, text) in zip(fitted.kept, fitted.passages, strict=True)
    }
    # A first passage that alone is too long comes back cut, perhaps without its answer.
    return [
        passages[rank]
        if kept[rank] == passages[rank].text
        else _Shown(
            passages[rank].title,
            kept[rank],
            _standing(passages[rank].title, kept[rank], answers),
            passages[rank].is_gold,
        )
        for rank in sorted(kept)
    ]


def _shown(hit: dict[str, Any], window: int, row: dict[str, Any]) -> _Shown:
    """A passage of a row in a window; a missing rendering falls back to the indexed cut, as in
    stage 1.
    """
    texts: list[str] = hit["texts"]
    text = texts[window] if window < len(texts) else texts[0]
    return _Shown(
        hit["title"],
        text,
        _standing(hit["title"], text, row["answers"]),
        hit["document_id"] in row["positive_ids"],
    )


def silenced(text: str, answers: Sequence[str]) -> str:
    """A passage without its sentences that hold one of the answers."""
    return " ".join(each for each in sentences_of(text) if not contains_answer(each, answers))


def _silent(passage: _Shown, answers: Sequence[str]) -> _Shown:
    """A passage without the sentences that hold an answer; as it is, where nothing would be left,
    or its title is one.
    """
    text = silenced(passage.text, answers) if passage.answers else passage.text
    if not text or contains_answer(passage.title, answers):
        return passage
    return _Shown(passage.title, text, _standing(passage.title, text, answers), passage.is_gold)


def _best(passages: Sequence[_Shown]) -> _Shown | None:
    """The passage to cite: the first of a gold document that holds an answer, else the first that
    does.
    """
    holding = [passage for passage in passages if passage.answers]
    return next(
        (passage for passage in holding if passage.is_gold), holding[0] if holding else None
    )


def _standing(title: str, text: str, answers: Sequence[str]) -> tuple[str, ...]:
    return tuple(answer for answer in answers if contains_answer(f"{title} {text}", [answer]))
