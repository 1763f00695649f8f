"""Stage 2's loss through the head's chosen positions equals the one through all logits."""

from __future__ import annotations

import torch

from invar_ray.config import LoraConfig
from invar_ray.losses.answer import IGNORED, answer_loss
from invar_ray.models.adapters import new_adapter
from invar_ray.models.batching import packs
from invar_ray.models.tiny import build_tiny
from invar_ray.training.generator_stage import _CausalLm, answer_loss_at
from invar_ray.training.sequences import (
    PromptAndTarget,
    pack_sequences,
    segment_inputs,
    tokenize_sequences,
)
from tests.support import TINY


def test_loss_and_gradient_equal_those_of_all_logits() -> None:
    model, tokenizer = build_tiny(TINY, seed=0)
    adapted = new_adapter(model, LoraConfig(dropout=0.0), seed=0)
    # LoRA starts at 0 on one side: without this half of the gradients would be 0
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    module = _CausalLm(adapted.get_base_model())
    sequences = [
        PromptAndTarget("Who keeps the light?", "Ada [1]"),
        PromptAndTarget("Where?", "in the north sound [2]"),
    ]
    ids, mask, labels = tokenize_sequences(sequences, tokenizer, 64)

    whole = answer_loss(model(input_ids=ids, attention_mask=mask).logits, labels)
    whole.loss.backward()
    expected = {
        name: value.grad.clone()
        for name, value in module.named_parameters()
        if value.grad is not None
    }
    module.zero_grad()
    chosen = answer_loss_at(
        module, ids, mask, labels, normaliser=int((labels[:, 1:] != IGNORED).sum())
    )
    chosen.loss.backward()

    torch.testing.assert_close(chosen.loss, whole.loss, rtol=1e-6, atol=1e-7)
    assert int(chosen.tokens) == int(whole.tokens)
    assert expected
    for name, value in module.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(value.grad, expected[name], rtol=1e-4, atol=1e-7)


def test_rows_without_a_target_give_a_loss_of_zero_that_has_a_gradient() -> None:
    model, _ = build_tiny(TINY, seed=0)
    module = _CausalLm(new_adapter(model, LoraConfig(), seed=0).get_base_model())
    ids = torch.tensor([[5, 6, 7]])
    found = answer_loss_at(
        module, ids, torch.ones_like(ids), torch.full_like(ids, IGNORED), normaliser=4
    )
    found.loss.backward()
    assert found.loss.item() == 0.0
    assert any(value.grad is not None for value in module.parameters())


def _three() -> list[PromptAndTarget]:
    return [
        PromptAndTarget("Who keeps the light of the northern sound, and since when?", "Ada [1]"),
        PromptAndTarget("Where?", "in the north sound [2]"),
        PromptAndTarget("What grows on the terraces?", "barley"),
    ]


def test_packed_sequences_have_the_loss_and_gradients_of_padded_ones() -> None:
    model, tokenizer = build_tiny(TINY, seed=0)
    adapted = new_adapter(model, LoraConfig(dropout=0.0), seed=0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    module = _CausalLm(adapted.get_base_model())
    padded = tokenize_sequences(_three(), tokenizer, 64)
    packed = pack_sequences(*padded, capacity=2 * padded[0].shape[1])
    assert packed[0].shape[0] < padded[0].shape[0]
    found = []
    for ids, segments, labels in (padded, packed):
        module.zero_grad()
        output = answer_loss_at(module, ids, segments, labels, normaliser=7)
        output.loss.backward()
        gradients = {n: v.grad.clone() for n, v in module.named_parameters() if v.grad is not None}
        found.append((output, gradients))
    (alone, expected), (together, gradients) = found
    torch.testing.assert_close(together.loss, alone.loss, rtol=1e-6, atol=1e-7)
    assert int(together.tokens) == int(alone.tokens) > 0
    assert expected.keys() == gradients.keys() != set()
    for name, value in gradients.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-7)


def test_without_the_segments_packed_sequences_would_see_each_other() -> None:
    model, tokenizer = build_tiny(TINY, seed=0)
    # A seeded base writes little into its residual stream; make it listen to its context.
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.5)
    module = _CausalLm(model)
    ids, segments, labels = pack_sequences(
        *tokenize_sequences(_three(), tokenizer, 64), capacity=512
    )
    apart = answer_loss_at(module, ids, segments, labels, normaliser=7).loss
    mixed = answer_loss_at(module, ids, (segments > 0).long(), labels, normaliser=7).loss
    assert abs(apart.item() - mixed.item()) > 1e-3


def test_positions_begin_anew_and_attention_stays_within_a_segment() -> None:
    inputs = segment_inputs(torch.tensor([[1, 1, 2, 2, 2, 0]]))
    assert inputs["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0]]
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert inputs["attention_mask"][0, 0].long().tolist() == expected
    assert segment_inputs(torch.tensor([[1, 1, 0]])) == {}


def test_packs_fill_rows_and_lose_nothing() -> None:
    lengths = [5, 9, 3, 3, 7, 12]
    groups = packs(lengths, 10)
    assert sorted(index for group in groups for index in group) == list(range(6))
    assert groups[0] == [5]  # longer than the capacity: alone
    assert all(sum(lengths[index] for index in group) <= 10 for group in groups[1:])
    assert len(groups) == 4  # 12 | 9 | 7 3 | 5 3
