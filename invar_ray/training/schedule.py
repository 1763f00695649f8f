"""What follows from the step and the log: the learning rate, the best step, when to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from invar_ray.config import OptimizerConfig
from invar_ray.training.stage import HELDOUT

WEIGHT_DECAY = 0.0
"""AdamW's, decoupled: adapters are small and start at zero."""
MAX_GRAD_NORM = 1.0
"""Gradients are scaled down to this global norm."""


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Linear warm-up over ``warmup_steps``, then linear decay that reaches 0 after the last
    step.
    """
    warmup = min(optimizer.warmup_steps, steps)
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / warmup
    return optimizer.learning_rate * (steps - step) / max(1, steps - warmup)


def best_step(log: Sequence[Mapping[str, Any]]) -> int | None:
    """The step with the most of ``HELDOUT`` in a log, the first of equals; ``None`` where nothing
    was measured.
    """
    measured = [record for record in log if HELDOUT in record]
    return (
        int(max(measured, key=lambda record: (record[HELDOUT], -record["step"]))["step"])
        if measured
        else None
    )


def is_exhausted(log: Sequence[Mapping[str, Any]], patience: int | None) -> bool:
    """Whether ``patience`` measurements in a row have not been better than the best one before;
    never for ``None``.
    """
    best = best_step(log)
    if patience is None or best is None:
        return False
    return sum(HELDOUT in record and record["step"] > best for record in log) >= patience
