"""A new version embeds only what is new or changed, and finds what a full rebuild finds."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from invar_ray.answering.retriever import open_retriever
from invar_ray.errors import CorruptArtifactError
from invar_ray.index import layout, shards
from invar_ray.index.blocks import read_vectors
from invar_ray.index.vectors import ROWS_FILE, vector_store
from invar_ray.pipeline import Pipeline
from invar_ray.schema import DOCUMENT_SCHEMA
from invar_ray.steps.verify import verify_index
from invar_ray.store.artifacts import Artifact, Store
from invar_ray.store.earlier import HashTable, hashes_of
from invar_ray.store.files import inventory
from invar_ray.store.manifest import MANIFEST
from tests.support import documents, questions, small_config, write_lines

COUNT = 36
HALF = 2.0**-11


def corpus(count: int = COUNT, *, repeated: bool = False) -> list[dict[str, str]]:
    """Documents of which no two share a passage, unless they are ``repeated``."""
    rows = documents()
    return [
        {
            **rows[number % 12],
            "id": f"d{number:03d}",
            "text": rows[number % 12]["text"].replace(
                ". ", ". " if repeated else f", says copy {number}. "
            ),
        }
        for number in range(count)
    ]


def changed(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Two documents edited, two new ones (one in front), two gone."""
    rows = [dict(row) for row in rows]
    for at in (4, 20):
        rows[at]["text"] = rows[at]["text"].replace("terraces", "slopes")
    new = [
        {"id": f"new{number}", "title": "New", "text": f"A new island, number {number}."}
        for number in (1, 2)
    ]
    return [new[0], *rows[:9], *rows[10:30], *rows[31:], new[1]]


def pipeline(root: Path, rows: list[dict[str, str]], *overrides: str) -> Pipeline:
    place = write_lines(root / "islands.jsonl", rows)
    config = small_config(
        root,
        f"corpus.uri={place}",
        "scale.shard_rows=16",
        "corpus.chunk_tokens=48",
        "corpus.chunk_stride=48",
        *overrides,
    )
    return Pipeline(config, quiet=True)


def index_of(root: Path, rows: list[dict[str, str]], *overrides: str) -> Artifact:
    root.mkdir(exist_ok=True)
    found = pipeline(root, rows, "scale.embed_workers=1", *overrides)
    found.executor.connect = _in_this_process  # type: ignore[method-assign]
    return found.base_index


