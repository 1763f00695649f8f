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

import pyarrow as pa
import pyarrow.parquet as pq

from invar_ray.answering.retriever import Passages
from invar_ray.config import Config, load_config
from invar_ray.index.probes import write_probes
from invar_ray.models.encoder import EncoderSpec, coarse_spec, llm_spec, open_encoder
from invar_ray.models.precision import inference_precision
from invar_ray.pipeline import Pipeline
from invar_ray.steps import hits as hits_module
from invar_ray.steps.hits import SearchBlock, hits_plan
from invar_ray.steps.questions import load_examples, load_variants
from invar_ray.steps.readings import build_readings, readings_plan
from invar_ray.steps.vectors import EmbedShard, vectors_plan
from invar_ray.store.artifacts import Artifact, Building

OVERRIDES = (
    "model.tiny.num_layers=1",
    "model.tiny.intermediate_size=64",
    "questions.train_limit=15",
    "questions.dev_limit=6",
    "corpus.distractors=10",
    "retriever.global_batch_size=6",
    "retriever.num_hard_negatives=2",
    "retriever.mining_depth=10",
    "generator.global_batch_size=4",
    "generator.distractor_share=0.3",
    "generator.max_tokens=160",
    "index.num_probes=4",
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
    pipeline = Pipeline(config, quiet=True)
    embed_here(pipeline, "minilm", coarse_spec(config.coarse))
    embed_here(pipeline, "base", llm_spec(config.model, pipeline.base))
    hits, passages = search_here(pipeline, pipeline.base_index, "train"), pipeline.passages
    readings, _ = pipeline.store.get_or_build(
        readings_plan(config, hits, passages),
        lambda building: build_readings(building, hits, passages),
    )
    base = pipeline.base
    return SmallStore(
        config,
        pipeline.trainset,
        readings,
        {
            "trainset": pipeline.trainset.ref,
            "encoder": llm_spec(config.model, base, ("retriever/x", "x")).to_json(),
        },
        {
            "readings": readings.ref,
            "base": {entry.name: getattr(base, entry.name) for entry in fields(base)},
        },
    )


def embed_here(
    pipeline: Pipeline, name: str, spec: EncoderSpec, adapter: Artifact | None = None
) -> Artifact:
    """The vectors of all passages, as ``build_vectors`` makes them, with one actor's code run in
    this process.
    """
    config, passages = pipeline.config, pipeline.passages

    def body(building: Building) -> None:
        prefix = f"{building.prefix}/shards"
        building.filesystem.create_dir(prefix, recursive=True)
        root, rows, step = passages.store.root_uri, len(Passages(passages)), config.scale.shard_rows
        actor = EmbedShard(
            root,
            passages.ref,
            spec.to_json(),
            root,
            prefix,
            config.scale,
            inference_precision(config, spec.kind),
        )
        starts = list(range(0, rows, step))
        actor({"start": starts, "stop": [min(start + step, rows) for start in starts]})
        texts = [
            (passage.title, passage.text)
            for passage in Passages(passages).rows(range(config.index.num_probes))
        ]
        matrix = open_encoder(spec, passages.store).encode_passages(texts)
        write_probes(building.path / "probes.parquet", texts, matrix)
        building.info |= {"encoder": spec.to_json(), "rows": rows}

    plan = vectors_plan(config, passages, spec, name, adapter)
    return pipeline.store.get_or_build(plan, body)[0]


def search_here(pipeline: Pipeline, index: Artifact, split: str) -> Artifact:
    """The hits of a split, as ``build_hits`` makes them, in this process."""
    top_k = pipeline.config.evaluation.top_k if split == "dev" else pipeline.config.generator.top_k

    def body(building: Building) -> None:
        examples, variants = (
            load_examples(pipeline.questions, split),
            load_variants(pipeline.questions, split),
        )
        families = [[variant.text for variant in variants[example.id]] for example in examples]
        found = SearchBlock(index.uri, top_k, "fp32")({"block": 0, "wordings": families})["hits"]
        rows = [
            {
                "question_id": example.id,
                "wordings": family,
                "answers": list(example.answers),
                "positive_ids": list(example.positive_ids),
                "hits": hits,
            }
            for example, family, hits in zip(examples, families, found, strict=True)
        ]
        pq.write_table(
            pa.Table.from_pylist(rows, schema=hits_module._ROW), building.path / "hits.parquet"
        )
        building.info |= {"questions": len(rows), "split": split, "top_k": top_k}

    plan = hits_plan(pipeline.config, index, pipeline.questions, split, top_k)
    return pipeline.store.get_or_build(plan, body)[0]
