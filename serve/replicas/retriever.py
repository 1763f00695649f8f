"""The retriever of a replica: batches of searches, and an index that changes while it serves."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from invar_ray.answering.filters import Where
from invar_ray.answering.fusion import fusion_depth
from invar_ray.config import SearchConfig
from invar_ray.errors import ConfigError, InvarError, RequestError
from invar_ray.schema import Mode
from invar_ray.text.tokens import text_ids
from serve.errors import OutOfTime, plain
from serve.records import Embedded, Found, Prepared, ReplicaStatus, Vectors
from serve.replicas.batching import Batcher, Worker
from serve.telemetry.metrics import Meter
from serve.telemetry.tracing import Tracer
from serve.versions import FIXED, Current

if TYPE_CHECKING:  # imports torch: only replicas pay for that
    from invar_ray.answering.retriever import Retriever
    from invar_ray.models.precision import Precision

logger = logging.getLogger("ray.serve")
RetrieverLoader = Callable[[str], "Retriever"]
_SLICE_CHARS = 2048
_UNCUT = 1 << 20  # tokens: longer than any text that a request can bring
PROBE = "is anyone there?"
# Transformers builds models on a device that it sets for the whole process: two loads at once break
# each other.
loading = threading.Lock()


@dataclass(frozen=True, slots=True)
class Request:
    """A search as a shard is asked for it.

    Attributes:
        question: the text.
        top_k: how many passages.
        where: only passages that meet these conditions.
        mode: how to search; ``None``: as the retriever was told to.
        vector: [D] of the question, made by another shard's encoder.
    """

    question: str
    top_k: int
    where: Where | None = None
    mode: Mode | None = None
    vector: Vectors | None = None


def load_retriever(
    uri: str,
    device: str = "cpu",
    precision: Precision | None = None,
    memory_map: bool = False,
    collapse: bool = False,
    mode: Mode = SearchConfig.mode,
) -> Retriever:
    """The retriever of an index artifact; it is refused unless its encoder reproduces the index's
    probe texts.

    ``precision``: see :func:`invar_ray.answering.retriever.open_retriever`.
    """
    from invar_ray.answering.retriever import open_retriever

    return open_retriever(
        uri,
        device=device,
        precision=precision,
        memory_map=memory_map,
        mode=mode,
        collapse=collapse,
    )


class RetrieverReplica:
    """Searches one shard of the index: a Serve deployment, a plain object where there is no Ray.

    The first index must load, so that a wrong one fails the deployment.  Later the old one stays in
    service where a new one cannot be served: an exception in Serve's ``reconfigure`` would replace
    the replica, an outage instead of a change that did not happen.

    Args:
        loader: index URI in, ready retriever out.
        max_batch_size: questions that are encoded and searched together.
        batch_wait_s: how long the first of them waits for others.
        current: the published versions, one of which may be served in place of the configured
            index; ``None``: there are none.
        shard: number of the shard.
        configured: index URI of every shard, as deployed.
        allowed_drop: see :func:`serve.replicas.shadow.compare`.
        replica: its name in what it reports; empty asks Serve for it.
    """

    def __init__(
        self,
        loader: RetrieverLoader = load_retriever,
        max_batch_size: int = 8,
        batch_wait_s: float = 0.005,
        *,
        current: Current | None = None,
        shard: int = 0,
        configured: tuple[str, ...] = (),
        allowed_drop: float = 0.2,
        replica: str = "",
        meter: Meter | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._loader, self._shard, self._allowed_drop = loader, shard, allowed_drop
        self._current, self._since = current, None if current else 0
        self._unread: str | None = None
        self._worker = Worker()
        self._configured, self.replica = configured, replica or _replica_name()
        self._meter, self._tracer = meter or Meter(), tracer or Tracer()
        self._search: Batcher[Request, Found] = Batcher(
            self._search_batch, max_batch_size, batch_wait_s, self._seen
        )
        self._max_batch_size, self._embedding = max_batch_size, asyncio.Lock()
        self._changing = asyncio.Lock()
        self._retriever: Retriever | None = None
        self._staged: dict[str, Retriever] = {}
        self._reports: dict[str, dict[str, Any]] = {}
        self.requested_uri = self.active_uri = ""
        self.error: str | None = None

    # Searching

    async def retrieve(
        self,
        question: str,
        top_k: int,
        left_s: float,
        trace: dict[str, str],
        where: Where | None = None,
        mode: Mode | None = None,
        vector: Vectors | None = None,
    ) -> Found:
        """The best passages for a question; where another shard's encoder made its ``vector``, the
        lists of a hybrid search apart.  For the arguments see :class:`Request`.

        Raises:
            RequestError: a condition names no column of the passages, or ``mode`` asks for BM25 and
                the index has none.
            ServiceError: 504 if it is not done in ``left_s`` seconds.
        """
        start = time.perf_counter()
        with self._tracer.span("search", trace, top_k=top_k, shard=self._shard):
            try:
                found = await asyncio.wait_for(
                    self._search(Request(question, top_k, where, mode, vector)), max(0.0, left_s)
                )
            except TimeoutError:
                raise OutOfTime("the search took longer than the request may", 1.0) from None
        self._meter.record("invar_stage_seconds", time.perf_counter() - start, stage="search")
        return found

    async def embed(
        self, texts: list[str], kind: Literal["query", "passage"], trace: dict[str, str]
    ) -> Embedded:
        """Unit vectors of texts by the index's own encoder, a few at a time: searches, and others'
        texts, come in between.
        """
        start, retriever = time.perf_counter(), self._loaded()
        vectors: list[Vectors] = []
        tokens, number, cut = 0, 0, list[int]()
        with self._tracer.span("embed", trace, texts=len(texts)):
            for few in _slices(texts, self._max_batch_size):
                async with self._embedding:
                    some, counts = await self._worker.run(_embed, retriever.encoder, few, kind)
                vectors.append(some)
                for read, unread in counts:
                    tokens, number = tokens + read, number + 1
                    cut += [number - 1] if unread else []
        self._meter.record("invar_stage_seconds", time.perf_counter() - start, stage="embed")
        return Embedded(np.concatenate(vectors), tokens, dict(retriever.versions), tuple(cut))

    async def _search_batch(self, requests: list[Request]) -> list[Found | Exception]:
        return await self._worker.run(self.search, requests)

    def search(self, requests: Sequence[Request]) -> list[Found | Exception]:
        """Passages for each request: all encoded together, all from one version.

        Requests of the same conditions and mode are searched together.  In the place of a request
        that cannot be searched so stands the error: the others of the batch are answered.
        """
        retriever = self._loaded()
        versions = dict(retriever.versions)
        modes = [each.mode or retriever.mode for each in requests]
        vectors = [each.vector for each in requests]
        bare = [
            number
            for number, (mode, vector) in enumerate(zip(modes, vectors, strict=True))
            if vector is None and mode != "bm25"
        ]
        if bare:
            encoded = retriever.encoder.encode_queries([requests[n].question for n in bare])
            for number, vector in zip(bare, encoded, strict=True):
                vectors[number] = vector
        groups: dict[tuple[Where | None, Mode, bool], list[int]] = {}
        for number, (each, mode) in enumerate(zip(requests, modes, strict=True)):
            apart = mode == "hybrid" and each.vector is not None
            groups.setdefault((each.where, mode, apart), []).append(number)
        found: dict[int, Found | Exception] = {}
        for (where, mode, apart), numbers in groups.items():
            most = max(requests[number].top_k for number in numbers)
            kinds: list[Mode] = ["dense", "bm25"] if apart else [mode]
            texts = [requests[number].question for number in numbers]
            made = [vector for n in numbers if (vector := vectors[n]) is not None]
            depth = fusion_depth(most) if apart else most
            try:
                lists = [
                    retriever.search(
                        texts, np.stack(made) if made else None, depth, where=where, mode=kind
                    )
                    for kind in kinds
                ]
            except RequestError as error:
                found |= dict.fromkeys(numbers, error)
                continue
            for number, *hits in zip(numbers, *lists, strict=True):
                if hits[0] and mode != "bm25":
                    self._meter.record("invar_top_score", hits[0][0].score)
                cut = depth if apart else requests[number].top_k
                found[number] = Found(
                    tuple(hits[0][:cut]),
                    versions,
                    mode=mode,
                    by_words=tuple(hits[1]) if apart else (),
                    dense_weight=retriever.dense_weight,
                )
        return [found[number] for number in range(len(requests))]

    def _seen(self, size: int, waiting: int) -> None:
        self._meter.record("invar_batch_size", size, engine="retriever")
        self._meter.record("invar_queue", waiting, engine="retriever")

    def _loaded(self) -> Retriever:
        if self._retriever is None:
            raise RuntimeError("no index is loaded yet")
        return self._retriever

    # Changing the index

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """:meth:`configure` as Serve calls it, at the start and whenever ``user_config`` changes.

        Raises:
            ConfigError: it names no index.
        """
        uri = user_config.get("index_uri")
        if not isinstance(uri, str) or not uri:
            raise ConfigError(
                "user_config has no index_uri",
                expected="user_config: {index_uri: <index artifact>}",
            )
        await self.configure(uri)

    async def configure(self, uri: str) -> None:
        """Serve the published version if it is newer than this configuration, else ``uri``.

        A first index that was published and cannot be loaded gives way to the version before it,
        then to ``uri``: an old answer is better than none.  The error is shown, and the service
        tries again (:meth:`serve.index.ServedIndex.follow`).

        Raises:
            Exception: whatever the loader raised, if nothing is being served yet.
        """
        if len(self._configured) <= 1:
            self._configured = (uri,)
        else:  # of several shards, Serve tells this one its own part only
            self._configured = (
                *self._configured[: self._shard],
                uri,
                *self._configured[self._shard + 1 :],
            )
        wanted = [*await asyncio.to_thread(self._published), uri]
        first = self._retriever is None
        error: str | None = None
        for place in wanted if first else wanted[:1]:
            outcome = await self.prepare(place, first=first and place == wanted[-1])
            if outcome.error is None:
                await self.activate(place)
                break
            error = error or outcome.error
        if error is not None:
            self.requested_uri, self.error = wanted[0], error

    async def prepare(self, uri: str, *, first: bool = False) -> Prepared:
        """Load the index at ``uri`` beside the one in service and try it; says what came of it.

        Raises:
            Exception: whatever the loader raised, if ``first``.
        """
        async with self._changing:
            if uri == self.active_uri or uri in self._staged:
                return Prepared(self.replica, None, self._reports.get(uri, {}))
            self.requested_uri = uri
            try:
                retriever, report = await asyncio.to_thread(
                    self._load, uri, asyncio.get_running_loop()
                )
            except Exception as error:
                if first:
                    raise
                self.error = (
                    str(error)
                    if isinstance(error, InvarError)
                    else f"{type(error).__name__} while loading it"
                )
                logger.error(
                    "index %s cannot be served, %s stays in service\n%s",
                    plain(uri),
                    plain(self.active_uri),
                    plain(traceback.format_exc()),
                )
                return Prepared(self.replica, self.error, {})
            self._staged, self._reports = {uri: retriever}, {uri: report}
            return Prepared(self.replica, None, report)

    def _load(self, uri: str, loop: asyncio.AbstractEventLoop) -> tuple[Retriever, dict[str, Any]]:
        from serve.replicas.shadow import compare

        with loading:
            retriever = self._loader(uri)
        retriever.retrieve([PROBE], 1)
        if self._retriever is None:
            return retriever, {}
        old = self._retriever

        def search_old(queries: Sequence[str], top_k: int) -> Any:
            # In the thread that serves: a tokenizer does not bear two threads.
            return asyncio.run_coroutine_threadsafe(
                self._worker.run(partial(old.retrieve, mode="dense"), queries, top_k), loop
            ).result(120)

        return retriever, compare(retriever, old, search_old, self._allowed_drop)

    async def activate(self, uri: str) -> ReplicaStatus:
        """Serve a prepared index from the next batch on; one that is not (this replica is new) is
        prepared first.
        """
        if uri != self.active_uri:
            if uri not in self._staged and (await self.prepare(uri)).error is not None:
                return self.status()
            self._retriever, self.active_uri = self._staged.pop(uri), uri
        self.requested_uri, self.error, self._staged = uri, None, {}
        return self.status()

    async def discard(self, uri: str, error: str) -> ReplicaStatus:
        """Forget a prepared index that some other replica cannot serve; one that is served already
        stays.
        """
        async with self._changing:  # one that is being loaded is forgotten once it is there
            if uri != self.active_uri:
                self._staged.pop(uri, None)
                self.requested_uri, self.error = uri, self.error or error
        return self.status()

    def _published(self) -> list[str]:
        """Published indexes of this shard that overrule the configured one: the newest, and the one
        before it.
        """
        if self._current is None:
            return []
        self._since, self._unread = None, None
        try:
            since = self._current.since(self._configured)
            newest = self._current.newest()
            earlier = self._current.earlier(newest)[:1] if newest else []
        except (InvarError, OSError) as error:
            self._unread = f"the published versions are not known: {error}"
            logger.error("%s", plain(self._unread))
            return []
        self._since = since
        if newest is None or newest.decided <= since:
            return []
        indexes = [newest.index, *(index for version, index in earlier if version.number > since)]
        fit = [index for index in indexes if len(index) == len(self._configured)]
        return [index[self._shard] for index in fit]

    def _ask_again(self) -> None:
        if self._current is not None and self._since in {None, FIXED}:
            try:
                since = self._current.since(self._configured)
                self._current.newest()  # of a log that cannot be read nobody knows what is newer
                self._since, self._unread = since, None
            except (InvarError, OSError) as error:
                logger.warning("the published versions are not known: %s", plain(str(error)))

    # State and health

    def status(self) -> ReplicaStatus:
        """Its index and versions."""
        return ReplicaStatus(
            shard=str(self._shard),
            replica=self.replica,
            requested_uri=self.requested_uri,
            active_uri=self.active_uri,
            error=self.error or self._unread,
            versions=dict(self._loaded().versions),
            configured=self._configured[self._shard] if self._configured else "",
            since=self._since,
        )

    async def describe(self) -> ReplicaStatus:
        """:meth:`status`, for callers elsewhere; versions that could not be read at the start are
        asked for again.
        """
        await asyncio.to_thread(self._ask_again)
        return self.status()

    async def check_health(self) -> None:
        """Search for real; Serve calls this now and then, and replaces a replica that fails."""
        await self._worker.check(self._probe)

    def _probe(self) -> None:
        self._loaded().retrieve([PROBE], 1)

    def close(self) -> None:
        """Let running work end; take no more."""
        self._worker.close()

    def __del__(self) -> None:
        self.close()


def _slices(texts: Sequence[str], most: int) -> Iterator[Sequence[str]]:
    """Texts in order, a few at a time: at most ``most``, and about 500 tokens."""
    start, chars = 0, 0
    for number, text in enumerate(texts):
        if number > start and (number - start == most or chars + len(text) > _SLICE_CHARS):
            yield texts[start:number]
            start, chars = number, 0
        chars += len(text)
    yield texts[start:]


def _embed(encoder: Any, texts: Sequence[str], kind: str) -> tuple[Vectors, list[tuple[int, int]]]:
    """Vectors of texts, and of each how many tokens were read and how many were not."""
    from invar_ray.models.encoder import passage_ids, query_ids

    spec, tokenizer = encoder.spec, encoder.tokenizer
    if kind == "query":
        rows = query_ids(tokenizer, texts, spec)
        whole = query_ids(tokenizer, texts, replace(spec, query_max_tokens=_UNCUT))
    else:
        pairs = [("", text) for text in texts]
        rows = passage_ids(tokenizer, pairs, spec)
        whole = passage_ids(tokenizer, pairs, replace(spec, passage_max_tokens=_UNCUT))
    counts = []
    for ids, row, all_ids in zip(text_ids(tokenizer, texts), rows, whole, strict=True):
        unread = len(all_ids) - len(row)
        counts.append((max(0, len(ids) - unread), unread))
    return encoder.encode_ids(rows), counts


def _replica_name() -> str:
    from ray import serve

    try:
        return str(serve.get_replica_context().replica_id.unique_id)
    except Exception:  # outside Serve, and in its local testing, there are no replicas
        return "local"
