"""What the training loop needs of a stage, and what the two stages share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from invar_ray.config import Config
from invar_ray.models.adapters import save_adapter
from invar_ray.models.precision import torch_dtype

HELDOUT = "heldout_worst_recall_at_5"
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


def dtype_of(config: Config) -> torch.dtype:
    """The precision that the base is loaded in."""
    return torch_dtype(config.model.precision)


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
