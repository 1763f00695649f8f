"""Switches that no recipe sets and no table supports yet: parts of the method, each with its
published or neutral value.  A key here is the one that it would have without ``experimental.``
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt

from invar_ray.config.fields import FORBID, NoneTwice, PositiveShare, Share, Sizes


@dataclass(frozen=True)
class TinyConfig:
    """Shape of the embedded base: a small LLaMA whose token embeddings start from MiniLM's."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    num_layers: PositiveInt = 4
    """Transformer layers."""
    num_heads: PositiveInt = 6
    """Attention heads; the width, 384, is MiniLM's."""
    intermediate_size: PositiveInt = 512
    """Width of the MLP."""


@dataclass(frozen=True)
class ExperimentalModel:
    """What else a base can be."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    quantize: Literal["nf4"] | None = None
    """``nf4`` trains both adapters on a base whose linear weights are held in 4 bits (QLoRA; needs
    bitsandbytes and GPUs); encoding and answering take the base in ``precision``.  ``null`` trains
    on that, too."""
    tiny: TinyConfig = field(default_factory=TinyConfig)
    """Used for ``builtin:tiny`` only."""


@dataclass(frozen=True)
class ExperimentalCoarse:
    """The teacher's score."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    document_weight: Share = 0.3
    """g: share of the document-level score in the teacher's score, in [0, 1]."""


@dataclass(frozen=True)
class ExperimentalRetriever:
    """Stage 1: mining, refreshed negatives, Matryoshka, patterns, V-REx, held-out titles."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    mining_depth: PositiveInt = 20
    """Negatives are taken from the union of the top ``mining_depth`` lists of a question's
    rewrites."""
    mining_first_rank: PositiveInt = 1
    """Leave the ranks above this one out of every list: the best hits are often right answers that
    nobody marked.
    """
    mining_bm25: bool = False
    """Join BM25's lists of the rewrites to the retriever's.
    """
    refresh_every: PositiveInt | None = None
    """Steps between new versions of the hard negatives (ANCE): the adapter of that moment embeds
    the corpus and mines by the same rules, as a job beside the training.  ``null`` mines once,
    before it."""
    refresh_delay: NonNegativeInt = 0
    """Steps from that moment to the one from which on the version is used; the training waits for
    it there, so that runs repeat.  0 waits at once, more lets the job run meanwhile."""
    refresh_async: bool = False
    """Use a version from the first step on at which it stands, and never wait: faster, but runs do
    not repeat.
    """
    refresh_share: PositiveShare = 1.0
    """Share of the passages that a refresh embeds, in (0, 1]: a seeded sample, and whatever the
    training set holds.
    """
    matryoshka_dims: Sizes = ()
    """Sizes to which vectors may be cut: the losses are the weighted mean over these and the full
    size, each taken from the vectors' first values at unit norm.  None trains the full size
    alone."""
    matryoshka_weights: tuple[PositiveFloat, ...] = ()
    """A weight for each of ``matryoshka_dims``; none is 1 for all.  The full size has 1, unless it
    is listed.
    """
    contrastive_temperature: PositiveFloat = 0.05
    """tau_nce."""
    false_negative_margin: float = 0.05
    """A candidate with teacher score >= s(positive) - margin * |s(positive)| is not a negative."""
    alignment_temperature: PositiveFloat = 0.05
    """tau_M, the teacher's temperature."""
    invariance_pattern: Literal["hard", "soft"] = "soft"
    """Which slots are invariant patterns: the top ``pattern_top_m`` in a share ``pattern_share`` of
    the environments (hard), or all, weighted by exp(-variance / ``pattern_kappa``) (soft)."""
    pattern_top_m: PositiveInt = 10
    """m; also the rank within which the consensus must hold the positive."""
    pattern_share: Share = 0.8
    """rho, hard patterns only."""
    pattern_kappa: PositiveFloat = 2.0
    """kappa in nats^2, soft patterns only."""
    risk_variance_weight: float = 0.0
    """beta: weight of the variance of the contrastive loss over environments (V-REx); 0 is off."""
    heldout_share: Share = 0.0
    """Share of the titles of the training set that are set aside, with their questions: measured
    while training, and the step with the best worst-of-family Recall@5 on them is the adapter.  0
    trains on all and keeps the last step. The dev questions are never looked at."""
    heldout_every: PositiveInt = 50
    """Steps between those measurements."""
    heldout_patience: PositiveInt | None = None
    """Stop after this many measurements without a better one; ``null`` trains to the last step."""


