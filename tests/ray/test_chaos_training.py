"""Training under SIGKILL; the whole table: ``python -m tests.ray.chaos_training``."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.ray.chaos_training import (
    KINDS,
    LEAST_LEFT,
    Kill,
    Note,
    Outcome,
    account,
    plan_kills,
    run,
)

pytestmark = pytest.mark.ray


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_kills_cost_steps_and_no_bit_of_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "OMP_NUM_THREADS",
        "RAY_AUTH_MODE",
        "HF_HUB_OFFLINE",
        "DS_ACCELERATOR",
        "RAY_ADDRESS",
    ):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # the run sets them; put back afterwards
    outcome = run(tmp_path, kills=3, steps=60, checkpoint_every=5, seed=2, deadline_s=1200)
    assert sorted(kill.kind for kill in outcome.kills) == sorted(KINDS)
    assert outcome.same_files
    assert outcome.same_log
    assert outcome.faults() == []


def test_every_kind_of_kill_is_planned_while_there_are_steps_left() -> None:
    plan = plan_kills(10, 200, random.Random(0))
    assert {kind for kind, _ in plan} == set(KINDS)
    steps = [step for _, step in plan if step is not None]
    assert len(steps) == 8
    assert steps == sorted(steps)
    assert steps[-1] < 200 - LEAST_LEFT
    assert all(step is not None for kind, step in plan if kind == "worker"), (
        "there is none while a run starts"
    )


def test_what_a_kill_cost_is_read_from_the_steps_that_were_begun() -> None:
    def life(pid: int, began: float, first: int, last: int) -> list[Note]:
        return [Note(began + step - first, pid, 0, step) for step in range(first, last + 1)]

    # Steps 0 to 7, killed; nothing before the next kill; 5 to 6 (a checkpoint stood after 5),
    # killed; to the end.
    notes = [*life(1, 0.0, 0, 7), *life(2, 100.0, 5, 6), *life(3, 200.0, 0, 9), Note(3.0, 9, 1, 3)]
    kills = [Kill("driver", 7.5, False), Kill("node", 50.0, True), Kill("worker", 101.5, False)]
    outcome = Outcome(steps=10, checkpoint_every=5, kills=kills, same_files=True, same_log=True)
    account(outcome, sorted(notes, key=lambda note: note.at))
    assert [(kill.done, kill.resumed, kill.lost) for kill in kills] == [
        (7, None, 0),
        (7, 5, 2),
        (6, 0, 6),
    ]
    assert outcome.steps_begun == 20
    assert outcome.faults() == []
    kills[2].done = 11
    assert outcome.faults() == ["kill 3 cost 11 steps"]
