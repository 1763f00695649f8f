"""What a model weighs, and what a pass through it holds at its peak, from its description alone:
the project's own modules on torch's meta device, where tensors have shapes and no memory.

Shape legend: B rows, T tokens of each, H hidden size, V vocabulary, N positions that are predicted.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import repeat_kv

from invar_ray.config import Config, LoraConfig
from invar_ray.errors import ModelError
from invar_ray.models.adapters import new_adapter
from invar_ray.models.base import (
    MINILM,
    SMOLLM2,
    TINY,
    is_remote,
    name_and_revision,
    unresolved,
)
from invar_ray.models.encoder import BiEncoder
from invar_ray.models.precision import torch_dtype
from invar_ray.models.trunk import is_causal
from invar_ray.store.files import resolve_uri

_ATTENTION = "fused_without_values"
_SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32}
_MINILM = {
    "model_type": "bert",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
}
KNOWN: dict[str, dict[str, Any]] = {
    SMOLLM2: _SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2,
    MINILM: _MINILM,
    "meta-llama/Llama-2-7b-hf": _LLAMA
    | {
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "meta-llama/Llama-3.2-1B": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.1-8B": _LLAMA
    | {
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
}
"""Descriptions of the recipes' bases, as their publishers give them: no hub is asked."""


@dataclass(frozen=True)
class Weights:
    """Parameters of a model.

    Attributes:
        whole: all of them, tied ones once.
        layer: of one layer.
        layers: how many there are.
        head: of the output head, tied or not; 0 for an encoder.
        hidden: H.
        cache: values that one token of a context leaves in the key-value cache.
    """

    whole: int
    layer: int
    layers: int
    head: int
    hidden: int
    cache: int


P = ParamSpec("P")
R = TypeVar("R")


def _once(counted: Callable[P, R]) -> Callable[P, R]:
    """Count the same only once: descriptions are compared by what they say."""
    found: dict[Any, R] = {}

    @wraps(counted)
    def remembered(*args: P.args, **kwargs: P.kwargs) -> R:
        plain = [a.to_json_string() if isinstance(a, PretrainedConfig) else a for a in args]
        key = repr((plain, sorted(kwargs.items())))
        if key not in found:
            found[key] = counted(*args, **kwargs)
        return found[key]

    return remembered


def known_description(base: str, config: Config | None = None) -> PretrainedConfig:
    """The description of a base by its name in a recipe: those of :data:`KNOWN` need no network, a
    folder needs its config.json alone.

    Args:
        base: as ``model.base`` names it.
        config: of a run, for the shape of ``builtin:tiny``.

    Raises:
        ModelError: if it is not known and cannot be read.
    """
    name, revision = name_and_revision(base)
    if name == TINY:
        tiny = (config or Config()).experimental.model.tiny
        values = _SMOLLM2 | {
            "hidden_size": _MINILM["hidden_size"],
            "vocab_size": _MINILM["vocab_size"],
            "intermediate_size": tiny.intermediate_size,
            "num_hidden_layers": tiny.num_layers,
            "num_attention_heads": tiny.num_heads,
            "num_key_value_heads": tiny.num_heads,
        }
    elif name in KNOWN:
        values = dict(KNOWN[name])
    elif is_remote(name):
        filesystem, path = resolve_uri(name)
        try:
            with filesystem.open_input_stream(f"{path.rstrip('/')}/config.json") as stream:
                values = json.loads(stream.read())
        except (OSError, ValueError) as error:
            raise unresolved(base, error) from error
    else:
        try:
            found: PretrainedConfig = AutoConfig.from_pretrained(name, revision=revision)
        except (OSError, ValueError) as error:
            raise unresolved(base, error) from error
        return found
    made: PretrainedConfig = AutoConfig.for_model(**values)  # type: ignore[arg-type]
    return made


@_once
def is_encoder(description: PretrainedConfig) -> bool:
    """Whether it describes an encoder, and no causal LM."""
    return not is_causal(_built(description, 1, "bf16"))


@_once
def check_first_layer(config: Config, layers: int) -> None:
    """See that the generator's base has a layer to adapt, before stage 1 is trained for it.

    Raises:
        ModelError: ``generator.first_layer`` is beyond its last one.
    """
    first = config.generator.first_layer
    if first >= layers:
        raise ModelError(
            f"generator.first_layer is {first} and {config.model.base} has {layers} layers",
            expected=f"0 to {layers - 1}",
            action=f"set generator.first_layer={layers // 2}, or 0",
        )


