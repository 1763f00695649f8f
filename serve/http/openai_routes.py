"""OpenAI's routes: chat completions, embeddings, models.  The real ``openai`` client uses them
unmodified.
"""

import base64
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from invar_ray.answering.followup import stand_alone
from invar_ray.errors import RequestError
from serve.errors import UnknownModel
from serve.http.limits import Limits
from serve.http.openai_forms import (
    CHAT_MODEL,
    EMBEDDING_MODEL,
    LOW_CONFIDENCE,
    PASSAGE_MODEL,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    Choice,
    EmbeddingOut,
    EmbeddingRequest,
    EmbeddingResponse,
    ModelList,
    ModelOut,
    Usage,
)
from serve.http.protocol import AnswerResponse
from serve.http.routes import note_for_audit
from serve.http.sse import event, respond
from serve.records import Question, Reply
from serve.service import Service


def check_model(model: str, *expected: str) -> None:
    """Refuse a name that is none of those expected.

    Raises:
        UnknownModel: naming both.
    """
    if model not in expected:
        # The name is the caller's: neither long, nor anything but letters.
        shown = f"{model[:64]!a}{'..' if len(model) > 64 else ''}"
        raise UnknownModel(f"there is no model {shown} here; use {' or '.join(expected)}")


def _fingerprint(answer: AnswerResponse) -> str:
    return f"{answer.versions.get('index', '')}-{answer.versions.get('generator', '')}"


