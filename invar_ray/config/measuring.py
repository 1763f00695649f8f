"""How vectors are searched, and what is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from invar_ray.config.fields import (
    FORBID,
    EncoderName,
    Mode,
    NoneTwice,
    PositiveShare,
    RunName,
    Share,
)

MOST_SHARDS = 256
"""Of an index: the files of all are open while a corpus is cut."""


@dataclass(frozen=True)
class IndexConfig:
    """How vectors are searched."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    factory: str = "Flat"
    """FAISS factory string, inner product on unit vectors: ``Flat`` is exact; e.g. ``IVF1024,SQ8``.
    ``auto`` lets the planner choose from the number of vectors and the three limits below; how deep
    to search is then measured.
    """
    num_lists_searched: PositiveInt = 16
    """Lists that a search visits, for IVF factories only (FAISS's nprobe)."""
    encoder: EncoderName = "retriever"
    """What ``jobs.reindex`` embeds with: the base with this run's stage-1 adapter (``retriever``,
    trained where it is missing), the bare base (``base``), MiniLM (``minilm``, the coarse encoder),
    the base with the adapter that comes with the package (``starter``) or with a stage-1 adapter
    that stands already: its URI."""
    recall_target: PositiveShare | None = None
    """Least recall@10 against exact search, on sampled vectors, in (0, 1]; an index below it is not
    published. ``null`` is 0.95 for ``auto``, and measures nothing for an explicit factory.
    """
    max_memory_mb: PositiveFloat | None = None
    """For ``auto``: most memory of the loaded index, of each shard, in MB (10^6 bytes); ``null``:
    no limit."""
    max_latency_ms: PositiveFloat | None = None
    """For ``auto``: longest search of one query on one core, as the planner predicts it; ``null``
    is 50, or what the quickest takes that can be built.
    """
    shards: Annotated[int, Field(ge=1, le=MOST_SHARDS)] | Literal["auto"] = "auto"
    """How many indexes ``jobs.reindex`` makes of the corpus, which is cut by a hash of the
    documents' ids; each is built where there is room for it, and the service asks all.  ``auto``
    is the lowest power of 2 at which each keeps to the limits above, so 1 for most corpora.  At
    most 256.
    """


@dataclass(frozen=True)
class SearchConfig:
    """How questions are searched: for stage 2, in the report's row ``both``, and when served."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    mode: Mode = "hybrid"
    """``dense`` by the stage-1 vectors, ``bm25`` by words, ``hybrid`` by both, their lists fused
    (measured in docs/log.md); a request to the service may say otherwise."""
    dense_weight: Share = 0.4
    """Weight of vectors against words in a hybrid search under a stage-1 adapter, in [0, 1]; it
    stays with the index.  The better the retriever, the higher: 0.4 for an untrained MiniLM and for
    few layers of SmolLM2, 0.8 for a trained MiniLM in the demo (docs/log.md), where words added to
    recall and took from steadiness.  On SQuAD's passages 0.4 finds more with that one too
    (Recall@5 0.930 against 0.902): ``invar-ray tune`` says which suits yours."""
    reranker: str | None = None
    """A cross-encoder that reads the question beside each of the best hits and sorts them anew: a
    folder or a Hugging Face name (better with its commit behind an ``@``) of a sequence classifier
    with one label or two (ms-marco-MiniLM, bge-reranker, mxbai-rerank ..).  ``null``: none, which
    is quicker by far."""
    rerank_depth: PositiveInt = 32
    """How many hits it reads for each question; the cost is one pass of the model for each."""


SystemName = Literal[
    "bm25",
    "minilm",
    "minilm_bm25",
    "minilm_rewrites",
    "base",
    "base_rewrites",
    "stage1",
    "stage1_bm25",
    "stage1_rewrites",
    "stage1_reranked",
    "both",
]
"""Systems that a report can have rows for."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    top_k: Annotated[int, Field(ge=5)] = 20
    """Depth of the hit lists; overlap@5 needs 5."""
    num_rewrites: NonNegativeInt = 2
    """Rewrites per dev question, from ``rewrites.provider`` (from the rules where that is
    ``endpoint``), with a seed of their own."""
    num_answers: NonNegativeInt = 100
    """Answer this many of the dev questions with the generator; 0 evaluates retrieval only."""
    answer_wordings: PositiveInt = 1
    """Answer this many wordings of each of them; above 1 the report has a flip rate."""
    answer_batch_size: PositiveInt = 16
    """Prompts generated together."""
    num_reworded_answers: NonNegativeInt | None = None
    """Answer the other wordings of at most this many questions; ``null`` of all that are answered.
    """
    answer_rule: Literal["squad", "triviaqa", "hotpotqa", "regex"] = "squad"
    """How answers are compared with the gold ones (``invar_ray/evaluation/scoring.py``)."""
    systems: Annotated[tuple[SystemName, ...], NoneTwice, Field(min_length=1)] = (
        "bm25",
        "minilm",
        "minilm_bm25",
        "base",
        "stage1",
        "stage1_bm25",
        "stage1_rewrites",
        "stage1_reranked",
        "both",
    )
    """Rows of the report, in their order.  ``*_bm25`` fuses with BM25 (a hybrid search);
    ``*_rewrites`` fuses with two rewrites made at query time by rule, the rival that needs no
    training; ``stage1_reranked`` searches as ``search`` says, and is left out where that names no
    reranker; ``both`` does so, too, and adds stage 2.
    """
    arms: dict[RunName, dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Other stage 1s beside this one, each a row ``stage 1, NAME`` with the same data: what it
    changes of the sections ``model``, ``retriever`` and ``experimental``."""
