"""What a run says: a line a step, the time that is left, and nothing of what workers chatter."""

from __future__ import annotations

import pytest

from invar_ray import console
from invar_ray.console import Progress, Run, duration


class Clock:
    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(console, "run", Run())
    monkeypatch.delenv("INVAR_VERBOSE", raising=False)
    return clock


def test_the_time_left_follows_how_long_the_first_steps_took(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run = console.run
    run.expect([("embed", 10.0), ("train", 60.0), ("report", 20.0)])
    assert run.seconds_left() == 90
    run.begin("embed")
    clock.now = 20.0  # twice as long as it was thought
    run.end("embed")
    assert run.seconds_left() == 160
    run.begin("train")
    clock.now = 50.0
    assert run.seconds_left() == 130
    run.progress("train", 25, 100, "steps")  # a quarter took 30 s: 90 to go, and 40 for the report
    assert run.seconds_left() == 130
    run.end("train")
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("[ 1/3] embed: 20 s")
    assert said[0].endswith("about 3 min left")
    assert said[-1].startswith("[ 2/3] train: 30 s")


def test_a_slow_start_does_not_frighten(clock: Clock) -> None:
    run = console.run
    run.expect([("train", 100.0)])
    run.begin("train")
    clock.now = 50.0  # Ray's processes had to start
    run.progress("train", 1, 40, "steps")
    assert run.seconds_left() < 300  # and not 1,950
    clock.now = 80.0
    run.progress("train", 20, 40, "steps")
    assert run.seconds_left() == 80


def test_quick_and_standing_steps_say_nothing_unless_asked(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.run.begin("index")
    console.run.end("index", "index/x-1")
    console.run.end("passages", "passages/x-1", reused=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("INVAR_VERBOSE", "1")
    console.run.end("passages", "passages/x-1", reused=True)
    assert "passages: stands -> passages/x-1" in capsys.readouterr().err


def test_a_log_hears_of_a_long_step_every_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    console.run.begin("train")
    progress = Progress("train retriever", 100, "steps")
    for _ in range(100):
        clock.now += 2
        progress.advance(1, "loss 2.5")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert "train retriever: 30/100 steps, loss 2.5" in said[0]
    assert "\x1b" not in "".join(said)


def test_a_log_is_as_long_on_a_slow_machine(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = []
    for slowness in (1, 2.5):
        console.run.expect([("search", 10.0), ("train", 600.0), ("report", 390.0)])
        for label, seconds in (("search", 15), ("train", 600), ("report", 400)):
            console.run.begin(label)
            progress = Progress(label, 100, "steps")
            for _ in range(100):
                clock.now += slowness * seconds / 100
                progress.advance(1)
            console.run.end(label)
        lengths.append(len(capsys.readouterr().err.splitlines()))
    assert lengths[0] == lengths[1] - 1 <= 12, "there the search is worth a line"


def test_workers_lines_reach_the_run_and_their_noise_does_not(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "in_worker", True)
    console.say("  going on from step 3 of 9")
    progress = Progress("train retriever", 9, "steps", done=3)
    progress.advance(3, "loss 1.0")
    printed = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(console, "in_worker", False)
    console.run.begin("stage 1: retriever")
    clock.now = 70.0
    for line in [
        *printed,
        "core_worker.cc:2465: Actor with class name: 'MapWorker' has constructor arguments",
        "Reporting training result 1: TrainingReport(checkpoint=None, metrics={'step': 20})",
    ]:
        console.from_worker(line)
    said = capsys.readouterr().err
    assert said.splitlines()[0] == "  going on from step 3 of 9"
    assert "train retriever: 6/9 steps, loss 1.0; about" not in said.splitlines()[0]
    assert "train retriever: 6/9 steps, loss 1.0" in said
    assert "core_worker" not in said
    assert "TrainingReport" not in said
    monkeypatch.setenv("INVAR_VERBOSE", "1")
    console.from_worker("core_worker.cc:2465: something")
    assert "core_worker.cc:2465" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "7 s"), (99, "99 s"), (150, "2 min"), (7200, "2 h 00 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
