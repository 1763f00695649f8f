"""Small real artifacts to serve, and the service over them in this process, behind a real web
server.
"""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import uvicorn

from invar_ray.config import Config, ExperimentalConfig, ExperimentalModel, ModelConfig, TinyConfig
from invar_ray.index.build import build_index
from invar_ray.index.probes import write_probes
from invar_ray.models.adapters import new_adapter, save_adapter
from invar_ray.models.base import resolve_base
from invar_ray.models.encoder import llm_spec, open_encoder
from invar_ray.models.loading import open_model
from invar_ray.schema import Passage, passage_schema, to_table, vector_schema
from invar_ray.steps.base import build as build_base
from invar_ray.steps.base import plan as base_plan
from invar_ray.steps.index import write_bm25
from invar_ray.store.artifacts import Plan, Store, split_uri
from serve.http.api import make_api
from serve.http.limits import Limits
from serve.index import ServedIndex
from serve.replicas.generator import AnswerEngine, TransformersEngine, load_generator
from serve.replicas.retriever import RetrieverLoader, RetrieverReplica, load_retriever
from serve.replicas.targets import LocalTarget
from serve.service import Service
from serve.telemetry.metrics import Meter, Metric
from serve.telemetry.tracing import Tracer
from serve.versions import Current

T = TypeVar("T")
LIMITS = Limits(top_k=3, max_top_k=4, max_question_chars=1500, max_new_tokens=6)
TEXTS = {
    "Gorse Island": "The light on Gorse Island was kept by Mara Voss until the autumn storm.",
    "Harbour": "Barley and salt were traded in the harbour every spring.",
    "Ferry": "The ferry to the mainland leaves at nine in the morning.",
    "Orchard": "Pears and plums grow in the orchard behind the chapel.",
    "Mill": "The water mill grinds oats for three villages.",
}
TENANTS = {
    "Gorse Island": "sea",
    "Harbour": "sea",
    "Ferry": "sea",
    "Orchard": "land",
    "Mill": "land",
}


@dataclass(frozen=True)
class Artifacts:
    index_uri: str
    other_index_uri: str
    scrambled_index_uri: str
    left_index_uri: str
    right_index_uri: str
    tenants_index_uri: str
    generator_uri: str


def make_artifacts(folder: Path) -> Artifacts:
    """A one-layer base, Flat indexes over its vectors, and an untrained generator adapter."""
    store = Store(str(folder))
    tiny_config = TinyConfig(num_layers=1, num_heads=6, intermediate_size=32)
    config = dataclasses.replace(
        Config(),
        model=ModelConfig(pooling="mean"),
        experimental=ExperimentalConfig(model=ExperimentalModel(tiny=tiny_config)),
    )
    tiny, _ = store.get_or_build(base_plan(config), lambda building: build_base(building, config))
    base = resolve_base(config.model, tiny)
    spec = llm_spec(config.model, base)
    encoder = open_encoder(spec, store)

    def index(name: str, titles: list[str], shuffled: bool = False, tenants: bool = False) -> str:
        rows = [
            Passage(
                f"{t}:0",
                t,
                t,
                TEXTS[t],
                0,
                len(TEXTS[t]),
                uri=f"s3://corpus/{TENANTS[t]}/{t}.txt",
                metadata=(("tenant", TENANTS[t]),) if tenants else (),
            )
            for t in titles
        ]

        def passages(building: Any) -> None:
            schema = passage_schema(["tenant"] if tenants else [])
            pq.write_table(to_table(rows, schema), building.path / "passages.parquet")

        passages_artifact, _ = store.get_or_build(
            Plan("passages", name, {"titles": titles}), passages
        )

        def vectors(building: Any) -> None:
            matrix = encoder.encode_passages([(row.title, row.text) for row in rows])
            if shuffled:  # the probes still hold, the rows belong to other passages
                matrix = -np.roll(matrix, 1, axis=0)
            schema = vector_schema(matrix.shape[1])
            column = pa.FixedSizeListArray.from_arrays(
                pa.array(matrix.reshape(-1)), matrix.shape[1]
            )
            table = pa.table(
                {"id": [row.id for row in rows], "vector": column.cast(schema.field("vector").type)}
            )
            (building.path / "shards").mkdir()
            pq.write_table(table, building.path / "shards" / "part-00000.parquet")
            texts = [(row.title, row.text) for row in rows[:2]]
            write_probes(building.path / "probes.parquet", texts, encoder.encode_passages(texts))
            building.info["encoder"] = spec.to_json()

        parents = {"passages": passages_artifact}
        vectors_artifact, _ = store.get_or_build(
            Plan("vectors", name, {"shuffled": shuffled}, parents), vectors
        )
        parents["vectors"] = vectors_artifact

        def body(building: Any) -> None:
            build_index(building, vectors_artifact, passages_artifact, "Flat")
            if name != "few":  # as an older version made it
                write_bm25(building, passages_artifact)

        return store.get_or_build(Plan("index", name, {}, parents), body)[0].uri

    def generator(building: Any) -> None:
        model, _ = open_model(base, store)
        adapted = new_adapter(model, config.generator.lora, seed=0)
        save_adapter(adapted, adapted.state_dict(), building.path / "adapter", base.location)
        building.info |= {"base": asdict(base), "max_context": 160}

    adapter, _ = store.get_or_build(Plan("generator", "tiny", {}, {"model": tiny}), generator)
    titles = list(TEXTS)
    return Artifacts(
        index("all", titles),
        index("few", titles[:3]),
        index("scrambled", titles, shuffled=True),
        index("left", titles[:3]),
        index("right", titles[3:]),
        index("tenants", titles, tenants=True),
        adapter.uri,
    )


