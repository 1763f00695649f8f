"""What is counted on the meta device, against the same models with real weights."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from invar_ray.config import LoraConfig
from invar_ray.errors import ModelError
from invar_ray.models import meta
from invar_ray.models.adapters import new_adapter
from invar_ray.models.encoder import BiEncoder

SHAPE = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
LORA = LoraConfig(rank=4, alpha=8, dropout=0.0)


def real(**changes: object) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE.to_dict(), **changes}))


def test_weights_are_those_of_the_real_model() -> None:
    found, model = meta.weigh(SHAPE), real()
    assert found.whole == sum(p.numel() for p in model.parameters())
    assert found.layer == sum(p.numel() for p in model.model.layers[0].parameters())
    assert (found.layers, found.head, found.cache) == (5, 64 * 512, 2 * 2 * 16 * 5)
    assert meta.weigh(SHAPE, 2).whole == found.whole - 3 * found.layer


def test_an_adapter_has_as_many_weights_as_the_real_one() -> None:
    module = BiEncoder(new_adapter(real(), LORA, 0).get_base_model(), "last", 48)
    wanted = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert meta.trainable(SHAPE, LORA, layers=5, projection=48) == wanted
    upper = new_adapter(real(), LORA, 0, first_layer=3)
    wanted = sum(p.numel() for p in upper.parameters() if p.requires_grad)
    assert meta.trainable(SHAPE, LORA, layers=5, first_layer=3) == wanted


@pytest.mark.parametrize("recompute", [False, True])
def test_a_pass_holds_at_least_what_autograd_keeps_of_the_real_one(recompute: bool) -> None:
    rows, width = 4, 32
    model = real(attn_implementation="sdpa")
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    module = BiEncoder(new_adapter(model, LORA, 0).get_base_model(), "last").train()
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(rows, width, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(ids, torch.ones_like(ids)).sum()
    peak = meta.stage1_peak(
        SHAPE,
        LORA,
        rows,
        width,
        precision="fp32",
        layers=5,
        projection=None,
        recompute=recompute,
    )
    assert sum(kept.values()) <= peak
    if not recompute:  # with it, most is made anew in the backward pass
        assert peak <= 1.35 * sum(kept.values())


def test_recomputing_and_bf16_take_less() -> None:
    def peak(**changes: object) -> int:
        options = {"precision": "fp32", "layers": 5, "projection": None, "recompute": False}
        return meta.stage1_peak(SHAPE, LORA, 8, 32, **{**options, **changes})  # type: ignore[arg-type]

    assert peak(recompute=True) < 0.5 * peak()
    assert peak(precision="bf16") < 0.75 * peak()
    assert meta.encoding_peak(SHAPE, 8, 32, precision="fp32", layers=5) < 0.2 * peak()


def test_the_recipes_bases_are_known_without_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    large = meta.weigh(meta.known_description("meta-llama/Llama-3.1-8B"))
    assert large.whole == 8_030_261_248  # as its model card says: 8.03 G
    assert meta.weigh(meta.known_description("meta-llama/Llama-2-7b-hf")).whole == 6_738_415_616
    assert meta.weigh(meta.known_description("builtin:smollm2")).whole == 134_515_008
    encoder = meta.known_description("builtin:minilm")
    assert meta.is_encoder(encoder)
    assert not meta.is_encoder(SHAPE)
    with pytest.raises(ModelError, match=r"no-such/model"):
        meta.known_description("no-such/model")
