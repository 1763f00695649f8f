"""Corpus to served index, step by step; each step is skipped when its artifact stands.

A :class:`Pipeline` is the dependency graph of a run: asking it for an artifact makes what is
missing, and nothing else.  The demo, the jobs and the command line all call it.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from invar_ray.config import Config, ServeConfig
from invar_ray.errors import ArtifactError, MissingArtifactError, MixedArtifactsError
from invar_ray.evaluation.report import Report, read_report, write_report
from invar_ray.executor import RaySession, clear_failures
from invar_ray.index.build import Limits, build_index, index_settings
from invar_ray.models.base import (
    BUILTIN,
    BaseRef,
    base_plan,
    build_base,
    load_tokenizer,
    resolve_base,
)
from invar_ray.models.encoder import EncoderSpec, coarse_spec, llm_spec
from invar_ray.models.precision import made_in
from invar_ray.steps.baselines import bm25_plan, build_bm25_hits, build_fused_hits, fused_plan
from invar_ray.steps.hits import PLAIN, SearchMode, build_hits, hits_plan
from invar_ray.steps.passages import build_passages, document_ids, passages_plan
from invar_ray.steps.previous import earlier_passages
from invar_ray.steps.questions import (
    build_questions,
    load_examples,
    questions_plan,
    refuse_unanswerable,
)
from invar_ray.steps.readings import build_readings, readings_plan
from invar_ray.steps.refresh import refresh_negatives
from invar_ray.steps.report import SYSTEM_NAMES, Change, System, build_report, report_plan
from invar_ray.steps.trainset import build_trainset, trainset_plan
from invar_ray.steps.vectors import build_vectors, vectors_plan
from invar_ray.store.artifacts import Artifact, Building, Plan, Store, open_artifact
from invar_ray.training.trainer import (
    encoder_of,
    generator_plan,
    retriever_plan,
    train_generator,
    train_retriever,
)
from invar_ray.versions import STEPS


class Pipeline:
    """All artifacts of a run, made on demand.

    Args:
        config: the run.
        quiet: print nothing.
        find_only: make nothing: what does not stand is a :class:`MissingArtifactError`.

    Use as a context manager: leaving it stops the Ray that it started.
    """

    def __init__(self, config: Config, *, quiet: bool = False, find_only: bool = False) -> None:
        self.config = config
        self.store = Store(config.storage.root_uri)
        self.session = RaySession(config.scale)
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.reused: list[str] = []
        self._quiet, self._find_only = quiet, find_only

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.session.close()

    @cached_property
    def base(self) -> BaseRef:
        """The base model, resolved (a built-in one is written out)."""
        built = None
        if self.config.model.base in BUILTIN:
            built = self._step(
                "base model",
                base_plan(self.config),
                lambda building: build_base(building, self.config),
            )
        return resolve_base(self.config.model, built)

    @cached_property
    def questions(self) -> Artifact:
        """Questions of both splits with their rewordings."""
        return self._step(
            "questions",
            questions_plan(self.config),
            lambda building: build_questions(building, self.config),
        )

    @cached_property
    def passages(self) -> Artifact:
        """The corpus, cut into passages."""
        return self._cut("passages", self.config)

    def _cut(self, label: str, config: Config) -> Artifact:
        questions = self.questions if config.corpus.distractors is not None else None
        plan = passages_plan(config, self.base, questions)
        on_ray = config.scale.cut_workers > 0

        def body(building: Building) -> None:
            tokenizer = load_tokenizer(self.base.folder_or_name(self.store), self.base.revision)
            earlier, reason = (
                earlier_passages(self.store, plan) if config.scale.incremental else (None, "")
            )
            if earlier is not None and reason:
                self._say(f"  all documents are cut anew: since {earlier.ref} {reason}")
                earlier = None
            build_passages(building, config, tokenizer, questions, earlier=earlier, on_ray=on_ray)

        return self._step(label, plan, body, on_ray=on_ray)

    @cached_property
    def _recut(self) -> Artifact:
        """The corpus in other windows: passages of another length."""
        length = self.config.evaluation.window_tokens
        corpus = replace(self.config.corpus, chunk_tokens=length, chunk_stride=length)
        return self._cut(
            f"passages, windows of {length} tokens", replace(self.config, corpus=corpus)
        )

    @cached_property
    def coarse_index(self) -> Artifact:
        """MiniLM's index: the teacher's view, and a baseline."""
        return self._index("minilm", coarse_spec(self.config.coarse), None)

    @cached_property
    def base_index(self) -> Artifact:
        """The index of the base without adapter: what negatives are mined from, and the row that
        training must beat.
        """
        return self._index("base", llm_spec(self.config.model, self.base), None)

    def check_questions(self) -> None:
        """Refuse questions that the corpus cannot answer, before anything is embedded for them.

        Raises:
            DataError: naming how many, and the first.
        """
        if self._find_only:
            return
        documents = document_ids(self.passages)
        for split in ("train", "dev"):
            refuse_unanswerable(load_examples(self.questions, split), documents, split)

    @cached_property
    def trainset(self) -> Artifact:
        """What stage 1 trains on."""
        self.check_questions()
        parents = (
            self.passages,
            self.questions,
            self.base_index,
            self.coarse_index.parent("vectors"),
        )
        return self._step(
            "training set",
            trainset_plan(self.config, *parents),
            lambda building: build_trainset(building, self.config, *parents),
        )

    @cached_property
    def retriever(self) -> Artifact:
        """The stage-1 adapter."""
        trainset, base = self.trainset, self.base
        return self._step(
            "stage 1: retriever",
            retriever_plan(self.config, base, trainset),
            lambda building: train_retriever(
                building, self.config, base, trainset, mine=refresh_negatives
            ),
            on_ray=True,
        )

    @cached_property
    def index(self) -> Artifact:
        """The index that is served: all passages under the stage-1 adapter."""
        return self.index_with(self.retriever)

    @cached_property
    def readings(self) -> Artifact:
        """What stage 2 trains on: what the training questions find in the served index, in all
        windows.
        """
        hits = self.hits(self.index, "train")
        return self._step(
            "readings of train questions",
            readings_plan(self.config, hits, self.passages),
            lambda building: build_readings(building, hits, self.passages),
        )

    @cached_property
    def generator(self) -> Artifact:
        """The stage-2 adapter, trained on what the served index retrieves."""
        readings, base = self.readings, self.base
        return self._step(
            "stage 2: generator",
            generator_plan(self.config, base, readings),
            lambda building: train_generator(building, self.config, base, readings),
            on_ray=True,
        )

    @cached_property
    def report(self) -> Artifact:
        """Base, stage 1 and both stages on the dev questions."""
        self.check_questions()  # a fault in the inputs shows before hours of embedding
        evaluation = self.config.evaluation
        systems = [
            System(
                SYSTEM_NAMES[name],
                self._hits_of(name),
                self._generator_of(name),
                name in {"base", "both"},
            )
            for name in evaluation.systems
            if name != "both" or evaluation.num_answers > 0
        ]
        changes = [
            Change(SYSTEM_NAMES[name], cause, changed)
            for name in evaluation.systems
            for cause in evaluation.causes
            if name in {"base", "stage1"}
            and (changed := self._changed_hits(name, cause)) is not None
        ]
        name = (
            self.config.questions.dev_uri.rstrip("/")
            .rpartition("/")[2]
            .removeprefix("builtin:")
            .removesuffix(".gz")
        )
        dataset = re.sub(r"\.(jsonl|ndjson|json|tsv|csv)$", "", name)
        return self._step(
            "report",
            report_plan(self.config, systems, changes),
            lambda building: build_report(
                building, self.config, self.base, systems, dataset, self.passages, changes
            ),
            on_ray=True,
        )

    def hits(self, index: Artifact, split: str, mode: SearchMode = PLAIN) -> Artifact:
        """What a split's questions retrieve from an index version."""
        top_k = self.config.evaluation.top_k if split == "dev" else self.config.generator.top_k
        how = (
            ", rewrites fused" * bool(mode.num_rewrites)
            + ", exact" * mode.exact
            + f", {mode.precision}" * bool(mode.precision)
        )
        return self._step(
            f"hits of {split} questions in the {index.manifest.name} index{how}",
            hits_plan(self.config, index, self.questions, split, top_k, mode),
            lambda building: build_hits(building, self.config, index, self.questions, mode),
            on_ray=True,
        )

    def _hits_of(self, system: str) -> Artifact:
        """What a row of the report retrieves for the dev questions."""
        encoder, _, fused = system.partition("_")
        if encoder == "bm25":
            plan = bm25_plan(
                self.config, self.passages, self.questions, "dev", self.config.evaluation.top_k
            )
            return self._step(
                "hits of dev questions by BM25",
                plan,
                lambda building: build_bm25_hits(building, self.passages, self.questions),
            )
        if fused == "bm25":
            parts = self._hits_of(encoder), self._hits_of("bm25")
            return self._step(
                f"hits of {SYSTEM_NAMES[system]} fused",
                fused_plan(system, parts, "dev", self.config.evaluation.top_k),
                lambda building: build_fused_hits(building, parts),
            )
        mode = (
            SearchMode(num_rewrites=self.config.evaluation.query_rewrites)
            if fused == "rewrites"
            else PLAIN
        )
        return self.hits(self._index_of(encoder), "dev", mode)

    def _changed_hits(self, system: str, cause: str) -> Artifact | None:
        """What a row's anchors retrieve in another setting; ``None`` where the cause cannot act."""
        if cause == "index":
            exact = self.config.index.factory == "Flat"
            return (
                None if exact else self.hits(self._index_of(system), "dev", SearchMode(exact=True))
            )
        if cause == "precision":
            index = self._index_of(system)
            return self.hits(
                index, "dev", SearchMode(precision="bf16" if made_in(index) == "fp32" else "fp32")
            )
        recut = self._recut
        if system == "stage1":
            return self.hits(
                self._index(
                    "recut-retriever", self._spec_of(self.retriever), self.retriever, recut
                ),
                "dev",
            )
        return self.hits(
            self._index("recut-base", llm_spec(self.config.model, self.base), None, recut), "dev"
        )

    def _index_of(self, encoder: str) -> Artifact:
        return {"minilm": lambda: self.coarse_index, "base": lambda: self.base_index}.get(
            encoder, lambda: self.index
        )()

    def _generator_of(self, system: str) -> Artifact | str | None:
        if self.config.evaluation.num_answers == 0:
            return None
        return self.generator if system == "both" else "" if system in {"base", "stage1"} else None

    @cached_property
    def reindexed(self) -> Artifact:
        """What ``jobs.reindex`` makes: the index of ``index.encoder``."""
        wanted = self.config.index
        if wanted.encoder == "minilm":
            return self.coarse_index
        if wanted.encoder == "base":
            return self.base_index
        if wanted.adapter_uri is not None:
            return self.index_with(open_artifact(wanted.adapter_uri, "retriever"))
        return self.index

    def index_with(self, adapter: Artifact) -> Artifact:
        """An index of this run's passages under a given stage-1 adapter."""
        return self._index("retriever", self._spec_of(adapter), adapter)

    def _spec_of(self, adapter: Artifact) -> EncoderSpec:
        """The encoder of a stage-1 adapter, its vectors cut where the config says so."""
        size = self.config.index.dimensions
        trained = adapter.manifest.config.get("retriever", {}).get("matryoshka_dims", ())
        if size is not None and size not in trained:
            self._say(
                f"  vectors are cut to {size} values, a size that {adapter.ref} was not trained "
                f"at: {list(trained)}"
            )
        return replace(encoder_of(adapter), dimensions=size)

    def run(self) -> Report:
        """Everything up to the report; times of the steps that ran are in it."""
        artifact = self.report
        measured = read_report(artifact.path("report.json"))
        meta = {
            "index": self.index.uri,
            "report": artifact.uri,
            "seed": self.config.seed,
            "reused": self.reused,
        }
        if self.config.evaluation.num_answers > 0 and "both" in self.config.evaluation.systems:
            meta["generator"] = self.generator.uri
        return replace(measured, seconds=dict(self.seconds), meta=meta)

    def _index(
        self,
        name: str,
        spec: EncoderSpec,
        adapter: Artifact | None,
        passages: Artifact | None = None,
    ) -> Artifact:
        passages = passages or self.passages
        label = f"embed passages ({name})"

        @contextlib.contextmanager
        def on_ray() -> Iterator[None]:
            self.session.ensure()
            with clear_failures(label):
                yield

        vectors = self._step(
            label,
            vectors_plan(self.config, passages, spec, name, adapter),
            lambda building: build_vectors(building, self.config, passages, spec, start_ray=on_ray),
            resumable=True,
        )
        settings = self.config.index
        plan = Plan(
            kind="index",
            name=name,
            config=index_settings(settings),
            parents={"vectors": vectors, "passages": passages},
            version=STEPS["index"].version,
        )

        def body(building: Building) -> None:
            build_index(
                building,
                vectors,
                passages,
                settings.factory,
                settings.num_lists_searched,
                limits=Limits.of(settings),
                workers=self.config.scale.index_workers,
                say=self._say,
            )

        return self._step(f"index ({name})", plan, body)

    def _step(
        self,
        label: str,
        plan: Plan,
        body: Callable[[Building], None],
        *,
        on_ray: bool = False,
        resumable: bool = False,
    ) -> Artifact:
        if self._find_only:
            return self._found(label, plan)
        started, cpu = time.monotonic(), time.process_time()

        def timed(building: Building) -> None:
            self._say(f"{label} ...")
            if not on_ray:
                body(building)
                return
            self.session.ensure()
            with clear_failures(label):
                body(building)

        artifact, reused = self.store.get_or_build(plan, timed, resumable=resumable, alone=on_ray)
        if reused:
            if label not in self.reused:
                self.reused.append(label)
                self._say(f"{label}: re-used {artifact.ref}")
        else:
            self.seconds[label] = round(time.monotonic() - started, 2)
            self.cpu_seconds[label] = round(time.process_time() - cpu, 2)
            self._say(f"{label}: {self.seconds[label]:.1f} s -> {artifact.ref}")
        return artifact

    def _found(self, label: str, plan: Plan) -> Artifact:
        found = self.store.find(plan)
        if found is None:
            raise MissingArtifactError(
                f"{self.store.root_uri} has no {label} of this recipe and these overrides",
                expected="a run that was finished with them",
                action="repeat the config and overrides that it was trained with, name --index and --generator, or "
                "train it: invar-ray train",
            )
        return found

    def _say(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)


