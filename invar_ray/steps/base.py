"""A built-in base model: the ``model`` artifact, which every node can open."""

from __future__ import annotations

from typing import Any

from invar_ray.config import Config, to_dict
from invar_ray.models.base import BUILTIN, SMOLLM2
from invar_ray.models.smollm2 import PACKAGE, SHA256, load_smollm2
from invar_ray.models.tiny import build_tiny
from invar_ray.store.artifacts import Building, Plan

__all__ = ["BUILTIN", "VERSION", "build", "plan"]

VERSION = 1


def plan(config: Config) -> Plan:
    """The artifact of a built-in base (``config.model.base`` is one of :data:`BUILTIN`)."""
    seeded: dict[str, Any] = {"tiny": to_dict(config.experimental.model.tiny), "seed": config.seed}
    smollm2 = config.model.base == SMOLLM2
    return Plan(
        kind="model",
        name=config.model.base.removeprefix("builtin:"),
        config={"package": PACKAGE, "sha256": SHA256} if smollm2 else seeded,
        version=VERSION,
    )


def build(building: Building, config: Config) -> None:
    """Write a built-in base into an artifact under construction.

    Raises:
        ModelError: if the package that carries its weights is not installed.
    """
    if config.model.base == SMOLLM2:
        model, tokenizer = load_smollm2()
    else:
        model, tokenizer = build_tiny(config.experimental.model.tiny, config.seed)
    model.save_pretrained(building.path)
    tokenizer.save_pretrained(building.path)
    building.info["parameters"] = sum(parameter.numel() for parameter in model.parameters())
