"""What the routes call: search over all shards, answers, changes of the index; over any
:mod:`serve.replicas.targets`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from invar_ray.errors import ConfigError, InvarError, RequestError
from serve.errors import Conflict, ServiceError, Unavailable
from serve.record import Desired, RecordFile, named_index
from serve.records import (
    Context,
    Embedded,
    Found,
    GeneratorStatus,
    Prepared,
    Question,
    ReplicaStatus,
    Reply,
    Serving,
)
from serve.replicas.targets import Target
from serve.stability import pair_overlap, rewrite
from serve.telemetry.metrics import Meter
from serve.telemetry.tracing import Tracer

logger = logging.getLogger("ray.serve")
_CHANGE_S = 600.0  # longest that loading and probing an index may take


class Service:
    """The whole service behind its routes.

    Args:
        shards: one target per shard of the index; all of one encoder.
        generator: the target that answers.
        configured: index URI of each shard, as deployed.
        record: where changes of the index are written down; ``None`` refuses changes.
        shard_timeout_s: longest wait for one shard; a slower one is missing from the result.
        stability_share: share of the answers whose stability is measured in the background, 0 to 1.
    """

    def __init__(
        self,
        shards: Sequence[Target],
        generator: Target,
        *,
        configured: Sequence[str] = (),
        record: RecordFile | None = None,
        shard_timeout_s: float = 5.0,
        retry_after_s: float = 1.0,
        stability_share: float = 0.0,
        meter: Meter | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._shards, self._generator = list(shards), generator
        self._configured, self._record = tuple(configured), record
        self._shard_timeout_s, self._retry_after_s = shard_timeout_s, retry_after_s
        self._stability_share = stability_share
        self.meter, self.tracer = meter or Meter(), tracer or Tracer()
        self._changing = asyncio.Lock()
        self._requested: tuple[str, ...] | None = None
        self._error: str | None = None
        self._ready_at = float("-inf")
        self._background: set[asyncio.Task[None]] = set()

    # Requests

    async def retrieve(self, question: str, top_k: int, context: Context) -> Found:
        """The best passages for a question among those that ``context.where`` allows, from all
        shards that answer in time.

        Raises:
            RequestError: a condition names no column of the passages.
        """
        where = context.where or None
        if len(self._shards) == 1:
            arguments = question, top_k, context.left_s, context.trace, where
            found: Found = await self._shards[0].call("retrieve", *arguments, left_s=context.left_s)
            return found
        embedded = await self.embed([question], "query", context)
        left_s = min(self._shard_timeout_s, context.left_s)
        calls = [
            shard.call(
                "retrieve", embedded.vectors[0], top_k, left_s, context.trace, where, left_s=left_s
            )
            for shard in self._shards
        ]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        good = [outcome for outcome in outcomes if isinstance(outcome, Found)]
        missing = tuple(
            str(number) for number, outcome in enumerate(outcomes) if not isinstance(outcome, Found)
        )
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                logger.warning(
                    "request %s: shard %d did not answer: %r", context.request_id, number, outcome
                )
        refused = [outcome for outcome in outcomes if isinstance(outcome, RequestError)]
        if (
            refused
        ):  # the request's fault, not the shard's: it must not pass for one that is missing
            raise refused[0]
        if not good:
            raise Unavailable("no shard of the index answered", self._retry_after_s)
        return merge(good, top_k, missing, embedded.versions)

    async def embed(
        self, texts: list[str], kind: Literal["query", "passage"], context: Context
    ) -> Embedded:
        """Vectors of texts by the index's encoder, which all shards have: any of them will do."""
        order = random.sample(self._shards, len(self._shards))
        for last, shard in zip([False] * (len(order) - 1) + [True], order, strict=True):
            try:
                embedded: Embedded = await shard.call(
                    "embed", texts, kind, context.trace, left_s=context.left_s
                )
                return embedded
            except ServiceError:
                if last:
                    raise
        raise AssertionError("there is at least one shard")

    async def answer(self, question: Question, context: Context) -> Reply:
        """The answer to a question from its passages."""
        sent = replace(question, left_s=context.left_s, trace=context.trace)
        reply: Reply = await self._generator.call("answer", sent, left_s=context.left_s)
        self._sample_stability(question, context)
        return reply

    async def stream(self, question: Question, context: Context) -> AsyncIterator[str | Reply]:
        """Pieces of the model's text, then the reply; closing the iterator stops the model."""
        sent = replace(question, left_s=context.left_s, trace=context.trace)
        items = self._generator.stream("stream", sent, left_s=context.left_s)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()  # type: ignore[attr-defined]
        self._sample_stability(question, context)

    # State

    async def describe(self) -> Serving:
        """What every replica serves."""
        jobs = [shard.broadcast("describe", timeout_s=30) for shard in self._shards]
        *shards, answering = await asyncio.gather(
            *jobs, self._generator.call("describe_generator", left_s=30)
        )
        generator: GeneratorStatus = answering
        replicas: list[ReplicaStatus] = [replica for shard in shards for replica in shard]
        record = await asyncio.to_thread(self._read)
        failed = [each for each in replicas if each.error]
        return Serving(
            requested_uri=_joined(
                {(each.shard, each.requested_uri) for each in failed or replicas}
            ),
            active_uri=_joined({(each.shard, each.active_uri) for each in replicas}),
            error=failed[0].error if failed else None,
            replicas=tuple(replicas),
            history=tuple(",".join(entry) for entry in record.history),
            generator=generator,
            versions={**_versions([each.versions for each in replicas]), **generator.versions},
        )

    async def check(self) -> None:
        """Search every shard and generate a token.  A success counts for a second: anyone may ask,
        and it costs.

        Raises:
            ServiceError: 503, whatever is wrong.
        """
        if time.monotonic() - self._ready_at < 1.0:
            return
        try:
            context = Context(deadline=time.monotonic() + 30)
            checks = [shard.call("check_health", left_s=context.left_s) for shard in self._shards]
            await asyncio.gather(
                *checks, self._generator.call("check_generator", left_s=context.left_s)
            )
        except ServiceError:
            raise
        except Exception as error:
            logger.exception("not ready")
            raise Unavailable("a health check failed", self._retry_after_s) from error
        self._ready_at = time.monotonic()

    # Changes of the index

    async def change_index(self, uris: Sequence[str] | None) -> Serving:
        """Serve other indexes, one per shard; ``None`` goes back to those before.

        Every replica loads and probes its new index beside the old one; only once all have it ready
        is the change written down and made.  A failure anywhere leaves everything as it was.

        Returns:
            What :meth:`describe` gives, with the report of the shadow search.

        Raises:
            RequestError: for another number of indexes than of shards, or with nothing to go back
                to.
            ServiceError: 409 if a replica cannot serve its index, or another change is under way.
        """
        if self._record is None:
            raise Conflict("this service keeps no record of its index, so it cannot change it")
        if self._changing.locked():
            raise Conflict("another change of the index is under way", self._retry_after_s)
        async with self._changing:
            record = await asyncio.to_thread(self._read)
            if uris is not None and len(uris) != len(self._shards):
                raise RequestError(
                    f"index_uri names {len(uris)} indexes",
                    expected=f"{len(self._shards)}, one per shard",
                )
            if uris is None and not record.history:
                raise RequestError(
                    "there is no earlier index to go back to", action="name one with index_uri"
                )
            wanted = record.rolled_back() if uris is None else record.changed(tuple(uris))
            report = await self._prepare(wanted.index)
            if wanted.index != record.index:
                await asyncio.to_thread(self._record.write, wanted)
            try:
                await self._everywhere("activate", [(uri,) for uri in wanted.index])
            except (
                ServiceError
            ) as error:  # it is written down: who missed it reads it at the next health check
                logger.warning("not every replica could be told of the change: %s", error.message)
            self.meter.record("invar_index_changes_total", outcome="changed")
            logger.info("the index is now %s", ",".join(wanted.index))
            return replace(await self.describe(), report=report)

    async def _prepare(self, uris: Sequence[str]) -> dict[str, Any]:
        prepared: list[Prepared] = [
            each
            for shard in await self._everywhere("prepare", [(uri,) for uri in uris])
            for each in shard
        ]
        errors = [each.error for each in prepared if each.error is not None]
        if errors:
            await self._everywhere("discard", [(uri, errors[0]) for uri in uris])
            self.meter.record("invar_index_changes_total", outcome="refused")
            raise Conflict(f"the index was not changed: {errors[0]}")
        return {
            "replicas": len(prepared),
            **next((each.report for each in prepared if each.report), {}),
        }

    async def _everywhere(
        self, method: str, arguments: Sequence[tuple[Any, ...]]
    ) -> list[list[Any]]:
        jobs = [
            shard.broadcast(method, *each, timeout_s=_CHANGE_S)
            for shard, each in zip(self._shards, arguments, strict=True)
        ]
        return list(await asyncio.gather(*jobs))

    async def follow(self, uri: str) -> None:
        """Serve the index that ``uri`` names, if it is new; errors are logged.

        Args:
            uri: published versions (``<root>/published/<name>``), or a file with a line per shard.
        """
        try:
            wanted = await asyncio.to_thread(named_index, uri)
            if wanted in {self._requested, (await asyncio.to_thread(self._read)).index}:
                return
            self._requested = wanted  # a broken one is tried once, not at every look
            await self.change_index(wanted)
        except (OSError, UnicodeDecodeError, InvarError, ServiceError) as error:
            logger.warning(
                "the index that %s names is not served: %s", uri, getattr(error, "message", error)
            )

    def _read(self) -> Desired:
        plain = Desired(self._configured, self._configured)
        return plain if self._record is None else self._record.read(self._configured)

    # Live stability

    def _sample_stability(self, question: Question, asked: Context) -> None:
        if (
            random.random() < self._stability_share and not self._background
        ):  # one at a time: it is not worth a queue
            task = asyncio.create_task(self._measure_stability(question, asked))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _measure_stability(self, question: Question, asked: Context) -> None:
        with contextlib.suppress(InvarError, ServiceError):
            other = rewrite(question.text, 1, random.randrange(1 << 30))
            if other:
                context = Context("stability", time.monotonic() + 30, where=asked.where)
                top_k = max(1, len(question.hits))
                mine = await self.retrieve(question.text, top_k, context)
                found = await self.retrieve(other[0].text, top_k, context)
                self.meter.record(
                    "invar_stability_overlap", pair_overlap(mine.hits, found.hits, top_k)
                )


