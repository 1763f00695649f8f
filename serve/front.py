"""What Serve's HTTP proxy runs around every request: one filtered id, a deadline for headers, and
Serve's own refusals in the service's form.

Serve calls :func:`middlewares` where ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` is
``serve.front:middlewares`` in the environment of its processes: ``invar-ray serve`` sets it, for
``serve deploy`` set it where Ray starts.  Without it Serve refuses in plain text, and a request
waits for an ingress replica as long as Serve lets it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http import auto

from serve.http.guard import error_response
from serve.http.limits import request_id
from serve.replicas.handles import Roll

logger = logging.getLogger("ray.serve")
HEADERS_TIMEOUT_S = 10.0
"""The head of a request must have arrived by then."""
_PATIENCE_S = 0.5
INGRESS = "IngressDeployment"


def middlewares() -> list[Middleware]:
    """Called by Serve before its web server starts."""
    auto.AutoHTTPProtocol = _timely(auto.AutoHTTPProtocol)
    return [Middleware(Front)]


class Front:
    """Around the application of Serve's proxy."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._roll: Roll | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http" or scope["path"].startswith("/-/"):
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name.lower() == b"x-request-id"]
        identifier = request_id(given[0].decode("latin-1") if len(given) == 1 else None)
        others = [each for each in scope["headers"] if each[0].lower() != b"x-request-id"]
        scope = {**scope, "headers": [*others, (b"x-request-id", identifier.encode())]}
        answer = _Answer(send)
        running = asyncio.ensure_future(self._app(scope, receive, answer.send))
        try:
            while not (await asyncio.wait({running}, timeout=_PATIENCE_S))[0]:
                if answer.begun:
                    await running
                elif not await self._there():
                    answer.refused = 503, {}
                    break
            if running.done():
                running.result()
        except Exception:
            logger.exception("request %s failed before it reached a replica", identifier)
        finally:
            answer.over = True
            running.cancel()
        if not answer.begun:
            await _refusal(answer.refused, identifier)(scope, receive, send)

    async def _there(self) -> bool:
        """Whether there is an ingress replica that may answer."""
        try:
            if self._roll is None:
                self._roll = await asyncio.to_thread(_ingress)
            if self._roll is not None:
                await self._roll.check()
        except DeploymentUnavailableError:
            return False
        except Exception as error:  # not known: the request goes on waiting
            logger.debug("cannot ask for ingress replicas: %s", error)
        return True


def _ingress() -> Roll | None:
    for name, application in serve.status().applications.items():
        if INGRESS in application.deployments:
            return Roll(serve.get_deployment_handle(INGRESS, name), "there")
    return None


class _Answer:
    """What is sent back; a refusal of Serve's own, which is plain text, is kept back."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self.over = False
        self.refused: tuple[int, dict[str, str]] | None = None

    async def send(self, message: Message) -> None:
        if self.over:
            return
        if message["type"] == "http.response.start":
            headers = {name.lower(): value for name, value in message.get("headers", [])}
            kind = headers.get(b"content-type", b"")
            if message["status"] >= 400 and kind.startswith(b"text/plain"):
                wait = headers.get(b"retry-after")
                self.refused = message["status"], {"wait": wait.decode()} if wait else {}
                return
            self.begun = True
        elif self.refused is not None:
            return
        await self._send(message)


def _refusal(refused: tuple[int, dict[str, str]] | None, identifier: str) -> ASGIApp:
    """Serve's refusal in the service's form; without one the replica died that had the request."""
    status, more = refused or (500, {})
    identity = {"X-Request-ID": identifier}
    if status == 404:
        message = "the service is not there: it starts, or it has been stopped"
        return error_response(404, "not_found", message, identifier, headers=identity)
    code, message = {
        408: ("timeout", "the service took longer than a request may"),
        429: ("overloaded", "too many requests are waiting already"),
        500: ("unavailable", "the replica that had the request is gone"),
        503: ("unavailable", "no replica can take the request now"),
    }.get(status, ("unavailable", "the service cannot answer now"))
    if status == 503 and "wait" in more:
        code, message = "overloaded", "too many requests are waiting already"
    answered = 504 if status == 408 else 503
    wait_s = float(more["wait"]) if more.get("wait", "").isdigit() else 1.0
    return error_response(
        answered, code, message, identifier, retry_after_s=wait_s, headers=identity
    )


def _timely(protocol: Any) -> Any:
    """Uvicorn's protocol with a deadline for the head of each request, which it has no setting
    for.
    """

    class Timely(protocol):
        late: asyncio.TimerHandle | None = None
        last: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.late is not None and self.cycle is not self.last:  # it has come
                self.late.cancel()
                self.late = None
            if self.late is None and (self.cycle is None or self.cycle.response_complete):
                self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            if self.late is not None:
                self.late.cancel()
            super().connection_lost(exc)

        def _await_head(self) -> None:
            self.last = self.cycle
            self.late = self.loop.call_later(HEADERS_TIMEOUT_S, self._head_is_late)

        def _head_is_late(self, last: bool = False) -> None:
            # A loop that was busy for long calls timers before it reads: once more round, in which
            # it reads what came in time.
            self.late = None if last else self.loop.call_later(0.1, self._head_is_late, True)
            if last and not self.transport.is_closing():
                self.transport.close()

    return Timely
