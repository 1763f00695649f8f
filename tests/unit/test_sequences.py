"""What stage 2 trains on: targets that cite the right passage, refusals, and labels on the answer only."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from invar_ray.artifacts import Building, Plan, Store
from invar_ray.config import GeneratorConfig
from invar_ray.losses.answer import IGNORED
from invar_ray.text.prompts import REFUSAL, format_answer_prompt, parse_answer
from invar_ray.training.sequences import HitSet, PromptAndTarget, tokenize_sequences
from tests.support import tiny_base

PLAIN = GeneratorConfig(
    top_k=4, shuffle_passages=False, vary_top_k=False, use_rewrites=False, distractor_share=0.0, max_tokens=400
)
TEXTS = ["Salt is made there.", "The keeper was Mara Voss.", "Ferries leave at nine.", "Mara Voss wrote it.", "Ice."]


def hit(number: int, text: str, title: str = "") -> dict[str, Any]:
    return {"passage_id": f"p{number}", "title": title or f"title {number}", "text": text}


def question(number: int, **values: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "question_id": f"q{number}",
        "wordings": [f"Who kept light {number}?", f"The keeper of light {number}?", f"Light {number}: its keeper?"],
        "answers": ["Mara Voss", "Voss"],
        "positive_ids": ["d1"],
    }
    row["hits"] = [[hit(place, text) for place, text in enumerate(TEXTS)] for _ in row["wordings"]]
    return row | values


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = Store(str(tmp_path_factory.mktemp("hits")))
    counter = iter(range(1000))

    def build(rows: list[dict[str, Any]]) -> HitSet:
        def body(building: Building) -> None:
            pq.write_table(pa.Table.from_pylist(rows), building.path / "hits.parquet")

        return HitSet(store.get_or_build(Plan("hits", "h", {"number": next(counter)}), body)[0])

    return build


@pytest.fixture(scope="module")
def hits(make: Any) -> HitSet:
    return make([question(number) for number in range(7)])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_base()[1]


def sequence(hits: HitSet, tokenizer: Any, config: GeneratorConfig, number: int = 0, seed: int = 0) -> PromptAndTarget:
    return hits.sequence(number, config, tokenizer, random.Random(seed))


def passages_in(prompt: str) -> list[str]:
    """The passage texts of a prompt, by number."""
    lines = [line for line in prompt.splitlines() if line.startswith("[")]
    return [line.split(": ", 1)[1] for line in lines]


def test_without_variation_the_prompt_is_the_served_one(hits: HitSet, tokenizer: Any) -> None:
    found = sequence(hits, tokenizer, PLAIN)
    passages = [(f"title {place}", text) for place, text in enumerate(TEXTS[:4])]
    assert found.prompt == format_answer_prompt("Who kept light 0?", passages)
    assert found.target == "Mara Voss [2]"


def test_target_is_the_first_answer_even_where_another_one_stands(make: Any, tokenizer: Any) -> None:
    row = question(0, answers=["M. Voss", "Mara Voss"])
    assert sequence(make([row]), tokenizer, PLAIN).target == "M. Voss [2]"


def test_title_can_hold_the_answer(make: Any, tokenizer: Any) -> None:
    row = question(0, hits=[[hit(0, "She kept it."), hit(1, "She kept the light.", title="Mara Voss")]] * 3)
    assert sequence(make([row]), tokenizer, PLAIN).target == "Mara Voss [2]"


def test_refusal_when_no_passage_holds_the_answer(make: Any, tokenizer: Any) -> None:
    row = question(0, hits=[[hit(0, "Salt."), hit(1, "Voices and vossian verbs.")]] * 3)
    found = sequence(make([row]), tokenizer, PLAIN)
    assert found.target == REFUSAL
    assert parse_answer(found.target, 2).refused
    assert passages_in(found.prompt) == ["Salt.", "Voices and vossian verbs."]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_citation_is_right_however_the_prompt_varies(hits: HitSet, tokenizer: Any, seed: int) -> None:
    config = replace(PLAIN, shuffle_passages=True, vary_top_k=True, use_rewrites=True, distractor_share=0.3, top_k=5)
    found = sequence(hits, tokenizer, config, seed=seed)
    shown = passages_in(found.prompt)
    holding = [place for place, text in enumerate(shown, start=1) if "Voss" in text]
    parsed = parse_answer(found.target, len(shown))
    if holding:
        assert (parsed.text, parsed.numbers) == ("Mara Voss", (holding[0],))
    else:
        assert parsed.refused


def test_shuffling_varies_the_order_and_nothing_else(hits: HitSet, tokenizer: Any) -> None:
    config = replace(PLAIN, shuffle_passages=True)
    orders = {tuple(passages_in(sequence(hits, tokenizer, config, seed=seed).prompt)) for seed in range(30)}
    assert len(orders) > 8
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(TEXTS[:4]))}


def test_same_randomness_same_sequence(hits: HitSet, tokenizer: Any) -> None:
    config = GeneratorConfig()
    first = [sequence(hits, tokenizer, config, seed=seed) for seed in range(20)]
    assert [sequence(hits, tokenizer, config, seed=seed) for seed in range(20)] == first
    assert len(set(first)) > 10


def test_varied_k_keeps_a_passage_with_the_answer(hits: HitSet, tokenizer: Any) -> None:
    config = replace(PLAIN, vary_top_k=True)
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
        assert sequence(hits, tokenizer, replace(PLAIN, vary_top_k=True), seed=seed).target == REFUSAL


def test_distractors_only_always_refuse(hits: HitSet, tokenizer: Any) -> None:
    config = replace(GeneratorConfig(), distractor_share=1.0)
    for seed in range(30):
        found = sequence(hits, tokenizer, config, number=seed % len(hits), seed=seed)
        assert found.target == REFUSAL
        assert "Voss" not in found.prompt
        assert passages_in(found.prompt)


def test_share_of_distractors_is_met(hits: HitSet, tokenizer: Any) -> None:
    config = replace(PLAIN, distractor_share=0.25)
    refused = [sequence(hits, tokenizer, config, seed=seed).target == REFUSAL for seed in range(200)]
    assert 0.15 < sum(refused) / len(refused) < 0.35


def test_refusal_is_never_taught_on_a_prompt_without_passages(make: Any, tokenizer: Any) -> None:
    """All hits hold the answer, so no distractor is left: "the passages do not answer" would be about nothing."""
    hits = make([question(0, hits=[[hit(0, "Mara Voss."), hit(1, "Voss kept it.")]] * 3)])
    found = sequence(hits, tokenizer, replace(PLAIN, distractor_share=1.0))
    assert passages_in(found.prompt) or found.target != REFUSAL


def test_rewordings_bring_their_own_hits(make: Any, tokenizer: Any) -> None:
    rows = [[hit(0, f"Mara Voss, found by wording {wording}.")] for wording in range(3)]
    hits = make([question(0, hits=rows)])
    config = replace(PLAIN, use_rewrites=True)
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


def test_top_k_is_the_most_passages(hits: HitSet, tokenizer: Any) -> None:
    assert len(passages_in(sequence(hits, tokenizer, replace(PLAIN, top_k=1)).prompt)) == 1
    assert sequence(hits, tokenizer, replace(PLAIN, top_k=1)).target == REFUSAL
    assert len(passages_in(sequence(hits, tokenizer, replace(PLAIN, top_k=9)).prompt)) == 5


@pytest.mark.parametrize("shuffled", [False, True])
def test_passage_that_holds_the_answer_is_the_last_to_be_dropped(make: Any, tokenizer: Any, shuffled: bool) -> None:
    # Dropping it would teach to refuse a question whose answer was retrieved.
    rows = [[hit(0, "Salt " * 30), hit(1, "Mara Voss kept it. " * 4), hit(2, "Rope " * 30)]] * 3
    config = replace(PLAIN, max_tokens=120, max_new_tokens=20, shuffle_passages=shuffled)
    for seed in range(8):
        found = sequence(make([question(0, hits=rows)]), tokenizer, config, seed=seed)
        assert len(tokenizer(found.prompt)["input_ids"]) <= 100
        assert "Mara Voss" in found.prompt
        assert found.target.startswith("Mara Voss [")


def test_passages_that_do_not_fit_are_dropped_by_rank(make: Any, tokenizer: Any) -> None:
    rows = [[hit(0, "Salt " * 20), hit(1, "Rope " * 20), hit(2, "Tar " * 60)]] * 3
    config = replace(PLAIN, max_tokens=130, max_new_tokens=20)
    found = sequence(make([question(0, hits=rows)]), tokenizer, config)
    assert "Salt" in found.prompt
    assert "Tar" not in found.prompt
    assert found.target == REFUSAL


def test_target_that_a_cut_passage_no_longer_holds_is_a_refusal(make: Any, tokenizer: Any) -> None:
    rows = [[hit(0, "Salt " * 80 + "Mara Voss")]] * 3
    found = sequence(make([question(0, hits=rows)]), tokenizer, replace(PLAIN, max_tokens=100, max_new_tokens=20))
    assert passages_in(found.prompt)
    assert found.target == REFUSAL


# Order


@pytest.mark.parametrize("size", [1, 3, 7, 10, 16])
def test_steps_walk_epochs_without_gaps(hits: HitSet, size: int) -> None:
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
        PromptAndTarget("A longer prompt about salt, ice and ferries. Question: who?\nAnswer:", "Bo"),
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
    assert ids[0][labels[0] != IGNORED].tolist() == whole[0][-len(tokenizer(item.target)["input_ids"]) - 1 :].tolist()
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