def merge(
    found: Sequence[Found], top_k: int, missing: tuple[str, ...], encoded_by: dict[str, str]
) -> Found:
    """The best of all shards' passages by score (cosines of one encoder compare across shards).

    Raises:
        ConfigError: if a shard belongs to another encoder than the one that made the query's
            vector.
    """
    for each in found:
        if each.versions.get("encoder") != encoded_by.get("encoder"):
            raise ConfigError(
                f"index {each.versions.get('index')} belongs to encoder "
                f"{each.versions.get('encoder')}, the query was "
                f"encoded by {encoded_by.get('encoder')}",
                expected="shards of one encoder",
            )
    hits = sorted(
        (hit for each in found for hit in each.hits), key=lambda hit: (-hit.score, hit.passage_id)
    )[:top_k]
    ranked = tuple(replace(hit, rank=rank) for rank, hit in enumerate(hits, start=1))
    return Found(ranked, _versions([each.versions for each in found]), missing)


def _versions(given: Sequence[dict[str, str]]) -> dict[str, str]:
    names = sorted({name for versions in given for name in versions})
    return {name: "+".join(dict.fromkeys(v[name] for v in given if name in v)) for name in names}


def _joined(uris_of_shards: Iterable[tuple[str, str]]) -> str:
    return ",".join(uri for _, uri in sorted(uris_of_shards))
