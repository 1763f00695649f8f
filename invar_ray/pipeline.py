"""Corpus to served index, step by step; each step is skipped when its artifact stands.

A :class:`Pipeline` is the dependency graph of a run: asking it for an artifact makes what is
missing, and nothing else.  The demo, the jobs and the command line all call it.
"""

from __future__ import annotations

import contextlib
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType

from invar_ray import console
from invar_ray.answering.rerank import Reranking
from invar_ray.config import Config, arm_config
from invar_ray.errors import ArtifactError
from invar_ray.evaluation.report import Report, read_report, write_report
from invar_ray.executor import Executor, Here, OnRay
from invar_ray.models.base import (
    BUILTIN_RETRIEVER,
    BaseRef,
    describe,
    is_remote,
    layer_sizes,
    load_tokenizer,
    resolve_base,
    resolve_retriever_base,
)
from invar_ray.models.encoder import EncoderSpec, coarse_spec, llm_spec, vector_size
from invar_ray.models.meta import check_first_layer, weigh
from invar_ray.outline import Goal, outline
from invar_ray.steps import (
    base,
    generator,
    hits,
    index,
    passages,
    precision,
    questions,
    readings,
    report,
    retriever,
    rows,
    shards,
    trainset,
    vectors,
)
from invar_ray.steps.hits import PLAIN, SearchMode
from invar_ray.steps.retriever import STARTER
from invar_ray.store.artifacts import Artifact, Building, Plan, Store, open_artifact
from invar_ray.store.earlier import earlier_passages


