"""The web application: routes, error forms, page and guard, over a :class:`~serve.service.Service`
(no Ray in here).
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from invar_ray import __version__
from invar_ray.errors import RequestError
from serve.errors import CODES, Fault, ServiceError, Unavailable
from serve.http.guard import Guard, error_response, fault_response
from serve.http.keys import ApiKey, KeyRing
from serve.http.limits import Limits
from serve.http.openai_routes import openai_routes
from serve.http.pages import page_routes
from serve.http.protocol import ErrorResponse, HealthResponse
from serve.http.rerank import rerank_routes
from serve.http.routes import native_routes
from serve.service import Service

logger = logging.getLogger("ray.serve")


def make_api(
    service: Service,
    limits: Limits,
    *,
    keys: Sequence[ApiKey] = (),
    max_in_flight: int = 256,
    retry_after_s: float = 1.0,
    cors_origins: Sequence[str] = (),
    audit_text: bool = False,
    examples: Sequence[str] = (),
    metrics: Callable[[], Awaitable[str]] | None = None,
) -> ASGIApp:
    """The web application.

    Args:
        service: answers the requests.
        limits: what requests may ask for.
        keys: who may ask; none lets everyone query and nobody administrate.
        max_in_flight: requests beyond this many at once are told to come back later (503).
        retry_after_s: when to come back, in seconds.
        cors_origins: web pages of these origins may call the service; none may by default.
        audit_text: write questions into the audit log.
        examples: questions that the page offers.
        metrics: the metrics of all processes in Prometheus' form; without it there is no
            ``/metrics``.
    """
    api = openapi_app(service, limits, audit_text, examples)
    if metrics is not None:
        _add_metrics(api, metrics)
    guarded: ASGIApp = Guard(
        api,
        limits,
        KeyRing(keys),
        max_in_flight=max_in_flight,
        retry_after_s=retry_after_s,
        meter=service.meter,
        tracer=service.tracer,
    )
    if cors_origins:  # outermost: a browser's preflight carries no key
        allowed = [
            "Authorization",
            "Content-Type",
            "X-API-Key",
            "X-Request-ID",
            "X-Request-Timeout",
        ]
        guarded = CORSMiddleware(
            guarded,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=allowed,
        )
    return guarded


def _add_metrics(api: FastAPI, metrics: Callable[[], Awaitable[str]]) -> None:
    @api.get("/metrics", include_in_schema=False)
    async def exposed() -> PlainTextResponse:
        text = await metrics()
        if not text:  # every request counts: there is always something to tell
            raise Unavailable("no node tells its metrics now", 5.0)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def openapi_app(
    service: Service, limits: Limits, audit_text: bool = False, examples: Sequence[str] = ()
) -> FastAPI:
    """The routes without their guard."""
    api = FastAPI(
        title="invar-ray",
        version=__version__,
        description="Retrieve passages, and answer questions from them with citations.",
        docs_url=None,  # its own page would fetch from a CDN; ours is in serve/http/pages.py
        redoc_url=None,
        responses={
            "4XX": {"model": ErrorResponse, "description": "The request cannot be answered."},
            "5XX": {
                "model": ErrorResponse,
                "description": "The service cannot answer now; Retry-After says when.",
            },
        },
    )
    # Says in the description that there may be a key, so that the docs ask for one; it is the guard
    # that checks it.
    key = [
        Security(
            HTTPBearer(
                auto_error=False,
                scheme_name="key",
                description="Needed where the service has keys.",
            )
        )
    ]
    api.include_router(
        native_routes(service, limits, audit_text, examples), tags=["invar"], dependencies=key
    )
    api.include_router(
        openai_routes(service, limits, audit_text), tags=["openai"], dependencies=key
    )

    api.include_router(rerank_routes(service, limits, audit_text), tags=["invar"], dependencies=key)

    @api.get(
        "/healthz", response_model=HealthResponse, summary="The process answers", tags=["health"]
    )
    async def healthz() -> HealthResponse:
        return HealthResponse(status="ok")

    @api.get(
        "/readyz",
        response_model=HealthResponse,
        summary="A search and a token were produced",
        tags=["health"],
    )
    async def readyz() -> HealthResponse:
        await service.check()
        return HealthResponse(status="ready")

    api.include_router(page_routes())
    _add_error_forms(api)
    return api


def _add_error_forms(api: FastAPI) -> None:
    def identifier(request: Request) -> str:
        context = request.scope.get("invar_context")
        return context.request_id if context is not None else ""

    def invalid(request: Request) -> int:
        """OpenAI says 400 where this service's own routes say 422."""
        return 400 if request.url.path.startswith(("/v1/chat/", "/v1/embeddings")) else 422

    @api.exception_handler(RequestError)
    async def request_error(request: Request, error: RequestError) -> JSONResponse:
        return fault_response(error, identifier(request), invalid(request))

    @api.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> JSONResponse:
        fault = Fault.of(error)
        logger.warning("request %s: %s (%s)", identifier(request), fault.code, fault.message)
        return fault_response(error, identifier(request))

    @api.exception_handler(Exception)  # raised again by the framework, so that the guard logs it
    async def unforeseen_error(request: Request, error: Exception) -> JSONResponse:
        return fault_response(error, identifier(request))

    @api.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = error.errors()
        if any(fault["type"] == "json_invalid" for fault in faults):
            return error_response(
                400, "invalid_json", "the body is not valid JSON", identifier(request)
            )
        # Never echo the input: it may be large, or hold characters that cannot be encoded.
        message = "; ".join(f"{_place(fault['loc'])}: {fault['msg']}" for fault in faults[:10])
        if any(fault["type"] == "model_attributes_type" for fault in faults):
            message += " (send a JSON object with Content-Type: application/json)"
        return error_response(invalid(request), "invalid_request", message, identifier(request))

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        kind = CODES.get(error.status_code, "invalid_request")
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return error_response(
            error.status_code, kind, message, identifier(request), headers=error.headers
        )


def _place(location: tuple[Any, ...]) -> str:
    parts = location[1:] if location and location[0] == "body" else location
    return ".".join(str(part).encode("ascii", "replace").decode()[:64] for part in parts) or "body"
