"""Texts in, unit vectors out: the bi-encoder on a base with the ``retriever`` adapter.

Shape legend: N texts, T tokens, H hidden size, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from invar_ray.config import CoarseConfig, ModelConfig
from invar_ray.errors import ModelError
from invar_ray.models.adapters import load_adapter, load_merged
from invar_ray.models.base import (
    BaseRef,
    description,
    folder_fingerprint,
    hidden_size,
    load_tokenizer,
    stored_form,
)
from invar_ray.models.batching import (
    DEFAULT_TOKENS_PER_BATCH,
    EncodeStats,
    Vectors,
    encode_in_batches,
    pad_right,
)
from invar_ray.models.loading import ATTENTION, BaseOpener, open_model
from invar_ray.models.minilm import (
    CoarseEncoder,
    coarse_passage_ids,
    coarse_source,
    coarse_tokenizer,
)
from invar_ray.models.pooling import Pooling, pool
from invar_ray.models.precision import torch_dtype
from invar_ray.models.quantized import Quantize
from invar_ray.models.trunk import is_causal, keep_first_layers, trunk
from invar_ray.store.artifacts import Store, digest
from invar_ray.text.prompts import format_passage, format_query
from invar_ray.text.tokens import text_ids

PROJECTION_FILE = "projection.safetensors"
LLM_PREFIXES = "query: ", "passage: "
"""Before the questions and passages that a causal LM sees, unless the config says otherwise."""
COARSE_MAX_TOKENS = 256
"""Longest input of the coarse encoder in tokens: the limit on MiniLM's model card."""

