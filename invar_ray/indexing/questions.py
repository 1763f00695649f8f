"""Questions with their rewordings: the ``questions`` artifact.

Files: ``train.parquet``, ``dev.parquet`` (examples), ``train_variants.parquet``, ``dev_variants.parquet`` (rewordings;
number 0 is the anchor).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import pyarrow.parquet as pq

from invar_ray.artifacts import Artifact, Building, Plan
from invar_ray.config import Config
from invar_ray.errors import DataError
from invar_ray.indexing.sources import source_digest
from invar_ray.schema import EXAMPLE_SCHEMA, VARIANT_SCHEMA, Example, Variant, from_table, to_table
from invar_ray.text.readers import read_examples
from invar_ray.text.variants import Rewriter, make_rewriter
from invar_ray.versions import STEPS

Split = Literal["train", "dev"]
_DEV_SEED_OFFSET = 1_000_003
_NOT_OURS = {"endpoint_key_env", "num_windows"}  # a secret's name; a setting of the training set


def questions_plan(config: Config) -> Plan:
    """The artifact of a run's questions."""
    sources = {"train": source_digest(config.questions.train_uri), "dev": source_digest(config.questions.dev_uri)}
    for key, uri in {"variants": config.variants.file_uri, "evaluation": config.evaluation.file_uri}.items():
        if uri is not None:
            sources[key] = source_digest(uri)
    return Plan(
        kind="questions",
        name=config.name,
        config={
            "sources": sources,
            "train_limit": config.questions.train_limit,
            "dev_limit": config.questions.dev_limit,
            "variants": {key: value for key, value in asdict(config.variants).items() if key not in _NOT_OURS},
            "evaluation": {"provider": config.evaluation.provider, "num_rewrites": config.evaluation.num_rewrites},
            "seed": config.seed,
        },
        version=STEPS["questions"].version,
    )


def build_questions(building: Building, config: Config) -> None:
    """Read, sample and reword the questions of both splits.

    Raises:
        DataError: if a file is malformed, or a question stands in train and in dev.
    """
    train = _sample(read_examples_of(config, "train"), config.questions.train_limit, config.seed)
    dev = _sample(read_examples_of(config, "dev"), config.questions.dev_limit, config.seed)
    _refuse_overlap(train, dev, config)
    variants = config.variants
    train_rewriter = make_rewriter(
        provider=variants.provider,
        file_uri=variants.file_uri,
        endpoint_url=variants.endpoint_url,
        endpoint_model=variants.endpoint_model,
        endpoint_key_env=variants.endpoint_key_env,
        cache_path=None,
    )
    dev_rewriter = make_rewriter(provider=config.evaluation.provider, file_uri=config.evaluation.file_uri)
    _write(building, "train", train, train_rewriter, variants.num_rewrites, config.seed)
    _write(building, "dev", dev, dev_rewriter, config.evaluation.num_rewrites, config.seed + _DEV_SEED_OFFSET)


def read_examples_of(config: Config, split: Split) -> list[Example]:
    """All examples of a split, as the recipe names them."""
    from invar_ray.text import facts

    uri = config.questions.train_uri if split == "train" else config.questions.dev_uri
    return list(facts.questions(split)) if uri == "builtin:facts" else read_examples(uri, skip_unusable=True)


def load_examples(artifact: Artifact, split: Split) -> list[Example]:
    """The examples of a split."""
    return from_table(pq.read_table(artifact.path(f"{split}.parquet")), Example)


def load_variants(artifact: Artifact, split: Split) -> dict[str, list[Variant]]:
    """Question id -> its wordings, the anchor first."""
    families: dict[str, list[Variant]] = {}
    for variant in from_table(pq.read_table(artifact.path(f"{split}_variants.parquet")), Variant):
        families.setdefault(variant.question_id, []).append(variant)
    return families


def _sample(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    chosen = sorted(random.Random(seed).sample(range(len(examples)), limit))
    return [examples[index] for index in chosen]


def _refuse_overlap(train: Sequence[Example], dev: Sequence[Example], config: Config) -> None:
    seen = {example.question.casefold().strip() for example in train}
    shared = [example for example in dev if example.question.casefold().strip() in seen]
    if shared:
        raise DataError(
            f"{len(shared)} dev questions stand in {config.questions.train_uri} too (first: {shared[0].id})",
            expected="no question in both",
            action="remove them from one of the files",
        )


def _write(
    building: Building, split: Split, examples: list[Example], rewriter: Rewriter, count: int, seed: int
) -> None:
    rows: list[Any] = []
    for example in examples:
        rows.append(Variant(example.id, 0, example.question, "anchor", "data"))
        rows += rewriter.rewrite(example, count, seed)
    pq.write_table(to_table(examples, EXAMPLE_SCHEMA), building.path / f"{split}.parquet")
    pq.write_table(to_table(rows, VARIANT_SCHEMA), building.path / f"{split}_variants.parquet")
    building.info |= {f"{split}_questions": len(examples), f"{split}_wordings": len(rows)}
