"""The HTTP side of the service: routes, limits, keys and errors, over any backend (no Ray in here)."""

import base64
import hashlib
import hmac
import logging
import math
import re
import time
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from invar_ray import __version__
from invar_ray.errors import RequestError
from invar_ray.schema import Answer
from serve.engines import Found, Question
from serve.protocol import (
    AnswerRequest,
    AnswerResponse,
    ErrorResponse,
    HealthResponse,
    IndexResponse,
    Limits,
    PassageOut,
    RetrieveRequest,
    RetrieveResponse,
    ServiceError,
    request_id,
)

logger = logging.getLogger("ray.serve")
_OPEN_PATHS = {"/", "/healthz", "/readyz", "/docs", "/openapi.json"}
_KINDS = {401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


class Backend(Protocol):
    """What the routes call; they raise :class:`~serve.protocol.ServiceError` or ``RequestError``."""

    async def retrieve(self, question: str, top_k: int) -> Found:
        """The best passages for a question."""
        ...

    async def answer(self, question: Question) -> tuple[Answer, dict[str, str]]:
        """The answer to a question from its passages, and the generator's versions."""
        ...

    async def describe(self) -> dict[str, Any]:
        """``index``, ``generator`` and ``versions`` of what is served."""
        ...

    async def check(self) -> None:
        """Search once and generate one token."""
        ...


def make_api(backend: Backend, limits: Limits, *, api_key: str | None = None, max_in_flight: int = 256) -> ASGIApp:
    """The web application.

    Args:
        backend: answers the requests.
        limits: what requests may ask for.
        api_key: needed for ``/v1``, as ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``; ``None`` asks for none.
        max_in_flight: requests to ``/v1`` beyond this many at once are told to come back later (503).
    """
    api = FastAPI(
        title="invar-ray",
        version=__version__,
        description="Retrieve passages, and answer questions from them with citations.",
        redoc_url=None,
        responses={
            "4XX": {"model": ErrorResponse, "description": "The request cannot be answered."},
            "5XX": {"model": ErrorResponse, "description": "The service cannot answer now."},
        },
    )
    page, policy = _page()

    @api.post("/v1/retrieve", response_model=RetrieveResponse, summary="Passages for a question")
    async def retrieve(body: RetrieveRequest, request: Request) -> RetrieveResponse:
        start = time.perf_counter()
        question, top_k = limits.check_question(body.question), limits.check_top_k(body.top_k)
        found = await backend.retrieve(question, top_k)
        return RetrieveResponse(
            question=question,
            passages=[PassageOut.of(number, hit) for number, hit in enumerate(found.hits, start=1)],
            timings={"retrieve_s": time.perf_counter() - start},
            versions=found.versions,
            request_id=request.scope["invar_request_id"],
        )

    @api.post("/v1/answer", response_model=AnswerResponse, summary="An answer with citations")
    async def answer(body: AnswerRequest, request: Request) -> AnswerResponse:
        start = time.perf_counter()
        question, top_k = limits.check_question(body.question), limits.check_top_k(body.top_k)
        max_new_tokens = limits.check_max_new_tokens(body.max_new_tokens)
        found = await backend.retrieve(question, top_k)
        retrieve_s = time.perf_counter() - start
        result, versions = await backend.answer(Question(question, found.hits, max_new_tokens))
        timings = {"retrieve_s": retrieve_s, **result.timings, "total_s": time.perf_counter() - start}
        return AnswerResponse.of(
            result,
            timings=timings,
            versions={**found.versions, **versions},
            request_id=request.scope["invar_request_id"],
        )

    @api.get("/v1/index", response_model=IndexResponse, summary="What is being served")
    async def index() -> IndexResponse:
        return IndexResponse.model_validate({**await backend.describe(), "limits": limits})

    @api.get("/healthz", response_model=HealthResponse, summary="The process answers")
    async def healthz() -> HealthResponse:
        return HealthResponse(status="ok")

    @api.get("/readyz", response_model=HealthResponse, summary="A search and a token were just produced")
    async def readyz() -> HealthResponse:
        await backend.check()
        return HealthResponse(status="ready")

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def ask() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    _add_error_forms(api)
    return _Guard(api, limits.max_body_bytes, api_key, max_in_flight)


def _add_error_forms(api: FastAPI) -> None:
    @api.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> JSONResponse:
        return _error(422, "invalid_request", str(error), request.scope["invar_request_id"])

    @api.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> JSONResponse:
        logger.warning("request %s: %s (%s)", request.scope["invar_request_id"], error.kind, error.message)
        return _error(
            error.status,
            error.kind,
            error.message,
            request.scope["invar_request_id"],
            retry_after_s=error.retry_after_s,
        )

    @api.exception_handler(Exception)  # raised again by the framework, so that the guard logs it
    async def unforeseen_error(request: Request, error: Exception) -> JSONResponse:
        return _internal(request.scope["invar_request_id"])

    @api.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = error.errors()
        if any(fault["type"] == "json_invalid" for fault in faults):
            return _error(400, "invalid_json", "the body is not valid JSON", request.scope["invar_request_id"])
        # Never echo the input: it may be large, or hold characters that cannot be encoded.
        message = "; ".join(f"{_place(fault['loc'])}: {fault['msg']}" for fault in faults[:10])
        if any(fault["type"] == "model_attributes_type" for fault in faults):
            message += " (send a JSON object with Content-Type: application/json)"
        return _error(422, "invalid_request", message, request.scope["invar_request_id"])

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        kind = _KINDS.get(error.status_code, "invalid_request")
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _error(error.status_code, kind, message, request.scope["invar_request_id"], headers=error.headers)


def _internal(identifier: str) -> JSONResponse:
    return _error(500, "internal", "the service failed; its log has the cause", identifier)


def _place(location: tuple[Any, ...]) -> str:
    parts = location[1:] if location and location[0] == "body" else location
    return ".".join(str(part).encode("ascii", "replace").decode()[:64] for part in parts) or "body"


def _error(
    status: int,
    kind: str,
    message: str,
    identifier: str,
    *,
    retry_after_s: float | None = None,
    headers: Any = None,
) -> JSONResponse:
    merged = dict(headers or {})
    if retry_after_s is not None:
        merged["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    return JSONResponse(ErrorResponse.of(kind, message, identifier).model_dump(), status_code=status, headers=merged)


def _page() -> tuple[str, str]:
    """The page at ``/`` and a content security policy that admits its own style and script, by hash, and no others."""
    html = (Path(__file__).parent / "web" / "index.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; style-src {hashes('style')}; script-src {hashes('script')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


class _Guard:
    """Outermost layer: request id, key, body size, admission, and a form for errors that nobody foresaw.

    The id of a request comes from its ``X-Request-ID`` header, which Serve's proxy fills in if the caller did not and
    sends back; setting it here as well would double it.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, api_key: str | None, max_in_flight: int) -> None:
        self._app, self._max_body_bytes, self._max_in_flight = app, max_body_bytes, max_in_flight
        self._api_key = api_key.encode() if api_key else None
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id")
        identifier = request_id(given.decode("latin-1") if given is not None else None)
        scope["invar_request_id"] = identifier
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        async def refuse(response: JSONResponse) -> None:
            await response(scope, receive, watched_send)

        guarded = scope["path"] not in _OPEN_PATHS
        if guarded and not self._has_key(headers):
            response = _error(
                401,
                "unauthorized",
                "a valid key is needed: Authorization: Bearer KEY, or X-API-Key: KEY",
                identifier,
                headers={"WWW-Authenticate": "Bearer"},
            )
            return await refuse(response)
        if guarded and self._in_flight >= self._max_in_flight:
            message = f"{self._in_flight} requests are being answered already"
            return await refuse(_error(503, "overloaded", message, identifier, retry_after_s=1))
        self._in_flight += guarded
        try:
            body = await self._body(headers, receive)
            if body is None:
                message = f"the body is longer than {self._max_body_bytes} bytes"
                return await refuse(_error(413, "body_too_large", message, identifier))
            await self._app(scope, _replay(body, receive), watched_send)
        except Exception:
            logger.exception("request %s failed", identifier)
            if not started:
                await refuse(_internal(identifier))
        finally:
            self._in_flight -= guarded

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        if self._api_key is None:
            return True
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        return hmac.compare_digest(given, self._api_key)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body, or ``None`` as soon as it is known to be too long."""
        stated = headers.get(b"content-length", b"")
        if stated.isdigit() and int(stated) > self._max_body_bytes:
            return None
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client went away
                break
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._max_body_bytes:
                return None
            chunks.append(chunk)
            more = message.get("more_body", False)
        return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
