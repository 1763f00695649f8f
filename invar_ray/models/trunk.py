"""The part of a model that gives token states, whatever its family: a causal LM's decoder without
its head (LLaMA, Mistral, Qwen ..), or an encoder (BERT, ModernBERT, XLM-R ..).
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from invar_ray.errors import ModelError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "dense")
"""What LLaMA's family calls the linear layers of its attention; the last two are Phi-3's and Phi's
names.
"""


def is_causal(model: nn.Module) -> bool:
    """Whether it is a causal LM of LLaMA's family, whose token states come from ``.model``."""
    return hasattr(getattr(model, "model", None), "embed_tokens")


def trunk(model: nn.Module) -> nn.Module:
    """What gives the token states."""
    found: nn.Module = model.model if is_causal(model) else model  # type: ignore[assignment]
    return found


def layer_list(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """Where the list of its layers hangs: the module that holds it, and the attribute's name.

    Raises:
        ModelError: it has no such list.
    """
    count = int(model.config.num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            parent, _, attribute = name.rpartition(".")
            return model.get_submodule(parent), attribute
    raise ModelError(
        f"{type(model).__name__} has no list of its {count} layers",
        expected="an architecture of transformers with a list of layers",
        action="set model.retriever_layers to null",
    )


def keep_first_layers(model: PreTrainedModel, num_layers: int | None) -> None:
    """Shorten a module tree to its first layers, in place (the tensors of the others are left
    alone: another tree may share them); ``None`` keeps all.

    Raises:
        ModelError: if it has fewer.
    """
    if num_layers is None:
        return
    holder, attribute = layer_list(model)
    layers = getattr(holder, attribute)
    if not 1 <= num_layers <= len(layers):
        raise ModelError(
            f"model.retriever_layers is {num_layers}",
            expected=f"between 1 and the base's {len(layers)} layers, or null",
        )
    setattr(holder, attribute, layers[:num_layers])
    model.config.num_hidden_layers = num_layers
    types = getattr(model.config, "layer_types", None)  # one a layer, where layers differ
    if types is not None:
        model.config.layer_types = list(types)[:num_layers]


def lora_targets(model: PreTrainedModel) -> list[str]:
    """The linear layers that get an adapter where nothing else is said: a LLaMA's attention (as
    published), all of an encoder's (BERT: query, key, value, dense). [ours]
    """
    holder, attribute = layer_list(model)
    layers = getattr(holder, attribute)
    names = {
        name.rpartition(".")[2]
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear)
    }
    attention = [name for name in ATTENTION if name in names]
    return attention if is_causal(model) and attention else sorted(names)


def switch_dropout_off(model: nn.Module) -> None:
    """A frozen base is a function of its input alone, in training too: what an encoder brings along
    of dropout is set to 0 (an adapter has its own).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
