"""Stage 1: the ``retriever`` artifact, a LoRA adapter that makes the base an encoder."""

from __future__ import annotations

import json
from typing import Any

from invar_ray.config import Config, to_dict
from invar_ray.errors import ConfigError
from invar_ray.executor import Executor
from invar_ray.models.base import BaseRef, hidden_size
from invar_ray.models.encoder import EncoderSpec, llm_spec
from invar_ray.steps.refresh import refresh_negatives
from invar_ray.store.artifacts import Artifact, Building, Plan, Store
from invar_ray.store.garbage import remove
from invar_ray.training.stage import NEGATIVES_FILE
from invar_ray.training.trainer import train

VERSION = 2


def plan(config: Config, base: BaseRef, trainset: Artifact) -> Plan:
    """The stage-1 adapter; ``base`` is the retriever's."""
    return Plan(
        kind="retriever",
        name=config.name,
        config={
            "base": base.fingerprint,
            "model": _model_science(config),
            "retriever": to_dict(config.retriever) | to_dict(config.experimental.retriever),
            "document_weight": config.experimental.coarse.document_weight,
            "precision": config.model.precision,
            "seed": config.seed,
        },
        parents={"trainset": trainset},
        version=VERSION,
    )


def build(
    building: Building,
    config: Config,
    base: BaseRef,
    trainset: Artifact,
    *,
    executor: Executor,
) -> None:
    """Stage 1: fill an adapter artifact.

    Args:
        building: gets it.
        config: the run.
        base: what is adapted: the retriever's base.
        trainset: questions, candidates, negatives.
        executor: trains, on Ray.

    Raises:
        ConfigError: if ``matryoshka_dims`` are larger than the vectors.
        ResourceError: if the cluster cannot run the workers, or they keep failing.
    """
    _check_sizes(config, base, trainset.store)
    # The spec of the adapter to be: its fingerprint is the plan's, known before training.
    spec = llm_spec(config.model, base, (building.plan.ref, building.plan.fingerprint))
    inputs = {"trainset": trainset.ref, "encoder": spec.to_json()}
    mine = None if config.experimental.retriever.refresh_every is None else refresh_negatives
    with executor.on_cluster("training of the retriever"):
        train(building, config, "retriever", inputs, trainset.store.root_uri, mine)
    if mine is not None:
        _tidy(building, trainset.store)
    building.info |= {"encoder": spec.to_json(), "precision": config.model.precision}


def encoder_of(adapter: Artifact) -> EncoderSpec:
    """The encoder of a ``retriever`` artifact."""
    return EncoderSpec.from_json(adapter.info["encoder"])


def _model_science(config: Config) -> dict[str, Any]:
    model = to_dict(config.model)
    del model["base"], model["retriever_base"]  # they are in the base's fingerprint
    model["quantize"] = config.experimental.model.quantize
    return model


def _tidy(building: Building, store: Store) -> None:
    """Note the versions of the negatives; remove the vectors and indexes that they were mined
    from.
    """
    refreshes = json.loads((building.path / NEGATIVES_FILE).read_text(encoding="utf-8"))["history"]
    building.info |= {"refreshes": refreshes}
    for refresh in refreshes:
        for ref in refresh["scratch"]:
            remove(store, ref)


def _check_sizes(config: Config, base: BaseRef, store: Store) -> None:
    dims = config.experimental.retriever.matryoshka_dims
    if dims and max(dims) > (full := config.model.projection_dim or hidden_size(base, store)):
        raise ConfigError(
            f"experimental.retriever.matryoshka_dims asks for {max(dims)} values, and the vectors "
            f"have {full}",
            expected=f"sizes of at most {full}",
        )
