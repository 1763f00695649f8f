"""What a new version costs when little has changed, and whether it finds what a full rebuild finds.

    python -m benchmarks.reindex_changes --corpus corpus.jsonl.gz --rows 20000 --encoder minilm
    --rebuild

Makes a full version of the first ``--rows`` documents, then a version with 1 % of them changed, 1 %
deleted and 1 % new ones, then (``--rebuild``) the same anew in another store, and compares the hits
of 500 questions (titles with words of the text).  CPU time is what reading, cutting, embedding
(driver and actors) and building the index took; starting (Ray, imports, weights) is listed apart.
Give ``--folder`` to keep the stores; a version that stands there is used.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from invar_ray.answering.retriever import open_retriever
from invar_ray.config import load_config
from invar_ray.pipeline import Pipeline
from invar_ray.store.artifacts import Artifact

SHARE = 0.01
QUESTIONS = 500
NEAR = 1e-5
"""Scores closer than this count as equal: vectors of other batches differ by float16's rounding."""


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True, help="JSON lines, .gz or not")
    parser.add_argument("--rows", type=int, default=20000)
    parser.add_argument("--encoder", choices=("minilm", "base"), default="minilm")
    parser.add_argument(
        "--rebuild", action="store_true", help="make the new version anew as well, and compare"
    )
    parser.add_argument("--folder", default="")
    parser.add_argument("--out", default="runs/benchmarks/reindex_changes.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the config")
    arguments = parser.parse_args()
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="invar-changes-"))
    folder.mkdir(parents=True, exist_ok=True)
    before, after = corpora(Path(arguments.corpus), arguments.rows, folder)
    settings = [f"index.encoder={arguments.encoder}", *arguments.overrides]
    full, full_cost = version(folder / "store", before, settings)
    part, part_cost = version(folder / "store", after, settings)
    changes, vectors = part.parent("passages").info["changes"], part.parent("vectors").info
    result: dict[str, Any] = {
        "passages": full.parent("passages").info["passages"],
        "changes": changes,
        "embedded": vectors["embedded"],
        "re-used": vectors["reused"],
        "tombstones": vectors["tombstones"],
        "CPU s, full": full_cost,
        "CPU s, new version": part_cost,
        "share": round(part_cost["work"] / full_cost["work"], 4) if full_cost["work"] else None,
    }
    if arguments.rebuild:
        whole, _ = version(folder / "rebuilt", after, settings)
        result["hits"] = compare(part, whole, after)
    print(json.dumps(result, indent=2))
    target = Path(arguments.out)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def corpora(source: Path, count: int, folder: Path) -> tuple[Path, Path]:
    """The corpus and how it looks the next day."""
    with (
        gzip.open(source, "rt", encoding="utf-8")
        if source.suffix == ".gz"
        else open(source, encoding="utf-8") as lines
    ):
        rows = [json.loads(line) for line in itertools.islice(lines, count + round(count * SHARE))]
    draw = random.Random(0)
    few = round(count * SHARE)
    touched = draw.sample(range(count), 2 * few)
    changed, deleted = set(touched[:few]), set(touched[few:])
    edited = [
        {**row, "text": f"{row['text']} This was added on day two."} if at in changed else row
        for at, row in enumerate(rows[:count])
        if at not in deleted
    ]
    for row in rows[count:]:
        edited.insert(draw.randrange(len(edited)), row)
    places = folder / "before.jsonl", folder / "after.jsonl"
    for place, content in zip(places, (rows[:count], edited), strict=True):
        place.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return places


def version(root: Path, corpus: Path, settings: list[str]) -> tuple[Artifact, dict[str, float]]:
    """An index of the corpus, and its CPU seconds."""
    config = load_config("tiny", [f"storage.root_uri={root}", f"corpus.uri={corpus}", *settings])
    with Pipeline(config) as pipeline:
        _ = pipeline.base  # the embedded base is no part of a version
        index = pipeline.reindexed
        cpu = index.parent("vectors").info["usage"]["cpu_s"]
        steps = {
            label: value for label, value in pipeline.cpu_seconds.items() if "embed" not in label
        }
        steps.pop("base model", None)
    cost = {
        "read and cut": steps.get("passages", 0.0),
        "embed": cpu["encode"],
        "driver": cpu["driver"],
    }
    cost["index"] = sum(value for label, value in steps.items() if label.startswith("index"))
    return index, {**cost, "work": round(sum(cost.values()), 2), "start-up, apart": cpu["start"]}


def compare(part: Artifact, whole: Artifact, corpus: Path) -> dict[str, Any]:
    """Hits of both for the same questions."""
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    asked = []
    for row in random.Random(1).sample(rows, min(QUESTIONS, len(rows))):
        words = row["text"].split()
        at = len(words) // 3
        asked.append(f"{row['title']} {' '.join(words[at : at + 8])}")
    left, right = (open_retriever(index.uri).retrieve(asked, 10) for index in (part, whole))
    same = swapped = 0
    largest = 0.0
    for one, other in zip(left, right, strict=True):
        pairs = list(zip(one, other, strict=True))
        largest = max([largest, *(abs(a.score - b.score) for a, b in pairs)])
        if [hit.passage_id for hit in one] == [hit.passage_id for hit in other]:
            same += 1
        elif all(a.passage_id == b.passage_id or abs(a.score - b.score) < NEAR for a, b in pairs):
            swapped += 1
    return {
        "questions": len(asked),
        "the same ten in the same order": same,
        "the same up to scores that differ by less than 1e-5": swapped,
        "largest difference of a score": largest,
    }


if __name__ == "__main__":
    main()
