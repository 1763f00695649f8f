"""Stage 1 as the training loop sees it.

Shape legend: b local rows, C candidate slots, R wordings, N windows, D embedding size.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from invar_ray.config import Config
from invar_ray.losses.gather import gather_rows
from invar_ray.losses.gradcache import RepresentationCache
from invar_ray.losses.masks import contrastive_allowed, copies_allowed
from invar_ray.losses.matryoshka import size_weights, unit_prefix
from invar_ray.models.adapters import copy_adapter, new_adapter
from invar_ray.models.base import name_and_revision
from invar_ray.models.batching import by_length, pad_right
from invar_ray.models.encoder import (
    PROJECTION_FILE,
    BiEncoder,
    EncoderSpec,
    load_projection,
    open_trunk,
    passage_ids,
    query_ids,
)
from invar_ray.models.loading import ATTENTION, PLAIN_ATTENTION
from invar_ray.store.artifacts import Store, open_artifact
from invar_ray.training.batches import StepPlan, Trainset
from invar_ray.training.objective import Rows, objective
from invar_ray.training.stage import (
    HELDOUT,
    HELDOUT_OVERLAP,
    Ahead,
    Chunking,
    Forward,
    Metrics,
    recompute,
    save_lora,
    to_device,
)

HELDOUT_QUESTIONS = 200
SHORT_TOKENS = 512
"""Up to here plain attention trains faster than torch's kernel, on a CPU in bf16."""
HELDOUT_PASSAGES = 1000  # beside those of the held-out questions
ROWS_PER_PART = 16
"""Texts that are padded together.  The demo's steps, whole: 1.45 places a token; in parts of 16:
1.18; of 8: 1.09, in products too small for a GPU."""


class _Batch(NamedTuple):
    """A rank's share of a step.

    Attributes:
        queries: ids and mask [b * R, T], a row's wordings behind each other.
        passages: ids and mask [C / ranks * N, T], a slot's windows behind each other.
        rows: what the losses need beside vectors.
        metrics: that follow from the batch alone.
    """

    queries: tuple[Tensor, Tensor]
    passages: tuple[Tensor, Tensor]
    rows: Rows
    metrics: Metrics


