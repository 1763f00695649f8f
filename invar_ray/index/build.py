"""From a ``vectors`` artifact to an index artifact: plan, train on a sample, add shard by shard,
measure, refuse.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from invar_ray.config import IndexConfig
from invar_ray.errors import ArtifactError
from invar_ray.index.blocks import Rows, VectorBlocks, Vectors, check_ids, vector_blocks
from invar_ray.index.faiss_index import (
    INDEX_FILE,
    Index,
    add_all,
    exact_best,
    give_centroids,
    new_index,
    save_index,
    train,
)
from invar_ray.index.planner import (
    AUTO,
    DEFAULT_LATENCY_MS,
    DEFAULT_RECALL,
    Candidate,
    Need,
    named,
    plan_index,
    render,
)
from invar_ray.models.precision import made_in
from invar_ray.store.artifacts import Artifact, Building

TOP_K = 10
_SEED = 0
_TRAINING_ROWS = 256 * 1024
"""Most rows that an explicit factory is trained on: FAISS drops more than 256 a list."""


@dataclass(frozen=True)
class Limits:
    """What a planned or measured index must keep to; see :class:`~invar_ray.config.IndexConfig`."""

    recall_target: float | None = None
    max_memory_bytes: int | None = None
    max_latency_ms: float | None = None
    num_queries: int = 200

    @staticmethod
    def of(settings: IndexConfig) -> Limits:
        """The limits of a config."""
        memory = None if settings.max_memory_mb is None else int(settings.max_memory_mb * 1e6)
        return Limits(settings.recall_target, memory, settings.max_latency_ms)

    def need(self, rows: int, dimension: int) -> Need:
        """What the planner is asked for so many vectors."""
        return Need(
            rows,
            dimension,
            DEFAULT_RECALL if self.recall_target is None else self.recall_target,
            self.max_memory_bytes,
            DEFAULT_LATENCY_MS if self.max_latency_ms is None else self.max_latency_ms,
        )


def index_settings(settings: IndexConfig) -> dict[str, Any]:
    """What of a config decides an index, for its plan."""
    return {
        "factory": settings.factory,
        "num_lists_searched": settings.num_lists_searched if "IVF" in settings.factory else None,
        "recall_target": settings.recall_target,
        "max_memory_mb": settings.max_memory_mb,
        "max_latency_ms": settings.max_latency_ms,
    }


def first_planned(
    settings: IndexConfig, rows: int, dimension: int, *, strict: bool = False
) -> Candidate:
    """What is predicted of the index that a config asks for: of ``auto`` the type tried first.

    Args:
        settings: what is asked for.
        rows, dimension: N and D.
        strict: a type that misses the latency is none, whether somebody asked for it or not.

    Raises:
        ResourceError: if no type fits the limits.
    """
    need = Limits.of(settings).need(rows, dimension)
    if settings.factory == AUTO:
        asked = strict or settings.max_latency_ms is not None
        return plan_index(need, strict=asked).tries[0]
    return named(settings.factory, need)


def lists_to_share(factory: str) -> int:
    """Lists of an IVF whose centroids other indexes can share; 0 of any other, such as one that
    turns its vectors before.
    """
    found = re.match(r"IVF(\d+)", factory)
    return int(found[1]) if found else 0


def build_index(
    building: Building,
    vectors: Artifact,
    passages: Artifact,
    factory: str,
    num_lists_searched: int = 1,
    *,
    limits: Limits | None = None,
    workers: int = 1,
    centroids: Vectors | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Fill an index artifact from a ``vectors`` artifact, in the order of its ``passages``.

    Args:
        building: what is made.
        vectors, passages: its parents.
        factory: FAISS's string, or ``auto`` for the planner's choice.
        num_lists_searched: depth of an explicit IVF; of a planned index it is measured.
        limits: for ``auto``; of an explicit factory only ``recall_target`` counts, if it is set.
        workers: threads that add blocks, each to a part of its own.
        centroids: [L, D] of an IVF of L lists, trained on more than these vectors; an index of
            another type, or of other lists, does without.
        say: prints the plan and what came of it.

    Raises:
        MixedArtifactsError: if the vectors are not those of the passages.
        ArtifactError: if recall@10 against exact search stays below the target; nothing is
            published then.
        ResourceError: if no type fits the limits.
    """
    vectors.verify()
    blocks = vector_blocks(vectors)
    check_ids(blocks, vectors, passages)
    limits = limits or Limits()

    def filled(factory: str, training_rows: int) -> Any:
        return fill(blocks, factory, training_rows, workers, centroids)

    if factory == AUTO:
        info = _build_planned(building, blocks, limits, filled, say)
    else:
        info = _build_named(building, blocks, factory, num_lists_searched, limits, filled, say)
    building.info |= {
        "encoder": vectors.info["encoder"],
        "precision": made_in(vectors),
        "rows": blocks.rows,
        "dimension": blocks.dimension,
        **info,
    }
    store = vectors.store
    # Not by vectors.path(), which takes all of an object store's vectors to this machine.
    with store.filesystem.open_input_file(store.location(f"{vectors.ref}/probes.parquet")) as file:
        (building.path / "probes.parquet").write_bytes(file.read())


