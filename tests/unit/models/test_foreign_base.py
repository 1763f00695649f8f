"""A base that is not the embedded one: a LLaMA in a folder, with a byte-level BPE tokenizer and a
start token.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from invar_ray.config import LoraConfig, ModelConfig
from invar_ray.errors import ModelError
from invar_ray.models.adapters import new_adapter
from invar_ray.models.base import load_tokenizer, resolve_base
from invar_ray.models.encoder import BiEncoder, llm_spec, open_encoder, passage_ids, query_ids
from invar_ray.models.generator import Generator
from invar_ray.store.artifacts import Store
from tests import support
from tests.support import open_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 grouped-query LLaMA and its tokenizer, written as such checkpoints are."""
    return support.save_llama(tmp_path_factory.mktemp("base"))


def test_weights_stored_as_bf16_are_loaded_as_float32(folder: Path) -> None:
    model = open_folder(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_tokenizer_without_padding_pads_with_its_end_token(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_texts_start_in_the_start_token_and_end_in_one_end_token(
    folder: Path, tmp_path: Path
) -> None:
    config = replace(ModelConfig(), base=str(folder), query_max_tokens=8, passage_max_tokens=12)
    spec = llm_spec(config, resolve_base(config, None))
    tokenizer = load_tokenizer(str(folder))
    long = "the ferry leaves at five in the morning and the harbour freezes in winter " * 3
    for ids, longest in (
        (query_ids(tokenizer, ["ferry", long], spec), 8),
        (passage_ids(tokenizer, [("a", "b"), ("title", long)], spec), 12),
    ):
        assert all(
            row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id for row in ids
        )
        assert all(row.count(tokenizer.eos_token_id) == 1 for row in ids)
        assert len(ids[1]) == longest


def test_padding_with_the_end_token_does_not_change_a_vector(folder: Path, tmp_path: Path) -> None:
    # The padding id is the end token's: a pooling that looked for ids instead of the mask would
    # take the wrong state.
    config = replace(ModelConfig(), base=str(folder))
    encoder = open_encoder(llm_spec(config, resolve_base(config, None)), Store(str(tmp_path)))
    short, long = (
        "when does it leave?",
        "which crop do the farmers grow on the terraces above the bay of the island?",
    )
    together, alone = encoder.encode_queries([short, long]), encoder.encode_queries([short])
    np.testing.assert_allclose(together[0], alone[0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)


def test_both_adapters_fit_it_and_get_gradients(folder: Path) -> None:
    for _ in range(2):
        adapted = new_adapter(open_folder(folder), LoraConfig(), seed=0)
        module = BiEncoder(adapted.get_base_model(), "last")
        module(torch.tensor([[0, 5, 1]]), torch.ones(1, 3, dtype=torch.long))[0, 0].backward()
        trained = {
            name for name, parameter in module.named_parameters() if parameter.grad is not None
        }
        assert trained
        assert all("lora_" in name for name in trained)


def test_it_generates(folder: Path) -> None:
    generator = Generator(open_folder(folder), load_tokenizer(str(folder)), 64)
    found = generator.generate(["Question: who? Answer:"], max_new_tokens=4)
    assert 1 <= found[0].num_tokens <= 4


def test_folder_without_a_model_and_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_base(replace(ModelConfig(), base=str(tmp_path)), None)
    with pytest.raises(ModelError, match=r"no folder '\./nowhere'"):
        resolve_base(replace(ModelConfig(), base="./nowhere"), None)
    with pytest.raises(ModelError, match="hf download"):
        open_folder("invar-ray-tests/no-such-model")


def test_changed_weights_change_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    config = replace(ModelConfig(), base=str(folder))
    before = resolve_base(config, None).fingerprint
    assert resolve_base(config, None).fingerprint == before
    model = open_folder(folder)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    load_tokenizer(str(folder)).save_pretrained(tmp_path)
    assert resolve_base(replace(config, base=str(tmp_path)), None).fingerprint != before
