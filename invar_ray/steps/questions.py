"""Questions with their rewrites: the ``questions`` artifact.

Files: ``train.parquet``, ``dev.parquet`` (examples), ``train_rewrites.parquet``,
``dev_rewrites.parquet`` (rewrites; number 0 is the anchor); with ``questions.near_duplicates``
``contamination.json``, the pairs that were too much alike.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq

from invar_ray import console
from invar_ray.config import Config
from invar_ray.corpus.readers import read_examples
from invar_ray.corpus.sources import source_digest
from invar_ray.errors import DataError
from invar_ray.questions.benchmarks import detect_format, read_benchmark
from invar_ray.questions.contamination import near_duplicates
from invar_ray.questions.rewrites import Rewriter, comparison_key, make_rewriter
from invar_ray.schema import EXAMPLE_SCHEMA, REWRITE_SCHEMA, Example, Rewrite, from_table, to_table
from invar_ray.store.artifacts import Artifact, Building, Plan
from invar_ray.text.language import english_share

VERSION = 3
CONTAMINATION = "contamination.json"
Split = Literal["train", "dev"]
_DEV_SEED_OFFSET = 1_000_003
_ENGLISH_SHARE = 0.5  # of questions; below it rules are warned of
_MISSING_SHARE = 0.1  # of questions without a gold document; above it a run stops
_NOT_OURS = {"num_windows"}  # a setting of the training set


def plan(config: Config) -> Plan:
    """The artifact of a run's questions."""
    sources = {
        "train": source_digest(config.questions.train_uri),
        "dev": source_digest(config.questions.dev_uri),
    }
    if config.rewrites.provider == "file" and config.rewrites.uri is not None:
        sources["rewrites"] = source_digest(config.rewrites.uri)
    return Plan(
        kind="questions",
        name=config.name,
        config={
            "sources": sources,
            "format": config.questions.format,
            "train_limit": config.questions.train_limit,
            "dev_limit": config.questions.dev_limit,
            "rewrites": {
                key: value for key, value in asdict(config.rewrites).items() if key not in _NOT_OURS
            },
            "evaluation": {"num_rewrites": config.evaluation.num_rewrites},
            "seed": config.seed,
            "near_duplicates": config.questions.near_duplicates,
        },
        version=VERSION,
    )


def build(building: Building, config: Config) -> None:
    """Read, sample and rewrite the questions of both splits.

    Raises:
        DataError: if a file is malformed, or nothing is left to train on: training questions that
            share a wording with a dev question are dropped, with a line that says how many.
    """
    train = _sample(read_examples_of(config, "train"), config.questions.train_limit, config.seed)
    dev = _sample(read_examples_of(config, "dev"), config.questions.dev_limit, config.seed)
    rewrites = config.rewrites
    if rewrites.provider in {"rules", "given"}:
        given = rewrites.num_rewrites if rewrites.provider == "given" else 0
        _warn_of_language([row for row in (*train, *dev) if not 0 < given <= len(row.rewrites)])
    root = Path(config.storage.root_uri).expanduser()
    # Rewrites cost money: a run that is cut off finds those it already has.
    cache = (
        str(root / ".cache" / "rewrites.jsonl") if "://" not in config.storage.root_uri else None
    )
    train_rewriter = make_rewriter(
        provider=rewrites.provider,
        uri=rewrites.uri,
        endpoint_model=rewrites.endpoint_model,
        cache_path=cache,
    )
    # Dev rewrites are the same for everybody who evaluates on these questions: no endpoint.
    dev_rewriter = (
        make_rewriter(provider="rules")
        if rewrites.provider == "endpoint"
        else make_rewriter(provider=rewrites.provider, uri=rewrites.uri)
    )
    dev_rows = _rewrite(
        dev, dev_rewriter, config.evaluation.num_rewrites, config.seed + _DEV_SEED_OFFSET
    )
    train_rows = _rewrite(train, train_rewriter, rewrites.num_rewrites, config.seed)
    seen = {comparison_key(rewrite.text) for rewrite in dev_rows}
    leaking = {
        rewrite.question_id for rewrite in train_rows if comparison_key(rewrite.text) in seen
    }
    if len(leaking) == len(train):
        raise DataError(
            f"all {len(train)} questions of {config.questions.train_uri} stand in "
            f"{config.questions.dev_uri} too",
            expected="other questions to train on than to report on",
        )
    if leaking:
        console.say(
            f"  dropped {len(leaking)} of {len(train)} training questions: a wording of theirs is "
            "one of a dev "
            f"question's (first: {min(leaking)})"
        )
    building.info["dropped_for_leaking"] = len(leaking)
    if config.questions.near_duplicates is not None:
        leaking |= _near_duplicates(
            building, train_rows, dev_rows, config.questions.near_duplicates, leaking
        )
        if len(leaking) == len(train):
            raise DataError(
                f"all {len(train)} training questions resemble dev questions",
                expected="other questions to train on than to report on",
                action="raise questions.near_duplicates, or look at the pairs with it set to null",
            )
    kept = [example for example in train if example.id not in leaking]
    _write(
        building,
        "train",
        kept,
        [rewrite for rewrite in train_rows if rewrite.question_id not in leaking],
    )
    _write(building, "dev", dev, dev_rows)


def read_examples_of(config: Config, split: Split) -> list[Example]:
    """All examples of a split, as the recipe names them."""
    from invar_ray.corpus import facts

    uri = config.questions.train_uri if split == "train" else config.questions.dev_uri
    if uri == "builtin:facts":
        return list(facts.questions(split))
    format: str = config.questions.format
    if format == "auto":
        format = detect_format(uri)
    if format == "jsonl":
        return read_examples(uri, skip_unusable=True)
    return read_benchmark(uri, format, split=split, skip_unusable=True).examples


