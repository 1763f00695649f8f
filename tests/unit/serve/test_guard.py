"""What gets in: bodies that do not come, addresses that callers choose, scopes, ids and logs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from serve.errors import plain
from serve.http.keys import ApiKey
from serve.records import ReplicaStatus
from tests.serving import Artifacts, Live, copy_of, fault, root_of, shared_artifacts
from tests.unit.serve.test_protocol import Backend, call, make_app

FERRY = "When does the ferry leave?"
ADMIN = ApiKey(name="ops", sha256=hashlib.sha256(b"root").hexdigest(), scopes=("query", "admin"))
QUERY = ApiKey(name="mine", sha256=hashlib.sha256(b"secret").hexdigest())
METRICS = ApiKey(name="prom", sha256=hashlib.sha256(b"count").hexdigest(), scopes=("metrics",))
INVALID = "invalid_request"
ROOT, ASK, COUNT = {"X-API-Key": "root"}, {"X-API-Key": "secret"}, {"X-API-Key": "count"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return shared_artifacts(tmp_path_factory)


class Elsewhere:
    """A server that a caller would have the service ask; counts who comes."""

    def __init__(self) -> None:
        seen = self.seen = []  # type: list[str]

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append(self.path)
                self.send_error(404)

            do_HEAD = do_PUT = do_POST = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    server = Elsewhere()
    yield server
    server.close()


def begun(live: Live, path: str, length: int, sent: bytes = b"{") -> socket.socket:
    """A request whose body does not come."""
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + sent)
    return connection


def test_bodies_that_do_not_come_hold_no_place(shared: Artifacts) -> None:
    live = Live(shared, max_in_flight=4)
    try:
        with ExitStack() as slow:
            for _ in range(12):
                slow.enter_context(begun(live, "/v1/retrieve", 90))
            live.run(asyncio.sleep(0.2))
            for _ in range(3):
                assert live("POST", "/v1/retrieve", json={"question": FERRY}).status_code == 200
    finally:
        live.close()


def test_a_busy_service_does_not_count_its_own_time_against_a_body(
    shared: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.http.guard.BODY_TIMEOUT_S", 0.6)
    live = Live(shared)
    try:
        body = json.dumps({"question": FERRY}).encode()
        with begun(live, "/v1/retrieve", len(body), body[:1]) as connection:
            live.run(asyncio.sleep(0.2))

            def work(pieces: int) -> None:
                time.sleep(0.5)
                if pieces > 1:
                    live.loop.call_soon(work, pieces - 1)

            live.loop.call_soon_threadsafe(work, 4)
            time.sleep(1.2)
            connection.sendall(body[1:])
            assert connection.recv(100).split(b" ")[1] == b"200"
        with begun(live, "/v1/retrieve", len(body), body[:1]) as connection:
            assert connection.recv(100).split(b" ")[1] == b"408"
    finally:
        live.close()


def test_a_late_body_of_many_may_come_again(
    shared: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough that all thirty have come before the first is late, on a loaded machine, too.
    monkeypatch.setattr("serve.http.guard.BODY_TIMEOUT_S", 3.0)
    live = Live(shared)
    try:
        with ExitStack() as slow:
            many = [slow.enter_context(begun(live, "/v1/retrieve", 90)) for _ in range(30)]
            received = [each.recv(4000).decode() for each in many]
        assert {each.split(" ")[1] for each in received} == {"503"}
        assert all("retry-after: 1" in each.lower() for each in received)
    finally:
        live.close()


def test_long_bodies_that_do_not_come_are_bounded(
    shared: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.http.guard.ARRIVING_BYTES", 200_000)
    live = Live(shared)
    try:
        with ExitStack() as slow:
            waiting = [
                slow.enter_context(begun(live, "/v1/embeddings", 150_000, b" " * 120_000))
                for _ in range(2)
            ]
            answers = []
            for each in waiting:
                each.settimeout(1)
                try:
                    answers.append(each.recv(100).split(b" ")[1])
                except TimeoutError:
                    answers.append(b"waits")
            assert sorted(answers) == [b"503", b"waits"]
            assert live("POST", "/v1/retrieve", json={"question": FERRY}).status_code == 200
    finally:
        live.close()


def test_callers_choose_no_server_and_no_folder(
    shared: Artifacts,
    tmp_path: Path,
    elsewhere: Elsewhere,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    artifacts = copy_of(shared, tmp_path)
    opened: list[str] = []

    def loader(uri: str) -> Any:
        from serve.replicas.retriever import load_retriever

        opened.append(uri)
        return load_retriever(uri)

    live = Live(artifacts, published="main", keys=(ADMIN, QUERY), loader=loader)
    place = f"endpoint_override=127.0.0.1%3A{elsewhere.port}&scheme=http"
    root = root_of(artifacts)
    try:
        for uri in (
            f"s3://AKIAHIDDEN:hidden@bucket/index/x-1?{place}",
            f"s3://bucket/index/x-1?secret_key=hidden&{place}",
            "s3://bucket/index/x-1",
            f"file://{artifacts.other_index_uri}?hidden",
            shared.other_index_uri,
            f"{root}/index/../../../etc/index/x-1",
            f"{root}/index/..",
            f"{root}/index/%2e%2e%2fx",
            "index/x-1",
        ):
            body = {"index_uri": uri}
            message = fault(live("POST", "/admin/index", json=body, headers=ROOT), 422, INVALID)
            assert "hidden" not in message
        assert elsewhere.seen == []
        assert opened == [artifacts.index_uri]
        assert "hidden" not in caplog.text.lower()
        shown = live("GET", "/v1/index", headers=ASK)
        assert shown.json()["index"]["error"] is None
        changed = live(
            "POST",
            "/admin/index",
            json={"index_uri": artifacts.other_index_uri, "wait": True},
            headers=ROOT,
        )
        assert changed.status_code == 200
    finally:
        live.close()


def test_options_of_a_deployment_are_shown_to_nobody() -> None:
    class Deployed(Backend):
        async def describe(self) -> ReplicaStatus:
            uri = "s3://AKIA:pa/ss@bucket/invar/index/all-1?endpoint_override=http://10.0.0.1"
            error = f"cannot open '{uri}' (no route)"
            return ReplicaStatus("0", "r", uri, uri, error, {"index": "i1"})

    shown = call(Deployed(), "GET", "/v1/index")
    assert shown.json()["replicas"][0]["active_uri"] == "s3://bucket/invar/index/all-1"
    assert "cannot open 's3://bucket/invar/index/all-1' (no route)" in shown.text
    for hidden in ("AKIA", "pa/ss", "endpoint", "10.0.0.1"):
        assert hidden not in shown.text
    for text in ("", "no uri at all?", "/srv/a?b", "gs://b/team@acme/x", "http://h:80/v1 model"):
        assert plain(text) == text


def test_metrics_have_a_scope_of_their_own() -> None:
    async def counted() -> str:
        return "ray_invar_requests_total 3\n"

    keys = (QUERY, ADMIN, METRICS)
    app = make_app(Backend(), keys=keys, metrics=counted)
    for headers, status, code in (({}, 401, "unauthorized"), (ASK, 403, "forbidden")):
        fault(call(Backend(), "GET", "/metrics", app=app, headers=headers), status, code)
    fault(call(Backend(), "GET", "/metrics", app=app, headers=ROOT), 403, "forbidden")
    shown = call(Backend(), "GET", "/metrics", app=app, headers=COUNT)
    assert (shown.status_code, shown.text) == (200, "ray_invar_requests_total 3\n")
    asked = call(Backend(), "POST", "/v1/retrieve", app=app, headers=COUNT, json={"question": "?"})
    fault(asked, 403, "forbidden")
    opened = make_app(Backend(), metrics=counted)  # no keys: questions are open, this is not
    assert "scope metrics" in fault(
        call(Backend(), "GET", "/metrics", app=opened), 403, "forbidden"
    )


def test_the_audit_line_says_who_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ray.serve.audit")
    for forwarded in ("203.0.113.9, 10.1.2.3", "nobody\u2028at all"):
        headers = {"X-Forwarded-For": forwarded.encode("utf-8").decode("latin-1")}
        raw = {name: value.encode("latin-1") for name, value in headers.items()}
        call(Backend(), "POST", "/v1/retrieve", json={"question": "Who?"}, headers=raw)
    lines = [json.loads(r.message) for r in caplog.records if r.name == "ray.serve.audit"]
    assert [line["client"] for line in lines] == ["127.0.0.1", "127.0.0.1"]
    assert lines[0]["forwarded_for"] == "203.0.113.9, 10.1.2.3"
    assert "forwarded_for" not in lines[1]


def test_a_sample_without_a_seed_is_another_each_time(shared: Artifacts) -> None:
    live = Live(shared)

    def written(**options: Any) -> str:
        messages = [{"role": "user", "content": FERRY}]
        body = {"model": "invar-rag", "messages": messages} | options
        answer = live("POST", "/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    try:
        greedy = written()
        assert len({written(temperature=2) for _ in range(4)}) > 1
        assert written(temperature=2, seed=0) == written(temperature=2, seed=0)
        for tiny in (1e-6, 1e-40, 1e-300):  # logits by these are infinite, and their difference NaN
            assert written(temperature=tiny) == greedy
        assert written() == greedy
    finally:
        live.close()
