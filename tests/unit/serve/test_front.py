"""What is put around Serve's proxy: ids, refusals in one form, heads that do not come."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http import auto

import serve.front
from serve.front import Front, middlewares
from tests.serving import fault


def call(inner: ASGIApp, path: str = "/v1/answer", **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(Front(inner))
        async with httpx.AsyncClient(transport=transport, base_url="http://s") as client:
            return await client.post(path, **options)

    return asyncio.run(send())


def refusing(status: int, **headers: str) -> ASGIApp:
    return PlainTextResponse("Request failed at /srv/secret", status, headers=headers)


@pytest.mark.parametrize(
    "inner, status, code, wait",
    [
        (refusing(503, **{"Retry-After": "3"}), 503, "overloaded", "3"),
        (refusing(503), 503, "unavailable", "1"),
        (refusing(429), 503, "overloaded", "1"),
        (refusing(500), 503, "unavailable", "1"),
        (refusing(408), 504, "timeout", "1"),
        (refusing(404), 404, "not_found", None),
    ],
)
def test_refusals_of_serve_take_the_form(
    inner: ASGIApp, status: int, code: str, wait: str | None
) -> None:
    answer = call(inner, headers={"X-Request-ID": "mine"})
    assert "secret" not in fault(answer, status, code)
    assert answer.headers.get("Retry-After") == wait
    assert answer.headers["X-Request-ID"] == answer.json()["error"]["request_id"] == "mine"


def test_a_replica_that_dies_with_a_request_is_no_plain_500() -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("x")

    for inner in (silent, broken):
        answer = call(inner)
        fault(answer, 503, "unavailable")
        assert answer.headers["Retry-After"] == "1"


def test_what_the_service_sends_goes_through() -> None:
    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("counted", 200)(scope, receive, send)

    assert call(inner).text == "counted"
    assert call(refusing(503), "/-/healthz").text.startswith("Request failed")


@pytest.mark.parametrize("given", [[b"ok-1"], [b"caf\xc3\xa9"], [b"\xff"], [b"a", b"b"], []])
def test_a_request_has_one_filtered_id(given: list[bytes]) -> None:
    seen: list[list[bytes]] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append([value for name, value in scope["headers"] if name == b"x-request-id"])
        await PlainTextResponse("")(scope, receive, send)

    call(inner, headers=[(b"x-request-id", value) for value in given])
    ((identifier,),) = seen
    if given == [b"ok-1"]:
        assert identifier == b"ok-1"
    else:
        assert re.fullmatch(b"[0-9a-f]{32}", identifier)


def test_without_an_ingress_replica_it_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.exceptions import DeploymentUnavailableError

    class Nobody:
        async def check(self) -> None:
            raise DeploymentUnavailableError("IngressDeployment")  # type: ignore[arg-type]

    async def waiting(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(serve.front, "_ingress", lambda: Nobody())
    begin = time.monotonic()
    fault(call(waiting), 503, "unavailable")
    assert time.monotonic() - begin < 10


def test_a_head_that_does_not_come_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.front, "HEADERS_TIMEOUT_S", 0.3)
    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)  # put back afterwards
    (front,) = middlewares()
    app = front.cls(PlainTextResponse("here"))
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    place = server.servers[0].sockets[0].getsockname()
    whole = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    try:
        for before in (b"", whole):  # also on a connection that was used once
            with socket.create_connection(place, timeout=10) as slow:
                if before:
                    slow.sendall(before)
                    assert b"here" in _read(slow, lambda got: b"here" in got)
                slow.sendall(whole[:10])
                assert _read(slow, lambda got: False) == b"", "the connection was closed"
        with socket.create_connection(place, timeout=10) as quick:
            quick.sendall(whole)
            assert b"here" in _read(quick, lambda got: b"here" in got)
    finally:
        server.should_exit = True
        thread.join(10)


def _read(connection: socket.socket, enough: Callable[[bytes], bool]) -> bytes:
    got = b""
    while not enough(got) and (part := connection.recv(1000)):
        got += part
    return got
