"""A base in 4 bits: refused with what is missing; what is asked of bitsandbytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from invar_ray.errors import ResourceError
from invar_ray.models.quantized import quantization
from tests.support import open_folder


def described(folder: Path) -> Path:
    """A folder with what a base is found by; its weights are not reached."""
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed"
)
def test_without_bitsandbytes_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="bitsandbytes is not installed") as caught:
        open_folder(described(tmp_path), quantize="nf4")
    assert "pip install bitsandbytes" in str(caught.value)
    assert "set experimental.model.quantize to null" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def found(name: str, *arguments: Any) -> Any:
        return real("json") if name == "bitsandbytes" else real(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    with pytest.raises(ResourceError, match="sees no CUDA device"):
        open_folder(described(tmp_path), quantize="nf4")


def test_what_is_asked_for() -> None:
    asked = quantization("nf4", torch.bfloat16)
    assert asked.load_in_4bit
    assert (asked.bnb_4bit_quant_type, asked.bnb_4bit_use_double_quant) == ("nf4", True)
    assert asked.bnb_4bit_compute_dtype == torch.bfloat16