def _build_named(
    building: Building,
    blocks: VectorBlocks,
    factory: str,
    depth: int,
    limits: Limits,
    filled: Callable[[str, int], Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    built = filled(factory, _TRAINING_ROWS)
    save_index(built, building.path / INDEX_FILE)
    info: dict[str, Any] = {"factory": factory, "num_lists_searched": depth}
    if limits.recall_target is not None and factory != "Flat":
        index = Index(built, depth)
        trial = sampled_trial(blocks, limits.num_queries)
        recall = measure_recall(index, trial, depth)
        say(
            f"  {factory}: recall@10 of {recall:.3f} against exact search on {len(trial.queries)} "
            "vectors"
        )
        if recall < limits.recall_target:
            raise _too_low(
                factory,
                recall,
                limits.recall_target,
                "raise index.num_lists_searched, or set factory to auto",
            )
        info |= {"recall_at_10": recall, "recall_target": limits.recall_target}
    return info


def _build_planned(
    building: Building,
    blocks: VectorBlocks,
    limits: Limits,
    filled: Callable[[str, int], Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    need = limits.need(blocks.rows, blocks.dimension)
    choice = plan_index(need, strict=limits.max_latency_ms is not None)
    say(render(choice))
    trial = sampled_trial(blocks, limits.num_queries)
    best, best_factory = 0.0, ""
    for candidate in choice.tries:
        started, used = time.monotonic(), time.process_time()
        built = filled(candidate.factory, candidate.training_rows)
        seconds, cpu = time.monotonic() - started, time.process_time() - used
        save_index(built, building.path / INDEX_FILE)
        depth, recall, latency = tune(Index(built), candidate, trial, need.recall_target)
        say(
            f"  {candidate.factory}: built in {seconds:.1f} s ({cpu:.1f} s of CPU), recall@10 "
            f"{recall:.3f} at depth "
            f"{depth}, {latency:.2f} ms a query on average"
        )
        if recall >= need.recall_target:
            return {
                "factory": candidate.factory,
                "search_depth": depth,
                "recall_at_10": recall,
                "recall_target": need.recall_target,
                "plan": {"need": asdict(need), "chosen": asdict(candidate)},
                "measured": {
                    "file_bytes": os.path.getsize(building.path / INDEX_FILE),
                    "build_seconds": round(seconds, 3),
                    "build_cpu_seconds": round(cpu, 3),
                    "queries": len(trial.queries),
                },
            }
        if recall > best:
            best, best_factory = recall, candidate.factory
    raise _too_low(
        best_factory,
        best,
        need.recall_target,
        "allow more memory or latency, or lower index.recall_target",
    )


def fill(
    blocks: VectorBlocks,
    factory: str,
    training_rows: int,
    workers: int = 1,
    centroids: Vectors | None = None,
) -> Any:
    """A FAISS index of all blocks, trained on a sample of them; its lists are those of
    ``centroids`` where it has as many.
    """
    index = new_index(blocks.dimension, factory, blocks.rows)
    if centroids is not None and lists_to_share(factory) == len(centroids):
        give_centroids(index, centroids)
    if not index.is_trained:
        train(index, blocks.sample(training_rows, _SEED)[0], factory)
    # Neighbouring blocks go to one worker: parts are merged in order, and the result is that of
    # adding in order.
    cuts = np.linspace(
        0, len(blocks), num=max(1, min(workers, len(blocks))) + 1, dtype=int
    ).tolist()
    return add_all(index, [blocks.some(first, last) for first, last in itertools.pairwise(cuts)])


@dataclass(frozen=True)
class Trial:
    """What an index is measured on.

    Attributes:
        queries: [N, D].
        exact: [N, 10] rows of their nearest, -1 where there are fewer.
        own: [N] the queries' own rows, which do not count; -1 for a query that is not in the index.
    """

    queries: Vectors
    exact: Rows
    own: Rows


def sampled_trial(blocks: VectorBlocks, num_queries: int) -> Trial:
    """Vectors of the index as queries, and the 10 nearest others of each by a pass over all
    blocks.
    """
    queries, own = blocks.sample(num_queries, _SEED + 1)
    return Trial(queries, _without(exact_best(queries, blocks.some(), TOP_K + 1), own), own)


def _without(found: Rows, own: Rows) -> Rows:
    # A vector finds itself with any depth: that says nothing.
    lines = [
        [row for row in line if row != mine]
        for line, mine in zip(found.tolist(), own.tolist(), strict=True)
    ]
    return np.asarray([(line + [-1] * TOP_K)[:TOP_K] for line in lines], dtype=np.int64)


def measure_recall(index: Index, trial: Trial, depth: int) -> float:
    """Mean share of the exact 10 nearest that a search at ``depth`` finds among its own 10."""
    _, rows = index.search(trial.queries, TOP_K + 1, depth=depth)
    shares = []
    for line, wanted in zip(_without(rows, trial.own).tolist(), trial.exact.tolist(), strict=True):
        truth = {row for row in wanted if row >= 0}
        shares.append(len(truth.intersection(line)) / len(truth) if truth else 1.0)
    return float(np.mean(shares))


def tune(
    index: Index, candidate: Candidate, trial: Trial, target: float
) -> tuple[int, float, float]:
    """Depth, recall and milliseconds a query: the least depth that reaches the target, else the one
    that finds most.
    """
    found = []
    for depth in candidate.depths or (1,):
        found.append((depth, measure_recall(index, trial, depth)))
        if found[-1][1] >= target:
            break
    depth, recall = max(found, key=lambda each: each[1])
    return depth, recall, _latency(index, trial.queries, depth)


def _latency(index: Index, queries: Vectors, depth: int) -> float:
    started = time.process_time()
    for query in queries[:20]:
        index.search(query[None], TOP_K, depth=depth)
    return 1e3 * (time.process_time() - started) / min(20, len(queries))


def _too_low(factory: str, recall: float, target: float, action: str) -> ArtifactError:
    return ArtifactError(
        f"the index {factory} finds {recall:.3f} of what exact search finds (recall@10): not "
        "published",
        expected=f"{target:.3f} or more (index.recall_target)",
        action=action,
    )
