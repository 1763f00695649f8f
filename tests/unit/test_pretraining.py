"""How a small base is made: the pruned vocabulary, heads that look back and copy, tasks whose answers can be
read, and a training that learns.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from invar_ray.errors import DataError
from invar_ray.models.tiny import MAX_POSITIONS, minilm_embeddings, minilm_folder, minilm_tokenizer
from invar_ray.pretraining.align import Alignment, minilm_vectors
from invar_ray.pretraining.copying import CopyingTasks
from invar_ray.pretraining.measure import exact_match
from invar_ray.pretraining.reading import Item, ReadingMixture
from invar_ray.pretraining.start import Shape, start_model
from invar_ray.pretraining.train import PretrainConfig, Pretraining
from invar_ray.pretraining.vocabulary import count_tokens, prune_tokenizer
from invar_ray.text.prompts import INSTRUCTION, REFUSAL

WORDS = "Harbour lamps were trimmed by the keeper, Mara Voss, in 1841. Salt, rope & oil: 3 crates!"


def rows(count: int) -> list[dict[str, Any]]:
    keepers = ["Mara Voss", "Olin Terv", "Petra Lund", "Sven Karro"]
    return [
        {
            "id": f"p{number}",
            "title": f"Light {number}",
            "text": f"Light {number} stands on a rock of the Northern Sound. In {1840 + number} it was kept by "
            f"{keepers[number % 4]}, who had come from Port Ellis. The lamp of it burned whale oil for years.",
        }
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    corpus = rows(40)
    asked = [
        {"id": f"q{n}", "question": f"Who kept light {n}?", "answers": [a], "positive_ids": [f"p{n}"]}
        for n, a in enumerate(["Mara Voss", "Olin Terv", "Petra Lund", "Sven Karro"] * 10)
    ]
    for name in ("wiki_pool", "squad", "nq", "popqa"):
        for file, lines in (("corpus", corpus), ("questions-train", asked)):
            path = root / name / f"{file}.jsonl.gz"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    return root


@pytest.fixture(scope="module")
def data(folder: Path) -> ReadingMixture:
    return ReadingMixture(folder)


@pytest.fixture(scope="module")
def pruned() -> tuple[Any, list[int]]:
    original = minilm_tokenizer()
    # Beside the words in use, a thousand others: the start needs more tokens than the model is wide.
    others = " ".join(original.convert_ids_to_tokens(range(2000, 3000)))
    texts = [WORDS, others, *(row["text"] for row in rows(40))]
    counts = count_tokens(minilm_tokenizer().backend_tokenizer, texts)
    return prune_tokenizer(minilm_folder() / "tokenizer.json", counts, 1500, MAX_POSITIONS)


@pytest.fixture(scope="module")
def model(pruned: tuple[Any, list[int]]) -> Any:
    tokenizer, kept = pruned
    return start_model(minilm_embeddings()[kept], tokenizer.pad_token_id, tokenizer.eos_token_id, seed=0)


@pytest.fixture(scope="module")
def whole() -> Any:
    """The start over a large vocabulary: only among many words is one direction nearly the same for all."""
    return start_model(minilm_embeddings()[1000:], 0, 1, seed=0)


# The vocabulary


def test_common_words_stay_whole_and_others_fall_into_known_pieces(pruned: tuple[Any, list[int]]) -> None:
    tokenizer, kept = pruned
    original = minilm_tokenizer()
    assert 1000 < len(tokenizer) == len(kept) == len(set(kept)) <= 1500
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert tokenizer.tokenize(WORDS) == original.tokenize(WORDS)
    assert [original.convert_ids_to_tokens(old) for old in kept] == tokenizer.convert_ids_to_tokens(range(len(kept)))
    pieces = tokenizer.tokenize("photosynthesis")
    assert len(pieces) > 1
    assert tokenizer.unk_token not in pieces
    assert "".join(piece.removeprefix("##") for piece in pieces) == "photosynthesis"
    assert (tokenizer("")["input_ids"], tokenizer.eos_token) == ([], "[SEP]")


def test_ties_are_broken_by_id_and_too_small_a_size_is_refused() -> None:
    path = minilm_folder() / "tokenizer.json"
    counts = Counter({5000: 1, 6000: 1, 4000: 2})
    least = len(prune_tokenizer(path, Counter(), 1000, 64)[1])
    assert set(prune_tokenizer(path, counts, least + 2, 64)[1]) >= {4000, 5000}
    assert 6000 not in prune_tokenizer(path, counts, least + 2, 64)[1]
    with pytest.raises(ValueError, match="do not fit into 50"):
        prune_tokenizer(path, counts, 50, 64)


# The start


def attentions(model: Any, ids: torch.Tensor) -> Any:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(input_ids=ids, output_attentions=True).attentions


def test_heads_look_back_by_exactly_what_the_plan_says(whole: Any) -> None:
    ids = torch.randint(3000, 20000, (4, 60), generator=torch.Generator().manual_seed(1))
    weights = attentions(whole, ids)[0]  # first layer: [B, heads, T, T]
    places = torch.arange(2, 60)
    for head, back in ((0, 1), (1, 2)):
        assert weights[:, head, places, places - back].mean() > 0.65
        assert (weights[:, head, places].argmax(-1) == places - back).float().mean() > 0.65
    late = torch.arange(30, 60)
    near = torch.stack([weights[:, 2, late, late - back] for back in range(10)]).sum(0)
    assert near.mean() > 0.9, "a bag looks at the last few tokens"
    assert weights[:, 2, late, late - 4].mean() < 0.5


def test_induction_heads_find_what_followed_last_time(whole: Any) -> None:
    once = torch.randperm(17000, generator=torch.Generator().manual_seed(2))[:40] + 3000
    ids = torch.cat([once, once])[None]
    weights = attentions(whole, ids)[1]
    places = torch.arange(45, 79)
    followed = weights[0, 0, places, places - 39].mean()
    assert followed > 0.3
    assert followed > 8 * weights[0, 0, places, places - 40].mean(), "not the token itself"


def test_same_seed_same_start(model: Any, pruned: tuple[Any, list[int]]) -> None:
    tokenizer, kept = pruned
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    again = start_model(minilm_embeddings()[kept], tokenizer.pad_token_id, tokenizer.eos_token_id, seed=0)
    assert torch.equal(torch.rand(2), expected)
    assert all(
        torch.allclose(again.state_dict()[name], weight, rtol=1e-4, atol=1e-5)  # least squares repeats to rounding
        for name, weight in model.state_dict().items()
    )
    assert again.config.hidden_size == Shape().width


# The tasks


@pytest.mark.parametrize("level", [0, 1, 2])
def test_made_up_answers_stand_in_their_passage(level: int) -> None:
    tasks, rng, clues = CopyingTasks(), random.Random(level), 0
    for _ in range(200):
        task = tasks.make(rng, level)
        assert task.asked
        for question, answer, place in task.asked:
            title, text = task.passages[place]
            assert answer.lower() in text.lower()
            # A clue asks for the subject itself.
            clue = answer.lower() == title.lower().removeprefix("the ")
            assert clue != (title.lower() in question.lower())
            clues += clue
        assert len({title for title, _ in task.passages}) == len(task.passages)
    assert (clues > 10) == (level > 0)


def test_no_made_up_question_is_a_dev_wording_of_the_demo() -> None:
    def bare(wording: str) -> str:
        return re.sub(r"[^a-z ]", "", re.sub(r"\{\w+\}", "X", wording).lower()).strip()

    spec = yaml.safe_load((files("invar_ray.pretraining") / "relations.yaml").read_text(encoding="utf-8"))
    ours = {bare(text) for entry in (*spec["relations"], *spec["clues"]) for text in entry["questions"]}
    held = set()
    for path in (files("invar_ray.text") / "data").iterdir():
        if path.name.endswith(".yaml"):
            for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["questions"].values():
                held |= {bare(text) for text in entry["dev"]}
    assert len(ours) > 300
    assert len(held) > 100
    assert not ours & held


def test_real_items_hold_their_answer_and_cite_its_passage(data: ReadingMixture) -> None:
    rng = random.Random(0)
    refusals = cited = 0
    for number in range(300):
        item = data.draw(rng, number / 300)
        prompt, target = item.parts[0]
        assert prompt.endswith("Answer:")
        if item.answer is None:
            refusals += 1
            assert target == f" {REFUSAL}"
            assert REFUSAL in prompt
            continue
        assert item.answer.lower() in prompt.lower()
        if target.endswith("]"):
            cited += 1
            number_cited = target[target.rindex("[") :]
            line = next(line for line in prompt.splitlines() if line.startswith(number_cited))
            assert item.answer.lower() in line.lower()
    assert refusals > 3
    assert cited > 30
    assert any(INSTRUCTION in data.draw(rng, 1.0).parts[0][0] for _ in range(20))


def test_held_out_articles_are_in_no_item(data: ReadingMixture) -> None:
    held = {item.title for item in data.held}
    assert len(held) == 20
    assert not held & {item.title for item in data.squad}


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*wiki_pool.*--data"):
        ReadingMixture(tmp_path)


# The training


def test_loss_counts_the_targets_only(data: ReadingMixture, model: Any, pruned: tuple[Any, list[int]]) -> None:
    training = Pretraining(model, pruned[0], data, PretrainConfig(alignment_pairs=0, compiled=False))
    item = Item([("Who? Answer:", " Mara Voss"), ("\nWhen? Answer:", " 1841")], "Mara Voss")
    row, spans = training.encode(item)
    shown = [pruned[0].decode([row[place] for place in span]) for span in spans]
    assert [text.split() for text in shown] == [["mara", "voss", "[SEP]"], ["1841", "[SEP]"]]
    places = [(0, place) for span in spans for place in span]
    with torch.no_grad():
        ours = training._next_token_loss([row, row[:4]], places)
        logits = model(input_ids=torch.tensor([row])).logits[0].float()
    by_hand = sum(-logits[place - 1].log_softmax(-1)[row[place]] for _, place in places)
    assert ours.item() == pytest.approx(float(by_hand), rel=1e-4)


def test_turned_vectors_keep_minilms_cosines_and_training_draws_the_states_to_them(
    data: ReadingMixture, pruned: tuple[Any, list[int]]
) -> None:
    tokenizer, kept = pruned
    model = start_model(minilm_embeddings()[kept], tokenizer.pad_token_id, tokenizer.eos_token_id, seed=0).eval()
    rng = random.Random(0)
    pairs = [data.pair(rng) for _ in range(8)]

    def states(rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        return ids, model.model(input_ids=ids, use_cache=False).last_hidden_state

    alignment = Alignment(pairs, tokenizer, states, rows=16, longest=64, temperature=0.05, seed=1)
    theirs = minilm_vectors([text for pair in pairs for text in pair])
    # 16 texts span no more than 16 of the 256 directions: nothing is lost.
    torch.testing.assert_close(alignment._targets @ alignment._targets.T, theirs @ theirs.T, rtol=0, atol=1e-4)

    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    found = []
    for _ in range(8):
        optimizer.zero_grad()
        found.append(alignment.backward(1.0))
        optimizer.step()
    assert 1 - found[-1]["alignment_cosine"] < 0.5 * (1 - found[0]["alignment_cosine"])
    assert found[-1]["alignment_divergence"] < found[0]["alignment_divergence"]


def test_training_learns_and_repeats(data: ReadingMixture, pruned: tuple[Any, list[int]], tmp_path: Path) -> None:
    # Shares above 1: it stays at the first level.
    config = PretrainConfig(
        steps=16,
        step_tokens=256,
        alignment_pairs=6,
        compiled=False,
        level_shares=(2.0, 2.0),
        level_losses=(0.0, 0.0),
    )
    tokenizer, kept = pruned
    tasks = [data.copying(random.Random(number), 0) for number in range(12)]
    lines, losses = [], []
    for name in ("one", "two"):
        start = start_model(minilm_embeddings()[kept], tokenizer.pad_token_id, tokenizer.eos_token_id, seed=0)
        training = Pretraining(start, tokenizer, data, config)
        encoded = [training.encode(task) for task in tasks]
        places = [(row, place) for row, (_, spans) in enumerate(encoded) for span in spans for place in span]

        def loss(training: Pretraining = training, encoded: Any = encoded, places: Any = places) -> float:
            with torch.no_grad():
                return float(training._next_token_loss([row for row, _ in encoded], places)) / len(places)

        before = loss()
        lines.append(list(training.run(tmp_path / name))[-1])
        losses.append(loss())
        assert losses[-1] < 0.9 * before
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert lines[0]["tokens"] == lines[1]["tokens"]
    assert {"reading_loss", "alignment_cosine", "alignment_divergence", "language_loss"} <= set(lines[0])
    assert 0.0 <= exact_match(training, tasks)[0] <= 1.0
    written = (tmp_path / "one" / "pretraining.jsonl").read_text().splitlines()
    assert json.loads(written[-1]) == lines[0]
