"""The client of ``ask --url`` and ``mcp``: its key goes to the address that was named, and nowhere
else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from invar_ray.errors import RequestError, ResourceError
from serve.client import ask

Seen = list[tuple[str, str | None]]


@pytest.fixture
def service() -> Iterator[tuple[str, Seen]]:
    """An address that sends everybody elsewhere, and what was asked of it and of elsewhere."""
    seen: Seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self._answer(302)

        def do_GET(self) -> None:
            self._answer(200)

        def _answer(self, status: int) -> None:
            seen.append((self.path, self.headers.get("Authorization")))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


def test_a_key_does_not_follow_a_redirection(service: tuple[str, Seen]) -> None:
    url, seen = service
    with pytest.raises(ResourceError, match="HTTP 302"):
        ask(url, "Who?", api_key="secret")
    assert seen == [("/v1/answer", "Bearer secret")]


@pytest.mark.parametrize("key", ["sec\nret", "sec\x00ret", "sécret"])
def test_a_key_that_no_header_may_hold_is_refused_and_not_shown(
    service: tuple[str, Seen], key: str
) -> None:
    url, seen = service
    with pytest.raises(RequestError, match="key") as caught:
        ask(url, "Who?", api_key=key)
    assert "ret" not in str(caught.value)
    assert seen == []
