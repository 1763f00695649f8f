"""What a new generator is calibrated on: train questions with what answers them, and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from invar_ray.config import Config, load_config
from invar_ray.models.generator import Generation
from invar_ray.steps.generator import calibration_set, summary, try_answers
from invar_ray.steps.readings import READING_SCHEMA, READINGS
from invar_ray.store.artifacts import Building, Plan, Store
from invar_ray.text.answers import contains_answer
from invar_ray.text.prompts import REFUSAL
from invar_ray.training.sequences import ReadingSet, silenced

COUNT = 12


def row(number: int) -> dict[str, Any]:
    """A question whose keeper stands in its own document, or in its title."""
    keeper = f"Mara{number} Voss"
    titled = number % 3 == 0
    own = {
        "passage_id": f"p{number}",
        "document_id": f"d{number}",
        "title": keeper if titled else f"Island {number}",
        "texts": [f"It is of salt. {keeper} kept the light. Ferries come.", "another window"],
    }
    others = [
        {"passage_id": f"o{n}", "document_id": f"e{n}", "title": f"Other {n}", "texts": ["Ice."]}
        for n in range(3)
    ]
    hits = [own, *others]
    return {
        "question_id": f"q{number}",
        "wordings": [f"Who kept the light of island {number}?", f"Island {number}: its keeper?"],
        "answers": [keeper],
        "positive_ids": [f"d{number}"],
        "hits": [hits, hits],
        "oracle": None,
    }


@pytest.fixture
def readings(tmp_path: Path) -> ReadingSet:
    def body(building: Building) -> None:
        rows = [row(number) for number in range(COUNT)]
        pq.write_table(pa.Table.from_pylist(rows, schema=READING_SCHEMA), building.path / READINGS)

    made, _ = Store(str(tmp_path)).get_or_build(Plan("readings", "few", {}), body)
    return ReadingSet(made)


def config(**generator: Any) -> Config:
    made = load_config("tiny")
    return replace(made, generator=replace(made.generator, **generator))


def test_each_question_is_asked_with_what_answers_it_and_without(readings: ReadingSet) -> None:
    asked = calibration_set(readings, config(top_k=3, steps=1, global_batch_size=1), COUNT)
    assert len(asked) == 2 * COUNT
    quiet = 0
    for with_it, without in zip(asked[::2], asked[1::2], strict=True):
        assert (with_it.answerable, without.answerable) == (True, False)
        assert with_it.question_id == without.question_id
        assert with_it.wording == without.wording
        assert len(with_it.hits) == len(without.hits) == 3, "the fourth takes the place of the gold"
        assert [hit.rank for hit in without.hits] == [1, 2, 3]
        texts = [f"{hit.title} {hit.text}" for hit in without.hits]
        assert contains_answer(f"{with_it.hits[0].title} {with_it.hits[0].text}", with_it.answers)
        assert not any(contains_answer(text, without.answers) for text in texts)
        if without.hits[0].document_id == with_it.hits[0].document_id:
            quiet += 1
            assert without.hits[0].text == "It is of salt. Ferries come."
    assert 0 < quiet < COUNT, "both kinds of not knowing are there"
    assert asked == calibration_set(
        readings, config(top_k=3, steps=1, global_batch_size=1), COUNT
    ), "a run repeats"
    assert {each.wording for each in asked} & {"Island 1: its keeper?", "Island 2: its keeper?"}


def test_questions_that_were_trained_on_come_last(readings: ReadingSet) -> None:
    half = config(steps=3, global_batch_size=2)
    trained = {readings.rows[n]["question_id"] for n in readings.step_rows(half.seed, 0, 6)}
    assert not trained & {each.question_id for each in calibration_set(readings, half, COUNT - 6)}
    everything = {each.question_id for each in calibration_set(readings, half, COUNT + 5)}
    assert len(everything) == COUNT


def test_sentences_that_hold_an_answer_go() -> None:
    text = "Salt is made there. The keeper, Mara Voss, left. Dr. Voss stayed."
    assert silenced(text, ["mara voss"]) == "Salt is made there. Dr. Voss stayed."
    assert silenced(text, ["nobody"]) == text
    assert silenced("Mara Voss.", ["Mara Voss"]) == ""


class Reading:
    """Writes the keeper where a passage names one, else a refusal; the first word of the wording
    decides how sure.
    """

    max_context = 400
    sizes: list[int]

    def __init__(self) -> None:
        self.sizes = []

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def generate(self, prompts: list[str], **options: Any) -> list[Generation]:
        self.sizes.append(len(prompts))
        texts = [
            f"{prompt.split('salt. ')[1].split(' kept')[0]} [1]"
            if " kept the light. " in prompt
            else REFUSAL
            for prompt in prompts
        ]
        return [Generation(text, [-0.5, -0.1], 2, "eos") for text in texts]


def test_what_was_tried_says_whether_it_was_right_or_refused(readings: ReadingSet) -> None:
    made = config(top_k=3, steps=1, global_batch_size=1)
    asked = calibration_set(readings, made, COUNT)
    generator: Any = Reading()
    tried = try_answers(generator, asked, made)
    assert sum(generator.sizes) == len(tried) == len(asked)
    assert {(each.answerable, each.right, each.signs is None) for each in tried} == {
        (True, True, False),
        (False, False, True),
    }
    assert {each.question for each in tried} == {f"q{number}" for number in range(COUNT)}
    assert summary(tried) == {
        "answerable": {"right": COUNT, "wrong": 0, "refused": 0},
        "unanswerable": {"right": 0, "wrong": 0, "refused": COUNT},
    }
