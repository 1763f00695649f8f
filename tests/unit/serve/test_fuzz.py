"""Requests made from the service's own OpenAPI, and what no schema allows: always a clear answer,
never a crash.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error

from serve.http.keys import ApiKey
from serve.replicas.reranker import RerankerReplica, load_reranker
from serve.replicas.targets import LocalTarget
from tests.serving import LIMITS, Live, fault, shared_artifacts
from tests.support import save_cross_encoder

DEFAULT_CASES, MANY_CASES = 12, 450  # per operation and kind of data
PATHS = (
    "/v1/answer",
    "/v1/retrieve",
    "/v1/stability",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/rerank",
)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    limits = LIMITS.model_copy(update={"max_new_tokens": 4, "max_rewrites": 2})
    artifacts = shared_artifacts(tmp_path_factory)
    cross = save_cross_encoder(tmp_path_factory.mktemp("cross") / "encoder")
    reranker = RerankerReplica(lambda: load_reranker(str(cross), artifacts.index_uri))
    options = {"reranker": LocalTarget("reranker", reranker), "rerank_depth": 4}
    service = Live(artifacts, limits=limits, service=options)
    yield service
    service.close()


def run_cases(
    live: Live, cases: int, only: str = "", headers: dict[str, str] | None = None
) -> dict[str, list[int]]:
    """Statuses by operation (of the path ``only``, if given), after checking each response."""
    schema = schemathesis.openapi.from_dict(live("GET", "/openapi.json").json())
    seen: dict[str, list[int]] = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        if only and operation.path != only:
            continue
        statuses = seen.setdefault(f"{operation.method.upper()} {operation.path}", [])
        for mode in schemathesis.GenerationMode:

            def check(case: Any) -> None:
                response = case.call(base_url=live.url, headers=headers)
                statuses.append(response.status_code)  # noqa: B023 - called before the loop goes on
                if response.status_code == 503:  # the one that is documented
                    assert response.headers["Retry-After"]
                else:
                    case.validate_response(response, checks=[not_a_server_error])
                if response.status_code >= 400:
                    error = response.json()["error"]
                    assert error["message"]
                    assert error["request_id"]

            options = settings(
                max_examples=cases,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            # An operation without parameters has no wrong requests to make.
            with contextlib.suppress(Unsatisfiable):
                given(case=operation.as_strategy(generation_mode=mode))(options(check))()
    return seen


def test_requests_from_the_schema(live: Live) -> None:
    seen = run_cases(live, DEFAULT_CASES)
    assert sum(map(len, seen.values())) >= 140
    assert {f"POST {path}" for path in PATHS} | {"POST /admin/index", "GET /v1/index"} <= set(seen)
    assert 200 in seen["POST /v1/answer"] + seen["POST /v1/retrieve"] + seen["POST /v1/embeddings"]
    assert 200 in seen["POST /v1/rerank"]
    assert live("GET", "/readyz").status_code == 200


def test_administration_from_the_schema(tmp_path_factory: pytest.TempPathFactory) -> None:
    key = ApiKey(name="ops", sha256=hashlib.sha256(b"root").hexdigest(), scopes=("query", "admin"))
    service = Live(shared_artifacts(tmp_path_factory), keys=(key,), published="fuzz")
    try:
        served = service("GET", "/v1/index", headers={"X-API-Key": "root"}).json()["index"][
            "active_uri"
        ]
        seen = run_cases(
            service, 4 * DEFAULT_CASES, "/admin/index", {"Authorization": "Bearer root"}
        )
        assert {202, 422} <= set(seen["POST /admin/index"]), "no body got as far as being tried"
        after = service("GET", "/v1/index", headers={"X-API-Key": "root"}).json()["index"]
        assert after["active_uri"] == served
    finally:
        service.close()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thousands_of_requests_from_the_schema(live: Live) -> None:
    cases = int(os.environ.get("INVAR_FUZZ_CASES", MANY_CASES))
    seen = run_cases(live, cases)
    print({name: (len(statuses), sorted(set(statuses))) for name, statuses in seen.items()})
    assert sum(map(len, seen.values())) >= (5000 if cases >= MANY_CASES else cases)
    assert live("GET", "/readyz").status_code == 200


def test_bytes_that_no_schema_allows(live: Live) -> None:
    draw = random.Random(0)
    as_json = {"Content-Type": "application/json"}
    bodies = [draw.randbytes(draw.randrange(200)) for _ in range(20)]
    bodies += [
        b'{"question": "\xff\xfe"}',
        b'{"question": "caf\xc3"}',
        b"[" * 20_000,
        b'{"a":' * 5_000,
        b"null",
        b"1e999",
    ]
    bodies += [
        b'{"question": "x", "top_k": 1e400}',
        b'{"question": "x", "top_k": ' + b"9" * 5000 + b"}",
    ]
    for path in PATHS:
        for body in bodies:
            response = live("POST", path, content=body, headers=as_json)
            assert 400 <= response.status_code < 500, (path, body[:40], response.text)
            assert response.json()["error"]["code"] in {"invalid_json", "invalid_request"}
    for headers in (
        {"X-API-Key": "\x00"},
        {"Authorization": "Bearer " + "k" * 4000},
        {"X-Request-ID": "<script>"},
    ):
        try:
            assert live(
                "POST", "/v1/retrieve", json={"question": "x"}, headers=headers
            ).status_code in {200, 400}
        except httpx.LocalProtocolError:
            continue  # the client refuses to send it
    assert live("GET", "/readyz").status_code == 200


def test_large_bodies_and_long_questions(live: Live) -> None:
    for path in PATHS:
        with httpx.Client(base_url=live.url, timeout=30, trust_env=False) as client:
            try:
                response = client.post(
                    path, content=b" " * 10_000_000, headers={"Content-Type": "application/json"}
                )
            except httpx.WriteError:
                continue  # it was refused, and closed, before all of it was sent
            fault(response, 413, "body_too_large")
    fault(live("POST", "/v1/answer", json={"question": "x" * 100_000}), 413, "body_too_large")
    fault(live("POST", "/v1/answer", json={"question": "x" * 50_000}), 422, "invalid_request")
    assert live("GET", "/readyz").status_code == 200
