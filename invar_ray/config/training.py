"""The two stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt

from invar_ray.config.fields import FORBID, Share
from invar_ray.config.models import LoraConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then linear decay to zero; no weight decay, gradients of a global
    norm of at most 1 (``invar_ray/training/stage.py``).
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    learning_rate: PositiveFloat = 1e-4
    """Peak learning rate (published, stage 1: 1e-4)."""
    warmup_steps: NonNegativeInt = 100
    """Steps from 0 to the peak (published: 100)."""


@dataclass(frozen=True)
class RetrieverConfig:
    """Stage 1: METHOD "Stage 1: the retriever"."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    init: str | None = None
    """What training starts from: ``builtin:starter`` (made for the first four layers of
    ``builtin:smollm2``, docs/starter.md), the URI of a ``retriever`` artifact, or ``null``, a
    fresh adapter.  Negatives are mined with it. [ours]
    """
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The ``retriever`` adapter."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW settings."""
    steps: PositiveInt = 1000
    """Optimizer steps."""
    global_batch_size: PositiveInt = 32
    """Questions per step over all workers; fixed by the science, however many workers there are."""
    num_hard_negatives: NonNegativeInt = 5
    """Mined negatives per question (published: 5)."""
    alignment_weight: float = 1.0
    """a0 (published: 1.0); 0 switches the alignment loss off."""
    alignment_decay_steps: int = 1000
    """T_a: the weight falls linearly from a0 to 0 over this many steps."""
    invariance_weight: float = 40.0
    """b0; 0 switches the invariance loss off.  What counts is weight / tau_inv^2: at 4,000 (40 at
    0.1) no recall was lost on any base; 16,000 took 18 % off the variance that training on several
    wordings left of two layers of SmolLM2 on Natural Questions (docs/ablation.md), and cost MiniLM
    0.02 of Recall@5.  Published: 0.5, of raw dot products, which in our scale shows no effect.
    """
    invariance_temperature: PositiveFloat = 0.1
    """tau_inv: sharp ones look at the few best slots, flat ones at all, and need more weight (it
    counts as weight / tau_inv^2).  Flat was better (docs/ablation.md); the log's
    ``consensus_perplexity`` says how flat.
    """
    invariance_ramp_steps: int = 100
    """T_b: the weight rises linearly from 0 to b0 over this many steps."""


@dataclass(frozen=True)
class GeneratorConfig:
    """Stage 2: METHOD "Stage 2: the generator"."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    lora: LoraConfig = field(default_factory=LoraConfig)
    """The ``generator`` adapter, on the same frozen base."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=2e-5))
    """AdamW settings (published learning rate: 2e-5)."""
    first_layer: NonNegativeInt = 0
    """Only layers from this one on (counted from 0) get an adapter, and nothing is back-propagated
    below it: from layer 12 of 30 on, a step took 28 % less time."""
    steps: PositiveInt = 1000
    """Optimizer steps."""
    global_batch_size: PositiveInt = 32
    """Examples per step over all workers."""
    top_k: PositiveInt = 5
    """Passages in the prompt (published: 5)."""
    distractor_share: Share = 0.2
    """Share of examples without an oracle (a passage that holds an answer): half of them lose the
    passages that hold one, half only their sentences that do, and the target is the fixed refusal.
    RAFT (arXiv 2403.10131) leaves the oracle out as often, but keeps the answer as target: see
    ``experimental.generator.oracle_free_share``. [ours]"""
    max_tokens: int = 512
    """Longest training sequence in tokens; passages are dropped by rank to fit."""
    max_new_tokens: PositiveInt = 24
    """Longest answer in tokens."""
