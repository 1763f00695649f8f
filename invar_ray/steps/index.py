"""Vectors to what is searched: the ``index`` artifact, with BM25 of the same passages beside it."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow.parquet as pq

from invar_ray.answering.bm25 import FOLDER, MOST_PASSAGES, Bm25
from invar_ray.answering.fusion import DENSE_WEIGHT
from invar_ray.config import Config
from invar_ray.index.build import Limits, build_index, index_settings
from invar_ray.steps.centroids import load_centroids
from invar_ray.store.artifacts import Artifact, Building, Plan
from invar_ray.text.words import terms

VERSION = 3


def plan(
    config: Config,
    vectors: Artifact,
    passages: Artifact,
    name: str,
    centroids: Artifact | None = None,
) -> Plan:
    """The index of these vectors; a shard's has the ``centroids`` of all shards where its type has
    any.
    """
    parents = {"vectors": vectors, "passages": passages}
    return Plan(
        kind="index",
        name=name,
        config=index_settings(config.index) | {"dense_weight": _dense_weight(config, vectors)},
        parents=parents if centroids is None else parents | {"centroids": centroids},
        version=VERSION,
    )


def build(
    building: Building,
    config: Config,
    vectors: Artifact,
    passages: Artifact,
    centroids: Artifact | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Plan, train, fill and measure it, see :func:`invar_ray.index.build.build_index`; then BM25.

    Args:
        building: gets it.
        config: the run.
        vectors: what is searched.
        passages: whose they are.
        centroids: see :func:`plan`.
        say: gets what the planner has to say.
    """
    build_index(
        building,
        vectors,
        passages,
        config.index.factory,
        config.index.num_lists_searched,
        limits=Limits.of(config.index),
        workers=config.scale.cpu_workers or 1,
        centroids=None if centroids is None else load_centroids(centroids),
        say=say,
    )
    write_bm25(building, passages, say)
    building.info["dense_weight"] = building.plan.config["dense_weight"]


def _dense_weight(config: Config, vectors: Artifact) -> float:
    """The recipe's weight is of its trained retriever: other encoders keep theirs."""
    trained = "adapter" in vectors.manifest.parents
    return config.search.dense_weight if trained else DENSE_WEIGHT


def write_bm25(
    building: Building, passages: Artifact, say: Callable[[str], None] = lambda line: None
) -> None:
    """BM25 over title and text of every passage, into the folder ``bm25`` of an index; none where
    there are too many passages, or not one word.
    """
    count = building.info["rows"]
    if count > MOST_PASSAGES:
        say(f"  no BM25: {count:,} passages, above {MOST_PASSAGES:,}; searches are dense")
        return
    table = pq.read_table(passages.path("passages.parquet"), columns=["title", "text"])
    texts = [f"{row['title']} {row['text']}" for row in table.to_pylist()]
    if any(terms(text) for text in texts):
        Bm25(texts).save(building.path / FOLDER)
