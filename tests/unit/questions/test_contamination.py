"""Near duplicates between training and dev questions."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invar_ray.questions.contamination import near_duplicates
from invar_ray.steps.questions import CONTAMINATION, load_examples
from invar_ray.steps.questions import build as build_questions
from invar_ray.steps.questions import plan as questions_plan
from invar_ray.store.artifacts import Store
from tests.support import questions, small_config, write_lines


def test_hand_worked() -> None:
    # 3 texts; w = log(1 + 3 / n): "arvon", "belisk" and "old" stand in one text, the others in
    # more.
    train = {"t": ["old light of Arvon"]}
    dev = {"a": ["light of Arvon"], "b": ["light of Belisk"]}
    common, arvon, once = math.log(2), math.log(2.5), math.log(4)
    (found,) = near_duplicates(train, dev, 0.3)
    assert (found.train, found.dev) == ("t", "a")
    assert found.similarity == pytest.approx((2 * common + arvon) / (2 * common + arvon + once))
    assert not near_duplicates(train, dev, found.similarity + 1e-6)
    assert near_duplicates(train, {"b": dev["b"], "x": ["Arvon"]}, 0.9) == []


def test_one_template_about_two_things_is_not_alike_and_other_numbers_are_not() -> None:
    names = ["Arvon", "Belisk", "Corrie", "Dunmore", "Elvay", "Fenholm", "Garsa", "Hestray"]
    train = {name: [f"Who built the lighthouse of {name}?"] for name in names[:4]}
    dev = {name: [f"Who built the lighthouse of {name}?"] for name in names[4:]}
    assert near_duplicates(train, dev, 0.7) == []
    dev["again"] = ["the lighthouse of Belisk: who built the lighthouse?"]
    assert [(pair.train, pair.dev) for pair in near_duplicates(train, dev, 0.7)] == [
        ("Belisk", "again")
    ]
    one = near_duplicates(
        {"t": ["who won the cup in 2010"]}, {"d": ["who won the cup in 2012"]}, 0.1
    )
    assert one == []
    assert near_duplicates(
        {"t": ["who won the cup in 2010"]}, {"d": ["in 2010 who won the cup"]}, 1.0
    )


WORDS = st.lists(st.sampled_from("a b c d e f g h 1".split()), min_size=0, max_size=5).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(WORDS, min_size=1, max_size=6),
    st.lists(WORDS, min_size=1, max_size=6),
    st.floats(0.05, 1.0),
)
def test_finds_what_comparing_all_pairs_finds(
    train: list[str], dev: list[str], threshold: float
) -> None:
    sets = [frozenset(re.findall(r"\w+", text)) for text in [*train, *dev]]
    counts = Counter(itertools.chain.from_iterable(sets))
    weight = {word: math.log(1 + len(sets) / count) for word, count in counts.items()}

    def similarity(a: frozenset[str], b: frozenset[str]) -> float:
        if ("1" in a) != ("1" in b) or not a | b:
            return 0.0
        return math.fsum(weight[w] for w in a & b) / math.fsum(weight[w] for w in a | b)

    best = {
        n: max(similarity(sets[n], other) for other in sets[len(train) :])
        for n in range(len(train))
    }
    found = near_duplicates(
        {str(n): [text] for n, text in enumerate(train)},
        {str(n): [text] for n, text in enumerate(dev)},
        threshold,
    )
    near = {n for n, value in best.items() if abs(value - threshold) < 1e-6}  # rounding decides
    assert {int(pair.train) for pair in found} - near == {
        n for n, v in best.items() if v >= threshold and v > 0
    } - near
    for pair in found:
        assert pair.similarity == pytest.approx(best[int(pair.train)])


def test_the_step_drops_and_lists_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = questions("train")
    rows[3]["question"] = (
        "On Belisk, what do the farmers there grow?"  # dev-1 asks "What do farmers grow on Belisk?"
    )
    rows[3]["rewrites"] = []
    path = write_lines(tmp_path / "near.jsonl", rows)
    options = (f"questions.train_uri={path}", "rewrites.num_rewrites=0")
    plain = small_config(tmp_path, *options)
    strict = small_config(tmp_path, *options, "questions.near_duplicates=0.6")
    store = Store(plain.storage.root_uri)
    before, after = (
        store.get_or_build(
            questions_plan(config), lambda building, c=config: build_questions(building, c)
        )[0]
        for config in (plain, strict)
    )
    assert len(load_examples(before, "train")) == 12
    assert "dropped_as_near_duplicates" not in before.info
    assert CONTAMINATION not in before.manifest.files
    assert {e.id for e in load_examples(before, "train")} - {
        e.id for e in load_examples(after, "train")
    } == {"train-3"}
    assert after.info["dropped_as_near_duplicates"] == 1
    (pair,) = json.loads(after.path(CONTAMINATION).read_text(encoding="utf-8"))
    assert (pair["train"], pair["dev"]) == ("train-3", "dev-1")
    assert 0.6 <= pair["similarity"] < 1
    assert "dropped 1 of 12 training questions as near duplicates" in capsys.readouterr().err
