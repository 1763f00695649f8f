"""What it costs to keep things: a new index version after 1 % changed, checking an artifact, the
report of 400 questions.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.contest import OURS, Contest, Measured, Side
from benchmarks.groups.texts import mixed_lengths
from invar_ray.config import load_config
from invar_ray.executor import Here
from invar_ray.pipeline import Pipeline
from invar_ray.store.artifacts import Building, Plan, Store

SHARE = 0.01


def contests(full: bool, folder: Path) -> list[Contest]:
    """Three."""
    rows, megabytes = (5000, 1024) if full else (400, 128)
    reindex = (
        Side(OURS, "keep:version", {"rows": rows, "changed": True}),
        Side("all anew", "keep:version", {"rows": rows, "changed": False}),
    )
    verify = (
        Side(OURS, "keep:verify", {"megabytes": megabytes}),
        Side("sha256sum", "keep:sha256sum", {"megabytes": megabytes}),
    )
    report = (Side(OURS, "keep:report", {"folder": str(folder)}),)
    return [
        Contest("keep reindex 1 %", "version", 1, reindex),
        Contest("keep verify", "MB", megabytes, verify),
        Contest("keep report", "question", 400, report),
    ]


def version(rows: int, changed: bool) -> Callable[[], Measured]:
    """An index version of the corpus: after 1 % of its documents changed, 1 % went and 1 % came,
    from the version before; or anew.  MiniLM, in one process.
    """
    few = max(1, round(rows * SHARE))
    texts = mixed_lengths(rows + few)
    before = [{"id": f"t{at}", "title": "", "text": text} for at, text in enumerate(texts)]
    draw = random.Random(0)
    touched = draw.sample(range(rows), 2 * few)
    after = [
        {**row, "text": f"{row['text']} Added."} if at in touched[:few] else row
        for at, row in enumerate(before)
        if at not in touched[few:]
    ]
    folder = Path(tempfile.mkdtemp(prefix="invar-bench-"))
    first = _write(folder / "before.jsonl", before[:rows])
    second = _write(folder / "after.jsonl", after)
    if changed:
        _index(folder / "first", first)
    number = 0

    def work() -> Measured:
        nonlocal number
        number += 1
        store = folder / f"store-{number}"
        if changed:
            shutil.copytree(folder / "first", store)
        clock, cpu = os.times().elapsed, sum(os.times()[:2])
        _index(store, second)
        found = Measured(os.times().elapsed - clock, sum(os.times()[:2]) - cpu)
        shutil.rmtree(store)
        return found

    return work


def _write(place: Path, rows: list[dict[str, str]]) -> Path:
    place.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return place


def _index(store: Path, corpus: Path) -> None:
    settings = [
        f"storage.root_uri={store}",
        f"corpus.uri={corpus}",
        "index.encoder=minilm",
        "corpus.chunk_tokens=512",
        "corpus.chunk_stride=512",
    ]
    _ = Pipeline(load_config("tiny", settings), quiet=True, executor=Here()).reindexed


def _artifact(megabytes: int) -> Any:
    store = Store(tempfile.mkdtemp(prefix="invar-bench-"))

    def build(building: Building) -> None:
        for number in range(8):
            (building.path / f"part-{number}").write_bytes(os.urandom(megabytes * 2**20 // 8))

    return store.get_or_build(Plan("vectors", "bench", {}), build)[0]


def verify(megabytes: int) -> Callable[[], None]:
    """Every file of an artifact against its manifest."""
    artifact = _artifact(megabytes)
    return lambda: artifact.verify()


def sha256sum(megabytes: int) -> Callable[[], None]:
    """The same files through coreutils."""
    folder = _artifact(megabytes).path(".")
    files = [str(path) for path in sorted(Path(folder).glob("part-*"))]

    def work() -> None:
        subprocess.run(["sha256sum", *files], check=True, capture_output=True)

    return work


def report(folder: str) -> Callable[[], Measured]:
    """Metrics, intervals, comparisons, TREC files and pages of 400 questions found by BM25; hits
    stand.
    """
    settings = [
        f"storage.root_uri={folder}/report",
        "questions.dev_limit=400",
        "corpus.distractors=200",
        "evaluation.systems=[bm25]",
        "evaluation.num_answers=0",
    ]
    config = load_config("tiny", settings)
    _ = Pipeline(config, quiet=True, executor=Here()).report

    def work() -> Measured:
        for made in Path(folder, "report", "report").iterdir():
            shutil.rmtree(made)
        pipeline = Pipeline(config, quiet=True, executor=Here())
        clock, cpu = os.times().elapsed, sum(os.times()[:2])
        found = pipeline.report
        spent = os.times().elapsed - clock, sum(os.times()[:2]) - cpu
        rows = json.loads(found.path("report.json").read_text(encoding="utf-8"))["rows"]
        return Measured(*spent, notes={"rows": float(len(rows))})

    return work
