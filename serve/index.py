"""The index of a running service: what its replicas serve, changes of it, and the published
versions that it follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

from invar_ray.errors import ConflictError, InvarError, RequestError
from invar_ray.store.publication import Version
from serve.errors import Conflict, ServiceError, Unavailable, plain
from serve.records import Prepared, ReplicaStatus
from serve.replicas.targets import Target
from serve.telemetry.metrics import Meter
from serve.versions import Current, Newest

logger = logging.getLogger("ray.serve")
_CHANGE_S = 600.0  # longest that loading and probing an index may take
_AGAIN_S = 10.0  # until a version that was refused is tried again; doubled each time


class ServedIndex:
    """The index on all replicas of all shards.

    Args:
        shards: one target per shard.
        current: the published versions, which changes of the index are written to; ``None`` refuses
            changes.
        retry_after_s: when a client that was refused may try again, in seconds.
        again_s: until a published version that was refused is tried again, in seconds; doubled with
            each refusal.
        differ_s: how long replicas may differ before the service is not ready, in seconds: the
            longest that a change may take.
    """

    def __init__(
        self,
        shards: Sequence[Target],
        current: Current | None,
        meter: Meter,
        *,
        retry_after_s: float = 1.0,
        again_s: float = _AGAIN_S,
        differ_s: float = _CHANGE_S,
    ) -> None:
        self._shards, self.current, self._meter = shards, current, meter
        self._retry_after_s, self._again_s, self._differ_s = retry_after_s, again_s, differ_s
        self._changing = asyncio.Lock()
        self._retry = _Retry()
        self._agreed = 0  # number of the last version that all replicas were seen to serve
        self._differ_at: float | None = None

    def check(self) -> None:
        """Whether all replicas serve one version.

        Raises:
            Unavailable: not for longer than a change may take.
        """
        differ_at = self._differ_at
        if differ_at is not None and time.monotonic() - differ_at >= self._differ_s:
            raise Unavailable(
                "the replicas do not serve one version of the index", self._retry_after_s
            )

    async def observe(self) -> Seen:
        """What the replicas serve and what is published; remembers since when replicas differ."""
        shards = await asyncio.gather(
            *(shard.broadcast("describe", timeout_s=30) for shard in self._shards)
        )
        replicas: tuple[ReplicaStatus, ...] = tuple(each for shard in shards for each in shard)
        seen = Seen(replicas, [Counter(each.active_uri for each in shard) for shard in shards])
        since = [each.since for each in replicas if each.since is not None]
        if self.current is not None:
            try:
                newest = await asyncio.to_thread(self.current.newest)
                newer = newest and since and newest.decided > max(since)
                if newest and (newer or newest.index == seen.active):
                    earlier = await asyncio.to_thread(self.current.earlier, newest)
                    seen = replace(seen, number=newest.version.number, newest=newest)
                    seen = replace(seen, earlier=tuple(earlier))
                elif newest:
                    seen = replace(seen, number=newest.version.number)
            except (InvarError, OSError) as error:
                seen = replace(seen, unread=f"the published versions are not known: {error}")
        if seen.active is not None and len(since) == len(replicas) and not seen.mixed:
            self._differ_at = None
        elif self._differ_at is None:
            self._differ_at = time.monotonic()
        return seen

    def accept(self, uris: Sequence[str] | None) -> tuple[str, ...] | None:
        """The indexes of a change as the store writes them; nothing is read.

        Raises:
            RequestError: for another number of indexes than of shards, or one that lies elsewhere.
            Conflict: the service keeps no versions, or another change is under way.
        """
        if self.current is None:
            raise Conflict("this service keeps no record of its index, so it cannot change it")
        if self._changing.locked():
            raise Conflict("another change of the index is under way", self._retry_after_s)
        if uris is None:
            return None
        if len(uris) != len(self._shards):
            raise RequestError(
                f"index_uri names {len(uris)} indexes",
                expected=f"{len(self._shards)}, one per shard",
            )
        return tuple(map(self.current.own, uris))

    async def change(
        self, uris: Sequence[str] | None, step: Callable[[str], None] = lambda name: None
    ) -> dict[str, Any]:
        """Serve other indexes, one per shard; ``None`` goes back to those before.

        Every replica loads and probes its new index beside the old one; only once all have it ready
        is the change published and made.  A failure anywhere leaves everything as it was, and so
        does a cancellation before it is published.

        Args:
            step: told what is being done: ``publishing``, then ``switching``.

        Returns:
            The report of the shadow search.

        Raises:
            RequestError: for another number of indexes than of shards, or with nothing to go back
                to.
            ServiceError: 409 if a replica cannot serve its index, another change is under way, or
                another writer published meanwhile; 503 if the published versions cannot be read.
        """
        wanted = self.accept(uris)
        assert self.current is not None
        async with self._changing:
            seen = await self.observe()
            if seen.unread is not None:
                raise Unavailable(seen.unread, self._retry_after_s)
            if wanted is None and not seen.earlier:
                raise RequestError(
                    "there is no earlier index to go back to", action="name one with index_uri"
                )
            if wanted is None:
                target, index = seen.earlier[0]
                write = partial(self.current.rollback, target.number, seen.number)
            else:
                index = wanted
                # What is served by configuration is published before it is left: one can go back.
                served = None if seen.newest else seen.active
                write = partial(self.current.publish, index, seen.number, served)
            try:
                report = await self._prepare(index)
            except asyncio.CancelledError:
                # Each replica forgets it once it is loaded; nobody waits for that.
                why = "the change was cancelled"
                self._forgetting = asyncio.create_task(self._forget(index, why))
                raise
            return await asyncio.shield(self._publish(seen, index, write, report, step))

    async def mend(self, step: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
        """Pass over a damaged record of the newest version, see
        :meth:`invar_ray.store.published.Published.mend`, and serve what is current then.

        Args:
            step: see :meth:`change`.

        Returns:
            The report of the shadow search.

        Raises:
            RequestError: nothing is damaged.
            ServiceError: 409 if a replica cannot serve that version (the record stands, and it is
                tried again as any that is published), or another writer was faster; 503 if no
                record can be read.
        """
        self.accept(None)
        assert self.current is not None
        async with self._changing:
            step("publishing")  # from here on it is too late to cancel
            try:
                mended = await asyncio.to_thread(self.current.mend)
            except ConflictError as error:
                raise Conflict(plain(str(error))) from error
            except (InvarError, OSError) as error:
                raise Unavailable(plain(str(error)), self._retry_after_s) from error
            if not mended:
                raise RequestError("no record of the published versions is damaged")
            seen = await self.observe()
            if seen.newest is None:
                return {}
            report = await self._prepare(seen.newest.index)
            step("switching")
            await self._activate(seen.newest.index)
            return report

    async def _publish(
        self,
        seen: Seen,
        index: tuple[str, ...],
        write: Callable[[], Any],
        report: dict[str, Any],
        step: Callable[[str], None],
    ) -> dict[str, Any]:
        step("publishing")
        if index != (seen.newest.index if seen.newest else seen.active):
            try:
                await asyncio.to_thread(write)
            except (InvarError, OSError) as error:
                await self._refuse(index, str(error), error)
        step("switching")
        await self._activate(index)
        return report

    async def _forget(self, uris: Sequence[str], why: str) -> None:
        with contextlib.suppress(ServiceError):
            await self._everywhere("discard", [(uri, why) for uri in uris])
        self._meter.record("invar_index_changes_total", outcome="refused")

    async def _prepare(self, uris: Sequence[str]) -> dict[str, Any]:
        prepared: list[Prepared] = [
            each
            for shard in await self._everywhere("prepare", [(uri,) for uri in uris])
            for each in shard
        ]
        errors = [each.error for each in prepared if each.error is not None]
        if errors:
            await self._refuse(uris, errors[0])
        return {
            "replicas": len(prepared),
            **next((each.report for each in prepared if each.report), {}),
        }

    async def _refuse(
        self, uris: Sequence[str], why: str, cause: Exception | None = None
    ) -> NoReturn:
        await self._everywhere("discard", [(uri, why) for uri in uris])
        self._meter.record("invar_index_changes_total", outcome="refused")
        raise Conflict(f"the index was not changed: {why}") from cause

    async def _activate(self, uris: Sequence[str]) -> None:
        try:
            await self._everywhere("activate", [(uri,) for uri in uris])
        except ServiceError as error:  # it is published: who missed it is told at the next look
            logger.warning("not every replica could be told of the change: %s", error.message)
        self._meter.record("invar_index_changes_total", outcome="changed")
        logger.info("the index is now %s", plain(",".join(uris)))

    async def _everywhere(
        self, method: str, arguments: Sequence[tuple[Any, ...]]
    ) -> list[list[Any]]:
        jobs = [
            shard.broadcast(method, *each, timeout_s=_CHANGE_S)
            for shard, each in zip(self._shards, arguments, strict=True)
        ]
        return list(await asyncio.gather(*jobs))

    async def follow(self) -> None:
        """Bring every replica to the published version, if it is newer than the deployment.

        Called now and then; errors are logged.  All replicas try it before any switches.  What was
        refused is tried again, each time after twice as long; until then the replicas serve one
        version, the one that most of them have.
        """
        if self._changing.locked():
            return
        try:
            seen = await self.observe()
            if seen.unread is not None:
                logger.warning("%s", plain(seen.unread))
            if seen.newest is not None:
                await self._converge(seen, seen.newest)
        except Unavailable as error:  # replicas that start: their own state says whether they came
            logger.info("the published version is not looked at yet: %s", error)
        except Exception as error:  # whatever it was, the next look comes
            logger.warning("the published version is not served: %s", plain(str(error)))

    async def _converge(self, seen: Seen, newest: Newest) -> None:
        if self._retry.number != newest.decided:
            self._retry = _Retry(newest.decided)
        if seen.active == newest.index:
            self._retry, self._agreed = _Retry(newest.decided), newest.decided
            return
        async with self._changing:
            assert self.current is not None
            if await asyncio.to_thread(self.current.newest) != newest:
                return  # changed meanwhile
            if time.monotonic() >= self._retry.at:
                try:
                    if len(newest.index) != len(self._shards):
                        raise Conflict(
                            f"version {newest.version.number} has {len(newest.index)} shards, the "
                            f"service {len(self._shards)}"
                        )
                    await self._prepare(newest.index)
                    await self._activate(newest.index)
                    return
                except Conflict as error:
                    self._retry = replace(self._retry, error=error.message)
                    logger.warning("version %d: %s", newest.version.number, plain(error.message))
                finally:  # from its end: else the next follows at once a try that takes longer
                    self._retry = self._retry.after(self._again_s)
            await self._settle(seen, newest)

    async def _settle(self, seen: Seen, newest: Newest) -> None:
        """One version for all, while the newest cannot be had everywhere."""
        if not seen.mixed and seen.active is not None:
            return
        wanted = seen.share(newest.index)
        if self._agreed == newest.decided and wanted[0] > 0:
            return  # all had it before: the replica that has not will get it
        others = [index for index in seen.indexes if index != newest.index]
        best = max(others, key=seen.share, default=())
        if seen.share(best) >= max(wanted, (0, 1)):
            logger.warning("until then all replicas serve %s", plain(",".join(best)))
            await self._prepare(best)
            await self._activate(best)
            await self._everywhere("discard", [(uri, self._retry.error) for uri in newest.index])


@dataclass(frozen=True, slots=True)
class _Retry:
    """When a version that was refused is tried again.

    Attributes:
        number: of the version.
        tries: how often it was refused.
        at: when it may be tried, on ``time.monotonic``.
        error: why it was refused.
    """

    number: int = 0
    tries: int = 0
    at: float = float("-inf")
    error: str = "it was refused"

    def after(self, again_s: float) -> _Retry:
        """With one more try."""
        wait_s = min(again_s * 2.0**self.tries, _CHANGE_S)
        return replace(self, tries=self.tries + 1, at=time.monotonic() + wait_s)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the replicas serve, and what is published.

    Attributes:
        shards: how many replicas of each shard search which index.
        number: of the newest version (0: none).
        newest: that version, if it overrules the configuration.
        earlier: versions that one can go back to from there, newest first.
        unread: why the versions are not known.
    """

    replicas: tuple[ReplicaStatus, ...]
    shards: Sequence[Counter[str]]
    number: int = 0
    newest: Newest | None = None
    earlier: tuple[tuple[Version, tuple[str, ...]], ...] = ()
    unread: str | None = None

    @property
    def active(self) -> tuple[str, ...] | None:
        """The index that all replicas search, one URI a shard; ``None`` where they differ."""
        if any(len(uris) != 1 for uris in self.shards):
            return None
        return tuple(next(iter(uris)) for uris in self.shards)

    @property
    def indexes(self) -> list[tuple[str, ...]]:
        """Indexes whose shards belong together: published ones, newest first, then what each shard
        is configured to serve, if its replicas say the same.
        """
        newest = [self.newest.index] if self.newest else []
        configured = sorted({(int(each.shard), each.configured) for each in self.replicas})
        known = [
            *newest,
            *(index for _, index in self.earlier),
            tuple(uri for _, uri in configured),
        ]
        return [index for index in known if len(index) == len(self.shards)]

    @property
    def mixed(self) -> bool:
        """Whether the shards search indexes that do not belong together."""
        return len(self.shards) > 1 and self.active is not None and self.active not in self.indexes

    def share(self, index: tuple[str, ...]) -> tuple[int, int]:
        """How many replicas search this index: of the shard with the fewest, and of all."""
        if len(index) != len(self.shards):
            return 0, 0
        counts = [uris[uri] for uris, uri in zip(self.shards, index, strict=True)]
        return min(counts), sum(counts)
