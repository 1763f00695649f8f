"""What travels between the ingress and the replicas."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from invar_ray.answering.filters import Where
from invar_ray.answering.fusion import DENSE_WEIGHT
from invar_ray.schema import Answer, Hit, Mode

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Context:
    """What belongs to a request wherever it goes.

    Attributes:
        request_id: for logs.
        deadline: when it has to be answered, on this process's ``time.monotonic``.
        trace: the span that later ones are children of.
        where: the only passages that it may find: what the caller's key is bound to, and what the
            request asks for.
        mode: how the request wants to be searched; ``None`` as the service does.
    """

    request_id: str = ""
    deadline: float = float("inf")
    trace: dict[str, str] = field(default_factory=dict)
    where: Where = field(default_factory=Where)
    mode: Mode | None = None

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; clocks differ between machines, so this is what is sent."""
        return self.deadline - time.monotonic()

    def narrowed(self, where: Where, mode: Mode | None = None) -> Context:
        """With these conditions on top of those that hold already: none can be taken away again;
        and searched in this mode.
        """
        return replace(self, where=self.where.also(where), mode=mode)


@dataclass(frozen=True, slots=True)
class Question:
    """A question to answer from passages, and how; ``left_s`` is what is left of its time.

    ``style`` says how to word the answer (a system prompt), and is evidence of nothing.
    """

    text: str
    hits: tuple[Hit, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    left_s: float = 60.0
    trace: dict[str, str] = field(default_factory=dict)
    style: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """Passages for one question, and the versions of what found them (an index may change between
    two calls).

    Attributes:
        hits: best first.
        versions: of index, encoder and passages.
        missing_shards: those that did not answer.
        mode: how they were searched.
        by_words: from one of several shards, the list by words of a hybrid search, ``hits`` being
            the one by vectors: the lists of all shards are joined before they are fused.
        dense_weight: the index's, for that.
    """

    hits: tuple[Hit, ...]
    versions: dict[str, str]
    missing_shards: tuple[str, ...] = ()
    mode: Mode = "dense"
    by_words: tuple[Hit, ...] = ()
    dense_weight: float = DENSE_WEIGHT


@dataclass(frozen=True, slots=True)
class Embedded:
    """[N, D] unit vectors, the number of tokens that were read, the versions, and the numbers of
    the texts of which the end was not read.
    """

    vectors: Vectors
    tokens: int
    versions: dict[str, str]
    cut: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Scored:
    """How relevant texts are to a question, by a cross-encoder.

    Attributes:
        scores: one a text, in [0, 1].
        tokens: that were read.
        versions: of the reranker.
        cut: numbers of the texts that were not read to their end.
    """

    scores: tuple[float, ...]
    tokens: int
    versions: dict[str, str]
    cut: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as the engine gives it.

    Attributes:
        answer: read from ``text``, citations checked.
        text: what the model wrote, its ``[n]`` marks included; the pieces of a stream add up to it.
        finish: ``stop`` or ``length``, as OpenAI names them.
    """

    answer: Answer
    text: str
    prompt_tokens: int
    completion_tokens: int
    finish: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Whether a replica has an index ready that it was told to prepare."""

    replica: str
    error: str | None
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """The index of one retriever replica.  After a failed change the old one stays in service.

    Attributes:
        shard: number of the shard that it searches.
        requested_uri: the index that was asked for last.
        active_uri: the index that is being searched.
        error: why the requested index is not the active one; ``None`` if it is.
        versions: fingerprints of index and encoder.
        configured: the index of its shard as deployed.
        since: published versions above this number are served in place of the configured index;
            ``None``: not known, the replica could not read them.
    """

    shard: str
    replica: str
    requested_uri: str
    active_uri: str
    error: str | None
    versions: dict[str, str]
    configured: str = ""
    since: int | None = 0


@dataclass(frozen=True, slots=True)
class GeneratorStatus:
    """What answers: engine, artifact or address, most tokens of prompt and answer together."""

    engine: str
    uri: str
    max_context: int
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class Serving:
    """What the whole service serves; several shards' URIs are joined by commas.

    Attributes:
        history: what one can go back to, oldest first.
        report: of the shadow search, where this is what came of a change.
    """

    requested_uri: str
    active_uri: str
    error: str | None
    replicas: tuple[ReplicaStatus, ...]
    history: tuple[str, ...]
    generator: GeneratorStatus
    versions: dict[str, str]
    report: dict[str, Any] = field(default_factory=dict)
