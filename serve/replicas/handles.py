"""Serve's deployments as the service asks them: deadlines, one more try where a replica died, clear
errors in place of Ray's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

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
_TRIES = 3
_LOST = (RayActorError, ReplicaUnavailableError)


class Handle:
    """The replicas of a deployment, as the service asks them.

    Args:
        name: for messages.
        handle: from ``bind``.
        retry_after_s: when a client may try again, in seconds.
    """

    def __init__(
        self, name: str, handle: DeploymentHandle[Any], retry_after_s: float, meter: Meter
    ) -> None:
        self.name, self._handle, self._retry_after_s, self._meter = (
            name,
            handle,
            retry_after_s,
            meter,
        )

    async def call(self, method: str, *args: Any, left_s: float) -> Any:
        """See :class:`serve.replicas.targets.Target`."""

        async def once() -> Any:
            response = getattr(self._handle, method).remote(*args)
            if not await _finished(response, left_s):
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
            return await asyncio.wait_for(anext(items), patience)

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


async def _finished(response: Any, timeout_s: float) -> bool:
    """Whether a call ends, well or not, in time; it is cancelled if it does not, or if the client
    went away.
    """

    async def settle() -> None:
        with contextlib.suppress(Exception):
            await response

    # Not wait_for: what it cancels answers with an exception of Serve's own, which would hide the
    # time-out.
    task = asyncio.create_task(settle())
    try:
        done, _ = await asyncio.wait({task}, timeout=max(0.0, timeout_s))
    except asyncio.CancelledError:
        response.cancel()
        raise
    if not done:
        response.cancel()
    return bool(done)
