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

from invar_ray.config import Config, to_dict
from invar_ray.errors import ConfigError, DataError, InvarError, ResourceError
from invar_ray.evaluation.plots import plot_losses
from invar_ray.heap import keep_freed_memory
from invar_ray.models.base import BaseRef, hidden_size
from invar_ray.models.encoder import EncoderSpec, llm_spec
from invar_ray.store.artifacts import Artifact, Building, Plan, Store, join_uri
from invar_ray.store.files import resolve_uri
from invar_ray.store.garbage import remove
from invar_ray.training.schedule import best_step
from invar_ray.training.stage import NEGATIVES_FILE, Mine
from invar_ray.training.tracking import check_trackers
from invar_ray.versions import STEPS

_RECORD = "checkpoint_manager_snapshot.json"
"""Ray Train's list of a run's checkpoints."""


def retriever_plan(config: Config, base: BaseRef, trainset: Artifact) -> Plan:
    """The stage-1 adapter."""
    return Plan(
        kind="retriever",
        name=config.name,
        config={
            "base": base.fingerprint,
            "model": _model_science(config),
            "retriever": to_dict(config.retriever),
            "document_weight": config.coarse.document_weight,
            "precision": config.model.precision,
            "seed": config.seed,
        },
        parents={"trainset": trainset},
        version=STEPS["retriever"].version,
    )


def train_retriever(
    building: Building,
    config: Config,
    base: BaseRef,
    trainset: Artifact,
    *,
    mine: Mine | None = None,
) -> None:
    """Stage 1: fill an adapter artifact.

    Args:
        building: gets it.
        config: the run.
        base: what is adapted.
        trainset: questions, candidates, negatives.
        mine: makes new negatives while it trains; needed where ``retriever.refresh_every`` is set.

    Raises:
        ConfigError: if ``matryoshka_dims`` are larger than the vectors.
        ResourceError: if the cluster cannot run the workers, or they keep failing.
    """
    _check_sizes(config, base, trainset.store)
    # The spec of the adapter to be: its fingerprint is the plan's, known before training.
    spec = llm_spec(config.model, base, (building.plan.ref, building.plan.fingerprint))
    inputs = {"trainset": trainset.ref, "encoder": spec.to_json()}
    if config.retriever.refresh_every is None:
        mine = None
    elif mine is None:
        raise ConfigError(
            "retriever.refresh_every is set and nothing here mines",
            action="train with jobs or the CLI",
        )
    _train(building, config, "retriever", inputs, trainset.store.root_uri, mine)
    if mine is not None:
        _tidy(building, trainset.store)
    building.info |= {"encoder": spec.to_json()}


def generator_plan(config: Config, base: BaseRef, readings: Artifact) -> Plan:
    """The stage-2 adapter."""
    return Plan(
        kind="generator",
        name=config.name,
        config={
            "base": base.fingerprint,
            "generator": to_dict(config.generator),
            "quantize": config.model.quantize,
            "precision": config.model.precision,
            "seed": config.seed,
        },
        parents={"readings": readings},
        version=STEPS["generator"].version,
    )


def train_generator(building: Building, config: Config, base: BaseRef, readings: Artifact) -> None:
    """Stage 2: fill an adapter artifact; errors as :func:`train_retriever`."""
    reference = {
        "location": base.location,
        "revision": base.revision,
        "fingerprint": base.fingerprint,
    }
    _train(
        building,
        config,
        "generator",
        {"readings": readings.ref, "base": reference},
        readings.store.root_uri,
    )
    building.info |= {
        "base": reference,
        "max_context": config.generator.max_tokens,
        "max_new_tokens": config.generator.max_new_tokens,
    }


def encoder_of(adapter: Artifact) -> EncoderSpec:
    """The encoder of a ``retriever`` artifact."""
    return EncoderSpec.from_json(adapter.info["encoder"])


def _train(
    building: Building,
    config: Config,
    stage: str,
    inputs: dict[str, Any],
    root_uri: str,
    mine: Mine | None = None,
) -> None:
    scale, plan = config.scale, building.plan
    check_trackers(scale.trackers)
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
            elastic_resize_monitor_interval_s=scale.resize_every_s,
            use_gpu=scale.use_gpu,
            resources_per_worker={"CPU": scale.cpus_per_worker}
            | ({"GPU": 1} if scale.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            checkpoint_config=CheckpointConfig(num_to_keep=scale.keep_checkpoints),
            failure_config=FailureConfig(max_failures=scale.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = _fit(trainer)
    except Exception as error:
        raise _explain(error, stage) from error
    fault = (result.return_value or {}).get("fault")
    if fault:
        raise DataError(
            f"training of the {stage} stopped at {fault}",
            action="look at that batch; lower the learning rate or raise the temperatures. The last checkpoint stands",
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


def _tidy(building: Building, store: Store) -> None:
    """Note the versions of the negatives; remove the vectors and indexes that they were mined from."""
    refreshes = json.loads((building.path / NEGATIVES_FILE).read_text(encoding="utf-8"))["history"]
    building.info |= {"refreshes": refreshes}
    for refresh in refreshes:
        for ref in refresh["scratch"]:
            remove(store, ref)


def _check_sizes(config: Config, base: BaseRef, store: Store) -> None:
    dims = config.retriever.matryoshka_dims
    if dims and max(dims) > (full := config.model.projection_dim or hidden_size(base, store)):
        raise ConfigError(
            f"retriever.matryoshka_dims asks for {max(dims)} values, and the vectors have {full}",
            expected=f"sizes of at most {full}",
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


def _explain(error: Exception, stage: str) -> InvarError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InvarError):
            return cause
        failures = getattr(cause, "worker_failures", None) or {}
        for failure in failures.values():
            inner = getattr(failure, "cause", failure)
            if isinstance(inner, InvarError):
                return inner
        cause = cause.__cause__
    return ResourceError(
        f"training of the {stage} failed: "
        f"{str(error).strip().splitlines()[-1] if str(error).strip() else error!r}",
        action="see the workers' log above; a re-run goes on from the last checkpoint",
    )


def _model_science(config: Config) -> dict[str, Any]:
    model = to_dict(config.model)
    for key in ("base", "revision", "tiny"):  # they are in the base's fingerprint
        del model[key]
    return model
