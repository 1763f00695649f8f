"""What runs inside a replica, without Ray: a retriever or a generator, a thread to run it in, probes that use it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from invar_ray.errors import InvarError, RequestError
from invar_ray.schema import Answer, Hit

if TYPE_CHECKING:  # both import torch: only replicas pay for that
    from invar_ray.models.generator import Generator
    from invar_ray.retrieval.retriever import Retriever

logger = logging.getLogger("ray.serve")
T = TypeVar("T")
R = TypeVar("R")
RetrieverLoader = Callable[[str], "Retriever"]
GeneratorLoader = Callable[[str], "Generator"]
_PROBE = "is anyone there?"
# Transformers builds models on a device that it sets for the whole process: two loads at once break each other.
_loading = threading.Lock()


def load_retriever(uri: str, device: str = "cpu", precision: str = "fp32") -> Retriever:
    """The retriever of an index artifact."""
    from invar_ray.retrieval.retriever import open_retriever

    return open_retriever(uri, device=device, precision=precision)


def load_generator(uri: str, device: str = "cpu", precision: str = "fp32") -> Generator:
    """The generator of a generator artifact."""
    import torch

    from invar_ray.models.locate import open_generator

    generator: Generator = open_generator(uri)
    generator.model.to(device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return generator


@dataclass(frozen=True, slots=True)
class Question:
    """A question to answer from passages."""

    text: str
    hits: tuple[Hit, ...]
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Found:
    """Passages for one question, and the versions of what found them (an index may change between two calls)."""

    hits: tuple[Hit, ...]
    versions: dict[str, str]


class RetrieverEngine:
    """A retriever whose index can be changed while it serves.

    Args:
        loader: index URI in, ready retriever out.
    """

    def __init__(self, loader: RetrieverLoader = load_retriever) -> None:
        self._loader = loader
        self._retriever: Retriever | None = None
        self.requested_uri = self.active_uri = ""
        self.error: str | None = None

    def open(self, uri: str) -> None:
        """Load the index at ``uri`` and serve it from now on.

        The first index must load, so that a wrong one fails the deployment.  Later the old one stays in service, since
        an exception would replace the replica: an outage instead of a change that did not happen.

        Raises:
            Exception: whatever the loader raised, for the first index only.
        """
        self.requested_uri = uri
        if uri == self.active_uri:
            self.error = None
            return
        try:
            with _loading:
                retriever = self._loader(uri)
            retriever.retrieve([_PROBE], 1)
        except Exception as error:
            self.error = str(error) if isinstance(error, InvarError) else f"{type(error).__name__} while loading it"
            if self._retriever is None:
                raise
            logger.exception("index %s cannot be served, %s stays in service", uri, self.active_uri)
            return
        self._retriever, self.active_uri, self.error = retriever, uri, None

    def search(self, requests: Sequence[tuple[str, int]]) -> list[Found]:
        """Passages for each (question, top_k); questions with the same ``top_k`` are searched together."""
        retriever = self._loaded()
        versions = dict(retriever.versions)
        found: dict[int, Found] = {}
        for top_k in {top_k for _, top_k in requests}:
            rows = [row for row, request in enumerate(requests) if request[1] == top_k]
            for row, hits in zip(rows, retriever.retrieve([requests[row][0] for row in rows], top_k), strict=True):
                found[row] = Found(tuple(hits), versions)
        return [found[row] for row in range(len(requests))]

    def probe(self) -> None:
        """Search once for real."""
        self._loaded().retrieve([_PROBE], 1)

    def describe(self) -> dict[str, Any]:
        """State of the index and its versions."""
        state = {"requested_uri": self.requested_uri, "active_uri": self.active_uri, "error": self.error}
        return {"index": state, "versions": dict(self._loaded().versions)}

    def _loaded(self) -> Retriever:
        if self._retriever is None:
            raise RuntimeError("no index is loaded yet")
        return self._retriever


class GeneratorEngine:
    """A generator that answers questions in batches.

    Args:
        uri: generator artifact.
        loader: its URI in, ready generator out.
        batch_size: most prompts that run at once.
    """

    def __init__(self, uri: str, loader: GeneratorLoader = load_generator, batch_size: int = 8) -> None:
        self.uri, self._batch_size = uri, batch_size
        with _loading:
            self._generator = loader(uri)
        self.probe()

    def answer(self, questions: Sequence[Question]) -> list[Answer | RequestError]:
        """Answers in order; a question that cannot be answered gets its error instead, and does not harm the others."""
        from invar_ray.retrieval.rag import answer_batch, build_prompt

        results: dict[int, Answer | RequestError] = {}
        fit: dict[int, list[int]] = {}  # max_new_tokens -> rows
        for row, question in enumerate(questions):
            try:
                build_prompt(
                    self._generator, question.text, question.hits, max_new_tokens=question.max_new_tokens
                )  # cheap, and tells before the batch which questions are too long
                fit.setdefault(question.max_new_tokens, []).append(row)
            except RequestError as error:
                results[row] = error
        for max_new_tokens, rows in fit.items():
            answers = answer_batch(
                self._generator,
                [questions[row].text for row in rows],
                [questions[row].hits for row in rows],
                max_new_tokens=max_new_tokens,
                batch_size=self._batch_size,
            )
            results.update(zip(rows, answers, strict=True))
        return [results[row] for row in range(len(questions))]

    def probe(self) -> None:
        """Generate one token for real."""
        self._generator.generate([_PROBE], max_new_tokens=1)

    def describe(self) -> dict[str, Any]:
        """What generates, and its version."""
        state = {"uri": self.uri, "max_context": self._generator.max_context}
        return {"generator": state, "versions": {"generator": str(self._generator.version)}}


class Worker:
    """One thread in which an engine runs, so that the event loop stays free to take requests and health checks.

    Args:
        stuck_s: a piece of work that takes longer than this makes :meth:`check` fail.
    """

    def __init__(self, stuck_s: float = 120.0) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._stuck_s = stuck_s
        self._busy_since: float | None = None

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """``work(*args)`` in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._timed, work, args)

    async def check(self, probe: Callable[[], None]) -> None:
        """Run ``probe``; while the thread is at work, that it has not been for too long is proof enough.

        A probe would have to wait behind the work, miss its deadline, and have a busy replica replaced: under load,
        when it is needed most.

        Raises:
            RuntimeError: if one piece of work takes longer than ``stuck_s``.
            Exception: whatever the probe raises.
        """
        since = self._busy_since
        if since is None:
            await self.run(probe)
        elif time.monotonic() - since > self._stuck_s:
            raise RuntimeError(f"one piece of work has been running for more than {self._stuck_s:g} s")

    def close(self) -> None:
        """Let running work end; take no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _timed(self, work: Callable[..., T], args: tuple[Any, ...]) -> T:
        self._busy_since = time.monotonic()
        try:
            return work(*args)
        finally:
            self._busy_since = None


class Batcher(Generic[T, R]):
    """Collects single calls into batches: the first waits a little for others; what comes during a batch is the next.

    Serve has a decorator for this, ``serve.batch``.  It keeps its queue on the class: two applications in one process
    would share it, a class that was used can no longer be sent to a replica, and it runs in replicas only.

    Args:
        work: answers a batch, in order; an exception in the place of an answer goes to that caller alone.
        max_size: most calls in a batch.
        wait_s: how long the first call of a batch waits for others, in seconds.
    """

    def __init__(
        self, work: Callable[[list[T]], Awaitable[Sequence[R | Exception]]], max_size: int, wait_s: float
    ) -> None:
        self._work, self._max_size, self._wait_s = work, max_size, wait_s
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._full = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: T) -> R:
        """The answer to one call; raises what the batch raised."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if len(self._waiting) >= self._max_size:
            self._full.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        while self._waiting:
            if len(self._waiting) < self._max_size:
                self._full.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._full.wait(), self._wait_s)
            # Callers that have gone away (disconnects, timeouts) leave a cancelled future: no work for them.
            alive = [call for call in self._waiting if not call[1].done()]
            batch, self._waiting = alive[: self._max_size], alive[self._max_size :]
            if not batch:
                continue
            try:
                results = await self._work([item for item, _ in batch])
                answers: list[R | Exception] = list(results)
            except Exception as error:
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
