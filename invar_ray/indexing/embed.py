"""Passages to vectors on Ray Data: the ``vectors`` artifact.

The unit is a *shard*, a range of passage rows.  An actor encodes a shard and writes ``shards/part-<first
row>.parquet``, then its ``.json`` with row range and checksum.  A killed run keeps the finished shards; the next one
embeds the others only. Batches are formed inside a shard, so a shard's vectors do not depend on which actor made it or
when.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from pyarrow import fs

from invar_ray.artifacts import Artifact, Building, Plan, Store, resolve_uri
from invar_ray.config import Config, ScaleConfig
from invar_ray.errors import ResourceError
from invar_ray.models.encoder import Encoder, EncoderSpec, open_encoder
from invar_ray.progress import Progress
from invar_ray.retrieval.probes import write_probes
from invar_ray.retrieval.retriever import Passages
from invar_ray.schema import vector_schema
from invar_ray.versions import STEPS

_SHARDS_AT_HOME = 2


def vectors_plan(config: Config, passages: Artifact, spec: EncoderSpec, name: str, adapter: Artifact | None) -> Plan:
    """The artifact of all passages' vectors under one encoder."""
    parents = {"passages": passages} | ({"adapter": adapter} if adapter is not None else {})
    return Plan(
        kind="vectors",
        name=name,
        config={"encoder": spec.fingerprint, "num_probes": config.index.num_probes},
        parents=parents,
        version=STEPS["vectors"].version,
    )


def needs_cluster(config: Config, passages: Artifact) -> bool:
    """Whether embedding is worth a cluster: a shard or two are done before its actors have started."""
    scale = config.scale
    joins = scale.ray_address is not None or bool(os.environ.get("RAY_ADDRESS"))
    rows = passages.info.get("passages")
    small = rows is not None and rows <= _SHARDS_AT_HOME * scale.shard_rows
    return joins or scale.embed_gpus_per_worker > 0 or not small


def build_vectors(
    building: Building, config: Config, passages: Artifact, spec: EncoderSpec, *, on_ray: bool = True
) -> None:
    """Embed every passage, shard by shard: on ``scale.embed_workers`` actors of the running Ray, or in this process.

    The vectors are the same: batches are formed inside a shard.
    """
    scale = config.scale
    rows = len(Passages(passages))
    filesystem, prefix = building.filesystem, f"{building.prefix}/shards"
    filesystem.create_dir(prefix, recursive=True)
    wanted = [(start, min(start + scale.shard_rows, rows)) for start in range(0, rows, scale.shard_rows)]
    done = _finished_shards(filesystem, prefix, set(wanted))
    todo = [{"start": start, "stop": stop} for start, stop in wanted if (start, stop) not in done]
    if done:
        print(f"  {len(done)} of {len(wanted)} shards stand from an earlier run", flush=True)
    progress = Progress("embed", rows, "passages", done=sum(stop - start for start, stop in done))
    started = time.monotonic()
    arguments: dict[str, Any] = {
        "root_uri": passages.store.root_uri,
        "passages_ref": passages.ref,
        "spec": spec.to_json(),
        "target_uri": passages.store.root_uri,
        "prefix": prefix,
        "scale": scale,
        "precision": config.model.precision,
    }
    if todo and not on_ray:
        actor = EmbedShard(**arguments)
        for shard in todo:
            done_rows = actor({"start": [shard["start"]], "stop": [shard["stop"]]})["rows"]
            progress.advance(int(done_rows.sum()))
    elif todo:
        stream = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            EmbedShard,
            fn_constructor_kwargs=arguments,
            batch_size=1,
            num_cpus=scale.cpus_per_worker if scale.embed_gpus_per_worker == 0 else 1,
            num_gpus=scale.embed_gpus_per_worker or None,
            compute=ray.data.ActorPoolStrategy(size=min(scale.embed_workers, len(todo))),
        )
        for row in stream.iter_rows():
            progress.advance(int(row["rows"]))
    standing = {entry.base_name for entry in filesystem.get_file_info(fs.FileSelector(prefix))}
    lacking = [
        start for start, _ in wanted if not {f"part-{start:010d}.parquet", f"part-{start:010d}.json"} <= standing
    ]
    if lacking:
        raise ResourceError(
            f"{len(lacking)} of {len(wanted)} shards are missing below {prefix} (first: row {lacking[0]})",
            action="run the step again; make sure that only one run at a time embeds into this store",
        )
    _write_probes(building, config, passages, spec)
    building.info |= {
        "encoder": spec.to_json(),
        "rows": rows,
        "shards": len(wanted),
        "seconds": round(time.monotonic() - started, 3),
    }


