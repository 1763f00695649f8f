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
from typing import Literal

from invar_ray.answering.fusion import (
    fuse_hits,
    fuse_lists,
    fusion_depth,
    read_with_title,
    reordered,
)
from invar_ray.config import SearchConfig
from invar_ray.errors import ConfigError, InvarError, RequestError
from invar_ray.schema import Hit, Mode
from serve.changes import Change, Changes
from serve.errors import NotFound, OutOfTime, ServiceError, Unavailable
from serve.index import ServedIndex
from serve.line import Line
from serve.records import (
    Context,
    Embedded,
    Found,
    GeneratorStatus,
    Question,
    Reply,
    Scored,
    Serving,
)
from serve.replicas.targets import Target
from serve.stability import pair_overlap, rewrite
from serve.telemetry.metrics import Meter
from serve.telemetry.tracing import Tracer

logger = logging.getLogger("ray.serve")


class Service:
    """The whole service behind its routes.

    Args:
        shards: one target per shard of the index; all of one encoder.
        generator: the target that answers.
        reranker: the target that sorts the best hits anew; ``None``: they stay as they were found.
        rerank_depth: how many of them it reads.
        index: the index of the shards, and changes of it; ``None``: one that is not changed.
        shard_timeout_s: longest wait for one shard; a slower one is missing from the result.
        stability_share: share of the answers whose stability is measured in the background, 0 to 1.
    """

    def __init__(
        self,
        shards: Sequence[Target],
        generator: Target,
        index: ServedIndex | None = None,
        *,
        reranker: Target | None = None,
        rerank_depth: int = SearchConfig.rerank_depth,
        shard_timeout_s: float = 5.0,
        retry_after_s: float = 1.0,
        stability_share: float = 0.0,
        meter: Meter | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._shards, self._generator = list(shards), generator
        self._reranker, self._rerank_depth = reranker, rerank_depth
        self._shard_timeout_s, self._retry_after_s = shard_timeout_s, retry_after_s
        self._stability_share = stability_share
        self.meter, self.tracer = meter or Meter(), tracer or Tracer()
        self.index = index or ServedIndex(self._shards, None, self.meter)
        self.changes = Changes(self.index, self.index.current)
        self._line = Line()
        self._ready_at = float("-inf")
        self._background: set[asyncio.Task[None]] = set()

    # Requests

    async def retrieve(self, question: str, top_k: int, context: Context) -> Found:
        """The best passages for a question among those that ``context.where`` allows, from all
        shards that answer in time; sorted by the reranker, where there is one.

        Raises:
            RequestError: a condition names no column of the passages, or the mode asks for BM25 and
                an index has none.
        """
        if self._reranker is None:
            return await self._search(question, top_k, context)
        found = await self._search(question, max(top_k, self._rerank_depth), context)
        scored = await self.score(question, [*map(read_with_title, found.hits)], context)
        hits = tuple(reordered(found.hits, scored.scores, top_k))
        return replace(found, hits=hits, versions=found.versions | scored.versions)

    async def score(self, question: str, texts: list[str], context: Context) -> Scored:
        """How relevant texts are to a question, by the reranker.

        Raises:
            NotFound: the service has none.
        """
        if self._reranker is None:
            raise NotFound("this service has no reranker; search.reranker of a recipe names one")
        scored: Scored = await self._reranker.call(
            "score", question, texts, context.left_s, context.trace, left_s=context.left_s
        )
        return scored

    async def _search(self, question: str, top_k: int, context: Context) -> Found:
        where, mode = context.where or None, context.mode
        if len(self._shards) == 1:
            arguments = question, top_k, context.left_s, context.trace, where, mode
            found: Found = await self._shards[0].call("retrieve", *arguments, left_s=context.left_s)
            return found
        embedded = None if mode == "bm25" else await self.embed([question], "query", context)
        left_s = min(self._shard_timeout_s, context.left_s)
        vector = None if embedded is None else embedded.vectors[0]
        arguments_of_all = question, top_k, left_s, context.trace, where, mode, vector
        calls = [shard.call("retrieve", *arguments_of_all, left_s=left_s) for shard in self._shards]
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
        # the request's fault, not the shard's: it must not pass for one that is missing
        if refused:
            raise refused[0]
        if not good:
            if all(isinstance(outcome, OutOfTime) for outcome in outcomes):
                raise OutOfTime("no shard of the index answered in time", self._retry_after_s)
            raise Unavailable("no shard of the index answered", self._retry_after_s)
        encoded_by = good[0].versions if embedded is None else embedded.versions
        return merge(good, top_k, missing, encoded_by)

    async def retrieve_follow_up(
        self, read_as: str, question: str, top_k: int, context: Context
    ) -> Found:
        """As :meth:`retrieve`, for a question that was made to stand alone: found in those words,
        with what the words as asked find weighing half as much.
        """
        made, asked = await asyncio.gather(
            self.retrieve(read_as, top_k, context), self.retrieve(question, top_k, context)
        )
        if made.versions != asked.versions:  # the index changed between the two
            return made
        return replace(made, hits=tuple(fuse_hits([made.hits, made.hits, asked.hits], top_k)))

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
        """The answer to a question from its passages.

        Raises:
            Overloaded: others are before it for longer than it has time.
        """
        sent = replace(question, left_s=context.left_s, trace=context.trace)
        answering = self._generator.call("answer", sent, left_s=context.left_s)
        reply: Reply = await self._line.run(answering, context.left_s)
        self._sample_stability(question, context)
        return reply

    async def stream(self, question: Question, context: Context) -> AsyncIterator[str | Reply]:
        """Pieces of the model's text, then the reply; closing the iterator stops the model."""
        sent = replace(question, left_s=context.left_s, trace=context.trace)
        items = self._generator.stream("stream", sent, left_s=context.left_s)
        try:
            with self._line.place(context.left_s) as place:
                yield await self._line.first(anext(items), place)
                async for item in items:
                    yield item
        finally:
            await items.aclose()  # type: ignore[attr-defined]
        self._sample_stability(question, context)

    # State

    async def describe(self) -> Serving:
        """What every replica serves."""
        seen, generator = await asyncio.gather(
            self.index.observe(), self._generator.call("describe_generator", left_s=30)
        )
        answering: GeneratorStatus = generator
        versions = [*(each.versions for each in seen.replicas), answering.versions]
        if self._reranker is not None:
            versions.append(await self._reranker.call("describe_reranker", left_s=30))
        failed = [each for each in seen.replicas if each.error]
        return Serving(
            requested_uri=_joined(
                {(each.shard, each.requested_uri) for each in failed or seen.replicas}
            ),
            active_uri=_joined({(each.shard, each.active_uri) for each in seen.replicas}),
            error=failed[0].error if failed else seen.unread,
            replicas=seen.replicas,
            history=tuple(",".join(index) for _, index in reversed(seen.earlier)),
            generator=answering,
            versions=_versions(versions),
        )

    async def check(self) -> None:
        """Search every shard and generate a token; replicas that differ for longer than a change
        takes are a fault too.  A success counts for a second: anyone may ask, and it costs.

        Raises:
            ServiceError: 503, whatever is wrong.
        """
        self.index.check()
        if time.monotonic() - self._ready_at < 1.0:
            return
        try:
            context = Context(deadline=time.monotonic() + 30)
            checked = [*self._shards, *([self._reranker] if self._reranker else [])]
            checks = [target.call("check_health", left_s=context.left_s) for target in checked]
            await asyncio.gather(
                *checks, self._generator.call("check_generator", left_s=context.left_s)
            )
        except ServiceError:
            raise
        except Exception as error:
            logger.exception("not ready")
            raise Unavailable("a health check failed", self._retry_after_s) from error
        self._ready_at = time.monotonic()

    async def changed(self, change: Change) -> Serving:
        """What :meth:`describe` gives once a change that was begun here is made, with the report of
        the shadow search.

        Raises:
            RequestError, ServiceError: why it was not made.
        """
        report = await self.changes.wait(change.id)
        return replace(await self.describe(), report=report)

    # Live stability

    def _sample_stability(self, question: Question, asked: Context) -> None:
        # one at a time: it is not worth a queue
        if random.random() < self._stability_share and not self._background:
            task = asyncio.create_task(self._measure_stability(question, asked))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _measure_stability(self, question: Question, asked: Context) -> None:
        with contextlib.suppress(InvarError, ServiceError):
            other = rewrite(question.text, 1, random.randrange(1 << 30))
            if other:
                context = Context(
                    "stability", time.monotonic() + 30, where=asked.where, mode=asked.mode
                )
                top_k = max(1, len(question.hits))
                mine = await self.retrieve(question.text, top_k, context)
                found = await self.retrieve(other[0].text, top_k, context)
                self.meter.record(
                    "invar_stability_overlap", pair_overlap(mine.hits, found.hits, top_k)
                )


def merge(
    found: Sequence[Found], top_k: int, missing: tuple[str, ...], encoded_by: dict[str, str]
) -> Found:
    """The best of all shards' passages by score.

    Cosines of one encoder compare across shards, and so do scores of BM25 as long as documents are
    spread over the shards by chance.  Fused ones do not: the two lists of a hybrid search are
    joined over the shards first, then fused.  Where an older shard has no BM25, all count as dense.

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
    modes = {each.mode for each in found}
    versions = _versions([each.versions for each in found])
    if modes == {"hybrid"}:
        depth = fusion_depth(top_k)
        dense = _joined_lists([each.hits for each in found], depth)
        words = _joined_lists([each.by_words for each in found], depth)
        fused = fuse_lists(dense, words, top_k, found[0].dense_weight)
        return Found(tuple(fused), versions, missing, "hybrid")
    if "dense" in modes and "bm25" in modes:
        ranked = fuse_hits([each.hits for each in found], top_k)
        return Found(tuple(ranked), versions, missing, "hybrid")
    mode: Mode = "bm25" if modes == {"bm25"} else "dense"
    hits = _joined_lists([each.hits for each in found], top_k)
    return Found(tuple(hits), versions, missing, mode)


def _joined_lists(lists: Iterable[Sequence[Hit]], top_k: int) -> list[Hit]:
    hits = sorted(
        (hit for each in lists for hit in each), key=lambda hit: (-hit.score, hit.passage_id)
    )[:top_k]
    return [replace(hit, rank=rank) for rank, hit in enumerate(hits, start=1)]


def _versions(given: Sequence[dict[str, str]]) -> dict[str, str]:
    names = sorted({name for versions in given for name in versions})
    return {name: "+".join(dict.fromkeys(v[name] for v in given if name in v)) for name in names}


def _joined(uris_of_shards: Iterable[tuple[str, str]]) -> str:
    return ",".join(uri for _, uri in sorted(uris_of_shards))
