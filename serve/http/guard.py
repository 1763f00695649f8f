"""Outermost layer of the web application: request id, key, rate, body size, admission, disconnects,
headers, audit.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from invar_ray.answering.filters import Where
from invar_ray.errors import RequestError
from serve.errors import Fault, Overloaded, ServiceError
from serve.http.keys import ApiKey, KeyRing
from serve.http.keys import Scope as KeyScope
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
"""A body must have arrived by then: a client that sends a byte now and then would be waited for
for ever.
"""
_LOOKS = 20
_CROWD = 16
"""A body that was on its way beside so many may have come in time and not been read: the proxy
hands over those of a burst one by one.
"""
ARRIVING_BYTES = 64 << 20
"""Most memory of bodies that have not arrived, beyond which long ones are refused."""
_SHORT_BODY = 64 << 10
_ADDRESSES = re.compile(r"[0-9A-Fa-f:.,\[\] ]{1,200}")


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
        max_in_flight: requests that are answered at once; more are told to come back (503).  A
            request whose body has not arrived is not among them.
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
        self._awaited = 0  # bodies that have not arrived as a whole
        self._crowd_at = -math.inf  # when there was last a crowd of them
        self._arriving = 0  # bytes of bodies that have not arrived as a whole

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
            if refusal is None:
                refusal, timeout_s, body = await self._arrived(scope, headers, receive, identifier)
            if refusal is None and guarded:  # others may have come while it arrived
                refusal = self._crowded(identifier)
            if refusal is not None:
                await refusal(scope, receive, exchange.send)
                return
            self._in_flight += guarded
            self._meter.record("invar_in_flight", self._in_flight)
            try:
                await self._answer(
                    scope, headers, receive, exchange, identifier, key, timeout_s, body
                )
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
        wanted_scope = _scope_of(path)
        key = self._keys.find(_token(headers))
        if key is None and not (self._keys.open and wanted_scope == "query"):
            if self._keys.open:
                message = (
                    "the service has no API keys, so this is closed to everybody: give it one of "
                    f"scope {wanted_scope}"
                )
                return None, error_response(403, "forbidden", message, identifier)
            message = "a valid key is needed: Authorization: Bearer KEY, or X-API-Key: KEY"
            wanted = {"WWW-Authenticate": "Bearer"}
            return None, error_response(401, "unauthorized", message, identifier, headers=wanted)
        if key is not None:
            if wanted_scope not in key.scopes:
                message = f"key {key.name} has not the scope {wanted_scope}"
                return key, error_response(403, "forbidden", message, identifier)
            wait = self._keys.wait_s(key)
            if wait > 0:
                message = f"key {key.name} may ask {key.requests_per_minute} times a minute"
                return key, error_response(
                    429, "rate_limited", message, identifier, retry_after_s=wait
                )
        return key, self._crowded(identifier)

    def _crowded(self, identifier: str) -> JSONResponse | None:
        if self._in_flight < self._max_in_flight:
            return None
        message = f"{self._in_flight} requests are being answered already"
        wait = self._retry_after_s
        return error_response(503, "overloaded", message, identifier, retry_after_s=wait)

    async def _arrived(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, identifier: str
    ) -> tuple[JSONResponse | None, float, bytes]:
        """Time and body of a request, or why it is refused."""
        most = self._limits.most_bytes(scope["path"])
        try:
            given = headers.get(b"x-request-timeout")
            timeout_s = self._limits.check_timeout(
                given.decode("latin-1") if given is not None else None
            )
            begin = time.monotonic()
            self._count(1)
            try:
                body = await _in_time(self._body(headers, receive, most))
            finally:
                self._count(-1)
        except RequestError as error:
            return error_response(400, "invalid_request", str(error), identifier), 0.0, b""
        except TimeoutError:
            if self._crowd_at >= begin:
                late = (
                    "the body was not read in time: those of many other requests were on their way"
                )
                crowd = Overloaded(late, self._retry_after_s)
                return fault_response(crowd, identifier), 0.0, b""
            message = f"the body did not arrive within {BODY_TIMEOUT_S:g} s"
            return error_response(408, "timeout", message, identifier), 0.0, b""
        except ServiceError as error:
            return fault_response(error, identifier), 0.0, b""
        if body is None:
            message = f"the body is longer than {most} bytes"
            return error_response(413, "body_too_large", message, identifier), 0.0, b""
        return None, timeout_s, body

    def _count(self, bodies: int) -> None:
        if max(self._awaited, self._awaited + bodies) >= _CROWD:
            self._crowd_at = time.monotonic()
        self._awaited += bodies

    async def _answer(
        self,
        scope: Scope,
        headers: dict[bytes, bytes],
        receive: Receive,
        exchange: _Exchange,
        identifier: str,
        key: ApiKey | None,
        timeout_s: float,
        body: bytes,
    ) -> None:
        parent = (
            {"traceparent": headers[b"traceparent"].decode("latin-1")}
            if b"traceparent" in headers
            else None
        )
        with self._tracer.span("request", parent, route=scope["path"]) as trace:
            bound = key.where.to_where() if key is not None else Where()
            scope["invar_context"] = Context(identifier, time.monotonic() + timeout_s, trace, bound)
            await _until_gone(self._app, scope, body, receive, exchange.send)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive, most: int) -> bytes | None:
        """The whole body, or ``None`` as soon as it is known to be too long.

        Raises:
            Overloaded: it is long, and too much is arriving already.
        """
        stated = headers.get(b"content-length", b"")
        if stated.isdigit() and int(stated[:19]) > most:
            return None
        chunks, size, more = [], 0, True
        try:
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    raise _Gone
                chunk = message.get("body", b"")
                size += len(chunk)
                self._arriving += len(chunk)
                if size > most:
                    return None
                if size > _SHORT_BODY and self._arriving > ARRIVING_BYTES:
                    raise Overloaded(
                        "too many long bodies are arriving already", self._retry_after_s
                    )
                chunks.append(chunk)
                more = message.get("more_body", False)
        finally:
            self._arriving -= size
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
            "client": (scope.get("client") or ("",))[0],
            **_forwarded(scope["headers"]),
            "method": scope["method"],
            "route": route,
            "status": exchange.status,
            "seconds": round(seconds, 4),
            **scope.get("invar_audit", {}),
        }
        audit_logger.info(json.dumps(line))


async def _in_time(body: Coroutine[Any, Any, bytes | None]) -> bytes | None:
    """The body, if it arrives within :data:`BODY_TIMEOUT_S` as this process counts them: while it
    is busy for seconds it reads late what came in time, and waits so much longer.

    Raises:
        TimeoutError: it did not.
    """
    arriving = asyncio.ensure_future(body)
    try:
        for _ in range(_LOOKS):
            if (await asyncio.wait({arriving}, timeout=BODY_TIMEOUT_S / _LOOKS))[0]:
                return await arriving
        raise TimeoutError
    finally:
        arriving.cancel()


def _forwarded(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """What a proxy says of the client; anybody can send it, so it stands beside the address that
    the request came from.
    """
    given = next((value for name, value in headers if name.lower() == b"x-forwarded-for"), b"")
    text = given.decode("latin-1")
    return {"forwarded_for": text} if _ADDRESSES.fullmatch(text) else {}


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


def _scope_of(path: str) -> KeyScope:
    if path == "/metrics":
        return "metrics"
    return "admin" if path.startswith("/admin") else "query"


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