@dataclass(frozen=True)
class ExperimentalGenerator:
    """Stage 2: what varies between epochs, and what is in the prompt."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    shuffle_passages: bool = True
    """Vary the order of the passages from epoch to epoch."""
    vary_top_k: bool = True
    """Vary the number of passages between 1 and ``top_k``."""
    use_rewrites: bool = True
    """Train on the rewrites too."""
    vary_windows: bool = True
    """Show the passages of an example in one of their windows (``rewrites.num_windows`` other cuts
    of their documents), as in stage 1; ``false`` shows them as indexed."""
    insert_oracle: bool = True
    """Where retrieval found no oracle, put one in the place of the worst passage, so that the two
    shares are what they say; ``false`` trains on what was retrieved, and each question that
    retrieval fails on teaches to refuse. [ours]
    """
    oracle_free_share: Share = 0.0
    """Share of examples that hold only distractors and whose target is the answer all the same,
    without a citation, as in RAFT: the model learns the corpus by heart.  0 because a system that
    cites should not answer from memory, and because the same prompts teach to refuse. [ours]"""
    abstention_risk: PositiveShare | None = 0.1
    """Most questions that may get a wrong answer, as a share of all questions: the generator is
    calibrated on train questions with and without what answers them, and what is less likely right
    than the threshold found so becomes a refusal.  ``null``: it is not calibrated. [ours]"""
    abstention_unanswerable: Share = 0.4
    """The share of questions, in use, that the corpus does not answer: the more of them, the surer
    an answer has to be. [ours]"""


@dataclass(frozen=True)
class ExperimentalIndex:
    """Shortened vectors."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    dimensions: PositiveInt | None = None
    """Keep this many values of each stage-1 vector, at unit norm (see
    ``experimental.retriever.matryoshka_dims``); ``null`` keeps all."""


@dataclass(frozen=True)
class ExperimentalEvaluation:
    """Other causes of variance."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    causes: Annotated[tuple[Literal["window", "index", "precision"], ...], NoneTwice] = ("index",)
    """Causes of variance to measure beside the wording, for ``base`` and ``stage1``: other windows
    (embeds the corpus again, cut to 64 tokens), the approximate index (nothing to do for an
    exact one), and questions encoded in the other precision (bf16, or fp32 for a bf16 model)."""


@dataclass(frozen=True)
class ExperimentalScale:
    """Waits of elastic workers and of refreshed negatives; in no fingerprint."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    resize_every_s: PositiveFloat = 60.0
    """For elastic workers: seconds between looks at whether the cluster has room for more."""
    refresh_timeout_s: PositiveFloat = 7200.0
    """How long a training step waits for refreshed negatives, before the run is given up."""


@dataclass(frozen=True)
class ExperimentalConfig:
    """All of them, in sections as those of ``Config``."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    model: ExperimentalModel = field(default_factory=ExperimentalModel)
    """Beside ``model``."""
    coarse: ExperimentalCoarse = field(default_factory=ExperimentalCoarse)
    """Beside ``coarse``."""
    retriever: ExperimentalRetriever = field(default_factory=ExperimentalRetriever)
    """Beside ``retriever``."""
    generator: ExperimentalGenerator = field(default_factory=ExperimentalGenerator)
    """Beside ``generator``."""
    index: ExperimentalIndex = field(default_factory=ExperimentalIndex)
    """Beside ``index``."""
    evaluation: ExperimentalEvaluation = field(default_factory=ExperimentalEvaluation)
    """Beside ``evaluation``."""
    scale: ExperimentalScale = field(default_factory=ExperimentalScale)
    """Beside ``scale``."""
