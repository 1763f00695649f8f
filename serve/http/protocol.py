"""Questions, answers and errors as they go over HTTP on the service's own routes."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from invar_ray.console import label
from invar_ray.schema import Citation, Hit, Mode
from serve.errors import Fault, openai_type
from serve.http.conditions import Conditions
from serve.http.limits import SERVICE
from serve.records import Found, Reply
from serve.stability import Wording, agreement, mean_overlap, pair_overlap, share_equal


def clean_text(value: str) -> str:
    """A text that can be encoded and holds no null characters.

    Raises:
        ValueError: if it holds half of a surrogate pair.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair, which is no character") from None
    return value.replace("\x00", " ")


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    question: str = Field(
        description="The question in plain words.", examples=["Who keeps the lighthouse?"]
    )
    top_k: int | None = Field(
        None, strict=True, description="Number of passages; null takes the service's default."
    )
    where: Conditions = Field(
        Conditions(),
        description="Only passages that meet these conditions are found; a key may be bound to "
        "conditions of its own, which hold as well.",
    )
    mode: Mode | None = Field(
        None,
        description="Search by the encoder's vectors (`dense`), by words (`bm25`) or by both "
        "(`hybrid`); null takes the service's default.",
    )

    @field_validator("question")
    @classmethod
    def _clean(cls, value: str) -> str:
        return clean_text(value)


class RetrieveRequest(_Request):
    """Ask for passages."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"question": "Who keeps the lighthouse?", "top_k": 3}]},
    )


class AnswerRequest(_Request):
    """Ask for an answer."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"question": "Who keeps the lighthouse?", "top_k": 5}]},
    )

    max_new_tokens: int | None = Field(
        None, strict=True, description="Longest answer in tokens; null takes the service's limit."
    )
    stream: bool = Field(
        False,
        strict=True,
        description="Send server-sent events: `passages`, then `delta` with pieces of the model's "
        "text, then `answer` (the whole response), or `error`; `done` ends every stream.",
    )


