"""Code versions of the steps.

A step's version enters the fingerprint of what it makes.  Raise it when a change to the step changes its output:
artifacts of the old code are then not re-used.  ``tests/unit/test_versions.py`` holds a hash of each step's code
(without comments and docstrings) and fails when the code changed, so that the question is always asked; see
CONTRIBUTING.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepCode:
    """A step's version and the modules whose code decides its output."""

    version: int
    modules: tuple[str, ...]


_ENCODING = (
    "invar_ray.models.batching",
    "invar_ray.models.locate",
    "invar_ray.models.precision",
    "invar_ray.models.quantized",
    "invar_ray.models.encoder",
    "invar_ray.models.pooling",
    "invar_ray.models.adapters",
    "invar_ray.text.prompts",
    "invar_ray.text.tokens",
)
_BENCHMARKS = ("invar_ray.text.benchmarks", "invar_ray.text.benchmark_formats", "invar_ray.text.json_places")
_READING = (
    "invar_ray.text.readers",
    "invar_ray.text.rowfiles",
    "invar_ray.text.rows",
    "invar_ray.text.storage",
    "invar_ray.text.sentences",
)
_PARSING = (
    "invar_ray.text.whole",
    "invar_ray.text.formats.parsed",
    "invar_ray.text.formats.plain",
    "invar_ray.text.formats.pdf",
    "invar_ray.text.formats.word",
    "invar_ray.text.formats.html",
    "invar_ray.text.places",
)
_TRAINING = (
    "invar_ray.training.worker",
    "invar_ray.training.engine",
    "invar_ray.training.schedule",
    "invar_ray.training.stage",
)

STEPS: dict[str, StepCode] = {
    "model": StepCode(1, ("invar_ray.models.smollm2", "invar_ray.models.tiny")),
    "passages": StepCode(
        4,
        (
            *_READING,
            *_PARSING,
            "invar_ray.text.chunking",
            "invar_ray.text.tokens",
            "invar_ray.indexing.cutting",
            "invar_ray.indexing.passages",
            "invar_ray.indexing.previous",
        ),
    ),
    "questions": StepCode(
        2,
        (
            *_READING,
            *_BENCHMARKS,
            *(
                f"invar_ray.text.{name}"
                for name in (
                    "variants",
                    "rules",
                    "wording",
                    "parsing",
                    "noise",
                    "numbers",
                    "lexicon",
                    "stable",
                    "chat",
                    "contamination",
                    "endpoint",
                )
            ),
            "invar_ray.indexing.questions",
        ),
    ),
    "vectors": StepCode(
        3,
        (
            *_ENCODING,
            "invar_ray.models.coarse",
            "invar_ray.indexing.embed",
            "invar_ray.indexing.layout",
            "invar_ray.indexing.previous",
            "invar_ray.indexing.shards",
        ),
    ),
    "index": StepCode(
        2,
        tuple(
            f"invar_ray.retrieval.{name}" for name in ("blocks", "vectors", "probes", "planner", "index", "building")
        ),
    ),
    "trainset": StepCode(
        2,
        (
            "invar_ray.retrieval.mining",
            "invar_ray.retrieval.bm25",
            "invar_ray.indexing.trainset",
            "invar_ray.indexing.refresh",
            "invar_ray.text.windows",
            "invar_ray.text.sentences",
            "invar_ray.text.stable",
            "invar_ray.text.answers",
        ),
    ),
    "retriever": StepCode(
        2,
        (
            *_TRAINING,
            *_ENCODING,
            "invar_ray.training.retriever_stage",
            "invar_ray.training.objective",
            "invar_ray.training.refresh",
            "invar_ray.training.batches",
            "invar_ray.losses.contrastive",
            "invar_ray.losses.alignment",
            "invar_ray.losses.invariance",
            "invar_ray.losses.masks",
            "invar_ray.losses.gather",
            "invar_ray.losses.matryoshka",
            "invar_ray.losses.gradcache",
            "invar_ray.losses.risk",
            "invar_ray.losses.reduce",
            "invar_ray.text.answers",
        ),
    ),
    "hits": StepCode(
        3,
        (
            "invar_ray.retrieval.retriever",
            "invar_ray.retrieval.duplicates",
            "invar_ray.retrieval.filters",
            "invar_ray.retrieval.fusion",
            "invar_ray.text.rules",
            "invar_ray.text.wording",
            "invar_ray.evaluating.hits",
        ),
    ),
    "readings": StepCode(
        1,
        (
            "invar_ray.evaluating.readings",
            "invar_ray.text.windows",
            "invar_ray.text.sentences",
            "invar_ray.text.stable",
            "invar_ray.text.answers",
        ),
    ),
    "baselines": StepCode(
        1, ("invar_ray.retrieval.bm25", "invar_ray.retrieval.fusion", "invar_ray.evaluating.baselines")
    ),
    "generator": StepCode(
        4,
        (
            *_TRAINING,
            "invar_ray.training.generator_stage",
            "invar_ray.training.sequences",
            "invar_ray.models.generator",
            "invar_ray.models.adapters",
            "invar_ray.losses.answer",
            "invar_ray.text.prompts",
            "invar_ray.text.tokens",
            "invar_ray.text.answers",
        ),
    ),
    "report": StepCode(
        6,
        (
            "invar_ray.evaluating.evaluate",
            "invar_ray.evaluating.answering",
            "invar_ray.evaluating.measure",
            "invar_ray.evaluation.calibration",
            "invar_ray.evaluation.details",
            "invar_ray.evaluation.metrics",
            "invar_ray.evaluation.outcome",
            "invar_ray.evaluation.page",
            "invar_ray.evaluation.charts",
            "invar_ray.evaluation.questions",
            "invar_ray.evaluation.scoring",
            "invar_ray.evaluation.significance",
            "invar_ray.evaluation.trec",
            "invar_ray.evaluation.variance",
            "invar_ray.text.answers",
            "invar_ray.text.prompts",
            "invar_ray.text.tokens",
            "invar_ray.retrieval.rag",
            "invar_ray.models.generator",
            "invar_ray.models.decoding",
        ),
    ),
}
