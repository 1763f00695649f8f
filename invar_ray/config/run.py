"""A whole run: all sections, and the checks that need more than one field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import ConfigDict

from invar_ray.config.corpus import CorpusConfig, QuestionsConfig, RewritesConfig, StorageConfig
from invar_ray.config.experimental import ExperimentalConfig
from invar_ray.config.fields import FORBID, RunName
from invar_ray.config.measuring import EvaluationConfig, IndexConfig, SearchConfig
from invar_ray.config.models import CoarseConfig, ModelConfig
from invar_ray.config.scale import ScaleConfig, ServeConfig
from invar_ray.config.training import GeneratorConfig, RetrieverConfig


@dataclass(frozen=True)
class Config:
    """A whole run."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    name: RunName = "demo"
    """Name that artifacts and reports carry."""
    seed: int = 0
    """Seed of everything that draws."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Where artifacts live."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The documents."""
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    """Train and dev questions."""
    rewrites: RewritesConfig = field(default_factory=RewritesConfig)
    """Rewrites and windows."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The base."""
    coarse: CoarseConfig = field(default_factory=CoarseConfig)
    """The teacher."""
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    """Stage 1."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """Stage 2."""
    index: IndexConfig = field(default_factory=IndexConfig)
    """The index."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """Search."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Measures."""
    serve: ServeConfig = field(default_factory=ServeConfig)
    """Endpoint."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Hardware."""
    experimental: ExperimentalConfig = field(default_factory=ExperimentalConfig)
    """Switches of the method that no recipe sets."""


def cross_checks(config: Config) -> list[str]:
    """The faults of fields that do not go together, each with its key."""
    return [
        *_data_faults(config),
        *_retriever_faults(config),
        *_generator_faults(config),
        *_index_faults(config),
    ]


def _data_faults(config: Config) -> list[str]:
    faults, rewrites = [], config.rewrites
    if rewrites.provider == "file" and not rewrites.uri:
        faults.append("rewrites.uri: needed because rewrites.provider is 'file'")
    if rewrites.provider == "endpoint" and not (rewrites.uri and rewrites.endpoint_model):
        faults.append(
            "rewrites.uri, rewrites.endpoint_model: needed because rewrites.provider is 'endpoint'"
        )
    if config.corpus.chunk_stride > config.corpus.chunk_tokens:
        faults.append(
            "corpus.chunk_stride: larger than corpus.chunk_tokens, text between passages would be "
            "lost"
        )
    return faults


def _retriever_faults(config: Config) -> list[str]:
    faults, extra = [], config.experimental.retriever
    dims, weights = extra.matryoshka_dims, extra.matryoshka_weights
    if weights and len(weights) != len(dims):
        faults.append(
            f"experimental.retriever.matryoshka_weights: {len(weights)} for {len(dims)} sizes, "
            "expected one for each"
        )
    if extra.mining_first_rank > extra.mining_depth:
        faults.append(
            "experimental.retriever.mining_first_rank: below experimental.retriever.mining_depth, "
            "no rank is left"
        )
    if extra.refresh_every is not None and extra.refresh_delay >= extra.refresh_every:
        faults.append(
            "experimental.retriever.refresh_delay: must be below "
            "experimental.retriever.refresh_every, versions follow each other"
        )
    if config.experimental.model.quantize and config.scale.zero_stage == 3:
        faults.append(
            "scale.zero_stage: 3 cannot shard a base in 4 bits; use 2 with "
            "experimental.model.quantize"
        )
    if config.model.precision != "fp32" and config.scale.zero_stage == 0:
        faults.append(
            "scale.zero_stage: 0 keeps no moments of a parameter in bf16, so that no checkpoint "
            "could be written; use 1, or model.precision fp32"
        )
    if config.experimental.model.quantize and not config.scale.use_gpu:
        faults.append(
            "experimental.model.quantize: needs GPUs; set scale.use_gpu to true, or "
            "experimental.model.quantize to null"
        )
    return faults


def _generator_faults(config: Config) -> list[str]:
    faults = []
    settings, extra = config.generator, config.experimental.generator
    shares = settings.distractor_share + extra.oracle_free_share
    if shares > 1.0:
        faults.append(
            "generator.distractor_share, experimental.generator.oracle_free_share: together at "
            f"most 1 (got {shares:g})"
        )
    if settings.max_new_tokens >= settings.max_tokens:
        faults.append(
            "generator.max_new_tokens: leaves no room for a prompt within generator.max_tokens"
        )
    return faults


def _index_faults(config: Config) -> list[str]:
    limits = {
        "index.max_memory_mb": config.index.max_memory_mb,
        "index.max_latency_ms": config.index.max_latency_ms,
    }
    return [
        f"{key}: only the planner keeps to it; set index.factory to auto"
        for key, limit in limits.items()
        if limit is not None and config.index.factory != "auto"
    ]
