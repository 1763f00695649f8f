"""The service's own routes: retrieve, answer, stability, index."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from invar_ray.errors import RequestError
from serve.errors import plain
from serve.http.index_forms import (
    ChangeId,
    ChangeOut,
    IndexChange,
    IndexChangeResponse,
    IndexResponse,
)
from serve.http.limits import Limits
from serve.http.protocol import (
    AnswerRequest,
    AnswerResponse,
    PassageOut,
    RetrieveRequest,
    RetrieveResponse,
    StabilityRequest,
    StabilityResponse,
)
from serve.http.sse import event, respond
from serve.records import Question, Reply
from serve.service import Service
from serve.stability import ask_all


def note_for_audit(request: Request, question: str, with_text: bool) -> None:
    """What the audit log says of a question: its length, and its text only where the service was
    told so.
    """
    values: dict[str, Any] = {"question_chars": len(question)}
    request.scope["invar_audit"] = values | ({"question": question} if with_text else {})


def native_routes(
    service: Service, limits: Limits, audit_text: bool, examples: Sequence[str] = ()
) -> APIRouter:
    """The routes over a service."""
    routes = APIRouter()

    @routes.post("/v1/retrieve", response_model=RetrieveResponse, summary="Passages for a question")
    async def retrieve(body: RetrieveRequest, request: Request) -> RetrieveResponse:
        start, context = (
            time.perf_counter(),
            request.scope["invar_context"].narrowed(body.where.to_where(), body.mode),
        )
        question, top_k = limits.check_question(body.question), limits.check_top_k(body.top_k)
        note_for_audit(request, question, audit_text)
        found = await service.retrieve(question, top_k, context)
        timings = {"retrieve_s": time.perf_counter() - start}
        return RetrieveResponse.of(question, found, timings, context.request_id)

    @routes.post(
        "/v1/answer",
        response_model=AnswerResponse,
        summary="An answer with citations",
        responses={
            200: {
                "content": {"text/event-stream": {}},
                "description": "The answer, or a stream of events.",
            }
        },
    )
    async def answer(body: AnswerRequest, request: Request) -> Response:
        start, context = (
            time.perf_counter(),
            request.scope["invar_context"].narrowed(body.where.to_where(), body.mode),
        )
        question, top_k = limits.check_question(body.question), limits.check_top_k(body.top_k)
        max_new_tokens = limits.check_max_new_tokens(body.max_new_tokens)
        note_for_audit(request, question, audit_text)
        found = await service.retrieve(question, top_k, context)
        timings = {"retrieve_s": time.perf_counter() - start}
        asked = Question(question, found.hits, max_new_tokens)
        if not body.stream:
            reply = await service.answer(asked, context)
            timings |= {**reply.answer.timings, "total_s": time.perf_counter() - start}
            whole = AnswerResponse.of(found, reply, timings, context.request_id)
            return JSONResponse(whole.model_dump())

        async def events() -> AsyncIterator[str]:
            items = service.stream(asked, context)
            try:
                first = await anext(
                    items
                )  # a question that cannot be answered is refused, not streamed
                found_out = {
                    "passages": [passage.model_dump() for passage in PassageOut.all_of(found)],
                    "mode": found.mode,
                    "missing_shards": list(found.missing_shards),
                    "versions": found.versions,
                    "request_id": context.request_id,
                }
                yield event(found_out, "passages")
                item: str | Reply | None = first
                while item is not None:
                    if isinstance(item, str):
                        yield event({"text": item}, "delta")
                    else:
                        times = timings | {
                            **item.answer.timings,
                            "total_s": time.perf_counter() - start,
                        }
                        whole = AnswerResponse.of(found, item, times, context.request_id)
                        yield event(whole.model_dump(), "answer")
                    item = await anext(items, None)
            finally:
                await items.aclose()  # type: ignore[attr-defined]

        return await respond(
            events(), context.request_id, lambda error: event(error, "error"), event("{}", "done")
        )

    @routes.post(
        "/v1/stability", response_model=StabilityResponse, summary="Does the wording matter?"
    )
    async def stability(body: StabilityRequest, request: Request) -> StabilityResponse:
        start, context = (
            time.perf_counter(),
            request.scope["invar_context"].narrowed(body.where.to_where(), body.mode),
        )
        question, top_k = limits.check_question(body.question), limits.check_top_k(body.top_k)
        rewrites, length = (
            limits.check_rewrites(body.rewrites),
            limits.check_max_new_tokens(body.max_new_tokens),
        )
        note_for_audit(request, question, audit_text)
        wordings = await ask_all(
            service, question, rewrites, body.seed, top_k, length if body.answers else None, context
        )
        timings = {"total_s": time.perf_counter() - start}
        return StabilityResponse.of(wordings, top_k, timings, context.request_id)

    @routes.get("/v1/index", response_model=IndexResponse, summary="What is being served")
    async def index(request: Request) -> IndexResponse:
        bound = bool(request.scope["invar_context"].where)  # others' documents are not its business
        return IndexResponse.of(await service.describe(), limits, () if bound else examples)

    @routes.post(
        "/admin/index",
        status_code=202,
        response_model=ChangeOut,
        responses={200: {"model": IndexChangeResponse, "description": "With `wait`: it is made."}},
        summary="Serve another index, or go back",
    )
    async def change(body: IndexChange, request: Request) -> Response:
        if (body.index_uri is not None) + body.rollback + body.mend != 1:
            raise RequestError(
                "the body names none or several",
                expected="one of index_uri, rollback: true and mend: true",
            )
        uris = [body.index_uri] if isinstance(body.index_uri, str) else body.index_uri
        if uris is not None and not all(uri.strip() for uri in uris):
            raise RequestError("index_uri is empty", expected="the URI of an index artifact")
        request.scope["invar_audit"] = {
            "index_uri": [plain(uri) for uri in uris]
            if uris is not None
            else "mend"
            if body.mend
            else "rollback"
        }
        begun = service.changes.begin(uris, body.mend)
        if not body.wait:
            location = {"Location": f"/admin/index/{begun.id}"}
            return JSONResponse(ChangeOut.of(begun).model_dump(), 202, headers=location)
        serving = await service.changed(begun)
        made = IndexChangeResponse.of(serving, request.scope["invar_context"].request_id)
        return JSONResponse(made.model_dump())

    @routes.get("/admin/index/{change}", response_model=ChangeOut, summary="How far a change is")
    async def seen(change: ChangeId) -> ChangeOut:
        return ChangeOut.of(await service.changes.see(change))

    @routes.delete("/admin/index/{change}", response_model=ChangeOut, summary="Cancel a change")
    async def cancel(change: ChangeId) -> ChangeOut:
        """Until it is published; the index that is served stays."""
        return ChangeOut.of(await service.changes.cancel(change))

    return routes
