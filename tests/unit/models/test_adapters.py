"""LoRA adapters as plain PEFT folders, and two trees over one base."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from invar_ray.config import LoraConfig
from invar_ray.errors import ModelError
from invar_ray.models.adapters import (
    load_adapter,
    load_merged,
    new_adapter,
    save_adapter,
    share_base,
)
from invar_ray.models.loading import open_base_generator, open_generator, open_model
from invar_ray.models.tiny import build_tiny
from invar_ray.steps import answers as answering
from invar_ray.store.artifacts import Artifact, Building, Plan
from tests.support import TINY, World, world, write_adapter

IDS = torch.tensor([[2000, 2001, 2002, 2003, 2004]])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory)


@pytest.fixture
def base(small: World) -> PreTrainedModel:
    return open_model(small.base, small.store)[0]


def logits(model: torch.nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def random_llama(layers: int = 1, width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def save_random(
    model: LlamaForCausalLM, folder: Path, config: LoraConfig, first_layer: int = 0
) -> PeftModel:
    """Put a random adapter on ``model``, save it, and return the adapted model."""
    adapted = new_adapter(model, config, seed=0, first_layer=first_layer).eval()
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
                state[name] = parameter.detach().clone()
    save_adapter(adapted, state, folder, "some/base")
    return adapted


def test_fresh_adapter_changes_nothing_and_freezes_the_base(base: PreTrainedModel) -> None:
    before = logits(base)
    adapted = new_adapter(base, LoraConfig(), seed=0).eval()
    assert torch.equal(logits(adapted), before)
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * len("q k v o".split())
    assert all("lora_" in name for name in trainable)


def test_fresh_adapter_is_seeded() -> None:
    def weights(seed: int) -> list[Tensor]:
        model = new_adapter(random_llama(), LoraConfig(), seed)
        return [parameter for name, parameter in model.named_parameters() if "lora_A" in name]

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


def peft_own(model: PeftModel) -> PeftModel:
    for module in model.modules():
        if isinstance(module, PeftLinear):
            module.__class__ = PeftLinear
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("partitioned", [False, True])
def test_the_fused_update_is_pefts_in_values_and_gradients(
    tmp_path: Path, dtype: torch.dtype, partitioned: bool
) -> None:
    config = LoraConfig(
        rank=4, alpha=12, dropout=0.0, target_modules=("q_proj", "o_proj", "down_proj")
    )
    found: dict[str, tuple[Tensor, Tensor, list[Tensor]]] = {}
    for side in ("ours", "peft"):
        adapted = save_random(random_llama(layers=2).to(dtype), tmp_path / side, config)
        assert {
            type(module).__name__ for module in adapted.modules() if isinstance(module, PeftLinear)
        } == {"_FusedLinear"}
        if side == "peft":
            peft_own(adapted)
        own = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        if partitioned:
            for parameter in own:
                parameter.ds_id = 1  # as DeepSpeed marks what ZeRO 3 has shared out
        ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 1]])
        out = adapted(input_ids=ids).logits
        out.float().square().sum().backward()
        found[side] = out.detach(), logits(adapted, ids), [parameter.grad for parameter in own]
        plain = logits(random_llama(layers=2).to(dtype), ids)
        with adapted.disable_adapter():
            assert torch.equal(logits(adapted, ids), plain)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    (ours, searched, gradients), (theirs, also, wanted) = found["ours"], found["peft"]
    assert float((theirs - plain).abs().max()) > 0.1, "the adapter changes nothing"
    for one, other in [(ours, theirs), (searched, also), *zip(gradients, wanted, strict=True)]:
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


def test_target_modules_that_are_not_there() -> None:
    with pytest.raises(
        ModelError, match=r"no LoRA adapter fits LlamaForCausalLM.*set lora\.target_modules"
    ):
        new_adapter(random_llama(), LoraConfig(target_modules=("c_attn",)), seed=0)


def test_saved_folder_is_plain_peft(tmp_path: Path) -> None:
    model = random_llama()
    config = LoraConfig(rank=4, alpha=12, dropout=0.1, target_modules=("q_proj", "down_proj"))
    adapted = save_random(model, tmp_path / "adapter", config)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (stored["r"], stored["lora_alpha"], stored["lora_dropout"]) == (4, 12, 0.1)
    assert set(stored["target_modules"]) == {"q_proj", "down_proj"}
    assert stored["base_model_name_or_path"] == "some/base"
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 4

    ids = torch.tensor([[3, 4, 5, 6]])
    read = PeftModel.from_pretrained(random_llama(), str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(read, ids), logits(peft_own(adapted), ids))
    assert not torch.allclose(logits(read, ids), logits(random_llama(), ids), atol=1e-3)


@pytest.mark.parametrize("merge", [False, True])
def test_saved_adapter_loads_to_the_same_outputs(tmp_path: Path, merge: bool) -> None:
    ids = torch.tensor([[3, 4, 5, 6]])
    adapted = save_random(random_llama(), tmp_path, LoraConfig())
    loaded = load_adapter(random_llama(), tmp_path, merge=merge)
    assert torch.allclose(logits(loaded, ids), logits(adapted, ids), atol=1e-5)
    assert isinstance(loaded, LlamaForCausalLM)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert any("lora" in name for name, _ in loaded.named_modules()) != merge


def unit_rows(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.inference_mode():
        hidden = (
            model.model(torch.tensor([[3, 4, 5, 6], [9, 8, 7, 6]])).last_hidden_state[:, -1].float()
        )
    return torch.nn.functional.normalize(hidden, dim=-1)


def test_merging_is_checked_against_the_unmerged_adapter(tmp_path: Path) -> None:
    adapted = save_random(random_llama(), tmp_path, LoraConfig())
    ids = torch.tensor([[3, 4, 5, 6]])
    merged, lowest = load_merged(random_llama(), tmp_path, unit_rows, 1e-4)
    assert 1.0 - 1e-4 <= lowest <= 1.0 + 1e-6
    assert torch.allclose(logits(merged, ids), logits(adapted, ids), atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_modules())
    with pytest.raises(
        ModelError, match=r"bfloat16 changes its outputs \(lowest cosine 0\.9.*to fp32"
    ):
        load_merged(random_llama().to(torch.bfloat16), tmp_path, unit_rows, 1e-9)


def test_folder_that_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no adapter_config\.json\. Expected: a PEFT folder"):
        load_adapter(random_llama(), tmp_path)


def test_adapter_of_another_width_is_refused(tmp_path: Path) -> None:
    save_random(random_llama(width=32), tmp_path, LoraConfig())
    with pytest.raises(
        ModelError,
        match=r"does not fit the base .*use the base that its adapter_config\.json names",
    ):
        load_adapter(random_llama(width=48), tmp_path)


@pytest.mark.parametrize(
    "trained, used", [(2, 1), (1, 2)], ids=["too many layers", "too few layers"]
)
def test_adapter_of_another_depth_is_refused(tmp_path: Path, trained: int, used: int) -> None:
    save_random(random_llama(layers=trained), tmp_path, LoraConfig())
    with pytest.raises(ModelError, match="does not fit the base"):
        load_adapter(random_llama(layers=used), tmp_path)


# Two trees over one base


def test_shared_base_is_the_same_memory(base: PreTrainedModel) -> None:
    twin = share_base(base)
    assert twin is not base
    first, second = dict(base.named_parameters()), dict(twin.named_parameters())
    assert first.keys() == second.keys()
    assert all(first[name].data_ptr() == second[name].data_ptr() for name in first)
    assert all(
        a.data_ptr() == b.data_ptr()
        for (_, a), (_, b) in zip(base.named_buffers(), twin.named_buffers(), strict=True)
    )
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert {id(module) for module in base.modules()}.isdisjoint(
        id(module) for module in twin.modules()
    )
    assert torch.equal(logits(twin), logits(base))


def test_adapter_on_one_tree_leaves_the_other_alone(small: World, base: PreTrainedModel) -> None:
    before = logits(base)
    adapted = load_adapter(share_base(base), small.adapter.path("adapter"))
    assert not torch.allclose(logits(adapted), before, atol=1e-3)
    assert torch.equal(logits(base), before)
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    own = [
        name for name, parameter in adapted.named_parameters() if parameter.data_ptr() not in shared
    ]
    assert own
    assert all("lora_" in name for name in own)


def test_two_adapters_on_one_base_answer_at_the_same_time(
    small: World, base: PreTrainedModel
) -> None:
    trees = {
        name: load_adapter(share_base(base), artifact.path("adapter"))
        for name, artifact in {"one": small.adapter, "two": small.other_adapter}.items()
    }
    inputs = [
        torch.randint(1000, 20000, (1, 8), generator=torch.Generator().manual_seed(n))
        for n in range(10)
    ]
    serial = {name: [logits(tree, ids) for ids in inputs] for name, tree in trees.items()}
    assert not torch.allclose(serial["one"][0], serial["two"][0], atol=1e-3)
    barrier = threading.Barrier(2, timeout=30)
    found: dict[str, list[Tensor]] = {}

    def work(name: str) -> None:
        barrier.wait()
        found[name] = [logits(trees[name], ids) for ids in inputs]

    threads = [threading.Thread(target=work, args=(name,)) for name in trees]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, expected in serial.items():
        assert all(
            torch.allclose(a, b, atol=1e-5) for a, b in zip(found[name], expected, strict=True)
        )


# The generator's base


def test_generator_is_refused_when_its_base_changed(small: World, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    model, tokenizer = build_tiny(replace(TINY, intermediate_size=16), seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    from invar_ray.models.base import resolve_base

    reference = resolve_base(replace(small.config.model, base=str(folder)), None)

    def body(building: Building) -> None:
        write_adapter(building.path / "adapter", reference, small.store, seed=1)
        building.info |= {
            "base": {
                "location": reference.location,
                "revision": None,
                "fingerprint": reference.fingerprint,
            },
            "max_context": 64,
            "max_new_tokens": 8,
        }

    artifact, _ = small.store.get_or_build(
        Plan("generator", "on-folder", {"base": reference.fingerprint}), body
    )
    generator = open_generator(artifact.uri)
    assert generator.version == artifact.fingerprint
    build_tiny(replace(TINY, intermediate_size=16), seed=1)[0].save_pretrained(folder)
    with pytest.raises(ModelError):
        open_generator(artifact.uri)


def generator_of(small: World) -> Artifact:
    def body(building: Building) -> None:
        write_adapter(building.path / "adapter", small.base, small.store, seed=4)
        building.info |= {"base": asdict(small.base), "max_context": 64, "max_new_tokens": 8}

    return small.store.get_or_build(
        Plan("generator", "answers", {}, {"base": small.base_artifact}), body
    )[0]


def test_generators_answer_in_the_precision_asked_for(small: World) -> None:
    uri, prompt = generator_of(small).uri, "Who built the lighthouse of Garsa?"
    for open_in in (
        partial(open_generator, uri),
        partial(open_base_generator, small.base, small.store, 64),
    ):
        plain, full, half = (
            open_in(),
            open_in(precision="fp32"),
            open_in(precision="bf16", device="cpu:0"),
        )
        assert {weight.dtype for weight in full.model.parameters()} == {torch.float32}
        assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
        # Rotary angles stay as they were in training: rounded to bf16 they drift with the position.
        assert {buffer.dtype for buffer in half.model.buffers()} == {torch.float32}
        assert plain.version == full.version == half.version
        said = [
            each.generate([prompt], max_new_tokens=4)[0].token_logprobs
            for each in (plain, full, half)
        ]
        assert said[0] == said[1] != said[2]
        assert said[2][0] == pytest.approx(said[1][0], abs=0.1)
    with pytest.raises(ModelError, match="no precision 'half'"):
        open_generator(uri, precision="half")


@pytest.mark.parametrize("trained", [False, True], ids=["base", "stage 2"])
def test_evaluation_answers_in_the_models_precision(small: World, trained: bool) -> None:
    uri = generator_of(small).uri if trained else ""
    full = replace(
        small.config,
        generator=replace(small.config.generator, max_tokens=64, max_new_tokens=4),
    )
    half = replace(full, model=replace(full.model, precision="bf16"))
    asked = "Who built the lighthouse of Garsa?"
    row = {"block": 0, "questions": [asked], "hits": [[]], "gold": [[]]}
    found = {}
    for name, settings in {"fp32": full, "bf16": half}.items():
        block = answering.AnswerBlock(small.store.root_uri, asdict(small.base), uri, settings)
        found[name] = block._generator.model.dtype, block(row)["answers"][0]["confidence"]
    assert [found[name][0] for name in found] == [torch.float32, torch.bfloat16]
    assert found["fp32"][1] != found["bf16"][1]
    assert found["fp32"][1] == pytest.approx(found["bf16"][1], abs=0.5)


def test_layers_below_the_first_get_no_adapter_and_no_gradient(tmp_path: Path) -> None:
    config = LoraConfig(dropout=0.0)
    model = new_adapter(random_llama(layers=3), config, 0, first_layer=1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".layers.")[1][0] for name in trained} == {"1", "2"}
    tops = model(input_ids=IDS % 50, output_hidden_states=True).hidden_states
    assert not tops[1].requires_grad, "something would be back-propagated through layer 0"
    assert tops[2].requires_grad

    saved = save_random(random_llama(layers=3), tmp_path / "adapter", config, first_layer=1)
    loaded = load_adapter(random_llama(layers=3), tmp_path / "adapter", merge=True)
    torch.testing.assert_close(logits(loaded, IDS % 50), logits(saved.eval(), IDS % 50))


@pytest.mark.parametrize("first", [-1, 3])
def test_first_layer_must_be_a_layer(first: int) -> None:
    with pytest.raises(ModelError, match="0 to 2"):
        new_adapter(random_llama(layers=3), LoraConfig(), 0, first_layer=first)


def test_a_bias_on_b_is_scaled_as_peft_does(tmp_path: Path) -> None:
    """Folders of other tools may have it (``lora_bias``)."""
    config = PeftConfig(
        r=4,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],
        lora_bias=True,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(random_llama(), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator))
    theirs.save_pretrained(str(tmp_path))
    ids = torch.tensor([[2, 3, 4, 5]])
    ours = load_adapter(random_llama(), tmp_path)
    assert torch.allclose(logits(ours, ids), logits(theirs, ids), atol=1e-5)


@pytest.mark.parametrize("kind", ["embeddings", "shared layers", "bias on B"])
def test_what_cannot_be_merged_is_used_beside_its_base(tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {
        "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
        "shared layers": {"layer_replication": [[0, 2], [1, 2]]},
        "bias on B": {"lora_bias": True},
    }[kind]
    config = PeftConfig(
        **{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options
    )
    theirs = get_peft_model(random_llama(layers=2), config).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "lora_" in name:
                value.copy_(torch.linspace(-0.3, 0.3, value.numel()).view(value.shape))
    theirs.save_pretrained(str(tmp_path))
    ids = torch.tensor([[2, 3, 4, 5]])
    wanted = logits(theirs, ids)
    assert torch.allclose(
        logits(load_adapter(random_llama(layers=2), tmp_path), ids), wanted, atol=1e-5
    )
    if kind == "embeddings":
        merged = load_adapter(random_llama(layers=2), tmp_path, merge=True)
        assert torch.allclose(logits(merged, ids), wanted, atol=1e-4)
    else:
        with pytest.raises(ModelError, match="cannot be merged into its base"):
            load_adapter(random_llama(layers=2), tmp_path, merge=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: torch.full_like(weight, torch.nan), "1 of its weights are not finite"),
        (lambda weight: torch.full_like(weight, torch.inf), "1 of its weights are not finite"),
        (lambda weight: weight.to(torch.int8), "is torch.int8"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    save_random(random_llama(), tmp_path, LoraConfig())
    weights = load_file(tmp_path / "adapter_model.safetensors")
    first = min(weights)
    save_file(weights | {first: change(weights[first])}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=f"is damaged: .*{message}"):
        load_adapter(random_llama(), tmp_path)


@pytest.mark.parametrize("damage", ["weights", "json", "kind", "field"])
def test_a_damaged_or_unknown_adapter_is_one_error(tmp_path: Path, damage: str) -> None:
    save_random(random_llama(), tmp_path, LoraConfig())
    description = tmp_path / "adapter_config.json"
    values = json.loads(description.read_text())
    if damage == "weights":
        weights = tmp_path / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:50])
    elif damage == "json":
        description.write_text("{")
    else:
        changed = {"peft_type": "NO_SUCH"} if damage == "kind" else {"r": "four"}
        description.write_text(json.dumps({**values, **changed}))
    with pytest.raises(ModelError, match="the adapter in"):
        load_adapter(random_llama(), tmp_path)