class RetrieverStage:
    """Stage 1: contrastive + alignment + invariance over environments, candidates gathered over
    ranks.
    """

    def __init__(
        self, config: Config, store: Store, inputs: dict[str, Any], rank: int, world_size: int
    ) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        self.steps = config.retriever.steps
        self.spec = EncoderSpec.from_json(inputs["encoder"])
        extra = config.experimental.retriever
        self.measure_every = extra.heldout_every if extra.heldout_share > 0 else 0
        self._store = store
        self.trainset = self._open_trainset(inputs["trainset"])
        self._measured = self.trainset  # measurements stay comparable when negatives are refreshed
        slow_kernel = (
            config.model.precision == "bf16"
            and not config.scale.use_gpu
            and self.spec.passage_max_tokens <= SHORT_TOKENS
        )
        base, self.tokenizer = open_trunk(
            self.spec,
            store,
            config.model.precision,
            attention=PLAIN_ATTENTION if slow_kernel else ATTENTION,
            quantize=config.experimental.model.quantize,
        )
        named = config.model.retriever_base or config.model.base
        self._base_name, _ = name_and_revision(named)
        recompute(base, config)
        self._adapted = new_adapter(
            base, config.retriever.lora, config.seed, num_layers=self.spec.num_layers
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            module = BiEncoder(
                self._adapted.get_base_model(), self.spec.pooling, config.model.projection_dim
            )
        if "init" in inputs:
            self._start_from(inputs["init"], module)
        self.module: nn.Module = module
        self._dimension = module.dimension
        self._ahead = Ahead(self._make_batch, self.steps)

    def loss(self, forward: Forward, step: int) -> tuple[Tensor, Metrics]:
        """See :class:`Stage`; METHOD "Stage 1" names the terms."""
        padded = 0

        def encode(ids: Tensor, mask: Tensor) -> Tensor:
            nonlocal padded
            padded += ids.numel()
            return self._on_device(forward, ids, mask)

        loss, metrics = self._loss(by_length(encode, ROWS_PER_PART), step)
        return loss, metrics | {"padded_tokens": float(padded)}

    def _loss(self, encode: Forward, step: int) -> tuple[Tensor, Metrics]:
        settings, extra = self.config.retriever, self.config.experimental.retriever
        batch = self._ahead.batch(step)
        queries = encode(*batch.queries)  # [b * R, D]
        queries = queries.view(len(batch.rows.weights), -1, queries.shape[-1])  # [b, R, D]
        passages = encode(*batch.passages)
        windows = self.trainset.num_windows
        # [C, N, D]
        candidates = gather_rows(passages.view(-1, windows, passages.shape[-1]))
        device = candidates.device
        on_device: dict[str, Any] = {
            name: to_device(x, device)
            for name, x in batch.rows._asdict().items()
            if isinstance(x, Tensor)
        }
        rows = batch.rows._replace(**on_device)
        total, metrics = objective(queries, candidates, rows, settings, extra, step)
        return total, metrics | batch.metrics

    def accumulate(self, forward: Forward, step: int, chunking: Chunking) -> Metrics:
        """See :class:`Stage`: GradCache over wordings and over passages, which all wordings
        share.
        """
        cache = RepresentationCache(forward, chunking.tokens, agree=chunking.agree)
        loss, metrics = self._loss(partial(self._on_device, cache), step)
        cache.backward(loss, chunking.backward)
        return metrics | {"padded_tokens": float(cache.padded_tokens)}

    def measure(self, forward: Forward, chunking: Chunking) -> Metrics:
        """See :class:`Stage`: recall and overlap of held-out questions, among their passages and a
        sample of the others.
        """
        self._ahead.forget()
        trainset = self._measured
        draw = random.Random(f"{self.config.seed}-measure")
        rows = sorted(draw.sample(trainset.heldout, min(HELDOUT_QUESTIONS, len(trainset.heldout))))
        own = sorted({trainset.positives[row] for row in rows})
        rest = sorted(set(range(len(trainset.titles))) - set(own))
        slots = [*own, *draw.sample(rest, min(HELDOUT_PASSAGES, len(rest)))]
        families = [trainset.wordings[row] for row in rows]
        self.module.eval()
        with torch.no_grad():
            texts = [(trainset.titles[slot], trainset.slot_texts[slot][0]) for slot in slots]
            passages = self._gathered(
                forward, passage_ids(self.tokenizer, texts, self.spec), chunking
            )
            wordings = [text for family in families for text in family]
            queries = self._gathered(
                forward, query_ids(self.tokenizer, wordings, self.spec), chunking
            )
        self.module.train()
        contents = torch.as_tensor(trainset.contents_of(slots), device=passages.device)
        gold = [slots.index(trainset.positives[row]) for row in rows]
        metrics: Metrics = {"heldout_questions": float(len(rows))}
        sizes = self._sizes()
        for size in sizes:
            cosines = unit_prefix(queries, size) @ unit_prefix(passages, size).T
            counts = [len(family) for family in families]
            anchor, worst = _recall_at_5(cosines, gold, counts, contents)
            of_size = "" if size == sizes[0] else f"_{size}"
            metrics |= {
                f"heldout_recall_at_5{of_size}": anchor,
                f"{HELDOUT}{of_size}": worst,
                f"{HELDOUT_OVERLAP}{of_size}": _overlap_at_10(cosines, counts),
            }
        return metrics

    def adopt(self, trainset_ref: str) -> None:
        """Take candidates from another training set of the same questions from now on."""
        self._ahead.forget()
        self.trainset = self._open_trainset(trainset_ref)

    def _open_trainset(self, ref: str) -> Trainset:
        trainset = Trainset(self._store.open(ref, "trainset"))
        if self.measure_every:
            trainset.hold_out(self.config.experimental.retriever.heldout_share, self.config.seed)
        return trainset

    def _sizes(self) -> list[int]:
        """The sizes that vectors are trained at, the full one first."""
        extra = self.config.experimental.retriever
        return list(size_weights(self._dimension, extra.matryoshka_dims, extra.matryoshka_weights))

    def _gathered(self, forward: Forward, ids: list[list[int]], chunking: Chunking) -> Tensor:
        """Vectors [N, D] of all rows, each rank having encoded its share."""
        share = -(-len(ids) // self.world_size)
        mine = (ids + ids[:1] * (share * self.world_size - len(ids)))[
            self.rank * share : (self.rank + 1) * share
        ]
        cache = RepresentationCache(forward, chunking.tokens, agree=chunking.agree)
        rows = pad_right(mine, int(self.tokenizer.pad_token_id))
        return gather_rows(self._on_device(cache, *rows).detach())[: len(ids)]

    def describe(self, step: int) -> dict[str, Any]:
        """See :class:`Stage`."""
        trainset, plan = self.trainset, self._plan(step)
        return {
            "questions": [
                {
                    "id": trainset.question_ids[row],
                    "wordings": trainset.wordings[row],
                    "positive": positive,
                }
                for row, positive in zip(plan.rows, plan.positive, strict=True)
            ],
            "candidates": [
                {
                    "title": trainset.render(plan, column, 0)[0],
                    "texts": [
                        trainset.render(plan, column, window)[1]
                        for window in range(trainset.num_windows)
                    ],
                }
                for column in range(len(plan.slots))
            ],
        }

    def _start_from(self, uri: str, module: BiEncoder) -> None:
        folder = open_artifact(uri, "retriever").path("adapter")
        copy_adapter(self._adapted, folder)
        if module.projection is not None:
            with torch.no_grad():
                module.projection.weight.copy_(load_projection(folder))

    def save(self, parameters: dict[str, Tensor], folder: Path) -> None:
        """See :class:`Stage`; an optional projection goes beside the PEFT folder's files."""
        save_lora(self._adapted, parameters, "base.", folder, self._base_name)
        if "projection.weight" in parameters:
            save_file({"weight": parameters["projection.weight"]}, str(folder / PROJECTION_FILE))

    def _plan(self, step: int) -> StepPlan:
        settings = self.config.retriever
        return self.trainset.plan(
            self.config.seed,
            step,
            settings.global_batch_size,
            settings.num_hard_negatives,
            self.world_size,
        )

    def _make_batch(self, step: int) -> _Batch:
        """This rank's share of a step, on the CPU."""
        trainset, plan = self.trainset, self._plan(step)
        share = len(plan.rows) // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        weights = torch.tensor(plan.weights[mine])
        normaliser = sum(plan.weights) / self.world_size
        slots, positives = trainset.slot_metadata(plan), torch.tensor(plan.positive[mine])
        teacher = trainset.teacher_scores(
            plan, self.config.experimental.coarse.document_weight, mine
        )
        no_answers = contrastive_allowed(
            slots,
            positives,
            teacher_scores=teacher,
            holds_answer=trainset.holds_answer(plan, mine),
            teacher_margin=self.config.experimental.retriever.false_negative_margin,
        )
        rows = Rows(
            positive=positives,
            weights=weights,
            normaliser=normaliser,
            environments=trainset.environment_mask(plan)[mine],
            teacher=teacher,
            no_copies=copies_allowed(slots, positives),
            no_answers=no_answers,
        )
        queries = self._query_rows(plan, mine)
        passages, missing = self._passage_rows(plan)
        masks = queries[1], passages[1]
        metrics = {
            "candidates": float(sum(plan.present)),
            # Of real rows and slots: padding depends on the number of ranks, what is logged must
            # not.
            "masked_share": float((~no_answers[:, plan.present]).float().mean(dim=1) @ weights)
            / normaliser,
            "missing_windows": missing,
            "tokens": float(sum(int(mask.sum()) for mask in masks)),
        }
        return _Batch(queries, passages, rows, metrics)

    def _query_rows(self, plan: StepPlan, mine: slice) -> tuple[Tensor, Tensor]:
        families = [self.trainset.wordings[row] for row in plan.rows[mine]]
        width = self.trainset.num_wordings
        # A missing wording is encoded as the anchor and masked out: every rank runs the same
        # shapes.
        texts = [
            family[r] if r < len(family) else family[0] for family in families for r in range(width)
        ]
        ids = query_ids(self.tokenizer, texts, self.spec)
        return pad_right(ids, int(self.tokenizer.pad_token_id))

    def _passage_rows(self, plan: StepPlan) -> tuple[tuple[Tensor, Tensor], float]:
        """Ids and mask of this rank's slots, window after window, and the share that falls back to
        the anchor's rendering.
        """
        share = len(plan.slots) // self.world_size
        columns = range(self.rank * share, (self.rank + 1) * share)
        windows = self.trainset.num_windows
        rendered = [
            self.trainset.render(plan, column, window)
            for column in columns
            for window in range(windows)
        ]
        ids = passage_ids(self.tokenizer, [(title, text) for title, text, _ in rendered], self.spec)
        missing = sum(missing for _, _, missing in rendered) / max(1, len(rendered))
        return pad_right(ids, int(self.tokenizer.pad_token_id)), missing

    def _on_device(self, forward: Forward, ids: Tensor, mask: Tensor) -> Tensor:
        """[N, D] vectors of [N, T] ids."""
        device = next(self.module.parameters()).device
        return forward(to_device(ids, device), to_device(mask, device))


def _recall_at_5(
    cosines: Tensor, gold: list[int], counts: list[int], contents: Tensor
) -> tuple[float, float]:
    """Share of questions whose anchor has its passage in the top 5, and of those with it there for
    every wording.

    Args:
        cosines: [sum of counts, C], a question's wordings behind each other, the anchor first.
        gold: column of each question's passage.
        counts: wordings of each question.
        contents: [C], equal numbers mark equal texts, which are no rivals.
    """
    scores_of = iter(cosines)
    anchor, worst = 0.0, 0.0
    for place, count in zip(gold, counts, strict=True):
        others = contents != contents[place]
        hits = []
        for _ in range(count):
            scores = next(scores_of)
            hits.append(int((scores[others] >= scores[place]).sum()) < 5)
        anchor, worst = anchor + hits[0], worst + all(hits)
    return anchor / len(gold), worst / len(gold)


def _overlap_at_10(cosines: Tensor, counts: list[int]) -> float:
    """Jaccard overlap of the first 10 columns of a question's wordings with its anchor's, mean
    over wordings, then questions; 1 where no question has a second wording.

    Args:
        cosines, counts: as :func:`_recall_at_5` takes them.
    """
    top = cosines.topk(min(10, cosines.shape[1]), dim=1).indices.tolist()
    lists = iter(set(line) for line in top)
    means = []
    for count in counts:
        anchor, *others = [next(lists) for _ in range(count)]
        if others:
            means.append(fmean(len(anchor & other) / len(anchor | other) for other in others))
    return fmean(means) if means else 1.0
