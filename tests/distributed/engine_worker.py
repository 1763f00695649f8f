"""One rank of the engine tests: ``python engine_worker.py ROOT OUT RANK WORLD``.

World 1 makes the small store below ROOT and writes metrics and gradients of every case by plain autograd, without
DeepSpeed: the reference.  More ranks do the same through the engine under each ZeRO stage (OUT/parity-*), then train
without interruption and through a checkpoint on disk, and write both ends (OUT/state-*).  The process group comes from
the environment (MASTER_ADDR, ...).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small_store import SmallStore, small_store
from torch import Tensor

from invar_ray.config import Config
from invar_ray.training.stages import GeneratorStage, RetrieverStage

ZERO_STAGES = (0, 2, 3)
STEP = 3  # of the batch; not 0, where the invariance loss has no weight
ALONE: dict[str, Any] = {"alignment_weight": 0.0, "invariance_weight": 0.0, "risk_variance_weight": 0.0}
# The contrastive loss is always on: the weights let the other one stand out.
RETRIEVER_CASES: dict[str, dict[str, Any]] = {
    "contrastive": ALONE,
    "alignment": ALONE | {"alignment_weight": 30.0},
    "invariance_soft": ALONE | {"invariance_weight": 300.0, "invariance_pattern": "soft"},
    "invariance_hard": ALONE | {"invariance_weight": 300.0, "invariance_pattern": "hard", "pattern_share": 0.5},
    "risk_variance": ALONE | {"risk_variance_weight": 30.0},
    "all": {"alignment_weight": 1.0, "invariance_weight": 3.0, "risk_variance_weight": 0.5},
    # 5 questions on 2 ranks: one rank holds a padded row, and perhaps a padded slot.
    "all_odd": {"alignment_weight": 1.0, "invariance_weight": 3.0, "risk_variance_weight": 0.5, "global_batch_size": 5},
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
    return replace(config, retriever=replace(config.retriever, **(fixed | settings)))


def make_stage(name: str, small: SmallStore, config: Config, rank: int, world: int) -> Any:
    made = RetrieverStage if name == "retriever" else GeneratorStage
    inputs = small.retriever_inputs if name == "retriever" else small.generator_inputs
    stage = made(config, small.trainset.store, inputs, rank, world)
    stage.module.train()
    return stage


def make_engine(stage: Any, zero_stage: int, max_grad_norm: float) -> Any:
    from invar_ray.training.engine import Engine

    return Engine(stage.module, zero_stage=zero_stage, precision="fp32", weight_decay=0.01, max_grad_norm=max_grad_norm)


def disturb(module: torch.nn.Module) -> None:
    """A fresh adapter's B matrices are 0, and with them A's gradients: start from something else."""
    generator = torch.Generator().manual_seed(5)
    for _, parameter in sorted(module.named_parameters()):
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def plain_gradients(stage: Any, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {n: p.grad.detach().clone() for n, p in stage.module.named_parameters() if p.requires_grad}
    stage.module.zero_grad(set_to_none=True)
    return found


def parity(small: SmallStore, out: Path, rank: int, world: int) -> None:
    for zero_stage in ZERO_STAGES if world > 1 else (None,):
        found: dict[str, Tensor] = {}
        for name, cases in (("retriever", RETRIEVER_CASES), ("generator", GENERATOR_CASES)):
            stage = make_stage(name, small, small.config, rank, world)
            disturb(stage.module)
            engine = None if zero_stage is None else make_engine(stage, zero_stage, 0.0)
            for case, settings in cases.items():
                stage.config = with_settings(small.config, name, settings)
                loss, metrics = stage.loss(engine or stage.module, STEP)
                if engine is None:
                    gradients = plain_gradients(stage, loss)
                else:
                    engine.backward(loss)
                    gradients = engine.gradients()
                    engine.step(0.0)  # changes nothing, clears the gradients
                for key, value in sorted(metrics.items()):
                    mean = torch.tensor(value, dtype=torch.float64)
                    if world > 1:
                        torch.distributed.all_reduce(mean)
                    found[f"{case}/metric/{key}"] = mean / world
                found |= {f"{case}/grad/{key}": value.float().contiguous() for key, value in gradients.items()}
        save_file(found, out / f"parity-z{zero_stage}-w{world}-r{rank}.safetensors")


def state(small: SmallStore, out: Path, rank: int, world: int) -> None:
    from invar_ray.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

    def train(engine: Any, stage: Any, first: int, last: int) -> list[float]:
        norms = []
        for step in range(first, last):
            loss, _ = stage.loss(engine, step)
            engine.backward(loss)
            norms.append(engine.step(2e-3))
        return norms

    def end(engine: Any) -> dict[str, Tensor]:
        found = engine.state()
        flat = {f"parameter/{name}": value for name, value in found.parameters.items()}
        for key, group in found.moments.items():
            flat |= {f"{key}/{name}": value for name, value in group.items()}
        return flat | {"adam_step": torch.tensor(found.adam_step)}

    for zero_stage in ZERO_STAGES:
        whole_stage = make_stage("retriever", small, small.config, rank, world)
        whole = make_engine(whole_stage, zero_stage, 1.0)
        begin = end(whole)
        norms = train(whole, whole_stage, 0, 3)
        half, half_state = end(whole), whole.state()
        folder = out / f"checkpoint-z{zero_stage}"
        if rank == 0:
            folder.mkdir()
            save_checkpoint(folder, Checkpoint(3, half_state, []), "run")
        torch.distributed.barrier()
        norms += train(whole, whole_stage, 3, 6)

        read = load_checkpoint(folder, "run").engine
        stage = make_stage("retriever", small, small.config, rank, world)
        with torch.no_grad():
            for name, parameter in stage.module.named_parameters():
                if name in read.parameters:
                    parameter.copy_(read.parameters[name])
        resumed = make_engine(stage, zero_stage, 1.0)
        resumed.load_state(read)
        loaded = end(resumed)
        later = train(resumed, stage, 3, 6)
        found = {
            "norms/whole": torch.tensor(norms, dtype=torch.float64),
            "norms/resumed": torch.tensor(later, dtype=torch.float64),
        }
        for part, values in (
            ("begin", begin),
            ("half", half),
            ("loaded", loaded),
            ("whole", end(whole)),
            ("resumed", end(resumed)),
        ):
            found |= {f"{part}/{key}": value for key, value in values.items()}
        save_file(found, out / f"state-z{zero_stage}-w{world}-r{rank}.safetensors")


def main(root: str, out: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    small = small_store(root)
    if world == 1:
        parity(small, out, rank, world)
        return
    from invar_ray.training.engine import init_distributed

    init_distributed(use_gpu=False)
    parity(small, out, rank, world)
    state(small, out, rank, world)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
