"""The batches of stage 1: functions of (seed, step), the same on every rank, without hidden
copies.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from invar_ray.store.artifacts import Building, Plan, Store
from invar_ray.text.answers import contains_answer
from invar_ray.training.batches import StepPlan, Trainset


class Data:
    """Questions and slots of our choice, written as ``trainset`` artifacts."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(str(folder))
        self.number = 0

    def __call__(self, questions: list[dict[str, Any]], slots: list[dict[str, Any]]) -> Trainset:
        """``questions``: positive, negatives, and maybe wordings, answers, texts; ``slots``: texts
        and maybe more.
        """
        self.number += 1
        width = 4
        random = np.random.default_rng(self.number)

        def unit(rows: int) -> Any:
            matrix = random.normal(size=(rows, width)).astype(np.float32)
            return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)

        self.vectors = {
            "questions": unit(len(questions)),
            "slots": unit(len(slots)),
            "documents": unit(len(slots)),
        }
        rows = [
            {
                "question_id": f"q{number}",
                "wordings": row.get("wordings", [f"question {number}"]),
                "answers": row.get("answers", [f"answer{number}"]),
                "positive": row["positive"],
                "positive_texts": row.get("texts", slots[row["positive"]]["texts"]),
                "negatives": row.get("negatives", []),
            }
            for number, row in enumerate(questions)
        ]
        table = [
            {
                "passage_id": f"p{number}",
                "document_id": slot.get("document", f"d{number}"),
                "title": slot.get("title", f"title {number}"),
                "start": slot.get("start", 0),
                "end": slot.get("end", 10),
                "texts": slot["texts"],
            }
            for number, slot in enumerate(slots)
        ]
        kinds = pa.schema([("negatives", pa.list_(pa.int64()))])

        def body(building: Building) -> None:
            question_table = pa.Table.from_pylist(rows)
            place = question_table.schema.get_field_index("negatives")
            negatives = question_table.column("negatives").cast(kinds.field("negatives").type)
            pq.write_table(
                question_table.set_column(place, "negatives", negatives),
                building.path / "questions.parquet",
            )
            pq.write_table(pa.Table.from_pylist(table), building.path / "slots.parquet")
            save_file(self.vectors, str(building.path / "teacher.safetensors"))

        return Trainset(
            self.store.get_or_build(Plan("trainset", "t", {"number": self.number}), body)[0]
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("batches"))


def paragraphs(data: Data, count: int, per_paragraph: int) -> Trainset:
    """As in reading data sets: several questions share a paragraph, negatives are paragraphs
    too.
    """
    slots = [{"texts": [f"paragraph {number}", f"cut {number}"]} for number in range(count)]
    questions = [
        {
            "positive": number // per_paragraph,
            "negatives": [(number + 3) % count, (number + 5) % count],
        }
        for number in range(count * per_paragraph)
    ]
    return data(questions, slots)


@pytest.fixture(scope="module")
def squad(data: Data) -> Trainset:
    return paragraphs(data, 40, 3)


def test_plan_is_a_function_of_seed_and_step_only(squad: Trainset, data: Data) -> None:
    fresh = paragraphs(data, 40, 3)
    for step in (17, 3, 0, 40, 3):
        plan = squad.plan(5, step, 8, 2, 2)
        assert fresh.plan(5, step, 8, 2, 2) == plan
    assert squad.plan(5, 0, 8, 2, 1).rows != squad.plan(5, 1, 8, 2, 1).rows
    assert squad.plan(5, 0, 8, 2, 1).rows != squad.plan(6, 0, 8, 2, 1).rows


def test_every_number_of_ranks_gives_the_same_global_batch(squad: Trainset) -> None:
    alone = squad.plan(1, 4, 7, 2, 1)
    assert alone.weights == [1.0] * 7
    assert all(alone.present)
    for world_size in (2, 3, 4, 5, 8):
        plan = squad.plan(1, 4, 7, 2, world_size)
        assert len(plan.rows) % world_size == 0
        assert len(plan.slots) % world_size == 0
        assert len(plan.rows) - 7 < world_size
        assert len(plan.slots) - len(alone.slots) < world_size
        assert plan.rows[:7] == alone.rows
        assert plan.positive[:7] == alone.positive
        assert plan.weights == [1.0] * 7 + [0.0] * (len(plan.rows) - 7)
        kept = len(alone.slots)
        assert plan.slots[:kept] == alone.slots
        assert plan.owner[:kept] == alone.owner
        assert plan.present == [True] * kept + [False] * (len(plan.slots) - kept)
        lengths = {len(plan.slots), len(plan.present), len(plan.owner)}
        assert lengths == {len(plan.slots)}
        assert len(plan.rows) == len(plan.weights) == len(plan.positive)