class Memory:
    """A sink that keeps every value, by name and labels."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], list[float]] = defaultdict(list)

    def __call__(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """Keep a value."""
        self.values[metric.name, tuple(sorted(labels.items()))].append(value)

    def of(self, name: str) -> list[float]:
        """All values of a metric, whatever its labels."""
        return [
            value for (known, _), values in self.values.items() if known == name for value in values
        ]


class Several:
    """Replicas in this process behind one name, asked in turn."""

    def __init__(self, name: str, cores: list[RetrieverReplica]) -> None:
        self.name, self.cores, self._asked = name, cores, 0

    async def call(self, method: str, *args: Any, left_s: float) -> Any:
        """See :class:`serve.replicas.targets.Target`."""
        self._asked += 1
        return await getattr(self.cores[self._asked % len(self.cores)], method)(*args)

    def stream(self, method: str, *args: Any, left_s: float) -> AsyncIterator[Any]:
        """A retriever streams nothing."""
        raise NotImplementedError

    async def broadcast(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """See :class:`serve.replicas.targets.Target`."""
        return await asyncio.gather(*(getattr(core, method)(*args) for core in self.cores))


def root_of(artifacts: Artifacts) -> str:
    """Root of the store that holds them."""
    return split_uri(artifacts.index_uri)[0]


def copy_of(artifacts: Artifacts, folder: Path) -> Artifacts:
    """The same artifacts in a store of the test's own, which it may publish in and break."""
    root = root_of(artifacts)
    shutil.copytree(root, folder / "store", ignore=shutil.ignore_patterns("published"))
    values = dataclasses.asdict(artifacts).items()
    return Artifacts(**{name: uri.replace(root, str(folder / "store")) for name, uri in values})


class Live:
    """A service in this process: its event loop in a thread, its routes behind uvicorn on a free
    port.

    Args:
        artifacts: what it serves.
        shards: index URIs; ``None`` is the one of all passages.
        published: name of the versions in the artifacts' store that it follows; empty: none.
        replicas: of each shard.
        loader: of retrievers.
        index: options of :class:`serve.index.ServedIndex`.
        engine: answers instead of the artifact's generator.
        options: of :func:`serve.http.api.make_api`; ``service`` has those of
            :class:`serve.service.Service`.
    """

    def __init__(
        self,
        artifacts: Artifacts,
        *,
        shards: list[str] | None = None,
        published: str = "",
        replicas: int = 1,
        loader: RetrieverLoader = load_retriever,
        index: dict[str, Any] | None = None,
        engine: AnswerEngine | None = None,
        limits: Limits = LIMITS,
        service: dict[str, Any] | None = None,
        tracer: Tracer | None = None,
        **options: Any,
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.memory = Memory()
        meter = Meter(self.memory)
        self.configured = tuple(shards or [artifacts.index_uri])
        self._loader, self._meter, self._tracer = loader, meter, tracer
        self._current = (
            Current(f"{root_of(artifacts)}/published/{published}") if published else None
        )

        async def build() -> None:
            self.targets = [
                Several(f"shard {number}", [await self._start(number) for _ in range(replicas)])
                for number in range(len(self.configured))
            ]
            self.engine = engine or TransformersEngine(
                artifacts.generator_uri, load_generator, meter=meter, tracer=tracer
            )
            self.service = Service(
                self.targets,
                LocalTarget("generator", self.engine),
                ServedIndex(self.targets, self._current, meter, **(index or {})),
                **{"meter": meter, "tracer": tracer, **(service or {})},
            )
            self.app = make_api(self.service, limits, **options)

        self.run(build())
        config = uvicorn.Config(
            self.app, host="127.0.0.1", port=0, log_level="error", lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._serving = asyncio.run_coroutine_threadsafe(self._server.serve(), self.loop)
        while not self._server.started:
            threading.Event().wait(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    @property
    def retrievers(self) -> list[RetrieverReplica]:
        """Every replica, ordered by shard."""
        return [core for target in self.targets for core in target.cores]

    def add(self, shard: int = 0) -> RetrieverReplica:
        """One more replica of a shard, started now."""
        core = self.run(self._start(shard))
        self.targets[shard].cores.append(core)
        return core

    async def _start(self, shard: int) -> RetrieverReplica:
        core = RetrieverReplica(
            self._loader,
            current=self._current,
            shard=shard,
            configured=self.configured,
            meter=self._meter,
            tracer=self._tracer,
        )
        await core.configure(self.configured[shard])
        return core

    def follow(self) -> None:
        """What the ingress does at each of its health checks."""
        self.run(self.service.index.follow())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the service's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(120)

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.client.request(method, path, **options)

    def close(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._serving.result(20)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        for core in self.retrievers:
            core.close()
        self.engine.close()


def fault(response: httpx.Response, status: int, code: str) -> str:
    """The message, after checking that the response has the one form of errors."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"type", "message", "param", "code", "request_id"}
    assert body["error"]["code"] == code
    assert body["error"]["request_id"]
    assert "Traceback" not in response.text
    return str(body["error"]["message"])


_MADE: list[Artifacts] = []


def shared_artifacts(factory: Any) -> Artifacts:
    """The session's one set."""
    if not _MADE:
        _MADE.append(make_artifacts(factory.mktemp("served")))
    return _MADE[0]
