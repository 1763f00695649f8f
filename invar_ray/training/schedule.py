"""The learning rate over the steps."""

from __future__ import annotations

from invar_ray.config import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Linear warm-up over ``warmup_steps``, then linear decay that reaches 0 after the last step."""
    warmup = min(optimizer.warmup_steps, steps)
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / warmup
    return optimizer.learning_rate * (steps - step) / max(1, steps - warmup)
