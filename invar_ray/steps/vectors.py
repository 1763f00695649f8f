"""Passages to vectors: the ``vectors`` artifact.

The unit is a *shard*, some hundreds of passages.  An actor encodes a shard and writes it with its
entry last (:mod:`invar_ray.index.shards`).  A killed run keeps the finished shards; the next one
embeds the others only. Batches are formed inside a shard, so a shard's vectors do not depend on
which actor made it or when.

Where an earlier version of the same encoder and cutting stands, passages whose content is the same
keep their vectors: the new version links the shards of the earlier one, adds shards of its own, and
says in ``rows.parquet`` which row is whose.  Rows that are nobody's are tombstones; above
a share ``COMPACT_ABOVE`` of them a version is written compact.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from invar_ray import console
from invar_ray.config import Config
from invar_ray.console import Progress
from invar_ray.errors import ResourceError
from invar_ray.executor import Executor, Work
from invar_ray.index.layout import Layout, make_layout, passage_ids
from invar_ray.index.probes import NUM_PROBES, write_probes
from invar_ray.index.shards import (
    EmbedShard,
    PassageRows,
    ShardTask,
    TokenizeShard,
    read_entry,
    shard_is_whole,
)
from invar_ray.index.usage import Usage
from invar_ray.index.vectors import (
    ROWS_FILE,
    ROWS_SCHEMA,
    SHARDS,
    VectorStore,
    shard_name,
    unit_rows,
)
from invar_ray.models.encoder import EncoderSpec
from invar_ray.models.minilm import BUILTIN as MINILM
from invar_ray.models.minilm import coarse_tokenizer
from invar_ray.models.precision import inference_precision
from invar_ray.store.artifacts import Artifact, Building, Plan
from invar_ray.text.language import SAMPLE, english_share
from invar_ray.text.tokens import text_ids

_UNKNOWN_SHARE = 0.1  # of tokens; above it the coarse encoder is warned of
_ENGLISH_SHARE = 0.5  # of passages; below it MiniLM is
VERSION = 3
_SHARDS_AT_HOME = 2
"""So many are made before the actors of a cluster have started."""


def plan(
    config: Config, passages: Artifact, spec: EncoderSpec, name: str, adapter: Artifact | None
) -> Plan:
    """The artifact of all passages' vectors under one encoder."""
    parents = {"passages": passages} | ({"adapter": adapter} if adapter is not None else {})
    return Plan(
        kind="vectors",
        name=name,
        config={
            "encoder": spec.fingerprint,
            "precision": inference_precision(config, spec.kind),
        },
        parents=parents,
        version=VERSION,
    )


