"""The door through which weights come into memory: in the precision asked for, straight to their
device; and what answers, opened through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from invar_ray.errors import ModelError
from invar_ray.models.adapters import load_adapter
from invar_ray.models.base import BaseRef, description, load_tokenizer, unresolved
from invar_ray.models.generator import Generator
from invar_ray.models.precision import made_in, torch_dtype
from invar_ray.models.quantized import Quantize, check_quantize, quantization
from invar_ray.models.trunk import is_causal, switch_dropout_off
from invar_ray.store.artifacts import Store, open_artifact

ATTENTION = "sdpa"
"""torch's own kernels: flash or memory-efficient ones on a GPU, where mask and type allow it."""
PLAIN_ATTENTION = "eager"
"""Matrix products and a softmax.  On a CPU in bf16 its backward takes half the time of torch's
flash kernel where texts are short (12 heads, 160 tokens: 81 against 188 ms); its forward takes
twice as long, and it keeps the square of the length.
"""
BaseOpener = Callable[[BaseRef, Store], tuple[PreTrainedModel, Any]]
"""Gives a model tree that the caller may put an adapter on, and its tokenizer."""


def open_model(
    ref: BaseRef,
    store: Store | None,
    precision: str = "fp32",
    device: str = "cpu",
    *,
    attention: str = ATTENTION,
    quantize: Quantize | None = None,
) -> tuple[PreTrainedModel, Any]:
    """The model of a resolved base in evaluation mode, and its tokenizer.

    A causal LM keeps its head; an encoder comes without its pooler and its dropout.

    Args:
        ref: the base.
        store: of a built-in base's artifact; folders and hub names need none.
        precision: of weights and products, whatever they are stored in.
        device: gets the weights one by one as they are read: the host never holds all of them.
        attention: transformers' name of an implementation; an architecture that has its own alone
            keeps it.
        quantize: hold the linear weights in 4 bits.

    Raises:
        ModelError: if it cannot be loaded, has changed, or is of neither kind.
        ResourceError: if ``quantize`` is set and bitsandbytes or a GPU is missing.
    """
    dtype, source = torch_dtype(precision), ref.folder_or_name(store)
    options: dict[str, Any] = {"revision": ref.revision, "attn_implementation": attention}
    if quantize is not None:
        check_quantize()
        options["quantization_config"] = quantization(quantize, dtype)
    loader = AutoModel if ref.is_encoder else AutoModelForCausalLM
    try:
        model = load_weights(loader, source, dtype, device, **options)
    except (OSError, ValueError) as error:
        raise unresolved(source, error) from error
    if ref.is_encoder:
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # type: ignore[assignment]  # BERT's own sentence vector: unused
        switch_dropout_off(model)
    elif not is_causal(model):
        raise ModelError(
            f"{source!r} is a {type(model).__name__}",
            expected="a LLaMA-family causal LM (LLaMA, SmolLM, Mistral, Qwen, Gemma, Phi ..)",
        )
    return model, load_tokenizer(source, ref.revision, ends=not ref.is_encoder)


def open_cross_encoder(
    ref: BaseRef, precision: str = "fp32", device: str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """A sequence classifier that reads two texts at once, and its tokenizer.

    Args:
        ref: see :func:`invar_ray.models.base.resolve_named`.
        precision, device: see :func:`open_model`.

    Raises:
        ModelError: it cannot be loaded, has changed, has no head (one would be made up), or one of
            more than two labels.
    """
    source = check_cross_encoder(ref)
    tokenizer = load_tokenizer(source, ref.revision, ends=False)
    try:
        model = load_weights(
            AutoModelForSequenceClassification,
            source,
            torch_dtype(precision),
            device,
            revision=ref.revision,
        )
    except (OSError, ValueError) as error:
        raise unresolved(source, error) from error
    # A causal LM's head reads the last token that is no padding: it has to know which those are.
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def check_cross_encoder(ref: BaseRef) -> str:
    """Folder or name of a cross-encoder, by its description alone.

    Raises:
        ModelError: see :func:`open_cross_encoder`.
    """
    source = ref.folder_or_name(None)
    described = description(source, ref.revision)
    named = (described.architectures or ["model without a head"])[0]
    has_head = named.endswith("ForSequenceClassification")
    if not has_head or described.num_labels > 2:
        labels = f" with {described.num_labels} labels" if has_head else ""
        raise ModelError(
            f"{source!r} is a {named}{labels}",
            expected="a cross-encoder: ..ForSequenceClassification with one label or two",
            action="name another reranker, or none",
        )
    return source


def load_weights(
    loader: Any, source: str, dtype: torch.dtype, device: str, **options: Any
) -> PreTrainedModel:
    """A model by one of transformers' loaders, in evaluation mode, frozen in nothing.

    Args:
        loader: ``AutoModel`` or one of its kin.
        source: folder or hub name.
        dtype, device: see :func:`open_model`.
        options: to the loader, too.
    """
    options = {"attn_implementation": ATTENTION} | options
    options |= {"dtype": dtype, "use_safetensors": True}
    if device != "cpu":
        options["device_map"] = {"": torch.device(device)}
    try:
        model: PreTrainedModel = loader.from_pretrained(source, **options)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        # An architecture that has its own attention alone (MPNet, DeBERTa).
        model = loader.from_pretrained(source, **options | {"attn_implementation": PLAIN_ATTENTION})
    return model.eval()


def open_generator(
    generator_uri: str,
    *,
    precision: str | None = None,
    device: str = "cpu",
    open_base_tree: BaseOpener | None = None,
) -> Generator:
    """The generator of an adapter artifact, ready to answer.

    Args:
        generator_uri: artifact of kind ``generator``; base and settings come from its manifest.
        precision: of the weights, ``fp32`` or ``bf16``, on any device; ``None`` takes the one that
            it was trained in.
        device: where it runs.
        open_base_tree: opens the base, on its device and in its precision (the two arguments are
            not looked at); ``None`` loads it for this generator alone.

    Returns:
        A generator whose ``version`` is the artifact's fingerprint.

    Raises:
        ArtifactError: if the artifact cannot be used.  ModelError: if its base is gone or changed.
    """
    artifact = open_artifact(generator_uri, "generator")
    artifact.verify_copy()
    base = BaseRef(**artifact.info["base"])
    if open_base_tree is None:
        model, tokenizer = open_model(base, artifact.store, precision or made_in(artifact), device)
    else:
        model, tokenizer = open_base_tree(base, artifact.store)
    # Merged, a token takes fewer products; a tree that others share must stay as it is.
    adapted = load_adapter(model, artifact.path("adapter"), merge=open_base_tree is None)
    generator = Generator(adapted, tokenizer, artifact.info["max_context"])
    generator.version = artifact.fingerprint
    generator.certainty = artifact.info.get("certainty")
    return generator


def open_base_generator(
    base: BaseRef, store: Store, max_context: int, *, precision: str = "fp32", device: str = "cpu"
) -> Generator:
    """A generator of the bare base; errors as :func:`open_model`.

    Args:
        base: resolved; below ``store``'s root if it is one of its artifacts.
        store: of the artifacts.
        max_context: most tokens of prompt and answer together.
        precision, device: see :func:`open_generator`.
    """
    return Generator(*open_model(base, store, precision, device), max_context)
