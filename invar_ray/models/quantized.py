"""A base whose linear weights are held in 4 bits: QLoRA (arXiv 2305.14314).  The only file that
knows bitsandbytes.
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from transformers import BitsAndBytesConfig

from invar_ray.errors import ResourceError

Quantize = Literal["nf4"]


def check_quantize() -> None:
    """Refuse where weights in 4 bits cannot be computed with.

    Raises:
        ResourceError: bitsandbytes or a CUDA device is missing.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ResourceError(
            "experimental.model.quantize asks for weights in 4 bits, but the package bitsandbytes "
            "is not installed",
            action="pip install bitsandbytes on every node with a training worker, or set "
            "experimental.model.quantize to null",
        )
    if not torch.cuda.is_available():
        raise ResourceError(
            "experimental.model.quantize asks for weights in 4 bits, but this process sees no CUDA "
            "device",
            expected="a GPU for each training worker",
            action="set scale.use_gpu to true on nodes with GPUs, or experimental.model.quantize "
            "to null",
        )


def quantization(kind: Quantize, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What ``from_pretrained`` takes: NormalFloat of 4 bits, its constants quantised too, products
    in ``dtype``.

    The weights stay on the device that they are loaded to, and get no gradient; adapters go on top
    as on any base.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