def build(
    building: Building,
    config: Config,
    passages: Artifact,
    spec: EncoderSpec,
    *,
    executor: Executor,
) -> None:
    """Embed every passage that no earlier version has embedded, shard by shard.

    Args:
        building: gets the shards.
        config: the run.
        passages: what is embedded.
        spec: the encoder.
        executor: where the shards are made; the vectors are the same.
    """
    started, cpu = time.monotonic(), time.process_time()
    precision = inference_precision(config, spec.kind)
    if spec.kind == "coarse":
        _warn_of_language(config, passages, spec)
    layout = make_layout(building, config, passages, spec)
    filesystem, prefix = building.filesystem, f"{building.prefix}/{SHARDS}"
    filesystem.create_dir(prefix, recursive=True)
    _remove_map(building)
    if layout.linked:
        _link_shards(layout, filesystem, prefix)
    done = _finished_shards(filesystem, prefix, layout, (spec.fingerprint, precision))
    todo = [task for task in layout.tasks if task.start not in done]
    if done:
        console.say(f"  {len(done)} of {len(layout.tasks)} shards stand from an earlier run")
    standing = sum(len(task.rows) for task in layout.tasks) - sum(len(task.rows) for task in todo)
    progress = Progress("embed", layout.rows_to_write, "passages", done=standing)
    usage = Usage()
    if todo:
        work = _work(todo, config, passages, spec, layout, prefix, f"embed {building.plan.name}")
        here = not executor.leaves(work)
        work = replace(work, arguments={**work.arguments, "own_process": not here})
        before = time.process_time()
        with contextlib.nullcontext() if here else executor.on_cluster(work.label):
            usage.load_cpu_s = time.process_time() - before
            for row in executor.run(work):
                progress.advance(usage.add(row, here=here))
                if here:
                    usage.load_cpu_s = float(row["start_cpu_s"]) - before
    _refuse_gaps(filesystem, prefix, layout)
    if layout.linked:
        table = pa.table([passage_ids(passages), pa.array(layout.rows)], schema=ROWS_SCHEMA)
        pq.write_table(table, building.path / ROWS_FILE)
    _write_probes(building, config, passages, layout)
    usage.driver_cpu_s = time.process_time() - cpu - usage.load_cpu_s - usage.here_cpu_s
    building.info |= {
        "encoder": spec.to_json(),
        "precision": precision,
        "rows": len(layout.rows),
        "shards": len(layout.tasks) + len(layout.linked),
        "seconds": round(time.monotonic() - started, 3),
        "embedded": layout.embedded,
        "reused": len(layout.rows) - layout.embedded,
        "since": layout.earlier.ref if layout.earlier is not None else None,
        "full_because": layout.full_because,
        "tombstones": layout.tombstones,
        "usage": usage.to_json(),
    }
    for line in usage.table(time.monotonic() - started):
        console.detail(f"  {line}")


def _warn_of_language(config: Config, passages: Artifact, spec: EncoderSpec) -> None:
    """One line if the coarse encoder does not know the language of the first passages."""
    with pq.ParquetFile(passages.path("passages.parquet")) as file:
        batch = next(file.iter_batches(SAMPLE, columns=["text"]), None)
    texts = batch.column("text").to_pylist() if batch is not None else []
    tokenizer = coarse_tokenizer(spec.base.location)
    ids = [id for row in text_ids(tokenizer, texts, max_tokens=128) for id in row]
    unknown = ids.count(tokenizer.unk_token_id) / max(1, len(ids))
    english = english_share(texts)
    if unknown > _UNKNOWN_SHARE:
        why = f"{unknown:.0%} of the passages' tokens are unknown to it"
    elif config.coarse.model == MINILM and english < _ENGLISH_SHARE:
        why = f"{1 - english:.0%} of the passages do not look English, and it knows English alone"
    else:
        return
    console.say(
        f"  warning: the teacher (coarse.model={config.coarse.model}) cannot judge this corpus: "
        f"{why}. Stage 1 would learn its errors. To do: set coarse.model to a sentence encoder for "
        "the corpus's language, or retriever.alignment_weight=0"
    )


def _work(
    todo: list[ShardTask],
    config: Config,
    passages: Artifact,
    spec: EncoderSpec,
    layout: Layout,
    prefix: str,
    label: str,
) -> Work:
    """Shards to make: a row each."""
    scale = config.scale
    on_gpu = scale.embed_gpus_per_worker > 0
    opened = {
        "root_uri": passages.store.root_uri,
        "passages_ref": passages.ref,
        "spec": spec.to_json(),
    }
    tokenizers = (
        scale.cpu_workers if scale.cpu_workers is not None else scale.fewest_embed_workers * on_gpu
    )
    return Work(
        label=label,
        worker=EmbedShard,
        arguments={
            **opened,
            "target_uri": passages.store.root_uri,
            "prefix": prefix,
            "scale": scale,
            "precision": inference_precision(config, spec.kind),
            "earlier_ref": layout.earlier.ref if layout.earlier is not None else None,
            "copies_only": layout.embedded == 0,
        },
        rows=[task.to_row() for task in todo],
        texts=sum(int((task.reuse < 0).sum()) for task in todo),
        leaves_from=_SHARDS_AT_HOME * scale.shard_rows + 1,
        workers=(scale.fewest_embed_workers, scale.most_embed_workers),
        num_cpus=1 if on_gpu else scale.cpus_per_worker,
        num_gpus=scale.embed_gpus_per_worker,
        # One shard in hand and none waiting at each actor: what a kill can undo stays small. A GPU
        # must not wait.
        in_flight=2 if on_gpu else 1,
        prepare=(TokenizeShard, opened, tokenizers) if tokenizers else None,
    )