def load_examples(artifact: Artifact, split: Split) -> list[Example]:
    """The examples of a split."""
    return from_table(pq.read_table(artifact.path(f"{split}.parquet")), Example)


def load_rewrites(artifact: Artifact, split: Split) -> dict[str, list[Rewrite]]:
    """Question id -> its wordings, the anchor first."""
    families: dict[str, list[Rewrite]] = {}
    for rewrite in from_table(pq.read_table(artifact.path(f"{split}_rewrites.parquet")), Rewrite):
        families.setdefault(rewrite.question_id, []).append(rewrite)
    return families


def load_wordings(artifact: Artifact, split: Split) -> dict[str, list[str]]:
    """Question id -> the texts of its wordings, the anchor first."""
    families = load_rewrites(artifact, split)
    return {name: [rewrite.text for rewrite in family] for name, family in families.items()}


def _sample(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    chosen = sorted(random.Random(seed).sample(range(len(examples)), limit))
    return [examples[index] for index in chosen]


def refuse_unanswerable(
    examples: Sequence[Example], documents: Collection[str], split: str
) -> None:
    """Raise if more than a few questions have no gold document among ``documents``; else say in one
    line which few (public sets have some: ArguAna one of 1,406).  They are not trained on, and
    count as missed in a report.

    Raises:
        DataError: naming how many, and the first.
    """
    missing = _unanswerable(examples, documents, split)
    if missing:
        console.say(
            f"  warning: {len(missing)} of {len(examples)} {split} questions have no positive "
            f"document in the corpus (first: {missing[0].id}): not trained on, missed in reports"
        )


def answerable(examples: Sequence[Example], documents: Collection[str]) -> list[Example]:
    """The training questions that have a gold document among ``documents``.

    Raises:
        DataError: as :func:`refuse_unanswerable`.
    """
    missing = {example.id for example in _unanswerable(examples, documents, "train")}
    return [example for example in examples if example.id not in missing]


def _unanswerable(
    examples: Sequence[Example], documents: Collection[str], split: str
) -> list[Example]:
    """Those without a gold document; dev questions that name none pass, as benchmarks that give
    answers only are measured by those.
    """
    judged = [example for example in examples if example.positive_ids or split != "dev"]
    missing = [
        example for example in judged if not any(name in documents for name in example.positive_ids)
    ]
    if len(missing) > _MISSING_SHARE * len(examples):
        raise DataError(
            f"{len(missing)} of {len(examples)} {split} questions have no positive document in the "
            "corpus (first: "
            f"{missing[0].id}, positive_ids {list(missing[0].positive_ids)[:3]})",
            expected=f"positive_ids that are ids of corpus rows (all but {_MISSING_SHARE:.0%})",
            action="use the corpus that the questions were made for, or raise corpus.limit",
        )
    return missing


def _rewrite(
    examples: Sequence[Example], rewriter: Rewriter, count: int, seed: int
) -> list[Rewrite]:
    rows: list[Rewrite] = []
    for example in examples:
        rows.append(Rewrite(example.id, 0, example.question, "anchor", "data"))
        rows += rewriter.rewrite(example, count, seed)
    return rows


def _warn_of_language(examples: Sequence[Example]) -> None:
    """One line if questions that rules rewrite are not English."""
    share = english_share([example.question for example in examples])
    if examples and share < _ENGLISH_SHARE:
        console.say(
            f"  warning: {1 - share:.0%} of the questions do not look English, and the rules for "
            "rewrites write English: they leave out other alphabets and frame the rest in English. "
            "To do: rewrites.provider=endpoint (a model), file or given, with wordings in their "
            "language"
        )


def _near_duplicates(
    building: Building,
    train: list[Rewrite],
    dev: list[Rewrite],
    threshold: float,
    known: Collection[str],
) -> set[str]:
    """Ids of training questions that resemble dev questions; the pairs go to
    ``contamination.json``.
    """
    families: tuple[dict[str, list[str]], dict[str, list[str]]] = {}, {}
    for of_split, rows in zip(families, (train, dev), strict=True):
        for rewrite in rows:
            of_split.setdefault(rewrite.question_id, []).append(rewrite.text)
    found = [pair for pair in near_duplicates(*families, threshold) if pair.train not in known]
    pairs = [
        {
            **asdict(pair),
            "train_question": families[0][pair.train][0],
            "dev_question": families[1][pair.dev][0],
        }
        for pair in found
    ]
    text = json.dumps(pairs, ensure_ascii=False, indent=1)
    (building.path / CONTAMINATION).write_text(text, encoding="utf-8")
    building.info["dropped_as_near_duplicates"] = len(found)
    if found:
        console.say(
            f"  dropped {len(found)} of {len(families[0])} training questions as near duplicates "
            "of dev questions "
            f"(first: {pairs[0]['train_question']!r}, of {pairs[0]['dev_question']!r})"
        )
    return {pair.train for pair in found}


def _write(building: Building, split: Split, examples: list[Example], rows: list[Rewrite]) -> None:
    pq.write_table(to_table(examples, EXAMPLE_SCHEMA), building.path / f"{split}.parquet")
    pq.write_table(to_table(rows, REWRITE_SCHEMA), building.path / f"{split}_rewrites.parquet")
    building.info |= {f"{split}_questions": len(examples), f"{split}_wordings": len(rows)}
