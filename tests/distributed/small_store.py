"""A small store for tests, made in one process without Ray: a one-layer base, some 30 documents,
what both stages train on.

The artifacts are the pipeline's own (same plans, same code, same fingerprints), so a
:class:`Pipeline` over the same config finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from invar_ray.config import Config, load_config
from invar_ray.executor import Here
from invar_ray.models.encoder import llm_spec
from invar_ray.pipeline import Pipeline
from invar_ray.steps import readings
from invar_ray.store.artifacts import Artifact

OVERRIDES = (
    "experimental.model.tiny.num_layers=1",
    "experimental.model.tiny.intermediate_size=64",
    "questions.train_limit=15",
    "questions.dev_limit=6",
    "corpus.distractors=10",
    "retriever.global_batch_size=6",
    "retriever.num_hard_negatives=2",
    "experimental.retriever.mining_depth=10",
    "generator.global_batch_size=4",
    "generator.distractor_share=0.3",
    "generator.max_tokens=160",
    "scale.shard_rows=8",
)


@dataclass(frozen=True)
class SmallStore:
    """What a stage is made from."""

    config: Config
    trainset: Artifact
    readings: Artifact
    retriever_inputs: dict[str, Any]
    generator_inputs: dict[str, Any]


def small_config(root: Path | str, overrides: Sequence[str] = ()) -> Config:
    return load_config("tiny", [f"storage.root_uri={root}", *OVERRIDES, *overrides])


def small_store(root: Path | str, overrides: Sequence[str] = ()) -> SmallStore:
    """Make it, or open it if it stands."""
    config = small_config(root, overrides)
    pipeline = Pipeline(config, quiet=True, executor=Here())
    hits, passages = pipeline.hits(pipeline.base_index, "train"), pipeline.passages
    read, _ = pipeline.store.get_or_build(
        readings.plan(config, hits, passages),
        lambda building: readings.build(building, hits, passages),
    )
    base = pipeline.base
    return SmallStore(
        config,
        pipeline.trainset,
        read,
        {
            "trainset": pipeline.trainset.ref,
            "encoder": llm_spec(config.model, base, ("retriever/x", "x")).to_json(),
        },
        {
            "readings": read.ref,
            "base": {entry.name: getattr(base, entry.name) for entry in fields(base)},
        },
    )
