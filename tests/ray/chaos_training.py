"""Stage 1's training under SIGKILL: workers, the driver, a simulated node.  Prints a table and
checks four things.

    python -m tests.ray.chaos_training --kills 10 --out docs/chaos-training.md

A cluster of a head and two nodes (``ray.cluster_utils``) runs in this process;
``python -m jobs.train_retriever`` is a process of its own, started again whenever it was killed.
Its two workers note each step that they begin.  At random steps, and sometimes while a run is still
starting, one of the three kinds is killed with SIGKILL.  Then:

1. the adapter's files equal those of a run that nothing disturbed, byte for byte;
2. the log of all steps equals its log (but for the clock);
3. no kill cost more than a checkpoint's steps, or two where its report was in flight;
4. every kill was followed by steps of new workers.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invar_ray.store.artifacts import Artifact, Store
from tests.distributed.small_store import OVERRIDES, small_store
from tests.ray.chaos import WORKERS, Cluster

ROOT = Path(__file__).parents[2]
KINDS = ("worker", "driver", "node")
LEAST_LEFT = (
    12  # steps that no kill is planned in: the run must not be through before the last kill
)


@dataclass(frozen=True)
class Note:
    """A worker began a step: ``step`` of them were done then."""

    at: float
    pid: int
    rank: int
    step: int


@dataclass
class Kill:
    """One kill.

    Attributes:
        kind: of ``KINDS``.
        at: by the clock of the notes.
        starting: it came before the run had begun a step.
        done: steps that were done.
        resumed: step from which new workers went on; ``None`` if the next kill came first.
    """

    kind: str
    at: float
    starting: bool
    done: int = 0
    resumed: int | None = None

    @property
    def lost(self) -> int:
        """Steps that were done twice."""
        return 0 if self.resumed is None else self.done - self.resumed


@dataclass
class Outcome:
    """What a run under kills gave."""

    steps: int
    checkpoint_every: int
    kills: list[Kill] = field(default_factory=list)
    began: float = 0.0
    drivers: int = 0
    seconds: float = 0.0
    steps_begun: int = 0
    same_files: bool = False
    same_log: bool = False

    def faults(self) -> list[str]:
        """What must not be."""
        found = [] if self.same_files else ["the adapter differs"]
        found += [] if self.same_log else ["the log differs"]
        found += [
            f"kill {number} cost {kill.lost} steps"
            for number, kill in enumerate(self.kills, 1)
            if kill.lost > 2 * self.checkpoint_every
        ]
        if self.kills and self.kills[-1].resumed is None:
            found.append("nothing went on after the last kill")
        return found


def noting(place: str) -> Callable[[dict[str, Any]], Any]:
    """The training function, which also notes in the folder ``place`` each step that it begins.

    A nested function: Ray sends its code, so that the workers need not import this file.
    """

    def work(payload: dict[str, Any]) -> Any:
        import os
        import time

        from invar_ray.training.worker import STAGES, train_worker

        real = STAGES[payload["stage"]]

        def make(config: Any, store: Any, inputs: Any, rank: int, world_size: int) -> Any:
            stage = real(config, store, inputs, rank, world_size)
            plain_loss = stage.loss

            def loss(forward: Any, step: int) -> Any:
                with open(f"{place}/{os.getpid()}", "a") as stream:
                    stream.write(f"{time.time()} {os.getpid()} {rank} {step}\n")
                return plain_loss(forward, step)

            stage.loss = loss
            return stage

        STAGES[payload["stage"]] = make
        return dict(train_worker(payload))

    return work


def read_notes(folder: Path) -> list[Note]:
    """All notes of all workers by time; a last line that is only half written is left out."""
    found = []
    for path in folder.iterdir():
        for line in path.read_text().splitlines(keepends=True):
            parts = line.split()
            if line.endswith("\n") and len(parts) == 4:
                found.append(Note(float(parts[0]), int(parts[1]), int(parts[2]), int(parts[3])))
    return sorted(found, key=lambda note: note.at)


def settings(root: Path, steps: int, checkpoint_every: int) -> list[str]:
    return [
        "--config",
        "tiny",
        f"storage.root_uri={root}",
        *OVERRIDES,
        f"retriever.steps={steps}",
        # Dropout draws from a random state: a resumed run must repeat it.
        "retriever.lora.dropout=0.1",
        f"scale.checkpoint_every={checkpoint_every}",
        "scale.max_failures=100",
        "scale.cpus_per_worker=1",
        f"scale.num_workers={WORKERS}",
    ]


def start_job(arguments: list[str], notes: Path, address: str, log: Path) -> subprocess.Popen[Any]:
    """The job, with workers that note their steps below ``notes``."""
    notes.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.ray.chaos_training", "--job", str(notes), *arguments],
            cwd=ROOT,
            env=os.environ | {"RAY_ADDRESS": address},
            stdout=stream,
            stderr=stream,
        )


def run_job_noting(notes: str, arguments: list[str]) -> None:
    """``python -m jobs.train_retriever ARGUMENTS``, noted."""
    from invar_ray.training import trainer
    from jobs import train_retriever
    from jobs.entry import run_job

    setattr(trainer, "_work", noting(notes))  # noqa: B010
    sys.argv = ["jobs.train_retriever", *arguments]
    run_job(train_retriever.__doc__ or "", train_retriever.main)


def plan_kills(count: int, steps: int, draw: random.Random) -> list[tuple[str, int | None]]:
    """(kind, step from which it may come, or ``None`` for a run that is starting): every kind is
    met.
    """
    kinds = [KINDS[number % 3] for number in range(count)]
    draw.shuffle(kinds)
    at = sorted(draw.sample(range(1, steps - LEAST_LEFT), count))
    # While a run starts there is no worker to kill yet.
    early = draw.sample(
        [number for number in range(1, count) if kinds[number] != "worker"], count // 5
    )
    return [(kind, None if number in early else at[number]) for number, kind in enumerate(kinds)]


def disturb(
    outcome: Outcome,
    cluster: Cluster,
    arguments: list[str],
    folder: Path,
    count: int,
    seed: int,
    deadline_s: float,
) -> None:
    """Run to the end under ``count`` kills."""
    draw, notes, log = random.Random(seed), folder / "notes-killed", folder / "killed.log"
    plan = plan_kills(count, outcome.steps, draw)
    outcome.began = time.time()
    job = start_job(arguments, notes, cluster.ray.address, log)
    outcome.drivers, seen = 1, set[int]()
    try:
        while job.poll() is None or job.returncode != 0 or len(outcome.kills) < count:
            if time.time() - outcome.began > deadline_s:
                raise TimeoutError(
                    f"not through after {deadline_s:.0f} s; {len(outcome.kills)} kills"
                )
            if job.poll() is not None:
                if job.returncode == 0:
                    raise RuntimeError(
                        f"through after {len(outcome.kills)} of {count} kills: take more steps"
                    )
                # A run that failed is started again, as an operator would.
                outcome.drivers += 1
                job = start_job(arguments, notes, cluster.ray.address, log)
            time.sleep(0.05)
            if len(outcome.kills) == count:
                continue
            kind, step = plan[len(outcome.kills)]
            fresh = [note for note in read_notes(notes) if note.pid not in seen]
            if step is None:
                time.sleep(draw.uniform(0.0, 8.0))
            elif not {note.rank for note in fresh} >= set(range(WORKERS)) or fresh[-1].step < step:
                continue
            else:
                time.sleep(draw.uniform(0.0, 0.5))
            before, moment = read_notes(notes), time.time()
            if kind == "worker":
                victim = draw.choice(sorted({note.pid for note in before} - seen))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            elif kind == "driver":
                job.kill()
                job.wait()
            else:
                cluster.kill_node(draw.randrange(WORKERS))
            starting = not {note.pid for note in before} - seen
            outcome.kills.append(Kill(kind, moment, starting))
            seen |= {note.pid for note in before}
            print(
                f"  {time.time() - outcome.began:6.0f} s: {kind} killed{' at start' * starting}",
                flush=True,
            )
            if kind == "driver":
                outcome.drivers += 1
                job = start_job(arguments, notes, cluster.ray.address, log)
    finally:
        job.kill()
        job.wait()
    outcome.seconds = time.time() - outcome.began
    account(outcome, read_notes(notes))


def account(outcome: Outcome, notes: list[Note]) -> None:
    """What each kill cost, from the notes of rank 0."""
    mine = [note for note in notes if note.rank == 0]
    outcome.steps_begun = len(mine)
    old: set[int] = set()
    for kill, until in zip(
        outcome.kills, [*(kill.at for kill in outcome.kills[1:]), float("inf")], strict=True
    ):
        old |= {note.pid for note in mine if note.at <= kill.at}
        life = [note for note in mine if note.pid in old]
        if not life:
            kill.done, kill.resumed = 0, None
            continue
        # The life that was cut off is the last of those that had begun.
        kill.done = life[-1].step
        after = [note for note in mine if note.pid not in old and note.at <= until]
        kill.resumed = after[0].step if after else None


def adapter(root: Path) -> Artifact:
    [found] = Store(str(root)).list("retriever")
    return found


def files_of(found: Artifact) -> dict[str, str]:
    names = found.manifest.files.items()
    return {name: str(entry["sha256"]) for name, entry in names if name.startswith("adapter/")}


def log_of(found: Artifact) -> list[dict[str, Any]]:
    """The log without its clock; JSON keeps every bit of a float."""
    lines = found.path("log.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key != "tokens_per_s"}
        for line in lines
    ]


def run(
    folder: Path, kills: int, steps: int, checkpoint_every: int, seed: int, deadline_s: float
) -> Outcome:
    """Both runs in one cluster, and the comparison; logs are in ``folder``."""
    os.environ.update(
        OMP_NUM_THREADS="1", RAY_AUTH_MODE="disabled", HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu"
    )
    os.environ.pop("RAY_ADDRESS", None)
    whole, killed = folder / "whole", folder / "killed"
    small_store(whole, [f"retriever.steps={steps}"])
    shutil.copytree(whole, killed)
    outcome = Outcome(steps, checkpoint_every)
    cluster = Cluster()
    try:
        first = start_job(
            settings(whole, steps, checkpoint_every),
            folder / "notes-whole",
            cluster.ray.address,
            folder / "whole.log",
        )
        try:
            if first.wait(timeout=deadline_s) != 0:
                raise RuntimeError((folder / "whole.log").read_text()[-5000:])
        finally:
            first.kill()
        disturb(
            outcome,
            cluster,
            settings(killed, steps, checkpoint_every),
            folder,
            kills,
            seed,
            deadline_s,
        )
    finally:
        cluster.close()
    found, expected = adapter(killed), adapter(whole)
    outcome.same_files = files_of(found) == files_of(
        expected
    ) and "adapter/adapter_model.safetensors" in files_of(found)
    outcome.same_log = log_of(found) == log_of(expected) and len(log_of(found)) == steps
    return outcome


def page(outcome: Outcome) -> str:
    """The outcome as Markdown."""
    kinds = {kind: sum(kill.kind == kind for kill in outcome.kills) for kind in KINDS}
    yes = {True: "yes", False: "**no**"}
    rows = []
    for number, kill in enumerate(outcome.kills, 1):
        resumed = "killed again first" if kill.resumed is None else str(kill.resumed)
        what = kill.kind + ", while the run was starting" * kill.starting
        rows.append(
            f"| {number} | {what} | {kill.at - outcome.began:.0f} | {kill.done} | {resumed} | "
            f"{kill.lost} |"
        )
    return "\n".join(
        [
            "# Training under SIGKILL",
            "",
            "Made by `python -m tests.ray.chaos_training`; do not edit. One run of stage 1 (two "
            "workers, ZeRO-2,",
            "dropout, the one-layer base of the tests), killed at random moments and resumed, "
            "against a run that",
            "nothing disturbed. Nodes are simulated on one machine.",
            "",
            "| | |",
            "|---|---|",
            f"| kills | {len(outcome.kills)} "
            f"({', '.join(f'{count} {kind}' for kind, count in kinds.items())}) |",
            f"| steps, steps between checkpoints | {outcome.steps}, {outcome.checkpoint_every} |",
            f"| starts of the job | {outcome.drivers} |",
            f"| seconds | {outcome.seconds:.0f} |",
            f"| adapter equal byte for byte | {yes[outcome.same_files]} |",
            "| loss and every other number of each step equal bit for bit | "
            f"{yes[outcome.same_log]} |",
            f"| steps begun, lost to kills | {outcome.steps_begun}, "
            f"{sum(kill.lost for kill in outcome.kills)} |",
            "",
            "`done` counts finished steps at the kill, `went on from` those that the checkpoint "
            "held; the difference",
            "was computed twice.",
            "",
            "| kill | what | second | done | went on from | lost |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    if sys.argv[1:2] == ["--job"]:
        run_job_noting(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checkpoint-every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds")
    parser.add_argument("--out", default="")
    parser.add_argument("--folder", default="", help="kept; a temporary one if not named")
    arguments = parser.parse_args()
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="invar-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    outcome = run(
        folder,
        arguments.kills,
        arguments.steps,
        arguments.checkpoint_every,
        arguments.seed,
        arguments.deadline,
    )
    text = page(outcome)
    print(text)
    print(json.dumps({"folder": str(folder), "faults": outcome.faults()}))
    if arguments.out:
        Path(arguments.out).write_text(text, encoding="utf-8")
    if outcome.faults():
        sys.exit(1)


if __name__ == "__main__":
    main()
