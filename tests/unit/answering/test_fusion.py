"""Reciprocal rank fusion by hand, and rewrites made at query time."""

from __future__ import annotations

import pytest

from invar_ray.answering.fusion import fuse_hits, fuse_lists, query_rewrites
from invar_ray.questions.rules import comparison_key
from invar_ray.schema import Hit


def hits(names: str) -> list[Hit]:
    return [Hit(name, name.upper(), rank, 1.0 / rank) for rank, name in enumerate(names, start=1)]


def test_fusion_by_hand() -> None:
    found = fuse_hits([hits("abc"), hits("bd")], 10)
    assert [hit.passage_id for hit in found] == ["b", "a", "d", "c"]
    assert [hit.rank for hit in found] == [1, 2, 3, 4]
    assert found[0].score == pytest.approx(1 / 62 + 1 / 61)
    assert found[1].score == pytest.approx(1 / 61)
    assert found[2].score == pytest.approx(1 / 62)
    assert found[0].document_id == "B"
    assert [hit.passage_id for hit in fuse_hits([hits("abc"), hits("bd")], 2)] == ["b", "a"]


def test_one_list_stays_and_equal_lists_agree() -> None:
    assert [hit.passage_id for hit in fuse_hits([hits("cab")], 5)] == list("cab")
    assert [hit.passage_id for hit in fuse_hits([hits("cab")] * 3, 5)] == list("cab")
    assert fuse_hits([[], []], 5) == []


def test_ties_go_by_best_rank_then_by_list() -> None:
    assert [hit.passage_id for hit in fuse_hits([hits("ab"), hits("ba")], 5)] == ["a", "b"]
    assert [hit.passage_id for hit in fuse_hits([hits("xy"), hits("zw")], 5)] == [
        "x",
        "z",
        "y",
        "w",
    ]
    # The same three terms in any order tie exactly.
    assert [
        hit.passage_id for hit in fuse_hits([hits("abc"), hits("bca"), hits("cab")], 5)
    ] == list("abc")


def test_a_repeated_passage_counts_once_at_its_best_rank() -> None:
    assert fuse_hits([hits("aab")], 5)[0].score == pytest.approx(1 / 61)


def scored(**scores: float) -> list[Hit]:
    return [Hit(name, name, n, score) for n, (name, score) in enumerate(scores.items(), start=1)]


def test_hybrid_scores_by_hand() -> None:
    # Cosines 0.8 .. 0.4 become 1 .. 0; BM25's 10 and 5 become 1 and 0.5.
    found = fuse_lists(scored(a=0.8, b=0.5, c=0.4), scored(b=10.0, d=5.0), 10)
    wanted = {"b": 0.4 * 0.25 + 0.6, "a": 0.4, "d": 0.3, "c": 0.0}
    assert {hit.passage_id: hit.score for hit in found} == pytest.approx(wanted)
    assert [hit.passage_id for hit in found] == list(wanted)
    assert [hit.rank for hit in found] == [1, 2, 3, 4]
    assert fuse_lists(scored(a=0.8), [], 3)[0].score == pytest.approx(0.4)
    assert [hit.passage_id for hit in fuse_lists([], scored(a=3.0, b=3.0), 1)] == ["a"]
    assert fuse_lists([], [], 3) == []
    # 0.8 of the cosine, 0.2 of the words: the first by vectors stays first.
    weighted = fuse_lists(scored(a=0.8, b=0.5, c=0.4), scored(b=10.0, d=5.0), 10, 0.8)
    assert [hit.passage_id for hit in weighted] == ["a", "b", "d", "c"]
    assert [hit.score for hit in weighted] == pytest.approx([0.8, 0.4, 0.1, 0.0])


def test_rewrites_depend_on_the_wording_alone_and_add_no_noise() -> None:
    wording = "Which river flows through the city of Vienna?"
    made = query_rewrites(wording, 2, 0)
    assert len(made) == 2
    assert made == query_rewrites(wording, 2, 0)
    assert len({comparison_key(text) for text in (wording, *made)}) == 3
    letters = set("".join(wording.lower().split()))
    assert all("vienna" in text.lower() for text in made), (made, letters)  # no typo in the name
    assert len(query_rewrites("why", 5, 0)) <= 5
