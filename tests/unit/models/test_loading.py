"""Who loads what: precision, device and attention of every weight, for each recipe and loader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from invar_ray.answering.retriever import open_retriever
from invar_ray.api import Rag
from invar_ray.config import Config, load_config, recipe_names
from invar_ray.executor import Here
from invar_ray.models import loading
from invar_ray.models.loading import open_base_generator, open_generator
from invar_ray.models.precision import inference_precision
from invar_ray.pipeline import Pipeline
from invar_ray.steps.answers import AnswerBlock
from invar_ray.store.artifacts import Artifact, Building, Plan
from invar_ray.training.retriever_stage import RetrieverStage
from serve.replicas.colocated import SharedBase
from serve.replicas.generator import load_generator
from serve.replicas.retriever import load_retriever
from tests.support import save_bert, small_config, write_adapter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Made:
    """A small run in a precision, its base one layer; with an index and a generator."""

    def __init__(self, folder: Path, precision: str, *own: str) -> None:
        config = small_config(folder, f"model.precision={precision}", *own)
        self.run = Pipeline(config, quiet=True, executor=Here())
        self.index = self.run.base_index

    @property
    def generator(self) -> Artifact:
        run = self.run

        def body(building: Building) -> None:
            write_adapter(building.path / "adapter", run.base, run.store, seed=1)
            building.info |= {
                "base": asdict(run.base),
                "precision": run.config.model.precision,
                "max_context": 64,
                "max_new_tokens": 8,
            }

        return run.store.get_or_build(Plan("generator", "made", {}), body)[0]

    def stage(self) -> None:
        spec = self.index.info["encoder"]
        inputs = {"trainset": self.run.trainset.ref, "encoder": spec}
        RetrieverStage(self.run.config, self.run.store, inputs, 0, 1)

    def block(self, uri: str) -> None:
        config = replace(
            self.run.config, generator=replace(self.run.config.generator, max_tokens=64)
        )
        AnswerBlock(self.run.store.root_uri, asdict(self.run.base), uri, config)

    def rag(self) -> None:
        opened = Rag(self.index, self.generator)
        assert opened.retriever
        assert opened.generator


LOADERS: dict[str, Callable[[Made], Any]] = {
    "search": lambda made: open_retriever(made.index.uri),
    "stage 1": Made.stage,
    "answers of stage 2": lambda made: made.block(made.generator.uri),
    "answers of the base": lambda made: made.block(""),
    "generator": lambda made: open_generator(made.generator.uri),
    "base as generator": lambda made: open_base_generator(
        made.run.base, made.run.store, 64, precision=inference_precision(made.run.config)
    ),
    "api": Made.rag,
    "serve, retriever": lambda made: load_retriever(made.index.uri),
    "serve, generator": lambda made: load_generator(made.generator.uri),
    "serve, colocated": lambda made: [
        shared.retriever(made.index.uri) and shared.generator(made.generator.uri)
        for shared in [SharedBase()]
    ],
}
Loaded = list[tuple[str, set[torch.dtype], set[str], str]]


@pytest.fixture(scope="module", params=["fp32", "bf16", "bf16 encoder"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    precision, *rest = request.param.split()
    own = [f"model.retriever_base={save_bert(folder / 'bert')}"] if rest else []
    own += ["retriever.lora.target_modules=null"]
    return Made(folder, precision, *own)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """Every model that comes through the door: class, types, devices and attention."""
    found: Loaded = []
    real = loading.load_weights

    def watched(*arguments: Any, **options: Any) -> PreTrainedModel:
        model = real(*arguments, **options)
        weights = list(model.parameters())
        types = {weight.dtype for weight in weights}
        devices = {str(weight.device) for weight in weights}
        found.append((type(model).__name__, types, devices, model.config._attn_implementation))
        return model

    monkeypatch.setattr(loading, "load_weights", watched)
    return found


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_takes_the_precision_that_was_made(
    made: Made, loaded: Loaded, loader: str
) -> None:
    if loader == "stage 1":
        assert made.run.trainset
    assert made.generator
    loaded.clear()
    LOADERS[loader](made)
    wanted = DTYPES[made.run.config.model.precision]
    # The backward of torch's own kernel is slow on a CPU in bf16.
    kernel = "eager" if loader == "stage 1" and wanted == torch.bfloat16 else "sdpa"
    assert loaded
    for name, types, devices, attention in loaded:
        assert (types, devices, attention) == ({wanted}, {"cpu"}, kernel), name


def test_colocated_loads_one_base_for_both(made: Made, loaded: Loaded) -> None:
    LOADERS["serve, colocated"](made)
    own = made.run.config.model.retriever_base is not None
    assert [name for name, *_ in loaded] == ["BertModel"] * own + ["LlamaForCausalLM"]


def test_weights_go_straight_to_the_device(made: Made, loaded: Loaded) -> None:
    open_base_generator(made.run.base, made.run.store, 64, device="meta")
    assert [devices for _, _, devices, _ in loaded] == [{"meta"}]


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_says_which_precision(name: str) -> None:
    """Recipes for a cluster name one, those for a laptop measure."""
    config: Config = load_config(name)
    laptop = {"demo", "minilm", "smollm2_135m"}
    wanted = "auto" if name in laptop else "fp32" if name == "tiny" else "bf16"
    assert config.model.precision == wanted
