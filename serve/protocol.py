"""What goes over HTTP: requests, responses and the one form that every error has."""

import re
import uuid
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, field_validator

from invar_ray.errors import RequestError
from invar_ray.schema import Answer, Citation, Hit

SERVICE = "invar-ray"
REQUEST_ID_HEADER = "X-Request-ID"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,64}")


class Limits(BaseModel):
    """What a request may ask for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: int = Field(5, ge=1, description="Passages per answer unless the request says otherwise.")
    max_top_k: int = Field(20, ge=1, description="Most passages that a request may ask for.")
    max_question_chars: int = Field(2000, ge=1, description="Longest question in characters.")
    max_new_tokens: int = Field(32, ge=1, description="Longest answer in tokens; a request may ask for less.")
    max_body_bytes: int = Field(65536, ge=256, description="Longest request body in bytes.")

    def check_question(self, question: str) -> str:
        """The question without outer whitespace.

        Raises:
            RequestError: if nothing is left of it or it is too long.
        """
        text = question.strip()
        if not text:
            raise RequestError("the question is empty", expected="some words")
        if len(text) > self.max_question_chars:
            raise RequestError(
                f"the question has {len(text)} characters", expected=f"at most {self.max_question_chars}"
            )
        return text

    def check_top_k(self, top_k: int | None) -> int:
        """How many passages to take.

        Raises:
            RequestError: if it is out of range.
        """
        if top_k is None:
            return self.top_k
        if not 1 <= top_k <= self.max_top_k:
            raise RequestError(f"top_k is {top_k}", expected=f"a number from 1 to {self.max_top_k}")
        return top_k

    def check_max_new_tokens(self, max_new_tokens: int | None) -> int:
        """How long the answer may be, in tokens.

        Raises:
            RequestError: if it is out of range.
        """
        if max_new_tokens is None:
            return self.max_new_tokens
        if not 1 <= max_new_tokens <= self.max_new_tokens:
            raise RequestError(
                f"max_new_tokens is {max_new_tokens}", expected=f"a number from 1 to {self.max_new_tokens}"
            )
        return max_new_tokens


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    question: str = Field(description="The question in plain words.", examples=["Who keeps the lighthouse?"])
    top_k: int | None = Field(None, strict=True, description="Number of passages; null takes the service's default.")

    @field_validator("question")
    @classmethod
    def _clean(cls, value: str) -> str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair, which is no character") from None
        return value.replace("\x00", " ")


class RetrieveRequest(_Request):
    """Ask for passages."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"question": "Who keeps the lighthouse?", "top_k": 3}]}
    )


