"""Proof that an index is what it says: every check reads the stored files, and the encoder is asked
again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from invar_ray.errors import InvarError
from invar_ray.index.blocks import vector_blocks
from invar_ray.index.faiss_index import load_index
from invar_ray.index.probes import PROBE_TOLERANCE, check_probes
from invar_ray.index.shards import PassageRows, shard_is_whole
from invar_ray.index.vectors import SHARDS, unit_rows, vector_store
from invar_ray.models.batching import refuse_not_finite
from invar_ray.models.encoder import EncoderSpec, TextEncoder, open_encoder
from invar_ray.models.precision import made_in
from invar_ray.store.artifacts import Artifact
from invar_ray.store.earlier import passage_digest

SAMPLE_TOLERANCE = PROBE_TOLERANCE
"""A sampled vector's cosine with the one encoded again must be at least 1 minus this."""

_READ_ROWS = 8192


@dataclass
class Verified:
    """What was checked.

    Attributes:
        lines: a line a check, in order.
        faults: what is wrong; empty for a sound index.
    """

    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def check(self, name: str, body: Callable[[], str]) -> None:
        """Run a check; it returns what it found, or raises what is wrong."""
        try:
            self.lines.append(f"ok      {name}: {body()}")
        except InvarError as error:
            self.faults.append(f"{name}: {error}")
            self.lines.append(f"FAILED  {name}: {error}")


class Fault(InvarError):
    """A check of :func:`verify_index` failed."""


def verify_index(index: Artifact, *, samples: int, seed: int, device: str = "cpu") -> Verified:
    """Check an ``index`` artifact, its ``vectors`` and its ``passages`` against each other and
    against the encoder, in the precision that made them.

    Args:
        index: whose files are read.
        samples: vectors to encode again, drawn by ``seed``; 0 asks no encoder.
        seed: of the draw.
        device: where it runs.
    """
    found = Verified()
    vectors, passages = index.parent("vectors"), index.parent("passages")
    for artifact in (passages, vectors, index):
        found.check(f"files of {artifact.ref}", lambda artifact=artifact: _files(artifact))  # type: ignore[misc]
    if found.faults:  # nothing that follows could be believed
        return found
    table = PassageRows(passages)
    found.check("rows", lambda: _rows(index, vectors, len(table)))
    found.check("shards", lambda: _shards(vectors))
    found.check("ids", lambda: _ids(vectors, table))
    found.check("numbers", lambda: _finite(vectors, table))
    found.check("contents", lambda: _contents(vectors, table))
    if samples == 0:
        return found
    encoder = open_encoder(
        EncoderSpec.from_json(vectors.info["encoder"]),
        vectors.store,
        precision=made_in(vectors),
        device=device,
    )
    found.check("encoder", lambda: _encoder(index, vectors, encoder))
    found.check("probes", lambda: f"reproduced, lowest cosine {check_probes(index, encoder):.6f}")
    found.check("vectors", lambda: _samples(vectors, table, encoder, samples, seed))
    return found


def _files(artifact: Artifact) -> str:
    artifact.verify()
    return f"{len(artifact.manifest.files)} files have the recorded size and sha256"


def _rows(index: Artifact, vectors: Artifact, count: int) -> str:
    counts = {
        "passages": count,
        "rows of vectors": len(vector_store(vectors).passage_rows()),
        "rows in the index": load_index(index).size,
        "passages recorded by vectors": vectors.info["rows"],
        "passages recorded by the passages step": index.parent("passages").info["passages"],
    }
    if len(set(counts.values())) > 1:
        raise Fault(
            f"the counts differ: {counts}", action="run jobs.reindex with scale.incremental=false"
        )
    return f"{count:,} passages, vectors and index rows"


def _shards(vectors: Artifact) -> str:
    filesystem, place = vectors.store.filesystem, vectors.store.location(vectors.ref)
    encoder = EncoderSpec.from_json(vectors.info["encoder"]).fingerprint
    entries = sorted(
        name
        for name in vectors.manifest.files
        if name.startswith(SHARDS) and name.endswith(".json")
    )
    reached = 0
    for name in entries:
        with filesystem.open_input_file(f"{place}/{name}") as stream:
            entry = json.loads(stream.read())
        if entry["start"] != reached:
            raise Fault(
                f"{name} starts at row {entry['start']}",
                expected=f"row {reached}, where the one before ends",
            )
        if entry["encoder"] != encoder:
            raise Fault(
                f"{name} was made by encoder {entry['encoder']}", expected=f"encoder {encoder}"
            )
        if not shard_is_whole(filesystem, f"{place}/{name.removesuffix('.json')}", entry):
            raise Fault(f"{name} records another checksum than its data has")
        reached = entry["stop"]
    if reached != vector_store(vectors).size:
        raise Fault(
            f"the shards' entries end at row {reached}",
            expected=f"row {vector_store(vectors).size}",
        )
    return f"{len(entries)} without gap or overlap, checksums as recorded, all by encoder {encoder}"


