"""Corpora a document a row: zstd, DPR's table, BEIR's folder; malformed rows are put aside, up to a
share.
"""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest

from invar_ray.corpus.readers import read_documents
from invar_ray.corpus.readlog import Quarantine, ReadLog
from invar_ray.corpus.sources import source_digest
from invar_ray.errors import DataError
from invar_ray.steps.passages import QUARANTINE, load_documents
from invar_ray.store.artifacts import Store
from tests.support import documents, small_config, write_lines
from tests.unit.steps.test_passages import build

ROWS = [
    ("1", 'Aaron was a "prophet", it says.', "Aaron"),
    ("2", "Plain text; no quotes", 'The "A" Team'),
    ("3", '"All of it quoted"', ""),
]


def dpr_table(place: Path) -> Path:
    """As psgs_w100.tsv is written: csv with tabs, quotes where they are needed."""
    with gzip.open(place, "wt", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerows([("id", "text", "title"), *ROWS])
    return place


def test_dpr_table(tmp_path: Path) -> None:
    found = list(read_documents(str(dpr_table(tmp_path / "psgs_w100.tsv.gz"))))
    assert [(document.id, document.text, document.title) for document in found] == ROWS
    assert found[0].uri.endswith("psgs_w100.tsv.gz#L2")


def test_table_with_named_columns_and_without(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("title\ttext\nOne\tfirst text\n")
    (tmp_path / "b.tsv").write_text("7\tsecond text\tTwo\n")
    found = list(read_documents(str(tmp_path)))
    assert [(document.id, document.title, document.text) for document in found] == [
        ("a.tsv#L2", "One", "first text"),
        ("7", "Two", "second text"),
    ]


@pytest.mark.parametrize(
    ("table", "row"),
    [
        ("name\tage\nAda\t36\n", "name: Ada | age: 36"),
        (
            "train\tdeparts\tarrives\n7\t09:40\t10:22\n",
            "train: 7 | departs: 09:40 | arrives: 10:22",
        ),
        ("From, to\tFare\nArvon, Belisk\t4,50\n", "From, to: Arvon, Belisk | Fare: 4,50"),
    ],
)
def test_another_table_is_one_document(tmp_path: Path, table: str, row: str) -> None:
    (tmp_path / "ages.tsv").write_text(table)
    (found,) = read_documents(str(tmp_path))
    assert (found.id, found.title) == ("ages.tsv", "ages")
    assert row in found.text


def test_zstd_is_unpacked(tmp_path: Path) -> None:
    plain = "".join(json.dumps(row) + "\n" for row in documents()).encode()
    with pa.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as stream:
        stream.write(plain)
    found = list(read_documents(str(tmp_path / "c.jsonl.zst")))
    assert [document.id for document in found] == [row["id"] for row in documents()]


def test_of_a_beir_folder_the_corpus_alone_is_read(tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    write_lines(
        tmp_path / "corpus.jsonl", [{"_id": "d1", "title": "T", "text": "A text.", "metadata": {}}]
    )
    write_lines(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "no document"}])
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    [document] = read_documents(str(tmp_path))
    assert (document.id, document.title) == ("d1", "T")
    corpus, both = (source_digest(str(tmp_path), is_corpus=which) for which in (True, False))
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\n")
    assert source_digest(str(tmp_path), is_corpus=True) == corpus
    assert source_digest(str(tmp_path)) != both, "questions depend on the judgements"


def bad_rows(tmp_path: Path, good: int) -> str:
    rows = [
        json.dumps({"id": f"d{number}", "text": f"Text number {number}."}) for number in range(good)
    ]
    rows.insert(1, '{"id": "broken", "text": ')
    rows.insert(3, json.dumps({"id": "d0", "text": "taken id"}))
    place = tmp_path / "c.jsonl"
    place.write_text("\n".join(rows) + "\n")
    return str(place)


def test_malformed_rows_go_to_quarantine(tmp_path: Path) -> None:
    uri = bad_rows(tmp_path, 10)
    artifact = build(small_config(tmp_path, f"corpus.uri={uri}", "corpus.max_malformed_share=0.2"))
    assert artifact.info["quarantined"] == 2
    assert list(load_documents(artifact)) == [f"d{number}" for number in range(10)]
    entries = [json.loads(line) for line in artifact.path(QUARANTINE).read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in entries] == [("c.jsonl", 2), ("c.jsonl", 4)]
    assert "malformed JSON" in entries[0]["reason"]
    assert entries[0]["row"] == '{"id": "broken", "text": '
    assert "the id 'd0' is taken by" in entries[1]["reason"]
    assert "line 1" in entries[1]["reason"]


def test_too_large_a_share_stops_and_keeps_the_rows(tmp_path: Path) -> None:
    config = small_config(tmp_path, f"corpus.uri={bad_rows(tmp_path, 10)}")
    with pytest.raises(DataError) as caught:
        build(config)
    message = str(caught.value)
    assert "2 of 12 rows are malformed (first: " in message
    assert "at most 0.01 (corpus.max_malformed_share)" in message
    [kept] = (Path(Store(config.storage.root_uri).root) / "quarantine").iterdir()
    assert str(kept) in message
    assert len(kept.read_text().splitlines()) == 2


def test_a_broken_corpus_stops_early(tmp_path: Path) -> None:
    place = tmp_path / "c.jsonl"
    good = json.dumps({"text": "x"})
    place.write_text("\n".join([good] * 900 + ["{"] * 200 + [good] * 100_000) + "\n")
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.1)
    with pytest.raises(DataError, match=r"101 of 1,001 rows are malformed|10\d of 1,0\d\d rows"):
        list(read_documents(str(place), log=ReadLog(quarantine=quarantine)))
    assert quarantine.rows < 1100


def test_a_folder_s_few_rows_cost_a_line(tmp_path: Path) -> None:
    """As for files: who indexes a folder of odds and ends gets the rest."""
    (tmp_path / "docs").mkdir()
    bad_rows(tmp_path / "docs", 3)
    artifact = build(small_config(tmp_path, f"corpus.uri={tmp_path / 'docs'}"))
    assert artifact.info["quarantined"] == 2
    assert artifact.info["documents"] == 3
