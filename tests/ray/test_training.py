"""Training on Ray Train: a worker that dies costs no bit of the result.  Two workers, ZeRO-2, the
real stages.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from invar_ray.cli.tune import run_trials
from invar_ray.errors import DataError, ResourceError
from invar_ray.pipeline import Pipeline
from invar_ray.steps import generator
from invar_ray.store.artifacts import Artifact, Store
from invar_ray.training import trainer
from tests.distributed.small_store import small_config, small_store

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

# the worker dies before its fourth step: a checkpoint after two stands
STEPS, CHECKPOINT_EVERY, DIES_AT = (
    5,
    2,
    3,
)
OVERRIDES = (
    f"retriever.steps={STEPS}",
    f"generator.steps={STEPS}",
    # Dropout draws from a random state: a resumed run must repeat it.
    "retriever.lora.dropout=0.1",
    "generator.lora.dropout=0.1",
    f"scale.checkpoint_every={CHECKPOINT_EVERY}",
)


def work_that_dies(
    folder: Path, *, deaths: int, dies_at: tuple[int, ...] = (DIES_AT,)
) -> Callable[..., Any]:
    """The training function with a stage that notes its steps, and on rank 1 ends the process
    before step ``dies_at[n]`` (the last one from there on) the n-th time, at most ``deaths`` times.

    A nested function: Ray sends its code, so that the workers need not import this file.
    """
    place = str(folder)

    def work(payload: dict[str, Any]) -> Any:
        import os
        import time
        from pathlib import Path

        from invar_ray.training.worker import STAGES, train_worker

        real = STAGES[payload["stage"]]

        def make(config: Any, store: Any, inputs: Any, rank: int, world_size: int) -> Any:
            stage = real(config, store, inputs, rank, world_size)
            plain_loss = stage.loss

            def loss(forward: Any, step: int) -> Any:
                marks = sorted(Path(place).glob("died-*"))
                at = dies_at[min(len(marks), len(dies_at) - 1)]
                if rank == 1 and step == at and len(marks) < deaths:
                    # A checkpoint whose report is in flight when its worker dies may be lost; this
                    # is about the others.
                    deadline = time.monotonic() + 60
                    while not list(
                        Path(store.root).glob(".train/*/checkpoint_manager_snapshot.json")
                    ):
                        assert time.monotonic() < deadline, "Ray never took note of the checkpoint"
                        time.sleep(0.2)
                    (Path(place) / f"died-{len(marks)}").touch()
                    os._exit(1)
                with open(Path(place) / f"steps-{rank}", "a") as stream:
                    stream.write(f"{step} ")
                return plain_loss(forward, step)

            stage.loss = loss
            return stage

        STAGES[payload["stage"]] = make
        return dict(train_worker(payload))

    return work


def log_of(adapter: Artifact) -> list[dict[str, Any]]:
    """The log without its clock."""
    lines = adapter.path("log.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key != "tokens_per_s"}
        for line in lines
    ]


def adapter_files(adapter: Artifact) -> dict[str, str]:
    files = adapter.manifest.files.items()
    found = {name: str(entry["sha256"]) for name, entry in files if name.startswith("adapter/")}
    assert "adapter/adapter_model.safetensors" in found
    return found


def train(root: Path, stage: str, *overrides: str) -> Artifact:
    config = small_config(root, [*OVERRIDES, *overrides])
    with Pipeline(config, quiet=True) as pipeline:
        if stage == "retriever":
            return pipeline.retriever
        readings, base = small_store(root, OVERRIDES).readings, pipeline.base
        inputs = config, base, readings
        return pipeline.store.get_or_build(
            generator.plan(*inputs),
            lambda building: generator.build(building, *inputs, executor=pipeline.executor),
        )[0]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with everything that comes before training."""
    root = tmp_path_factory.mktemp("t") / "s"
    small_store(root, OVERRIDES)
    return root


@pytest.fixture(scope="module")
def uninterrupted(local_ray: Any, prepared: Path) -> Callable[[str], Artifact]:
    made: dict[str, Artifact] = {}

    def get(stage: str) -> Artifact:
        if stage not in made:
            made[stage] = train(copied(prepared, f"whole-{stage}"), stage)
        return made[stage]

    return get