def _in_this_process() -> None:
    raise AssertionError("more than two shards: this test meant to need no cluster")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a full version; tests copy it."""
    root = tmp_path_factory.mktemp("i") / "first"
    index_of(root, corpus(), "scale.shard_rows=100")
    return root


def copy_of(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "store"))


def by_id(index: Artifact) -> dict[str, Any]:
    ids, matrix = read_vectors(index.parent("vectors"))
    return dict(zip(ids, matrix, strict=True))


def test_only_what_is_new_or_changed_is_embedded(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root, rows = copy_of(first, tmp_path), changed(corpus())
    seen: list[tuple[str, str]] = []
    plain = shards.open_encoder

    def noting(*args: Any, **kwargs: Any) -> Any:
        encoder = plain(*args, **kwargs)
        inner = encoder.encode_passages
        encoder.encode_passages = lambda pairs: seen.extend(pairs) or inner(pairs)  # type: ignore[method-assign]
        return encoder

    monkeypatch.setattr(shards, "open_encoder", noting)
    index = index_of(root, rows)
    vectors, passages = index.parent("vectors"), index.parent("passages")
    changes = passages.info["changes"]
    assert (changes["new"], changes["changed"], changes["deleted"], changes["unchanged"]) == (
        2,
        2,
        2,
        32,
    )
    texts = {row["id"]: row["text"] for row in rows}
    assert all(
        any(text in texts[name] for name in ("d004", "d020", "new1", "new2")) for _, text in seen
    )
    assert vectors.info["embedded"] == len(seen)
    assert vectors.info["reused"] == vectors.info["rows"] - len(seen)
    # of the edited documents the passages without an edit keep their vectors
    cut_from_changed = [
        row for row in pq.read_table(passages.path("passages.parquet")).to_pylist()
        if row["document_id"] in {"d004", "d020", "new1", "new2"}
    ]  # fmt: skip
    assert 0 < len(seen) < len(cut_from_changed)
    assert ROWS_FILE in vectors.manifest.files
    assert 0 < vectors.info["tombstones"] <= vector_store(vectors).size - vectors.info["rows"]
    output = capfd.readouterr().err
    assert "2 new, 2 changed, 2 deleted, 32 unchanged" in output
    assert f"{len(seen)} to embed" in output

    full = index_of(tmp_path / "full", rows, "scale.shard_rows=100")
    assert full.parent("vectors").info["embedded"] == full.parent("vectors").info["rows"]
    assert full.fingerprint == index.fingerprint, "how it was made is no part of what it is"
    left, right = by_id(index), by_id(full)
    assert list(left) == list(right)
    for name, vector in left.items():
        assert (np.abs(vector - right[name]) <= 2 * HALF * np.abs(right[name]) + 1e-5).all()


def test_passages_are_those_of_a_full_rebuild(first: Path, tmp_path: Path) -> None:
    root, rows = copy_of(first, tmp_path), changed(corpus())
    part = pipeline(root, rows).passages
    files = dict(part.manifest.files)
    part.path().rename(tmp_path / "aside")
    whole = pipeline(root, rows, "scale.incremental=false").passages
    assert "changes" in part.info
    assert "changes" not in whole.info
    assert whole.manifest.files == files, "byte for byte"


def test_search_finds_what_a_full_rebuild_finds(first: Path, tmp_path: Path) -> None:
    root, rows = copy_of(first, tmp_path), changed(corpus())
    asked = [row["question"] for split in ("train", "dev") for row in questions(split)]
    part = open_retriever(index_of(root, rows).uri).retrieve(asked, 10)
    whole = open_retriever(index_of(tmp_path / "full", rows, "scale.shard_rows=100").uri).retrieve(
        asked, 10
    )
    for left, right in zip(part, whole, strict=True):
        for one, other in zip(left, right, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-5)
            assert one.passage_id == other.passage_id or abs(one.score - other.score) < 1e-5


def test_deleting_alone_needs_no_encoder(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy_of(first, tmp_path)
    monkeypatch.setattr(
        shards, "open_encoder", lambda *a, **k: pytest.fail("nothing is to be embedded")
    )
    index = index_of(root, corpus()[:-3])
    info = index.parent("vectors").info
    assert (info["embedded"], info["tombstones"] > 0) == (0, True)
    gone = {
        hit.document_id
        for hits in open_retriever(index.uri).retrieve(["copy 35", "island"], 50)
        for hit in hits
    }
    assert not gone & {"d033", "d034", "d035"}


def test_many_tombstones_are_compacted(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, rows = copy_of(first, tmp_path), corpus()[10:]
    index = index_of(root, rows)
    vectors = index.parent("vectors")
    assert vectors.info["embedded"] == 0, "compacting copies vectors, it does not make them"
    assert vectors.info["tombstones"] == 0
    assert ROWS_FILE not in vectors.manifest.files
    assert vector_store(vectors).size == vectors.info["rows"]
    assert not verify_index(index, samples=50, seed=0).faults
    monkeypatch.setattr(layout, "COMPACT_ABOVE", 0.9)
    kept = index_of(copy_of(first, tmp_path / "x"), rows)
    assert kept.parent("vectors").info["tombstones"] > 0
    left, right = by_id(index), by_id(kept)
    assert list(left) == list(right)
    assert all(np.array_equal(left[name], right[name]) for name in left), (
        "the same vectors, bit for bit"
    )


def test_repeated_passages_are_no_tombstones(tmp_path: Path) -> None:
    root = tmp_path / "s"
    index_of(root, corpus(repeated=True), "scale.shard_rows=100")
    index = index_of(root, corpus(repeated=True)[:-1])
    info = index.parent("vectors").info
    assert (info["embedded"], info["tombstones"]) == (0, 0)
    assert ROWS_FILE in index.parent("vectors").manifest.files
    assert Store(str(root / "runs")).list("index")[-1].ref == index.ref, (
        "two of one second stand in their order"
    )


def test_a_chain_of_versions_stays_sound(first: Path, tmp_path: Path) -> None:
    root, rows = copy_of(first, tmp_path), corpus()
    for step in range(3):
        rows = (
            changed(rows)
            if step == 0
            else [*rows[:7], *rows[8:], {"id": f"s{step}", "text": f"Step {step}."}]
        )
        index = index_of(root, rows)
        assert not verify_index(index, samples=100, seed=step).faults
        assert index.parent("vectors").info["embedded"] < 8
    # versions stand alone: the ones before may go
    newest = index.parent("vectors")
    for folder in (root / "runs" / "vectors").iterdir():
        if folder.name != newest.ref.rpartition("/")[2]:
            shutil.rmtree(folder)
    assert not verify_index(index, samples=100, seed=9).faults


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.query_max_tokens=40", "it was made by encoder"),
        ("corpus.chunk_tokens=49", "corpus.chunk_tokens was 48 and is 49 now"),
    ],
)
def test_other_settings_force_a_full_reindex(
    first: Path, tmp_path: Path, override: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    root = copy_of(first, tmp_path)
    vectors = index_of(root, corpus(), "scale.shard_rows=100", override).parent("vectors")
    assert vectors.info["embedded"] == vectors.info["rows"]
    assert message in vectors.info["full_because"]
    assert "full reindex: vectors/base-" in capfd.readouterr().err


def test_vectors_of_one_version_are_all_of_one_precision(first: Path, tmp_path: Path) -> None:
    root = copy_of(first, tmp_path)
    index = index_of(root, corpus()[:-1], "scale.shard_rows=100", "model.precision=bf16")
    info = index.parent("vectors").info
    assert info["embedded"] == info["rows"]
    assert "it was made in fp32, this run embeds in bf16" in info["full_because"]
    assert (info["precision"], index.info["precision"]) == ("bf16", "bf16")


def test_incremental_can_be_switched_off(first: Path, tmp_path: Path) -> None:
    root = copy_of(first, tmp_path)
    info = (
        index_of(root, corpus()[:-1], "scale.incremental=false", "scale.shard_rows=100")
        .parent("vectors")
        .info
    )
    assert (info["embedded"], info["since"]) == (info["rows"], None)


def test_a_row_s_number_is_no_content(first: Path, tmp_path: Path) -> None:
    """When a row goes, those after it move: their citations must say so, and nothing is
    embedded.
    """
    root = copy_of(first, tmp_path)
    passages = pipeline(root, corpus()[1:]).passages
    assert passages.info["changes"]["unchanged"] == COUNT - 1
    rows = pq.read_table(passages.path("passages.parquet")).to_pylist()
    assert rows[0]["place"] == "islands.jsonl, row 1"
    assert rows[0]["uri"].endswith("#L1")
    assert pq.read_schema(passages.path("documents.parquet")).equals(DOCUMENT_SCHEMA)


def test_hash_table_finds_positions() -> None:
    digests = [bytes([number]) * 16 for number in (7, 3, 9)]
    table = HashTable(hashes_of(digests))
    wanted = [bytes([9]) * 16, bytes([1]) * 16, bytes([7]) * 16, bytes([3]) * 8 + bytes([4]) * 8]
    assert table.find(hashes_of(wanted)).tolist() == [2, -1, 0, -1]
    assert HashTable(hashes_of([])).find(hashes_of(wanted)).tolist() == [-1] * 4


# verify_index


def tampered(index: Artifact, change: Any) -> list[str]:
    """Faults after ``change`` was made to the files of its vectors, whose manifest then records the
    new files.
    """
    vectors = index.parent("vectors")
    change(vectors.path())
    manifest = json.loads(vectors.path(MANIFEST).read_text())
    manifest["files"] = inventory(vectors.store.filesystem, str(vectors.path()), MANIFEST)
    vectors.path(MANIFEST).write_text(json.dumps(manifest))
    return verify_index(index, samples=1000, seed=0).faults


def rewrite(folder: Path, column: str, change: Any, *, mend: bool = True) -> None:
    path = sorted((folder / "shards").glob("*.parquet"))[0]
    table = pq.read_table(path)
    values = table.column(column).to_pylist()
    change(values)
    at = table.schema.get_field_index(column)
    table = table.set_column(
        at,
        table.schema.field(column),
        [__import__("pyarrow").array(values, table.schema.types[at])],
    )
    path.unlink()
    pq.write_table(table, path)
    if mend:
        entry = json.loads(path.with_suffix(".json").read_text())
        entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        path.with_suffix(".json").write_text(json.dumps(entry))


def swap(values: list[Any]) -> None:
    values[0], values[1] = values[1], values[0]


def double(values: list[Any]) -> None:
    values[1] = values[0]


@pytest.mark.parametrize(
    "column, change, mend, message",
    [
        ("vector", swap, True, "vectors: passage .* has another vector than its encoder gives it"),
        ("vector", swap, False, "records another checksum than its data has"),
        ("id", double, True, "1 ids stand twice"),
        ("id", swap, True, "the ids of rows 0 and on are not those of the passages"),
        ("content", swap, True, "holds the vector of another text"),
    ],
)
def test_verify_finds(
    first: Path, tmp_path: Path, column: str, change: Any, mend: bool, message: str
) -> None:
    index = index_of(copy_of(first, tmp_path), corpus(), "scale.shard_rows=100")
    assert not verify_index(index, samples=1000, seed=0).faults
    faults = tampered(index, lambda folder: rewrite(folder, column, change, mend=mend))
    assert any(re.search(message, fault) for fault in faults), faults


def test_verify_finds_a_damaged_file(first: Path, tmp_path: Path) -> None:
    index = index_of(copy_of(first, tmp_path), corpus()[:-1])
    last = sorted(index.parent("vectors").path("shards").glob("*.json"))[-1]
    text = last.read_text()
    last.unlink()  # it is a link to the file of the version before
    last.write_text(text.replace('"rows": ', '"rows":  ').replace('"stop": ', '"stop":', 1))
    [fault] = verify_index(index, samples=10, seed=0).faults
    assert "differs from its recorded sha256" in fault
    last.unlink()
    with pytest.raises(CorruptArtifactError, match="is missing"):
        verify_index(index, samples=10, seed=0)