class StabilityRequest(_Request):
    """Ask a question in several wordings."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"question": "Who keeps the lighthouse?", "rewrites": 3}]},
    )

    rewrites: int | None = Field(
        None, strict=True, description="Number of rewordings; null takes 3."
    )
    seed: int = Field(
        0, strict=True, ge=0, le=2**31, description="Another seed gives other rewordings."
    )
    answers: bool = Field(
        True, strict=True, description="Answer every wording as well; false compares hits only."
    )
    max_new_tokens: int | None = Field(None, strict=True, description="Longest answer in tokens.")


SCORE = (
    "By the mode of the search: the cosine with the question in [-1, 1] (`dense`), BM25's score "
    "(`bm25`), or both scaled and weighted, in [0, 1] (`hybrid`); where `versions` names a "
    "reranker, its score, in [0, 1]."
)
MODE = Field(description="How the passages were searched.")


class PassageOut(BaseModel):
    """A retrieved passage."""

    number: int = Field(
        description="The [n] by which an answer cites it; 1-based position in the list."
    )
    rank: int = Field(description="Rank in the retriever's list; 1 is the best.")
    score: float = Field(description=SCORE)
    passage_id: str
    document_id: str
    title: str
    text: str
    uri: str = Field(description="Where the document came from; may be empty.")
    place: str = Field(
        "", description="File and place in it, such as `manual.pdf, page 3`; may be empty."
    )

    @classmethod
    def of(cls, number: int, hit: Hit) -> "PassageOut":
        """From a hit."""
        return cls(
            number=number,
            rank=hit.rank,
            score=hit.score,
            passage_id=hit.passage_id,
            document_id=hit.document_id,
            title=label(hit.title),
            text=hit.text,
            uri=hit.uri,
            place=label(hit.place),
        )

    @classmethod
    def all_of(cls, found: Found) -> list["PassageOut"]:
        """With the numbers that answers cite them by."""
        return [cls.of(number, hit) for number, hit in enumerate(found.hits, start=1)]


class CitationOut(BaseModel):
    """A passage that the answer rests on."""

    number: int = Field(description="Number of the passage in this response's list.")
    passage_id: str
    document_id: str
    title: str
    source: str = Field(
        description="`generated`: the model cited it; `matched`: the model cited nothing, or "
        "passages without the answer, and the answer stands in this one."
    )
    place: str = Field(
        "", description="File and place in it, such as `manual.pdf, page 3`; may be empty."
    )

    @classmethod
    def of(cls, citation: Citation) -> "CitationOut":
        """From a citation."""
        return cls(
            number=citation.number,
            passage_id=citation.passage_id,
            document_id=citation.document_id,
            title=label(citation.title),
            place=label(citation.place),
            source=citation.source,
        )


VERSIONS = Field(
    description="Fingerprints of the artifacts that this response came from.",
    examples=[{"index": "3f0c9a1b", "encoder": "a91b44c0", "generator": "77d0e2f1"}],
)


class RetrieveResponse(BaseModel):
    """Passages, best first."""

    question: str
    passages: list[PassageOut]
    mode: Mode = MODE
    partial: bool = Field(
        False,
        description="True where a shard of the index did not answer: passages may be missing.",
    )
    missing_shards: list[str] = Field(
        default_factory=list, description="Shards that did not answer in time."
    )
    timings: dict[str, float] = Field(
        description="Seconds, by step.", examples=[{"retrieve_s": 0.012}]
    )
    versions: dict[str, str] = VERSIONS
    request_id: str

    @classmethod
    def of(
        cls, question: str, found: Found, timings: dict[str, float], request_id: str
    ) -> "RetrieveResponse":
        """From what was found."""
        return cls(
            question=question,
            passages=PassageOut.all_of(found),
            mode=found.mode,
            partial=bool(found.missing_shards),
            missing_shards=list(found.missing_shards),
            timings=timings,
            versions=found.versions,
            request_id=request_id,
        )


class AnswerResponse(BaseModel):
    """An answer with the passages that it rests on."""

    question: str
    read_as: str | None = Field(
        None,
        description="In a chat: how a follow-up was read, in words that stand alone; null for a "
        "question that does.",
    )
    answer: str = Field(
        description="The answer without its citation marks.", examples=["Mara Lindqvist"]
    )
    refused: bool = Field(
        description="True where the passages do not answer the question: the model said so, or it "
        "was not sure enough."
    )
    low_confidence: bool = Field(
        False,
        description="True where the model was not sure enough: `answer` is a refusal, and `guess` "
        "holds what it wrote.",
    )
    guess: str = Field("", description="What the model wrote where that is not the answer.")
    probability: float | None = Field(
        None,
        description="That what the model wrote is right, calibrated on train questions; null where "
        "its generator was not calibrated.",
    )
    confidence: float | None = Field(
        description="Mean log-probability of the written tokens, in nats; not calibrated."
    )
    citations: list[CitationOut]
    passages: list[PassageOut] = Field(
        description="The passages that the model was given, in its order."
    )
    mode: Mode = MODE
    notes: list[str] = Field(
        description="What the reader must know, e.g. passages left out for lack of room."
    )
    partial: bool = Field(
        False,
        description="True where a shard of the index did not answer: passages may be missing.",
    )
    missing_shards: list[str] = Field(
        default_factory=list, description="Shards that did not answer in time."
    )
    timings: dict[str, float] = Field(
        description="Seconds, by step.",
        examples=[{"retrieve_s": 0.012, "generate_s": 0.31, "total_s": 0.33}],
    )
    versions: dict[str, str] = VERSIONS
    request_id: str

    @classmethod
    def of(
        cls, found: Found, reply: Reply, timings: dict[str, float], request_id: str
    ) -> "AnswerResponse":
        """From an answer and what was found for it; the passages are those that the model read."""
        answer = reply.answer
        return cls(
            question=answer.question,
            answer=answer.text,
            refused=answer.refused,
            low_confidence=answer.low_confidence,
            guess=answer.guess,
            probability=answer.probability,
            confidence=answer.confidence,
            citations=[CitationOut.of(citation) for citation in answer.citations],
            passages=[
                PassageOut.of(number, hit) for number, hit in enumerate(answer.hits, start=1)
            ],
            mode=found.mode,
            notes=list(answer.notes),
            partial=bool(found.missing_shards),
            missing_shards=list(found.missing_shards),
            timings=timings,
            versions={**found.versions, **reply.versions},
            request_id=request_id,
        )


class WordingOut(BaseModel):
    """One wording of the question and what it led to."""

    text: str
    kind: str = Field(
        description="`anchor` for the question as asked, else how it was reworded, e.g. `typo`."
    )
    passages: list[PassageOut]
    overlap: float = Field(
        description="Jaccard overlap of its passages with those of the question as asked, 0 to 1."
    )
    answer: str | None = Field(None, description="Null unless answers were asked for.")
    refused: bool | None = None
    agreement: float | None = Field(
        None, description="Token F1 of its answer with the answer to the question as asked."
    )

    @classmethod
    def of(cls, wording: Wording, anchor: Wording, top_k: int) -> "WordingOut":
        """From a wording, compared with the question as asked."""
        reply = wording.reply
        return cls(
            text=wording.text,
            kind=wording.kind,
            passages=PassageOut.all_of(wording.found),
            overlap=pair_overlap(anchor.found.hits, wording.found.hits, top_k),
            answer=reply.answer.text if reply else None,
            refused=reply.answer.refused if reply else None,
            agreement=agreement(anchor.reply, reply) if anchor.reply and reply else None,
        )


class StabilityResponse(BaseModel):
    """How much the passages and the answer depend on the wording.

    Where the index changed between two wordings, everything is asked again: one response has one
    version.
    """

    question: str
    overlap: float = Field(
        description="Mean Jaccard overlap of the passages over all pairs of wordings, 0 to 1."
    )
    agreement: float | None = Field(
        description="Share of pairs of wordings whose answers are equal after SQuAD's "
        "normalisation (refusals are); "
        "null without answers."
    )
    wordings: list[WordingOut] = Field(description="The question as asked, then its rewordings.")
    mode: Mode = MODE
    timings: dict[str, float] = Field(description="Seconds, by step.")
    versions: dict[str, str] = VERSIONS
    request_id: str

    @classmethod
    def of(
        cls, wordings: Sequence[Wording], top_k: int, timings: dict[str, float], request_id: str
    ) -> "StabilityResponse":
        """From all wordings, the question as asked first."""
        anchor = wordings[0]
        replies = [each.reply for each in wordings if each.reply is not None]
        return cls(
            question=anchor.text,
            overlap=mean_overlap(wordings, top_k),
            agreement=share_equal(replies) if replies else None,
            wordings=[WordingOut.of(each, anchor, top_k) for each in wordings],
            mode=anchor.found.mode,
            timings=timings,
            versions={**anchor.found.versions, **(anchor.reply.versions if anchor.reply else {})},
            request_id=request_id,
        )


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str = Field(
        description="OpenAI's kind: invalid_request_error, authentication_error, permission_error, "
        "not_found_error, "
        "rate_limit_error or server_error."
    )
    param: str | None = Field(None, description="Always null; the message names the field.")
    code: str = Field(
        description="One of: invalid_json, invalid_request, unauthorized, forbidden, not_found, "
        "model_not_found, "
        "method_not_allowed, conflict, body_too_large, rate_limited, overloaded, unavailable, "
        "timeout, internal."
    )
    request_id: str


class ErrorResponse(BaseModel):
    """The one form of every error."""

    error: ErrorBody

    @classmethod
    def of(cls, fault: Fault, request_id: str) -> "ErrorResponse":
        """From how an error is answered."""
        return cls(
            error=ErrorBody(
                message=fault.message,
                type=openai_type(fault.status),
                param=None,
                code=fault.code,
                request_id=request_id,
            )
        )


class HealthResponse(BaseModel):
    """The process answers (`/healthz`), or a search and a token were just produced (`/readyz`)."""

    service: str = SERVICE
    status: Literal["ok", "ready"] = Field(examples=["ok"])
