"""Which precision a model computes in, and on what: decided here, so that bf16 means bf16 wherever
it is asked for.
"""

from __future__ import annotations

from typing import Literal

import torch

from invar_ray.config import Config, ScaleConfig
from invar_ray.errors import ModelError
from invar_ray.store.artifacts import Artifact

Precision = Literal["fp32", "bf16"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def torch_dtype(precision: str) -> torch.dtype:
    """The type of weights and products in a precision.

    Raises:
        ModelError: there is no such precision.
    """
    if precision not in _DTYPES:
        raise ModelError(f"there is no precision {precision!r}", expected=" or ".join(_DTYPES))
    return _DTYPES[precision]


def inference_device(scale: ScaleConfig) -> str:
    """Where a run encodes, searches and answers: on GPUs if its actors get any."""
    return "cuda" if scale.embed_gpus_per_worker > 0 else "cpu"


def inference_precision(config: Config, kind: str = "llm") -> Precision:
    """What a run encodes and answers in: ``model.precision`` on GPUs, fp32 on CPUs and for the
    ``coarse`` encoder.

    A recipe that trains in bf16 on GPUs may embed on CPUs, most of which multiply bf16 some ten
    times slower than fp32. Whoever wants bf16 on a CPU asks for it in so many words
    (``open_encoder(.., precision="bf16")``).  What was taken is recorded with the vectors; see
    :func:`made_in`.
    """
    return (
        config.model.precision
        if kind != "coarse" and config.scale.embed_gpus_per_worker > 0
        else "fp32"
    )


def made_in(artifact: Artifact) -> Precision:
    """The precision that the vectors of a ``vectors`` or ``index`` artifact were made in: the one
    to read them in.

    Artifacts from before it was recorded are fp32.
    """
    found: Precision = artifact.info.get("precision", "fp32")
    return found
