"""Readers: every form of corpus, and one clear sentence for every fault."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from invar_ray.corpus.readers import read_documents, read_examples
from invar_ray.errors import DataError
from invar_ray.schema import Document, Example, Place

ROWS = [
    {"id": "a", "title": "Harbour", "text": "Dug in 1841.", "extra": 1},
    {"id": "b", "title": "", "text": "", "uri": "https://example.org/b"},
]
QUESTION = {
    "id": "q1",
    "question": "when was it dug",
    "answers": ["1841", "1841", "in 1841"],
    "positive_ids": ["a"],
}


def _write(path: Path, rows: list[Any]) -> str:
    text = "".join(f"{json.dumps(row) if not isinstance(row, str) else row}\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    uri = _write(tmp_path / name, [ROWS[0], "", ROWS[1]])
    assert list(read_documents(uri)) == [
        Document("a", "Harbour", "Dug in 1841.", f"{uri}#L1", name, (Place(0, "row 1"),)),
        Document("b", "", "", "https://example.org/b", name, (Place(0, "row 3"),)),
    ]
    assert [document.id for document in read_documents(uri, limit=1)] == ["a"]


def test_parquet_and_folder_and_file_uri(tmp_path: Path) -> None:
    folder = tmp_path / "my corpus"
    _write(folder / "two" / "c.jsonl", [{"id": "c", "title": "t", "text": "x"}])
    _write(folder / "_hidden.jsonl", ["nonsense"])
    table = pa.table(
        {"id": pa.array(["a", "b"]).dictionary_encode(), "title": ["", ""], "text": ["x", "y"]}
    )
    pq.write_table(table, folder / "one.parquet")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    by_path = list(read_documents(str(folder)))
    by_uri = list(read_documents(folder.as_uri()))
    assert (
        [document.id for document in by_path]
        == [document.id for document in by_uri]
        == ["a", "b", "c"]
    )
    assert by_uri[1].uri == f"{folder.as_uri()}/one.parquet#row2"
    assert [document.id for document in read_documents(str(folder), format="jsonl")] == ["c"]


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text(
        "```\n# no heading\n```\nintro\n\n## The *Harbour* ##\nText.\n"
    )
    (tmp_path / "b.txt").write_bytes("\ufeffPlain text.\n".encode())
    (tmp_path / "c.md").write_text("Old style\n=========\ntext")
    (tmp_path / "notes.v2.md").write_text("no heading at all")
    found = {
        document.id: (document.title, document.text) for document in read_documents(str(tmp_path))
    }
    assert found["sub/a.md"][0] == "The *Harbour*"
    assert found["b.txt"] == ("b", "Plain text.\n")
    assert found["c.md"][0] == "Old style"
    assert found["notes.v2.md"][0] == "notes.v2"
    [single] = read_documents(str(tmp_path / "sub" / "a.md"))
    assert single.id == "a.md"


def test_examples(tmp_path: Path) -> None:
    uri = _write(
        tmp_path / "q.jsonl.gz",
        [QUESTION, {**QUESTION, "id": "q2", "rewrites": ["what year was it dug"]}],
    )
    assert read_examples(uri) == [
        Example("q1", "when was it dug", ("1841", "in 1841"), ("a",), ()),
        Example("q2", "when was it dug", ("1841", "in 1841"), ("a",), ("what year was it dug",)),
    ]
    assert len(read_examples(uri, limit=1)) == 1


def test_unusable_rows_can_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        QUESTION,
        {**QUESTION, "id": "q2", "answers": [" "]},
        QUESTION,
        {**QUESTION, "id": "q3", "answers": ["", "so"]},
        {**QUESTION, "id": "q4", "question": None},
    ]
    uri = _write(tmp_path / "q.jsonl", rows)
    found = read_examples(uri, skip_unusable=True)
    assert [(example.id, len(example.answers)) for example in found] == [
        ("q1", len(set(QUESTION["answers"]))),
        ("q3", 1),
    ]
    assert "3 rows were left out (first: " in caplog.text
    assert "line 2: 'answers' is empty" in caplog.text


def test_builtin() -> None:
    documents = {document.id for document in read_documents("builtin:facts")}
    train, dev = (
        read_examples("builtin:facts", limit=5),
        read_examples("builtin:facts", split="dev"),
    )
    assert len(train) == 5
    assert not {example.id for example in train} & {example.id for example in dev}
    assert all(id in documents for example in train for id in example.positive_ids)
    with pytest.raises(DataError, match="no built-in corpus 'builtin:fact'"):
        read_documents("builtin:fact")


DOCUMENT = ROWS[0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([DOCUMENT, '{"id": "b", '], "line 2: malformed JSON (Expecting property name enclosed in double quotes at"),  # noqa: E501
        ([[1]], "line 1: holds a list. Expected: one JSON object a line."),
        ([{"id": "a", "title": "t"}], "line 1: the field 'text' is missing. Expected: a row with 'text', got ['id'"),  # noqa: E501
        ([{**DOCUMENT, "id": 7.5}], "line 1: 'id' is a number. Expected: a string."),
        ([{**DOCUMENT, "id": " "}], "line 1: 'id' is blank. Expected: a string with text."),
        ([{**DOCUMENT, "title": 3}], "line 1: 'title' is a number. Expected: a string."),
        ([DOCUMENT, "", DOCUMENT], "line 3: the id 'a' is taken by {uri}, line 1. Expected: every id once."),  # noqa: E501
        ([], "the corpus {uri} is empty. Expected: at least one document."),
    ],
)  # fmt: skip
def test_faults_of_corpora(tmp_path: Path, rows: list[Any], message: str) -> None:
    uri = _write(tmp_path / "c.jsonl", rows)
    with pytest.raises(DataError) as caught:
        list(read_documents(uri))
    assert message.replace("{uri}", uri) in str(caught.value)
    assert uri in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answers": []},
            "line 1: 'answers' is empty. Expected: at least one answer. To do: remove the row.",
        ),
        (
            {"answers": ["1841", " "]},
            "line 1: 'answers' holds a blank string. Expected: answers with text.",
        ),
        ({"answers": "1841"}, "line 1: 'answers' is a string. Expected: a list of strings."),
        ({"answers": [1841]}, "line 1: 'answers' holds a number. Expected: a list of strings."),
        ({"question": ""}, "line 1: 'question' is blank."),
        ({"rewrites": "x"}, "line 1: 'rewrites' is a string."),
        ({"positive_ids": None}, "line 1: 'positive_ids' is null. Expected: a list of strings."),
    ],
)
def test_faults_of_questions(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    uri = _write(tmp_path / "q.jsonl", [{**QUESTION, **change}])
    with pytest.raises(DataError) as caught:
        read_examples(uri)
    assert f"{uri}, {message}" in str(caught.value)


def test_question_field_missing_and_empty_file_and_taken_id(tmp_path: Path) -> None:
    row = {key: value for key, value in QUESTION.items() if key != "positive_ids"}
    with pytest.raises(DataError, match="line 1: the field 'positive_ids' is missing"):
        read_examples(_write(tmp_path / "q.jsonl", [row]))
    with pytest.raises(DataError, match="holds no question"):
        read_examples(_write(tmp_path / "q.jsonl", []))
    with pytest.raises(DataError, match="line 2: the id 'q1' is taken by"):
        read_examples(_write(tmp_path / "q.jsonl", [QUESTION, QUESTION]))


def test_faults_of_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file or folder at .*gone.jsonl"):
        read_documents(str(tmp_path / "gone.jsonl"))  # at the call, not at the first document
    with pytest.raises(DataError, match=r"not a usable URI .*local path, file://, s3:// or gs://"):
        read_documents("bogus://bucket/key")
    (tmp_path / "corpus.odt").write_text("id,text")
    with pytest.raises(DataError, match="ending does not say how to read it"):
        read_documents(str(tmp_path / "corpus.odt"))
    with pytest.raises(DataError, match=r"holds no file to read \(1 entries seen\)"):
        read_documents(str(tmp_path))
    with pytest.raises(DataError, match="the limit is 0"):
        read_documents(str(tmp_path), limit=0)


def test_faults_of_files(tmp_path: Path) -> None:
    whole = gzip.compress(
        "".join(f'{{"id": "{n}", "title": "", "text": ""}}\n' for n in range(999)).encode()
    )
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"cannot be read beyond line .*Truncated"):
        list(read_documents(str(tmp_path / "cut.jsonl.gz")))
    (tmp_path / "no.jsonl.gz").write_text("not gzip")
    with pytest.raises(DataError, match="cannot be read beyond line 0"):
        list(read_documents(str(tmp_path / "no.jsonl.gz")))
    (tmp_path / "no.parquet").write_text("not parquet at all")
    with pytest.raises(DataError, match=r"no.parquet cannot be read as Parquet \(.*magic bytes"):
        list(read_documents(str(tmp_path / "no.parquet")))
    (tmp_path / "noise.txt").write_bytes(bytes(range(1, 256)))
    with pytest.raises(DataError, match=r"noise.txt is not UTF-8 text \(byte 0x80 at offset 127\)"):
        list(read_documents(str(tmp_path / "noise.txt")))
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "f\xfcr"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl, line 1: not UTF-8 text"):
        list(read_documents(str(tmp_path / "latin.jsonl")))
    pq.write_table(
        pa.table({"id": ["a", " "], "title": ["", ""], "text": ["", ""]}),
        tmp_path / "null.parquet",
    )
    with pytest.raises(DataError, match=r"null.parquet, row 2: 'id' is blank"):
        list(read_documents(str(tmp_path / "null.parquet")))
