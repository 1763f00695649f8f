"""What goes over HTTP on the service's own routes: requests and responses."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from invar_ray.schema import Answer, Citation, Hit
from serve.conditions import Conditions
from serve.limits import SERVICE, Limits


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
        description="Only passages that meet these conditions are found; a key may be bound to conditions of its own, "
        "which hold as well.",
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
        description="Send server-sent events: `passages`, then `delta` with pieces of the model's text, then `answer` "
        "(the whole response), or `error`; `done` ends every stream.",
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


class IndexChange(BaseModel):
    """Ask for another index, or for the one before."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"index_uri": "s3://bucket/invar/index/retriever-3f0c9a1b"}]
        },
    )

    index_uri: str | list[str] | None = Field(
        None, description="Index artifact (one for each shard, where the service has several)."
    )
    rollback: bool = Field(
        False, strict=True, description="Instead: go back to what was served before."
    )

    @field_validator("index_uri")
    @classmethod
    def _clean(cls, value: str | list[str] | None) -> str | list[str] | None:
        return (
            [clean_text(each) for each in value]
            if isinstance(value, list)
            else value and clean_text(value)
        )


class PassageOut(BaseModel):
    """A retrieved passage."""

    number: int = Field(
        description="The [n] by which an answer cites it; 1-based position in the list."
    )
    rank: int = Field(description="Rank in the retriever's list; 1 is the best.")
    score: float = Field(description="Cosine similarity with the question, in [-1, 1].")
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
            title=citation.title,
            place=citation.place,
            source=citation.source,
        )


_VERSIONS = Field(
    description="Fingerprints of the artifacts that this response came from.",
    examples=[{"index": "3f0c9a1b", "encoder": "a91b44c0", "generator": "77d0e2f1"}],
)


class RetrieveResponse(BaseModel):
    """Passages, best first."""

    question: str
    passages: list[PassageOut]
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
    versions: dict[str, str] = _VERSIONS
    request_id: str


class AnswerResponse(BaseModel):
    """An answer with the passages that it rests on."""

    question: str
    answer: str = Field(
        description="The answer without its citation marks.", examples=["Mara Lindqvist"]
    )
    refused: bool = Field(
        description="True where the model said that the passages do not answer the question."
    )
    confidence: float | None = Field(
        description="Mean log-probability of the answer's tokens, in nats."
    )
    citations: list[CitationOut]
    passages: list[PassageOut] = Field(
        description="The passages that the model was given, in its order."
    )
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
    versions: dict[str, str] = _VERSIONS
    request_id: str

    @classmethod
    def of(
        cls,
        answer: Answer,
        *,
        missing_shards: tuple[str, ...] = (),
        timings: dict[str, float],
        versions: dict[str, str],
        request_id: str,
    ) -> "AnswerResponse":
        """From an answer."""
        return cls(
            question=answer.question,
            answer=answer.text,
            refused=answer.refused,
            confidence=answer.confidence,
            citations=[CitationOut.of(citation) for citation in answer.citations],
            passages=[
                PassageOut.of(number, hit) for number, hit in enumerate(answer.hits, start=1)
            ],
            notes=list(answer.notes),
            partial=bool(missing_shards),
            missing_shards=list(missing_shards),
            timings=timings,
            versions=versions,
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
        description="Share of pairs of wordings whose answers are equal after SQuAD's normalisation (refusals are); "
        "null without answers."
    )
    wordings: list[WordingOut] = Field(description="The question as asked, then its rewordings.")
    timings: dict[str, float] = Field(description="Seconds, by step.")
    versions: dict[str, str] = _VERSIONS
    request_id: str


class IndexState(BaseModel):
    """The index that is served.  After a failed change the old one stays in service."""

    requested_uri: str = Field(description="The index that was asked for last.")
    active_uri: str = Field(description="The index that is being searched.")
    error: str | None = Field(
        description="Why the requested index is not the active one; null if it is."
    )


class ReplicaState(IndexState):
    """The same for one replica."""

    shard: str
    replica: str
    version: str = Field(description="Fingerprint of the active index.")


class GeneratorState(BaseModel):
    """The generator that a replica serves."""

    engine: str = Field(
        "transformers", description="`transformers`, or `openai` for a server elsewhere."
    )
    uri: str
    max_context: int = Field(description="Most tokens of prompt and answer together.")


class IndexResponse(BaseModel):
    """What is being served."""

    index: IndexState
    replicas: list[ReplicaState] = Field(
        default_factory=list, description="Every retriever replica's own state."
    )
    history: list[str] = Field(
        default_factory=list, description="Indexes that were served before, oldest first."
    )
    generator: GeneratorState
    versions: dict[str, str] = _VERSIONS
    limits: Limits


class IndexChangeResponse(BaseModel):
    """What came of a change: every replica serves the new index."""

    index: IndexState
    replicas: list[ReplicaState]
    report: dict[str, Any] = Field(
        description="Of the probe: cosine of the probe texts, and how the searches for them differ from the old index."
    )
    versions: dict[str, str] = _VERSIONS
    request_id: str


class HealthResponse(BaseModel):
    """The process answers (`/healthz`), or a search and a token were just produced (`/readyz`)."""

    service: str = SERVICE
    status: Literal["ok", "ready"] = Field(examples=["ok"])
