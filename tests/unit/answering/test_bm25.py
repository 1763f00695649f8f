"""BM25 against the formula written out, and the order of its hits."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invar_ray.answering.bm25 import Bm25, Bm25Retriever
from invar_ray.errors import DataError, RequestError
from invar_ray.schema import Passage
from invar_ray.text.words import words

TEXTS = st.lists(
    st.lists(st.sampled_from("ant bee cat dog elk".split()), max_size=6), min_size=1, max_size=6
)


def reference(texts: list[list[str]], query: list[str], k1: float, b: float) -> list[float]:
    """Lucene's BM25: idf ln(1 + (N - n + 1/2) / (n + 1/2)), frequency f / (f + k1 (1 - b + b |d| /
    mean)).
    """
    mean = sum(map(len, texts)) / len(texts)
    scores = []
    for text in texts:
        counts, score = Counter(text), 0.0
        for word in query:
            holders = sum(word in other for other in texts)
            idf = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
            score += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(text) / mean))
        scores.append(score)
    return scores


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.lists(st.sampled_from("ant bee cat dog elk fox".split()), min_size=1, max_size=4))
def test_scores_are_the_formulas(texts: list[list[str]], query: list[str]) -> None:
    if not any(texts):
        with pytest.raises(DataError, match="without a word"):
            Bm25([" ".join(text) for text in texts])
        return
    found = Bm25([" ".join(text) for text in texts], k1=1.2, b=0.75).search(
        [" ".join(query)], len(texts)
    )[0]
    wanted = reference(texts, query, 1.2, 0.75)
    assert {row for row, _ in found} == {row for row, score in enumerate(wanted) if score > 0}
    for row, score in found:
        assert score == pytest.approx(wanted[row], rel=1e-5)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


def test_a_saved_one_is_mapped_and_finds_the_same(tmp_path: Path) -> None:
    texts = [f"{'cat ' * (n % 4)}dog number {n}" for n in range(40)]
    made = Bm25(texts)
    made.save(tmp_path / "bm25")
    assert not [file for file in tmp_path.rglob("*") if file.suffix in {".pkl", ".pickle"}]
    opened = Bm25.open(tmp_path / "bm25")
    assert opened.size == 40
    for top_k in (1, 3, 17, 40):
        assert opened.search(["cat 7", "DOG", "zebra"], top_k) == [
            found[:top_k] for found in made.search(["cat 7", "DOG", "zebra"], 40)
        ]


def test_only_allowed_rows_are_found() -> None:
    bm25 = Bm25(["a cat", "the dog", "a cat", "A CAT!"])
    allowed = np.array([False, True, True, True])
    assert [row for row, _ in bm25.search(["cat"], 1, allowed=allowed)[0]] == [2]
    assert bm25.search(["cat"], 9, allowed=~np.array([1, 0, 1, 1], bool))[0] == []
    with pytest.raises(RequestError, match="filter has shape"):
        bm25.search(["cat"], 1, allowed=allowed[:2])


def test_ties_go_by_row_and_what_shares_no_word_is_left_out() -> None:
    bm25 = Bm25(["a cat", "the dog", "a cat", "A CAT!"])
    assert [row for row, _ in bm25.search(["Cat?"], 10)[0]] == [0, 2, 3]
    assert [row for row, _ in bm25.search(["Cat?"], 2)[0]] == [0, 2]
    assert bm25.search(["zebra", "", "?"], 3) == [[], [], []]
    with pytest.raises(RequestError, match="top_k is 0"):
        bm25.search(["cat"], 0)


def test_words() -> None:
    assert words("Straße, 1,000 km_h O'Neil — né") == "strasse 1 000 km h o neil né".split()


def test_hits_carry_the_passage() -> None:
    class Rows(list):  # type: ignore[type-arg]
        def rows(self, rows: object) -> list[Passage]:
            return [self[row] for row in rows]  # type: ignore[attr-defined]

    passages = Rows(
        Passage(f"d{n}:0", f"d{n}", title, text, 0, len(text), f"file{n}")
        for n, (title, text) in enumerate(
            [("Oslo", "a port"), ("Rome", "a city"), ("Pisa", "a tower in a city")]
        )
    )
    found = Bm25Retriever(passages).retrieve(["which city is Rome", "tower"], 2)
    assert [(hit.document_id, hit.rank, hit.title, hit.uri) for hit in found[0]] == [
        ("d1", 1, "Rome", "file1"),
        ("d2", 2, "Pisa", "file2"),
    ]
    assert [hit.passage_id for hit in found[1]] == ["d2:0"]


def test_scripts_without_spaces_and_other_spellings_are_found() -> None:
    texts = [
        "灯塔建于１８９２年，守塔人住在海边。",
        "磨坊在河边，每年秋天开放。",
        "ประภาคารตั้งอยู่บนเกาะ",
        "The light\u00adhouse has an o\ufb03ce.",
    ]
    bm25 = Bm25(texts)
    for query, row in {
        "灯塔什么时候建成": 0,
        "1892年": 0,
        "河边的磨坊": 1,
        "ประภาคารอยู่ที่ไหน": 2,
        "lighthouse": 3,
        "office": 3,
    }.items():
        assert bm25.search([query], 1)[0][0][0] == row
