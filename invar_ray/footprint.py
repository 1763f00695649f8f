"""What each actor of each step holds at its peak, and whether machines have the room: before
anything runs, from descriptions of models alone.

Weights and what passes through a model hold are counted (:mod:`invar_ray.models.meta`), indexes are
the planner's, and rows in memory follow from the code that reads them.  What a process needs before
it holds any of that is set by runs on a CPU (``benchmarks/footprint.py``); what CUDA adds is
assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from invar_ray.answering.bm25 import build_bytes
from invar_ray.answering.fusion import QUERY_REWRITES
from invar_ray.config import Config, load_config
from invar_ray.errors import InvarError
from invar_ray.index.build import first_planned
from invar_ray.index.planner import RATES, Candidate
from invar_ray.models import meta
from invar_ray.models.base import MINILM
from invar_ray.models.encoder import COARSE_MAX_TOKENS
from invar_ray.outline import outline

GB = 1e9
_PROCESS = {"embed": 0.62 * GB, "train": 0.95 * GB, "search": 0.70 * GB, "answer": 0.75 * GB}
"""Of a process on a CPU, by what it imports."""
_JOB = 0.9 * GB
"""Of the job's own process, which starts the others."""
_CUDA_HOST, _CUDA_CONTEXT = 3.0 * GB, 0.8 * GB
"""What CUDA, NCCL and their libraries take of a host's memory and of a GPU: assumed, not measured.
"""
_USABLE_GPU, _USABLE_HOST = 0.93, 0.92
"""Of a GPU's memory, for torch leaves holes in it; of a node's, at 95 % of which Ray ends workers.
"""
_BUCKET = 500_000_000
"""Values that DeepSpeed reduces at once, a buffer of its own on a GPU (its default)."""
_GATHERED = 1_000_000_000
"""Values of a model that ZeRO 3 has whole at once on each rank, at most (its default)."""
_CHARS = 4.2
"""Characters of a token of English."""
_STRING = 60
"""Bytes of a Python string beside its characters."""
_PASSAGE_OBJECT = 900
"""Bytes of a passage and its document as Python objects, beside the text."""
_QUERY_TOKENS, _FRAME_TOKENS = 32, 12
"""Of a long question; of a passage's prefix, title and end."""
_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Corpus:
    """How much there is to index and to learn from.

    Attributes:
        passages: to index. tokens: of one, on average.
        train, dev: questions.
    """

    passages: int
    tokens: int = 128
    train: int = 79_168
    dev: int = 8_757


@dataclass(frozen=True)
class Machines:
    """Equal nodes.

    Attributes:
        nodes: how many.
        gpus: of each.
        gpu_bytes: of each GPU; ``None``: not known, nothing is refused for it.
        host_bytes: of each node's memory; ``None`` likewise.
        cpus: of each; ``None`` likewise.
        job_bytes: where the job's own process runs, if that is another machine (the head).
    """

    nodes: int = 1
    gpus: int = 0
    gpu_bytes: float | None = None
    host_bytes: float | None = None
    cpus: int | None = None
    job_bytes: float | None = None


@dataclass(frozen=True)
class Actor:
    """Equal processes of one step.

    Attributes:
        name: its class, or what it is.
        count: how many at the same time.
        host: bytes of a node's memory that each holds at its peak.
        gpu: bytes of a GPU; 0 without one.
        gpus: share of GPUs that each asks for. cpus: of CPUs.
        mapped: bytes that those of a node share: a mapped file.
        setting: what there is fewer of, where there is no room.
    """

    name: str
    count: int
    host: float
    gpu: float = 0.0
    gpus: float = 0.0
    cpus: float = 1.0
    mapped: float = 0.0
    setting: str = ""


@dataclass(frozen=True)
class Step:
    """What runs at the same time.

    Attributes:
        label: as the run says it.
        actors: its processes, the job's own first.
        seconds: how long; ``None`` for what does not end (serving).
        written: bytes of its artifact.
    """

    label: str
    actors: tuple[Actor, ...]
    seconds: float | None
    written: float


@dataclass(frozen=True)
class Fault:
    """Something that a step lacks.

    Attributes:
        step: its label.
        what: ``gpus``, ``gpu``, ``host``, ``job`` or ``cpus``.
        text: for people.
    """

    step: str
    what: str
    text: str


