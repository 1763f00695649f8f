"""The loop that every training worker runs, for either stage."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

import ray.train
import torch
from safetensors import SafetensorError
from torch import Tensor

from invar_ray import console
from invar_ray.config import Config, ScaleConfig, to_dict
from invar_ray.console import Progress
from invar_ray.errors import ResourceError
from invar_ray.store.artifacts import Store
from invar_ray.store.files import join_uri, resolve_uri
from invar_ray.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from invar_ray.training.engine import (
    Engine,
    init_distributed,
    largest_over_ranks,
    sharded_loading,
)
from invar_ray.training.generator_stage import GeneratorStage
from invar_ray.training.refresh import Refresh, Refreshed
from invar_ray.training.retriever_stage import RetrieverStage
from invar_ray.training.stage import (
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Chunking,
    Metrics,
    Stage,
    best_step,
    is_exhausted,
    learning_rate,
)
from invar_ray.training.tracking import Tracker, open_trackers

_SEED_STRIDE = 1_000_003
STAGES: dict[str, Callable[[Config, Store, dict[str, Any], int, int], Stage]] = {
    "retriever": RetrieverStage,
    "generator": GeneratorStage,
}
"""The stages by name."""
_MEASURE_TOKENS = 8192  # of a pass over held-out texts, where the config sets no budget


class Outcome(TypedDict):
    """How an attempt ended.

    Attributes:
        first: the step that it started from.
        fault: why it stopped before the last step, or ``None``.  A fault that would come again is
            returned and not raised: Ray Train would restart the run in vain.
    """

    first: int
    fault: str | None


def train_worker(payload: dict[str, Any]) -> Outcome:
    """Train from the last checkpoint to the last step.

    Args:
        payload: ``stage``, ``config``, ``root_uri``, ``inputs`` (refs of artifacts), ``run``
            (fingerprint), ``mine`` (what makes new negatives; ``None`` where they are not
            refreshed) and ``unrecorded`` (URIs of checkpoints that Ray has no record of, newest
            first).

    Returns:
        The same on every rank.
    """
    config: Config = payload["config"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    init_distributed(config.scale.use_gpu)
    with sharded_loading(config.scale.zero_stage, config.model.precision):
        stage = STAGES[payload["stage"]](
            config, Store(payload["root_uri"]), payload["inputs"], rank, world_size
        )
    optimizer = (
        config.retriever.optimizer
        if payload["stage"] == "retriever"
        else config.generator.optimizer
    )
    device = ray.train.torch.get_device() if config.scale.use_gpu else torch.device("cpu")
    stage.module.to(device)

    resumed = _resume(payload["run"], payload.get("unrecorded", ()))
    if resumed is not None:
        _put(stage, resumed.engine.parameters)
    engine = Engine(
        stage.module,
        zero_stage=config.scale.zero_stage,
        precision=config.model.precision,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
    )
    if resumed is not None:
        engine.load_state(resumed.engine)
    first, log = (resumed.step, resumed.log) if resumed is not None else (0, [])
    if first and rank == 0:
        console.say(f"  going on from step {first} of {stage.steps}, where the last run stopped")
    best = resumed.best if resumed is not None else None
    refresh = _open_refresh(stage, payload, rank, resumed)
    patience = config.experimental.retriever.heldout_patience
    chunking = Chunking(
        config.scale.train_tokens_per_chunk or _MEASURE_TOKENS, largest_over_ranks, engine.backward
    )
    stage.module.train()
    progress = Progress(f"train {payload['stage']}", stage.steps, "steps", done=first)
    name = f"{payload['stage']}-{payload['run']}"
    trackers = (
        open_trackers(config.scale.trackers, payload["root_uri"], name, to_dict(config), first)
        if rank == 0
        else []
    )
    try:
        for step in range(first, first if is_exhausted(log, patience) else stage.steps):
            started = time.monotonic()
            fault = (
                refresh.before(step, lambda: engine.state().parameters)
                if refresh is not None
                else None
            )
            if fault is not None:
                return Outcome(first=first, fault=fault)
            # Dropout is a function of (seed, step, rank): a resumed run repeats the masks of the
            # one that was cut off.
            torch.manual_seed(config.seed * _SEED_STRIDE + step * 1009 + rank)
            rate = learning_rate(optimizer, step, stage.steps)
            with memory_advice(config.scale, step):
                metrics = step_gradients(stage, engine, step, config.scale.train_tokens_per_chunk)
                norm = engine.step(rate)
            averaged = _mean_over_ranks(metrics, device)
            record = {"step": step + 1, "learning_rate": rate, "gradient_norm": norm, **averaged}
            if not isinstance(config.scale.num_workers, int):
                record["workers"] = world_size
            if refresh is not None:
                record["negatives_version"] = refresh.version
            record["padding_share"] = 1.0 - averaged["tokens"] / record.pop("padded_tokens")
            fault = fault_of(record)
            if fault is not None:
                if rank == 0:
                    fault += (
                        f"; its batch is in {_keep_batch(stage, record, payload['root_uri'], name)}"
                    )
                return Outcome(first=first, fault=fault)
            record["tokens_per_s"] = (
                averaged["tokens"] * world_size / max(1e-9, time.monotonic() - started)
            )
            log.append(record)
            if stage.measure_every and (
                (step + 1) % stage.measure_every == 0 or step + 1 == stage.steps
            ):
                record |= _mean_over_ranks(stage.measure(engine, chunking), device)
                if best_step(log) == step + 1:
                    best = engine.state().parameters
            last = step + 1 == stage.steps or is_exhausted(log, patience)
            for tracker in trackers:
                tracker.log(record)
            if rank == 0:
                progress.advance(1, f"loss {averaged['loss']:.4f}")
            if (step + 1) % config.scale.checkpoint_every == 0 or last:
                _flush(trackers)
                negatives = refresh.state if refresh is not None else None
                checkpoint = Checkpoint(step + 1, engine.state(), log, best, negatives)
                _report(stage, checkpoint, payload["run"], rank, last=last)
            if last:
                break
    finally:
        if refresh is not None:
            refresh.close()
        for tracker in trackers:
            tracker.close()
    return Outcome(first=first, fault=None)


def step_gradients(
    stage: Stage, engine: Engine, step: int, tokens_per_chunk: int | None
) -> Metrics:
    """Leave the step's averaged gradients in the engine; this rank's numbers.

    Args:
        tokens_per_chunk: ``None`` takes the whole share of this rank at once.
    """
    if tokens_per_chunk is None:
        loss, metrics = stage.loss(engine, step)
        engine.backward(loss)
        return metrics
    with engine.accumulation():
        return stage.accumulate(
            engine, step, Chunking(tokens_per_chunk, largest_over_ranks, engine.backward)
        )


@contextlib.contextmanager
def memory_advice(scale: ScaleConfig, step: int) -> Iterator[None]:
    """Say what to do where a GPU's memory does not suffice for a step.  It is raised, not returned
    as a fault: the other ranks wait in a collective, which only the end of the group ends.

    Raises:
        ResourceError: for torch's own error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        budget = scale.train_tokens_per_chunk
        advice = (
            f"halve scale.train_tokens_per_chunk ({budget})"
            if budget is not None
            else f"set scale.train_tokens_per_chunk, for instance to {_MEASURE_TOKENS}"
        )
        if not scale.gradient_checkpointing:
            advice += ", or set scale.gradient_checkpointing=true"
        raise ResourceError(
            f"step {step + 1} does not fit into a GPU's memory ({str(error).splitlines()[0]})",
            action=f"{advice}; training goes on from its last checkpoint",
        ) from error