def _remove_map(building: Building) -> None:
    """What an earlier try may have left: it may have meant to take over another version."""
    (building.path / ROWS_FILE).unlink(missing_ok=True)
    place = f"{building.prefix}/{ROWS_FILE}"
    if building.filesystem.get_file_info(place).type == fs.FileType.File:
        building.filesystem.delete_file(place)


def _link_shards(layout: Layout, filesystem: fs.FileSystem, prefix: str) -> None:
    """Take over the shards of the earlier version: they never change, so a local store links
    them.
    """
    if layout.earlier is None:
        return
    source = layout.earlier.store.location(layout.earlier.ref)
    for name in layout.linked:
        target = f"{prefix}/{name.rpartition('/')[2]}"
        if isinstance(filesystem, fs.LocalFileSystem):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(target)
            try:
                os.link(f"{source}/{name}", target)
                continue
            except OSError:  # a file system without links
                pass
        filesystem.copy_file(f"{source}/{name}", target)


def _finished_shards(
    filesystem: fs.FileSystem, prefix: str, layout: Layout, made_by: tuple[str, str]
) -> set[int]:
    """First rows of the shards that stand, are whole and were made by this (encoder, precision);
    all other files there are removed, so that none is published by accident.
    """
    finished = set()
    keep = {name.rpartition("/")[2] for name in layout.linked}
    for task in layout.tasks:
        stem = f"{prefix}/{shard_name(task.start)}"
        entry = read_entry(filesystem, stem)
        if (
            entry is not None
            and (entry["stop"], entry["input"]) == (task.stop, task.input)
            and (entry["encoder"], entry.get("precision", "fp32")) == made_by
            and shard_is_whole(filesystem, stem, entry)
        ):
            finished.add(task.start)
            keep |= {f"{shard_name(task.start)}{suffix}" for suffix in (".parquet", ".json")}
    for found in filesystem.get_file_info(fs.FileSelector(prefix, recursive=True)):
        if found.type == fs.FileType.File and found.base_name not in keep:
            filesystem.delete_file(found.path)
    return finished


def _refuse_gaps(filesystem: fs.FileSystem, prefix: str, layout: Layout) -> None:
    standing = {entry.base_name for entry in filesystem.get_file_info(fs.FileSelector(prefix))}
    lacking = [
        task.start
        for task in layout.tasks
        if not {f"{shard_name(task.start)}{suffix}" for suffix in (".parquet", ".json")} <= standing
    ]
    if lacking:
        raise ResourceError(
            f"{len(lacking)} of {len(layout.tasks)} shards are missing below {prefix} (first: row "
            f"{lacking[0]})",
            action="run the step again; make sure that only one run at a time embeds into this "
            "store",
        )


def _write_probes(building: Building, config: Config, passages: Artifact, layout: Layout) -> None:
    """Some passages with their vectors, as an index keeps them: the actors made them, no encoder is
    loaded for it.
    """
    table = PassageRows(passages)
    count = min(NUM_PROBES, len(table))
    chosen = np.linspace(0, len(table) - 1, num=count, dtype=np.int64)
    matrix = unit_rows(VectorStore(building.filesystem, building.prefix).take(layout.rows[chosen]))
    taken = table.take(chosen)
    texts = list(
        zip(taken.column("title").to_pylist(), taken.column("text").to_pylist(), strict=True)
    )
    write_probes(building.path / "probes.parquet", texts, matrix)