def footprint(config: Config, corpus: Corpus, *, gpu_flops: float = 400e12) -> list[Step]:
    """Every step of a run up to its report, and serving.

    Args:
        config: the run; its precision is decided.
        corpus: its size.
        gpu_flops: what a GPU does of a model's products, per second; the default is 40 % of an
            H100's 989e12 in bf16, assumed.

    Raises:
        ModelError: a base's description cannot be had.  ResourceError: no index fits its limits.
    """
    return _Ledger(config, corpus, gpu_flops).steps()


class _Ledger:
    def __init__(self, config: Config, corpus: Corpus, gpu_flops: float) -> None:
        self.config, self.corpus = config, corpus
        self.scale = config.scale
        # auto: the larger of what it may come to
        usual = "bf16" if config.scale.use_gpu else "fp32"
        self.precision = usual if config.model.precision == "auto" else config.model.precision
        self.bytes = _BYTES[self.precision]
        self.generator = meta.known_description(config.model.base, config)
        self.retriever = meta.known_description(
            config.model.retriever_base or config.model.base, config
        )
        meta.check_first_layer(config, int(self.generator.num_hidden_layers))
        self.coarse = meta.known_description(MINILM)
        self.depth = config.model.retriever_layers or int(self.retriever.num_hidden_layers)
        self.infers_on_gpu = self.scale.embed_gpus_per_worker > 0
        self.gpu_flops = gpu_flops
        workers = self.scale.num_workers
        self.workers = workers if isinstance(workers, int) else workers[1]
        self.text = corpus.tokens * _CHARS

    def steps(self) -> list[Step]:
        config, corpus = self.config, self.corpus
        shapes = (
            meta.weigh(self.retriever, config.model.retriever_layers),
            meta.weigh(self.generator),
        )
        rates = (
            self.workers * self.gpu_flops if self.scale.use_gpu else None,
            self.scale.fewest_embed_workers
            * min(1.0, self.scale.embed_gpus_per_worker)
            * self.gpu_flops
            if self.infers_on_gpu
            else None,
        )
        told = outline(
            config,
            shapes,
            "report",
            corpus.passages,
            corpus.train,
            corpus.dev,
            tokens=corpus.tokens + _FRAME_TOKENS,
            rates=rates,
        )
        found = [self._step(label, seconds) for label, seconds in told]
        return [*found, self._serving()]

    def _step(self, label: str, seconds: float) -> Step:
        name = label.partition("(")[2].rstrip(")")
        dimension = self._dimension(name)
        rows = self.corpus.passages
        if label.startswith("embed"):
            job = self._job(rows * 140.0)  # numbers and digests of what is in which shard
            return Step(label, (job, *self._embed(name)), seconds, rows * 2.0 * dimension)
        if label.startswith("index"):
            made = self._index(dimension)
            words = build_bytes(rows, self.text * rows)
            held = max(float(made.memory_bytes), words) + 4.0 * made.training_rows * dimension
            seconds += made.build_seconds / (self.scale.cpu_workers or 1)
            return Step(label, (self._job(held),), seconds, made.memory_bytes + words / 10)
        if label == "training set":
            # The teacher's vectors are a mapped file; their means, one a document, are not, and
            # what the questions touch are objects.
            means = 2 * rows * 4.0 * int(self.coarse.hidden_size)
            touched = self._slots() * (self._slot_bytes() + _PASSAGE_OBJECT)
            job = self._job(rows * self.text + means + touched)
            start = "retriever" if self.config.retriever.init else "base"
            search = self._search(start, "MineBlock")
            seconds += self._search_seconds(start, self.corpus.train)
            return Step(label, (job, search), seconds, self._slots() * self._slot_bytes())
        if label.startswith("stage"):
            first = "retriever" in label
            actor = self._stage1() if first else self._stage2()
            return Step(label, (self._job(0.0), actor), seconds, 4.0 * self._trainable(first))
        if label.startswith("hits"):
            count = self.corpus.train if "train" in label else self.corpus.dev
            hits = count * self._wordings() * self._top_k(label) * (self.text + 600)
            if "BM25" in label:
                return Step(label, (self._job(hits + 10 * self.text * rows),), seconds, hits / 5)
            index = next((n for n in ("minilm", "base") if f"the {n} index" in label), "retriever")
            more = QUERY_REWRITES if "rewrites" in label else 0
            seconds += self._search_seconds(index, count, more)
            return Step(
                label, (self._job(hits), self._search(index, "SearchBlock")), seconds, hits / 5
            )
        if label.startswith("readings"):
            held = self._readings() * 3
            objects = rows * (self.text + _PASSAGE_OBJECT)
            return Step(label, (self._job(held + objects),), seconds, self._readings() / 3)
        objects = rows * (self.text + _PASSAGE_OBJECT)
        answers = (self._answer(),) if self.config.evaluation.num_answers else ()
        return Step(label, (self._job(objects), *answers), seconds, 5e6)

    # --- one kind of process each ---

    def _job(self, more: float) -> Actor:
        return Actor("the job itself", 1, _JOB + more, cpus=0.0)

    def _embed(self, name: str) -> list[Actor]:
        weights, peak = self._encoder(name, self.scale.embed_tokens_per_batch)
        actors = [self._inference("EmbedShard", "embed", weights, peak)]
        tokenizers = self.scale.cpu_workers
        if tokenizers is None:
            tokenizers = self.scale.fewest_embed_workers * self.infers_on_gpu
        if tokenizers:
            actors.append(
                Actor("TokenizeShard", tokenizers, _PROCESS["embed"], setting="scale.cpu_workers")
            )
        return actors

    def _search(self, index: str, name: str) -> Actor:
        weights, peak = self._encoder(index, 8192)
        # Index and passages are mapped files, which the actors of a node share.
        mapped = self._index(self._dimension(index)).memory_bytes + self._text_bytes()
        return self._inference(name, "search", weights, peak, mapped=mapped)

    def _answer(self) -> Actor:
        shape = meta.weigh(self.generator)
        rows, width = self.config.evaluation.answer_batch_size, self.config.generator.max_tokens
        cache = rows * width * shape.cache * self.bytes
        peak = meta.encoding_peak(
            self.generator, rows, width, precision=self.precision, layers=shape.layers
        )
        return self._inference("AnswerBlock", "answer", shape.whole * self.bytes, cache + peak)

    def _stage1(self) -> Actor:
        config, settings = self.config, self.config.retriever
        tokens = self.scale.train_tokens_per_chunk
        width = min(config.model.passage_max_tokens, config.corpus.chunk_tokens + 32)
        candidates = settings.global_batch_size * (1 + settings.num_hard_negatives)
        passages = math.ceil(candidates * (1 + config.rewrites.num_windows) / self.workers)
        queries = math.ceil(settings.global_batch_size / self.workers) * self._wordings()
        rows = passages + math.ceil(queries * _QUERY_TOKENS / width)
        if tokens is not None:
            rows = min(rows, max(1, tokens // width))
        peak = meta.stage1_peak(
            self.retriever,
            settings.lora,
            rows,
            width,
            precision=self.precision,
            layers=self.depth,
            projection=config.model.projection_dim,
            recompute=self.scale.gradient_checkpointing,
        )
        # Vectors of all ranks, twice, and some matrices of rows x environments x candidates.
        dimension = self._dimension("retriever")
        vectors = 8.0 * candidates * (1 + config.rewrites.num_windows) * dimension
        environments = self._wordings() * (1 + config.rewrites.num_windows)
        cells = settings.global_batch_size * environments * candidates / self.workers
        held = self._slots() * self._slot_bytes() + self.corpus.train * 2000.0
        whole = meta.weigh(self.retriever).whole
        return self._trains(whole, self._trainable(first=True), peak + vectors + 24.0 * cells, held)

    def _stage2(self) -> Actor:
        settings = self.config.generator
        share = math.ceil(settings.global_batch_size / self.workers)
        width = min(settings.max_tokens, self._prompt_tokens())
        rows = share
        if self.scale.train_tokens_per_chunk is not None:
            rows = min(rows, max(1, self.scale.train_tokens_per_chunk // width))
        shape = meta.weigh(self.generator)
        peak = meta.stage2_peak(
            self.generator,
            settings.lora,
            rows,
            width,
            predicted=rows * settings.max_new_tokens,
            precision=self.precision,
            layers=shape.layers,
            first_layer=settings.first_layer,
            recompute=self.scale.gradient_checkpointing,
            packed=self.scale.pack_tokens is not None,
        )
        return self._trains(shape.whole, self._trainable(first=False), peak, 3.0 * self._readings())

    def _inference(
        self,
        name: str,
        kind: str,
        weights: float,
        peak: float,
        *,
        mapped: float = 0.0,
    ) -> Actor:
        on_gpu = self.infers_on_gpu
        gpus = self.scale.embed_gpus_per_worker
        return Actor(
            name,
            self.scale.fewest_embed_workers,
            _PROCESS[kind] + (_CUDA_HOST if on_gpu else weights + peak),
            gpu=_CUDA_CONTEXT + weights + peak if on_gpu else 0.0,
            gpus=gpus,
            cpus=1.0 if on_gpu and kind == "embed" else self.scale.cpus_per_worker,
            mapped=mapped,
            setting="scale.embed_workers",
        )

    def _trains(self, whole: int, trainable: int, peak: float, held: float) -> Actor:
        on_gpu, ranks = self.scale.use_gpu, self.workers
        weights, mapped = float(whole * self.bytes), 0.0
        if self.scale.zero_stage == 3:  # loaded in shards, from a file that a node's ranks share
            weights, mapped = (whole / ranks + min(whole, _GATHERED)) * self.bytes, weights
        # Gradients, and fp32 copies, gradients and two moments of what trains, shared by the ranks.
        shared = ranks if self.scale.zero_stage else 1
        state = trainable * (self.bytes + 16.0 / shared)
        base = _PROCESS["train"] + held
        if not on_gpu:
            kept = 1.45 if self.scale.keep_freed_memory else 1.0  # measured, see ScaleConfig
            host = base + weights + state + peak * kept
            cpus = self.scale.cpus_per_worker
            return Actor("training worker", ranks, host, cpus=cpus, mapped=mapped)
        bucket = _BUCKET * self.bytes if self.scale.zero_stage else 0
        return Actor(
            "training worker",
            ranks,
            # Loaded on the host, then moved; in shards they go straight to the GPU.
            base + _CUDA_HOST + (0.0 if mapped else weights),
            gpu=_CUDA_CONTEXT + weights + state + peak + bucket,
            gpus=1.0,
            cpus=self.scale.cpus_per_worker,
            mapped=mapped,
            setting="scale.num_workers",
        )

    def _serving(self) -> Step:
        serve = self.config.serve
        on_gpu = serve.num_gpus_per_replica > 0
        encoder, peak = self._encoder("retriever", 2048)
        shape = meta.weigh(self.generator)
        width = self.config.generator.max_tokens
        cache = 8 * width * shape.cache * self.bytes
        prefill = meta.encoding_peak(
            self.generator, 8, width, precision=self.precision, layers=shape.layers
        )
        size = float(self._index(self._dimension("retriever")).memory_bytes)
        text = self._text_bytes()
        # A change of the index loads the new version beside the old one.
        parts = (
            ("retriever replica", encoder + peak, 2 * size, text),
            ("generator replica", shape.whole * self.bytes + cache + prefill, 0.0, 0.0),
        )
        actors = [
            Actor(
                name,
                1,
                _PROCESS["answer"] + rows + (_CUDA_HOST if on_gpu else model),
                gpu=_CUDA_CONTEXT + model if on_gpu else 0.0,
                gpus=serve.num_gpus_per_replica,
                cpus=serve.num_cpus_per_replica,
                mapped=mapped,
            )
            for name, model, rows, mapped in parts
        ]
        return Step("serve", tuple(actors), None, 0.0)

    # --- sizes ---

    def _encoder(self, name: str, tokens: int) -> tuple[float, float]:
        """Bytes of an encoder's weights, and of a batch of so many tokens through it."""
        model = self.config.model
        if name == "minilm":
            width = min(COARSE_MAX_TOKENS, self.config.corpus.chunk_tokens + 32)
            description, precision, layers = self.coarse, "fp32", 6
        else:
            width = min(model.passage_max_tokens, self.config.corpus.chunk_tokens + 32)
            description, precision, layers = self.retriever, self.precision, self.depth
        peak = meta.encoding_peak(
            description, max(1, tokens // width), width, precision=precision, layers=layers
        )
        return float(meta.weigh(description).whole * _BYTES[precision]), float(peak)

    def _dimension(self, name: str) -> int:
        if name == "minilm":
            return int(self.coarse.hidden_size)
        projected = self.config.model.projection_dim if name == "retriever" else None
        cut = self.config.experimental.index.dimensions if name == "retriever" else None
        return cut or projected or int(self.retriever.hidden_size)

    def _index(self, dimension: int) -> Candidate:
        return first_planned(self.config.index, self.corpus.passages, dimension)

    def _search_seconds(self, index: str, questions: int, rewrites: int = 0) -> float:
        dimension = self._dimension(index)
        found = self._index(dimension)
        if found.kind == "Flat":  # many queries are one product
            each = self.corpus.passages * dimension / RATES.multiply_adds
        else:
            each = found.latency_ms / 1e3
        cores = self.scale.fewest_embed_workers * max(1.0, self.scale.cpus_per_worker)
        return questions * self._wordings() * (1 + rewrites) * each / cores

    def _wordings(self) -> int:
        return 1 + self.config.rewrites.num_rewrites

    def _text_bytes(self) -> float:
        return self.corpus.passages * (self.text + 200)

    def _slots(self) -> int:
        each = 1 + self.config.retriever.num_hard_negatives
        return min(self.corpus.passages, self.corpus.train * each)

    def _slot_bytes(self) -> float:
        windows = 1 + self.config.rewrites.num_windows
        # Each window as it is and as it is searched for answers, and three teacher's vectors.
        return 2 * windows * (self.text + _STRING) + 12.0 * int(self.coarse.hidden_size)

    def _readings(self) -> float:
        each = self.config.generator.top_k * (1 + self.config.rewrites.num_windows)
        return self.corpus.train * self._wordings() * each * (self.text + _STRING)

    def _prompt_tokens(self) -> int:
        return self.config.generator.top_k * (self.corpus.tokens + _FRAME_TOKENS) + 96

    def _top_k(self, label: str) -> int:
        if "train" in label:  # one more than a prompt takes, see Pipeline.hits
            return self.config.generator.top_k + 1
        return self.config.evaluation.top_k

    def _trainable(self, first: bool) -> int:
        config = self.config
        if first:
            return meta.trainable(
                self.retriever,
                config.retriever.lora,
                layers=self.depth,
                projection=config.model.projection_dim,
            )
        return meta.trainable(
            self.generator,
            config.generator.lora,
            layers=int(self.generator.num_hidden_layers),
            first_layer=config.generator.first_layer,
        )


def faults(steps: Iterable[Step], machines: Machines) -> list[Fault]:
    """What the steps lack on these machines; empty where they fit."""
    return [fault for step in steps for fault in _faults_of(step, machines)]


def _faults_of(step: Step, machines: Machines) -> list[Fault]:
    found: list[Fault] = []
    gpus = machines.nodes * machines.gpus
    asked = sum(actor.count * actor.gpus for actor in step.actors)
    if asked > gpus:
        text = f"{step.label} asks for {asked:g} GPUs, there are {gpus}"
        found.append(Fault(step.label, "gpus", text))
    for actor in step.actors:
        on_one = max(1, math.floor(1.0 / actor.gpus)) if actor.gpus else 0
        need = actor.gpu * min(on_one, actor.count)
        if machines.gpu_bytes is not None and need > machines.gpu_bytes * _USABLE_GPU:
            text = (
                f"{step.label}: {actor.name} needs {need / GB / _USABLE_GPU:.0f} GB of a GPU, which"
                f" has {machines.gpu_bytes / GB:.0f}"
            )
            found.append(Fault(step.label, "gpu", text))
    cpus = sum(actor.count * actor.cpus for actor in step.actors)
    if machines.cpus is not None and cpus > machines.nodes * machines.cpus:
        text = f"{step.label} asks for {cpus:g} CPUs, there are {machines.nodes * machines.cpus}"
        found.append(Fault(step.label, "cpus", text))
    job = sum(actor.host for actor in step.actors if actor.cpus == 0.0)
    if machines.job_bytes is not None and job > machines.job_bytes * _USABLE_HOST:
        text = (
            f"{step.label}: the job's own process needs {job / GB / _USABLE_HOST:.0f} GB, its "
            f"machine has {machines.job_bytes / GB:.0f}"
        )
        found.append(Fault(step.label, "job", text))
    node = host_bytes(step, machines)
    if machines.host_bytes is not None and node > machines.host_bytes * _USABLE_HOST:
        text = (
            f"{step.label}: a node needs {node / GB / _USABLE_HOST:.0f} GB of memory and has "
            f"{machines.host_bytes / GB:.0f}"
        )
        found.append(Fault(step.label, "host", text))
    return found


def host_bytes(step: Step, machines: Machines) -> float:
    """Bytes of the fullest node: actors spread evenly; the job on the first, unless it is
    elsewhere.
    """
    total = 0.0
    for actor in step.actors:
        if actor.cpus == 0.0 and machines.job_bytes is not None:
            continue
        total += math.ceil(actor.count / machines.nodes) * actor.host + actor.mapped
    return total


def remedies(
    recipe: str,
    overrides: Sequence[str],
    corpus: Corpus,
    machines: Machines,
) -> list[tuple[Fault, str]]:
    """For each fault the first change of settings that mends it; ``""`` where none here does.

    Args:
        recipe, overrides: what was refused.
        corpus, machines: as it was refused on.
    """
    config = load_config(recipe, overrides)

    def mends(fault: Fault, change: Sequence[str]) -> bool:
        try:
            tried = footprint(load_config(recipe, [*overrides, *change]), corpus)
        except InvarError:
            return False
        left = {(one.step, one.what) for one in faults(tried, machines)}
        return (fault.step, fault.what) not in left

    found: list[tuple[Fault, str]] = []
    for fault in faults(footprint(config, corpus), machines):
        # Where the last rung of a ladder does not do, no other does.
        ladder = next(
            (
                rungs
                for rungs in _changes(config, fault, machines)
                if rungs and mends(fault, rungs[-1])
            ),
            [],
        )
        change = next((rung for rung in ladder if mends(fault, rung)), [])
        found.append((fault, " ".join(change)))
    return found


def _changes(config: Config, fault: Fault, machines: Machines) -> list[list[list[str]]]:
    """Ladders of changes that could mend a fault: the mildest ladder first, and on each the mildest
    rung.
    """
    scale, gpus = config.scale, machines.nodes * machines.gpus
    fewer = [f"scale.num_workers={gpus}", f"scale.embed_workers={gpus}"]
    if fault.what in {"gpus", "cpus"} and gpus:
        return [[fewer, [*fewer, "scale.cpus_per_worker=1"]]]
    if fault.what == "gpu" and fault.step.startswith("stage"):
        chunks = _halves("scale.train_tokens_per_chunk", scale.train_tokens_per_chunk or 16384)
        again = "scale.gradient_checkpointing=true"
        ladders = [chunks, [[again, *chunk] for chunk in chunks]]
        return (
            [*ladders, [["model.precision=bf16"]]] if config.model.precision == "fp32" else ladders
        )
    if fault.what == "gpu" and fault.step.startswith("embed"):
        return [_halves("scale.embed_tokens_per_batch", scale.embed_tokens_per_batch)]
    if fault.what == "gpu" and fault.step == "report":
        return [_halves("evaluation.answer_batch_size", config.evaluation.answer_batch_size, 1)]
    limit = machines.job_bytes if fault.what == "job" else machines.host_bytes
    if fault.what in {"host", "job"} and limit is not None:
        planned = [
            [
                "index.factory=auto",
                f"index.max_memory_mb={limit / share / 1e6:.0f}",
                "index.max_latency_ms=1000",
            ]
            for share in (2, 4, 8, 16)
        ]
        return [
            *([rung] for rung in planned),
            _halves("scale.embed_workers", scale.fewest_embed_workers, 1),
        ]
    return []


def _halves(key: str, number: int, least: int = 1024) -> list[list[str]]:
    found = []
    while number // 2 >= least:
        number //= 2
        found.append([f"{key}={number}"])
    return found