def serve_until_stopped(
    config: Config, index_uri: str | None = None, generator_uri: str | None = None
) -> None:
    """Serve over HTTP until Ctrl-C; nothing is trained or embedded, and what can fail does so
    before Ray starts.

    Args:
        config: of the run whose index and generator are served, where the URIs below name none.
        index_uri, generator_uri: artifacts to serve in their place.

    Raises:
        MissingArtifactError: the store lacks one of them.  MixedArtifactsError: if they have
            different bases.
        ConfigError: a key of the service is wrong.  ResourceError: the port is taken, or it does
            not start.
    """
    with Pipeline(config, find_only=True) as pipeline:
        index = open_artifact(index_uri, "index") if index_uri else pipeline.index
        generator = (
            open_artifact(generator_uri, "generator") if generator_uri else pipeline.generator
        )
        args = _service_args(index, generator, config.serve)
        _service().check_start(
            args, config.serve.host, config.serve.port, joins=pipeline.session.joins
        )
        pipeline.session.ensure()
        start_service(index, generator, config.serve, blocking=True)


def start_service(
    index: Artifact,
    generator: Artifact,
    serve: ServeConfig,
    *,
    blocking: bool = False,
    log_level: str = "INFO",
) -> str:
    """Serve an index and a generator on the connected Ray; returns the address (after Ctrl-C, if
    ``blocking``).

    Raises:
        MixedArtifactsError: if they have different bases.  ResourceError: if it does not start.
    """
    address: str = _service().start(
        _service_args(index, generator, serve),
        host=serve.host,
        port=serve.port,
        blocking=blocking,
        log_level=log_level,
    )
    return address


