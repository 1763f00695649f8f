"""DeepSpeed behind one door.  The only file that imports it.

Gradients are averaged over ranks; a loss that is the local rows' share of the global one is
therefore exact (see ``losses``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__ as compatible_ops
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class EngineState:
    """Complete, unsharded training state of the trainable parameters; the same on every rank.

    Attributes:
        parameters: name -> float32 value.
        moments: ``exp_avg`` / ``exp_avg_sq`` -> name -> float32 value (empty before the first
            step).
        adam_step: Adam's own step count, for its bias correction.
    """

    parameters: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    adam_step: int


def init_distributed(use_gpu: bool) -> None:
    """Join the process group that the launcher described in the environment (gloo on CPU, NCCL on
    GPU).
    """
    if not use_gpu:
        # Its just-in-time build takes some 90 s and a killed build leaves a lock that hangs the
        # next one.
        compatible_ops["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if use_gpu else "gloo", auto_mpi_discovery=False, verbose=False
    )


def largest_over_ranks(count: int) -> int:
    """The largest of the ranks' numbers, on all of them."""
    device = (
        torch.device("cuda") if torch.distributed.get_backend() == "nccl" else torch.device("cpu")
    )
    largest = torch.tensor(count, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return int(largest)


def broadcast_text(text: str) -> str:
    """Rank 0's text, on all ranks; every rank must call it."""
    if torch.distributed.get_world_size() == 1:
        return text
    device = (
        torch.device("cuda") if torch.distributed.get_backend() == "nccl" else torch.device("cpu")
    )
    content = torch.tensor(list(text.encode("utf-8")), dtype=torch.uint8, device=device)
    size = torch.tensor(len(content), device=device)
    torch.distributed.broadcast(size, src=0)
    if torch.distributed.get_rank() != 0:
        content = torch.empty(int(size), dtype=torch.uint8, device=device)
    torch.distributed.broadcast(content, src=0)
    return bytes(content.tolist()).decode("utf-8")


@contextlib.contextmanager
def sharded_loading(zero_stage: int, precision: str) -> Iterator[None]:
    """Under ZeRO 3, models that are loaded inside come in shards: each weight is cut as soon as it
    is read, by rank 0, so that no device holds a whole model.  Nothing changes under other stages.

    Every rank must load the same models in the same order, with the CPU as their device.
    """
    # transformers asks for it, and lets go of it with the last reference.
    settings = _settings(zero_stage, precision, 0.0)
    shards = HfDeepSpeedConfig(settings) if zero_stage == 3 else None
    try:
        yield
    finally:
        del shards


def _settings(zero_stage: int, precision: str, max_grad_norm: float) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class Engine:
    """A module under DeepSpeed with AdamW.

    Args:
        module: frozen except for what trains; already on its device.
        zero_stage: 0-3.
        precision: ``fp32`` or ``bf16``.
        weight_decay: decoupled.
        max_grad_norm: 0 switches clipping off.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        zero_stage: int,
        precision: str,
        weight_decay: float,
        max_grad_norm: float,
    ) -> None:
        self.zero_stage = zero_stage
        if zero_stage == 3 and precision == "bf16":
            # DeepSpeed casts nothing in a module of which some weights came in shards, and PEFT
            # makes adapters in fp32.
            for parameter in module.parameters():
                if not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.to(torch.bfloat16)
        self._names = [
            name for name, parameter in module.named_parameters() if parameter.requires_grad
        ]
        self._parameters = [
            parameter for parameter in module.parameters() if parameter.requires_grad
        ]
        optimizer = torch.optim.AdamW(
            self._parameters, lr=0.0, betas=(0.9, 0.999), weight_decay=weight_decay
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=_settings(zero_stage, precision, max_grad_norm),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the module."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss``, averaged over ranks when :meth:`step` comes."""
        self._engine.backward(loss, scale_wrt_gas=False)

    @contextlib.contextmanager
    def accumulation(self) -> Iterator[None]:
        """Inside, :meth:`backward` calls add up; they are reduced over ranks once, on leaving.  One
        block a step.
        """
        if self.zero_stage > 0:
            with self._engine.coalesce_grad_reduction():
                yield
            return
        with self._engine.no_sync():
            yield
        self._engine.allreduce_gradients()

    def step(self, learning_rate: float) -> float:
        """One AdamW step. Returns the gradient norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        # Without ZeRO DeepSpeed clips but keeps no norm; the averaged gradients lie in .grad there.
        norm = (
            torch.nn.utils.get_total_norm(gradients) if self.zero_stage == 0 and gradients else None
        )
        self._engine.step()
        kept = self._engine.get_global_grad_norm()
        return float(kept) if kept is not None else float("nan") if norm is None else float(norm)

    def gradients(self) -> dict[str, Tensor]:
        """Averaged full gradients by name, between :meth:`backward` and :meth:`step`; for parity
        tests.
        """
        return {
            name: safe_get_full_grad(parameter).detach().clone()
            for name, parameter in zip(self._names, self._parameters, strict=True)
        }

    def state(self) -> EngineState:
        """Collect the full state; every rank must call it."""
        parameters: dict[str, Tensor] = {}
        moments: dict[str, dict[str, Tensor]] = {key: {} for key in _MOMENTS}
        step = self._adam_step()
        for name, parameter in zip(self._names, self._parameters, strict=True):
            full = parameter if self.zero_stage == 0 else safe_get_full_fp32_param(parameter)
            parameters[name] = full.detach().float().cpu().clone()
            for key in _MOMENTS if step else ():
                if self.zero_stage == 0:
                    value = self._inner().state[parameter][key]
                else:
                    value = safe_get_full_optimizer_state(parameter, key)
                moments[key][name] = value.detach().float().cpu().clone()
        return EngineState(parameters, moments, step)

    def load_state(self, state: EngineState) -> None:
        """Put a state back; the module's parameters must already hold ``state.parameters`` (so that
        every precision's copy agrees).  Every rank must call it, before the first step.
        """
        if state.adam_step == 0:
            return
        self._allocate_moments(state.adam_step)
        for name, parameter in zip(self._names, self._parameters, strict=True):
            device = parameter.device
            if self.zero_stage > 0:
                safe_set_full_fp32_param(parameter, state.parameters[name].to(device))
            for key in _MOMENTS:
                value = state.moments[key][name].to(device)
                if self.zero_stage == 0:
                    self._inner().state[parameter][key].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    def _inner(self) -> Any:
        """The AdamW under ZeRO's wrapper."""
        return getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)

    def _flat_parameters(self) -> list[Tensor]:
        if self.zero_stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [parameter for group in self._inner().param_groups for parameter in group["params"]]

    def _adam_step(self) -> int:
        for entry in self._inner().state.values():
            if "step" in entry:
                return int(entry["step"])
        return 0

    def _allocate_moments(self, step: int) -> None:
        # AdamW allocates on its first step, when ZeRO links its shards to the moments: a restored
        # run needs both now.
        for parameter in self._flat_parameters():
            self._inner().state[parameter] = {
                "step": torch.tensor(float(step)),
                **{key: torch.zeros_like(parameter) for key in _MOMENTS},
            }
        link = getattr(self._engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:
            link()
