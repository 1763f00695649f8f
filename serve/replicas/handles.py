"""Serve's deployments as the service asks them: deadlines, one more try where a replica died, clear
errors in place of Ray's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from invar_ray.errors import InvarError
from serve.errors import OutOfTime, Overloaded, ServiceError, Unavailable
from serve.telemetry.metrics import Meter

logger = logging.getLogger("ray.serve")
T = TypeVar("T")
_TRIES = 3
_PATIENCE_S = 0.5  # a call that takes longer asks whether anybody is there, then once a second
_LOST = (RayActorError, ReplicaUnavailableError)


class Handle:
    """The replicas of a deployment, as the service asks them.

    Args:
        name: for messages.
        handle: from ``bind``.
        retry_after_s: when a client may try again, in seconds.
        cheap: a method without arguments that costs nothing, by which replicas are known to be
            there.
    """

    def __init__(
        self,
        name: str,
        handle: DeploymentHandle[Any],
        retry_after_s: float,
        meter: Meter,
        cheap: str = "describe",
    ) -> None:
        self.name, self._handle, self._retry_after_s, self._meter = (
            name,
            handle,
            retry_after_s,
            meter,
        )
        self._there = Roll(handle, cheap)

    async def call(self, method: str, *args: Any, left_s: float) -> Any:
        """See :class:`serve.replicas.targets.Target`."""

        async def once() -> Any:
            response = getattr(self._handle, method).remote(*args)
            if not await _finished(response, left_s, self._there):
                raise self._timeout(left_s)
            return await response

        return await self._retried(once)

    async def stream(self, method: str, *args: Any, left_s: float) -> AsyncIterator[Any]:
        """See :class:`serve.replicas.targets.Target`."""
        streaming = self._handle.options(stream=True)
        items: Any = None
        # The last item, a whole reply, may come as late as the deadline and a little: the replica
        # keeps the time.
        patience = left_s + 5

        async def first() -> Any:
            nonlocal items
            items = getattr(streaming, method).remote(*args)
            return await asyncio.wait_for(self._there.beside(anext(items)), patience)

        try:
            yield await self._retried(first)
            while True:
                try:
                    yield await asyncio.wait_for(anext(items), patience)
                except StopAsyncIteration:
                    return
                except Exception as error:
                    raise self._known(error) from None
        finally:
            if items is not None:
                # A client that went away stops the model; nothing happens to a finished one.
                items.cancel()

    async def broadcast(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """See :class:`serve.replicas.targets.Target`."""

        async def once() -> list[Any]:
            return await self._handle.broadcast(method, *args).results_async(timeout_s=timeout_s)

        return await self._retried(once)

    async def _retried(self, send: Callable[[], Any]) -> Any:
        for attempt in range(_TRIES):
            try:
                return await send()
            except _LOST as error:
                if attempt == _TRIES - 1:
                    raise self._known(error) from error
                self._meter.record("invar_retries_total", target=self.name)
                logger.warning(
                    "a replica of the %s died in a call (%s): trying again",
                    self.name,
                    type(error).__name__,
                )
                await asyncio.sleep(0.05 * 4**attempt)  # until the router has heard of it
            except Exception as error:
                raise self._known(error) from error
        raise AssertionError("unreachable")

    def _known(self, error: BaseException) -> BaseException:
        """What the caller may know of an error."""
        if isinstance(error, BackPressureError):
            return Overloaded(
                f"the {self.name} has too many requests waiting",
                self._retry_after_s,
            )
        if isinstance(error, (*_LOST, DeploymentUnavailableError)):
            return Unavailable(f"the {self.name} is not available", self._retry_after_s)
        if isinstance(error, TimeoutError):
            return self._timeout(0.0)
        if isinstance(error, RayTaskError) and isinstance(error.cause, (InvarError, ServiceError)):
            return error.cause  # the task error's own text holds a stack trace
        return error

    def _timeout(self, seconds: float) -> ServiceError:
        within = f" within {seconds:g} s" if seconds else " in time"
        return OutOfTime(f"the {self.name} did not answer{within}", self._retry_after_s)


class Roll:
    """Whether a deployment has a replica.  Serve keeps a call waiting until one comes, however long
    that takes.

    Args:
        handle: of the deployment.
        cheap: a method without arguments that costs nothing.
    """

    def __init__(self, handle: DeploymentHandle[Any], cheap: str) -> None:
        self._handle, self._cheap = handle, cheap
        self._asked: asyncio.Task[None] | None = None
        self._at = float("-inf")

    async def beside(self, call: Awaitable[T]) -> T:
        """The result of ``call``, for as long as there is a replica.

        Raises:
            DeploymentUnavailableError: there is none.
        """
        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({task}, timeout=_PATIENCE_S))[0]:
                await self.check()
            return await task
        finally:
            task.cancel()

    async def check(self) -> None:
        """Ask all replicas, once a second for all who want to know.

        Raises:
            DeploymentUnavailableError: there is none.
        """
        if self._asked is None or (self._asked.done() and time.monotonic() - self._at >= 1):
            self._asked, self._at = asyncio.create_task(self._ask()), time.monotonic()
            # Whoever waits hears of it; if they all went away, nobody needs to.
            self._asked.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait({self._asked}, timeout=_PATIENCE_S)
        if self._asked.done():
            self._asked.result()

    async def _ask(self) -> None:
        for _ in range(_TRIES):
            try:
                await self._handle.broadcast(self._cheap).results_async(timeout_s=5)
                return
            except DeploymentUnavailableError:
                raise
            except _LOST:  # asked again, without the one that is known to be dead now
                continue
            except Exception:  # one is there, and busy or at fault: the call itself will tell
                return


async def _finished(response: Any, timeout_s: float, there: Roll) -> bool:
    """Whether a call ends, well or not, in time; it is cancelled if it does not, or if the client
    went away.

    Raises:
        DeploymentUnavailableError: there is no replica that it could reach.
    """

    async def settle() -> None:
        with contextlib.suppress(Exception):
            await response

    # Not wait_for: what it cancels answers with an exception of Serve's own, which would hide the
    # time-out.
    task = asyncio.create_task(settle())
    deadline = time.monotonic() + timeout_s
    try:
        while not task.done() and (left_s := deadline - time.monotonic()) > 0:
            await asyncio.wait({task}, timeout=min(_PATIENCE_S, left_s))
            if not task.done() and left_s > _PATIENCE_S:
                await there.check()
    except (asyncio.CancelledError, DeploymentUnavailableError):
        response.cancel()
        raise
    if not task.done():
        response.cancel()
    return task.done()
