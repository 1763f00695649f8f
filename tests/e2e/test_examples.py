"""The questions that README, the guides and the demo put to the demo's corpus: each is known here,
its answer is in the corpus, and the demo's own store (``make demo``) answers it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from invar_ray import Rag, open_rag
from invar_ray.corpus.facts import documents
from invar_ray.text.answers import contains_answer

ROOT = Path(__file__).parents[2]
STORE = ROOT / "runs" / "demo"
ASKED = {
    "Which element has the symbol Fr?": ("francium", "Francium"),
    "Who painted Las Meninas?": ("Diego Velázquez", "Las Meninas"),
}
"""Question -> its answer, and the title of the document that says so."""
OF_OTHERS = {"Who built the lighthouse of Arvon?", "Who approves travel expenses?"}
"""Asked of a reader's own documents (tests/own_documents.py, docs/tutorial.md)."""
_ASKING = re.compile(
    r"(?:\b(?:ask|search|stability|invoke|complete)\(?\s*\"|_ASKED = \")([^\"]+)\""
)


@pytest.fixture(scope="module")
def rag() -> Rag:
    if not any((STORE / "generator").glob("*/manifest.json")):
        pytest.skip("runs/demo holds no generator: run make demo first")
    return open_rag(str(STORE))


@pytest.mark.parametrize(
    "file",
    ["README.md", "docs/guides/python.md", "docs/guides/serve.md", "invar_ray/cli/demo.py"],
)
def test_every_question_that_a_reader_may_copy_is_known_here(file: str) -> None:
    found = set(_ASKING.findall((ROOT / file).read_text(encoding="utf-8")))
    assert found, "the pattern finds nothing any more"
    assert found <= set(ASKED) | OF_OTHERS


@pytest.mark.parametrize("question", ASKED)
def test_the_answer_is_in_the_corpus(question: str) -> None:
    answer, title = ASKED[question]
    (text,) = (f"{each.title} {each.text}" for each in documents() if each.title == title)
    assert contains_answer(text, [answer])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("question", ASKED)
def test_an_example_is_answered_right_given_and_cited(rag: Rag, question: str) -> None:
    answer, title = ASKED[question]
    found = rag.ask(question)
    assert contains_answer(found.text, [answer]), found
    assert found.hits[0].title == title
    assert [each.title for each in found.citations] == [title]