class Pipeline:
    """All artifacts of a run, made on demand.

    Args:
        config: the run; its precision may be ``auto``.
        quiet: print nothing.
        executor: where the work is done; by default here and on Ray, see
            :class:`invar_ray.executor.OnRay`.

    Use as a context manager: leaving it stops the Ray that it started.
    """

    def __init__(
        self, config: Config, *, quiet: bool = False, executor: Executor | None = None
    ) -> None:
        self._asked = config
        self.store = Store(config.storage.root_uri)
        self.executor = executor if executor is not None else OnRay(config.scale)
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.reused: list[str] = []
        self._quiet = quiet
        self._arm: str | None = None

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.executor.close()

    @cached_property
    def config(self) -> Config:
        """The run, its precision decided: before anything is named by it, once for a store."""
        if self._asked.model.precision != "auto":
            return self._asked
        sizes, use_gpu = layer_sizes(self.base, self.store), self._asked.scale.use_gpu
        decided, reused = self.store.get_or_build(
            precision.plan(), lambda to: precision.build(to, sizes, use_gpu=use_gpu), alone=True
        )
        taken = precision.taken_in(decided)
        if not reused:
            self._say(
                f"precision auto: {taken}, and stays so in this store: {decided.info['because']}"
            )
        return replace(self._asked, model=replace(self._asked.model, precision=taken))

    @cached_property
    def base(self) -> BaseRef:
        """The generator's base, resolved (a built-in one is written out); passages are cut in its
        tokens.
        """
        model = self._asked.model
        return resolve_base(model, self._built("base model", model.base))

    @cached_property
    def retriever_base(self) -> BaseRef:
        """The retriever's base: the generator's, unless ``model.retriever_base`` names another."""
        name = self._asked.model.retriever_base
        if name in (None, self._asked.model.base):
            return self.base
        return resolve_retriever_base(name, self._built("retriever's base", name))

    def _built(self, label: str, name: str) -> Artifact | None:
        if name not in BUILTIN_RETRIEVER and not is_remote(name):
            return None
        plan = base.plan(self._asked, name)
        return self.step(label, plan, lambda to: base.build(to, self._asked, name))

    @property
    def bare_spec(self) -> EncoderSpec:
        """The encoder before any training."""
        return llm_spec(self.config.model, self.retriever_base)

    @cached_property
    def questions(self) -> Artifact:
        """Questions of both splits with their rewrites."""
        plan = questions.plan(self.config)
        return self.step("questions", plan, lambda to: questions.build(to, self.config))

    @cached_property
    def passages(self) -> Artifact:
        """The corpus, cut into passages."""
        return self.cut("passages", self.config)

    def cut(self, label: str, config: Config) -> Artifact:
        """The corpus, cut as ``config`` says."""
        asked = self.questions if config.corpus.distractors is not None else None
        plan = passages.plan(config, self.base, asked)

        def body(building: Building) -> None:
            tokenizer = load_tokenizer(self.base.folder_or_name(self.store), self.base.revision)
            earlier, reason = (
                earlier_passages(self.store, plan) if config.scale.incremental else (None, "")
            )
            if earlier is not None and reason:
                self._say(f"  all documents are cut anew: since {earlier.ref} {reason}")
                earlier = None
            passages.build(
                building, config, tokenizer, asked, executor=self.executor, earlier=earlier
            )

        return self.step(label, plan, body)

    @cached_property
    def coarse_index(self) -> Artifact:
        """MiniLM's index: the teacher's view, and a baseline."""
        return self.index_of("minilm", coarse_spec(self.config.coarse), None)

    @cached_property
    def base_index(self) -> Artifact:
        """The index of the retriever's base without adapter: what negatives are mined from, and the
        row that training must beat.
        """
        return self.index_of("base", self.bare_spec, None)

    @cached_property
    def init(self) -> Artifact | None:
        """The adapter that stage 1 starts from, if any."""
        named = self.config.retriever.init
        if named is None:
            return None
        return self.starter if named == STARTER else open_artifact(named, "retriever")

    @cached_property
    def starter(self) -> Artifact:
        """The adapter that comes with the package."""
        plan = retriever.starter_plan(self.retriever_base)
        return self.step(
            "starter",
            plan,
            lambda to: retriever.build_starter(to, self.config, self.retriever_base),
        )

    @cached_property
    def mined_index(self) -> Artifact:
        """What negatives are mined from: the index of the encoder that stage 1 starts from."""
        if trainset.is_own_teacher(self.config):
            return self.coarse_index
        return self.base_index if self.init is None else self.index_with(self.init)

    def arm(self, name: str) -> Pipeline:
        """The run of one of ``evaluation.arms``: another stage 1 over the same data, its steps told
        under its name.
        """
        other = Pipeline(arm_config(self.config, name), quiet=self._quiet, executor=self.executor)
        other._arm = name
        other.seconds, other.cpu_seconds = self.seconds, self.cpu_seconds
        return other

    def _told(self, label: str) -> str:
        """A step's label as this run says it."""
        return label if self._arm is None else f"{self._arm}: {label}"

    def check_questions(self) -> None:
        """Refuse questions that the corpus cannot answer, before anything is embedded for them.

        Raises:
            DataError: naming how many, and the first.
        """
        documents = passages.document_ids(self.passages)
        for split in ("train", "dev"):
            questions.refuse_unanswerable(
                questions.load_examples(self.questions, split), documents, split
            )

    @cached_property
    def trainset(self) -> Artifact:
        """What stage 1 trains on."""
        self.check_questions()
        parents = (
            self.passages,
            self.questions,
            self.mined_index,
            self.coarse_index.parent("vectors"),
        )
        plan = trainset.plan(self.config, *parents)
        return self.step(
            "training set",
            plan,
            lambda to: trainset.build(to, self.config, *parents, executor=self.executor),
        )

    @cached_property
    def retriever(self) -> Artifact:
        """The stage-1 adapter."""
        parents = self.config, self.retriever_base, self.trainset, self.init
        return self.step(
            "stage 1: retriever",
            retriever.plan(*parents, arm=self._arm),
            lambda to: retriever.build(to, *parents, arm=self._arm, executor=self.executor),
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
        parents = self.hits(self.index, "train", self.served), self.passages
        return self.step(
            "readings of train questions",
            readings.plan(self.config, *parents),
            lambda to: readings.build(to, *parents),
        )

    @cached_property
    def generator(self) -> Artifact:
        """The stage-2 adapter, trained on what the served index retrieves."""
        parents = self.config, self.base, self.readings
        return self.step(
            "stage 2: generator",
            generator.plan(*parents),
            lambda to: generator.build(to, *parents, executor=self.executor),
        )

    @cached_property
    def report(self) -> Artifact:
        """Base, stage 1 and both stages on the dev questions."""
        self.check_questions()  # a fault in the inputs shows before hours of embedding
        systems, changes = rows.systems(self), rows.changes(self)
        return self.step(
            "report",
            report.plan(self.config, systems, changes),
            lambda to: report.build(
                to,
                self.config,
                self.base,
                systems,
                rows.dataset_name(self.config),
                self.passages,
                changes,
                executor=self.executor,
            ),
        )

    @cached_property
    def served(self) -> SearchMode:
        """How the service searches."""
        search = self.config.search
        return SearchMode(mode=search.mode, reranking=Reranking.of(search))

    def hits(self, index: Artifact, split: str, mode: SearchMode = PLAIN) -> Artifact:
        """What a split's questions retrieve from an index version."""
        top_k = self.config.evaluation.top_k
        if split == "train":  # one more than a prompt takes: calibration does without the gold one
            top_k = self.config.generator.top_k + 1
        return self.step(
            f"hits of {split} questions in the {index.manifest.name} index{mode.label}",
            hits.plan(self.config, index, self.questions, split, top_k, mode),
            lambda to: hits.build(
                to, self.config, index, self.questions, mode, executor=self.executor
            ),
        )

    @cached_property
    def reindexed(self) -> tuple[Artifact, ...]:
        """What ``jobs.reindex`` makes: the index of ``index.encoder``, one artifact a shard."""
        encoder = self._reindexing
        size = partial(vector_size, encoder[1], self.store)
        largest = partial(shards.largest, self.passages)
        rows = self.passages.info["passages"]
        count = shards.number(self.config.index, rows, size, largest)
        return (self.index_of(*encoder),) if count == 1 else self.sharded(*encoder, count)

    @property
    def _reindexing(self) -> tuple[str, EncoderSpec, Artifact | None]:
        wanted = self.config.index.encoder
        if wanted == "minilm":
            return "minilm", coarse_spec(self.config.coarse), None
        if wanted == "base":
            return "base", self.bare_spec, None
        if wanted == "retriever":
            return self._named(self.retriever)
        if wanted == "starter":
            return self._named(self.starter)
        return self._named(open_artifact(wanted, "retriever"))

    def index_with(self, adapter: Artifact) -> Artifact:
        """An index of this run's passages under a given stage-1 adapter."""
        return self.index_of(*self._named(adapter))

    def _named(self, adapter: Artifact) -> tuple[str, EncoderSpec, Artifact]:
        name = "starter" if adapter.manifest.name == "starter" else "retriever"
        if "arm" in adapter.info:
            name = "arm"
        return name, self.spec_of(adapter), adapter

    def spec_of(self, adapter: Artifact) -> EncoderSpec:
        """The encoder of a stage-1 adapter, its vectors cut where the config says so."""
        size = self.config.experimental.index.dimensions
        trained = adapter.manifest.config.get("retriever", {}).get("matryoshka_dims", ())
        if size is not None and size not in trained:
            self._say(
                f"  vectors are cut to {size} values, a size that {adapter.ref} was not trained "
                f"at: {list(trained)}"
            )
        return replace(retriever.encoder_of(adapter), dimensions=size)

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

    def index_of(
        self, name: str, spec: EncoderSpec, adapter: Artifact | None, cut: Artifact | None = None
    ) -> Artifact:
        """The index of passages under an encoder.

        Args:
            name: of the artifacts.
            spec: the encoder.
            adapter: the artifact that it comes from, if any.
            cut: the passages; ``None`` takes the run's.
        """
        cut = cut or self.passages
        made = self._embedded(name, spec, adapter, cut)
        return self.step(
            f"index ({name})",
            index.plan(self.config, made, cut, name),
            lambda to: index.build(to, self.config, made, cut, say=self._say),
        )

    def _embedded(
        self, name: str, spec: EncoderSpec, adapter: Artifact | None, cut: Artifact
    ) -> Artifact:
        return self.step(
            f"embed passages ({name})",
            vectors.plan(self.config, cut, spec, name, adapter),
            lambda to: vectors.build(to, self.config, cut, spec, executor=self.executor),
            resumable=True,
        )

    def sharded(
        self, name: str, spec: EncoderSpec, adapter: Artifact | None, count: int
    ) -> tuple[Artifact, ...]:
        """The indexes of the passages' shards under an encoder, each verified; embedded one shard
        after the other, built by tasks at the same time.

        Args:
            name, spec, adapter: see :meth:`index_of`.
            count: how many shards.
        """
        with self._timed(f"cut into {count} shards"):
            cuts = shards.cut(self.config, self.passages, count)
        names = [f"{name}-{shards.name(shard, count)}" for shard in range(count)]
        embedded = [
            self._embedded(each, spec, adapter, cut) for each, cut in zip(names, cuts, strict=True)
        ]
        with self._timed(f"index ({name}), {count} shards"):
            return shards.build_indexes(
                self.config, name, embedded, cuts, executor=self.executor, say=self._say
            )

    @contextlib.contextmanager
    def _timed(self, label: str) -> Iterator[None]:
        """What no single plan names, told and timed as a step."""
        started, cpu = time.monotonic(), time.process_time()
        if not self._quiet:
            console.run.begin(label)
        try:
            yield
        except BaseException:
            console.run.stop()
            raise
        self.seconds[label] = round(time.monotonic() - started, 2)
        self.cpu_seconds[label] = round(time.process_time() - cpu, 2)
        if not self._quiet:
            console.run.end(label)

    def keep_numbers(self) -> Path | None:
        """``report.json`` of this run's report at the top of its store, where ``compare`` and
        ``gate`` look for it; not in a remote store, whose reports have URIs.  Numbers of the same
        report that stand there stay: a demo adds its answer and its times.
        """
        if not self.store.is_local:
            return None
        file, uri = Path(self.store.root, "report.json"), self.report.uri
        with contextlib.suppress(ArtifactError):  # there is none, or it is of another version
            if read_report(file).meta.get("report") == uri:
                return file
        measured = read_report(self.report.path("report.json"))
        meta = {"report": uri, "seed": self.config.seed}
        return write_report(replace(measured, meta=meta), file)

    def step(
        self, label: str, plan: Plan, body: Callable[[Building], None], *, resumable: bool = False
    ) -> Artifact:
        """The artifact of a plan: opened where it stands, else made, with its times kept."""
        started, cpu = time.monotonic(), time.process_time()
        label = self._told(label)

        def timed(building: Building) -> None:
            if not self._quiet:
                console.run.begin(label)
            body(building)

        try:
            made = self.store.get_or_build(plan, timed, resumable=resumable, alone=True)
        except BaseException:
            console.run.stop()
            raise
        artifact, reused = made
        if not reused:
            self.seconds[label] = round(time.monotonic() - started, 2)
            self.cpu_seconds[label] = round(time.process_time() - cpu, 2)
        elif label in self.seconds or label in self.reused:
            return artifact  # asked for again
        else:
            self.reused.append(label)
        if not self._quiet:
            console.run.end(label, artifact.ref, reused=reused)
        return artifact

    def announce(self, goal: Goal) -> None:
        """Read corpus and questions, then say what is to be done on the way to a goal, and how long
        it may take.
        """
        self.check_questions()
        counts = [len(questions.load_examples(self.questions, split)) for split in ("train", "dev")]
        steps = self._outline(goal, counts)
        if goal == "report":
            arms = [
                step for name in self.config.evaluation.arms for step in self._of_arm(name, counts)
            ]
            steps[-1:-1] = arms
        standing = _standing(self.config, goal)
        missing = [(label, seconds) for label, seconds in steps if label not in standing]
        console.run.expect(missing)
        if missing and not self._quiet:
            seconds = sum(seconds for _, seconds in missing)
            told = f"{len(missing)} steps, about {console.duration(seconds)} on two idle cores"
            if len(missing) < len(steps):
                told += f"; {len(steps) - len(missing)} more stand from an earlier run"
            self._say(f"{told}:")
            slow = [f"{label} {console.duration(s)}" for label, s in missing if s >= 10]
            self._say(
                textwrap.fill(", ".join(slow), 96, initial_indent="  ", subsequent_indent="  ")
            )

    def _outline(self, goal: Goal, counts: Sequence[int]) -> list[tuple[str, float]]:
        bases = self.retriever_base, self.base
        depths = self.config.model.retriever_layers, None
        retriever, generator = (
            weigh(describe(base, self.store), depth)
            for base, depth in zip(bases, depths, strict=True)
        )
        if goal != "retriever":
            check_first_layer(self.config, generator.layers)
        size = self.passages.info["passages"]
        return outline(self.config, (retriever, generator), goal, size, *counts)

    def _of_arm(self, name: str, counts: Sequence[int]) -> list[tuple[str, float]]:
        """The steps that one of ``evaluation.arms`` adds to those of the report."""
        arm = self.arm(name)
        seconds = dict(arm._outline("report", counts))
        own = {
            "stage 1: retriever": "stage 1: retriever",
            "embed passages (arm)": "embed passages (retriever)",
            "index (arm)": "index (retriever)",
            "hits of dev questions in the arm index": "training set",  # a search, too
        }
        if arm.config.retriever.init not in (None, self.config.retriever.init):
            own = {
                "embed passages (starter)": "embed passages (base)",
                "index (starter)": "index (base)",
                "training set": "training set",
            } | own
        return [(arm._told(label), seconds[like]) for label, like in own.items()]

    def _say(self, text: str) -> None:
        if not self._quiet:
            console.say(text)


class _Missing(Exception):
    """An artifact is not there."""


class _Dry(Pipeline):
    """Opens what stands and makes nothing."""

    def step(
        self, label: str, plan: Plan, body: Callable[[Building], None], *, resumable: bool = False
    ) -> Artifact:
        """The artifact of a plan, where it stands."""
        found = self.store.find(plan)
        if found is None:
            raise _Missing
        self.reused.append(self._told(label))
        return found

    def arm(self, name: str) -> Pipeline:
        """As the run's own, and makes nothing either."""
        other = _Dry(arm_config(self.config, name), quiet=True, executor=self.executor)
        other._arm, other.reused = name, self.reused
        return other


def _standing(config: Config, goal: Goal) -> list[str]:
    """Labels of the steps that stand, on each way to the goal up to the first that is missing."""
    dry = _Dry(config, quiet=True, executor=Here())
    ways = ["retriever", "index", "generator", "report"]
    for way in ways[: ways.index(goal) + 1]:
        with contextlib.suppress(_Missing):
            getattr(dry, way)
    return dry.reused