def check(trainset: Trainset, plan: StepPlan, size: int) -> None:
    """What holds for every plan."""
    rows = [row for row, weight in zip(plan.rows, plan.weights, strict=True) if weight]
    assert len(rows) == size
    assert len(set(rows)) == size
    texts = [trainset.slot_texts[trainset.positives[row]][0] for row in rows]
    assert len(set(texts)) == size, "two questions of a batch with the same positive text"
    real = [slot for slot, present in zip(plan.slots, plan.present, strict=True) if present]
    assert len(set(real)) == len(real)
    for number, row in enumerate(plan.rows):
        assert plan.slots[plan.positive[number]] == trainset.positives[row]
        assert plan.present[plan.positive[number]]
    for column, owner in enumerate(plan.owner):
        if owner >= 0:
            assert plan.positive[owner] == column
    assert plan.owner[: len(set(rows))] == list(range(size)), (
        "positives come first, in the order of their rows"
    )


@pytest.mark.parametrize("world_size", [1, 3])
def test_no_batch_holds_a_positive_text_twice(squad: Trainset, world_size: int) -> None:
    for step in range(40):
        check(squad, squad.plan(2, step, 8, 2, world_size), 8)


def test_equal_texts_under_two_ids_are_kept_apart(data: Data) -> None:
    slots = [{"texts": [f"text {number // 2}"]} for number in range(16)]  # each text twice
    trainset = data([{"positive": number} for number in range(16)], slots)
    for step in range(8):
        check(trainset, trainset.plan(0, step, 4, 0, 1), 4)


@pytest.mark.parametrize(
    "count, per_paragraph, size", [(40, 3, 8), (30, 5, 16), (64, 1, 24), (200, 2, 32)]
)
def test_epoch_has_each_question_at_most_once_and_nearly_all(
    data: Data, count: int, per_paragraph: int, size: int
) -> None:
    trainset = paragraphs(data, count, per_paragraph)
    total = len(trainset)
    batches = trainset._epoch_batches(0, 0, size)
    for epoch in range(3):
        rows = [row for batch in trainset._epoch_batches(0, epoch, size) for row in batch]
        assert max(Counter(rows).values()) == 1
        assert len(rows) >= total - 3 * size
        assert len(rows) >= 0.6 * total
    steps = len(batches)
    walked = [trainset.plan(0, step, size, 0, 1).rows for step in range(steps)]
    assert walked == batches, "steps walk the epoch's batches without a gap"
    assert trainset.plan(0, steps, size, 0, 1).rows == trainset._epoch_batches(0, 1, size)[0]
    assert trainset._epoch_batches(0, 1, size) != batches


def test_over_many_epochs_every_question_is_seen(squad: Trainset) -> None:
    steps = 5 * len(squad._epoch_batches(0, 0, 8))
    assert {row for step in range(steps) for row in squad.plan(0, step, 8, 0, 1).rows} == set(
        range(len(squad))
    )


def test_batch_larger_than_the_questions_is_as_large_as_they_allow(data: Data) -> None:
    trainset = paragraphs(data, 5, 2)
    check(trainset, trainset.plan(0, 0, 64, 2, 1), 5)
    one = data([{"positive": 0}, {"positive": 0}], [{"texts": ["only"]}])
    check(one, one.plan(0, 3, 8, 2, 1), 1)
    plan = one.plan(0, 3, 8, 2, 4)
    assert plan.weights == [1.0, 0.0, 0.0, 0.0]
    assert plan.present == [True, False, False, False]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_plans_of_any_data(data: Data, draw: st.DataObject) -> None:
    count = draw.draw(st.integers(1, 12), "slots")
    texts = draw.draw(
        st.lists(st.sampled_from("abcdefgh"), min_size=count, max_size=count), "texts"
    )
    slot = st.integers(0, count - 1)
    rows = draw.draw(
        st.lists(
            st.fixed_dictionaries(
                {"positive": slot, "negatives": st.lists(slot, max_size=4, unique=True)}
            ),
            min_size=1,
            max_size=20,
        ),
        "questions",
    )
    trainset = data(rows, [{"texts": [text]} for text in texts])
    size, world_size = draw.draw(st.integers(1, 8)), draw.draw(st.integers(1, 4))
    for step in range(4):
        plan = trainset.plan(0, step, size, 2, world_size)
        check(trainset, plan, sum(weight > 0 for weight in plan.weights))
        assert len(plan.rows) % world_size == len(plan.slots) % world_size == 0