def copied(prepared: Path, name: str) -> Path:
    return Path(shutil.copytree(prepared, prepared.with_name(name)))


def check_equal(found: Artifact, whole: Artifact) -> None:
    log = log_of(found)
    assert [record["step"] for record in log] == list(range(1, STEPS + 1))
    assert log == log_of(whole)  # json keeps every bit of a float
    assert adapter_files(found) == adapter_files(whole)


@pytest.mark.parametrize("stage", ["retriever", pytest.param("generator", marks=pytest.mark.slow)])
def test_a_run_whose_worker_died_equals_an_uninterrupted_one(
    stage: str,
    prepared: Path,
    uninterrupted: Callable[[str], Artifact],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    whole = uninterrupted(stage)
    monkeypatch.setattr(trainer, "_work", work_that_dies(tmp_path, deaths=1))
    found = train(copied(prepared, f"died-{stage}"), stage)

    assert (tmp_path / "died-0").exists(), "nothing died: the test proves nothing"
    assert (tmp_path / "steps-1").read_text().split() == ["0", "1", "2", "2", "3", "4"], (
        "did not go on from step 2"
    )
    check_equal(found, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "torn", [False, True], ids=["as it was left", "record and newest checkpoint cut off"]
)
def test_a_failed_run_is_one_error_and_the_next_goes_on(
    torn: bool,
    prepared: Path,
    uninterrupted: Callable[[str], Artifact],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    whole = uninterrupted("retriever")
    root = copied(prepared, f"failed-{torn}")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_work", work_that_dies(tmp_path, deaths=1))
        with pytest.raises(ResourceError, match="training of the retriever failed"):
            train(root, "retriever", "scale.max_failures=0")
    assert not list(root.glob("retriever/*")), "a failed training published something"
    if torn:
        (record,) = root.glob(".train/*/checkpoint_manager_snapshot.json")
        record.write_text(record.read_text()[:50])
        (whole_one,) = (path for path in record.parent.glob("checkpoint_*") if path.is_dir())
        half = shutil.copytree(whole_one, record.parent / "checkpoint_2999-01-01_00-00-00.000000")
        (half / "state.json").unlink()
    # A second try, as a user would: the same command, in what may be another process.
    monkeypatch.setattr(trainer, "_work", work_that_dies(tmp_path, deaths=1))
    found = train(root, "retriever", "scale.max_failures=0")
    assert (tmp_path / "steps-1").read_text().split() == ["0", "1", "2", "2", "3", "4"]
    check_equal(found, whole)


def work_that_overflows(at: int) -> Callable[[dict[str, Any]], Any]:
    """The training function with a stage whose loss is not a number at step ``at`` on rank 1."""

    def work(payload: dict[str, Any]) -> Any:
        from invar_ray.training.worker import STAGES, train_worker

        real = STAGES[payload["stage"]]

        def make(config: Any, store: Any, inputs: Any, rank: int, world_size: int) -> Any:
            stage = real(config, store, inputs, rank, world_size)
            plain_loss = stage.loss

            def loss(forward: Any, step: int) -> Any:
                value, metrics = plain_loss(forward, step)
                if step == at and rank == 1:
                    return value * float("nan"), metrics | {"loss": float("nan")}
                return value, metrics

            stage.loss = loss
            return stage

        STAGES[payload["stage"]] = make
        return dict(train_worker(payload))

    return work


def test_a_loss_that_is_not_a_number_stops_the_run_with_its_batch(
    local_ray: Any, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copied(prepared, "overflow")
    monkeypatch.setattr(trainer, "_work", work_that_overflows(at=1))
    with pytest.raises(
        DataError, match=r"step 2: .*loss.*not a finite number; its batch is in (\S+)"
    ) as caught:
        train(root, "retriever")  # with max_failures 2: it does not come to a second try
    (kept,) = (root / "faults").iterdir()
    assert str(kept) in str(caught.value)
    batch = json.loads(kept.read_text(encoding="utf-8"))
    assert batch["numbers"]["loss"] == "nan"
    assert len(batch["questions"]) == 6
    assert all(
        question["wordings"] and batch["candidates"][question["positive"]]["texts"]
        for question in batch["questions"]
    )
    assert not list(root.glob("retriever/*")), "a failed training published something"
    (events,) = (root / "tensorboard").iterdir()
    assert events.name.startswith("retriever-")


@pytest.mark.slow
def test_the_best_heldout_step_is_kept_and_patience_ends_the_run(
    local_ray: Any, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measurements are given, so that the second step is the best one; everything else is
    real.
    """

    def work(payload: dict[str, Any]) -> Any:
        from invar_ray.training.worker import STAGES, train_worker

        real = STAGES[payload["stage"]]

        def make(config: Any, store: Any, inputs: Any, rank: int, world_size: int) -> Any:
            stage = real(config, store, inputs, rank, world_size)
            plain, recalls = stage.measure, iter([0.25, 0.5, 0.5, 0.125])

            def measure(forward: Any, chunking: Any) -> Any:
                return plain(forward, chunking) | {"heldout_worst_recall_at_5": next(recalls)}

            stage.measure = measure
            return stage

        STAGES[payload["stage"]] = make
        return dict(train_worker(payload))

    monkeypatch.setattr(trainer, "_work", work)
    root = copied(prepared, "heldout")
    overrides = (
        "retriever.steps=9",
        "experimental.retriever.heldout_share=0.3",
        "experimental.retriever.heldout_every=1",
    )
    found = train(
        root,
        "retriever",
        *overrides,
        "experimental.retriever.heldout_patience=2",
        "scale.checkpoint_every=50",
    )
    log = log_of(found)
    assert [record["step"] for record in log] == [1, 2, 3, 4], (
        "two measurements without a better one end it"
    )
    assert found.info["best_step"] == 2
    with safe_open(found.path("adapter/adapter_model.safetensors"), framework="pt") as stored:
        kept = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    (checkpoint,) = sorted((root / ".train").glob("*/checkpoint_*"))[-1:]
    last, best = (load_file(checkpoint / f"{name}.safetensors") for name in ("parameters", "best"))
    assert last.keys() == best.keys()
    assert all(any(torch.equal(value, other) for other in best.values()) for value in kept.values())
    assert not any(torch.equal(value, other) for value in kept.values() for other in last.values())


@pytest.mark.slow
def test_weights_are_tried_on_titles_that_no_trial_saw(local_ray: Any, prepared: Path) -> None:
    root = copied(prepared, "tune")
    config = small_config(
        root,
        ["retriever.steps=3", "retriever.invariance_ramp_steps=1", "scale.checkpoint_every=50"],
    )
    found = run_trials(config, [0.0, 160.0])
    trials = found.loss
    assert [trial.weight for trial in trials] == [0.0, 160.0]
    assert trials[0].questions == trials[1].questions > 0
    made = [Store(str(root)).open(f"retriever/{p.name}") for p in (root / "retriever").iterdir()]
    assert len(made) == 2
    assert all(adapter.info["arm"].startswith("weight-") for adapter in made), "none is served"
    assert adapter_files(made[0]) != adapter_files(made[1])
    again = run_trials(config, [160.0, 0.0])
    assert again.loss == trials[::-1], "the second call trains nothing"
    assert again.hybrid == found.hybrid
    assert [trial.weight for trial in found.hybrid] == [n / 10 for n in range(2, 11)]
    assert {trial.questions for trial in found.hybrid} == {trials[0].questions}


@pytest.mark.slow
def test_a_step_that_does_not_fit_ends_in_advice(
    local_ray: Any, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(payload: dict[str, Any]) -> Any:
        import torch

        from invar_ray.training.worker import STAGES, train_worker

        class Large(STAGES["retriever"]):  # type: ignore[misc,name-defined]
            def loss(self, forward: Any, step: int) -> Any:
                raise torch.OutOfMemoryError("CUDA out of memory")

        STAGES["retriever"] = Large
        return dict(train_worker(payload))

    monkeypatch.setattr(trainer, "_work", work)
    with pytest.raises(ResourceError, match=r"step 1 does not fit.*set scale\.train_tokens"):
        train(copied(prepared, "large"), "retriever", "scale.max_failures=0")
