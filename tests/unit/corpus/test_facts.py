"""The demo corpus: what its documents and questions promise, and facts that anyone can check."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.resources import files

import pytest
import yaml

from invar_ray.corpus import facts
from invar_ray.schema import Document, Example
from invar_ray.text.answers import contains_answer, normalise_answer

DATA = files("invar_ray.corpus") / "data"

# One line of Python for a fresh process: a digest of everything that the module makes.
DIGEST = (
    "import hashlib; from invar_ray.corpus import facts; "
    "print(hashlib.sha256(repr((facts.documents(), facts.questions('train'), "
    "facts.questions('dev'))).encode())"
    ".hexdigest())"
)

# Written by hand, apart from the tables: example id -> an answer that must be among the gold
# answers.
KNOWN = {
    "facts-element-iron-symbol": "Fe",
    "facts-element-gold-number": "79",
    "facts-element-tungsten-symbol": "W",
    "facts-element-iron-by_number": "iron",
    "facts-element-germanium-discoverer": "Clemens Winkler",
    "facts-element-francium-year": "1939",
    "facts-country-burkina-faso-by_capital": "Burkina Faso",
    "facts-country-mongolia-capital": "Ulaanbaatar",
    "facts-country-bhutan-currency": "ngultrum",
    "facts-country-brazil-language": "Portuguese",
    "facts-country-australia-capital": "Canberra",
    "facts-river-volga-mouth": "Caspian Sea",
    "facts-river-seine-by_cities": "Seine",
    "facts-river-colorado-by_clue": "Colorado",
    "facts-mountain-matterhorn-climber": "Edward Whymper",
    "facts-mountain-annapurna-year": "1950",
    "facts-mountain-aconcagua-range": "Andes",
    "facts-space-titan-discoverer": "Christiaan Huygens",
    "facts-space-phobos-home": "Mars",
    "facts-space-uranus-year": "1781",
    "facts-invention-stethoscope-inventor": "René Laennec",
    "facts-invention-rubiks-cube-year": "1974",
    "facts-person-alan-turing-born": "1912",
    "facts-person-albert-einstein-birthplace": "Ulm",
    "facts-book-moby-dick-author": "Herman Melville",
    "facts-book-nineteen-eighty-four-year": "1949",
    "facts-painting-guernica-painter": "Pablo Picasso",
    "facts-painting-the-night-watch-museum": "Rijksmuseum",
    "facts-state-texas-capital": "Austin",
    "facts-state-hawaii-by_order": "Hawaii",
}


@pytest.fixture(scope="module")
def corpus() -> dict[str, Document]:
    return {document.id: document for document in facts.documents()}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Example]]:
    return {"train": facts.questions("train"), "dev": facts.questions("dev")}


@pytest.fixture(scope="module")
def examples(splits: dict[str, list[Example]]) -> list[Example]:
    return splits["train"] + splits["dev"]


def wordings(example: Example) -> list[str]:
    return [example.question, *example.rewrites]


def test_sizes(corpus: dict[str, Document], splits: dict[str, list[Example]]) -> None:
    assert 450 <= len(corpus) <= 750
    assert len(splits["train"]) >= 700
    assert len(splits["dev"]) >= 250


def test_ids_are_unique(corpus: dict[str, Document], examples: list[Example]) -> None:
    assert len(corpus) == len(facts.documents())
    assert len({example.id for example in examples}) == len(examples)
    assert all(re.fullmatch(r"facts-[a-z0-9-]+", identity) for identity in corpus)


def test_documents_read_like_prose(corpus: dict[str, Document]) -> None:
    for document in corpus.values():
        assert 25 <= len(document.text.split()) <= 130, document
        assert document.title
        assert document.text.endswith(".")
        assert not re.search(r"[{}|]|\s\s|\.\.|\ba [aei]\w|\ban? (a|an|the) ", document.text), (
            document
        )
        sentences = re.split(r"(?<=[a-z]\.) ", document.text)
        assert 2 <= len(sentences) <= 6, document
        assert all(sentence[0].isupper() for sentence in sentences), document


def test_positives_state_the_answer(corpus: dict[str, Document], examples: list[Example]) -> None:
    for example in examples:
        assert example.answers
        assert all(normalise_answer(answer) for answer in example.answers), example
        assert example.positive_ids
        for identity in example.positive_ids:
            assert contains_answer(corpus[identity].text, example.answers[:1]), (
                example,
                corpus[identity],
            )


def test_no_question_holds_its_answer(examples: list[Example]) -> None:
    assert [
        e.id for e in examples if any(contains_answer(text, e.answers) for text in wordings(e))
    ] == []


def test_families_are_large_and_without_duplicates(examples: list[Example]) -> None:
    assert all(4 <= len(wordings(example)) <= 5 for example in examples)
    texts = [normalise_answer(text) for example in examples for text in wordings(example)]
    assert [text for text, count in Counter(texts).items() if count > 1] == []
    assert not any(
        re.search(r"[{}|]|\s\s", text) for example in examples for text in wordings(example)
    )


def test_anchor_is_a_sentence(examples: list[Example]) -> None:
    assert all(example.question[-1] in "?." for example in examples)


def test_no_subject_is_in_both_splits(
    corpus: dict[str, Document], splits: dict[str, list[Example]]
) -> None:
    subjects = {
        name: {i for example in split for i in example.positive_ids}
        for name, split in splits.items()
    }
    assert not subjects["train"] & subjects["dev"]
    # Every table gives 20 to 25 % of its subjects to dev.
    tables = {identity.split("-")[1] for identity in corpus}
    assert len(tables) == len(facts.TABLES)
    for table in tables:
        counts = [
            sum(i.startswith(f"facts-{table}-") for i in subjects[name])
            for name in ("train", "dev")
        ]
        assert 0.18 <= counts[1] / sum(counts) <= 0.27, (table, counts)


def test_no_wording_is_in_both_splits() -> None:
    pools: dict[str, set[str]] = {"train": set(), "dev": set()}
    for table in facts.TABLES:
        spec = yaml.safe_load((DATA / f"{table}.yaml").read_text(encoding="utf-8"))
        for relation, entry in spec["questions"].items():
            for split, pool in pools.items():
                assert len(entry[split]) == len(set(entry[split])) >= 4, (table, relation, split)
                # What is left of a template without its subject and facts.
                pool.update(
                    normalise_answer(re.sub(r"\{\w+\}", " ", wording)) for wording in entry[split]
                )
    assert not pools["train"] & pools["dev"]


def test_every_relation_and_table_is_asked(splits: dict[str, list[Example]]) -> None:
    for split, found in splits.items():
        kinds = {(e.id.split("-")[1], e.id.rsplit("-", 1)[1]) for e in found}
        assert len(kinds) >= 40, split


def test_a_prefix_is_a_fair_sample(splits: dict[str, list[Example]]) -> None:
    for found in splits.values():
        assert len({example.id.split("-")[1] for example in found[:100]}) >= 9


def test_wordings_differ_from_passages(
    corpus: dict[str, Document], examples: list[Example]
) -> None:
    texts = {identity: normalise_answer(document.text) for identity, document in corpus.items()}
    assert not any(normalise_answer(e.question) in texts[e.positive_ids[0]] for e in examples)


@pytest.mark.parametrize(("identity", "answer"), KNOWN.items())
def test_known_facts(identity: str, answer: str, examples: list[Example]) -> None:
    found = [example for example in examples if example.id == identity]
    assert len(found) == 1
    assert normalise_answer(answer) in [normalise_answer(gold) for gold in found[0].answers]


def test_every_atomic_number_is_asked_once(examples: list[Example]) -> None:
    asked = [
        int(e.answers[0])
        for e in examples
        if e.id.startswith("facts-element-") and e.id.endswith("-number")
    ]
    assert sorted(asked) == list(range(1, 119))


def test_same_in_every_process() -> None:
    everything = repr((facts.documents(), facts.questions("train"), facts.questions("dev")))
    here = hashlib.sha256(everything.encode()).hexdigest()
    for seed in ("1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert run.stdout.strip() == here


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'dev'"):
        facts.questions("test")  # type: ignore[arg-type]


def test_records_are_json(corpus: dict[str, Document]) -> None:
    document = next(iter(corpus.values()))
    assert json.loads(json.dumps([document.id, document.title, document.text, document.uri]))[
        3
    ].startswith(facts.URI)
