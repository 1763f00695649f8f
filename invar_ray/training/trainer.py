"""Starts a stage on Ray Train and turns its last checkpoint into an adapter artifact."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pyarrow.fs as fs
import ray.train
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig
from ray.train.torch import TorchTrainer

from invar_ray.config import Config
from invar_ray.errors import DataError, ResourceError
from invar_ray.evaluation.plots import plot_losses
from invar_ray.executor import as_one_error
from invar_ray.heap import keep_freed_memory
from invar_ray.session import Bundle, check_room
from invar_ray.store.artifacts import Building, join_uri
from invar_ray.store.files import resolve_uri
from invar_ray.training.stage import NEGATIVES_FILE, Mine, best_step
from invar_ray.training.tracking import check_trackers

KEEP_CHECKPOINTS = 2
"""The newest ones; more than one, because the newest may be lost with its node."""
_STARTS = 6
"""Groups of workers that find no room in time (each waits for as long as session.py says), before a
run is given up: half an hour in which a node may come."""
_RECORD = "checkpoint_manager_snapshot.json"
"""Ray Train's list of a run's checkpoints."""


def train(
    building: Building,
    config: Config,
    stage: str,
    inputs: dict[str, Any],
    root_uri: str,
    mine: Mine | None = None,
) -> None:
    """Train a stage on Ray Train and put its adapter, its log and the picture of its losses into an
    artifact under construction.

    Args:
        building: gets them.
        config: the run.
        stage: ``retriever`` or ``generator``.
        inputs: what the stage's workers open, by name.
        root_uri: of the store; checkpoints go below ``.train`` there.
        mine: makes new negatives while it trains.

    Raises:
        DataError: a loss was not finite.  ResourceError: the cluster has no room for it, it failed
            once too often, or no checkpoint came of it.  A worker's own error is raised as it is.
    """
    scale, plan = config.scale, building.plan
    check_trackers(scale.trackers)
    _check_room(config, stage, refreshes=mine is not None)
    storage, name = join_uri(root_uri, ".train"), f"{plan.kind}-{plan.fingerprint}"
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "stage": stage,
            "config": config,
            "root_uri": root_uri,
            "inputs": inputs,
            "run": plan.fingerprint,
            "mine": mine,
            "unrecorded": unrecorded_checkpoints(join_uri(storage, name)),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=scale.num_workers,
            elastic_resize_monitor_interval_s=config.experimental.scale.resize_every_s,
            use_gpu=scale.use_gpu,
            resources_per_worker=dict(_worker_bundle(config)),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            checkpoint_config=CheckpointConfig(num_to_keep=KEEP_CHECKPOINTS),
            failure_config=FailureConfig(
                max_failures=scale.max_failures, controller_failure_limit=_STARTS
            ),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = _fit(trainer)
    except ray.train.TrainingFailedError as error:  # none of Ray's other errors
        raise as_one_error(error, f"training of the {stage}") from error
    fault = (result.return_value or {}).get("fault")
    if fault:
        raise DataError(
            f"training of the {stage} stopped at {fault}",
            action="look at that batch; lower the learning rate or raise the temperatures. The "
            "last checkpoint stands",
        )
    if result.checkpoint is None:
        raise ResourceError(
            f"training of the {stage} ended without a checkpoint",
            action="see the workers' logs above",
        )
    with result.checkpoint.as_directory() as name:
        folder = Path(name)
        shutil.copytree(folder / "adapter", building.path / "adapter", dirs_exist_ok=True)
        shutil.copy(folder / "log.jsonl", building.path / "log.jsonl")
        if (folder / NEGATIVES_FILE).is_file():
            shutil.copy(folder / NEGATIVES_FILE, building.path / NEGATIVES_FILE)
    log = [
        json.loads(line)
        for line in (building.path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    plot_losses(log, building.path / "losses.png")
    building.info |= {"steps": len(log), "final": log[-1]}
    best = best_step(log)
    if best is not None:
        building.info |= {
            "best_step": best,
            "best": next(record for record in log if record["step"] == best),
        }


def _worker_bundle(config: Config) -> Bundle:
    scale = config.scale
    return {"CPU": scale.cpus_per_worker} | ({"GPU": 1.0} if scale.use_gpu else {})


def _check_room(config: Config, stage: str, *, refreshes: bool) -> None:
    """Refuse a training that could never start, or whose refreshed negatives could never be made
    beside it.
    """
    scale = config.scale
    workers = scale.num_workers if isinstance(scale.num_workers, int) else scale.num_workers[0]
    group = [_worker_bundle(config)] * workers
    check_room(
        f"training of the {stage}",
        group,
        "lower scale.num_workers or scale.cpus_per_worker, or add nodes",
    )
    if not refreshes:
        return
    gpus = scale.embed_gpus_per_worker
    embedding = {"CPU": 1.0, "GPU": gpus} if gpus else {"CPU": scale.cpus_per_worker}
    # The task that mines, and an actor that embeds for it (on a GPU: another one that tokenises).
    beside = [{"CPU": scale.cpus_per_worker}, embedding, *([{"CPU": 1.0}] if gpus else [])]
    check_room(
        f"training of the {stage} with refreshed negatives beside it",
        [*group, *beside],
        "leave a GPU to the embedding (scale.num_workers below the number of GPUs), set "
        "scale.embed_gpus_per_worker=0, or experimental.retriever.refresh_every=null",
    )


def _fit(trainer: TorchTrainer) -> ray.train.Result:
    # On the main thread fit() would keep SIGINT for itself, also after it has ended: any Ctrl-C
    # would then exit 0.
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = trainer.fit()
        except Exception as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True, name="ray-train-fit")
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.5)
    if "error" in outcome:
        raise outcome["error"]
    result: ray.train.Result = outcome["result"]
    return result


def unrecorded_checkpoints(run_uri: str) -> list[str]:
    """URIs of a run's checkpoints, newest first, where Ray's own record of them is cut off; else
    none.

    Ray writes the record in place: a kill in that moment leaves half of it, which no run could
    start from.  It is removed, and the workers look at the checkpoints themselves.
    """
    filesystem, folder = resolve_uri(run_uri)
    record = f"{folder}/{_RECORD}"
    if filesystem.get_file_info(record).type != fs.FileType.File:
        return []
    with filesystem.open_input_stream(record) as stream:
        text = bytes(stream.read())
    try:
        json.loads(text)
    except ValueError:
        filesystem.delete_file(record)
    else:
        return []
    found = [
        entry
        for entry in filesystem.get_file_info(fs.FileSelector(folder))
        if entry.type == fs.FileType.Directory
    ]
    names = sorted(
        (entry.base_name for entry in found if entry.base_name.startswith("checkpoint_")),
        reverse=True,
    )
    return [join_uri(run_uri, name) for name in names]


def _work(payload: dict[str, Any]) -> dict[str, Any]:
    # Imported on the workers only: DeepSpeed takes seconds to load and speaks up while it does.
    from invar_ray.training.worker import train_worker

    if payload["config"].scale.keep_freed_memory:
        keep_freed_memory()
    return dict(train_worker(payload))
