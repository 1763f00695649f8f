"""Public benchmarks in the form they are published in: small files of each, and what is wrong with
broken ones.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from invar_ray.cli.main import app
from invar_ray.config import load_config
from invar_ray.corpus.readers import read_documents, read_examples
from invar_ray.errors import DataError
from invar_ray.questions.benchmarks import (
    Benchmark,
    carried_documents,
    convert_benchmark,
    detect_format,
    read_benchmark,
)
from invar_ray.schema import Document, Example
from invar_ray.steps.questions import answerable, read_examples_of, refuse_unanswerable

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Old_Harbour",
            "paragraphs": [
                {
                    "context": "The harbour was dug in 1702.",
                    "qas": [
                        {
                            "id": "s1",
                            "question": "When was it dug?",
                            "answers": [{"text": "1702", "answer_start": 23}] * 2,
                        },
                        {
                            "id": "s2",
                            "question": "Who dug it?",
                            "is_impossible": True,
                            "answers": [],
                        },
                    ],
                },
                {"context": "No question is about this.", "qas": []},
            ],
        }
    ],
}
TRIVIA = {
    "Data": [
        {
            "QuestionId": "tc_1",
            "Question": "Which sea is it?",
            "Answer": {
                "Value": "The Inner Sea",
                "Aliases": ["Inner Sea", "The Inner Sea"],
                "NormalizedAliases": ["x"],
            },
        }
    ]
}
HOTPOT = [
    {
        "_id": "h1",
        "question": "Is A older than B?",
        "answer": "yes",
        "supporting_facts": [["A", 0], ["B", 1], ["A", 1]],
        "context": [["A", ["A is old. ", "Very."]], ["B", ["B is new."]], ["C", ["C is else."]]],
    }
]
DPR = [
    {
        "dataset": "nq_train",
        "question": "who made it",
        "answers": ["Ada"],
        "positive_ctxs": [{"title": "It", "text": "Ada made it.", "passage_id": "7", "score": 1}],
        "negative_ctxs": [],
        "hard_negative_ctxs": [{"title": "Other", "text": "Bram made another.", "psg_id": 9}],
    }
]
WEB = [
    {
        "url": "http://x",
        "utterance": "who leads?",
        "targetValue": '(list (description "Jo \\"J\\" May") (description Ann) (description "Jo \\"J\\" May"))',  # noqa: E501
    }
]
KILT = [
    {
        "id": "k1",
        "input": "who wrote it",
        "output": [
            {"answer": "Cora", "provenance": [{"wikipedia_id": "12", "title": "It"}]},
            {"answer": "C. Fisk"},
            {"provenance": [{"wikipedia_id": "12"}, {"wikipedia_id": "13"}]},
        ],
    }
]
OWN = {
    "id": "o1",
    "question": "Why?",
    "answers": ["so"],
    "positive_ids": ["d"],
    "rewrites": ["How come?"],
}
POPQA = (
    "id\tsubj\tprop\tquestion\tpossible_answers\ts_pop\n"
    '42\tDag\toccupation\tWhat does Dag do?\t"[""smith"", ""farrier""]"\t7\n'
)


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


FILES: dict[str, tuple[str, str, Example, int]] = {
    "squad": (
        "dev.json",
        json.dumps(SQUAD),
        Example("s1", "When was it dug?", ("1702",), ("Old_Harbour/0",)),
        2,
    ),
    "triviaqa": (
        "unfiltered-web-dev.json",
        json.dumps(TRIVIA),
        Example("tc_1", "Which sea is it?", ("The Inner Sea", "Inner Sea"), ()),
        0,
    ),
    "hotpotqa": (
        "hotpot.json",
        json.dumps(HOTPOT),
        Example("h1", "Is A older than B?", ("yes",), ("A", "B")),
        3,
    ),
    "dpr": (
        "biencoder-nq-dev.json",
        json.dumps(DPR),
        Example("biencoder-nq-dev-0", "who made it", ("Ada",), ("7",)),
        2,
    ),
    "webquestions": (
        "web.json",
        json.dumps(WEB),
        Example("web-0", "who leads?", ('Jo "J" May', "Ann"), ()),
        0,
    ),
    "entityquestions": (
        "P19.test.json",
        json.dumps([{"question": "Where was Ada born?", "answers": ["Elvay"]}]),
        Example("P19.test-0", "Where was Ada born?", ("Elvay",), ()),
        0,
    ),
    "nq-open": (
        "NQ-open.dev.jsonl",
        lines({"question": "when is it", "answer": ["in May", "May", "May"]}),
        Example("NQ-open.dev-0", "when is it", ("in May", "May"), ()),
        0,
    ),
    "kilt": (
        "nq-dev-kilt.jsonl",
        lines(*KILT),
        Example("k1", "who wrote it", ("Cora", "C. Fisk"), ("12", "13")),
        0,
    ),
    "dpr-qa": (
        "trec-test.csv",
        "how high is it?\t['1,?312 feet', \"it's low\"]\n",
        Example("trec-test-0", "how high is it?", ("1,?312 feet", "it's low"), ()),
        0,
    ),
    "popqa": ("popQA.tsv", POPQA, Example("42", "What does Dag do?", ("smith", "farrier"), ()), 0),
    "jsonl": ("own.jsonl", lines(OWN), Example("o1", "Why?", ("so",), ("d",), ("How come?",)), 0),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_each_format_is_detected_and_read(tmp_path: Path, name: str, packed: bool) -> None:
    file, text, wanted, documents = FILES[name]
    path = tmp_path / (file + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = read_benchmark(str(path))
    assert found.format == name == detect_format(str(path))
    assert found.examples == [wanted]
    assert len(found.documents) == documents
    assert read_benchmark(str(path), name) == found
    assert {example_id for e in found.examples for example_id in e.positive_ids} <= {
        d.id for d in found.documents
    } or (name in {"kilt", "jsonl"})


def test_documents_carry_their_text(tmp_path: Path) -> None:
    def of(name: str) -> list[Document]:
        file, text, _, _ = FILES[name]
        (tmp_path / file).write_text(text)
        return read_benchmark(str(tmp_path / file)).documents

    assert [(d.id, d.title, d.text) for d in of("squad")] == [
        ("Old_Harbour/0", "Old Harbour", "The harbour was dug in 1702."),
        ("Old_Harbour/1", "Old Harbour", "No question is about this."),
    ]
    assert [d.text for d in of("hotpotqa")] == ["A is old. Very.", "B is new.", "C is else."]
    assert [(d.id, d.title) for d in of("dpr")] == [("7", "It"), ("9", "Other")]


def beir(
    folder: Path, qrels: str = "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq1\td3\t2\n"
) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(
        lines(*({"_id": f"d{n}", "title": "T", "text": f"text {n}"} for n in (1, 2, 3)))
    )
    (folder / "queries.jsonl").write_text(
        lines({"_id": "q1", "text": "which?"}, {"_id": "q2", "text": "unjudged"})
    )
    (folder / "qrels" / "test.tsv").write_text(qrels)
    return folder


def test_beir(tmp_path: Path) -> None:
    found = read_benchmark(str(beir(tmp_path / "scifact")))
    assert found == Benchmark("beir", [Example("q1", "which?", (), ("d1", "d3"))], found.documents)
    assert [d.id for d in found.documents] == ["d1", "d2", "d3"]
    with pytest.raises(DataError, match=r"no qrels for train.*qrels/train\.tsv"):
        read_benchmark(str(tmp_path / "scifact"), split="train")
    with pytest.raises(DataError, match=r"test\.tsv, line 2: \['q1', 'd1'\]"):
        read_benchmark(str(beir(tmp_path / "other", "query-id\tcorpus-id\tscore\nq1\td1\n")))


FAULTS = [
    (
        "nq-open",
        "x.jsonl",
        '{"question": "a", "answer": ["b"]}\n{"question"',
        r"x\.jsonl, line 2: malformed JSON",
    ),
    (
        "nq-open",
        "x.jsonl",
        '{"question": "a", "answer": {"b": 1}}',
        r"line 1: 'answer' is {.b.: 1}.*a list of strings",
    ),
    (
        "nq-open",
        "x.jsonl",
        '{"question": "a", "answer": []}',
        r"line 1: the question has no answer",
    ),
    ("nq-open", "x.jsonl", '{"question": " ", "answer": ["b"]}', r"line 1: 'question' is ' '"),
    ("nq-open", "x.jsonl", "[1]", r"line 1: holds a list.*JSON object"),
    ("nq-open", "x.jsonl", "", r"holds no question"),
    (
        "kilt",
        "x.jsonl",
        lines(KILT[0], KILT[0]),
        r"line 2: the id 'k1' is taken by .*x\.jsonl, line 1",
    ),
    (
        "entityquestions",
        "x.json",
        '[\n{"question": "a", "answers": ["b"]},\n{"question": "c"}\n]',
        r"entry 2 \(line 3\)",
    ),
    (
        "entityquestions",
        "x.json",
        '[\n{"question": "a",\n "answers" ["b"]}]',
        r"entry 1 \(line 2\): malformed JSON .*line 3",
    ),
    ("entityquestions", "x.json", '{"question": "a"}', r"is no JSON list"),
    (
        "squad",
        "x.json",
        '{"data": [{"title": "T", "paragraphs": [{"qas": []}]}]}',
        r"data\[0\] \(line 1\)\.paragraphs\[0\]: 'context'",
    ),
    ("squad", "x.json", '{"data"\n: x}', r"x\.json, line 2: malformed JSON"),
    (
        "triviaqa",
        "x.json",
        '{"Data": [{"QuestionId": "1", "Question": "a"}]}',
        r"Data\[0\] \(line 1\), Answer: is null",
    ),
    ("hotpotqa", "x.json", json.dumps([HOTPOT[0] | {"context": [["A"]]}]), r"a context is no pair"),
    (
        "hotpotqa",
        "x.json",
        json.dumps([HOTPOT[0], HOTPOT[0] | {"_id": "h2", "context": [["A", ["else"]]]}]),
        r"entry 2 \(line 1\): the document 'A' has another text",
    ),
    ("dpr", "x.json", json.dumps([DPR[0] | {"positive_ctxs": [{"text": "a"}]}]), r"has no id"),
    ("webquestions", "x.json", json.dumps([WEB[0] | {"targetValue": "(list)"}]), r"no answer"),
    ("dpr-qa", "x.csv", "question\n", r"line 1: 1 columns"),
    ("dpr-qa", "x.csv", "question\t['a'\n", r"line 1: the answers .* are no list"),
    ("dpr-qa", "x.csv", "question\t__import__('os')\n", r"are no list"),
    ("popqa", "x.tsv", "id\tquestion\n1\ta\n", r"the column 'possible_answers' is missing"),
    ("popqa", "x.tsv", POPQA + "43\ta\n", r"line 3: 2 columns.*6, as in the header"),
    ("popqa", "x.tsv", POPQA.replace("[", "("), r"line 2: possible_answers is not JSON"),
]


@pytest.mark.parametrize(
    "format, name, text, message", FAULTS, ids=[f"{f}-{n}" for n, (f, *_) in enumerate(FAULTS)]
)
def test_faults_name_file_and_place(
    tmp_path: Path, format: str, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_benchmark(str(tmp_path / name), format)
    assert name in str(caught.value)


def changed_rows(name: str, change: Any) -> str:
    """A format's file with its first question's row changed, pretty-printed where it is one JSON
    value.
    """
    text = FILES[name][1]
    if name in {"nq-open", "kilt", "jsonl"}:
        return "".join(json.dumps(row) + "\n" for row in change(json.loads(text)))
    value = json.loads(text)
    if name == "squad":
        value["data"][0]["paragraphs"][0]["qas"] = change(
            value["data"][0]["paragraphs"][0]["qas"][0]
        )
    elif name == "triviaqa":
        value["Data"] = change(value["Data"][0])
    else:
        value = change(value[0])
    return json.dumps(value, indent=1)


NO_ANSWER: dict[str, tuple[Any, str]] = {
    "squad": (
        lambda row: [row | {"answers": []}],
        r"data\[0\] \(line 4\).*qas\[0\]: the question has no answer",
    ),
    "triviaqa": (
        lambda row: [row | {"Answer": {"Value": "", "Aliases": []}}],
        r"Data\[0\] \(line 3\): 'Value' is ''",
    ),
    "hotpotqa": (lambda row: [row | {"answer": " "}], r"entry 1 \(line 2\): 'answer' is ' '"),
    "dpr": (
        lambda row: [row | {"answers": [" "]}],
        r"entry 1 \(line 2\): the question has no answer",
    ),
    "webquestions": (
        lambda row: [row | {"targetValue": "(list)"}],
        r"entry 1 \(line 2\): the question has no answer",
    ),
    "entityquestions": (
        lambda row: [row | {"answers": []}],
        r"entry 1 \(line 2\): the question has no answer",
    ),
    "nq-open": (lambda row: [row, row | {"answer": []}], r"line 2: the question has no answer"),
    "kilt": (
        lambda row: [row, row | {"id": "k2", "output": [{"answer": ""}]}],
        r"line 2: the question has no answer",
    ),
    "jsonl": (lambda row: [row | {"answers": [""]}], r"line 1: the question has no answer"),
    "popqa": (
        POPQA.replace('"[""smith"", ""farrier""]"', "[]"),
        r"line 2: the question has no answer",
    ),
    "dpr-qa": ("how?\t['low']\nhow high?\t[]\n", r"line 2: the question has no answer"),
}
TWICE: dict[str, tuple[Any, str]] = {
    "squad": (
        lambda row: [row, row],
        r"qas\[1\]: the id 's1' is taken by .*data\[0\] \(line 4\)\.paragraphs\[0\]\.qas\[0\]",
    ),
    "triviaqa": (
        lambda row: [row, row],
        r"Data\[1\] \(line \d+\): the id 'tc_1' is taken by .*Data\[0\] \(line 3\)",
    ),
    "hotpotqa": (
        lambda row: [row, row],
        r"entry 2 \(line \d\d\): the id 'h1' is taken by .*entry 1 \(line 2\)",
    ),
    "entityquestions": (
        lambda row: [row | {"id": 7}] * 2,
        r"entry 2 \(line \d+\): the id '7' is taken by",
    ),
    "nq-open": (lambda row: [row | {"id": "n"}] * 2, r"line 2: the id 'n' is taken by .*line 1"),
    "kilt": (lambda row: [row, row], r"line 2: the id 'k1' is taken by .*line 1"),
    "jsonl": (lambda row: [row, row], r"line 2: the id 'o1' is taken by .*line 1"),
    "popqa": (POPQA + POPQA.splitlines()[1], r"line 3: the id '42' is taken by .*line 2"),
}
"""Not those whose questions have no id of their own: they are counted."""


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["no answer", "twice"])
def test_empty_answers_and_taken_ids_name_file_and_line(
    tmp_path: Path, name: str, fault: str
) -> None:
    cases = NO_ANSWER if fault == "no answer" else TWICE
    if name not in cases:
        assert name in {"dpr", "dpr-qa", "webquestions"}
        assert fault == "twice"
        return
    change, message = cases[name]
    path = tmp_path / FILES[name][0]
    path.write_text(change if isinstance(change, str) else changed_rows(name, change))
    with pytest.raises(DataError, match=message) as caught:
        read_benchmark(str(path), name)
    assert path.name in str(caught.value)
    if fault == "twice":  # a run leaves the second one out, and says so
        assert len(read_benchmark(str(path), name, skip_unusable=True).examples) == 1


@pytest.mark.parametrize("name", FILES)
def test_files_cut_short_or_of_other_bytes_name_file_and_line(tmp_path: Path, name: str) -> None:
    file, text, *_ = FILES[name]
    whole = (
        text
        if name in {"nq-open", "kilt", "jsonl", "popqa", "dpr-qa"}
        else json.dumps(json.loads(text), indent=1)
    )
    for number, content in enumerate(
        [whole[: len(whole) * 2 // 3].encode(), whole.encode() + b"\xe9\n", b"\xff\xfe\x00"]
    ):
        path = tmp_path / str(number) / file
        path.parent.mkdir()
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"line \d+") as caught:
            read_benchmark(str(path), name)
        assert path.name in str(caught.value), content
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(DataError, match=file.replace(".", r"\.")):
        read_benchmark(str(tmp_path / file), name)
    (tmp_path / "folder" / file).mkdir(parents=True)
    with pytest.raises(DataError, match="folder"):
        read_benchmark(str(tmp_path / "folder" / file), name)
    packed = tmp_path / f"{file}.gz"
    packed.write_bytes(gzip.compress(text.encode())[:-9])
    with pytest.raises(DataError, match=r"\.gz cannot be read"):
        read_benchmark(str(packed), name)


@pytest.mark.parametrize("name", FILES)
def test_values_of_another_type_are_data_errors(tmp_path: Path, name: str) -> None:
    """Each value anywhere in a row, turned into something else: read, or one clear error; never a
    traceback.
    """

    def rewrites(value: Any) -> list[Any]:
        others = [None, 7, 1.5, True, [], {}, [None], [[]], {"a": 1}, "", "x"]
        if isinstance(value, dict):
            changed = [value | {key: other} for key in value for other in rewrites(value[key])]
            return [
                *others,
                *changed,
                *({k: v for k, v in value.items() if k != key} for key in value),
            ]
        if isinstance(value, list):
            return [
                *others,
                *(
                    [*value[:i], other, *value[i + 1 :]]
                    for i in range(len(value))
                    for other in rewrites(value[i])
                ),
            ]
        return others

    file, text, *_ = FILES[name]
    if name in {"popqa", "dpr-qa"}:
        contents = [text.replace("[", other) for other in ("", "{", "{{", "((", "[[", "{[]:")] + [
            text.replace("\t", " ")
        ]
    elif name in {"nq-open", "kilt", "jsonl"}:
        contents = [json.dumps(value) for value in rewrites(json.loads(text))]
    else:
        contents = [json.dumps(value) for value in rewrites(json.loads(text))]
    faults = 0
    for content in [*contents, "[" * 100_000, '{"data": ' * 20_000]:
        (tmp_path / file).write_text(content)
        fault = fault_of(tmp_path / file, name)
        assert fault is None or file in fault
        faults += fault is not None
    assert faults > 3


def fault_of(path: Path, name: str) -> str | None:
    try:
        read_benchmark(str(path), name)
    except DataError as error:
        return str(error)
    return None


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "popQA.tsv").write_bytes(b"\xef\xbb\xbf" + POPQA.encode())
    assert read_benchmark(str(tmp_path / "popQA.tsv"), "popqa").examples == [FILES["popqa"][2]]


BEIR_FAULTS = [
    ("corpus.jsonl", '{"_id": "d1", "text"', r"corpus\.jsonl, line 1: malformed JSON"),
    (
        "corpus.jsonl",
        '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}',
        r"corpus\.jsonl, line 2: the document 'd1'",
    ),
    ("corpus.jsonl", '{"_id": "d1", "title": "T"}', r"corpus\.jsonl, line 1: 'text' is missing"),
    ("queries.jsonl", '{"_id": "q1", "text": ""}', r"queries\.jsonl, line 1: 'text' is ''"),
    (
        "queries.jsonl",
        lines({"_id": "q1", "text": "a"}) * 2,
        r"queries\.jsonl, line 2: the id 'q1' is taken by .*line 1",
    ),
    ("queries.jsonl", "[1]", r"queries\.jsonl, line 1: .*JSON object"),
    ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\tgood\n", r"test\.tsv, line 2"),
]


@pytest.mark.parametrize("name, text, message", BEIR_FAULTS)
def test_faults_of_a_beir_folder_name_file_and_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    folder = beir(tmp_path / "set")
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_benchmark(str(folder), "beir")
    (folder / name).write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match=rf"{name}, line 1: not UTF-8"):
        read_benchmark(str(folder), "beir")


def test_what_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file or folder"):
        read_benchmark(str(tmp_path / "gone.json"))
    with pytest.raises(DataError, match="no benchmark format 'other'"):
        read_benchmark(str(tmp_path / "gone.json"), "other")
    (tmp_path / "odd.json").write_text('[{"name": 1}]')
    with pytest.raises(DataError, match="tells no known format"):
        detect_format(str(tmp_path / "odd.json"))
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(json.dumps(SQUAD).encode())[:60])
    with pytest.raises(DataError, match=r"cut\.json\.gz cannot be read"):
        read_benchmark(str(tmp_path / "cut.json.gz"))
    (tmp_path / "latin.tsv").write_bytes(
        "id\tquestion\tpossible_answers\n1\tcaf\xe9\t[]\n".encode("latin-1")
    )
    with pytest.raises(DataError, match=r"latin\.tsv, line 2: not UTF-8"):
        read_benchmark(str(tmp_path / "latin.tsv"))


def test_unusable_questions_are_left_out_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"id": 1, "question": "a", "answer": ["b"]},
        {"id": 1, "question": "c", "answer": ["d"]},
    ]
    (tmp_path / "x.jsonl").write_text(lines(*rows, {"id": 2, "question": "e", "answer": [" "]}))
    found = read_benchmark(str(tmp_path / "x.jsonl"), skip_unusable=True)
    assert [example.id for example in found.examples] == ["1"]
    assert "2 questions without an answer or with a taken id" in caplog.text


def test_converted_files_are_read_by_the_projects_own_readers(tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text(json.dumps(SQUAD))
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "dev.json"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "squad: 1 questions and 2 documents" in result.output
    examples = read_benchmark(str(tmp_path / "dev.json")).examples
    assert read_examples(str(tmp_path / "out" / "questions.jsonl")) == examples
    assert [d.id for d in read_documents(str(tmp_path / "out" / "corpus.jsonl"))] == [
        "Old_Harbour/0",
        "Old_Harbour/1",
    ]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        convert_benchmark(str(tmp_path / "dev.json"), tmp_path / "file")


def test_a_recipe_names_a_benchmark_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "web.json").write_text(json.dumps(WEB))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.jsonl").write_text(lines(OWN))
    overrides = [
        f"questions.dev_uri={tmp_path / 'web.json'}",
        f"questions.train_uri={tmp_path / 'own'}",
    ]
    config = load_config("tiny", overrides)
    dev, train = read_examples_of(config, "dev"), read_examples_of(config, "train")
    assert dev[0].answers == ('Jo "J" May', "Ann")
    assert train[0].id == "o1"
    refuse_unanswerable(dev, {"d"}, "dev")  # names no gold document: measured by its answers
    with pytest.raises(DataError, match="1 of 1 train questions"):
        refuse_unanswerable(dev, {"d"}, "train")
    with pytest.raises(DataError, match="1 of 1 dev questions"):
        refuse_unanswerable(train, {"other"}, "dev")


def test_public_sets_with_odd_rows_are_read(tmp_path: Path) -> None:
    """BEIR with empty texts, null titles and number ids; by both readers alike."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    rows = [
        {"_id": 1, "title": None, "text": "The bell is bronze."},
        {"_id": "2", "title": "Oars", "text": ""},
        {"_id": "3", "title": "", "text": ""},
        {"_id": "4", "text": None, "title": "Sails"},
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "queries.jsonl").write_text('{"_id": 8, "text": "What is the bell made of?"}\n')
    (folder / "qrels" / "test.tsv").write_bytes(
        b"\xef\xbb\xbfquery-id\tcorpus-id\tscore\n8\t1\t1\n"
    )
    found = read_benchmark(str(folder))
    texts = {"1": "The bell is bronze.", "2": "Oars", "4": "Sails"}
    assert {document.id: document.text for document in found.documents} == texts
    assert [(row.id, row.positive_ids) for row in found.examples] == [("8", ("1",))]
    plain = {row.id: row.text for row in read_documents(str(folder)) if row.text}
    assert plain == texts


