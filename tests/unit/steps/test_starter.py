"""Stage 1 that goes on from an adapter, and the adapter that comes with the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import invar_ray.models
from invar_ray.config import ModelConfig
from invar_ray.errors import ConfigError, ModelError
from invar_ray.models.encoder import Encoder, EncoderSpec, llm_spec, open_encoder
from invar_ray.steps import retriever
from invar_ray.training.retriever_stage import RetrieverStage
from tests.support import World

FOLDER = Path(invar_ray.models.__file__).parent / "starter"
QUESTIONS = ["who painted the harbour", "how deep is the lake", "when was the mill built"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("start"))


def _going_on(world: World, *overrides: str) -> World:
    return World(
        world.folder,
        f"retriever.init={world.adapter.uri}",
        "retriever.lora.target_modules=null",
        "retriever.lora.rank=8",
        "retriever.lora.alpha=16",
        *overrides,
    )


def test_training_starts_at_the_vectors_of_the_adapter_it_goes_on_from(start: World) -> None:
    world = _going_on(start)
    spec = llm_spec(world.config.model, world.base, ("retriever/x", "x"))
    inputs = {"trainset": world.trainset.ref, "encoder": spec.to_json(), "init": world.init.uri}
    stage = RetrieverStage(world.config, world.store, inputs, 0, 1)
    found = Encoder(stage.module, stage.tokenizer, spec).encode_queries(QUESTIONS)
    expected = open_encoder(retriever.encoder_of(world.adapter), world.store)
    np.testing.assert_allclose(found, expected.encode_queries(QUESTIONS), atol=1e-5)
    del inputs["init"]
    fresh = RetrieverStage(world.config, world.store, inputs, 0, 1)
    bare = Encoder(fresh.module, fresh.tokenizer, spec).encode_queries(QUESTIONS)
    assert np.abs(bare - found).max() > 0.01


def test_negatives_are_mined_with_it_and_it_is_a_parent(start: World) -> None:
    world = _going_on(start)
    mined_with = EncoderSpec.from_json(world.trainset.parent("index").info["encoder"])
    assert mined_with.adapter == world.adapter.ref
    plan = retriever.plan(world.config, world.base, world.trainset, world.init)
    other = retriever.plan(world.config, world.base, world.trainset, start.other_adapter)
    assert plan.fingerprint != other.fingerprint
    assert plan.parents["init"].ref == world.adapter.ref


def test_an_adapter_of_another_shape_is_refused_before_any_training(start: World) -> None:
    world = _going_on(start, "model.projection_dim=8")
    with pytest.raises(ConfigError, match=r"model.projection_dim is 8") as error:
        retriever.plan(world.config, world.base, start.trainset, world.init)
    assert "model.projection_dim=None" in str(error.value)


def test_an_adapter_of_another_rank_is_refused(start: World) -> None:
    world = _going_on(start, "retriever.lora.rank=4")
    spec = llm_spec(world.config.model, world.base, ("retriever/x", "x"))
    inputs = {"trainset": start.trainset.ref, "encoder": spec.to_json(), "init": world.init.uri}
    with pytest.raises(ModelError, match=r"lora.rank is 4.*Expected: lora.rank=8"):
        RetrieverStage(world.config, world.store, inputs, 0, 1)


def test_the_starter_fits_its_own_base_only(start: World) -> None:
    world = World(start.folder, "retriever.init=builtin:starter")
    with pytest.raises(ConfigError, match=r"builtin:starter does not fit builtin:tiny"):
        _ = world.init


def test_the_starter_says_its_shape_and_is_small() -> None:
    shape = json.loads((FOLDER / "encoder.json").read_text(encoding="utf-8"))
    config = ModelConfig(base="builtin:smollm2", **shape)
    adapter = json.loads((FOLDER / "adapter_config.json").read_text(encoding="utf-8"))
    weights = load_file(FOLDER / "adapter_model.safetensors")
    layers = {name.split(".layers.")[1].split(".")[0] for name in weights}
    assert layers == {str(layer) for layer in range(config.retriever_layers or 0)}
    assert all(adapter["r"] in value.shape for value in weights.values())
    projection = load_file(FOLDER / "projection.safetensors")["weight"]
    assert projection.shape == (config.projection_dim, 576)
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12e6
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(word in card for word in ("CC BY-SA", "MIT", "SQuAD", "held-out"))
