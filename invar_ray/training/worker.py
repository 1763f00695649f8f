"""The loop that every training worker runs, for either stage."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import torch
from torch import Tensor

from invar_ray.artifacts import Store
from invar_ray.config import Config, OptimizerConfig
from invar_ray.errors import DataError
from invar_ray.progress import Progress
from invar_ray.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from invar_ray.training.engine import Engine, init_distributed, largest_over_ranks
from invar_ray.training.stage import Chunking, Metrics, Stage
from invar_ray.training.stages import STAGES

_SEED_STRIDE = 1_000_003


def train_worker(payload: dict[str, Any]) -> int:
    """Train from the last checkpoint to the last step.

    Args:
        payload: ``stage``, ``config``, ``root_uri``, ``inputs`` (refs of artifacts) and ``run`` (fingerprint).

    Returns:
        The step that this attempt started from.
    """
    config: Config = payload["config"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    init_distributed(config.scale.use_gpu)
    stage = STAGES[payload["stage"]](config, Store(payload["root_uri"]), payload["inputs"], rank, world_size)
    optimizer = config.retriever.optimizer if payload["stage"] == "retriever" else config.generator.optimizer
    device = ray.train.torch.get_device() if config.scale.use_gpu else torch.device("cpu")
    stage.module.to(device)

    resumed = _resume(payload["run"])
    if resumed is not None:
        _put(stage, resumed.engine.parameters)
    engine = Engine(
        stage.module,
        zero_stage=config.scale.zero_stage,
        precision=config.model.precision,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
    )
    if resumed is not None:
        engine.load_state(resumed.engine)
    first, log = (resumed.step, resumed.log) if resumed is not None else (0, [])
    stage.module.train()
    progress = Progress(f"train {payload['stage']}", stage.steps, "steps", done=first)
    for step in range(first, stage.steps):
        started = time.monotonic()
        # Dropout is a function of (seed, step, rank): a resumed run repeats the masks of the one that was cut off.
        torch.manual_seed(config.seed * _SEED_STRIDE + step * 1009 + rank)
        rate = learning_rate(optimizer, step, stage.steps)
        metrics = step_gradients(stage, engine, step, config.scale.train_tokens_per_chunk)
        norm = engine.step(rate)
        averaged = _mean_over_ranks(metrics, device)
        _refuse_nan(averaged, step)
        log.append({"step": step + 1, "learning_rate": rate, "gradient_norm": norm, **averaged})
        log[-1]["tokens_per_s"] = averaged["tokens"] * world_size / max(1e-9, time.monotonic() - started)
        if rank == 0:
            progress.advance(1, f"loss {averaged['loss']:.4f}")
        if (step + 1) % config.scale.checkpoint_every == 0 or step + 1 == stage.steps:
            _report(engine, stage, Checkpoint(step + 1, engine.state(), log), payload["run"], rank)
    return first


def step_gradients(stage: Stage, engine: Engine, step: int, tokens_per_chunk: int | None) -> Metrics:
    """Leave the step's averaged gradients in the engine; this rank's numbers.

    Args:
        tokens_per_chunk: ``None`` takes the whole share of this rank at once.
    """
    if tokens_per_chunk is None:
        loss, metrics = stage.loss(engine, step)
        engine.backward(loss)
        return metrics
    with engine.accumulation():
        return stage.accumulate(engine, step, Chunking(tokens_per_chunk, largest_over_ranks, engine.backward))


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Linear warm-up over ``warmup_steps``, then linear decay that reaches 0 after the last step."""
    warmup = min(optimizer.warmup_steps, steps)
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / warmup
    return optimizer.learning_rate * (steps - step) / max(1, steps - warmup)


def _resume(run: str) -> Checkpoint | None:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return load_checkpoint(Path(folder), run)


def _put(stage: Stage, parameters: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in stage.module.named_parameters():
            if name in parameters:
                parameter.copy_(parameters[name])


def _report(engine: Engine, stage: Stage, checkpoint: Checkpoint, run: str, rank: int) -> None:
    metrics = {"step": checkpoint.step, "loss": checkpoint.log[-1]["loss"]}
    if rank != 0:
        ray.train.report(metrics, checkpoint=None)
        return
    with tempfile.TemporaryDirectory(prefix="invar-checkpoint-") as name:
        folder = Path(name)
        save_checkpoint(folder, checkpoint, run)
        if checkpoint.step == stage.steps:
            stage.save(checkpoint.engine.parameters, folder / "adapter")
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(name))


def _mean_over_ranks(metrics: Metrics, device: torch.device) -> Metrics:
    names = sorted(metrics)
    values = torch.tensor([metrics[name] for name in names], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(values)
    values /= torch.distributed.get_world_size()
    return dict(zip(names, values.tolist(), strict=True))


def _refuse_nan(metrics: Metrics, step: int) -> None:
    bad = [name for name, value in metrics.items() if value != value]
    if bad:
        raise DataError(
            f"step {step + 1}: {', '.join(bad)} is not a number",
            action="lower the learning rate or raise the temperatures; the last checkpoint stands",
        )
