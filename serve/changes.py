"""Changes of the index as jobs: begun by one request, looked at and cancelled by others.

A change goes on when the client that asked for it is gone.  Its state also lies beside the
versions, so that every HTTP replica can tell it::

    <root>/published/<name>/changes/<id>.json
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from invar_ray.errors import InvarError, RequestError
from serve.errors import Conflict, Fault, NotFound, ServiceError, plain
from serve.index import ServedIndex
from serve.versions import Current

logger = logging.getLogger("ray.serve")
_BEAT_S = 2.0  # the state is written, and a cancellation looked for, this often
_LOST_S = 30.0  # after so long without a beat nobody works on it any more
_KEPT = 50
State = Literal["running", "done", "refused", "cancelled", "lost"]


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the index.

    Attributes:
        state: ``lost`` where the replica died that worked on it: ``GET /v1/index`` says what came
            of it.
        step: what is being done: ``loading`` (every replica loads and tries it), ``publishing``,
            ``switching``.
        code, error: of the refusal, as a response would have them.
        report: of the shadow search.
        begun, updated: Unix seconds.
    """

    id: str
    state: State = "running"
    step: str = "loading"
    code: str | None = None
    error: str | None = None
    report: dict[str, Any] = field(default_factory=dict)
    begun: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)


class Changes:
    """The changes of one service.

    Args:
        index: what is changed.
        current: beside its versions their states are written; a store that cannot be written costs
            the other HTTP replicas their sight, not the change.
    """

    def __init__(self, index: ServedIndex, current: Current | None) -> None:
        self._index, self._current = index, current
        self._known: dict[str, Change] = {}
        self._tasks: dict[str, asyncio.Task[dict[str, Any]]] = {}

    def begin(self, uris: Sequence[str] | None, mend: bool = False) -> Change:
        """Begin a change; see :meth:`serve.index.ServedIndex.change`, and its ``mend``.

        Raises:
            RequestError, Conflict: what can be refused without looking at anything.
        """
        self._index.accept(uris)
        # Not whether its task has ended: that still writes the state which everybody may read.
        if any(self._known[name].state == "running" for name in self._tasks):
            raise Conflict("another change of the index is under way", 1.0)
        change = Change(uuid.uuid4().hex)
        self._known[change.id] = change
        self._known = dict(list(self._known.items())[-_KEPT:])
        self._tasks = {change.id: asyncio.create_task(self._run(change.id, uris, mend))}
        return change

    async def wait(self, identifier: str) -> dict[str, Any]:
        """The report of a change that :meth:`begin` began here; the change goes on where the one
        who waits is cancelled.

        Raises:
            RequestError, ServiceError: why it was not made.
        """
        return await asyncio.shield(self._tasks[identifier])

    async def see(self, identifier: str) -> Change:
        """How far a change is.

        Raises:
            NotFound: there is none of that name.
        """
        if identifier in self._known:
            return self._known[identifier]
        values = await self._stored(f"{identifier}.json")
        if values is None:
            raise NotFound("there is no such change of the index")
        change = Change(**values)
        if change.state == "running" and time.time() - change.updated > _LOST_S:
            return replace(change, state="lost")
        return change

    async def cancel(self, identifier: str) -> Change:
        """Stop a change that has not been published.

        Raises:
            NotFound: there is none of that name.  Conflict: it is too late.
        """
        change = await self.see(identifier)
        if change.state != "running" or change.step != "loading":
            raise Conflict(f"the change is {change.state} ({change.step}): too late to cancel it")
        task = self._tasks.get(identifier)
        if task is None:  # another HTTP replica's
            await self._store(f"{identifier}.cancel", {"at": time.time()})
            return change
        task.cancel()
        await asyncio.wait({task})
        return self._known[identifier]

    async def _run(self, identifier: str, uris: Sequence[str] | None, mend: bool) -> dict[str, Any]:
        def step(name: str) -> None:
            self._set(identifier, step=name)

        await self._save(identifier)
        beat = asyncio.create_task(self._beat(identifier))
        try:
            report = await (self._index.mend(step) if mend else self._index.change(uris, step))
            self._set(identifier, state="done", report=report)
            return report
        except asyncio.CancelledError:
            self._set(identifier, state="cancelled")
            raise Conflict("the change of the index was cancelled") from None
        except Exception as error:
            if not isinstance(error, (RequestError, ServiceError)):
                logger.exception("the index was not changed")
            fault = Fault.of(error)
            self._set(identifier, state="refused", code=fault.code, error=fault.message)
            raise
        finally:
            beat.cancel()
            self._tasks[identifier].add_done_callback(lambda done: done.exception())
            await self._save(identifier)

    async def _beat(self, identifier: str) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            await self._save(identifier)
            cancelled = await self._stored(f"{identifier}.cancel") is not None
            if cancelled and self._known[identifier].step == "loading":
                self._tasks[identifier].cancel()

    def _set(self, identifier: str, **values: Any) -> None:
        self._known[identifier] = replace(self._known[identifier], updated=time.time(), **values)

    async def _save(self, identifier: str) -> None:
        change = replace(self._known[identifier], updated=time.time())
        await self._store(f"{identifier}.json", asdict(change))

    async def _store(self, name: str, values: dict[str, Any]) -> None:
        if self._current is None:
            return
        try:
            await asyncio.to_thread(self._current.write_change, name, values)
        except (InvarError, OSError) as error:
            logger.warning("the state of a change is not written: %s", plain(str(error)))

    async def _stored(self, name: str) -> dict[str, Any] | None:
        if self._current is None:
            return None
        try:
            return await asyncio.to_thread(self._current.read_change, name)
        except (InvarError, OSError, ValueError) as error:
            logger.warning("the state of a change is not read: %s", plain(str(error)))
            return None