def weigh(description: PretrainedConfig, layers: int | None = None) -> Weights:
    """Count a model's parameters.

    Args:
        description: of the model.
        layers: only the first ones; ``None`` for all.
    """
    one, two = (_built(description, count, "bf16") for count in (1, 2))
    layer = _count(two) - _count(one)
    count = int(description.num_hidden_layers) if layers is None else layers
    hidden = int(description.hidden_size)
    heads = int(description.num_attention_heads)
    groups = int(getattr(description, "num_key_value_heads", None) or heads)
    width = int(getattr(description, "head_dim", None) or hidden // heads)
    return Weights(
        whole=_count(one) + (count - 1) * layer,
        layer=layer,
        layers=count,
        head=hidden * int(description.vocab_size) if is_causal(one) else 0,
        hidden=hidden,
        cache=2 * groups * width * count,
    )


@_once
def trainable(
    description: PretrainedConfig,
    lora: LoraConfig,
    *,
    layers: int,
    first_layer: int = 0,
    projection: int | None = None,
) -> int:
    """Parameters of an adapter, its projection included."""
    adapted = layers - first_layer
    one, two = (_adapter_size(description, lora, count) for count in (1, 2))
    extra = 0 if projection is None else projection * int(description.hidden_size)
    return one + (adapted - 1) * (two - one) + extra


@_once
def encoding_peak(
    description: PretrainedConfig, rows: int, width: int, *, precision: str, layers: int
) -> int:
    """Bytes beside the weights at the peak of encoding B texts of T tokens."""

    def step(count: int) -> int:
        model = _built(description, count, precision)
        module = BiEncoder(model, "last").eval().to("meta")
        with torch.inference_mode():
            return _peak(lambda: module(*_batch(rows, width)))

    return _at_depth(step, layers)


@_once
def stage1_peak(
    description: PretrainedConfig,
    lora: LoraConfig,
    rows: int,
    width: int,
    *,
    precision: str,
    layers: int,
    projection: int | None,
    recompute: bool,
) -> int:
    """Bytes beside the weights and their gradients at the peak of one pass of stage 1, forward and
    backward, over B texts of T tokens.
    """

    def step(count: int) -> int:
        model = _adapted(description, lora, count, precision, recompute)
        module = BiEncoder(model, "last", projection).to("meta").to(torch_dtype(precision)).train()
        return _peak(lambda: module(*_batch(rows, width)).sum().backward())

    return _at_depth(step, layers)


@_once
def stage2_peak(
    description: PretrainedConfig,
    lora: LoraConfig,
    rows: int,
    width: int,
    predicted: int,
    *,
    precision: str,
    layers: int,
    first_layer: int,
    recompute: bool,
    packed: bool,
) -> int:
    """As :func:`stage1_peak` for stage 2: B rows of T tokens, of which N are predicted; ``packed``
    rows hold several sequences each.
    """

    def step(count: int) -> int:
        model = _adapted(description, lora, count, precision, recompute)

        def work() -> None:
            ids, _ = _batch(rows, width)
            # One for each of the packed sequences, or none.
            mask = torch.ones(rows, 1, width, width, device="meta") > 0 if packed else None
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False)
            logits = model.lm_head(hidden.last_hidden_state.flatten(0, 1)[:predicted])
            # as losses.answer takes them: a row more, those that count, then in float32
            padded = torch.cat([logits, logits.new_zeros(1, logits.shape[1])])
            targets = torch.zeros(predicted, dtype=torch.long, device="meta")
            functional.cross_entropy(padded[:-1].clone().float(), targets).backward()

        model.train()
        return _peak(work)

    return _at_depth(step, layers - first_layer)


def _at_depth(step: Callable[[int], int], layers: int) -> int:
    """A peak grows by the same with every layer from the second on."""
    if layers <= 3:
        return step(layers)
    two, three = step(2), step(3)
    return two + (layers - 2) * (three - two)


def _built(description: PretrainedConfig, layers: int, precision: str) -> PreTrainedModel:
    values = description.to_dict() | {"num_hidden_layers": layers}
    if values.get("layer_types"):  # one a layer, where layers differ
        values["layer_types"] = list(values["layer_types"])[:layers]
    short: Any = type(description)
    short = short(**values)
    _register_attention()
    options = {"attn_implementation": _ATTENTION, "dtype": torch_dtype(precision)}
    loader = AutoModelForCausalLM if _generates(description) else AutoModel
    with torch.device("meta"):
        model: PreTrainedModel = loader.from_config(short, **options)  # type: ignore[no-untyped-call]
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]
    return model.eval()


def _generates(description: PretrainedConfig) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    named = (description.architectures or [""])[0]
    return description.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or named.endswith(
        "ForCausalLM"
    )


def _adapted(
    description: PretrainedConfig,
    lora: LoraConfig,
    layers: int,
    precision: str,
    recompute: bool,
) -> Any:
    model = _built(description, layers, precision)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.device("meta"):
        adapted = new_adapter(model, lora, seed=0)
    return adapted.to(torch_dtype(precision)).get_base_model()


def _adapter_size(description: PretrainedConfig, lora: LoraConfig, layers: int) -> int:
    model = _adapted(description, lora, layers, "bf16", recompute=False)
    return sum(entry.numel() for entry in model.parameters() if entry.requires_grad)


def _batch(rows: int, width: int) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(rows, width, dtype=torch.long, device="meta")
    return ids, torch.ones_like(ids)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


_ASKS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
}
"""What looks at a value, which nothing has here."""


class _Live(TorchDispatchMode):
    """Follows the bytes of all storages that are made inside, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ASKS:
            # Whether all padding stands on the right, whether no row is packed: so it is here.
            return True
        given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and _key(leaf) not in given | self._seen:
                storage = leaf.untyped_storage()
                self._seen.add(_key(leaf))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, _key(leaf), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return made

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _peak(work: Callable[[], object]) -> int:
    with _Live() as live:
        work()
    return live.peak


class _Fused(torch.autograd.Function):
    """Attention as fused kernels hold it: query, key, value, output, and a number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, heads, T, d] each -> [B, heads, T, d]."""
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3]).float())
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the same shapes."""
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    groups = int(getattr(module, "num_key_value_groups", 1))
    if groups > 1 and mask is not None:  # as the sdpa path does
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    found: Tensor = _Fused.apply(query, key, value)  # type: ignore[no-untyped-call]
    return found.transpose(1, 2).contiguous(), None


@cache
def _register_attention() -> None:
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)  # padding alone needs none