MERGE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Merging an adapter may change a vector's cosine with what the unmerged one gives by this much.
[ours]
"""
_MERGE_TEXTS = (
    "The harbour of Arvon was dug in 1841 and deepened twice since.",
    "who wrote it",
    "Farmers grow barley; ships carry it to 12 ports, as ever.",
)


class TextEncoder(Protocol):
    """What an index needs of an encoder."""

    dimension: int
    fingerprint: str
    tokens_per_batch: int
    stats: EncodeStats

    def encode_queries(self, questions: Sequence[str]) -> Vectors:
        """[N, D] unit rows, in the order given."""
        ...

    def encode_passages(self, passages: Sequence[tuple[str, str]]) -> Vectors:
        """[N, D] unit rows for (title, text) pairs, in the order given."""
        ...

    def encode_ids(self, ids: list[list[int]]) -> Vectors:
        """[N, D] unit rows for token ids that :func:`open_tokenizer` gave, in the order given."""
        ...


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that decides an encoder's vectors; travels to workers and into manifests as JSON.

    Attributes:
        kind: ``llm`` (a causal LM, with or without adapter), ``encoder`` (BERT .., likewise) or
            ``coarse`` (MiniLM as the teacher).
        base: the retriever's resolved base; for ``coarse`` its location is the model's name.
        adapter: ref of the adapter artifact below the store's root, or ``None`` for the bare base.
        adapter_fingerprint: of that artifact.
        num_layers: of the base's first layers; ``None`` is all of them.
        dimensions: how many values of each vector are kept, at unit norm; ``None`` for all.
    """

    kind: str
    base: BaseRef
    adapter: str | None
    adapter_fingerprint: str | None
    pooling: Pooling
    projection_dim: int | None
    query_prefix: str
    passage_prefix: str
    query_max_tokens: int
    passage_max_tokens: int
    num_layers: int | None = None
    dimensions: int | None = None

    @property
    def fingerprint(self) -> str:
        """Of the vectors; independent of where things are stored."""
        values = asdict(self)
        values["base"] = self.base.fingerprint
        del values["adapter"]
        return digest(values)

    def to_json(self) -> dict[str, Any]:
        """JSON-able description; :meth:`from_json` reads it back."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> EncoderSpec:
        """Inverse of :meth:`to_json`."""
        return EncoderSpec(**{**values, "base": BaseRef(**values["base"])})


def llm_spec(
    config: ModelConfig, base: BaseRef, adapter: tuple[str, str] | None = None
) -> EncoderSpec:
    """Describe the bi-encoder of the retriever's base, a causal LM or an encoder; ``adapter`` is
    (ref, fingerprint) of a ``retriever`` artifact.
    """
    wanted = (base.query_prefix, base.passage_prefix) if base.is_encoder else LLM_PREFIXES
    given = config.query_prefix, config.passage_prefix
    query, passage = (w if g is None else g for w, g in zip(wanted, given, strict=True))
    return EncoderSpec(
        kind="encoder" if base.is_encoder else "llm",
        base=base,
        adapter=adapter[0] if adapter else None,
        adapter_fingerprint=adapter[1] if adapter else None,
        pooling=base.pooling or config.pooling,
        # An untrained projection would be noise: the bare base is compared without it.
        projection_dim=config.projection_dim if adapter else None,
        query_prefix=query,
        passage_prefix=passage,
        query_max_tokens=config.query_max_tokens,
        passage_max_tokens=config.passage_max_tokens,
        num_layers=config.retriever_layers,
    )


def coarse_spec(config: CoarseConfig) -> EncoderSpec:
    """Describe the coarse encoder: it pools, and stands before texts, as its own description says,
    unless the settings say otherwise.

    Raises:
        ModelError: it pools in a way that is not known here.
    """
    folder = Path(config.model).expanduser()
    content = folder_fingerprint(folder) if folder.is_dir() else digest({"coarse": config.model})
    builtin = config.model.startswith("builtin:")
    source = str(folder) if folder.is_dir() else config.model
    form: tuple[Pooling, str, str] = ("mean", "", "")
    pooling, query, passage = form if builtin else stored_form(source, None)
    if config.query_prefix is not None:
        query = config.query_prefix
    if config.passage_prefix is not None:
        passage = config.passage_prefix
    return EncoderSpec(
        kind="coarse",
        base=BaseRef(config.model, None, content),
        adapter=None,
        adapter_fingerprint=None,
        pooling=pooling,
        projection_dim=None,
        query_prefix=query,
        passage_prefix=passage,
        query_max_tokens=COARSE_MAX_TOKENS,
        passage_max_tokens=COARSE_MAX_TOKENS,
    )


def vector_size(spec: EncoderSpec, store: Store) -> int:
    """D of an encoder, without its weights.

    Raises:
        ModelError: if the description of its base cannot be loaded.
    """
    known = spec.dimensions or spec.projection_dim
    if known is not None:
        return known
    if spec.kind == "coarse":
        return int(description(coarse_source(spec.base.location)).hidden_size)
    return hidden_size(spec.base, store)


def open_encoder(
    spec: EncoderSpec,
    store: Store,
    *,
    precision: str = "fp32",
    device: str = "cpu",
    open_base_tree: BaseOpener | None = None,
) -> TextEncoder:
    """Load what ``spec`` describes; the adapter is merged into a private copy of the base.

    Args:
        precision: of the base, ``fp32`` or ``bf16``, on any device; the coarse encoder is always in
            fp32.
        device: where it runs.
        open_base_tree: gives a tree over a base that others use as well, on its device and in its
            precision (the two arguments are not looked at): the adapter then stays unmerged.

    Raises:
        ModelError, ArtifactError: if base or adapter cannot be loaded.
    """
    if spec.kind == "coarse":
        return CoarseEncoder(
            spec.base.location,
            spec.query_max_tokens,
            spec.fingerprint,
            pooling=spec.pooling,
            prefixes=(spec.query_prefix, spec.passage_prefix),
            device=device,
        )
    tolerance = MERGE_TOLERANCE[torch_dtype(precision)]
    model, tokenizer = open_trunk(spec, store, precision, device, open_base_tree=open_base_tree)
    projection: Tensor | None = None
    if spec.adapter is not None:
        folder = store.open(spec.adapter, "retriever").path("adapter")
        if open_base_tree is None:
            check = partial(_sample_vectors, tokenizer=tokenizer, spec=spec)
            model, _ = load_merged(model, folder, check, tolerance)
        else:
            model = load_adapter(model, folder)
        if spec.projection_dim is not None:
            projection = load_projection(folder)
    module = BiEncoder(model, spec.pooling, spec.projection_dim, spec.dimensions)
    if projection is not None and module.projection is not None:
        module.projection.weight.data.copy_(projection)
    if open_base_tree is None:
        module.to(device)
    elif module.projection is not None:
        module.projection.to(model.device)
    return Encoder(module, tokenizer, spec)


def open_trunk(
    spec: EncoderSpec,
    store: Store,
    precision: str = "fp32",
    device: str = "cpu",
    *,
    attention: str = ATTENTION,
    quantize: Quantize | None = None,
    open_base_tree: BaseOpener | None = None,
) -> tuple[PreTrainedModel, Any]:
    """The base of a retriever, as many layers of it as encode, and its tokenizer; see
    :func:`invar_ray.models.loading.open_model`.

    Raises:
        ModelError: if it cannot be loaded, has fewer layers, or fewer positions than texts may have
            tokens.
    """
    if open_base_tree is not None:
        model, tokenizer = open_base_tree(spec.base, store)
    else:
        model, tokenizer = open_model(
            spec.base, store, precision, device, attention=attention, quantize=quantize
        )
    keep_first_layers(model, spec.num_layers)
    longest = max(spec.query_max_tokens, spec.passage_max_tokens)
    # An encoder has one learned vector for each position: beyond them it stops in the middle.
    most = min(int(model.config.max_position_embeddings), int(tokenizer.model_max_length))
    if spec.kind == "encoder" and longest > most:
        raise ModelError(
            f"texts may have {longest} tokens, and {type(model).__name__} has {most} positions",
            expected=f"at most {most}",
            action="lower model.query_max_tokens and model.passage_max_tokens",
        )
    return model, tokenizer


def open_tokenizer(
    spec: EncoderSpec, store: Store
) -> Callable[[Sequence[tuple[str, str]]], list[list[int]]]:
    """What turns (title, text) passages into the token ids of ``spec``'s encoder, without its
    weights.

    Raises:
        ModelError, ArtifactError: if it cannot be loaded.
    """
    if spec.kind == "coarse":
        coarse = coarse_tokenizer(spec.base.location)
        most, prefix = spec.passage_max_tokens, spec.passage_prefix
        return lambda passages: coarse_passage_ids(coarse, passages, most, prefix)
    tokenizer = load_tokenizer(
        spec.base.folder_or_name(store), spec.base.revision, ends=spec.kind == "llm"
    )
    return lambda passages: passage_ids(tokenizer, passages, spec)


@torch.inference_mode()
def _sample_vectors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: EncoderSpec
) -> Tensor:
    """[3, H] unit rows of fixed texts, before any projection."""
    rows = passage_ids(tokenizer, [("", text) for text in _MERGE_TEXTS], spec)
    tokens, mask = pad_right(rows, int(tokenizer.pad_token_id))
    device = model.device
    found: Tensor = BiEncoder(model, spec.pooling).eval()(tokens.to(device), mask.to(device))
    return found


def load_projection(folder: Path) -> Tensor:
    """[D, H] projection stored beside a PEFT folder."""
    return load_file(folder / PROJECTION_FILE)["weight"]


class BiEncoder(nn.Module):
    """Base (with or without adapter) -> pooled, optionally projected, optionally cut, unit vectors.

    Queries and passages share all weights (METHOD "Bi-encoder").  Encoding goes through the base's
    trunk: no logits.

    Args:
        base: a causal LM or an encoder.
        pooling: how token states become one vector.
        projection_dim: of a projection after that; ``None`` for none.
        dimensions: keep the first values of each vector; ``None`` keeps all.

    Raises:
        ModelError: the vectors have fewer values than are to be kept.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        pooling: Pooling,
        projection_dim: int | None = None,
        dimensions: int | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self._causal = is_causal(base)
        self.pooling: Pooling = pooling
        width = int(base.config.hidden_size)
        # In fp32 whatever the base is in: one small product, and nothing to lose. Training may cast
        # it.
        self.projection = (
            None
            if projection_dim is None
            else nn.Linear(width, projection_dim, bias=False, dtype=torch.float32)
        )
        whole = projection_dim or width
        if dimensions is not None and not 1 <= dimensions <= whole:
            raise ModelError(
                f"{dimensions} values of each vector are to be kept, and it has {whole}",
                expected=f"1 to {whole}",
                action="set experimental.index.dimensions accordingly",
            )
        self.dimension = dimensions or whole

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[N, T] token ids and mask -> [N, D] unit rows in float32."""
        options: dict[str, Any] = {"attention_mask": attention_mask}
        if self._causal:
            options["use_cache"] = False
            # No token sees padding that stands to its right, and without a mask attention takes
            # its fast kernels (flash, grouped heads). The values are the same.
            if bool(attention_mask[:, 0].all()):
                options["attention_mask"] = None
        hidden = trunk(self.base)(input_ids=input_ids, **options).last_hidden_state  # [N, T, H]
        pooled = pool(hidden, attention_mask, self.pooling)  # [N, H]
        if self.projection is not None:
            pooled = self.projection(pooled.to(self.projection.weight.dtype))
        # The prefix of a unit vector at unit norm is the prefix of the vector itself at unit norm.
        return functional.normalize(pooled[:, : self.dimension].float(), dim=-1)


class Encoder:
    """A bi-encoder with its tokenizer and prompts; implements :class:`TextEncoder`.

    Args:
        module: on its device, in its precision.
        tokenizer: of the base.
        spec: prefixes, lengths and the fingerprint.
        tokens_per_batch: padding included.
    """

    def __init__(
        self,
        module: BiEncoder,
        tokenizer: PreTrainedTokenizerBase,
        spec: EncoderSpec,
        tokens_per_batch: int = DEFAULT_TOKENS_PER_BATCH,
    ) -> None:
        self.module = module.eval()
        self.tokenizer = tokenizer
        self.spec = spec
        self.tokens_per_batch = tokens_per_batch
        self.stats = EncodeStats()
        self.dimension = module.dimension
        self.fingerprint = spec.fingerprint

    def encode_queries(self, questions: Sequence[str]) -> Vectors:
        """[N, D] unit rows for questions, in the order given."""
        return self.encode_ids(query_ids(self.tokenizer, questions, self.spec))

    def encode_passages(self, passages: Sequence[tuple[str, str]]) -> Vectors:
        """[N, D] unit rows for (title, text) pairs, in the order given."""
        return self.encode_ids(passage_ids(self.tokenizer, passages, self.spec))

    def encode_ids(self, ids: list[list[int]]) -> Vectors:
        """[N, D] unit rows for token ids, in the order given."""
        device = next(self.module.parameters()).device

        def forward(rows: list[list[int]]) -> Tensor:
            tokens, mask = pad_right(rows, int(self.tokenizer.pad_token_id))
            return self.module(tokens.to(device), mask.to(device))

        return encode_in_batches(ids, forward, self.dimension, self.tokens_per_batch, self.stats)


def query_ids(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], spec: EncoderSpec
) -> list[list[int]]:
    """Token ids of formatted queries: a causal LM's each end in the end token, which truncation
    keeps; an encoder's are framed as its tokenizer does ([CLS] .. [SEP]).
    """
    texts = [format_query(question, spec.query_prefix) for question in questions]
    return _framed_ids(tokenizer, texts, spec.query_max_tokens, spec)


def passage_ids(
    tokenizer: PreTrainedTokenizerBase, passages: Sequence[tuple[str, str]], spec: EncoderSpec
) -> list[list[int]]:
    """Token ids of formatted (title, text) passages, framed as :func:`query_ids` does."""
    texts = [format_passage(title, text, spec.passage_prefix) for title, text in passages]
    return _framed_ids(tokenizer, texts, spec.passage_max_tokens, spec)


def _framed_ids(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int, spec: EncoderSpec
) -> list[list[int]]:
    if spec.kind != "llm":
        return text_ids(tokenizer, texts, max_tokens=max_tokens)
    eos = int(tokenizer.eos_token_id)
    rows = text_ids(tokenizer, texts, max_tokens=max_tokens - 1)
    return [row if row and row[-1] == eos else [*row, eos] for row in rows]
