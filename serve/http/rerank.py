"""``POST /v1/rerank``, in the form that vLLM, TEI, Jina and Cohere share."""

from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator

from serve.http.limits import Limits
from serve.http.openai_routes import check_model
from serve.http.protocol import clean_text
from serve.http.routes import note_for_audit
from serve.service import Service

RERANK_MODEL: Literal["invar-reranker"] = "invar-reranker"


class Document(BaseModel):
    """A text in an object of its own."""

    model_config = ConfigDict(extra="forbid")

    text: str


class RerankRequest(BaseModel):
    """Texts to be sorted by how well they answer a question."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "query": "Who keeps the lighthouse?",
                    "documents": ["Pears grow in the orchard.", "Mara keeps the lighthouse."],
                    "top_n": 1,
                }
            ]
        },
    )

    model: str | None = Field(None, description=f"`{RERANK_MODEL}`.")
    query: str = Field(description="The question in plain words.")
    documents: list[str | Document] = Field(description="Texts, or objects with a `text`.")
    top_n: int | None = Field(
        None, strict=True, ge=1, description="Give the best ones only; null gives all."
    )
    return_documents: bool = Field(False, strict=True, description="Give their texts, too.")

    @field_validator("query")
    @classmethod
    def _clean(cls, value: str) -> str:
        return clean_text(value)

    @field_validator("documents")
    @classmethod
    def _clean_all(cls, value: list[str | Document]) -> list[str | Document]:
        return [clean_text(each if isinstance(each, str) else each.text) for each in value]


class RerankResult(BaseModel):
    """A document and how relevant it is."""

    index: int = Field(description="Its number in the request, from 0.")
    relevance_score: float = Field(description="In [0, 1], by the cross-encoder.")
    document: Document | None = Field(None, description="Null unless asked for.")


class RerankUsage(BaseModel):
    """Tokens that were read; the question counts with each document."""

    total_tokens: int


class RerankResponse(BaseModel):
    """Documents, the most relevant first; `invar` holds the version, and in `cut` the numbers of
    documents that were longer than the cross-encoder reads.
    """

    id: str
    model: Literal["invar-reranker"] = RERANK_MODEL
    results: list[RerankResult]
    usage: RerankUsage
    invar: dict[str, Any]


def rerank_routes(service: Service, limits: Limits, audit_text: bool) -> APIRouter:
    """The route over a service."""
    routes = APIRouter()

    @routes.post(
        "/v1/rerank", response_model=RerankResponse, summary="Documents by relevance to a question"
    )
    async def rerank(body: RerankRequest, request: Request) -> RerankResponse:
        context = request.scope["invar_context"]
        if body.model is not None:
            check_model(body.model, RERANK_MODEL)
        question = limits.check_question(body.query)
        texts = limits.check_documents([str(each) for each in body.documents])
        note_for_audit(request, question, audit_text)
        scored = await service.score(question, texts, context)
        order = sorted(range(len(texts)), key=lambda number: -scored.scores[number])
        return RerankResponse(
            id=f"rerank-{context.request_id}",
            results=[
                RerankResult(
                    index=number,
                    relevance_score=scored.scores[number],
                    document=Document(text=texts[number]) if body.return_documents else None,
                )
                for number in order[: body.top_n]
            ],
            usage=RerankUsage(total_tokens=scored.tokens),
            invar={
                "versions": scored.versions,
                "cut": list(scored.cut),
                "request_id": context.request_id,
            },
        )

    return routes
