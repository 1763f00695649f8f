"""Questions made from documents: the answer stands there, the question does not give it away, twice
gives the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from invar_ray.cli.main import app
from invar_ray.corpus import facts
from invar_ray.corpus.readers import read_examples
from invar_ray.questions.asking import ask_for_questions
from invar_ray.questions.llm import ChatEndpoint
from invar_ray.questions.making import (
    MadeQuestion,
    findable,
    make_questions,
    split_by_document,
    without_clashes,
)
from invar_ray.questions.rules import comparison_key
from invar_ray.schema import Document, Place
from invar_ray.steps.passages import document_ids
from invar_ray.steps.questions import build as build_questions
from invar_ray.steps.questions import load_examples, refuse_unanswerable
from invar_ray.steps.questions import plan as questions_plan
from invar_ray.store.artifacts import Store
from invar_ray.text.answers import contains_answer
from tests.support import small_config
from tests.unit.steps.test_passages import build


def made_of(
    text: str, title: str = "", places: tuple[Place, ...] = ()
) -> dict[str, tuple[str, str]]:
    """Answer type -> question and answer."""
    made = make_questions(Document("d", title, text, "", "d.txt", places), most=99, seed=0)
    return {one.answer_type: (one.example.question, one.example.answers[0]) for one in made}


@pytest.mark.parametrize(
    ("sentence", "kind", "question", "answer"),
    [
        (
            "The harbour of Arvon was dug in 1841.",
            "year",
            "In which year was the harbour of Arvon dug?",
            "1841",
        ),
        ("In 1841 Ada Morvane built the mill.", "year", "In which year did Ada Morvane build the mill?", "1841"),  # noqa: E501
        (
            "The lighthouse of Arvon was built by Ada Morvane after the storm.",
            "agent",
            "By whom was the lighthouse of Arvon built after the storm?",
            "Ada Morvane",
        ),
        (
            "The castle of Belisk has 52 rooms on three floors.",
            "number",
            "",
            "",
        ),
        ("The castle of Belisk has 52 rooms.", "number", "The castle of Belisk has how many rooms?", "52"),  # noqa: E501
        (
            "Bram Tolliver opened the school on 3 May 1902.",
            "date",
            "On which date did Bram Tolliver open the school?",
            "3 May 1902",
        ),
        (
            "Bram Tolliver opened the school on the hill.",
            "subject",
            "Who or what opened the school on the hill?",
            "",
        ),
        (
            "Cora Fisk painted the ceiling of Garsa Hall.",
            "subject",
            "Who or what painted the ceiling of Garsa Hall?",
            "Cora Fisk",
        ),
        ("Arvon is a small island that nobody owns.", "definition", "What kind of thing is Arvon?", "a small island"),  # noqa: E501
        ("The tax of Corrie fell to 12 percent later.", "percentage", "", "12 percent"),
        ("The oldest boat of Elvay lies in Fenholm.", "place", "", "Fenholm"),
        ("The prize of Elvay was worth $5,000 then.", "money", "", "$5,000"),
        ("The western bay of Arvon is named Corrie Sound.", "name", "", "Corrie Sound"),
    ],
)  # fmt: skip
def test_sentences_and_their_questions(
    sentence: str, kind: str, question: str, answer: str
) -> None:
    made = made_of(sentence)
    if not answer:
        assert kind not in made  # two numbers; nothing that can be looked for
        return
    found = made[kind]
    assert found[1] == answer
    if question:
        assert found[0] == question


@pytest.mark.parametrize(
    ("sentence", "question"),
    [
        ("The Carrow wagon holds nine tonnes.", "How many tonnes does the Carrow wagon hold?"),
        (
            "The crew of Arvon may work more than nine hours.",
            "The crew of Arvon may work more than how many hours?",
        ),
        (
            "The Arvon works sold the crane for 840 crowns.",
            "The Arvon works sold the crane for how many crowns?",
        ),
        (
            "The axles of the Kestrel are oiled every 80 miles.",
            "The axles of the Kestrel are oiled every how many miles?",
        ),
    ],
)
def test_no_small_word_is_left_behind_by_the_number_that_it_belongs_to(
    sentence: str, question: str
) -> None:
    assert made_of(sentence)["number"][0] == question


def test_who_did_it_is_asked_only_where_something_was_done() -> None:
    assert "agent" not in made_of("The Arvon shop sells the book Moss by Ada Morvane.")


@pytest.mark.parametrize(
    "sentence",
    [
        "It was dug by Ada Morvane in 1841.",
        "In 1841 he moved to Garsa with Ada Morvane.",
        "This harbour was dug in 1841 by hand.",
        "Was the harbour of Arvon dug in 1841?",
        "See https://arvon.example was made in 1841.",
        "# The harbour of Arvon was dug in 1841.",
        "| Arvon | was dug in 1841.",
        "The harbour of Arvon, dug in 1841",
        "Arvon 1841, Belisk 1842, Corrie 1843.",
        "It began in 1841.The harbour of Arvon was finished.",
        "The school was opened in 1841.",
        "Nobody of the Arvon crew may work nine hours.",
        "Arvon tunnel The tunnel was dug in 1841.",
        "Bus 47 stops at the gate.",
    ],
)
def test_what_leans_on_other_text_or_is_no_sentence_makes_nothing(sentence: str) -> None:
    assert made_of(sentence) == {}


def test_a_title_stands_in_for_the_context() -> None:
    question, answer = made_of("The school was opened in 1841.", "Parish of Elvay")["year"]
    assert question == 'According to "Parish of Elvay", the school was opened in which year?'
    assert answer == "1841"


def test_nobody_asks_what_a_page_says_about_a_heading() -> None:
    places = (Place(0, '"Leave"'), Place(20, '"Navigation"'))
    text = "# Leave\n\nThirty days a year.\n\n## Navigation\n\nThe home page is here."
    assert "section" not in made_of(text, "Leave rules", places)


def test_a_question_stays_if_one_of_the_searches_finds_its_document() -> None:
    made = make_questions(Document("a", "Arvon", "The harbour was dug in 1841."), most=4, seed=0)
    assert made
    lost, found = (lambda texts: [["b"]] * len(texts)), (lambda texts: [["b", "a"]] * len(texts))
    assert findable(made, [lost]) == []
    assert findable(made, [lost, found]) == made
    assert findable([], [lost]) == []


@pytest.fixture(scope="module")
def of_facts() -> list[tuple[Document, MadeQuestion]]:
    found = []
    for document in list(facts.documents())[::5]:
        found += [(document, made) for made in make_questions(document, most=4, seed=0)]
    return found


def test_every_answer_stands_in_its_document_and_in_no_wording(
    of_facts: list[tuple[Document, MadeQuestion]],
) -> None:
    assert len(of_facts) > 100
    for document, made in of_facts:
        example = made.example
        assert example.positive_ids == (document.id,)
        assert contains_answer(document.text, example.answers)
        assert example.answers[0] in document.text
        for wording in (example.question, *example.rewrites):
            assert not contains_answer(wording, example.answers)
        assert example.question.endswith("?")
        assert len({comparison_key(text) for text in (example.question, *example.rewrites)}) >= 2
        assert not {"it", "he", "she", "they"} & set(example.question.lower().split()[:4])
    assert len({made.example.id for _, made in of_facts}) == len(of_facts)
    assert len({made.answer_type for _, made in of_facts}) >= 5


def test_the_same_in_another_process() -> None:
    program = (
        "from invar_ray.corpus import facts\n"
        "from invar_ray.questions.making import make_questions\n"
        "print(sum((make_questions(d, most=2, seed=3) for d in list(facts.documents())[:40]), []))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": salt},
        ).stdout
        for salt in ("1", "2")
    }
    assert len(runs) == 1


def test_most_and_seed() -> None:
    document = Document(
        "d", "", " ".join(f"The harbour of Arvon{n} was dug in 18{n}." for n in range(10, 40))
    )
    first, second = (make_questions(document, most=5, seed=seed) for seed in (0, 1))
    assert len(first) == len(second) == 5
    assert first != second


def test_clashes() -> None:
    same = make_questions(
        Document("a", "", "The harbour of Arvon was dug in 1841."), most=9, seed=0
    )
    again = make_questions(
        Document("b", "", "The harbour of Arvon was dug in 1841."), most=9, seed=0
    )
    other = make_questions(
        Document("c", "", "The harbour of Arvon was dug in 1902."), most=9, seed=0
    )
    assert without_clashes([*same, *again]) == same
    assert without_clashes([*same, *other]) == []


def test_the_split_is_by_document_and_copies_stay_together(
    of_facts: list[tuple[Document, MadeQuestion]],
) -> None:
    texts = {document.id: document.text for document, _ in of_facts}
    train, dev = split_by_document([made for _, made in of_facts], texts, 0)
    of = [{made.example.positive_ids[0] for made in part} for part in (train, dev)]
    assert not of[0] & of[1]
    assert len(train) + len(dev) == len(of_facts)
    assert 0.1 < len(of[1]) / len(texts) < 0.3
    copies = {id: "the same" for id in texts}
    train, dev = split_by_document([made for _, made in of_facts], copies, 0)
    # as of one document: by place
    assert min(made.start for made in dev) >= max(made.start for made in train)


# The files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for document in list(facts.documents())[:40]:
        (folder / f"{document.id}.md").write_text(
            f"# {document.title}\n\n{document.text}\n", encoding="utf-8"
        )
    (folder / "empty.txt").write_bytes(b"")
    return folder


def test_the_command_writes_what_training_reads(folder: Path, tmp_path: Path) -> None:
    arguments = [
        "questions",
        str(folder),
        "--out",
        str(tmp_path / "q.jsonl"),
        "--per-document",
        "3",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    train, dev = result.stdout.split()
    assert Path(train).name == "q.train.jsonl"
    assert "left out: empty.txt is empty. To do: remove it." in result.stderr
    assert f"questions.train_uri={train} questions.dev_uri={dev}" in result.stderr
    rows = [json.loads(line) for line in Path(train).read_text(encoding="utf-8").splitlines()]
    assert set(rows[0]) == {"id", "question", "answers", "positive_ids", "rewrites", "answer_type"}
    assert len(read_examples(train)) == len(rows) > 20
    config = small_config(
        tmp_path, f"corpus.uri={folder}", f"questions.train_uri={train}", f"questions.dev_uri={dev}"
    )
    store = Store(config.storage.root_uri)
    questions = store.get_or_build(
        questions_plan(config), lambda building: build_questions(building, config)
    )[0]
    documents = document_ids(build(config))
    for split in ("train", "dev"):
        refuse_unanswerable(load_examples(questions, split), documents, split)  # type: ignore[arg-type]
    before = Path(train).read_bytes()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert Path(train).read_bytes() == before


def test_too_few_questions_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Nothing to ask about here")
    result = CliRunner().invoke(
        app, ["questions", str(tmp_path), "--out", str(tmp_path / "q.jsonl")]
    )
    assert result.exit_code == 1
    assert "gave 0 questions. Expected: at least 2" in result.stderr
    assert "Traceback" not in result.stderr


# A language model that asks


class Canned(ChatEndpoint):
    """The transport is tested with the rewriter's (test_rewrites.py); here a reply is what
    counts.
    """

    said = ""

    def _ask(self, body: dict[str, Any]) -> str:
        self.prompt = body["messages"][0]["content"]
        return self.said


def test_what_a_model_asks_is_checked(tmp_path: Path) -> None:
    document = Document(
        "d", "Arvon", "The harbour of Arvon was dug by hand in 1841. Its mole is of granite."
    )
    endpoint = Canned("http://127.0.0.1:9/v1", "m", cache_path=tmp_path / "replies.jsonl")
    rows = [
        {"question": "When was Arvon harbour dug?", "rewording": "In what year was it dug at Arvon?", "answer": "1841"},  # noqa: E501
        {"question": "when was arvon harbour dug", "answer": "in 1841"},
        {"question": "What is the mole of Arvon made of?", "rewording": "Is the mole granite?", "answer": "Granite"},  # noqa: E501
        {"question": "Who dug the harbour of Arvon?", "rewording": "", "answer": "Ada Morvane"},
        {"question": "Was the harbour of Arvon dug in 1841?", "rewording": "", "answer": "1841"},
        {"question": 7, "answer": "x"},
    ]  # fmt: skip
    endpoint.said = f"Here they are:\n```json\n{json.dumps(rows)}\n```"
    made = ask_for_questions(document, endpoint, most=6, seed=0)
    assert [(one.example.question, one.example.answers, one.example.rewrites) for one in made] == [
        ("When was Arvon harbour dug?", ("1841",), ("In what year was it dug at Arvon?",)),
        ("What is the mole of Arvon made of?", ("granite",), ()),
    ]
    assert document.text in endpoint.prompt
    again = Canned("http://127.0.0.1:9/v1", "m", cache_path=tmp_path / "replies.jsonl")
    assert ask_for_questions(document, again, most=6, seed=0) == made  # from the cache
    endpoint.said = "I cannot."
    assert ask_for_questions(document, endpoint, most=6, seed=1) == []
