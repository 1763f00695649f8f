"""What lets one model serve many callers: a thread to run it in, and batches of single calls."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Worker:
    """One thread in which an engine runs, so that the event loop stays free to take requests and
    health checks.

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
        """Run ``probe``; while the thread is at work, that it has not been for too long is proof
        enough.

        A probe would have to wait behind the work, miss its deadline, and have a busy replica
        replaced: under load, when it is needed most.

        Raises:
            RuntimeError: if one piece of work takes longer than ``stuck_s``.
            Exception: whatever the probe raises.
        """
        since = self._busy_since
        if since is None:
            await self.run(probe)
        elif time.monotonic() - since > self._stuck_s:
            raise RuntimeError(
                f"one piece of work has been running for more than {self._stuck_s:g} s"
            )

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
    """Collects single calls into batches: what comes during a batch is the next, and waits a little
    for more.

    A call that comes alone, after a batch of one, does not wait: nobody else is to be expected, and
    the wait would be much of what the service adds to a search.

    Serve has a decorator for this, ``serve.batch``.  It keeps its queue on the class: two
    applications in one process would share it, a class that was used can no longer be sent to a
    replica, and it runs in replicas only.

    Args:
        work: answers a batch, in order; an exception in the place of an answer goes to that caller
            alone.
        max_size: most calls in a batch.
        wait_s: how long the first call of a batch waits for others, in seconds, where there are
            others.
        seen: told the size of each batch, and how many calls are left waiting.
    """

    def __init__(
        self,
        work: Callable[[list[T]], Awaitable[Sequence[R | Exception]]],
        max_size: int,
        wait_s: float,
        seen: Callable[[int, int], None] = lambda size, waiting: None,
    ) -> None:
        self._work, self._max_size, self._wait_s, self._seen = work, max_size, wait_s, seen
        self._waiting: list[tuple[T, asyncio.Future[R]]] = []
        self._full = asyncio.Event()
        self._last_size = 0
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
            busy = self._last_size > 1 or len(self._waiting) > 1
            if busy and len(self._waiting) < self._max_size:
                self._full.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._full.wait(), self._wait_s)
            # Callers that have gone away (disconnects, timeouts) leave a cancelled future: no work
            # for them.
            alive = [call for call in self._waiting if not call[1].done()]
            batch, self._waiting = alive[: self._max_size], alive[self._max_size :]
            if not batch:
                continue
            self._last_size = len(batch)
            self._seen(len(batch), len(self._waiting))
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
