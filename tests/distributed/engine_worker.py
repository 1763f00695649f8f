"""One rank of the engine tests: ``python engine_worker.py ROOT OUT RANK WORLD GRID``.

World 1 makes the small store below ROOT and writes metrics and gradients of every case by plain
autograd, without DeepSpeed: the reference.  Through the engine each ZeRO stage computes every case,
GradCache and gradient checkpointing on and off (OUT/parity-*): with GRID ``full`` in all
combinations on 1 rank too, with ``pairwise`` on more ranks and so that any two of (loss, ZeRO
stage, GradCache and checkpointing) meet; with ``bf16`` in that precision, a projection on top, in
all combinations on more ranks (the reference stays in fp32).  On more ranks, ``pairwise`` and
``bf16`` also train without interruption and through a checkpoint on disk, and write both ends
(OUT/state-*).  The process group comes from the environment (MASTER_ADDR, ...).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from invar_ray.config import Config
from invar_ray.training import retriever_stage
from invar_ray.training.generator_stage import GeneratorStage
from invar_ray.training.retriever_stage import RetrieverStage
from tests.distributed.small_store import SmallStore, small_store
from tests.support import with_retriever

ZERO_STAGES = (0, 1, 2, 3)
STATE_ZERO_STAGES = (0, 2, 3)
BF16_ZERO_STAGES = (1, 2, 3)  # 0 is refused, see config/run.py
BF16_OVERRIDES = ("model.projection_dim=96",)
# (GradCache, gradient checkpointing)
MODES = ((False, False), (True, True), (True, False), (False, True))
# With the first budget queries are one chunk and passages are several, with the second both are
# several.
CHUNK_TOKENS = (400, 120)
# Of runs that are resumed: the stage, how, and its token budget.
STATE_CASES: dict[str, int | None] = {"retriever": None}
BF16_STATE_CASES = STATE_CASES | {
    "retriever, cache": 400,
    "generator": None,
    "generator, cache": 120,
}
STEP = 3  # of the batch; not 0, where the invariance loss has no weight
ALONE: dict[str, Any] = {
    "alignment_weight": 0.0,
    "invariance_weight": 0.0,
    "risk_variance_weight": 0.0,
}
# The contrastive loss is always on: the weights let the other one stand out.
RETRIEVER_CASES: dict[str, dict[str, Any]] = {
    "contrastive": ALONE,
    "alignment": ALONE | {"alignment_weight": 30.0},
    "invariance_soft": ALONE | {"invariance_weight": 300.0, "invariance_pattern": "soft"},
    "invariance_hard": ALONE
    | {"invariance_weight": 300.0, "invariance_pattern": "hard", "pattern_share": 0.5},
    "risk_variance": ALONE | {"risk_variance_weight": 30.0},
    "all": {"alignment_weight": 1.0, "invariance_weight": 3.0, "risk_variance_weight": 0.5},
    # 5 questions on 2 ranks: one rank holds a padded row, and perhaps a padded slot.
    "all_odd": {
        "alignment_weight": 1.0,
        "invariance_weight": 3.0,
        "risk_variance_weight": 0.5,
        "global_batch_size": 5,
    },
    "matryoshka": {
        "alignment_weight": 1.0,
        "invariance_weight": 3.0,
        "risk_variance_weight": 0.5,
        "matryoshka_dims": (16, 64),
        "matryoshka_weights": (2.0, 1.0),
    },
}
GENERATOR_CASES: dict[str, dict[str, Any]] = {
    "answer": {},
    "answer_odd": {"global_batch_size": 3},
    "answer_single": {"global_batch_size": 1},  # the second rank has nothing of its own
}


def with_settings(config: Config, stage: str, settings: dict[str, Any]) -> Config:
    if stage == "generator":
        return replace(config, generator=replace(config.generator, **settings))
    fixed = {"alignment_decay_steps": 1000, "invariance_ramp_steps": 1}
    return with_retriever(config, **(fixed | settings))


def make_stage(
    name: str, small: SmallStore, config: Config, rank: int, world: int, zero_stage: int | None
) -> Any:
    made = RetrieverStage if name == "retriever" else GeneratorStage
    inputs = small.retriever_inputs if name == "retriever" else small.generator_inputs
    with loading(zero_stage, config.model.precision):
        stage = made(config, small.trainset.store, inputs, rank, world)
    stage.module.train()
    return stage


def loading(zero_stage: int | None, precision: str) -> contextlib.AbstractContextManager[None]:
    if zero_stage is None:
        return contextlib.nullcontext()
    from invar_ray.training.engine import sharded_loading

    return sharded_loading(zero_stage, precision)


def held_values(module: torch.nn.Module) -> Tensor:
    """How many of the base's values this rank holds, and how many there are."""
    base = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    shards = sum(x.ds_tensor.numel() for x in base if hasattr(x, "ds_tensor"))
    whole = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in base)
    return torch.tensor([shards + sum(parameter.numel() for parameter in base), whole])


