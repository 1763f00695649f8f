"""Which precision a model computes in, and on what: decided here, so that bf16 means bf16 wherever
it is asked for.
"""

from __future__ import annotations

import time
from typing import Literal

import torch

from invar_ray.config import Config, ScaleConfig
from invar_ray.errors import ModelError
from invar_ray.store.artifacts import Artifact

Precision = Literal["fp32", "bf16"]

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MEASURE_S = 0.3  # of each precision


def torch_dtype(precision: str) -> torch.dtype:
    """The type of weights and products in a precision.

    Raises:
        ModelError: there is no such precision.
    """
    for name, dtype in _DTYPES.items():
        if name == precision:
            return dtype
    raise ModelError(f"there is no precision {precision!r}", expected=" or ".join(_DTYPES))


def inference_device(scale: ScaleConfig) -> str:
    """Where a run encodes, searches and answers: on GPUs if its actors get any."""
    return "cuda" if scale.embed_gpus_per_worker > 0 else "cpu"


def inference_precision(config: Config, kind: str = "llm") -> Precision:
    """What a run encodes and answers in: ``model.precision``; fp32 for the ``coarse`` encoder.
    What was taken is recorded with the vectors; see :func:`made_in`.

    Raises:
        ModelError: ``auto`` was not resolved.
    """
    precision = config.model.precision
    if kind == "coarse":
        return "fp32"
    if precision == "auto":
        raise ModelError(
            "model.precision is auto, which a Pipeline resolves",
            expected="fp32 or bf16",
            action="take the config of the Pipeline",
        )
    return precision


def multiplication_rates(width: int, inner: int) -> dict[Precision, float]:
    """GFLOP/s of one core in each precision, on products of a layer's forward and backward pass.

    Args:
        width: of the model's hidden states.
        inner: of its MLP.

    Takes about a second; processor time is counted, so that other work on the machine does not.
    """
    flops = 6 * width * inner
    rows = max(64, min(1024, round(4e9 / flops)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            name: rows * flops / _fastest_pass(rows, width, inner, dtype) / 1e9
            for name, dtype in _DTYPES.items()
        }
    finally:
        torch.set_num_threads(threads)


def _fastest_pass(rows: int, width: int, inner: int, dtype: torch.dtype) -> float:
    """Seconds of the fastest of some passes, the first one left out."""
    x, weight = torch.ones(rows, width, dtype=dtype), torch.ones(inner, width, dtype=dtype)
    fastest, begin, passes = float("inf"), time.thread_time(), 0
    while passes < 2 or time.thread_time() - begin < _MEASURE_S:
        started = time.thread_time()
        y = x @ weight.T  # forward
        y @ weight  # the input's gradient
        y.T @ x  # a weight's
        passes += 1
        if passes > 1:
            fastest = min(fastest, max(1e-9, time.thread_time() - started))
    return fastest


def made_in(artifact: Artifact) -> Precision:
    """The precision that a ``vectors`` or ``index`` artifact, or an adapter, was made in: the one
    to read it in.

    Artifacts from before it was recorded are fp32.
    """
    found: Precision = artifact.info.get("precision", "fp32")
    return found
