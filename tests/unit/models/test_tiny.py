"""The embedded base: seeded, close to its embeddings while untrained, whole after saving, and with
a tokenizer that adds nothing by itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer, LlamaForCausalLM

from invar_ray.errors import ModelError
from invar_ray.models.base import BaseRef, load_tokenizer, resolve_base
from invar_ray.models.loading import open_model
from invar_ray.models.tiny import MAX_POSITIONS, build_tiny, minilm_folder
from tests.support import TINY, World, open_folder, tiny_base, world

TEXT = "The lighthouse of Arvon was built by Ada Morvane after the great storm."


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory)


@pytest.fixture(scope="module")
def base() -> tuple[LlamaForCausalLM, Any]:
    return tiny_base()


def ids_of(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor([tokenizer(text)["input_ids"]])


def test_same_seed_same_weights_other_seed_others(base: tuple[LlamaForCausalLM, Any]) -> None:
    same = build_tiny(TINY, seed=0)[0].state_dict()
    other = build_tiny(TINY, seed=1)[0].state_dict()
    first = base[0].state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    layers = [name for name in first if "proj" in name]
    assert len(layers) == 7
    assert not any(torch.equal(first[name], other[name]) for name in layers)
    assert torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_building_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_tiny(TINY, seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_shape_is_the_config_s() -> None:
    model, _ = build_tiny(replace(TINY, num_layers=2, num_heads=3), seed=0)
    assert (model.config.num_hidden_layers, model.config.num_attention_heads) == (2, 3)
    assert (model.config.hidden_size, model.config.intermediate_size) == (
        384,
        TINY.intermediate_size,
    )
    assert model.config.max_position_embeddings == MAX_POSITIONS
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32


@pytest.mark.parametrize("layers", [1, 4])
def test_untrained_states_stay_near_the_embeddings(layers: int) -> None:
    model, tokenizer = build_tiny(replace(TINY, num_layers=layers, intermediate_size=512), seed=0)
    ids = ids_of(tokenizer, TEXT)
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state[0]
        cosines = functional.cosine_similarity(hidden, model.model.embed_tokens(ids)[0], dim=-1)
    assert cosines.min() > 0.9


def test_embeddings_are_what_minilm_s_first_layer_sees(base: tuple[LlamaForCausalLM, Any]) -> None:
    from transformers import AutoModel

    model, tokenizer = base
    bert = AutoModel.from_pretrained(str(minilm_folder())).eval()
    ids = ids_of(tokenizer, TEXT)
    with torch.no_grad():
        # Real positions, not their mean; the first is [CLS]'s alone and unlike all others.
        seen = bert.embeddings(input_ids=ids, position_ids=torch.arange(1, ids.shape[1] + 1)[None])[
            0
        ]
        ours = model.model.embed_tokens(ids)[0]
    assert functional.cosine_similarity(seen, ours, dim=-1).mean() > 0.9


def test_tokenizer_adds_nothing_and_ends_in_sep(base: tuple[LlamaForCausalLM, Any]) -> None:
    tokenizer = base[1]
    ids = tokenizer("ferry")["input_ids"]
    assert ids == tokenizer("ferry", add_special_tokens=False)["input_ids"]
    assert len(ids) == 1
    assert tokenizer("")["input_ids"] == []
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "[SEP]",
        "[PAD]",
        "[UNK]",
    )
    assert tokenizer.is_fast
    original = AutoTokenizer.from_pretrained(str(minilm_folder()))
    assert original(TEXT)["input_ids"][1:-1] == tokenizer(TEXT)["input_ids"]
    assert original.sep_token_id == tokenizer.eos_token_id
    long = tokenizer("word " * 1000)["input_ids"]
    assert len(long) == 1000, "MiniLM's own truncation and padding are off"


def test_saved_and_loaded_base_gives_the_same_outputs(
    small: World, base: tuple[LlamaForCausalLM, Any]
) -> None:
    loaded = open_model(small.base, small.store)[0]
    tokenizer = load_tokenizer(str(small.base_artifact.path()))
    assert not loaded.training
    ids = ids_of(base[1], TEXT)
    assert torch.equal(ids_of(tokenizer, TEXT), ids)
    assert tokenizer("")["input_ids"] == []
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        base[1].eos_token_id,
        base[1].pad_token_id,
    )
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, base[0](input_ids=ids).logits)
    assert small.base_artifact.info["parameters"] == sum(
        parameter.numel() for parameter in base[0].parameters()
    )


def test_base_loads_in_the_precision_asked_for(small: World) -> None:
    model, _ = open_model(small.base, small.store, "bf16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_base_loads_straight_to_the_device_asked_for(small: World) -> None:
    here, _ = open_model(small.base, small.store, "bf16")
    there, _ = open_model(small.base, small.store, "bf16", device="meta")
    assert {(weight.device.type, weight.dtype) for weight in there.parameters()} == {
        ("meta", torch.bfloat16)
    }
    assert {buffer.device.type for buffer in there.buffers()} == {"meta"}
    again, _ = open_model(small.base, small.store, "bf16", device="cpu:0")
    for name, weight in [*again.named_parameters(), *again.named_buffers()]:
        wanted = (
            here.get_parameter(name)
            if name in dict(here.named_parameters())
            else here.get_buffer(name)
        )
        assert torch.equal(weight, wanted), name


# From names to bases


def test_embedded_base_is_its_artifact(small: World) -> None:
    assert small.base.location == f"artifact:{small.base_artifact.ref}"
    assert small.base.fingerprint == small.base_artifact.fingerprint
    assert small.base.folder_or_name(small.store) == str(small.base_artifact.path())
    with pytest.raises(ModelError, match="has not been built"):
        resolve_base(small.config.model, None)


def copy_base(small: World, folder: Path) -> Path:
    folder.mkdir()
    for path in small.base_artifact.path().iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes()[:3000])  # resolving reads no weights
        elif path.name != "manifest.json":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_folder_has_a_fingerprint_by_content(small: World, tmp_path: Path) -> None:
    one, two = copy_base(small, tmp_path / "one"), copy_base(small, tmp_path / "two")

    def resolve(folder: Path) -> BaseRef:
        return resolve_base(replace(small.config.model, base=str(folder)), None)

    assert resolve(one).fingerprint == resolve(two).fingerprint
    assert resolve(one).location == str(one)
    before = resolve(two).fingerprint
    weights = two / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    after = resolve(two).fingerprint
    assert after != before
    (two / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert resolve(two).fingerprint not in {before, after}


def test_folder_that_is_none_is_refused(small: World, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder"):
        resolve_base(replace(small.config.model, base=str(tmp_path / "missing")), None)
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_base(replace(small.config.model, base=str(tmp_path)), None)


def test_model_that_cannot_be_loaded_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match=r"cannot load .*hf download NAME"):
        open_folder(tmp_path)
    with pytest.raises(ModelError, match=r"cannot load .*model\.base=builtin:smollm2"):
        load_tokenizer(str(tmp_path))


def test_encoder_only_model_is_refused() -> None:
    with pytest.raises(ModelError, match="LLaMA-family causal LM"):
        open_folder(minilm_folder())