def test_squad_without_titles_and_as_rows(tmp_path: Path) -> None:
    qas = [{"id": 5, "question": "Who?", "answers": [{"text": "Oda", "answer_start": 0}]}]
    place = tmp_path / "own.json"
    place.write_text(
        json.dumps({"data": [{"paragraphs": [{"context": "Oda keeps it.", "qas": qas}]}]})
    )
    found = read_benchmark(str(place))
    assert [row.positive_ids for row in found.examples] == [("own-0/0",)]
    assert found.documents[0].title == ""
    rows = tmp_path / "rows.jsonl"
    row = {"id": "a", "title": "Lamp", "context": "Oda keeps it.", "question": "Who?"}
    given = [
        {**row, "answers": {"text": ["Oda"], "answer_start": [0]}},
        {**row, "id": "b", "answers": {"text": [], "answer_start": []}},
    ]
    rows.write_text("".join(json.dumps(each) + "\n" for each in given))
    found = read_benchmark(str(rows))
    assert found.format == "squad-rows"
    assert [(row.id, row.answers, row.positive_ids) for row in found.examples] == [
        ("a", ("Oda",), ("Lamp/0",))
    ]
    assert len(found.documents) == 1


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_files_of_one_stem_in_a_folder_lose_no_question(tmp_path: Path, ending: str) -> None:
    for split in ("train", "dev"):
        rows = [
            {"question": f"{split} {n}?", "answer" if ending == "jsonl" else "answers": [f"a{n}"]}
            for n in range(2)
        ]
        text = "\n".join(map(json.dumps, rows)) if ending == "jsonl" else json.dumps(rows)
        (tmp_path / split).mkdir()
        (tmp_path / split / f"NQ-open.{ending}").write_text(text)
    found = read_benchmark(str(tmp_path), skip_unusable=True)
    assert [row.id for row in found.examples] == [
        f"{split}/NQ-open-{n}" for split in ("dev", "train") for n in range(2)
    ]


