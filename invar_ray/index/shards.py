"""Shards of vectors: what is to be embedded, what stands already, and the actors' two halves of the
work.

A shard is written whole: first ``part-<row>.parquet``, then ``part-<row>.json`` with its rows, the
hash of what went in, the encoder and a checksum.  Only with that file does it count.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from invar_ray.config import ScaleConfig
from invar_ray.heap import keep_freed_memory
from invar_ray.index.vectors import Halves, VectorStore, shard_name, vector_store
from invar_ray.models.batching import EncodeStats, refuse_not_finite
from invar_ray.models.encoder import EncoderSpec, TextEncoder, open_encoder, open_tokenizer
from invar_ray.models.precision import Precision, inference_device
from invar_ray.schema import shard_schema
from invar_ray.store.artifacts import Artifact, Store, resolve_uri
from invar_ray.store.earlier import passage_digest

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShardTask:
    """A shard to make.

    Attributes:
        start: its first row among the vectors.
        rows: the passages it holds.
        reuse: for each the row of the version before that has its vector, or -1.
        input: hash of the passages' numbers and contents.
    """

    start: int
    rows: Rows
    reuse: Rows
    input: str

    @property
    def stop(self) -> int:
        """The first row after it."""
        return self.start + len(self.rows)

    def to_row(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "start": self.start,
            "stop": self.stop,
            "rows": self.rows.tobytes(),
            "reuse": self.reuse.tobytes(),
            "input": self.input,
        }

    @staticmethod
    def of_row(row: dict[str, Any]) -> ShardTask:
        """What :meth:`to_row` wrote."""
        rows, reuse = (np.frombuffer(row[name], np.int64) for name in ("rows", "reuse"))
        return ShardTask(int(row["start"]), rows, reuse, str(row["input"]))


def input_hash(rows: Rows, contents: list[bytes]) -> str:
    """32 hex digits that change with which passages a shard holds and with what they say."""
    hasher = hashlib.sha256(np.asarray(rows, dtype="<i8").tobytes())
    hasher.update(b"".join(contents))
    return hasher.hexdigest()[:32]


class PassageRows:
    """Rows of ``passages.parquet``, read by row group: an actor holds one group, not the corpus."""

    def __init__(self, passages: Artifact) -> None:
        store = passages.store
        self._file = pq.ParquetFile(
            store.filesystem.open_input_file(store.location(f"{passages.ref}/passages.parquet"))
        )
        metadata = self._file.metadata
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._bounds = np.cumsum([0, *counts])
        self._group: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def take(self, rows: Rows) -> pa.Table:
        """``id``, ``title`` and ``text`` of these rows, ascending."""
        parts = []
        groups = np.searchsorted(self._bounds, rows, side="right") - 1
        for group in np.unique(groups):
            parts.append(
                self._read(int(group)).take(pa.array(rows[groups == group] - self._bounds[group]))
            )
        return pa.concat_tables(parts)

    def _read(self, group: int) -> pa.Table:
        if self._group is None or self._group[0] != group:
            self._group = group, self._file.read_row_group(group, columns=["id", "title", "text"])
        return self._group[1]


class TokenizeShard:
    """Adds the token ids of the passages to embed, so that the GPU does
    not wait for them.
    """

    def __init__(self, root_uri: str, passages_ref: str, spec: dict[str, Any]) -> None:
        store = Store(root_uri)
        self._passages = PassageRows(store.open(passages_ref, "passages"))
        self._tokenize = open_tokenizer(EncoderSpec.from_json(spec), store)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Adds ``tokens`` (int32, one after the other) and ``lengths``."""
        task = ShardTask.of_row(row)
        ids = self._tokenize(_pairs(self._passages.take(task.rows[task.reuse < 0])))
        tokens = np.asarray([token for text in ids for token in text], np.int32)
        lengths = np.asarray([len(text) for text in ids], np.int32)
        return {**row, "tokens": tokens.tobytes(), "lengths": lengths.tobytes()}