class EmbedShard:
    """Ray Data actor: loads the encoder once, then turns row ranges into shard files."""

    def __init__(
        self,
        root_uri: str,
        passages_ref: str,
        spec: dict[str, Any],
        target_uri: str,
        prefix: str,
        scale: ScaleConfig,
        precision: str,
    ) -> None:
        store = Store(root_uri)
        self._passages = Passages(store.open(passages_ref, "passages"))
        device = "cuda" if scale.embed_gpus_per_worker > 0 else "cpu"
        self._encoder = open_encoder(EncoderSpec.from_json(spec), store, precision=precision, device=device)
        if isinstance(self._encoder, Encoder):
            self._encoder.tokens_per_batch = scale.embed_tokens_per_batch
        self._filesystem, _ = resolve_uri(target_uri)
        self._prefix = prefix

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embed the row ranges of a batch; returns their row counts."""
        counts = []
        for start, stop in zip(batch["start"], batch["stop"], strict=True):
            passages = self._passages.rows(range(int(start), int(stop)))
            matrix = self._encoder.encode_passages([(passage.title, passage.text) for passage in passages])
            schema = vector_schema(matrix.shape[1])
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])
            ids = pa.array([passage.id for passage in passages])
            table = pa.table([ids, vectors.cast(schema.field("vector").type)], schema=schema)
            _write_shard(self._filesystem, self._prefix, int(start), int(stop), table)
            counts.append(len(passages))
        return {"rows": np.asarray(counts)}


def _write_shard(filesystem: fs.FileSystem, prefix: str, start: int, stop: int, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content = sink.getvalue().to_pybytes()
    entry = {"start": start, "stop": stop, "sha256": hashlib.sha256(content).hexdigest()}
    for suffix, data in ((".parquet", content), (".json", json.dumps(entry).encode())):
        target = f"{prefix}/part-{start:010d}{suffix}"
        if isinstance(filesystem, fs.LocalFileSystem):
            temporary = f"{prefix}/.part-{start:010d}{suffix}.{time.time_ns()}"
            with filesystem.open_output_stream(temporary) as stream:
                stream.write(data)
            filesystem.move(temporary, target)
        else:  # an object appears whole or not at all
            with filesystem.open_output_stream(target) as stream:
                stream.write(data)


def _finished_shards(filesystem: fs.FileSystem, prefix: str, wanted: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """Shards that stand and are whole; all other files there are removed, so that none is published by accident."""
    finished: set[tuple[int, int]] = set()
    keep: set[str] = set()
    entries = [entry.path for entry in filesystem.get_file_info(fs.FileSelector(prefix, recursive=True))]
    for path in entries:
        name = Path(path).name
        if name.startswith(".") or not name.endswith(".json"):
            continue
        with filesystem.open_input_file(path) as stream:
            try:
                entry = json.loads(stream.read())
            except ValueError:
                continue
        data = path.removesuffix(".json") + ".parquet"
        span = (int(entry["start"]), int(entry["stop"]))
        if span in wanted and data in entries:
            with filesystem.open_input_file(data) as stream:
                if hashlib.sha256(stream.read()).hexdigest() == entry["sha256"]:
                    finished.add(span)
                    keep |= {path, data}
    for path in entries:
        if path not in keep:
            filesystem.delete_file(path)
    return finished


def _write_probes(building: Building, config: Config, passages: Artifact, spec: EncoderSpec) -> None:
    encoder = open_encoder(spec, passages.store, precision=config.model.precision)
    table = Passages(passages)
    count = min(config.index.num_probes, len(table))
    chosen = np.linspace(0, len(table) - 1, num=count, dtype=int).tolist()
    texts = [(passage.title, passage.text) for passage in table.rows(chosen)]
    write_probes(building.path / "probes.parquet", encoder, texts)
