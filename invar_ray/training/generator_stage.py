"""Stage 2 as the training loop sees it.  Shape legend: B sequences, T tokens, V vocabulary, N
chosen positions.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invar_ray.config import Config
from invar_ray.losses.answer import IGNORED, AnswerOutput, answer_loss
from invar_ray.losses.gather import mean_over_ranks
from invar_ray.models.adapters import new_adapter
from invar_ray.models.base import BaseRef, name_and_revision
from invar_ray.models.batching import length_batches
from invar_ray.models.loading import open_model
from invar_ray.store.artifacts import Store
from invar_ray.training.sequences import (
    PromptAndTarget,
    ReadingSet,
    pack_sequences,
    segment_inputs,
    tokenize_sequences,
)
from invar_ray.training.stage import (
    Ahead,
    Chunking,
    Forward,
    Metrics,
    recompute,
    save_lora,
    to_device,
)


class _CausalLm(nn.Module):
    """A causal LM under one forward, for the engine."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base: Any = model

    def forward(self, input_ids: Tensor, segments: Tensor, predicts: Tensor) -> Tensor:
        """[B, T] ids, segments (1 for every token of an unpacked row, 0 for padding) and choice of
        positions -> logits [N, V] of the N chosen positions.

        The head is most of a small model's work, and logits most of its memory: only those are made
        that the loss reads.
        """
        # [B, T, H]
        hidden = self.base.model(
            input_ids=input_ids, use_cache=False, **segment_inputs(segments)
        ).last_hidden_state
        logits: Tensor = self.base.lm_head(hidden[predicts])
        return logits


def answer_loss_at(
    forward: Forward, ids: Tensor, segments: Tensor, labels: Tensor, *, normaliser: float | Tensor
) -> AnswerOutput:
    """:func:`invar_ray.losses.answer.answer_loss` of [B, T] sequences, through logits of the
    answers' positions only.

    Args:
        forward: (ids, segments, choice of positions) -> logits [N, V].
        ids, segments: [B, T]; segment n > 0 is the n-th sequence of its row, 0 padding.
        labels: [B, T], ``IGNORED`` outside the answers.
        normaliser: see there.
    """
    targets = labels[:, 1:]  # position t predicts the token at t + 1
    predicts = torch.zeros_like(segments, dtype=torch.bool)
    predicts[:, :-1] = targets != IGNORED
    logits = forward(ids, segments, predicts)  # [N, V]
    # answer_loss shifts by one: a row after the last, a label before the first.
    return answer_loss(
        torch.cat([logits, logits.new_zeros(1, logits.shape[1])])[None],
        torch.cat([targets.new_full((1,), IGNORED), targets[targets != IGNORED]])[None],
        normaliser=normaliser,
    )


