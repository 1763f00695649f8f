"""Code versions of the steps.

A step's version enters the fingerprint of what it makes.  Raise it when a change to the step
changes its output: artifacts of the old code are then not re-used.  ``tests/unit/test_versions.py``
holds a hash of each step's code (without comments and docstrings) and fails when the code changed,
so that the question is always asked; see CONTRIBUTING.md.
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
    "invar_ray.models.base",
    "invar_ray.models.precision",
    "invar_ray.models.quantized",
    "invar_ray.models.encoder",
    "invar_ray.models.pooling",
    "invar_ray.models.adapters",
    "invar_ray.text.prompts",
    "invar_ray.text.tokens",
)
_BENCHMARKS = (
    "invar_ray.questions.benchmarks",
    "invar_ray.questions.benchmark_formats",
    "invar_ray.corpus.json_places",
)
_READING = (
    "invar_ray.corpus.readers",
    "invar_ray.corpus.rowfiles",
    "invar_ray.corpus.rows",
    "invar_ray.corpus.storage",
    "invar_ray.text.sentences",
)
_PARSING = (
    "invar_ray.corpus.whole",
    "invar_ray.corpus.formats.parsed",
    "invar_ray.corpus.formats.plain",
    "invar_ray.corpus.formats.pdf",
    "invar_ray.corpus.formats.word",
    "invar_ray.corpus.formats.html",
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
            "invar_ray.steps.cutting",
            "invar_ray.steps.passages",
            "invar_ray.steps.previous",
        ),
    ),
    "questions": StepCode(
        2,
        (
            *_READING,
            *_BENCHMARKS,
            *(
                f"invar_ray.questions.{name}"
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
            "invar_ray.steps.questions",
        ),
    ),
    "vectors": StepCode(
        3,
        (
            *_ENCODING,
            "invar_ray.models.minilm",
            "invar_ray.steps.vectors",
            "invar_ray.steps.layout",
            "invar_ray.steps.previous",
            "invar_ray.steps.shards",
        ),
    ),
    "index": StepCode(
        2,
        tuple(
            f"invar_ray.index.{name}"
            for name in ("blocks", "vectors", "probes", "planner", "faiss_index", "build")
        ),
    ),
    "trainset": StepCode(
        2,
        (
            "invar_ray.training.mining",
            "invar_ray.answering.bm25",
            "invar_ray.steps.trainset",
            "invar_ray.steps.refresh",
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
            "invar_ray.answering.retriever",
            "invar_ray.answering.duplicates",
            "invar_ray.answering.filters",
            "invar_ray.answering.fusion",
            "invar_ray.questions.rules",
            "invar_ray.questions.phrases",
            "invar_ray.steps.hits",
        ),
    ),
    "readings": StepCode(
        1,
        (
            "invar_ray.steps.readings",
            "invar_ray.text.windows",
            "invar_ray.text.sentences",
            "invar_ray.text.stable",
            "invar_ray.text.answers",
        ),
    ),
    "baselines": StepCode(
        1, ("invar_ray.answering.bm25", "invar_ray.answering.fusion", "invar_ray.steps.baselines")
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
            "invar_ray.steps.report",
            "invar_ray.steps.answering",
            "invar_ray.evaluation.measure",
            "invar_ray.evaluation.calibration",
            "invar_ray.evaluation.details",
            "invar_ray.evaluation.metrics",
            "invar_ray.evaluation.outcome",
            "invar_ray.evaluation.page",
            "invar_ray.evaluation.charts",
            "invar_ray.evaluation.per_question",
            "invar_ray.evaluation.scoring",
            "invar_ray.evaluation.significance",
            "invar_ray.evaluation.trec",
            "invar_ray.evaluation.variance",
            "invar_ray.text.answers",
            "invar_ray.text.prompts",
            "invar_ray.text.tokens",
            "invar_ray.answering.rag",
            "invar_ray.models.generator",
            "invar_ray.models.decoding",
        ),
    ),
}