def test_a_few_questions_without_gold_are_said_and_not_trained_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [Example(f"q{n}", "who?", ("x",), ("d",)) for n in range(20)]
    lost = Example("lost", "who?", ("x",), ("nowhere",))
    refuse_unanswerable([*rows, lost], {"d"}, "train")
    assert "1 of 21 train questions have no positive" in capsys.readouterr().err
    assert answerable([*rows, lost], {"d"}) == rows
    with pytest.raises(DataError, match="3 of 4 train questions"):
        answerable([rows[0], lost, lost, lost], {"d"})


def _own(folder: Path, text: str) -> Path:
    path = folder / "set.json"
    path.write_text(text)
    return path


OAK = [{"text": "oak"}]
ODD: dict[str, tuple[str, list[str], int]] = {
    # format -> a set with odd rows, the questions that are sound, and how many documents
    "nq-open": (
        lines(
            {"question": "Who keeps it?", "answer": "Oda"},
            {"question": "", "answer": ["x"]},
            {"question": "When?", "answer": [1841]},
            {"question": "Where?", "answer": None},
        )
        + "{cut\n",
        ["Who keeps it?", "When?"],
        0,
    ),
    "squad": (
        json.dumps(
            {
                "data": [
                    {
                        "title": "Pier",
                        "paragraphs": [
                            {
                                "context": "The pier is oak.",
                                "qas": [
                                    {
                                        "id": "1",
                                        "question": "Of what?",
                                        "answers": [{"text": "oak"}],
                                    },
                                    {"id": "2", "question": "Unlabelled?"},
                                    {"id": "3", "question": " ", "answers": OAK},
                                ],
                            },
                            {"context": "", "qas": []},
                            {"qas": []},
                        ],
                    },
                    {"title": "No paragraphs"},
                    {
                        "title": "Pier",
                        "paragraphs": [
                            {
                                "context": "The same title, once more.",
                                "qas": [
                                    {"id": 4, "question": "Again?", "answers": [{"text": "once"}]}
                                ],
                            }
                        ],
                    },
                ]
            }
        ),
        ["Of what?", "Again?"],
        2,
    ),
    "squad-rows": (
        lines(
            {"id": 1, "context": "Oak.", "question": "Wood?", "answers": [{"text": "Oak"}]},
            {"id": 2, "context": None, "question": "Lost?", "answers": {"text": ["x"]}},
            {"id": 3, "context": "Oak.", "question": "None?", "answers": None},
        ),
        ["Wood?"],
        1,
    ),
    "triviaqa": (
        json.dumps(
            {
                "Data": [
                    {"QuestionId": "1", "Question": "Sea?", "Answer": {"Value": "Inner Sea"}},
                    {"QuestionId": "2", "Question": "Hidden?"},
                    {"QuestionId": "3", "Question": "Blank?", "Answer": {"Value": ""}},
                ]
            }
        ),
        ["Sea?"],
        0,
    ),
    "hotpotqa": (
        json.dumps(
            [
                {**HOTPOT[0], "context": [["A", ["A is old."]], ["B", []]]},
                {**HOTPOT[0], "_id": "h2", "context": [["A", ["A has another text."]]]},
                {**HOTPOT[0], "_id": "h3", "answer": ""},
            ]
        ),
        ["Is A older than B?"],
        1,
    ),
    "popqa": (
        POPQA
        + '43\tWho?\tthree\tcolumns\n44\ts\tp\tWho wrote?\t["Cora", 7]\t9\n45\ts\tp\tq\t\t1\n',
        ["What does Dag do?", "Who wrote?"],
        0,
    ),
    "dpr": (
        json.dumps(
            [
                {**DPR[0], "hard_negative_ctxs": [{"title": "", "text": "", "psg_id": 3}]},
                {"question": "no id", "answers": ["x"], "positive_ctxs": [{"text": "y"}]},
            ]
        ),
        ["who made it"],
        1,
    ),
    "kilt": (lines(*KILT, {"id": "k2", "input": "unlabelled"}), ["who wrote it"], 0),
    "jsonl": (
        lines(OWN, {**OWN, "id": 2, "positive_ids": [4]}, {**OWN, "id": None}),
        ["Why?", "Why?"],
        0,
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_row_costs_itself_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    text, questions, documents = ODD[name]
    path = _own(tmp_path, text)
    found = read_benchmark(str(path), name, skip_unusable=True)
    assert [example.question for example in found.examples] == questions
    assert len(found.documents) == documents
    assert len({document.id for document in found.documents}) == documents
    assert f"faulty rows were left out (first: {path}" in caplog.text
    with pytest.raises(DataError):
        read_benchmark(str(path), name)


def test_a_set_without_a_sound_row_is_refused_for_its_first(tmp_path: Path) -> None:
    path = _own(tmp_path, lines({"question": "", "answer": ["x"]}))
    with pytest.raises(DataError, match="line 1: 'question' is ''"):
        read_benchmark(str(path), "nq-open", skip_unusable=True)


@pytest.mark.parametrize(
    "judged",
    [
        "query-id\tcorpus-id\tscore\r\n8\t1\t1.0\r\n9\t1\t0.0\r\n",
        "8\t0\t1\t2\n9\t0\t1\t0\n",
        "8 0 1 1\n",
        "query-id\tcorpus-id\tscore\n8\t1\t1\nnobody\t1\t1\n8\tnowhere\tmaybe\n",
    ],
)
def test_judgements_are_read_in_each_of_their_forms(tmp_path: Path, judged: str) -> None:
    """Real scores, TREC's four columns, line ends of Windows, packed files, a damaged line."""
    (tmp_path / "qrels").mkdir()
    corpus = lines(
        {"_id": 1, "title": "Bell", "text": None}, {"_id": 2, "text": "Oak."}, {"_id": 3}
    )
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(corpus.encode()))
    asked = lines({"_id": 8, "text": "Which bell?"}, {"_id": 9, "text": None})
    (tmp_path / "queries.jsonl").write_text(asked)
    (tmp_path / "qrels" / "test.tsv").write_text(judged, newline="")
    found = read_benchmark(str(tmp_path), skip_unusable=True)
    assert [(row.id, row.positive_ids) for row in found.examples] == [("8", ("1",))]
    assert {row.id: row.text for row in found.documents} == {"1": "Bell", "2": "Oak."}


def test_files_that_differ_by_their_endings_lose_no_question(tmp_path: Path) -> None:
    for ending in ("jsonl", "json", "jsonl.gz"):
        text = lines({"question": f"In {ending}?", "answer": ["yes"]}).encode()
        (tmp_path / f"set.{ending}").write_bytes(gzip.compress(text) if "gz" in ending else text)
    found = read_benchmark(str(tmp_path), "nq-open", skip_unusable=True)
    assert len({example.id for example in found.examples}) == 3


def test_files_whose_documents_share_an_id_are_not_mixed(tmp_path: Path) -> None:
    for number, text in enumerate(("The bell is bronze.", "The bell is tin.")):
        qas = [{"id": f"q{number}", "question": "Of what?", "answers": [{"text": "x"}]}]
        data = {"data": [{"title": "Bell", "paragraphs": [{"context": text, "qas": qas}]}]}
        (tmp_path / f"{number}.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"1\.json: the document 'Bell/0' has another text"):
        carried_documents(str(tmp_path))
    found = read_benchmark(str(tmp_path), skip_unusable=True)
    assert [example.id for example in found.examples] == ["q0"]
