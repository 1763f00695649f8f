"""Stage 2: the ``generator`` artifact, a LoRA adapter that answers from what was retrieved."""

from __future__ import annotations

from dataclasses import asdict

from invar_ray.config import Config, to_dict
from invar_ray.executor import Executor
from invar_ray.models.base import BaseRef
from invar_ray.store.artifacts import Artifact, Building, Plan
from invar_ray.training.trainer import train

VERSION = 4


def plan(config: Config, base: BaseRef, readings: Artifact) -> Plan:
    """The stage-2 adapter."""
    return Plan(
        kind="generator",
        name=config.name,
        config={
            "base": base.fingerprint,
            "generator": to_dict(config.generator) | to_dict(config.experimental.generator),
            "quantize": config.experimental.model.quantize,
            "precision": config.model.precision,
            "seed": config.seed,
        },
        parents={"readings": readings},
        version=VERSION,
    )


def build(
    building: Building, config: Config, base: BaseRef, readings: Artifact, *, executor: Executor
) -> None:
    """Stage 2: fill an adapter artifact.

    Args:
        building: gets it.
        config: the run.
        base: what is adapted.
        readings: questions with what was retrieved for them.
        executor: trains, on Ray.

    Raises:
        ResourceError: if the cluster cannot run the workers, or they keep failing.
    """
    reference = asdict(base)
    inputs = {"readings": readings.ref, "base": reference}
    with executor.on_cluster("training of the generator"):
        train(building, config, "generator", inputs, readings.store.root_uri)
    building.info |= {
        "base": reference,
        "precision": config.model.precision,
        "max_context": config.generator.max_tokens,
        "max_new_tokens": config.generator.max_new_tokens,
    }