# Slots


@pytest.fixture(scope="module")
def trio(data: Data) -> Trainset:
    """Two questions and a negative; the second question's positive is the first one's negative."""
    slots = [
        {
            "texts": ["red rose", "a red rose"],
            "document": "x",
            "start": 0,
            "end": 8,
            "title": "Rose",
        },
        {"texts": ["blue sea"], "document": "y", "start": 5, "end": 13},
        {"texts": ["grey rock", "the grey rock", "rock"], "document": "x", "start": 8, "end": 17},
        {"texts": ["red rose"], "document": "z", "start": 3, "end": 11},
    ]
    questions = [
        {
            "positive": 0,
            "negatives": [1, 2, 3],
            "wordings": ["what is red", "what has thorns", "name the flower"],
            "answers": ["rose"],
            "texts": ["red rose", "own cut with rose"],
        },
        {
            "positive": 1,
            "negatives": [2],
            "answers": ["the SEA!", "ocean"],
            "wordings": ["what is blue"],
        },
    ]
    return data(questions, slots)


def plan_of(trio: Trainset, world_size: int = 1, negatives: int = 5) -> StepPlan:
    """The first epoch has one batch of both questions; put question 0 first, whatever the shuffle
    gave.
    """
    for seed in range(20):
        plan = trio.plan(seed, 0, 2, negatives, world_size)
        if plan.rows[:2] == [0, 1]:
            return plan
    raise AssertionError("no seed puts question 0 first")


def test_slots_are_positives_then_negatives_each_once(trio: Trainset) -> None:
    plan = plan_of(trio)
    assert plan.slots == [0, 1, 2, 3]
    assert plan.owner == [0, 1, -1, -1]
    assert plan.positive == [0, 1]
    # question 0: slot 1, a positive already; question 1: slot 2
    assert plan_of(trio, negatives=1).slots == [
        0,
        1,
        2,
    ]
    assert plan_of(trio, negatives=0).slots == [0, 1]


def test_rendering_falls_back_to_the_anchor_and_says_so(trio: Trainset) -> None:
    plan = plan_of(trio)
    assert trio.num_windows == 3
    assert trio.render(plan, 0, 0) == ("Rose", "red rose", False)
    # A positive is rendered in its question's own cuts, which keep the answer.
    assert trio.render(plan, 0, 1) == ("Rose", "own cut with rose", False)
    assert trio.render(plan, 0, 2) == ("Rose", "red rose", True)
    assert trio.render(plan, 1, 1) == ("title 1", "blue sea", True)
    assert trio.render(plan, 2, 2) == ("title 2", "rock", False)
    missing = [trio.render(plan, column, window)[2] for column in range(4) for window in range(3)]
    assert sum(missing) == 1 + 2 + 0 + 2


def test_padding_slots_are_absent(trio: Trainset) -> None:
    plan = plan_of(trio, world_size=3)
    metadata = trio.slot_metadata(plan)
    assert plan.rows == [0, 1, 0]
    assert metadata.present is not None
    assert metadata.present.tolist() == [True] * 4 + [False] * 2


def test_slot_metadata_by_hand(trio: Trainset) -> None:
    metadata = trio.slot_metadata(plan_of(trio))
    assert metadata.document[0] == metadata.document[2]
    assert len(set(metadata.document.tolist())) == 3
    assert metadata.start.tolist() == [0, 5, 8, 3]
    assert metadata.end.tolist() == [8, 13, 17, 11]
    assert metadata.content is not None
    assert metadata.content[0] == metadata.content[3]
    assert len(set(metadata.content.tolist())) == 3


