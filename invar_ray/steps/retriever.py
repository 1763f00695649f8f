"""Stage 1: the ``retriever`` artifact, a LoRA adapter that makes the base an encoder."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from invar_ray.config import Config, to_dict
from invar_ray.errors import ConfigError
from invar_ray.executor import Executor
from invar_ray.models.base import SMOLLM2, BaseRef, hidden_size
from invar_ray.models.encoder import EncoderSpec, llm_spec
from invar_ray.steps.refresh import refresh_negatives
from invar_ray.store.artifacts import Artifact, Building, Plan, Store
from invar_ray.store.garbage import remove
from invar_ray.training.stage import NEGATIVES_FILE
from invar_ray.training.trainer import train

VERSION = 3


STARTER = "builtin:starter"
_STARTER_FOLDER = Path(__file__).parents[1] / "models" / "starter"


def starter_plan(base: BaseRef) -> Plan:
    """The adapter that comes with the package, as an artifact of a store; ``base`` is the
    retriever's.
    """
    content = hashlib.sha256()
    for path in sorted(_STARTER_FOLDER.glob("*.safetensors")):
        content.update(path.read_bytes())
    return Plan(
        kind="retriever",
        name="starter",
        config={"base": base.fingerprint, "weights": content.hexdigest()[:16]},
        parents={},
        version=VERSION,
    )


def build_starter(building: Building, config: Config, base: BaseRef) -> None:
    """Copy the package's adapter into a store.

    Raises:
        ConfigError: ``base`` is not the one that it was made for.
    """
    if (config.model.retriever_base or config.model.base) != SMOLLM2:
        raise ConfigError(
            f"{STARTER} does not fit {config.model.retriever_base or config.model.base}",
            expected=f"the retriever's base {SMOLLM2}",
            action="set retriever.init to null or to an adapter of that base",
        )
    values = json.loads((_STARTER_FOLDER / "encoder.json").read_text(encoding="utf-8"))
    model = replace(config.model, **values)
    spec = llm_spec(model, base, (building.plan.ref, building.plan.fingerprint))
    shutil.copytree(_STARTER_FOLDER, building.path / "adapter")
    (building.path / "adapter" / "encoder.json").unlink()
    building.info |= {"encoder": spec.to_json(), "precision": "bf16"}


def plan(
    config: Config,
    base: BaseRef,
    trainset: Artifact,
    init: Artifact | None = None,
    *,
    arm: str | None = None,
) -> Plan:
    """The stage-1 adapter; ``base`` is the retriever's, ``init`` what training starts from, ``arm``
    which of ``evaluation.arms`` it is, if any.

    Raises:
        ConfigError: ``init`` is an adapter of another base or shape.
    """
    if init is not None:
        _check_init(config, base, init)
    settings = to_dict(config.retriever) | to_dict(config.experimental.retriever)
    del settings["init"]  # it is a parent
    return Plan(
        kind="retriever",
        name=config.name if arm is None else f"{config.name}-{arm}",
        config={
            "base": base.fingerprint,
            "model": _model_science(config),
            "retriever": settings,
            "document_weight": config.experimental.coarse.document_weight,
            "precision": config.model.precision,
            "seed": config.seed,
        },
        parents={"trainset": trainset} | ({} if init is None else {"init": init}),
        version=VERSION,
    )


def build(
    building: Building,
    config: Config,
    base: BaseRef,
    trainset: Artifact,
    init: Artifact | None = None,
    *,
    arm: str | None = None,
    executor: Executor,
) -> None:
    """Stage 1: fill an adapter artifact.

    Args:
        building: gets it.
        config: the run.
        base: what is adapted: the retriever's base.
        trainset: questions, candidates, negatives.
        init: the adapter that training starts from; ``None`` for a fresh one.
        arm: recorded, so that nobody serves it unasked; see :func:`plan`.
        executor: trains, on Ray.

    Raises:
        ConfigError: if ``matryoshka_dims`` are larger than the vectors.
        ResourceError: if the cluster cannot run the workers, or they keep failing.
    """
    _check_sizes(config, base, trainset.store)
    # The spec of the adapter to be: its fingerprint is the plan's, known before training.
    spec = llm_spec(config.model, base, (building.plan.ref, building.plan.fingerprint))
    inputs = {"trainset": trainset.ref, "encoder": spec.to_json()}
    if init is not None:
        inputs["init"] = init.uri
    mine = None if config.experimental.retriever.refresh_every is None else refresh_negatives
    with executor.on_cluster("training of the retriever"):
        train(building, config, "retriever", inputs, trainset.store.root_uri, mine)
    if mine is not None:
        _tidy(building, trainset.store)
    building.info |= {"encoder": spec.to_json(), "precision": config.model.precision}
    if arm is not None:
        building.info |= {"arm": arm}


def encoder_of(adapter: Artifact) -> EncoderSpec:
    """The encoder of a ``retriever`` artifact."""
    return EncoderSpec.from_json(adapter.info["encoder"])


def _check_init(config: Config, base: BaseRef, init: Artifact) -> None:
    found = encoder_of(init)
    wanted = llm_spec(config.model, base, (init.ref, init.fingerprint))
    pairs = {
        "model.retriever_base": (found.base.fingerprint, wanted.base.fingerprint),
        "model.retriever_layers": (found.num_layers, wanted.num_layers),
        "model.projection_dim": (found.projection_dim, wanted.projection_dim),
        "model.pooling": (found.pooling, wanted.pooling),
        "model.query_prefix": (found.query_prefix, wanted.query_prefix),
        "model.passage_prefix": (found.passage_prefix, wanted.passage_prefix),
    }
    other = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if other:
        raise ConfigError(
            f"retriever.init is {init.ref}, an adapter of another shape: "
            + ", ".join(f"{name} is {pair[1]!r}" for name, pair in other.items()),
            expected=", ".join(f"{name}={pair[0]!r}" for name, pair in other.items()),
            action="set them so, or retriever.init to null",
        )


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
