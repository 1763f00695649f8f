"""What stands in front of the replicas, on a Ray that ``invar-ray serve`` would start: minutes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import psutil
import pytest

from invar_ray.config import ScaleConfig
from invar_ray.session import RaySession
from serve.app import AppArgs, start, stop
from serve.http.keys import ApiKey
from tests.serving import fault, shared_artifacts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KEYS = [
    ApiKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), scopes=scopes)
    for name, scopes in (("query", ("query",)), ("metrics", ("metrics",)))
]
ASK = {"X-API-Key": "query"}
BODY = {"question": "When does the ferry leave?"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    artifacts = shared_artifacts(tmp_path_factory)
    session = RaySession(ScaleConfig())
    session.ensure()
    args = AppArgs(
        index_uri=artifacts.index_uri,
        generator_uri=artifacts.generator_uri,
        top_k=3,
        max_new_tokens=4,
        max_top_k=4,
        ingress_replicas=(1, 1),
        retriever_replicas=(1, 1),
        generator_replicas=(1, 1),
        num_cpus_per_replica=0.1,
        published="",
        api_keys=KEYS,
    )
    try:
        yield start(args, port=0, log_level="WARNING")
        stop()
    finally:
        session.close()


def ask(url: str, **options: Any) -> httpx.Response:
    headers = ASK | options.pop("headers", {})
    with httpx.Client(trust_env=False, timeout=60) as client:
        return client.post(f"{url}/v1/answer", json=BODY, headers=headers, **options)


def replica(name: str) -> int:
    """Process id of the one replica of a deployment."""
    return process_of(f"ServeReplica:invar-ray:{name}")


def process_of(actor: str) -> int:
    """Process id of an actor of this cluster."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(actor in part for part in process.cmdline()):
                return process.pid
    raise AssertionError(f"no {actor}")


def wait_until_it_answers(url: str) -> float:
    begin = time.monotonic()
    while ask(url).status_code != 200:
        assert time.monotonic() - begin < 300
        time.sleep(0.5)
    return time.monotonic() - begin


def test_every_port_is_on_loopback(running: str) -> None:
    me = psutil.Process()
    family = {me.pid, *(each.pid for each in me.children(recursive=True))}
    listening = [
        each.laddr.ip
        for each in psutil.net_connections("inet")
        if each.pid in family and each.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    assert {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("given", [b"mine-1", b"caf\xc3\xa9", b"\xff\xfe", b"a b", b"x" * 65, None])
def test_a_request_has_one_filtered_id(running: str, given: bytes | None) -> None:
    headers = [(b"x-api-key", b"query")] + ([(b"x-request-id", given)] if given else [])
    with httpx.Client(trust_env=False, timeout=60) as client:
        answer = client.post(f"{running}/v1/answer", json=BODY, headers=headers)
    assert answer.status_code == 200, answer.text
    identifiers = answer.headers.get_list("x-request-id")
    assert identifiers == [answer.json()["request_id"]]
    assert (identifiers[0] == "mine-1") == (given == b"mine-1")


def test_metrics_of_all_processes_for_their_scope(running: str) -> None:
    fault(httpx.get(f"{running}/metrics", trust_env=False, headers=ASK), 403, "forbidden")
    wait_until_it_answers(running)
    for _ in range(60):  # Ray exports them now and then
        page = httpx.get(
            f"{running}/metrics", trust_env=False, timeout=60, headers={"X-API-Key": "metrics"}
        )
        assert page.status_code in {200, 503}
        if "ray_invar_requests_total" in page.text and "ray_invar_batch_size" in page.text:
            return
        time.sleep(1)
    raise AssertionError(page.text[:500])


def test_a_head_that_does_not_come_is_dropped(running: str) -> None:
    host, port = running.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        slow.sendall(b"POST /v1/answer HTTP/1.1\r\nHost: x\r\n")
        begin = time.monotonic()
        assert slow.recv(100) == b""
        assert 5 < time.monotonic() - begin < 25


def test_a_burst_and_slow_bodies(running: str) -> None:
    async def burst() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=600)
        async with httpx.AsyncClient(trust_env=False, timeout=200, limits=limits) as client:
            sent = [client.post(f"{running}/v1/answer", json=BODY, headers=ASK) for _ in range(600)]
            return await asyncio.gather(*sent)

    begin = time.monotonic()
    answers = asyncio.run(burst())
    print("burst of 600:", Counter(each.status_code for each in answers), end=" ")
    print(f"in {time.monotonic() - begin:.1f} s")
    for each in answers:
        if each.status_code != 200:
            assert each.status_code == 503
            fault(each, 503, each.json()["error"]["code"])
            assert each.headers["Retry-After"]
    host, port = running.removeprefix("http://").split(":")
    with ExitStack() as slow:
        for _ in range(170):
            connection = slow.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(
                b"POST /v1/answer HTTP/1.1\r\nHost: x\r\nX-API-Key: query\r\n"
                b"Content-Type: application/json\r\nContent-Length: 90\r\n\r\n{"
            )
        time.sleep(1)
        statuses = Counter(ask(running).status_code for _ in range(10))
        print("beside 170 slow bodies:", statuses)
        assert statuses == {200: 10}


@pytest.mark.parametrize(
    "name", ["RetrieverDeployment", "GeneratorDeployment", "IngressDeployment"]
)
def test_without_a_replica_it_refuses_at_once(running: str, name: str) -> None:
    wait_until_it_answers(running)
    os.kill(replica(name), signal.SIGKILL)
    begin = time.monotonic()
    seen: list[tuple[int, float]] = []
    while time.monotonic() - begin < 8:
        asked = time.monotonic()
        answer = ask(running)
        seen.append((answer.status_code, round(time.monotonic() - asked, 2)))
        if answer.status_code != 200:
            fault(answer, 503, "unavailable")
            assert answer.headers["Retry-After"]
        time.sleep(0.2)
    recovered = wait_until_it_answers(running)
    print(json.dumps({"killed": name, "seen": seen, "again after": round(recovered + 8, 1)}))
    assert 503 in {status for status, _ in seen}
    assert max(seconds for status, seconds in seen if status == 503) < 5


def test_a_proxy_that_died_is_replaced_at_once(running: str) -> None:
    wait_until_it_answers(running)
    died = process_of("ProxyActor")
    os.kill(died, signal.SIGKILL)
    begin = time.monotonic()
    while True:  # Serve sees it after the third check, and starts another one
        with suppress(AssertionError):
            if process_of("ProxyActor") != died:
                break
        assert time.monotonic() - begin < 120
        time.sleep(0.1)
    noticed = time.monotonic() - begin
    while True:
        with suppress(httpx.TransportError):
            if ask(running).status_code == 200:
                break
        assert time.monotonic() - begin < 120
        time.sleep(0.2)
    print(f"another proxy after {noticed:.1f} s, an answer {time.monotonic() - begin:.1f} s")
    assert noticed < 20, "three checks 10 s apart, Serve's own pace, are 20 s at least"
