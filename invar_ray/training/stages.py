"""The stages by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from invar_ray.config import Config
from invar_ray.store.artifacts import Store
from invar_ray.training.generator_stage import GeneratorStage
from invar_ray.training.retriever_stage import RetrieverStage
from invar_ray.training.stage import Stage

STAGES: dict[str, Callable[[Config, Store, dict[str, Any], int, int], Stage]] = {
    "retriever": RetrieverStage,
    "generator": GeneratorStage,
}
