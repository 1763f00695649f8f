"""The questions that README and the demo put to the demo's corpus, asked of the demo's own store
where it stands (``make demo``).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from invar_ray import Rag, open_rag
from invar_ray.corpus.facts import documents
from invar_ray.text.answers import contains_answer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
STORE = ROOT / "runs" / "demo"
ASKED = {
    "README.md": ("Which element has the symbol Fr?", "francium", "Francium"),
    "invar_ray/cli/demo.py": ("Who painted Las Meninas?", "Diego Velázquez", "Las Meninas"),
}


@pytest.fixture(scope="module")
def rag() -> Rag:
    if not any((STORE / "generator").glob("*/manifest.json")):
        pytest.skip("runs/demo holds no generator: run make demo first")
    return open_rag(str(STORE))


@pytest.mark.parametrize("file", ASKED)
def test_an_example_is_still_where_it_was_and_its_answer_in_the_corpus(file: str) -> None:
    question, answer, title = ASKED[file]
    assert question in (ROOT / file).read_text(encoding="utf-8")
    text = next(f"{each.title} {each.text}" for each in documents() if each.title == title)
    assert contains_answer(text, [answer])


@pytest.mark.parametrize("file", ASKED)
def test_an_example_is_answered_right_and_cited(rag: Rag, file: str) -> None:
    question, answer, title = ASKED[file]
    found = rag.ask(question)
    assert contains_answer(found.guess or found.text, [answer]), found
    assert title in {hit.title for hit in found.hits[:1]}
    assert found.low_confidence or [each.title for each in found.citations] == [title]
