"""The version before: what of it can be used again, and what has changed since.

A new version is made from the corpus as it is now; its fingerprint does not depend on what stood
before.  The version before only saves work: documents whose content is the same are cut where they
were cut, and passages whose content is the same keep their vectors.  Either holds only where the
settings that decide the result are the same: with other settings everything is made anew, and a
line says why.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from invar_ray.schema import DIGEST_SCHEMA, Document
from invar_ray.store.artifacts import Artifact, Plan, Store

DIGESTS = "digests.parquet"
_CUTTING = ("chunk_tokens", "chunk_stride", "tokenizer")

Hashes = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]


class HashTable:
    """128-bit hashes -> positions, as sorted arrays: 24 bytes an entry.

    Args:
        hashes: [N, 2] as :func:`hashes_of` gives them.
    """

    def __init__(self, hashes: Hashes) -> None:
        self._order = np.argsort(hashes[:, 0], kind="stable").astype(np.int64)
        self._hashes = hashes[self._order]

    def find(self, wanted: Hashes) -> Rows:
        """The (first) position of each of [M, 2] hashes, or -1."""
        if not len(self._hashes):
            return np.full(len(wanted), -1, np.int64)
        at = np.minimum(np.searchsorted(self._hashes[:, 0], wanted[:, 0]), len(self._hashes) - 1)
        same = (self._hashes[at] == wanted).all(axis=1)
        return np.where(same, self._order[at], -1)


def hashes_of(digests: Iterable[bytes]) -> Hashes:
    """[N, 2] halves of 16-byte digests."""
    return np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2).astype(np.uint64)


def column_hashes(column: pa.ChunkedArray) -> Hashes:
    """As :func:`hashes_of`, of an Arrow column of 16-byte binaries."""
    array = column.combine_chunks()
    start = array.offset * 16
    data = memoryview(array.buffers()[1])[start : start + len(array) * 16] if len(array) else b""
    return np.frombuffer(data, dtype=">u8").reshape(-1, 2).astype(np.uint64)


def id_digest(document_id: str) -> bytes:
    """16 bytes for a document's id."""
    return hashlib.blake2b(document_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def content_digest(document: Document) -> bytes:
    """16 bytes that change with all that decides how a document is cut, its id included; not with
    where it came from (a row's number moves when a row before it goes).
    """
    places = [place.start for place in document.places]
    head = f"{len(document.id)} {len(document.title)} {places}\n"
    text = f"{head}{document.id}{document.title}{document.text}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def passage_digest(title: str, text: str) -> bytes:
    """16 bytes that change with what is embedded of a passage."""
    joined = f"{len(title)}\n{title}{text}"
    return hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class EarlierCut:
    """How the documents of an earlier ``passages`` artifact were cut."""

    def __init__(self, artifact: Artifact) -> None:
        self.ref = artifact.ref
        table = pq.read_table(artifact.path(DIGESTS), schema=DIGEST_SCHEMA)
        self._ids = HashTable(column_hashes(table.column("id")))
        self._contents = HashTable(column_hashes(table.column("content")))
        self._first = table.column("first").to_numpy()
        self._count = table.column("passages").to_numpy()
        spans = pq.read_table(artifact.path("passages.parquet"), columns=["start", "end"])
        self._spans = np.stack(
            [spans.column("start").to_numpy(), spans.column("end").to_numpy()], axis=1
        )
        self.documents = table.num_rows
        self.unchanged = self.changed = self.new = 0

    def spans(self, documents: list[Document]) -> list[list[tuple[int, int]] | None]:
        """Where each was cut; ``None`` for one that is new or has changed.  Counts them."""
        ids = self._ids.find(hashes_of(id_digest(document.id) for document in documents))
        found = self._contents.find(hashes_of(content_digest(document) for document in documents))
        self.unchanged += int((found >= 0).sum())
        self.changed += int(((found < 0) & (ids >= 0)).sum())
        self.new += int(((found < 0) & (ids < 0)).sum())
        return [
            None
            if at < 0
            else [
                (int(start), int(end))
                for start, end in self._spans[self._first[at] : self._first[at] + self._count[at]]
            ]
            for at in found
        ]

    @property
    def deleted(self) -> int:
        """Documents that did not come again, once all have been asked for."""
        return self.documents - self.unchanged - self.changed


def earlier_passages(store: Store, plan: Plan) -> tuple[Artifact | None, str]:
    """The newest ``passages`` of the same name, and why it cannot be used (empty if it can)."""
    artifact = store.newest(
        "passages", lambda other: other.manifest.name == plan.name and other.ref != plan.ref
    )
    if artifact is None:
        return None, ""
    return artifact, cutting_differs(artifact, plan.config, plan.version)


def cutting_differs(artifact: Artifact, wanted: Mapping[str, Any], version: int) -> str:
    """What of the settings of ``passages`` differs from those that are wanted; empty if nothing."""
    was = artifact.manifest.config
    if artifact.manifest.version != version:
        return (
            f"this release cuts otherwise (version {artifact.manifest.version} of the step, now "
            f"{version})"
        )
    for key in _CUTTING:
        if was.get(key) != wanted[key]:
            what = "the tokenizer of the base" if key == "tokenizer" else f"corpus.{key}"
            return f"{what} was {was.get(key)} and is {wanted[key]} now"
    return ""


def holds_all_of(earlier: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether ``passages`` of these settings hold what others may have in common with them: the
    same shard, one of fewer shards that this one is a part of, or the whole corpus.
    """
    shard, count = earlier.get("shard", (0, 1))
    number, of = wanted.get("shard", (0, 1))
    return bool(of % count == 0 and number % count == shard)


def shard_of(document_id: str, count: int) -> int:
    """Which of ``count`` shards a document belongs to."""
    return int.from_bytes(id_digest(document_id)[:8], "big") % count


def batched(
    items: Iterable[Document], size: int, chars: int = 4_000_000
) -> Iterable[list[Document]]:
    """Lists of at most ``size`` documents and about ``chars`` characters."""
    source = iter(items)
    for first in source:
        batch, total = [first], len(first.text)
        while len(batch) < size and total < chars:
            following = list(itertools.islice(source, 1))
            if not following:
                break
            batch += following
            total += len(following[0].text)
        yield batch