class EmbedShard:
    """Loads the encoder once, then turns passages into shard files.

    A shard that stands is left as it is: Ray may hand a task out twice, e.g. after it lost a node.
    With ``own_process`` nothing else runs in this process, and its heap is set for encoding.
    """

    def __init__(
        self,
        root_uri: str,
        passages_ref: str,
        spec: dict[str, Any],
        target_uri: str,
        prefix: str,
        scale: ScaleConfig,
        precision: Precision,
        earlier_ref: str | None = None,
        copies_only: bool = False,
        own_process: bool = False,
    ) -> None:
        if own_process:
            keep_freed_memory()
        store = Store(root_uri)
        self._passages = PassageRows(store.open(passages_ref, "passages"))
        self._earlier: VectorStore | None = None
        if earlier_ref is not None:
            self._earlier = vector_store(store.open(earlier_ref, "vectors"))
        self._filesystem, _ = resolve_uri(target_uri)
        self._prefix = prefix
        self._precision = precision
        self._encoder: TextEncoder | None = None
        self._fingerprint = EncoderSpec.from_json(spec).fingerprint
        self._started_cpu_s = time.process_time()
        if copies_only:
            return
        device = inference_device(scale)
        self._encoder = open_encoder(
            EncoderSpec.from_json(spec), store, precision=precision, device=device
        )
        self._encoder.tokens_per_batch = scale.embed_tokens_per_batch
        self._started_cpu_s = time.process_time()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Make a shard; returns what it took."""
        task = ShardTask.of_row(row)
        standing = read_entry(self._filesystem, f"{self._prefix}/{shard_name(task.start)}")
        if standing is not None and standing["input"] == task.input:
            return self._report(len(task.rows), made=False)
        return self._make(task, _tokens_of(row))

    def _make(self, task: ShardTask, ids: list[list[int]] | None) -> dict[str, Any]:
        cpu, stats = (
            time.process_time(),
            self._encoder.stats if self._encoder is not None else EncodeStats(),
        )
        before = (stats.tokens, stats.slots, stats.halvings)
        table = self._passages.take(task.rows)
        pairs = _pairs(table)
        contents = [passage_digest(title, text) for title, text in pairs]
        matrix = self._vectors(task, pairs, ids)
        names = [f"passage {id}" for id in table.column("id").to_pylist()]
        refuse_not_finite(matrix, names)
        used = [
            now - then
            for now, then in zip((stats.tokens, stats.slots, stats.halvings), before, strict=True)
        ]
        entry = {
            "start": task.start,
            "stop": task.stop,
            "rows": len(task.rows),
            "embedded": int((task.reuse < 0).sum()),
            "input": input_hash(task.rows, contents),
            "encoder": self._fingerprint,
            "precision": self._precision,
            "tokens": used[0],
            "slots": used[1],
            "halvings": used[2],
        }
        write_shard(
            self._filesystem, self._prefix, entry, shard_table(table.column("id"), contents, matrix)
        )
        return self._report(
            len(task.rows),
            tokens=used[0],
            slots=used[1],
            halvings=used[2],
            cpu_s=time.process_time() - cpu,
        )

    def _vectors(
        self, task: ShardTask, pairs: list[tuple[str, str]], ids: list[list[int]] | None
    ) -> Halves:
        """[N, D]: those of the version before where it has them, the others by the encoder."""
        kept, fresh = np.flatnonzero(task.reuse >= 0), np.flatnonzero(task.reuse < 0)
        parts: list[tuple[Rows, Halves]] = []
        if len(kept) and self._earlier is not None:
            parts.append((kept, self._earlier.take(task.reuse[kept])))
        if len(fresh) and self._encoder is not None:
            if ids is None:
                made = self._encoder.encode_passages([pairs[at] for at in fresh])
            else:
                made = self._encoder.encode_ids(ids)
            parts.append((fresh, made.astype(np.float16)))
        matrix = np.empty((len(pairs), parts[0][1].shape[1]), np.float16)
        for places, part in parts:
            matrix[places] = part
        return matrix

    def _report(self, rows: int, *, made: bool = True, **used: float) -> dict[str, Any]:
        values = {"tokens": 0, "slots": 0, "halvings": 0, "cpu_s": 0.0} | used
        process = {"node": os.uname().nodename, "pid": os.getpid(), "peak_mb": peak_mb()}
        return {"rows": rows, "made": made, **values, **process, "start_cpu_s": self._started_cpu_s}


def peak_mb() -> float:
    """Most memory that this process has held, in MB."""
    # ru_maxrss would count what the parent held when it forked; VmHWM starts anew with the program.
    with open("/proc/self/status", encoding="ascii") as stream:
        line = next((line for line in stream if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return round(int(line.split()[1]) / 1024, 1)


def shard_table(ids: Any, contents: list[bytes], matrix: npt.NDArray[np.float16]) -> pa.Table:
    """A shard as Arrow: ids, content hashes, float16 vectors."""
    schema = shard_schema(matrix.shape[1])
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(matrix.reshape(-1)), type=schema.field("vector").type
    )
    return pa.table([ids, pa.array(contents, pa.binary(16)), vectors], schema=schema)


def write_shard(
    filesystem: fs.FileSystem, prefix: str, entry: dict[str, Any], table: pa.Table
) -> None:
    """Write a shard, and its entry with the checksum last, each at once."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content = sink.getvalue().to_pybytes()
    described = json.dumps({**entry, "sha256": hashlib.sha256(content).hexdigest()}).encode()
    name = shard_name(entry["start"])
    for suffix, data in ((".parquet", content), (".json", described)):
        target = f"{prefix}/{name}{suffix}"
        if isinstance(filesystem, fs.LocalFileSystem):
            temporary = f"{prefix}/.{name}{suffix}.{os.getpid()}-{time.time_ns()}"
            with filesystem.open_output_stream(temporary) as stream:
                stream.write(data)
            filesystem.move(temporary, target)
        else:  # an object appears whole or not at all
            with filesystem.open_output_stream(target) as stream:
                stream.write(data)


def read_entry(filesystem: fs.FileSystem, stem: str) -> dict[str, Any] | None:
    """What ``<stem>.json`` says of a shard whose data stands too; ``None`` if either is missing or
    cannot be read.
    """
    if filesystem.get_file_info(f"{stem}.parquet").type != fs.FileType.File:
        return None
    try:
        with filesystem.open_input_file(f"{stem}.json") as stream:
            entry = json.loads(stream.read())
        return entry if {"start", "stop", "input", "encoder", "sha256"} <= entry.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def shard_is_whole(filesystem: fs.FileSystem, stem: str, entry: dict[str, Any]) -> bool:
    """Whether a shard's data is what its entry's checksum says."""
    with filesystem.open_input_file(f"{stem}.parquet") as stream:
        return bool(hashlib.sha256(stream.read()).hexdigest() == entry["sha256"])


def _pairs(table: pa.Table) -> list[tuple[str, str]]:
    return list(
        zip(table.column("title").to_pylist(), table.column("text").to_pylist(), strict=True)
    )


def _tokens_of(row: dict[str, Any]) -> list[list[int]] | None:
    if "tokens" not in row:
        return None
    tokens, lengths = (np.frombuffer(row[name], np.int32) for name in ("tokens", "lengths"))
    ends = np.cumsum(lengths)
    return [tokens[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]
