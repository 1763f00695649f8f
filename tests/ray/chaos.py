"""A reindexing run under SIGKILL: actors, the driver, a simulated node.  Prints a table and checks
three things.

    python -m tests.ray.chaos --kills 20 --out docs/chaos.md

A cluster of a head and two nodes (``ray.cluster_utils``) runs in this process;
``python -m jobs.reindex`` is a process of its own, started again whenever it was killed.  At random
moments one of the three kinds is killed with SIGKILL. Then:

1. the index has the ids of a run that nothing disturbed, and vectors equal bit for bit;
2. no shard that stood at a kill was made again (its file is the same file, by inode and time), so
   at most those in flight were;
3. ``jobs.verify_index`` finds no fault.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from invar_ray.index.blocks import read_vectors
from invar_ray.store.artifacts import Store
from tests.support import documents, write_lines

ROOT = Path(__file__).parents[2]
WORKERS = 2
KINDS = ("actor", "driver", "node")


@dataclass
class Kill:
    """One kill.

    Attributes:
        standing: shards that stood at that moment, by first row: (inode, time of writing).
        in_flight: shards that were handed out and did not stand; one an actor.
    """

    kind: str
    second: float
    standing: dict[int, tuple[int, int]]


@dataclass
class Outcome:
    """What a run under kills gave."""

    kills: list[Kill] = field(default_factory=list)
    shards: int = 0
    redone: int = 0
    drivers: int = 0
    seconds: float = 0.0
    same_ids: bool = False
    same_bits: bool = False
    faults: str = ""


def make_corpus(folder: Path, copies: int) -> Path:
    """Documents of several passages each, no two alike."""
    rows = [
        {
            **row,
            "id": f"{row['id']}-{copy}",
            "text": row["text"].replace(". ", f", says copy {copy}. "),
        }
        for copy in range(copies)
        for row in documents()
    ]
    return write_lines(folder / "corpus.jsonl", rows)


def overrides(root: Path, corpus: Path) -> list[str]:
    return [
        "--config",
        "tiny",
        f"storage.root_uri={root}",
        f"corpus.uri={corpus}",
        "index.encoder=minilm",
        "corpus.chunk_tokens=192",
        "corpus.chunk_stride=192",
        "scale.shard_rows=8",
        f"scale.embed_workers={WORKERS}",
        "scale.cpus_per_worker=1",
    ]


def start_job(
    root: Path, corpus: Path, address: str | None, log: Path, verb: str = "reindex"
) -> subprocess.Popen[Any]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    env.pop("RAY_ADDRESS", None)
    if address is not None:
        env["RAY_ADDRESS"] = address
    with open(log, "a") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", f"jobs.{verb}", *overrides(root, corpus)],
            cwd=ROOT,
            env=env,
            stdout=stream,
            stderr=stream,
        )


def standing(root: Path) -> dict[int, tuple[int, int]]:
    """Shards that count: those with an entry."""
    found = {}
    for path in root.glob(".staging/vectors-*/shards/part-*.json"):
        with contextlib.suppress(FileNotFoundError):  # the run went on in between
            status = path.with_suffix(".parquet").stat()
            found[int(path.stem.removeprefix("part-"))] = (status.st_ino, status.st_mtime_ns)
    return found


def actors(cluster: Cluster) -> list[psutil.Process]:
    """Embedding actors of this cluster's nodes."""
    found = []
    for node in cluster.ray.list_all_nodes():
        for entry in node.all_processes.get("raylet", []):
            with contextlib.suppress(psutil.Error):
                for process in psutil.Process(entry.process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if "EmbedShard" in " ".join(process.cmdline()):
                            found.append(process)
    return found


class Cluster:
    """A head and nodes of this process, in a folder of its own."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="ic", dir="/tmp")
        # Ray notes the address of its newest cluster there, for whoever starts without one: not in
        # the common /tmp.
        os.environ["RAY_TMPDIR"] = self.folder
        os.mkdir(f"{self.folder}/ray")
        from ray.cluster_utils import Cluster as RayCluster

        self.ray = RayCluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "temp_dir": f"{self.folder}/ray",
                **_SMALL,
            },
        )
        self.nodes = [self._add() for _ in range(WORKERS)]

    def _add(self) -> Any:
        return self.ray.add_node(num_cpus=1, **_SMALL)

    def kill_node(self, number: int) -> None:
        """Kill a node's processes and put a new node in its place."""
        self.ray.remove_node(self.nodes[number], allow_graceful=False)
        self.nodes[number] = self._add()

    def close(self) -> None:
        self.ray.shutdown()
        os.environ.pop("RAY_TMPDIR", None)
        shutil.rmtree(self.folder, ignore_errors=True)


_SMALL = {"object_store_memory": 150 * 1024**2}


def disturb(
    root: Path, corpus: Path, count: int, seed: int, log: Path, deadline_s: float
) -> Outcome:
    """Run to the end under ``count`` kills."""
    draw, outcome, started = random.Random(seed), Outcome(), time.monotonic()
    # every kind is met, most often the cheap one
    order = [KINDS[number % 3] for number in range(count)]
    draw.shuffle(order)
    cluster = Cluster()
    job = start_job(root, corpus, cluster.ray.address, log)
    outcome.drivers = 1
    seen = 0
    try:
        while True:
            if time.monotonic() - started > deadline_s:
                raise TimeoutError(
                    f"not through after {deadline_s:.0f} s; {len(outcome.kills)} kills"
                )
            if job.poll() is not None:
                if job.returncode == 0:
                    break
                # e.g. Ray gave up on a node that went: a run that failed is started again, as an
                # operator would
                outcome.drivers += 1
                job = start_job(root, corpus, cluster.ray.address, log)
            time.sleep(draw.uniform(0.05, 0.4))
            done = standing(root)
            if len(outcome.kills) == count or len(done) <= seen:  # let each life finish something
                continue
            kind = order[len(outcome.kills)]
            victims = actors(cluster)
            if kind == "actor" and not victims:
                continue
            time.sleep(draw.uniform(0.0, 1.0))
            outcome.kills.append(Kill(kind, time.monotonic() - started, standing(root)))
            seen = len(outcome.kills[-1].standing)
            if kind == "actor":
                with contextlib.suppress(psutil.Error):
                    draw.choice(victims).send_signal(signal.SIGKILL)
            elif kind == "driver":
                job.kill()
                job.wait()
                outcome.drivers += 1
                job = start_job(root, corpus, cluster.ray.address, log)
            else:
                cluster.kill_node(draw.randrange(WORKERS))
            print(
                f"  {outcome.kills[-1].second:6.0f} s: {kind} killed, {seen} shards stand",
                flush=True,
            )
    finally:
        job.kill()
        cluster.close()
    outcome.seconds = time.monotonic() - started
    return outcome


def judge(outcome: Outcome, root: Path, whole: Path, corpus: Path, log: Path) -> Outcome:
    """Compare with the run that nothing disturbed."""
    ids, matrix = read_vectors(_vectors(root))
    expected_ids, expected = read_vectors(_vectors(whole))
    outcome.same_ids = ids == expected_ids
    outcome.same_bits = bool(np.array_equal(matrix, expected))
    folder = _vectors(root).path("shards")
    final = {
        int(path.stem.removeprefix("part-")): path.stat() for path in folder.glob("part-*.parquet")
    }
    outcome.shards = len(final)
    outcome.redone = sum(
        (final[start].st_ino, final[start].st_mtime_ns) != written
        for kill in outcome.kills
        for start, written in kill.standing.items()
    )
    verify = start_job(root, corpus, None, log, "verify_index")
    outcome.faults = (
        "" if verify.wait(timeout=300) == 0 else "jobs.verify_index failed, see the log"
    )
    return outcome


def _vectors(root: Path) -> Any:
    [found] = Store(str(root)).list("vectors")
    return found


def run(folder: Path, kills: int, copies: int, seed: int, deadline_s: float) -> Outcome:
    """Both runs and the comparison; logs are in ``folder``."""
    corpus = make_corpus(folder, copies)
    whole = start_job(folder / "whole", corpus, None, folder / "whole.log")
    if whole.wait(timeout=deadline_s) != 0:
        raise RuntimeError((folder / "whole.log").read_text())
    outcome = disturb(folder / "killed", corpus, kills, seed, folder / "killed.log", deadline_s)
    return judge(outcome, folder / "killed", folder / "whole", corpus, folder / "killed.log")


def page(outcome: Outcome) -> str:
    """The outcome as Markdown."""
    kinds = {kind: sum(kill.kind == kind for kill in outcome.kills) for kind in KINDS}
    rows = [
        f"| {at} | {kill.kind} | {kill.second:.0f} | {len(kill.standing)} |"
        for at, kill in enumerate(outcome.kills, 1)
    ]
    yes = {True: "yes", False: "**no**"}
    return "\n".join(
        [
            "# Reindexing under SIGKILL",
            "",
            "Made by `python -m tests.ray.chaos`; do not edit. One run, killed at random moments, "
            "against a run that",
            "nothing disturbed.",
            "",
            "| | |",
            "|---|---|",
            f"| kills | {len(outcome.kills)} "
            f"({', '.join(f'{count} {kind}' for kind, count in kinds.items())}) |",
            f"| shards, embedding actors | {outcome.shards}, {WORKERS} |",
            f"| starts of the job | {outcome.drivers} |",
            f"| seconds | {outcome.seconds:.0f} |",
            f"| same ids in the same order | {yes[outcome.same_ids]} |",
            f"| vectors equal bit for bit | {yes[outcome.same_bits]} |",
            f"| shards made again that stood at a kill | {outcome.redone} |",
            f"| faults that verify_index finds | {outcome.faults or 'none'} |",
            "",
            "| kill | what | second | shards that stood |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--copies", type=int, default=150, help="the corpus: 12 documents times this"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds")
    parser.add_argument("--out", default="")
    parser.add_argument("--folder", default="", help="kept; a temporary one if not named")
    arguments = parser.parse_args()
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="invar-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    outcome = run(folder, arguments.kills, arguments.copies, arguments.seed, arguments.deadline)
    text = page(outcome)
    print(text)
    print(json.dumps({"folder": str(folder)}))
    if arguments.out:
        Path(arguments.out).write_text(text, encoding="utf-8")
    if outcome.redone or outcome.faults or not (outcome.same_ids and outcome.same_bits):
        sys.exit(1)


if __name__ == "__main__":
    main()