def test_teacher_scores_by_hand(data: Data) -> None:
    trainset = data([{"positive": 0}, {"positive": 1}], [{"texts": ["a"]}, {"texts": ["b"]}])
    plan = trainset.plan(0, 0, 2, 0, 1)
    queries = data.vectors["questions"][plan.rows]
    passages, whole = data.vectors["slots"][plan.slots], data.vectors["documents"][plan.slots]
    expected = 0.7 * queries @ passages.T + 0.3 * queries @ whole.T
    assert np.allclose(trainset.teacher_scores(plan, 0.3).numpy(), expected, atol=1e-6)


def test_environment_mask_by_hand(trio: Trainset) -> None:
    assert trio.num_wordings == 3
    # Environments are (wording, window), windows fastest: 3 x 3.
    assert trio.environment_mask(plan_of(trio)).tolist() == [[True] * 9, [True] * 3 + [False] * 6]


def test_answers_are_found_by_hand(trio: Trainset) -> None:
    # "rose" stands in slots 0 and 3, "sea" in 1; "ocean" nowhere.
    assert trio.holds_answer(plan_of(trio)).tolist() == [
        [True, False, False, True],
        [False, True, False, False],
    ]


@pytest.mark.parametrize(
    "text, answer",
    [
        ("a party in the park", "art"),
        ("the art of war", "art"),
        ("They met in PARIS, in spring.", "paris"),
        ("The capital (Paris) lies there", "Paris"),
        ("\u201cParis\u201d, he said", "Paris"),
        ("in 1914\u20131918 there", "1914\u20131918"),
        ("the king\u2019s men", "king's men"),
        ("Paris\u2014the city of light", "Paris"),
        ("nothing at all", "?"),
        ("nothing at all", "the"),
        ("", "Paris"),
        ("1,000 men", "1000 men"),
        ("The Who played", "The Who"),
        (
            "\u4ed6\u51fa\u751f\u4e8e\u5317\u4eac\u5e02\u3002",
            "\u5317\u4eac",
        ),  # born in Peking, no spaces
        ("\uff2b\uff52\uff41\uff4b\uff4f\uff57 lies there", "Krak\u00f3w"),  # full width, no accent
        (
            "\u0e40\u0e01\u0e34\u0e14\u0e17\u0e35\u0e48\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e",
            "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e",
        ),
    ],
)
def test_answers_are_found_as_containment_finds_them(data: Data, text: str, answer: str) -> None:
    """Mining and answer recall ask ``contains_answer``; the mask must agree with them."""
    trainset = data([{"positive": 0, "answers": [answer]}], [{"texts": [text]}])
    found = trainset.holds_answer(trainset.plan(0, 0, 1, 0, 1))
    assert bool(found[0, 0]) == contains_answer(text, [answer])


def test_answer_counts_in_any_window_but_not_across_two(data: Data) -> None:
    slots = [{"texts": ["alpha new", "york beta"]}, {"texts": ["alpha", "in new york"]}]
    trainset = data([{"positive": 0, "answers": ["New York"], "negatives": [1]}], slots)
    plan = trainset.plan(0, 0, 1, 1, 1)
    assert trainset.holds_answer(plan).tolist() == [[False, True]]


def test_answer_in_the_title_counts(data: Data) -> None:
    """The encoder sees the title, and mining drops such passages."""
    slots: list[dict[str, Any]] = [
        {"texts": ["alpha"]},
        {"texts": ["The city of light."], "title": "Paris"},
    ]
    trainset = data([{"positive": 0, "answers": ["Paris"], "negatives": [1]}], slots)
    assert trainset.holds_answer(trainset.plan(0, 0, 1, 1, 1)).tolist() == [[False, True]]


def test_length_and_shapes(squad: Trainset) -> None:
    plan = squad.plan(0, 0, 8, 2, 4)
    assert len(squad) == 120
    assert squad.holds_answer(plan).shape == (8, len(plan.slots))
    assert squad.teacher_scores(plan, 0.3).shape == (8, len(plan.slots))
    assert squad.environment_mask(plan).shape == (8, 2)
    assert squad.holds_answer(plan).dtype == torch.bool