class GeneratorStage:
    """Stage 2: answers from what the frozen stage-1 retriever found; loss on answer tokens only."""

    def __init__(
        self, config: Config, store: Store, inputs: dict[str, Any], rank: int, world_size: int
    ) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        self.steps = config.generator.steps
        self.measure_every = 0
        reference = BaseRef(**inputs["base"])
        base, self.tokenizer = open_model(
            reference,
            store,
            config.model.precision,
            quantize=config.experimental.model.quantize,
        )
        self._base_name, _ = name_and_revision(config.model.base)
        recompute(base, config)
        self._adapted = new_adapter(
            base, config.generator.lora, config.seed, first_layer=config.generator.first_layer
        )
        self.module: nn.Module = _CausalLm(self._adapted.get_base_model())
        self.readings = ReadingSet(store.open(inputs["readings"], "readings"))
        self._ahead = Ahead(self._own_rows, self.steps)

    def loss(self, forward: Forward, step: int) -> tuple[Tensor, Metrics]:
        """See :class:`Stage`; METHOD "Stage 2"."""
        ids, segments, labels, normaliser = self._batch(step)
        output = answer_loss_at(forward, ids, segments, labels, normaliser=normaliser)
        return output.loss, _metrics(
            output.loss, output.accuracy, output.tokens, segments, segments.numel()
        )

    def accumulate(self, forward: Forward, step: int, chunking: Chunking) -> Metrics:
        """See :class:`Stage`: the loss is a sum over sequences, hence over chunks of them."""
        ids, segments, labels, normaliser = self._batch(step)
        lengths: list[int] = (segments > 0).sum(dim=1).tolist()
        chunks = list(length_batches(lengths, chunking.tokens))
        padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in chunks)
        missing = chunking.agree(len(chunks)) - len(chunks)
        loss, accuracy, tokens = (torch.zeros((), device=ids.device) for _ in range(3))
        for number, rows in enumerate([*chunks, *[[0]] * missing]):
            width = max(lengths[row] for row in rows)
            goal = labels[rows, :width]
            if number >= len(chunks):  # a dummy: the ranks stay in step, and nothing counts twice
                goal = torch.full_like(goal, IGNORED)
            part = answer_loss_at(
                forward, ids[rows, :width], segments[rows, :width], goal, normaliser=normaliser
            )
            chunking.backward(part.loss)
            loss, accuracy, tokens = (
                loss + part.loss.detach(),
                accuracy + part.accuracy,
                tokens + part.tokens,
            )
        return _metrics(loss, accuracy, tokens, segments, padded)

    def measure(self, forward: Forward, chunking: Chunking) -> Metrics:
        """See :class:`Stage`; nothing is held out in stage 2."""
        return {}

    def describe(self, step: int) -> dict[str, Any]:
        """See :class:`Stage`."""
        self._ahead.forget()
        return {
            "sequences": [
                {"prompt": one.prompt, "target": one.target} for one in self._sequences(step)
            ]
        }

    def save(self, parameters: dict[str, Tensor], folder: Path) -> None:
        """See :class:`Stage`."""
        save_lora(self._adapted, parameters, "base.", folder, self._base_name)

    def _sequences(self, step: int, rank: int = 0, ranks: int = 1) -> list[PromptAndTarget]:
        """The global batch, or a rank's share of it: every ``ranks``-th from ``rank`` on."""
        settings = self.config.generator
        rows = self.readings.step_rows(self.config.seed, step, settings.global_batch_size)
        return [
            self.readings.sequence(
                rows[place],
                settings,
                self.config.experimental.generator,
                self.tokenizer,
                random.Random(f"{self.config.seed}-{step}-{place}"),
            )
            for place in range(rank, len(rows), ranks)
        ]

    def _batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """This rank's ids, segments and labels [B, T], and the divisor of its loss."""
        device = next(self.module.parameters()).device
        ids, segments, labels, tokens = (to_device(x, device) for x in self._ahead.batch(step))
        # Each rank makes its own rows only; of the others' it needs the number of answer tokens.
        normaliser = float(mean_over_ranks(tokens))
        return ids, segments, labels, normaliser

    def _own_rows(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This rank's ids, segments and labels [B, T], and the number of its answer tokens."""
        settings = self.config.generator
        mine = self._sequences(step, self.rank, self.world_size)
        # A batch smaller than the number of ranks: a row that does not count keeps this one busy.
        rows = mine or self._sequences(step, ranks=settings.global_batch_size)
        ids, mask, labels = tokenize_sequences(rows, self.tokenizer, settings.max_tokens)
        if not mine:
            labels.fill_(IGNORED)
        tokens = (labels[:, 1:] != IGNORED).sum().double()
        if self.config.scale.pack_tokens is not None:
            ids, mask, labels = pack_sequences(ids, mask, labels, self.config.scale.pack_tokens)
        return ids, mask, labels, tokens


def _metrics(
    loss: Tensor, accuracy: Tensor, tokens: Tensor, segments: Tensor, padded: int
) -> Metrics:
    return {
        "loss": loss.item(),
        "token_accuracy": accuracy.item(),
        "answer_tokens": float(tokens),
        "tokens": float((segments > 0).sum()),
        "padded_tokens": float(padded),
    }