def _ids(vectors: Artifact, table: PassageRows) -> str:
    names: list[pa.Array] = []
    for ids in vector_store(vectors).passage_ids():
        names.append(pa.array(ids, pa.string()))
    stored = pa.chunked_array(names)
    unique = len(stored.unique())
    if unique != len(stored):
        raise Fault(f"{len(stored) - unique} ids stand twice", expected="every id once")
    at = 0
    for start in range(0, len(table), _READ_ROWS):
        part = table.take(np.arange(start, min(start + _READ_ROWS, len(table))))
        wanted = part.column("id").to_pylist()
        if stored.slice(at, len(wanted)).to_pylist() != wanted:
            raise Fault(f"the ids of rows {start} and on are not those of the passages")
        at += len(wanted)
    return f"{unique:,}, every one once, in the order of the passages"


def _finite(vectors: Artifact, table: PassageRows) -> str:
    count = 0
    for start, matrix in vector_blocks(vectors).some():
        if not np.isfinite(matrix).all():
            ids = table.take(np.arange(start, start + len(matrix))).column("id").to_pylist()
            refuse_not_finite(matrix, [f"passage {id}" for id in ids])
        count += len(matrix)
    return f"{count:,} vectors, all finite"


def _contents(vectors: Artifact, table: PassageRows) -> str:
    """The content hash beside each vector is that of its passage as it is now."""
    store = vector_store(vectors)
    hashes: list[bytes] = []
    for _, column in store.contents():
        hashes += column.to_pylist()
    rows = store.passage_rows()
    for start in range(0, len(table), _READ_ROWS):
        part = table.take(np.arange(start, min(start + _READ_ROWS, len(table))))
        pairs = zip(part.column("title").to_pylist(), part.column("text").to_pylist(), strict=True)
        for at, (title, text) in enumerate(pairs, start=start):
            if hashes[rows[at]] != passage_digest(title, text):
                raise Fault(
                    f"row {rows[at]} holds the vector of another text than passage {at} has"
                )
    dead = len(hashes) - len(np.unique(rows))
    return (
        f"each vector's is that of its passage; {dead:,} of {len(hashes):,} rows are no passage's"
    )


def _encoder(index: Artifact, vectors: Artifact, encoder: TextEncoder) -> str:
    recorded = {
        "index": EncoderSpec.from_json(index.info["encoder"]).fingerprint,
        "vectors": vectors.manifest.config["encoder"],
        "opened": encoder.fingerprint,
    }
    if len(set(recorded.values())) > 1:
        raise Fault(f"the encoders differ: {recorded}", expected="one fingerprint everywhere")
    return f"{encoder.fingerprint} in index and vectors"


def _samples(
    vectors: Artifact, table: PassageRows, encoder: TextEncoder, samples: int, seed: int
) -> str:
    count = min(samples, len(table))
    chosen = np.sort(np.random.default_rng(seed).choice(len(table), count, replace=False)).astype(
        np.int64
    )
    store = vector_store(vectors)
    stored = unit_rows(store.take(store.passage_rows()[chosen]))
    part = table.take(chosen)
    texts = list(
        zip(part.column("title").to_pylist(), part.column("text").to_pylist(), strict=True)
    )
    cosines = (encoder.encode_passages(texts) * stored).sum(axis=1)
    if not cosines.min() >= 1.0 - SAMPLE_TOLERANCE:
        worst = int(cosines.argmin())
        raise Fault(
            f"passage {part.column('id')[worst].as_py()} has another vector than its encoder gives "
            "it (cosine "
            f"{cosines[worst]:.4f})",
            expected=f"at least {1.0 - SAMPLE_TOLERANCE}",
            action="run jobs.reindex with scale.incremental=false",
        )
    return f"{count} encoded again, lowest cosine {cosines.min():.6f}"