def openai_routes(service: Service, limits: Limits, audit_text: bool) -> APIRouter:
    """The routes over a service."""
    routes = APIRouter()
    started = int(time.time())

    @routes.post(
        "/v1/chat/completions",
        response_model=ChatResponse,
        summary="An answer, in OpenAI's form",
        responses={
            200: {
                "content": {"text/event-stream": {}},
                "description": "The answer, or a stream of chunks.",
            }
        },
    )
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The last user message is searched with and answered; a follow-up ("and where does it
        hang?") is read in the light of the turns before it, and `invar.read_as` says how.  A system
        prompt may say how to word the answer, never what is true.
        """
        start, context = (
            time.perf_counter(),
            request.scope["invar_context"].narrowed(body.where.to_where(), body.mode),
        )
        check_model(body.model, CHAT_MODEL)
        text, turns = body.question()
        question, top_k = limits.check_question(text), limits.check_top_k(body.top_k)
        name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        asked_length = body.length()
        # Clients send large round numbers: more than the service gives is cut, as its own limit
        # would.
        length = limits.check_max_new_tokens(
            asked_length and min(asked_length, limits.max_new_tokens), name
        )
        note_for_audit(request, question, audit_text)
        stops = body.stops()
        read_as = stand_alone(question, turns)
        found = (
            await service.retrieve(question, top_k, context)
            if read_as is None
            else await service.retrieve_follow_up(read_as, question, top_k, context)
        )
        notes = body.unused(bool(read_as))
        timings = {"retrieve_s": time.perf_counter() - start}
        asked = Question(
            read_as or question,
            found.hits,
            length,
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            # Nobody who names no seed wants the same sample again.
            seed=random.getrandbits(62) if body.seed is None else body.seed,
            stop=stops,
            style=body.style(),
        )

        def whole(reply: Reply) -> AnswerResponse:
            times = timings | {**reply.answer.timings, "total_s": time.perf_counter() - start}
            answer = AnswerResponse.of(found, reply, times, context.request_id)
            return answer.model_copy(
                update={
                    "question": question,
                    "read_as": read_as,
                    "notes": [*notes, *answer.notes],
                }
            )

        identifier, created = f"chatcmpl-{context.request_id}", int(time.time())
        if not body.stream:
            reply = await service.answer(asked, context)
            answer = whole(reply)
            response = ChatResponse(
                id=identifier,
                created=created,
                model=CHAT_MODEL,
                system_fingerprint=_fingerprint(answer),
                choices=[
                    Choice(
                        message=ChatMessage(content=f"{reply.text}{_doubt(reply)}"),
                        finish_reason=_finish(reply),
                    )
                ],
                usage=Usage.of(reply.prompt_tokens, reply.completion_tokens),
                invar=answer,
            )
            return JSONResponse(response.model_dump())

        with_usage = bool(body.stream_options and body.stream_options.include_usage)

        def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
            choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
            values: dict[str, Any] = {
                "id": identifier,
                "object": "chat.completion.chunk",
                "created": created,
                "model": CHAT_MODEL,
                "choices": choices,
            }
            return event(values | ({"usage": None} if with_usage else {}) | more)

        async def events() -> AsyncIterator[str]:
            items = service.stream(asked, context)
            try:
                item: str | Reply | None = await anext(
                    items
                )  # what cannot be answered is refused, not streamed
                yield chunk({"role": "assistant", "content": ""})
                while item is not None:
                    if isinstance(item, str):
                        yield chunk({"content": item})
                    else:
                        answer = whole(item)
                        if _doubt(item):
                            yield chunk({"content": _doubt(item)})
                        more = {
                            "invar": answer.model_dump(),
                            "system_fingerprint": _fingerprint(answer),
                        }
                        yield chunk({}, _finish(item), **more)
                        if with_usage:
                            usage = Usage.of(item.prompt_tokens, item.completion_tokens)
                            yield chunk({}, choices=[], usage=usage.model_dump())
                    item = await anext(items, None)
            finally:
                await items.aclose()  # type: ignore[attr-defined]

        return await respond(events(), context.request_id, event, event("[DONE]"))

    @routes.post(
        "/v1/embeddings", response_model=EmbeddingResponse, summary="Vectors, in OpenAI's form"
    )
    async def embeddings(body: EmbeddingRequest, request: Request) -> EmbeddingResponse:
        context = request.scope["invar_context"]
        check_model(body.model, EMBEDDING_MODEL, PASSAGE_MODEL)
        texts = limits.check_inputs([body.input] if isinstance(body.input, str) else body.input)
        embedded = await service.embed(texts, body.side, context)
        dimension = int(embedded.vectors.shape[1])
        if body.dimensions not in {None, dimension}:
            raise RequestError(
                f"dimensions is {body.dimensions}", expected=f"{dimension}, the encoder's own"
            )
        as_text = body.encoding_format == "base64"
        rows = [
            base64.b64encode(np.asarray(row, dtype="<f4").tobytes()).decode()
            if as_text
            else row.tolist()
            for row in embedded.vectors
        ]
        return EmbeddingResponse(
            data=[EmbeddingOut(index=number, embedding=row) for number, row in enumerate(rows)],
            model=body.model,
            usage=Usage.of(embedded.tokens, 0),
            invar={
                "versions": embedded.versions,
                "cut": list(embedded.cut),
                "request_id": context.request_id,
            },
        )

    @routes.post("/v1/completions", include_in_schema=False)
    async def completions() -> Response:
        raise UnknownModel(
            "plain completions are not there, since questions are answered from passages; use "
            "/v1/chat/completions or /v1/answer"
        )

    async def _models() -> list[ModelOut]:
        versions = {"versions": (await service.describe()).versions}
        return [
            ModelOut(id=name, created=started, invar=versions)
            for name in (CHAT_MODEL, EMBEDDING_MODEL, PASSAGE_MODEL)
        ]

    @routes.get("/v1/models", response_model=ModelList, summary="Models, in OpenAI's form")
    async def models() -> ModelList:
        return ModelList(data=await _models())

    @routes.get(
        "/v1/models/{model}", response_model=ModelOut, summary="One model, in OpenAI's form"
    )
    async def model(model: str) -> ModelOut:
        for each in await _models():
            if each.id == model:
                return each
        raise UnknownModel("there is no such model here; GET /v1/models lists them")

    return routes


def _doubt(reply: Reply) -> str:
    """What follows the model's own text where it was not sure enough to answer."""
    return LOW_CONFIDENCE if reply.answer.low_confidence else ""


def _finish(reply: Reply) -> Any:
    return reply.finish
