"""Reading alone: a stage-2 generator against its bare base, both given each question's gold
passage.

    .venv/bin/python -m benchmarks.oracle_answers --generator
    runs/mine/generator/mine-0123456789abcdef \\
        --corpus corpus.jsonl.gz --questions dev.jsonl.gz --limit 500 --out
        runs/benchmarks/oracle.json

Prints and writes exact match, F1 and the share of refusals of each, and the paired difference with
its interval (cluster bootstrap over gold passages).  The questions must not be those that the
generator was trained on.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from invar_ray.answering.rag import TextGenerator, answer_batch
from invar_ray.corpus.readers import read_documents, read_examples
from invar_ray.evaluation.scoring import answer_rule
from invar_ray.evaluation.significance import paired_cluster_bootstrap
from invar_ray.models.base import BaseRef
from invar_ray.models.loading import open_base_generator, open_generator
from invar_ray.schema import Document, Example, Hit
from invar_ray.store.artifacts import open_artifact

BATCH = 16


def load(
    corpus: str, questions: str, limit: int | None, seed: int
) -> tuple[list[Example], dict[str, Document]]:
    """A seeded sample of the questions, and their gold documents."""
    examples = list(read_examples(questions))
    if limit is not None and limit < len(examples):
        examples = random.Random(seed).sample(examples, limit)
    wanted = {example.positive_ids[0] for example in examples}
    return examples, {
        document.id: document for document in read_documents(corpus) if document.id in wanted
    }


def measure(
    name: str,
    generator: TextGenerator,
    examples: Sequence[Example],
    gold: dict[str, Document],
    max_new_tokens: int,
) -> dict[str, Any]:
    """Exact match, F1 and refusal of each question, and their means."""
    rule, started = answer_rule("squad"), time.monotonic()
    exact, f1, refused = [], [], []
    for first in range(0, len(examples), BATCH):
        part = examples[first : first + BATCH]
        documents = [gold[example.positive_ids[0]] for example in part]
        answers = answer_batch(
            generator,
            [example.question for example in part],
            [[Hit(one.id, one.id, 1, 1.0, one.title, one.text, one.uri)] for one in documents],
            max_new_tokens=max_new_tokens,
            batch_size=BATCH,
        )
        for example, answer in zip(part, answers, strict=True):
            score = rule.score(answer.text, example.answers)
            exact.append(float(score.exact_match))
            f1.append(float(score.f1))
            refused.append(float(answer.refused))
        done, seconds = len(exact), time.monotonic() - started
        left = seconds / done * (len(examples) - done)
        print(
            f"  {name}: {done}/{len(examples)} questions, ETA {left:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return {
        "exact_match": fmean(exact),
        "f1": fmean(f1),
        "refused": fmean(refused),
        "seconds": round(time.monotonic() - started, 1),
        "each": {"exact_match": exact, "f1": f1},
    }


def main() -> None:
    """Measure both and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--generator", required=True, help="artifact of kind generator")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    artifact = open_artifact(arguments.generator, "generator")
    examples, gold = load(arguments.corpus, arguments.questions, arguments.limit, arguments.seed)
    length = int(artifact.info["max_new_tokens"])
    base = open_base_generator(
        BaseRef(**artifact.info["base"]), artifact.store, artifact.info["max_context"]
    )
    found = {"base": measure("base", base, examples, gold, length)}
    del base
    found["stage 2"] = measure(
        "stage 2", open_generator(arguments.generator), examples, gold, length
    )
    clusters = [example.positive_ids[0] for example in examples]
    result: dict[str, Any] = {
        "generator": artifact.ref,
        "questions": len(examples),
        "gold passages": len(set(clusters)),
        "systems": {
            name: {key: row[key] for key in row if key != "each"} for name, row in found.items()
        },
    }
    for metric in ("exact_match", "f1"):
        difference = paired_cluster_bootstrap(
            found["stage 2"]["each"][metric],
            found["base"]["each"][metric],
            clusters,
            seed=arguments.seed,
        )
        result[f"difference in {metric}"] = [difference.mean, difference.low, difference.high]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
