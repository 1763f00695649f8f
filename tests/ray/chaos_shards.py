r"""A corpus in shards on a simulated cluster, under SIGKILL while it is embedded, built and
published; and what the shards find against one exact index.  Prints a line of JSON a run.

    python -m tests.ray.chaos_shards --data FOLDER --passages 3000 \
        --kill embedding,building,publishing
    python -m tests.ray.chaos_shards --data FOLDER --passages 30000 --passages 126000

``python -m jobs.reindex`` with ``index.shards=4`` is a process of its own beside a head and two
nodes (``ray.cluster_utils``); ``FOLDER`` holds ``wiki_pool/corpus.jsonl.gz`` and
``squad/questions-dev.jsonl.gz`` (JSON lines with id, title and text; and with question).  The base
is MiniLM in bf16, cut to 32 tokens a passage, so that 126,000 can be embedded on two cores.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from invar_ray.answering.bm25 import FOLDER, Bm25
from invar_ray.answering.retriever import open_retriever
from invar_ray.index.blocks import Vectors, read_vectors
from invar_ray.models.encoder import EncoderSpec, open_encoder
from invar_ray.models.precision import made_in
from invar_ray.store.artifacts import Artifact, Store
from invar_ray.store.published import Published
from serve.records import Found
from serve.service import merge
from tests.ray.chaos import ROOT, Cluster

SHARDS = 4
TOP_K = 10
PHASES = ("embedding", "building", "publishing")


@dataclass
class Outcome:
    """What a run gave.

    Attributes:
        kills: what was killed, and at which second.
        published: versions that were seen by whoever looked while it ran.
        driver_mb: most memory of a driver, each start's.
    """

    passages: int = 0
    kills: list[tuple[str, float]] = field(default_factory=list)
    starts: int = 0
    seconds: float = 0.0
    driver_mb: list[float] = field(default_factory=list)
    published: list[tuple[str, ...]] = field(default_factory=list)
    questions: int = 0
    same_hits: int = 0
    same_scores: int = 0


def start(
    root: Path, corpus: Path, address: str, log: Path, shards: int, more: Sequence[str]
) -> Any:
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "RAY_ADDRESS": address,
    }
    overrides = [
        f"storage.root_uri={root}",
        f"corpus.uri={corpus}",
        "index.encoder=base",
        f"index.shards={shards}",
        "model.retriever_base=builtin:minilm",
        "model.retriever_layers=null",
        "model.passage_max_tokens=32",
        "model.precision=bf16",
        "corpus.chunk_tokens=512",
        "corpus.chunk_stride=512",
        "scale.embed_workers=2",
        "scale.cpus_per_worker=1",
        *more,
    ]
    with open(log, "a") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.reindex", "--config", "tiny", *overrides],
            cwd=ROOT,
            env=env,
            stdout=stream,
            stderr=stream,
        )


def reached(root: Path, phase: str, shards: int) -> bool:
    """Whether a run is in the middle of a phase."""
    if phase == "embedding":
        standing = any(root.glob(".staging/vectors-*/shards/part-*.json"))
        return standing and any(root.glob("vectors/*/manifest.json"))
    if phase == "building":
        return any(root.glob(".staging/index-*/*"))
    return len(list(root.glob("index/*/manifest.json"))) == shards


def run(
    root: Path,
    corpus: Path,
    cluster: Cluster,
    kills: Sequence[str],
    deadline_s: float,
    more: Sequence[str] = (),
    shards: int = SHARDS,
) -> Outcome:
    """Run to the end; in each phase of ``kills`` a node is killed, and the driver with it while it
    publishes.
    """
    log = root.with_suffix(".log")
    outcome, began, left = Outcome(), time.monotonic(), list(kills)
    published = Published(Store(str(root)))
    job = start(root, corpus, cluster.ray.address, log, shards, more)
    outcome.starts, peak = 1, 0.0
    try:
        while True:
            if time.monotonic() - began > deadline_s:
                raise TimeoutError(f"not through after {deadline_s:.0f} s: {log.read_text()}")
            peak = _peak_mb(job.pid) or peak
            version = published.current()
            if version is not None and version.index not in outcome.published:
                outcome.published.append(version.index)
            if left and reached(root, left[0], shards):
                phase = left.pop(0)
                outcome.kills.append((phase, round(time.monotonic() - began, 1)))
                if phase == "publishing":
                    job.kill()
                    job.wait()
                cluster.kill_node(len(outcome.kills) % len(cluster.nodes))
            if job.poll() is not None:
                outcome.driver_mb.append(peak)
                if job.returncode == 0:
                    break
                if len(outcome.kills) + 2 < outcome.starts:
                    raise RuntimeError(log.read_text())
                outcome.starts, peak = outcome.starts + 1, 0.0
                job = start(root, corpus, cluster.ray.address, log, shards, more)
            time.sleep(0.02)
    finally:
        job.kill()
        job.wait()
    if left:
        raise RuntimeError(f"the run was never seen {left[0]}: {log.read_text()}")
    outcome.seconds = round(time.monotonic() - began, 1)
    outcome.published.append(published.need().index)
    return outcome


def _peak_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def ask(outcome: Outcome, root: Path, questions: Sequence[str]) -> None:
    """Hits of the shards, merged as the service does, against an exact search of all vectors."""
    shards = Published(Store(str(root))).open()
    found: list[list[Found]] = []
    for shard in shards:
        retriever = open_retriever(shard.uri)
        lists = retriever.retrieve(questions, TOP_K)
        found.append([Found(tuple(hits), retriever.versions, (), "dense") for hits in lists])
    ids, matrix = _all_vectors(shards)
    spec = EncoderSpec.from_json(shards[0].info["encoder"])
    encoder = open_encoder(spec, shards[0].store, precision=made_in(shards[0]))
    scores = encoder.encode_queries(questions) @ matrix.T
    outcome.passages, outcome.questions = len(ids), len(questions)
    for number, line in enumerate(scores):
        each = [lists[number] for lists in found]
        hits = merge(each, TOP_K, (), each[0].versions).hits
        best = np.argpartition(-line, TOP_K)[:TOP_K]
        exact = sorted((-float(line[row]), ids[row]) for row in best)
        got = [hit.score for hit in hits]
        outcome.same_scores += bool(np.allclose(got, [-score for score, _ in exact], atol=1e-5))
        outcome.same_hits += {hit.passage_id for hit in hits} == {id for _, id in exact}


def _all_vectors(shards: Sequence[Artifact]) -> tuple[list[str], Vectors]:
    parts = [read_vectors(shard.parent("vectors")) for shard in shards]
    return [id for ids, _ in parts for id in ids], np.concatenate([rows for _, rows in parts])


def contents(root: Path) -> dict[str, str]:
    """Checksums of all that the current shards are made of, by artifact and file; of BM25, whose
    words stand in the order of a process's hashes, what it finds.
    """
    found = {}
    for shard in Published(Store(str(root))).open():
        hits = Bm25.open(shard.path(FOLDER)).search(["lighthouse copy 3", "barley seals"], TOP_K)
        found[f"{shard.ref}/{FOLDER}"] = repr(hits)
        for artifact in (shard, shard.parent("vectors"), shard.parent("passages")):
            for name, entry in artifact.manifest.files.items():
                # A shard's .json says what it took to make it.
                if not name.endswith(".json") and not name.startswith(FOLDER):
                    found[f"{artifact.ref}/{name}"] = entry["sha256"]
    return found


def _some(source: Path, target: Path, count: int, of: Callable[[dict[str, Any]], Any]) -> Path:
    with gzip.open(source, "rt") as lines, open(target, "w") as stream:
        for line in itertools.islice(lines, count):
            stream.write(json.dumps(of(json.loads(line))) + "\n")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--passages", type=int, action="append", required=True)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--kill", default="", help=f"of {','.join(PHASES)}")
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds a run")
    parser.add_argument("--folder", default="", help="kept; a temporary one if not named")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args()
    folder = Path(given.folder or tempfile.mkdtemp(prefix="invar-shards-"))
    folder.mkdir(parents=True, exist_ok=True)
    data = Path(given.data)
    asked = _some(
        data / "squad/questions-dev.jsonl.gz",
        folder / "questions.jsonl",
        given.questions,
        lambda row: row["question"],
    )
    questions = [json.loads(line) for line in asked.read_text().splitlines()]
    good = True
    cluster = Cluster()
    try:
        for count in given.passages:
            corpus = _some(
                data / "wiki_pool/corpus.jsonl.gz", folder / f"{count}.jsonl", count, dict
            )
            root = folder / f"store-{count}"
            kills = [phase for phase in given.kill.split(",") if phase]
            outcome = run(root, corpus, cluster, kills, given.deadline, given.overrides)
            ask(outcome, root, questions)
            good = good and outcome.same_scores == outcome.questions
            print(json.dumps(asdict(outcome)), flush=True)
    finally:
        cluster.close()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
