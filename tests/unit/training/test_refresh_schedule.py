"""When negatives are made and when they count; what a checkpoint keeps of it.

The job runs in this process, in place of a Ray task: ``tests/ray/test_refresh.py`` has the real one
and the real stage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from invar_ray.config import load_config
from invar_ray.models.base import BaseRef
from invar_ray.models.encoder import EncoderSpec
from invar_ray.store.artifacts import Plan, Store
from invar_ray.training import refresh as module
from invar_ray.training.refresh import Refresh

SPEC = EncoderSpec("llm", BaseRef("a", None, "f"), "retriever/x", "y", "mean", None, "", "", 8, 8)


class Jobs:
    """What this module asks of Ray: jobs that end when the test says so."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []
        self.done: set[int] = set()
        self.cancelled: list[int] = []
        self.looks = 0
        self.done_after = 0  # looks

    def remote(self, mine: Any) -> Any:
        def start(*arguments: Any) -> int:
            self.started.append((mine, *arguments))
            return len(self.started) - 1

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def wait(self, jobs: list[int], timeout: float) -> tuple[list[int], list[int]]:
        self.looks += 1
        done = [job for job in jobs if job in self.done or self.looks > self.done_after]
        return done, [job for job in jobs if job not in done]

    def get(self, job: int) -> Any:
        mine, *arguments = self.started[job]
        return mine(*arguments)

    def cancel(self, job: int, force: bool) -> None:
        self.cancelled.append(job)


class Stage:
    """Notes what it is given."""

    steps = 12
    spec = SPEC

    def __init__(self) -> None:
        self.adopted: list[str] = []

    def adopt(self, trainset_ref: str) -> None:
        self.adopted.append(trainset_ref)

    def save(self, parameters: dict[str, torch.Tensor], folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "values").write_text(
            json.dumps({name: value.tolist() for name, value in parameters.items()})
        )


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Jobs]:
    made = Jobs()
    monkeypatch.setattr(module, "ray", made)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield made
    torch.distributed.destroy_process_group()


def mine(config: Any, root: str, adapter: str, first: str, current: str) -> dict[str, Any]:
    mined = {"kept": 1, "dropped": {}}
    return {
        "trainset": f"of {adapter}",
        "mining": mined,
        "changed_share": 0.5,
        "passages": 9,
        "seconds": 0.0,
    }


def open_refresh(
    tmp_path: Path, state: Any = None, job: Any = mine, **settings: Any
) -> tuple[Refresh, Stage]:
    store = Store(str(tmp_path / "store"))
    plan = Plan("trainset", "t", {}, {})
    first, _ = store.get_or_build(
        plan, lambda building: (building.path / "x").write_text("x") and None
    )
    sections = {"refresh_timeout_s": "scale"}
    overrides = [
        f"experimental.{sections.get(key, 'retriever')}.{key}={value}"
        for key, value in settings.items()
    ]
    stage = Stage()
    config = load_config("tiny", overrides)
    made = Refresh(stage, config, job, store.root_uri, "run", first.ref, 0, state)  # type: ignore[arg-type]
    return made, stage


def parameters_of(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), float(step))}


def run(refresh: Refresh, first: int, last: int) -> list[int]:
    """The version in use at each step."""
    versions = []
    for step in range(first, last):
        assert refresh.before(step, partial(parameters_of, step)) is None
        versions.append(refresh.version)
    return versions


@pytest.mark.parametrize(
    "delay, expected",
    [(0, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]), (3, [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2])],
)
def test_versions_count_from_fixed_steps(
    jobs: Jobs, tmp_path: Path, delay: int, expected: list[int]
) -> None:
    refresh, stage = open_refresh(tmp_path, refresh_every=4, refresh_delay=delay)
    assert run(refresh, 0, 12) == expected
    history = refresh.state["history"]
    assert [(found["step"], found["adopted"]) for found in history] == [
        (4, 4 + delay),
        (8, 8 + delay),
    ]
    assert stage.adopted == [found["trainset"] for found in history]
    assert len(jobs.started) == 2
    first = jobs.started[0][4]
    assert [started[5] for started in jobs.started] == [first, stage.adopted[0]], (
        "compared with what was in use"
    )


def test_no_job_for_a_version_that_would_never_count(jobs: Jobs, tmp_path: Path) -> None:
    refresh, _ = open_refresh(tmp_path, refresh_every=5, refresh_delay=3)
    assert run(refresh, 0, 12)[-1] == 1
    assert len(jobs.started) == 1, "the one of step 10 would count from step 13 on, of 12"


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_resumed_run_repeats_all_of_it(jobs: Jobs, tmp_path: Path, cut: int) -> None:
    whole, stage = open_refresh(tmp_path, refresh_every=4, refresh_delay=2)
    versions = run(whole, 0, 12)
    early, _ = open_refresh(tmp_path, refresh_every=4, refresh_delay=2)
    assert run(early, 0, cut) == versions[:cut]
    state = json.loads(json.dumps(early.state))  # through a checkpoint
    early.close()
    resumed, other = open_refresh(tmp_path, state, refresh_every=4, refresh_delay=2)
    assert resumed.version == versions[cut - 1]
    assert run(resumed, cut, 12) == versions[cut:]
    assert resumed.state == whole.state, (
        "the same adapters, named by their content, at the same steps"
    )
    assert other.adopted[-1] == stage.adopted[-1]


def test_adapters_are_named_by_their_content(jobs: Jobs, tmp_path: Path) -> None:
    first, _ = open_refresh(tmp_path, refresh_every=4)
    first.before(4, lambda: parameters_of(4))
    second, _ = open_refresh(tmp_path, refresh_every=4)
    second.before(4, lambda: parameters_of(5))
    one, other = (
        Store(str(tmp_path / "store")).open(started[3], "retriever") for started in jobs.started
    )
    assert one.ref != other.ref
    assert json.loads(other.path("adapter/values").read_text()) == {"w": [5.0, 5.0]}
    assert EncoderSpec.from_json(one.info["encoder"]).adapter_fingerprint == one.fingerprint


def test_asynchronous_versions_count_when_they_stand_and_jobs_do_not_pile_up(
    jobs: Jobs, tmp_path: Path
) -> None:
    jobs.done_after = 5
    refresh, _ = open_refresh(tmp_path, refresh_every=2, refresh_async="true")
    versions = run(refresh, 0, 9)
    # Started before step 2, looked at from step 3 on, there at the sixth look; step 4 and 6 found
    # it under way.
    assert versions == [0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert len(jobs.started) == 2, "the second one starts where the first has been taken"


def test_a_job_that_fails_is_a_fault(jobs: Jobs, tmp_path: Path) -> None:
    def fails(*_: Any) -> dict[str, Any]:
        raise RuntimeError("no disk")

    refresh, stage = open_refresh(tmp_path, job=fails, refresh_every=4)
    fault = refresh.before(4, lambda: parameters_of(4))
    assert fault == "step 4: the job that mines new negatives failed: no disk"
    assert stage.adopted == []


def test_waiting_has_an_end(jobs: Jobs, tmp_path: Path) -> None:
    jobs.done_after = 10**9
    refresh, _ = open_refresh(tmp_path, refresh_every=4, refresh_timeout_s=0.001)
    fault = refresh.before(4, lambda: parameters_of(4))
    assert fault is not None
    assert "no new negatives within 0.001 s (experimental.scale.refresh_timeout_s)" in fault
    refresh.close()
    assert jobs.cancelled == [0]
