"""A search over HTTP, one request at a time: in process, behind a bare FastAPI app, behind our
service on Ray Serve, and what an empty Serve app with one hop costs.

A round's seconds are the median latency of its requests, times their number.
"""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import httpx

from benchmarks.contest import OURS, Contest, Measured, Side
from benchmarks.groups.start import SMALL, untrained_generator
from invar_ray.answering.current import current_index
from invar_ray.answering.retriever import open_retriever
from invar_ray.corpus import facts
from invar_ray.store.artifacts import Store

TOP_K = 5


def contests(full: bool, folder: Path) -> list[Contest]:
    """One."""
    count = 300 if full else 100
    root = str(folder / "store")
    _index(root, folder)
    given = {"root": root, "count": count}
    sides = (
        Side(OURS, "serve:ours", given),
        Side("in process", "serve:direct", given),
        Side("FastAPI bare", "serve:fastapi", given),
        Side("empty Serve app, one hop", "serve:empty", {"count": count}),
    )
    return [Contest("serve retrieve p50", "request", count, sides, by="clock")]


def _index(root: str, folder: Path) -> None:
    from invar_ray.cli.documents import index_documents
    from invar_ray.config import load_config

    texts = folder / "texts"
    texts.mkdir()
    for number, document in enumerate(facts.documents()[:200]):
        (texts / f"{number}.txt").write_text(document.text, encoding="utf-8")
    settings = [f"storage.root_uri={root}", f"corpus.uri={texts}", *SMALL]
    index_documents(load_config("demo", settings), "base")


def _rounds(ask: Callable[[str], object], count: int) -> Callable[[], Measured]:
    def work() -> Measured:
        times = []
        for number in range(count):
            question = f"Which river of number {number} flows past the old mill?"
            started = time.perf_counter()
            ask(question)
            times.append(time.perf_counter() - started)
        p95 = sorted(times)[int(0.95 * count)]
        return Measured(clock=median(times) * count, notes={"p95_ms": p95 * 1000})

    return work


def direct(root: str, count: int) -> Callable[[], Measured]:
    """The retriever itself."""
    retriever = open_retriever(current_index(Store(root)).uri)
    return _rounds(lambda question: retriever.retrieve([question], TOP_K), count)


def fastapi(root: str, count: int) -> Callable[[], Measured]:
    """A FastAPI app of one route around it, under uvicorn, in a thread of this process."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import create_model

    retriever = open_retriever(current_index(Store(root)).uri)
    Asked = create_model("Asked", question=(str, ...), top_k=(int, ...))
    app = FastAPI()

    @app.post("/v1/retrieve")
    def retrieve(asked: Asked) -> Any:  # type: ignore[valid-type]
        [hits] = retriever.retrieve([asked.question], asked.top_k)  # type: ignore[attr-defined]
        return {"passages": [{"title": hit.title, "text": hit.text} for hit in hits]}

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    return _rounds(_asking(f"http://127.0.0.1:{port}"), count)


def _asking(url: str) -> Callable[[str], object]:
    client = httpx.Client(base_url=url, trust_env=False, timeout=60)

    def ask(question: str) -> object:
        given = {"question": question, "top_k": TOP_K}
        return client.post("/v1/retrieve", json=given).raise_for_status()

    return ask


def _ray() -> None:
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=tempfile.mkdtemp(prefix="ib", dir="/tmp"),
    )


class _Served:
    def __init__(self, url: str, count: int) -> None:
        self._work = _rounds(_asking(url), count)

    def __call__(self) -> Measured:
        return self._work()

    def close(self) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()


def ours(root: str, count: int) -> Callable[[], Measured]:
    """Our service, one replica of each kind."""
    from serve.app import AppArgs, start

    index, generator = current_index(Store(root)).uri, untrained_generator(root)
    _ray()
    args = AppArgs(
        index_uri=index,
        generator_uri=generator,
        retriever_replicas=(1, 1),
        generator_replicas=(1, 1),
        ingress_replicas=(1, 1),
        batch_wait_s=0.0,  # alone, a call waits for nobody
        published="",
    )
    return _Served(start(args, port=0, log_level="WARNING"), count)


def empty(count: int) -> Callable[[], Measured]:
    """Serve's own price: an ingress that hands a string to a second deployment and back."""
    from fastapi import FastAPI
    from ray import serve

    _ray()
    app = FastAPI()

    @serve.deployment
    class Inner:
        async def call(self, question: str) -> dict[str, str]:
            return {"question": question}

    @serve.deployment
    @serve.ingress(app)
    class Outer:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        @app.post("/v1/retrieve")
        async def retrieve(self, asked: dict) -> dict:
            found: dict = await self._inner.call.remote(asked["question"])
            return found

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Outer.bind(Inner.bind()))  # type: ignore[attr-defined]
    return _Served(f"http://127.0.0.1:{port}", count)
