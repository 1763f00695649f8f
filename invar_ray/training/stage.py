"""What the training loop needs of a stage, what the two stages share, and what follows from the
step and the log: the learning rate, the best step, when to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from invar_ray.config import Config, OptimizerConfig
from invar_ray.models.adapters import save_adapter

HELDOUT = "heldout_worst_recall_at_5"
HELDOUT_OVERLAP = "heldout_overlap_at_10"
T = TypeVar("T")
WEIGHT_DECAY = 0.0
"""AdamW's, decoupled: adapters are small and start at zero."""
MAX_GRAD_NORM = 1.0
"""Gradients are scaled down to this global norm."""
Forward = Callable[..., Tensor]
Metrics = dict[str, float]
Mine = Callable[[Config, str, str, str, str], dict[str, Any]]
"""Makes new negatives: (config, root URI, ref of an adapter, ref of the run's training set, ref of
the one in use) -> ``trainset``, the ref of the new one, and numbers about it."""
NEGATIVES_FILE = "negatives.json"
"""Of a checkpoint and of an adapter: the versions of the negatives."""


class Chunking(NamedTuple):
    """How the gradients of a step are taken in parts.

    Attributes:
        tokens: budget of a part, padding included.
        agree: this rank's number of parts -> the number that every rank runs.
        backward: back-propagates a part through the module.
    """

    tokens: int
    agree: Callable[[int], int]
    backward: Callable[[Tensor], object]


class Stage(Protocol):
    """What the loop needs of a stage."""

    module: nn.Module
    steps: int
    measure_every: int
    """Steps between calls of :meth:`measure`; 0 for never."""

    def loss(self, forward: Forward, step: int) -> tuple[Tensor, Metrics]:
        """The local share of the step's global loss (its average over ranks is the global one), and
        numbers to log.

        Of these ``tokens`` and ``padded_tokens`` (padding included) are this rank's, all others
        shares of the global value.
        """
        ...

    def accumulate(self, forward: Forward, step: int, chunking: Chunking) -> Metrics:
        """The gradients of :meth:`loss` in the memory of one part, left in the module's parameters;
        its numbers.
        """
        ...

    def measure(self, forward: Forward, chunking: Chunking) -> Metrics:
        """Numbers of held-out questions, the same on every rank; ``HELDOUT`` among them is what the
        best step has most of.  Every rank must call it.
        """
        ...

    def describe(self, step: int) -> dict[str, Any]:
        """The global batch of a step as plain values, for the reader of a failure."""
        ...

    def save(self, parameters: dict[str, Tensor], folder: Path) -> None:
        """Write the adapter from complete parameters (named as in ``module``)."""
        ...


class Ahead(Generic[T]):
    """Makes a step's batch in a thread while the device is busy with the step before.

    What a batch holds follows from (seed, step), so that it is the same whoever makes it, and when.

    Args:
        make: step -> its batch, on the CPU.
        steps: of the run; no batch is made beyond.
    """

    def __init__(self, make: Callable[[int], T], steps: int) -> None:
        self._make, self._steps = make, steps
        self._thread = ThreadPoolExecutor(1, "next-batch")
        self._next: tuple[int, Future[T]] | None = None

    def batch(self, step: int) -> T:
        """The batch of a step; the next one is begun."""
        made_ahead = self._next
        self.forget()
        if made_ahead is not None and made_ahead[0] == step:
            found = made_ahead[1].result()
        else:
            found = self._make(step)
        if step + 1 < self._steps:
            self._next = step + 1, self._thread.submit(self._make, step + 1)
        return found

    def forget(self) -> None:
        """Wait for the thread, and drop what it made: the tokenizer is free, and a change of what
        is trained on holds from the next batch on.
        """
        if self._next is not None:
            wait([self._next[1]])
            self._next = None


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A batch's tensor where the model is; to a GPU from pinned memory, without waiting."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def recompute(base: Any, config: Config) -> None:
    """Switch gradient checkpointing on where the config says so."""
    if config.scale.gradient_checkpointing:
        # The reentrant form fails under ZeRO 2 and 3.
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def save_lora(
    model: Any, parameters: dict[str, Tensor], prefix: str, folder: Path, base_name: str
) -> None:
    """Write a PEFT folder from parameters that are named ``prefix`` + name in the model."""
    state = {
        f"base_model.model.{name.removeprefix(prefix)}": value
        for name, value in parameters.items()
        if name.startswith(prefix)
    }
    save_adapter(model, state, folder, base_name)


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