def make_engine(stage: Any, zero_stage: int, max_grad_norm: float) -> Any:
    from invar_ray.training.engine import Engine

    return Engine(
        stage.module,
        zero_stage=zero_stage,
        precision=stage.config.model.precision,
        weight_decay=0.01,
        max_grad_norm=max_grad_norm,
    )


def disturb(module: torch.nn.Module) -> None:
    """A fresh adapter's B matrices are 0, and with them A's gradients: start from something
    else.
    """
    generator = torch.Generator().manual_seed(5)
    for _, parameter in sorted(module.named_parameters()):
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def plain_gradients(stage: Any, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {
        n: p.grad.detach().clone() for n, p in stage.module.named_parameters() if p.requires_grad
    }
    stage.module.zero_grad(set_to_none=True)
    return found


def modes_of(grid: str, case: int, zero_stage: int) -> Sequence[tuple[bool, bool]]:
    """All modes, or the one of a Latin square, in which each case and each ZeRO stage meets every
    mode.
    """
    return (MODES[(case + zero_stage) % len(MODES)],) if grid == "pairwise" else MODES


def cell(case: str, mode: tuple[bool, bool]) -> str:
    return f"{case}|{'cache' if mode[0] else 'plain'},{'recompute' if mode[1] else 'keep'}"


def gradients_of(
    stage: Any, engine: Any, tokens: int | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    from invar_ray.training.worker import step_gradients

    if engine is None:
        loss, metrics = stage.loss(stage.module, STEP)
        return plain_gradients(stage, loss), metrics
    metrics = step_gradients(stage, engine, STEP, tokens)
    found = engine.gradients()
    engine.step(0.0)  # changes nothing, clears the gradients
    return found, metrics


def counted_chunks() -> list[tuple[int, int]]:
    """Where pairs of (this rank's chunks, those that all ranks run) are put from now on."""
    from invar_ray.training import engine, worker

    counts: list[tuple[int, int]] = []

    def counting(count: int) -> int:
        counts.append((count, engine.largest_over_ranks(count)))
        return counts[-1][1]

    worker.largest_over_ranks = counting
    return counts


def recomputing(stage: Any, on: bool) -> None:
    model = stage.module.base
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def parity(small: SmallStore, out: Path, rank: int, world: int, grid: str, engines: bool) -> None:
    engine_stages = BF16_ZERO_STAGES if grid == "bf16" else ZERO_STAGES
    for zero_stage in engine_stages if engines else (None,):
        found: dict[str, Tensor] = {}
        counts = counted_chunks() if engines else []
        for name, cases in (("retriever", RETRIEVER_CASES), ("generator", GENERATOR_CASES)):
            stage = make_stage(name, small, small.config, rank, world, zero_stage)
            found[f"held/{name}"] = held_values(stage.module)
            disturb(stage.module)
            engine = None if zero_stage is None else make_engine(stage, zero_stage, 0.0)
            for number, (case, settings) in enumerate(cases.items()):
                stage.config = with_settings(small.config, name, settings)
                for mode in (
                    modes_of(grid, number, zero_stage) if zero_stage is not None else MODES[:1]
                ):
                    recomputing(stage, mode[1])
                    tokens = CHUNK_TOKENS[number % len(CHUNK_TOKENS)] if mode[0] else None
                    gradients, metrics = gradients_of(stage, engine, tokens)
                    label = case if engine is None else cell(case, mode)
                    for key, value in sorted(metrics.items()):
                        mean = torch.tensor(value, dtype=torch.float64)
                        if world > 1:
                            torch.distributed.all_reduce(mean)
                        found[f"{label}/metric/{key}"] = mean / world
                    found |= {
                        f"{label}/grad/{key}": value.float().contiguous()
                        for key, value in gradients.items()
                    }
            if name == "retriever" and engine is not None and world > 1:
                stage.config = with_settings(small.config, name, RETRIEVER_CASES["all"])
                for case, wrong in PLANTED.items():
                    right = retriever_stage.gather_rows
                    retriever_stage.gather_rows = wrong
                    try:
                        gradients, _ = gradients_of(stage, engine, None)
                    finally:
                        retriever_stage.gather_rows = right
                    found |= {
                        f"{case}/grad/{key}": value.float().contiguous()
                        for key, value in gradients.items()
                    }
        found["chunks"] = torch.tensor(counts, dtype=torch.long).view(-1, 2)
        save_file(found, out / f"parity-z{zero_stage}-w{world}-r{rank}.safetensors")


def detached_documents(x: Tensor) -> Tensor:
    """A known wrong gather: other ranks' passages without gradient, one's own spliced in."""
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, x.detach().contiguous())
    parts[torch.distributed.get_rank()] = x
    return torch.cat(parts)


class _UnscaledSlice(torch.autograd.Function):
    """A known wrong gather: backward averages over ranks what they should add up, and returns one's
    own slice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        mean = gradient.contiguous().clone()
        torch.distributed.all_reduce(mean)
        start = torch.distributed.get_rank() * ctx.rows
        return mean[start : start + ctx.rows] / torch.distributed.get_world_size()


PLANTED: dict[str, Callable[[Tensor], Tensor]] = {
    "planted: detached documents": detached_documents,
    "planted: unscaled slice": _UnscaledSlice.apply,
}


def state(
    small: SmallStore,
    out: Path,
    rank: int,
    world: int,
    zero_stage: int,
    case: str,
    tokens: int | None,
) -> None:
    from invar_ray.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from invar_ray.training.worker import step_gradients

    def train(engine: Any, stage: Any, first: int, last: int) -> list[float]:
        norms = []
        for step in range(first, last):
            step_gradients(stage, engine, step, tokens)
            norms.append(engine.step(2e-3))
        return norms

    def end(engine: Any) -> dict[str, Tensor]:
        found = engine.state()
        flat = {f"parameter/{name}": value for name, value in found.parameters.items()}
        for key, group in found.moments.items():
            flat |= {f"{key}/{name}": value for name, value in group.items()}
        return flat | {"adam_step": torch.tensor(found.adam_step)}

    name = case.partition(",")[0]
    whole_stage = make_stage(name, small, small.config, rank, world, zero_stage)
    whole = make_engine(whole_stage, zero_stage, 1.0)
    begin = end(whole)
    norms = train(whole, whole_stage, 0, 3)
    half, half_state = end(whole), whole.state()
    folder = out / f"checkpoint-{case}-z{zero_stage}"
    if rank == 0:
        folder.mkdir()
        save_checkpoint(folder, Checkpoint(3, half_state, []), "run")
    torch.distributed.barrier()
    norms += train(whole, whole_stage, 3, 6)

    read = load_checkpoint(folder, "run").engine
    stage = make_stage(name, small, small.config, rank, world, zero_stage)
    with torch.no_grad():
        for key, parameter in stage.module.named_parameters():
            if key in read.parameters:
                parameter.copy_(read.parameters[key])
    resumed = make_engine(stage, zero_stage, 1.0)
    resumed.load_state(read)
    loaded = end(resumed)
    later = train(resumed, stage, 3, 6)
    found = {
        "norms/whole": torch.tensor(norms, dtype=torch.float64),
        "norms/resumed": torch.tensor(later, dtype=torch.float64),
        "inv_freq": stage.module.base.model.rotary_emb.inv_freq.clone(),
    }
    for part, values in (
        ("begin", begin),
        ("half", half),
        ("loaded", loaded),
        ("whole", end(whole)),
        ("resumed", end(resumed)),
    ):
        found |= {f"{part}/{key}": value for key, value in values.items()}
    save_file(found, out / f"state-{case}-z{zero_stage}-w{world}-r{rank}.safetensors")


def main(root: str, out: Path, rank: int, world: int, grid: str) -> None:
    torch.set_num_threads(1)
    half = grid == "bf16"
    small = small_store(root, BF16_OVERRIDES if half else ())
    if world == 1:
        parity(small, out, rank, world, grid, engines=False)
        if grid != "full":
            return
    from invar_ray.training.engine import init_distributed

    init_distributed(use_gpu=False)
    if half:
        model = replace(small.config.model, precision="bf16")
        small = replace(small, config=replace(small.config, model=model))
    parity(small, out, rank, world, grid, engines=True)
    if grid != "full":
        for case, tokens in (BF16_STATE_CASES if half else STATE_CASES).items():
            for zero_stage in BF16_ZERO_STAGES if half else STATE_ZERO_STAGES:
                state(small, out, rank, world, zero_stage, case, tokens)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
