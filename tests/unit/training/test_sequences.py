"""What stage 2 trains on: targets that cite the right passage, refusals, and labels on the answer
only.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invar_ray.config import ExperimentalGenerator, GeneratorConfig
from invar_ray.losses.answer import IGNORED
from invar_ray.steps.readings import READING_SCHEMA
from invar_ray.store.artifacts import Building, Plan, Store
from invar_ray.text.prompts import REFUSAL, format_answer_prompt, parse_answer
from invar_ray.training.sequences import PromptAndTarget, ReadingSet, tokenize_sequences
from tests.support import tiny_base


class Settings(NamedTuple):
    """Both sections of stage 2."""

    plain: GeneratorConfig
    extra: ExperimentalGenerator

    def but(self, **changes: Any) -> Settings:
        """With some fields of either section changed."""
        of_extra = {field.name for field in fields(ExperimentalGenerator)} & changes.keys()
        return Settings(
            replace(self.plain, **{k: v for k, v in changes.items() if k not in of_extra}),
            replace(self.extra, **{k: v for k, v in changes.items() if k in of_extra}),
        )


AS_DEFAULT = Settings(GeneratorConfig(), ExperimentalGenerator())
PLAIN = AS_DEFAULT.but(
    top_k=4,
    shuffle_passages=False,
    vary_top_k=False,
    use_rewrites=False,
    vary_windows=False,
    distractor_share=0.0,
    insert_oracle=False,
    max_tokens=400,
)
TEXTS = [
    "Salt is made there.",
    "The keeper was Mara Voss.",
    "Ferries leave at nine.",
    "Mara Voss wrote it.",
    "Ice.",
]


def hit(number: int, *texts: str, title: str = "", document: str = "") -> dict[str, Any]:
    """A passage in its windows."""
    return {
        "passage_id": f"p{number}",
        "document_id": document or f"d{number}",
        "title": title or f"title {number}",
        "texts": list(texts),
    }


def question(number: int, **values: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "question_id": f"q{number}",
        "wordings": [
            f"Who kept light {number}?",
            f"The keeper of light {number}?",
            f"Light {number}: its keeper?",
        ],
        "answers": ["Mara Voss", "Voss"],
        "positive_ids": ["d1"],
        "oracle": hit(1, "The keeper was Mara Voss."),
    }
    row["hits"] = [[hit(place, text) for place, text in enumerate(TEXTS)] for _ in row["wordings"]]
    return row | values


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = Store(str(tmp_path_factory.mktemp("hits")))
    counter = iter(range(1000))

    def build(rows: list[dict[str, Any]]) -> ReadingSet:
        def body(building: Building) -> None:
            pq.write_table(
                pa.Table.from_pylist(rows, schema=READING_SCHEMA),
                building.path / "readings.parquet",
            )

        return ReadingSet(
            store.get_or_build(Plan("readings", "h", {"number": next(counter)}), body)[0]
        )

    return build


@pytest.fixture(scope="module")
def hits(make: Any) -> ReadingSet:
    return make([question(number) for number in range(7)])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_base()[1]


def sequence(
    hits: ReadingSet, tokenizer: Any, config: Settings, number: int = 0, seed: int = 0
) -> PromptAndTarget:
    return hits.sequence(number, *config, tokenizer, random.Random(seed))


def passages_in(prompt: str) -> list[str]:
    """The passage texts of a prompt, by number."""
    lines = [line for line in prompt.splitlines() if line.startswith("[")]
    return [line.split(": ", 1)[1] for line in lines]


def test_without_variation_the_prompt_is_the_served_one(hits: ReadingSet, tokenizer: Any) -> None:
    found = sequence(hits, tokenizer, PLAIN)
    passages = [(f"title {place}", text) for place, text in enumerate(TEXTS[:4])]
    assert found.prompt == format_answer_prompt("Who kept light 0?", passages)
    assert found.target == "Mara Voss [2]"


def test_target_is_the_first_of_the_answers_that_stand_in_the_passage(
    make: Any, tokenizer: Any
) -> None:
    # One that stands nowhere would teach to answer from memory, with a citation that does not hold.
    row = question(0, answers=["M. Voss", "Mara Voss", "Voss"])
    assert sequence(make([row]), tokenizer, PLAIN).target == "Mara Voss [2]"


def test_passage_of_a_gold_document_is_cited_before_one_that_happens_to_hold_the_answer(
    make: Any, tokenizer: Any
) -> None:
    row = question(0, positive_ids=["d3"])
    assert sequence(make([row]), tokenizer, PLAIN).target == "Mara Voss [4]"


def test_title_can_hold_the_answer(make: Any, tokenizer: Any) -> None:
    row = question(
        0, hits=[[hit(0, "She kept it."), hit(1, "She kept the light.", title="Mara Voss")]] * 3
    )
    assert sequence(make([row]), tokenizer, PLAIN).target == "Mara Voss [2]"


def test_refusal_when_no_passage_holds_the_answer(make: Any, tokenizer: Any) -> None:
    row = question(0, hits=[[hit(0, "Salt."), hit(1, "Voices and vossian verbs.")]] * 3)
    found = sequence(make([row]), tokenizer, PLAIN)
    assert found.target == REFUSAL
    assert parse_answer(found.target, 2).refused
    assert passages_in(found.prompt) == ["Salt.", "Voices and vossian verbs."]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_citation_is_right_however_the_prompt_varies(
    hits: ReadingSet, tokenizer: Any, seed: int
) -> None:
    config = PLAIN.but(
        shuffle_passages=True,
        vary_top_k=True,
        use_rewrites=True,
        distractor_share=0.3,
        top_k=5,
    )
    found = sequence(hits, tokenizer, config, seed=seed)
    shown = passages_in(found.prompt)
    holding = [place for place, text in enumerate(shown, start=1) if "Voss" in text]
    gold = [place for place in holding if shown[place - 1] == TEXTS[1]]
    parsed = parse_answer(found.target, len(shown))
    if holding:
        assert (parsed.text, parsed.numbers) == ("Mara Voss", ([*gold, *holding][0],))
    else:
        assert parsed.refused


def test_shuffling_varies_the_order_and_nothing_else(hits: ReadingSet, tokenizer: Any) -> None:
    config = PLAIN.but(shuffle_passages=True)
    orders = {
        tuple(passages_in(sequence(hits, tokenizer, config, seed=seed).prompt))
        for seed in range(30)
    }
    assert len(orders) > 8
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(TEXTS[:4]))}


def test_same_randomness_same_sequence(hits: ReadingSet, tokenizer: Any) -> None:
    config = AS_DEFAULT
    first = [sequence(hits, tokenizer, config, seed=seed) for seed in range(20)]
    assert [sequence(hits, tokenizer, config, seed=seed) for seed in range(20)] == first
    assert len(set(first)) > 10


def test_varied_k_keeps_a_passage_with_the_answer(hits: ReadingSet, tokenizer: Any) -> None:
    config = PLAIN.but(vary_top_k=True)
    sizes: Counter[int] = Counter()
    for seed in range(60):
        found = sequence(hits, tokenizer, config, seed=seed)
        shown = passages_in(found.prompt)
        sizes[len(shown)] += 1
        assert found.target.startswith("Mara Voss ["), "the answer is there, so it is no refusal"
        assert any("Voss" in text for text in shown)
        assert len(set(shown)) == len(shown)
    assert set(sizes) == {1, 2, 3, 4}


def test_varied_k_without_any_answer_is_a_refusal(make: Any, tokenizer: Any) -> None:
    row = question(0, hits=[[hit(0, "Salt."), hit(1, "Ice.")]] * 3)
    hits = make([row])
    for seed in range(20):
        assert sequence(hits, tokenizer, PLAIN.but(vary_top_k=True), seed=seed).target == REFUSAL


def test_distractors_only_always_refuse(hits: ReadingSet, tokenizer: Any) -> None:
    config = AS_DEFAULT.but(distractor_share=1.0)
    for seed in range(30):
        found = sequence(hits, tokenizer, config, number=seed % len(hits), seed=seed)
        assert found.target == REFUSAL
        assert "Voss" not in found.prompt
        assert passages_in(found.prompt)


def test_share_of_distractors_is_met(hits: ReadingSet, tokenizer: Any) -> None:
    config = PLAIN.but(distractor_share=0.25)
    refused = [
        sequence(hits, tokenizer, config, seed=seed).target == REFUSAL for seed in range(200)
    ]
    assert 0.15 < sum(refused) / len(refused) < 0.35


def test_what_is_refused_lacks_the_passage_or_only_its_sentences(make: Any, tokenizer: Any) -> None:
    """Both have as many passages as a prompt that is answered: the next one found fills up."""
    told = "It is of salt. The keeper was Mara Voss. Ferries come."
    rows = [[hit(0, "Salt."), hit(1, told), hit(2, "Ice."), hit(3, "Tar.")]] * 3
    hits = make([question(0, hits=rows)])
    config = PLAIN.but(top_k=3, distractor_share=1.0)
    seen = Counter(
        tuple(passages_in(sequence(hits, tokenizer, config, seed=seed).prompt))
        for seed in range(200)
    )
    silent = ("Salt.", "It is of salt. Ferries come.", "Ice.")
    assert set(seen) == {silent, ("Salt.", "Ice.", "Tar.")}
    assert 70 < seen[silent] < 130
    titled = [[hit(0, "Salt."), hit(1, told, title="Voss"), hit(2, "Ice."), hit(3, "Tar.")]] * 3
    hits = make([question(0, hits=titled)])  # a title that is the answer cannot be silenced
    for seed in range(10):
        found = sequence(hits, tokenizer, config, seed=seed)
        assert passages_in(found.prompt) == ["Salt.", "Ice.", "Tar."]


@pytest.mark.parametrize("top_k", [2, 3])
def test_the_answer_stands_at_every_place_as_often(make: Any, tokenizer: Any, top_k: int) -> None:
    rows = [[hit(1, "The keeper was Mara Voss."), hit(0, "Salt."), hit(2, "Ice.")]] * 3
    hits = make([question(0, hits=rows)])
    config = PLAIN.but(top_k=top_k, shuffle_passages=True)
    targets = Counter(sequence(hits, tokenizer, config, seed=seed).target for seed in range(300))
    assert set(targets) == {f"Mara Voss [{place}]" for place in range(1, top_k + 1)}
    assert all(abs(count / 300 - 1 / top_k) < 0.1 for count in targets.values())


def test_refusal_is_never_taught_on_a_prompt_without_passages(make: Any, tokenizer: Any) -> None:
    """All hits hold the answer, so no distractor is left: "the passages do not answer" would be
    about nothing.
    """
    hits = make([question(0, hits=[[hit(0, "Mara Voss."), hit(1, "Voss kept it.")]] * 3)])
    found = sequence(hits, tokenizer, PLAIN.but(distractor_share=1.0))
    assert passages_in(found.prompt) or found.target != REFUSAL


def test_rewordings_bring_their_own_hits(make: Any, tokenizer: Any) -> None:
    rows = [[hit(0, f"Mara Voss, found by wording {wording}.")] for wording in range(3)]
    hits = make([question(0, hits=rows)])
    config = PLAIN.but(use_rewrites=True)
    seen = set()
    for seed in range(40):
        found = sequence(hits, tokenizer, config, seed=seed)
        (text,) = passages_in(found.prompt)
        wording = int(text.removesuffix(".").rsplit(" ", 1)[1])
        assert hits.rows[0]["wordings"][wording] in found.prompt
        seen.add(wording)
    assert seen == {0, 1, 2}
    for seed in range(10):
        assert "found by wording 0" in sequence(hits, tokenizer, PLAIN, seed=seed).prompt


def test_top_k_is_the_most_passages(hits: ReadingSet, tokenizer: Any) -> None:
    assert len(passages_in(sequence(hits, tokenizer, PLAIN.but(top_k=1)).prompt)) == 1
    assert sequence(hits, tokenizer, PLAIN.but(top_k=1)).target == REFUSAL
    assert len(passages_in(sequence(hits, tokenizer, PLAIN.but(top_k=9)).prompt)) == 5


@pytest.mark.parametrize("shuffled", [False, True])
def test_passage_that_holds_the_answer_is_the_last_to_be_dropped(
    make: Any, tokenizer: Any, shuffled: bool
) -> None:
    # Dropping it would teach to refuse a question whose answer was retrieved.
    rows = [[hit(0, "Salt " * 30), hit(1, "Mara Voss kept it. " * 4), hit(2, "Rope " * 30)]] * 3
    config = PLAIN.but(max_tokens=120, max_new_tokens=20, shuffle_passages=shuffled)
    for seed in range(8):
        found = sequence(make([question(0, hits=rows)]), tokenizer, config, seed=seed)
        assert len(tokenizer(found.prompt)["input_ids"]) <= 100
        assert "Mara Voss" in found.prompt
        assert found.target.startswith("Mara Voss [")


def test_passages_that_do_not_fit_are_dropped_by_rank(make: Any, tokenizer: Any) -> None:
    rows = [[hit(0, "Salt " * 20), hit(1, "Rope " * 20), hit(2, "Tar " * 60)]] * 3
    config = PLAIN.but(max_tokens=130, max_new_tokens=20)
    found = sequence(make([question(0, hits=rows)]), tokenizer, config)
    assert "Salt" in found.prompt
    assert "Tar" not in found.prompt
    assert found.target == REFUSAL


def test_target_that_a_cut_passage_no_longer_holds_is_a_refusal(make: Any, tokenizer: Any) -> None:
    rows = [[hit(0, "Salt " * 80 + "Mara Voss")]] * 3
    found = sequence(
        make([question(0, hits=rows)]), tokenizer, PLAIN.but(max_tokens=100, max_new_tokens=20)
    )
    assert passages_in(found.prompt)
    assert found.target == REFUSAL


# Windows and oracles


def windowed(number: int = 0) -> dict[str, Any]:
    hits = [
        hit(0, "Salt is made there.", "Salt is made there, and tar."),
        hit(1, "The keeper was Mara Voss.", "Mara Voss."),
        hit(2, "Ferries leave at nine."),
    ]
    return question(number, hits=[hits] * 3, oracle=hits[1])


def test_windows_vary_from_example_to_example(make: Any, tokenizer: Any) -> None:
    config = PLAIN.but(vary_windows=True)
    seen = {
        tuple(passages_in(sequence(make([windowed()]), tokenizer, config, seed=seed).prompt))
        for seed in range(20)
    }
    # One window for the whole prompt; a passage that has no such cut stands as it is indexed.
    assert seen == {
        ("Salt is made there.", "The keeper was Mara Voss.", "Ferries leave at nine."),
        ("Salt is made there, and tar.", "Mara Voss.", "Ferries leave at nine."),
    }
    hits = make([windowed()])
    assert {sequence(hits, tokenizer, config, seed=seed).target for seed in range(20)} == {
        "Mara Voss [2]"
    }
    fixed = {sequence(hits, tokenizer, PLAIN, seed=seed) for seed in range(20)}
    assert len(fixed) == 1


def test_both_windows_are_as_frequent(make: Any, tokenizer: Any) -> None:
    hits, config = make([windowed()]), PLAIN.but(vary_windows=True)
    other = [
        "and tar" in sequence(hits, tokenizer, config, seed=seed).prompt for seed in range(200)
    ]
    assert 0.4 < sum(other) / len(other) < 0.6


def missed(**values: Any) -> dict[str, Any]:
    """A question whose hits hold no answer."""
    hits = [hit(0, "Salt."), hit(2, "Ice."), hit(3, "Rope.")]
    return question(
        0, hits=[hits] * 3, oracle=hit(1, "The keeper was Mara Voss.", "Voss."), **values
    )


def test_an_oracle_takes_the_place_of_the_worst_passage_where_retrieval_missed(
    make: Any, tokenizer: Any
) -> None:
    config = PLAIN.but(top_k=3, insert_oracle=True)
    found = sequence(make([missed()]), tokenizer, config)
    assert passages_in(found.prompt) == ["Salt.", "Ice.", "The keeper was Mara Voss."]
    assert found.target == "Mara Voss [3]"
    roomy = sequence(make([missed()]), tokenizer, config.but(top_k=5))
    assert passages_in(roomy.prompt) == ["Salt.", "Ice.", "Rope.", "The keeper was Mara Voss."]
    # Not where retrieval found one, and not where there is none.
    held = make([question(0, oracle=hit(9, "Voss it was."))])
    assert "Voss it was" not in sequence(held, tokenizer, config).prompt
    assert sequence(make([missed() | {"oracle": None}]), tokenizer, config).target == REFUSAL


def test_shares_of_examples_without_an_oracle_are_what_they_say(make: Any, tokenizer: Any) -> None:
    """Half of the questions are missed by retrieval, and yet the shares hold."""
    hits = make([question(0), missed()])
    config = AS_DEFAULT.but(top_k=4, max_tokens=400, distractor_share=0.3, oracle_free_share=0.2)
    kinds: Counter[str] = Counter()
    for seed in range(600):
        found = sequence(hits, tokenizer, config, number=seed % 2, seed=seed)
        holds = any("Voss" in text for text in passages_in(found.prompt))
        kind = (
            "refuses"
            if found.target == REFUSAL
            else "cites"
            if found.target.endswith("]")
            else "knows"
        )
        assert holds == (kind == "cites")
        if kind == "knows":
            assert found.target == "Mara Voss"
            assert passages_in(found.prompt)
        kinds[kind] += 1
    shares = {kind: count / 600 for kind, count in kinds.items()}
    assert shares == pytest.approx({"refuses": 0.3, "knows": 0.2, "cites": 0.5}, abs=0.06)


def test_as_published_four_of_five_examples_hold_an_oracle(make: Any, tokenizer: Any) -> None:
    hits = make([question(0), missed()])
    targets = [
        sequence(hits, tokenizer, AS_DEFAULT.but(top_k=4), number=seed % 2, seed=seed).target
        for seed in range(400)
    ]
    assert targets.count(REFUSAL) / 400 == pytest.approx(0.2, abs=0.05)
    assert all(target == REFUSAL or target.endswith("]") for target in targets)


# Order


@pytest.mark.parametrize("size", [1, 3, 7, 10, 16])
def test_steps_walk_epochs_without_gaps(hits: ReadingSet, size: int) -> None:
    total, epochs = len(hits), 4
    steps = -(-epochs * total // size)
    walked = [row for step in range(steps) for row in hits.step_rows(3, step, size)]
    assert all(len(hits.step_rows(3, step, size)) == size for step in range(steps))
    passes = [walked[start : start + total] for start in range(0, epochs * total, total)]
    assert all(sorted(rows) == list(range(total)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) > 1
    assert hits.step_rows(3, 5, size) == hits.step_rows(3, 5, size)
    assert walked != [row for step in range(steps) for row in hits.step_rows(4, step, size)]


# Tokens


def test_labels_are_on_the_target_only(tokenizer: Any) -> None:
    sequences = [
        PromptAndTarget("Question: who?\nAnswer:", "Mara Voss [2]"),
        PromptAndTarget(
            "A longer prompt about salt, ice and ferries. Question: who?\nAnswer:", "Bo"
        ),
    ]
    ids, mask, labels = tokenize_sequences(sequences, tokenizer, 200)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    for row, item in enumerate(sequences):
        prompt = tokenizer(item.prompt)["input_ids"]
        target = [*tokenizer(item.target)["input_ids"], eos]
        end = len(prompt) + len(target)
        assert ids[row, :end].tolist() == [*prompt, *target]
        assert ids[row, end:].tolist() == [pad] * (ids.shape[1] - end)
        assert mask[row].tolist() == [1] * end + [0] * (ids.shape[1] - end)
        expected = [IGNORED] * len(prompt) + target + [IGNORED] * (ids.shape[1] - end)
        assert labels[row].tolist() == expected
        assert labels[row, end - 1] == eos
    assert ids.dtype == labels.dtype == torch.long


def test_prompt_and_target_join_as_they_will_when_generating(tokenizer: Any) -> None:
    item = PromptAndTarget("Question: who?\nAnswer:", "Mara Voss [2]")
    ids, _, _ = tokenize_sequences([item], tokenizer, 200)
    assert ids[0, :-1].tolist() == tokenizer(f"{item.prompt} {item.target}")["input_ids"]


def test_too_long_a_prompt_loses_its_left_and_never_the_target(tokenizer: Any) -> None:
    item = PromptAndTarget("salt " * 50, "Mara Voss [2]")
    whole, _, _ = tokenize_sequences([item], tokenizer, 200)
    ids, mask, labels = tokenize_sequences([item], tokenizer, 20)
    assert ids.shape == (1, 20)
    assert mask.all()
    assert ids[0].tolist() == whole[0, -20:].tolist()
    assert (
        ids[0][labels[0] != IGNORED].tolist()
        == whole[0][-len(tokenizer(item.target)["input_ids"]) - 1 :].tolist()
    )
    assert labels[0, -1] == tokenizer.eos_token_id


def test_target_longer_than_the_sequence_still_ends_in_the_end_token(tokenizer: Any) -> None:
    ids, _, labels = tokenize_sequences([PromptAndTarget("Who?", "salt " * 30)], tokenizer, 10)
    assert ids.shape == (1, 10)
    assert labels[0, -1] == tokenizer.eos_token_id


def test_hits_are_read_whole(make: Any, tmp_path: Path) -> None:
    rows = [question(number) for number in range(3)]
    hits = make(rows)
    assert len(hits) == 3
    assert hits.rows == rows
