"""Stage 2's loss through the head's chosen positions equals the one through all logits."""

from __future__ import annotations

import torch

from invar_ray.config import LoraConfig
from invar_ray.losses.answer import IGNORED, answer_loss
from invar_ray.models.adapters import new_adapter
from invar_ray.models.tiny import build_tiny
from invar_ray.training.generator_stage import _CausalLm, answer_loss_at
from invar_ray.training.sequences import PromptAndTarget, tokenize_sequences
from tests.support import TINY


def test_loss_and_gradient_equal_those_of_all_logits() -> None:
    model, tokenizer = build_tiny(TINY, seed=0)
    adapted = new_adapter(model, LoraConfig(dropout=0.0), seed=0)
    for (
        parameter
    ) in adapted.parameters():  # LoRA starts at 0 on one side: without this half of the gradients would be 0
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
    expected = {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}
    module.zero_grad()
    chosen = answer_loss_at(module, ids, mask, labels, normaliser=int((labels[:, 1:] != IGNORED).sum()))
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
    found = answer_loss_at(module, ids, torch.ones_like(ids), torch.full_like(ids, IGNORED), normaliser=4)
    found.loss.backward()
    assert found.loss.item() == 0.0
    assert any(value.grad is not None for value in module.parameters())
