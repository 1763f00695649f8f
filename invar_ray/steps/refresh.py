"""New hard negatives while stage 1 trains: what the job beside the training does (ANCE, arXiv
2007.00808).

It makes the artifacts that come before any training, under the adapter of the moment: vectors,
index, training set. The rules of mining are the same code, so a version is a training set like the
first one, with its own report.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as pq

from invar_ray.config import Config
from invar_ray.executor import OnRay
from invar_ray.models.encoder import EncoderSpec
from invar_ray.schema import PASSAGE_SCHEMA
from invar_ray.steps import index as index_step
from invar_ray.steps import trainset as trainset_step
from invar_ray.steps import vectors as vectors_step
from invar_ray.steps.passages import VERSION
from invar_ray.store.artifacts import Artifact, Building, Plan, Store
from invar_ray.store.rowgroups import TableWriter

NAME = "refresh"
_READ_ROWS = 8192


def refresh_negatives(
    config: Config, root_uri: str, adapter_ref: str, trainset_ref: str, current_ref: str
) -> dict[str, Any]:
    """Embed the corpus (or the part that ``refresh_share`` names) with an adapter and
    mine anew.

    What stands already is taken: a job that was cut off goes on.

    Args:
        config: the run.
        root_uri: of the store.
        adapter_ref: the adapter of the moment.
        trainset_ref: the training set that the run began with.
        current_ref: the one that is in use.

    Returns:
        ``trainset``, the ref of the new one; ``mining``, what each rule dropped; ``changed_share``,
        of the new negatives those that their question did not have before; ``passages``, how many
        were searched; ``scratch``, refs that nothing needs any more; ``seconds``.
    """
    started = time.monotonic()
    store = Store(root_uri)
    adapter, first = store.open(adapter_ref, "retriever"), store.open(trainset_ref, "trainset")
    passages, questions, teacher = (
        first.parent(role) for role in ("passages", "questions", "teacher")
    )
    part = _part(config, passages, first)
    spec = EncoderSpec.from_json(adapter.info["encoder"])
    # There is no version before: every refresh has an encoder of its own.
    anew = replace(config, scale=replace(config.scale, incremental=False))
    executor = OnRay(config.scale)  # it runs in a task of the Ray that trains
    vectors, _ = store.get_or_build(
        vectors_step.plan(config, part, spec, NAME, adapter),
        lambda building: vectors_step.build(building, anew, part, spec, executor=executor),
        resumable=True,
    )
    index, _ = store.get_or_build(
        index_step.plan(config, vectors, part, NAME),
        lambda building: index_step.build(building, config, vectors, part),
        alone=True,
    )
    trainset, _ = store.get_or_build(
        trainset_step.plan(config, passages, questions, index, teacher),
        lambda building: trainset_step.build(
            building, config, passages, questions, index, teacher, executor=executor
        ),
        alone=True,
    )
    return {
        "trainset": trainset.ref,
        "mining": trainset.info["mining"],
        "changed_share": changed_share(store.open(current_ref, "trainset"), trainset),
        "passages": int(vectors.info["rows"]),
        "scratch": [index.ref, vectors.ref],
        "seconds": round(time.monotonic() - started, 1),
    }


def changed_share(before: Artifact, after: Artifact) -> float:
    """Of the negatives of a training set, the share that their question did not have in another
    one.
    """
    old, new = _negatives(before), _negatives(after)
    total = sum(map(len, new.values()))
    fresh = sum(len(found - old.get(question, set())) for question, found in new.items())
    return fresh / total if total else 0.0


def _negatives(trainset: Artifact) -> dict[str, set[str]]:
    """Question id -> passage ids."""
    ids = (
        pq.read_table(trainset.path("slots.parquet"), columns=["passage_id"]).column(0).to_pylist()
    )
    rows = pq.read_table(
        trainset.path("questions.parquet"), columns=["question_id", "negatives"]
    ).to_pylist()
    return {row["question_id"]: {ids[slot] for slot in row["negatives"]} for row in rows}


def _part(config: Config, passages: Artifact, trainset: Artifact) -> Artifact:
    """The passages that are embedded: all, or an artifact of a sample with all that a training set
    holds.
    """
    share = config.experimental.retriever.refresh_share
    if share >= 1.0:
        return passages
    plan = Plan(
        kind="passages",
        name=f"{config.name}-part",
        config={**passages.manifest.config, "share": share, "part_seed": config.seed},
        parents={"passages": passages, "trainset": trainset},
        version=VERSION,
    )

    def body(building: Building) -> None:
        slots = pq.read_table(trainset.path("slots.parquet"), columns=["passage_id"]).column(0)
        held = slots.unique()
        start = 0
        with (
            pq.ParquetFile(passages.path("passages.parquet")) as file,
            TableWriter(building.path / "passages.parquet") as writer,
        ):
            count = file.metadata.num_rows
            kept = np.zeros(count, bool)
            draw = random.Random(f"{config.seed}-part")
            kept[draw.sample(range(count), math.ceil(share * count))] = True
            for batch in file.iter_batches(_READ_ROWS, columns=PASSAGE_SCHEMA.names):
                some = pa.Table.from_batches([batch])
                needed = compute.is_in(some.column("id"), value_set=held)
                drawn = pa.array(kept[start : start + some.num_rows])
                writer.add(some.filter(compute.or_(needed, drawn)))
                start += some.num_rows
        building.info |= {"passages": writer.rows, "of": count}

    return passages.store.get_or_build(plan, body, alone=True)[0]
