"""The reranker in a deployment of its own: a cross-encoder costs a pass of its model for each hit,
where a search costs one for the question, and would hold up searches in their replicas.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from serve.errors import OutOfTime
from serve.records import Scored
from serve.replicas.batching import Worker
from serve.replicas.retriever import PROBE, loading
from serve.telemetry.metrics import Meter
from serve.telemetry.tracing import Tracer

if TYPE_CHECKING:  # imports torch: only replicas pay for that
    from invar_ray.answering.rerank import Reranker
    from invar_ray.models.precision import Precision

RerankerLoader = Callable[[], "Reranker"]


def load_reranker(
    name: str, index_uri: str, device: str = "cpu", precision: Precision | None = None
) -> Reranker:
    """The cross-encoder of a folder or hub name; errors as
    :func:`invar_ray.answering.rerank.open_reranker`.

    Args:
        name: see ``search.reranker`` of a recipe.
        index_uri: the index whose hits it reads.
        device: where it runs.
        precision: of its weights; ``None`` takes that of the index.
    """
    from invar_ray.answering.rerank import open_reranker
    from invar_ray.models.base import resolve_named
    from invar_ray.models.precision import made_in
    from invar_ray.store.artifacts import open_artifact

    precision = precision or made_in(open_artifact(index_uri, "index"))
    with loading:
        return open_reranker(resolve_named(name), precision, device)


class RerankerReplica:
    """Says how relevant texts are to a question: a Serve deployment, a plain object where there is
    no Ray.

    Args:
        loader: gives the model.
        max_batch_size: texts that are read together; between two such batches others get their
            turn.
    """

    def __init__(
        self,
        loader: RerankerLoader,
        max_batch_size: int = 8,
        *,
        meter: Meter | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._reranker, self._max_batch_size = loader(), max_batch_size
        self._worker = Worker()
        self._meter, self._tracer = meter or Meter(), tracer or Tracer()
        self._probe()

    async def score(
        self, question: str, texts: list[str], left_s: float, trace: dict[str, str]
    ) -> Scored:
        """How relevant each text is to a question.

        Raises:
            ServiceError: 504 if not all are read in ``left_s`` seconds.
        """
        start = time.perf_counter()
        scores: list[float] = []
        cut: list[int] = []
        tokens = 0
        with self._tracer.span("rerank", trace, texts=len(texts)):
            for first in range(0, len(texts), self._max_batch_size):
                if time.perf_counter() - start >= left_s:
                    raise OutOfTime("reranking took longer than the request may", 1.0)
                few = texts[first : first + self._max_batch_size]
                judged = await self._worker.run(self._reranker.judge, question, few)
                scores += judged.scores
                cut += [first + number for number in judged.cut]
                tokens += judged.tokens
        self._meter.record("invar_stage_seconds", time.perf_counter() - start, stage="rerank")
        return Scored(tuple(scores), tokens, self._versions, tuple(cut))

    @property
    def _versions(self) -> dict[str, str]:
        return {"reranker": self._reranker.fingerprint}

    async def describe_reranker(self) -> dict[str, str]:
        """Its version."""
        return self._versions

    async def check_health(self) -> None:
        """Read a pair for real; Serve calls this now and then, and replaces who fails."""
        await self._worker.check(self._probe)

    def _probe(self) -> None:
        self._reranker.judge(PROBE, [PROBE])

    def close(self) -> None:
        """Let running work end; take no more."""
        self._worker.close()

    def __del__(self) -> None:
        if hasattr(self, "_worker"):  # a loader that failed left none
            self.close()
