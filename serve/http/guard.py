"""Outermost layer of the web application: request id, key, rate, body size, admission, disconnects,
headers, audit.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Mapping

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from invar_ray.answering.filters import Where
from invar_ray.errors import RequestError
from serve.errors import Fault
from serve.http.keys import ApiKey, KeyRing
from serve.http.limits import Limits, request_id
from serve.http.pages import PATHS
from serve.http.protocol import ErrorResponse
from serve.records import Context
from serve.telemetry.metrics import Meter
from serve.telemetry.tracing import Tracer

logger = logging.getLogger("ray.serve")
audit_logger = logging.getLogger(
    "ray.serve.audit"
)  # below Serve's own, whose handlers and format it takes
_OPEN_PATHS = {"/healthz", "/readyz", "/openapi.json", *PATHS}
_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}
BODY_TIMEOUT_S = 20.0
"""A body must have arrived by then: a client that sends a byte now and then would hold a place for
ever.
"""


def error_response(
    status: int,
    code: str,
    message: str,
    identifier: str,
    *,
    retry_after_s: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error in its one form."""
    merged = dict(headers or {})
    if retry_after_s is not None:
        merged["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    body = ErrorResponse.of(Fault(status, code, message), identifier).model_dump()
    return JSONResponse(body, status_code=status, headers=merged)


def fault_response(error: Exception, identifier: str, status: int | None = None) -> JSONResponse:
    """The answer to an error of :data:`serve.errors.TABLE`, or to what nobody foresaw; ``status``
    stands in for the table's.
    """
    fault = Fault.of(error)
    return error_response(
        status or fault.status,
        fault.code,
        fault.message,
        identifier,
        retry_after_s=fault.retry_after_s,
    )


class _Gone(Exception):
    """The client went away."""


class Guard:
    """Lets a request through to the application, or answers it.

    The id of a request comes from its ``X-Request-ID`` header, which Serve's proxy fills in if the
    caller did not and sends back; setting it here as well would double it.

    Args:
        app: what is guarded; finds ``invar_context`` in the scope.
        limits: of bodies and time.
        keys: who may ask.
        max_in_flight: requests that are answered at once; more are told to come back (503).
        retry_after_s: when to come back.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        keys: KeyRing,
        *,
        max_in_flight: int = 256,
        retry_after_s: float = 1.0,
        meter: Meter | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._app, self._limits, self._keys = app, limits, keys
        self._max_in_flight, self._retry_after_s = max_in_flight, retry_after_s
        self._meter, self._tracer = meter or Meter(), tracer or Tracer()
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id")
        identifier = request_id(given.decode("latin-1") if given is not None else None)
        scope["invar_context"] = Context(identifier)
        exchange = _Exchange(send)
        start = time.perf_counter()
        key: ApiKey | None = None
        guarded = scope["path"] not in _OPEN_PATHS
        try:
            key, refusal = (
                self._admit(scope["path"], headers, identifier) if guarded else (None, None)
            )
            if refusal is not None:
                await refusal(scope, receive, exchange.send)
                return
            self._in_flight += guarded
            self._meter.record("invar_in_flight", self._in_flight)
            try:
                await self._answer(scope, headers, receive, exchange, identifier, key)
            finally:
                self._in_flight -= guarded
        except _Gone:
            exchange.status = 499
        except Exception as error:
            logger.exception("request %s failed", identifier)
            if not exchange.status:
                await fault_response(error, identifier)(scope, receive, exchange.send)
        finally:
            if guarded:
                self._note(scope, key, exchange, identifier, time.perf_counter() - start)

    def _admit(
        self, path: str, headers: dict[bytes, bytes], identifier: str
    ) -> tuple[ApiKey | None, JSONResponse | None]:
        admin = path.startswith("/admin")
        key = self._keys.find(_token(headers))
        if key is None and not (self._keys.open and not admin):
            if self._keys.open:
                message = (
                    "the service has no API keys, so nobody may administrate it: give it one of "
                    "scope admin"
                )
                return None, error_response(403, "forbidden", message, identifier)
            message = "a valid key is needed: Authorization: Bearer KEY, or X-API-Key: KEY"
            wanted = {"WWW-Authenticate": "Bearer"}
            return None, error_response(401, "unauthorized", message, identifier, headers=wanted)
        if key is not None:
            scope = "admin" if admin else "query"
            if scope not in key.scopes:
                message = f"key {key.name} has not the scope {scope}"
                return key, error_response(403, "forbidden", message, identifier)
            wait = self._keys.wait_s(key)
            if wait > 0:
                message = f"key {key.name} may ask {key.requests_per_minute} times a minute"
                return key, error_response(
                    429, "rate_limited", message, identifier, retry_after_s=wait
                )
        if self._in_flight >= self._max_in_flight:
            message = f"{self._in_flight} requests are being answered already"
            wait = self._retry_after_s
            return key, error_response(503, "overloaded", message, identifier, retry_after_s=wait)
        return key, None

    async def _answer(
        self,
        scope: Scope,
        headers: dict[bytes, bytes],
        receive: Receive,
        exchange: _Exchange,
        identifier: str,
        key: ApiKey | None,
    ) -> None:
        async def refuse(status: int, code: str, message: str) -> None:
            await error_response(status, code, message, identifier)(scope, receive, exchange.send)

        try:
            given = headers.get(b"x-request-timeout")
            timeout_s = self._limits.check_timeout(
                given.decode("latin-1") if given is not None else None
            )
            body = await asyncio.wait_for(self._body(headers, receive), BODY_TIMEOUT_S)
        except RequestError as error:
            return await refuse(400, "invalid_request", str(error))
        except TimeoutError:
            return await refuse(
                408, "timeout", f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
            )
        if body is None:
            most = self._limits.max_body_bytes
            return await refuse(413, "body_too_large", f"the body is longer than {most} bytes")
        parent = (
            {"traceparent": headers[b"traceparent"].decode("latin-1")}
            if b"traceparent" in headers
            else None
        )
        with self._tracer.span("request", parent, route=scope["path"]) as trace:
            bound = key.where.to_where() if key is not None else Where()
            scope["invar_context"] = Context(identifier, time.monotonic() + timeout_s, trace, bound)
            await _until_gone(self._app, scope, body, receive, exchange.send)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body, or ``None`` as soon as it is known to be too long."""
        stated = headers.get(b"content-length", b"")
        if stated.isdigit() and int(stated[:19]) > self._limits.max_body_bytes:
            return None
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise _Gone
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._limits.max_body_bytes:
                return None
            chunks.append(chunk)
            more = message.get("more_body", False)
        return b"".join(chunks)

    def _note(
        self, scope: Scope, key: ApiKey | None, exchange: _Exchange, identifier: str, seconds: float
    ) -> None:
        route = getattr(
            scope.get("route"), "path", "other"
        )  # never the raw path: anyone could fill the label
        self._meter.record("invar_requests_total", route=route, status=str(exchange.status))
        self._meter.record("invar_request_seconds", seconds, route=route)
        line = {
            "request_id": identifier,
            "key": key.name if key else None,
            "method": scope["method"],
            "route": route,
            "status": exchange.status,
            "seconds": round(seconds, 4),
            **scope.get("invar_audit", {}),
        }
        audit_logger.info(json.dumps(line))


class _Exchange:
    """What was sent back so far; adds the security headers."""

    def __init__(self, send: Send) -> None:
        self._send, self.status = send, 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = int(message["status"])
            present = {name.lower() for name, _ in message.get("headers", [])}
            added = [(name, value) for name, value in _HEADERS.items() if name not in present]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await self._send(message)


def _token(headers: dict[bytes, bytes]) -> bytes:
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")


async def _until_gone(
    app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send
) -> None:
    """Run the application on a body that was read; cancel it when the client goes away, so that the
    model stops.
    """
    gone = asyncio.Event()
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    running, watching = (
        asyncio.ensure_future(app(scope, replayed, send)),
        asyncio.create_task(watch()),
    )
    try:
        await asyncio.wait({running, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            gone.set()
            running.cancel()
            await asyncio.wait({running})
            raise _Gone
        await running
    finally:
        watching.cancel()
        running.cancel()