class AnswerRequest(_Request):
    """Ask for an answer."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"question": "Who keeps the lighthouse?", "top_k": 5}]}
    )

    max_new_tokens: int | None = Field(
        None, strict=True, description="Longest answer in tokens; null takes the service's limit."
    )


class PassageOut(BaseModel):
    """A retrieved passage."""

    number: int = Field(description="The [n] by which an answer cites it; 1-based position in the list.")
    rank: int = Field(description="Rank in the retriever's list; 1 is the best.")
    score: float = Field(description="Cosine similarity with the question, in [-1, 1].")
    passage_id: str
    document_id: str
    title: str
    text: str
    uri: str = Field(description="Where the document came from; may be empty.")
    place: str = Field("", description="File and place in it, such as `manual.pdf, page 3`; may be empty.")

    @classmethod
    def of(cls, number: int, hit: Hit) -> "PassageOut":
        """From a hit."""
        return cls(
            number=number,
            rank=hit.rank,
            score=hit.score,
            passage_id=hit.passage_id,
            document_id=hit.document_id,
            title=hit.title,
            text=hit.text,
            uri=hit.uri,
            place=hit.place,
        )


class CitationOut(BaseModel):
    """A passage that the answer rests on."""

    number: int = Field(description="Number of the passage in this response's list.")
    passage_id: str
    document_id: str
    title: str
    source: str = Field(
        description="`generated`: the model cited it; `matched`: the model cited nothing and the answer stands in it."
    )
    place: str = Field("", description="File and place in it, such as `manual.pdf, page 3`; may be empty.")

    @classmethod
    def of(cls, citation: Citation) -> "CitationOut":
        """From a citation."""
        return cls(
            number=citation.number,
            passage_id=citation.passage_id,
            document_id=citation.document_id,
            title=citation.title,
            source=citation.source,
            place=citation.place,
        )


_VERSIONS = Field(
    description="Fingerprints of the artifacts that this response came from.",
    examples=[{"index": "3f0c9a1b", "encoder": "a91b44c0", "generator": "77d0e2f1"}],
)


class RetrieveResponse(BaseModel):
    """Passages, best first."""

    question: str
    passages: list[PassageOut]
    timings: dict[str, float] = Field(description="Seconds, by step.", examples=[{"retrieve_s": 0.012}])
    versions: dict[str, str] = _VERSIONS
    request_id: str


class AnswerResponse(BaseModel):
    """An answer with the passages that it rests on."""

    question: str
    answer: str = Field(description="The answer without its citation marks.", examples=["Mara Lindqvist"])
    refused: bool = Field(description="True where the model said that the passages do not answer the question.")
    confidence: float | None = Field(description="Mean log-probability of the answer's tokens, in nats.")
    citations: list[CitationOut]
    passages: list[PassageOut] = Field(description="The passages that the model was given, in its order.")
    notes: list[str] = Field(description="What the reader must know, e.g. passages left out for lack of room.")
    timings: dict[str, float] = Field(
        description="Seconds, by step.", examples=[{"retrieve_s": 0.012, "generate_s": 0.31, "total_s": 0.33}]
    )
    versions: dict[str, str] = _VERSIONS
    request_id: str

    @classmethod
    def of(
        cls, answer: Answer, *, timings: dict[str, float], versions: dict[str, str], request_id: str
    ) -> "AnswerResponse":
        """From an answer."""
        return cls(
            question=answer.question,
            answer=answer.text,
            refused=answer.refused,
            confidence=answer.confidence,
            citations=[CitationOut.of(citation) for citation in answer.citations],
            passages=[PassageOut.of(number, hit) for number, hit in enumerate(answer.hits, start=1)],
            notes=list(answer.notes),
            timings=timings,
            versions=versions,
            request_id=request_id,
        )


class IndexState(BaseModel):
    """The index that a retriever replica serves.  After a failed change the old one stays in service."""

    requested_uri: str = Field(description="The index that the configuration asks for.")
    active_uri: str = Field(description="The index that is being searched.")
    error: str | None = Field(description="Why the requested index is not the active one; null if it is.")


class GeneratorState(BaseModel):
    """The generator that a replica serves."""

    uri: str
    max_context: int = Field(description="Most tokens of prompt and answer together.")


class IndexResponse(BaseModel):
    """What is being served."""

    index: IndexState
    generator: GeneratorState
    versions: dict[str, str] = _VERSIONS
    limits: Limits


class HealthResponse(BaseModel):
    """The process answers (`/healthz`), or a search and a token were just produced (`/readyz`)."""

    service: str = SERVICE
    status: str = Field(examples=["ok"])


class ErrorBody(BaseModel):
    """What went wrong."""

    type: str = Field(
        description="One of: invalid_json, invalid_request, unauthorized, not_found, method_not_allowed, "
        "body_too_large, overloaded, unavailable, timeout, internal."
    )
    message: str
    request_id: str


class ErrorResponse(BaseModel):
    """The one form of every error."""

    error: ErrorBody

    @classmethod
    def of(cls, kind: str, message: str, request_id: str) -> "ErrorResponse":
        """An error of type ``kind``."""
        return cls(error=ErrorBody(type=kind, message=message, request_id=request_id))


@dataclass
class ServiceError(Exception):
    """A failure that has a status of its own.

    Attributes:
        status: HTTP status.
        kind: the error's type in the response.
        message: for the client; never a stack trace.
        retry_after_s: seconds for the ``Retry-After`` header, if trying again makes sense.
    """

    status: int
    kind: str
    message: str
    retry_after_s: float | None = None


def request_id(given: str | None) -> str:
    """The caller's id of a request if it is fit for logs and headers, else a new one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
