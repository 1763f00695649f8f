"""A built-in base model: the ``model`` artifact, which every node can open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoTokenizer

from invar_ray.config import Config, to_dict
from invar_ray.models.base import BUILTIN, MINILM, SMOLLM2, folder_fingerprint
from invar_ray.models.smollm2 import PACKAGE, SHA256, load_smollm2
from invar_ray.models.tiny import build_tiny, minilm_folder
from invar_ray.store.artifacts import Building, Plan

__all__ = ["BUILTIN", "VERSION", "build", "plan"]

VERSION = 1


def plan(config: Config, name: str | None = None) -> Plan:
    """The artifact of a built-in base.

    Args:
        config: the run.
        name: one of :data:`invar_ray.models.base.BUILTIN_RETRIEVER`; ``None`` is ``model.base``.

    Raises:
        ModelError: if MiniLM's package is not installed.
    """
    name = name or config.model.base
    content: dict[str, Any] = {
        "tiny": to_dict(config.experimental.model.tiny),
        "seed": config.seed,
    }
    if name == SMOLLM2:
        content = {"package": PACKAGE, "sha256": SHA256}
    elif name == MINILM:
        content = {"folder": folder_fingerprint(minilm_folder())}
    return Plan(kind="model", name=name.removeprefix("builtin:"), config=content, version=VERSION)


def build(building: Building, config: Config, name: str | None = None) -> None:
    """Write a built-in base into an artifact under construction; ``name`` as in :func:`plan`.

    Raises:
        ModelError: if the package that carries its weights is not installed.
    """
    name = name or config.model.base
    model: Any
    tokenizer: Any
    if name == SMOLLM2:
        model, tokenizer = load_smollm2()
    elif name == MINILM:
        folder = minilm_folder()
        model = AutoModel.from_pretrained(folder, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        _copy_descriptions(folder, building.path)
    else:
        model, tokenizer = build_tiny(config.experimental.model.tiny, config.seed)
    model.save_pretrained(building.path)
    tokenizer.save_pretrained(building.path)
    building.info["parameters"] = sum(parameter.numel() for parameter in model.parameters())


def _copy_descriptions(source: Path, target: Path) -> None:
    """What sentence-transformers says of an encoder: how it pools, how long its texts are."""
    for path in [
        *source.glob("modules.json"),
        *source.glob("*sentence*.json"),
        *source.glob("*/config.json"),
    ]:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
