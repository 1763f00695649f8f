"""A contest: one piece of work done by several sides in turn, and what came of it.

Each side is a process of its own, made once; rounds alternate, and who begins changes from round to
round.  A side is a function that prepares everything and returns another one, the work of a round:

    def ours(count: int) -> Callable[[], Measured | None]

The harness takes clock and CPU time around a round; a round that knows better (it has to leave out
its own preparation, or reads a server's latency) returns a :class:`Measured`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
OURS = "invar_ray"
_MARK = "@@"
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # processes x threads: 1 x 1, unless a group says otherwise
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Side:
    """Who does the work.

    Attributes:
        name: as shown; ``OURS`` for this project.
        call: ``module:function`` below ``benchmarks.groups``.
        arguments: of the function; plain values.
    """

    name: str
    call: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contest:
    """What is compared.

    Attributes:
        name: unique, stable: results of earlier runs are found by it.
        unit: of what ``count`` are done in a round.
        count: see there.
        sides: ours first; one alone is a measurement without a peer.
        target: of the ratio to the best peer (at least), or of our seconds a unit (at most) where
            there is none; ``None`` for no target.
        by: what the target is about, ``cpu`` or ``clock``.
        tolerance: largest difference between the sides' proofs; ``None`` compares none.
    """

    name: str
    unit: str
    count: int
    sides: tuple[Side, ...]
    target: float | None = None
    by: str = "cpu"
    tolerance: float | None = None


@dataclass(frozen=True)
class Measured:
    """A round, by a side that measures itself; what is ``None`` the harness fills in.

    Attributes:
        clock, cpu: seconds.
        proof: a few numbers that all sides must agree on, to show that they did the same work.
        notes: more numbers, kept with the result.
    """

    clock: float | None = None
    cpu: float | None = None
    proof: list[float] | None = None
    notes: dict[str, float] | None = None


def run(contest: Contest, rounds: int) -> dict[str, Any]:
    """All rounds of a contest after one that is not counted; plain values, see :func:`ratios`.

    Raises:
        SystemExit: a side fails, or the sides' proofs differ.
    """
    found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in contest.sides}
    with contextlib.ExitStack() as stack:
        processes = {side.name: stack.enter_context(_started(side)) for side in contest.sides}
        proofs = {name: process.round().get("proof") for name, process in processes.items()}
        _compare(contest, proofs)
        names = list(processes)
        for number in range(rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                found[name].append(processes[name].round())
    sides = {
        name: {
            "clock": [each["clock"] for each in measured],
            "cpu": [each["cpu"] for each in measured],
            "peak_mb": max(each["peak_mb"] for each in measured),
            "notes": measured[-1].get("notes") or {},
        }
        for name, measured in found.items()
    }
    result = asdict(contest) | {"measured": sides}
    return result | {"ratios": ratios(sides)}


def ratios(sides: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """For each peer, by clock and by CPU: least, median and most of peer over ours, round by
    round; above 1, ours is faster.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for name, side in sides.items():
        if name == OURS:
            continue
        found[name] = {}
        for by in ("clock", "cpu"):
            each = [a / b for a, b in zip(side[by], sides[OURS][by], strict=True) if b > 0]
            found[name][by] = [min(each), median(each), max(each)] if each else []
    return found


def _compare(contest: Contest, proofs: dict[str, list[float] | None]) -> None:
    if contest.tolerance is None:
        return
    expected = proofs[OURS] or []
    for name, proof in proofs.items():
        pairs = zip(proof or [], expected, strict=True)
        if any(abs(a - b) > contest.tolerance * max(1.0, abs(b)) for a, b in pairs):
            raise SystemExit(f"{contest.name}: {name} does other work ({proof}, ours {expected})")


class _Process:
    """A side that waits for the word to do a round."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contest", json.dumps(asdict(side))],
            cwd=ROOT,
            env=os.environ | _ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def round(self) -> dict[str, Any]:
        """Do one and say what it took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended; what it said is below
            self._process.stdin.write("round\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_MARK):
                found: dict[str, Any] = json.loads(line.removeprefix(_MARK))
                return found
        self._log.seek(0)
        raise SystemExit(
            f"{self.side.name} ({self.side.call}) ended with {self._process.wait()}:\n"
            f"{self._log.read()[-3000:]}"
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def _started(side: Side) -> Iterator[_Process]:
    process = _Process(side)
    try:
        yield process
    finally:
        process.close()


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _serve(side: dict[str, Any]) -> None:
    module, _, function = side["call"].partition(":")
    prepared = getattr(importlib.import_module(f"benchmarks.groups.{module}"), function)
    work: Callable[[], Measured | None] = prepared(**side["arguments"])
    try:
        for _ in sys.stdin:
            clock, cpu = time.perf_counter(), _cpu()
            made = work() or Measured()
            taken = {"clock": time.perf_counter() - clock, "cpu": _cpu() - cpu}
            values = {key: value for key, value in asdict(made).items() if value is not None}
            usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(_MARK + json.dumps({**taken, "peak_mb": round(usage), **values}), flush=True)
    finally:
        close = getattr(work, "close", None)
        if close is not None:
            close()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