def _service_args(index: Artifact, generator: Artifact, serve: ServeConfig) -> Any:
    encoder = EncoderSpec.from_json(index.info["encoder"])
    if encoder.kind != "llm" or encoder.base.fingerprint != generator.info["base"]["fingerprint"]:
        raise MixedArtifactsError(
            f"{index.uri} was made with base {encoder.base.fingerprint}, {generator.uri} with base "
            f"{generator.info['base']['fingerprint']}",
            expected="an index and a generator of one base",
            action="reindex with the generator's base, or train a generator on the index's",
        )
    # An adapter that was not trained here says nothing of an answer's length: the service's default
    # holds.
    length = {name: generator.info[name] for name in ("max_new_tokens",) if name in generator.info}
    return _service().AppArgs(
        index_uri=index.uri,
        generator_uri=generator.uri,
        retriever_replicas=serve.retriever_replicas,
        generator_replicas=serve.generator_replicas,
        num_gpus_per_replica=serve.num_gpus_per_replica,
        num_cpus_per_replica=serve.num_cpus_per_replica,
        top_k=serve.top_k,
        **length,
    )


def stop_service() -> None:
    """Stop what :func:`start_service` started."""
    _service().stop()


def finish_report(report: Report, folder: Path) -> Path:
    """Write ``report.json`` at the top of a run's folder."""
    return write_report(report, folder / "report.json")


def keep_numbers(pipeline: Pipeline) -> Path | None:
    """``report.json`` of the pipeline's report at the top of its store, where ``compare`` and
    ``gate`` look for it; not in a remote store, whose reports have URIs.  Numbers of the same
    report that stand there stay: a demo adds its answer and its times.
    """
    if not pipeline.store.is_local:
        return None
    folder, uri = Path(pipeline.store.root), pipeline.report.uri
    with contextlib.suppress(ArtifactError):  # there is none, or it is of another version
        if read_report(folder / "report.json").meta.get("report") == uri:
            return folder / "report.json"
    measured = read_report(pipeline.report.path("report.json"))
    return finish_report(
        replace(measured, meta={"report": uri, "seed": pipeline.config.seed}), folder
    )


def _service() -> Any:
    # serve/ is a top level package of its own, above this one: it is started by name.
    return importlib.import_module("serve.app")