def _resume(run: str, unrecorded: Sequence[str]) -> Checkpoint | None:
    """The checkpoint to go on from: Ray's; without one the first of ``unrecorded`` that is
    whole.
    """
    recorded = ray.train.get_checkpoint()
    if recorded is not None:
        with recorded.as_directory() as folder:
            return load_checkpoint(Path(folder), run)
    for uri in unrecorded:
        filesystem, path = resolve_uri(uri)
        with ray.train.Checkpoint(path, filesystem).as_directory() as folder:
            try:
                return load_checkpoint(Path(folder), run)
            except (
                OSError,
                ValueError,
                KeyError,
                SafetensorError,
            ) as error:
                # its upload was cut off
                console.say(f"  {uri} is not whole ({type(error).__name__}); trying the one before")
    return None


def _open_refresh(
    stage: Stage, payload: dict[str, Any], rank: int, resumed: Checkpoint | None
) -> Refresh | None:
    if payload.get("mine") is None:
        return None
    trainset = payload["inputs"]["trainset"]
    state = resumed.negatives if resumed is not None else None
    refreshed = cast(Refreshed, stage)
    return Refresh(
        refreshed,
        payload["config"],
        payload["mine"],
        payload["root_uri"],
        payload["run"],
        trainset,
        rank,
        state,
    )


def _put(stage: Stage, parameters: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in stage.module.named_parameters():
            if name in parameters:
                parameter.copy_(parameters[name])


def _report(stage: Stage, checkpoint: Checkpoint, run: str, rank: int, *, last: bool) -> None:
    metrics = {"step": checkpoint.step, "loss": checkpoint.log[-1]["loss"]}
    if rank != 0:
        ray.train.report(metrics, checkpoint=None)
        return
    with tempfile.TemporaryDirectory(prefix="invar-checkpoint-") as name:
        folder = Path(name)
        save_checkpoint(folder, checkpoint, run)
        if last:
            stage.save(checkpoint.best or checkpoint.engine.parameters, folder / "adapter")
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(name))


def _mean_over_ranks(metrics: Metrics, device: torch.device) -> Metrics:
    names = sorted(metrics)
    values = torch.tensor([metrics[name] for name in names], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(values)
    values /= torch.distributed.get_world_size()
    return dict(zip(names, values.tolist(), strict=True))


def _flush(trackers: list[Tracker]) -> None:
    for tracker in trackers:
        tracker.flush()


def fault_of(record: dict[str, Any]) -> str | None:
    """What is not a finite number in a step's record, the same on every rank."""
    bad = [name for name, value in record.items() if not math.isfinite(value)]
    return f"step {record['step']}: {', '.join(bad)} not a finite number" if bad else None


def _keep_batch(stage: Stage, record: dict[str, Any], root_uri: str, name: str) -> str:
    """Write the step's global batch and numbers below the store; return where."""
    step = int(record["step"])
    uri = join_uri(root_uri, f"faults/{name}-step-{step}.json")
    filesystem, path = resolve_uri(uri)
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    numbers = {key: value if math.isfinite(value) else str(value) for key, value in record.items()}
    content = json.dumps(
        {"numbers": numbers, **stage.describe(step - 1)}, ensure_ascii=False, indent=1
    )
    with filesystem.open_output_stream(path) as stream:
        stream.write(content.encode("utf-8"))
    return uri
