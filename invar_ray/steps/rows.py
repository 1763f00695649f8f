"""The rows of a report: which hits and which generator each system has, and its hits in changed
settings.  What is missing for them is asked of the graph, which makes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from invar_ray.answering.fusion import QUERY_REWRITES
from invar_ray.config import Config
from invar_ray.models.base import BaseRef
from invar_ray.models.encoder import EncoderSpec
from invar_ray.models.precision import Precision, made_in
from invar_ray.steps import hits
from invar_ray.steps.answers import System
from invar_ray.steps.hits import PLAIN, SearchMode
from invar_ray.steps.report import SYSTEM_NAMES, Change
from invar_ray.store.artifacts import Artifact, Building, Plan

WINDOW_TOKENS = 64
"""For the cause of variance `window`: passage length of the other cut."""


class _Graph(Protocol):
    """What the rows ask of :class:`invar_ray.pipeline.Pipeline`, which says what each is."""

    @property
    def config(self) -> Config: ...
    @property
    def base(self) -> BaseRef: ...
    @property
    def bare_spec(self) -> EncoderSpec: ...
    @property
    def passages(self) -> Artifact: ...
    @property
    def questions(self) -> Artifact: ...
    @property
    def coarse_index(self) -> Artifact: ...
    @property
    def base_index(self) -> Artifact: ...
    @property
    def index(self) -> Artifact: ...
    @property
    def retriever(self) -> Artifact: ...
    @property
    def generator(self) -> Artifact: ...
    @property
    def served(self) -> SearchMode: ...

    def arm(self, name: str) -> _Graph: ...
    def cut(self, label: str, config: Config) -> Artifact: ...
    def spec_of(self, adapter: Artifact) -> EncoderSpec: ...
    def hits(self, index: Artifact, split: str, mode: SearchMode = PLAIN) -> Artifact: ...
    def index_of(
        self, name: str, spec: EncoderSpec, adapter: Artifact | None, cut: Artifact | None = None
    ) -> Artifact: ...
    def step(self, label: str, plan: Plan, body: Callable[[Building], None]) -> Artifact: ...


def systems(graph: _Graph) -> list[System]:
    """The systems that ``evaluation.systems`` names, with what each retrieves and who answers."""
    evaluation = graph.config.evaluation
    rows = [
        System(
            SYSTEM_NAMES[name],
            _hits_of(graph, name),
            _generator_of(graph, name),
            name in {"base", "both"},
        )
        for name in evaluation.systems
        if (name != "both" or evaluation.num_answers > 0)
        and (name != "stage1_reranked" or graph.served.reranking is not None)
    ]
    arms = [
        System(f"{SYSTEM_NAMES['stage1']}, {name}", arm.hits(arm.index, "dev"), None)
        for name in evaluation.arms
        for arm in [graph.arm(name)]
    ]
    return _after(rows, SYSTEM_NAMES["stage1"], arms)


def changes(graph: _Graph) -> list[Change]:
    """What the encoders of the report retrieve under each cause of variance that can act."""
    return [
        Change(SYSTEM_NAMES[name], cause, changed)
        for name in graph.config.evaluation.systems
        for cause in graph.config.experimental.evaluation.causes
        if name in {"base", "stage1"} and (changed := _changed_hits(graph, name, cause)) is not None
    ]


def _after(rows: list[System], name: str, others: list[System]) -> list[System]:
    """``others`` behind the row of that name, or at the end."""
    at = next((i + 1 for i, row in enumerate(rows) if row.name == name), len(rows))
    return [*rows[:at], *others, *rows[at:]]


def dataset_name(config: Config) -> str:
    """The name of the dev questions, as TREC files have it."""
    name = config.questions.dev_uri.rstrip("/").rpartition("/")[2]
    name = name.removeprefix("builtin:").removesuffix(".gz")
    return re.sub(r"\.(jsonl|ndjson|json|tsv|csv)$", "", name)


def _hits_of(graph: _Graph, system: str) -> Artifact:
    """What a row retrieves for the dev questions."""
    encoder, _, fused = system.partition("_")
    top_k = graph.config.evaluation.top_k
    if encoder == "bm25":
        return graph.step(
            "hits of dev questions by BM25",
            hits.bm25_plan(graph.passages, graph.questions, "dev", top_k),
            lambda building: hits.build_bm25(building, graph.passages, graph.questions),
        )
    mode = {
        "bm25": SearchMode(mode="hybrid"),
        "rewrites": SearchMode(num_rewrites=QUERY_REWRITES),
        "reranked": graph.served,
    }.get(fused, graph.served if system == "both" else PLAIN)
    return graph.hits(_index_named(graph, encoder), "dev", mode)


def _changed_hits(graph: _Graph, system: str, cause: str) -> Artifact | None:
    """What a row's anchors retrieve in another setting; ``None`` where the cause cannot act."""
    if cause == "index":
        found = _index_named(graph, system)
        # named, or chosen by the planner
        if "Flat" in (graph.config.index.factory, found.info.get("factory")):
            return None
        return graph.hits(found, "dev", SearchMode(exact=True))
    if cause == "precision":
        found = _index_named(graph, system)
        other: Precision = "bf16" if made_in(found) == "fp32" else "fp32"
        return graph.hits(found, "dev", SearchMode(precision=other))
    corpus = replace(graph.config.corpus, chunk_tokens=WINDOW_TOKENS, chunk_stride=WINDOW_TOKENS)
    recut = graph.cut(
        f"passages, windows of {WINDOW_TOKENS} tokens", replace(graph.config, corpus=corpus)
    )
    if system == "stage1":
        adapter = graph.retriever
        index = graph.index_of("recut-retriever", graph.spec_of(adapter), adapter, recut)
    else:
        index = graph.index_of("recut-base", graph.bare_spec, None, recut)
    return graph.hits(index, "dev")


def _index_named(graph: _Graph, encoder: str) -> Artifact:
    if encoder == "minilm":
        return graph.coarse_index
    return graph.base_index if encoder == "base" else graph.index


def _generator_of(graph: _Graph, system: str) -> Artifact | str | None:
    if graph.config.evaluation.num_answers == 0:
        return None
    return graph.generator if system == "both" else "" if system in {"base", "stage1"} else None
