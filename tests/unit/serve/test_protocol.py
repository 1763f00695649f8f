"""The HTTP side without Ray, and what runs inside replicas without Ray."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import serve.http.pages
from invar_ray.answering.filters import Where
from invar_ray.errors import ConfigError, RequestError
from invar_ray.schema import Answer, Citation, Hit, Mode
from serve.app import build_app
from serve.args import AppArgs
from serve.errors import Overloaded
from serve.http.api import make_api
from serve.http.conditions import Conditions
from serve.http.keys import ApiKey, KeyRing, keys_from_environment, service_keys
from serve.http.limits import Limits, request_id
from serve.http.pages import PATHS
from serve.http.protocol import AnswerResponse
from serve.records import Found, GeneratorStatus, Question, ReplicaStatus, Reply
from serve.replicas.batching import Batcher, Worker
from serve.replicas.targets import LocalTarget
from serve.service import Service
from tests.serving import fault

HITS = tuple(
    Hit(f"d{n}:0-9:x", f"d{n}", n, 1.0 / n, f"Title {n}", f"Text {n}") for n in range(1, 30)
)
LIMITS = Limits(top_k=3, max_top_k=10, max_question_chars=40, max_new_tokens=8, max_body_bytes=300)


class Backend:
    """Stands where the engines stand: answers from HITS; raises what it is told to."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None

    async def retrieve(
        self,
        question: str,
        top_k: int,
        left_s: float,
        trace: dict[str, str],
        where: Where | None = None,
        mode: Mode | None = None,
    ) -> Found:
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return Found(HITS[:top_k], {"index": "i1"}, mode=mode or "dense")

    async def answer(self, question: Question) -> Reply:
        hit = question.hits[0]
        text = f"{question.max_new_tokens} tokens at most"
        answer = Answer(
            question.text,
            text,
            citations=(Citation(1, hit.passage_id, hit.document_id, hit.title),),
            hits=question.hits,
            notes=("a note",),
            confidence=-0.5,
            timings={"generate_s": 0.25},
        )
        return Reply(answer, text, 7, 3, "stop", {"generator": "g1"})

    async def stream(self, question: Question) -> AsyncIterator[str | Reply]:
        for piece in ("one", " two"):
            yield piece
            if self.error is not None:
                raise self.error
        yield await self.answer(question)

    async def describe(self) -> ReplicaStatus:
        return ReplicaStatus("0", "r", "new", "old", "new is damaged", {"index": "i1"})

    async def describe_generator(self) -> GeneratorStatus:
        return GeneratorStatus("transformers", "g", 64, {"generator": "g1"})

    async def check_health(self) -> None:
        if self.error is not None:
            raise self.error

    check_generator = check_health


@pytest.fixture
def backend() -> Backend:
    return Backend()


KEY = ApiKey(name="mine", sha256=hashlib.sha256(b"secret").hexdigest())
ADMIN = ApiKey(name="ops", sha256=hashlib.sha256(b"root").hexdigest(), scopes=("admin",))


def make_app(backend: Backend, **options: Any) -> Any:
    service = Service([LocalTarget("retriever", backend)], LocalTarget("generator", backend))
    return make_api(service, LIMITS, **({"max_in_flight": 9} | options))


def call(
    backend: Backend,
    method: str,
    path: str,
    *,
    keys: tuple[ApiKey, ...] = (),
    app: Any = None,
    **options: Any,
) -> httpx.Response:
    app = app or make_app(backend, keys=keys)

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://service"
        ) as client:
            if "content" in options:
                options["headers"] = {
                    "Content-Type": "application/json",
                    **options.get("headers", {}),
                }
            return await client.request(method, path, **options)

    return asyncio.run(send())


def test_answer_carries_citations_passages_timings_and_versions(backend: Backend) -> None:
    body = {"question": "  Who?  ", "top_k": 2, "max_new_tokens": 5}
    response = call(backend, "POST", "/v1/answer", json=body, headers={"X-Request-ID": "abc-1"})
    assert response.status_code == 200
    answer = AnswerResponse.model_validate(response.json())
    assert (answer.question, answer.answer, answer.request_id) == (
        "Who?",
        "5 tokens at most",
        "abc-1",
    )
    assert [(passage.number, passage.passage_id) for passage in answer.passages] == [
        (1, "d1:0-9:x"),
        (2, "d2:0-9:x"),
    ]
    assert answer.citations[0].passage_id == answer.passages[0].passage_id
    assert answer.versions == {"index": "i1", "generator": "g1"}
    assert set(answer.timings) == {"retrieve_s", "generate_s", "total_s"}
    assert answer.notes == ["a note"]


def test_titles_turn_nothing_around(backend: Backend) -> None:
    class Turning(Backend):
        async def retrieve(self, *args: Any, **options: Any) -> Found:
            hit = Hit("d:0", "d", 1, 1.0, "safe\u202efdp.exe\n2", "a\u202eb", place="p\u2066.pdf")
            return Found((hit,), {"index": "i1"})

    answer = call(Turning(), "POST", "/v1/answer", json={"question": "Who?"}).json()
    for shown in (answer["passages"][0], answer["citations"][0]):
        assert shown["title"] == "safe fdp.exe 2"
    assert answer["passages"][0]["place"] == "p .pdf"
    assert answer["passages"][0]["text"] == "a\u202eb", "a text is what it is"


def test_retrieve_takes_the_default_top_k(backend: Backend) -> None:
    response = call(backend, "POST", "/v1/retrieve", json={"question": "Who?"})
    assert [passage["rank"] for passage in response.json()["passages"]] == [1, 2, 3]


@pytest.mark.parametrize(
    "body, message",
    [
        ({"question": ""}, "empty"),
        ({"question": " \n\x00 "}, "empty"),
        ({"question": "x" * 41}, "41 characters.*at most 40"),
        ({"question": "Who?", "top_k": 0}, "top_k is 0.*1 to 10"),
        ({"question": "Who?", "top_k": 11}, "top_k is 11.*1 to 10"),
        ({"question": "Who?", "top_k": "2"}, "top_k: .*integer"),
        ({"question": "Who?", "top_k": True}, "top_k: .*integer"),
        ({"question": "Who?", "max_new_tokens": 9}, "max_new_tokens is 9.*1 to 8"),
        ({"question": 3}, "question: .*string"),
        ({"question": "Who?", "topk": 3}, "topk: .*not permitted"),
        ({}, "question: .*required"),
        ([], "body: "),
    ],
)
def test_bad_bodies_are_422_and_say_why(backend: Backend, body: Any, message: str) -> None:
    assert re.search(
        message, fault(call(backend, "POST", "/v1/answer", json=body), 422, "invalid_request")
    )


def test_other_bad_requests(backend: Backend) -> None:
    fault(call(backend, "POST", "/v1/answer", content=b"{"), 400, "invalid_json")
    plain = {"Content-Type": "text/plain"}
    response = call(backend, "POST", "/v1/answer", content=b'{"question": "Who?"}', headers=plain)
    assert "Content-Type: application/json" in fault(response, 422, "invalid_request")
    fault(call(backend, "GET", "/v1/answer"), 405, "method_not_allowed")
    fault(call(backend, "GET", "/nowhere"), 404, "not_found")
    long = json.dumps({"question": "x" * 300}).encode()
    assert "300 bytes" in fault(
        call(backend, "POST", "/v1/answer", content=long), 413, "body_too_large"
    )


def test_lone_surrogates_are_refused_not_a_crash(backend: Backend) -> None:
    fault(
        call(backend, "POST", "/v1/answer", content=rb'{"question": "\ud800"}'),
        422,
        "invalid_request",
    )
    fault(
        call(backend, "POST", "/v1/answer", content=rb'{"question": "a", "\ud800": 1}'),
        422,
        "invalid_request",
    )
    assert (
        call(
            backend, "POST", "/v1/answer", content=rb'{"question": "caf\u00e9 \ud83d\ude00"}'
        ).status_code
        == 200
    )


def test_a_body_without_stated_length_is_counted(backend: Backend) -> None:
    sent = 0

    async def chunks() -> Any:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b" " * 100

    fault(call(backend, "POST", "/v1/answer", content=chunks()), 413, "body_too_large")
    assert (
        call(
            backend, "POST", "/v1/answer", content=iter_bytes(b'{"question"', b': "Who?"}')
        ).status_code
        == 200
    )


async def iter_bytes(*parts: bytes) -> Any:
    for part in parts:
        yield part


def test_key_is_asked_for_under_v1_only(backend: Backend) -> None:
    body = {"question": "Who?"}
    for headers in (
        {},
        {"X-API-Key": "wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic secret"},
    ):
        response = call(backend, "POST", "/v1/answer", json=body, headers=headers, keys=(KEY,))
        fault(response, 401, "unauthorized")
        assert response.headers["WWW-Authenticate"] == "Bearer"
    for headers in ({"X-API-Key": "secret"}, {"Authorization": "bearer secret"}):
        assert (
            call(backend, "POST", "/v1/answer", json=body, headers=headers, keys=(KEY,)).status_code
            == 200
        )
    for path in ("/", "/healthz", "/readyz", "/docs", "/openapi.json"):
        assert call(backend, "GET", path, keys=(KEY,)).status_code == 200


def test_scopes(backend: Backend) -> None:
    change = {"index_uri": "x"}
    body = {"question": "Who?"}
    admin, query = {"X-API-Key": "root"}, {"X-API-Key": "secret"}
    refused = call(backend, "POST", "/admin/index", json=change, headers=query, keys=(KEY, ADMIN))
    assert "scope admin" in fault(refused, 403, "forbidden")
    fault(
        call(backend, "POST", "/v1/answer", json=body, headers=admin, keys=(KEY, ADMIN)),
        403,
        "forbidden",
    )
    fault(
        call(backend, "POST", "/admin/index", json=change, keys=(KEY, ADMIN)), 401, "unauthorized"
    )
    message = fault(call(backend, "POST", "/admin/index", json=change), 403, "forbidden")
    assert "no API keys" in message  # where queries are open, administration is not
    allowed = call(backend, "POST", "/admin/index", json=change, headers=admin, keys=(KEY, ADMIN))
    assert "keeps no record" in fault(allowed, 409, "conflict")


def test_a_key_has_its_own_rate(backend: Backend) -> None:
    slow = KEY.model_copy(update={"requests_per_minute": 2})
    app = make_app(backend, keys=(slow, KEY.model_copy(update={"name": "b", "sha256": "0" * 64})))
    sent = [
        call(backend, "GET", "/v1/index", headers={"Authorization": "Bearer secret"}, app=app)
        for _ in range(3)
    ]
    assert [response.status_code for response in sent] == [200, 200, 429]
    fault(sent[2], 429, "rate_limited")
    assert 1 <= int(sent[2].headers["Retry-After"]) <= 30
    assert sent[2].json()["error"]["type"] == "rate_limit_error"


def test_keys_come_from_the_environment_hashed() -> None:
    digest = hashlib.sha256(b"k").hexdigest()
    given = {
        "INVAR_API_KEY": "secret",
        "INVAR_API_KEYS": f"ops:{digest}:query+admin:60,\n b:{digest}:query",
    }
    keys = keys_from_environment(given)
    assert [(key.name, key.scopes, key.requests_per_minute) for key in keys] == [
        ("default", ("query",), 0),
        ("ops", ("query", "admin"), 60),
        ("b", ("query",), 0),
    ]
    assert keys[0] == KEY.model_copy(update={"name": "default"})
    assert keys_from_environment({}) == []
    for wrong in (
        f"a:{digest}",
        f"a:{digest}:root",
        "a:short:query",
        f"a:{digest}:query:x",
        f"a b:{digest}:query",
    ):
        with pytest.raises(ConfigError, match="entry 1 of INVAR_API_KEYS") as caught:
            keys_from_environment({"INVAR_API_KEYS": wrong})
        assert digest not in str(caught.value)
    with pytest.raises(ConfigError, match="one name"):
        KeyRing([KEY, KEY])


EMPTY = [hashlib.sha256(text).hexdigest() for text in (b"", b"\n", b"\r\n", b" ")]


@pytest.mark.parametrize("digest", EMPTY)
def test_the_hash_of_an_empty_key_is_refused_everywhere(digest: str) -> None:
    with pytest.raises(ValueError, match="empty key, which everybody has; hash a real key"):
        ApiKey(name="a", sha256=digest)
    with pytest.raises(ValueError, match="empty key"):
        AppArgs.model_validate(
            {"index_uri": "i", "generator_uri": "g", "api_keys": [{"name": "a", "sha256": digest}]}
        )
    good = hashlib.sha256(b"k").hexdigest()
    for written in (digest, digest.upper(), f" {digest} "):
        with pytest.raises(
            ConfigError, match=r"^entry 2 of INVAR_API_KEYS has .* empty key.* To do: hash a real"
        ):
            keys_from_environment({"INVAR_API_KEYS": f"b:{good}:query,a:{written}:query"})
    with pytest.raises(ConfigError, match=r"API key mine has .* empty key"):
        KeyRing([KEY.model_copy(update={"sha256": digest})])


@pytest.mark.parametrize("setting", ["", " ", "\n", "\t \r\n"])
def test_a_key_setting_without_a_key_is_refused(setting: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^INVAR_API_KEY is set and empty\. Expected: .* To do: .*unset it"
    ):
        keys_from_environment({"INVAR_API_KEY": setting})
    for listed in (setting, f"{setting},", ",,\n"):
        with pytest.raises(
            ConfigError, match=r"^INVAR_API_KEYS is set and empty\. Expected: .* To do: .*unset it"
        ):
            keys_from_environment({"INVAR_API_KEYS": listed})
    good = {
        "INVAR_API_KEY": "secret",
        "INVAR_API_KEYS": f"b:{hashlib.sha256(b'k').hexdigest()}:query",
    }
    for name in good:
        with pytest.raises(ConfigError, match=f"{name} is set and empty"):
            keys_from_environment({**good, name: setting})


@pytest.mark.parametrize("mounted", ["secret\n", "secret\r\n", " secret ", "\nsecret\n\n"])
def test_the_line_break_of_a_mounted_secret_is_no_part_of_the_key(
    backend: Backend, mounted: str
) -> None:
    keys = tuple(keys_from_environment({"INVAR_API_KEY": mounted}))
    assert keys == (KEY.model_copy(update={"name": "default"}),)
    headers = {"Authorization": "Bearer secret"}
    assert call(backend, "GET", "/v1/index", headers=headers, keys=keys).status_code == 200
    fault(call(backend, "GET", "/v1/index", keys=keys), 401, "unauthorized")


@pytest.mark.parametrize("broken", ["se cret", "sec\nret", "sec\x00ret", "sec\tret"])
def test_a_key_that_no_client_can_send_is_refused_without_being_shown(broken: str) -> None:
    with pytest.raises(
        ConfigError, match="INVAR_API_KEY is set and holds white space or control"
    ) as caught:
        keys_from_environment({"INVAR_API_KEY": broken})
    assert "ret" not in str(caught.value)


def test_one_key_under_two_names_is_refused() -> None:
    bound = KEY.model_copy(update={"name": "acme", "where": Conditions.parse("tenant=acme")})
    expected = (
        r"^API keys acme and mine are one key.* Expected: a key for each name.* To do: make "
        r"another key"
    )
    with pytest.raises(ConfigError, match=expected) as caught:
        KeyRing([bound, KEY])
    assert KEY.sha256 not in str(caught.value)
    with pytest.raises(ConfigError, match="API keys mine and default are one key"):
        service_keys([KEY], {"INVAR_API_KEY": "secret"})
    with pytest.raises(ConfigError, match="API keys default and b are one key"):
        service_keys(
            [],
            {
                "INVAR_API_KEY": "secret",
                "INVAR_API_KEYS": f"b:{KEY.sha256.upper()}:query:0:tenant=acme",
            },
        )
    values = [{"name": name, "sha256": KEY.sha256} for name in ("a", "b")]
    with pytest.raises(ValueError, match="api_keys: API keys a and b are one key"):
        AppArgs.model_validate({"index_uri": "i", "generator_uri": "g", "api_keys": values})


@pytest.mark.parametrize(
    "name, value", [("INVAR_API_KEY", " "), ("INVAR_API_KEYS", ""), ("INVAR_API_KEY", "secret")]
)
def test_wrong_keys_show_before_anything_starts(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"is set and empty|are one key"):
        build_app(
            AppArgs(index_uri="runs/index/a", generator_uri="runs/generator/b", api_keys=[KEY])
        )


def test_nothing_sent_is_no_key() -> None:
    ring = KeyRing([KEY, ADMIN])
    assert [ring.find(given) for given in (b"", b" ", b"\n", b"\x00", b"secret\n")] == [None] * 5
    assert ring.find(b"secret") == KEY


def test_headers_for_browsers_and_no_cross_origin_by_default(backend: Backend) -> None:
    body, origin = {"question": "Who?"}, {"Origin": "https://elsewhere.example"}
    response = call(backend, "POST", "/v1/answer", json=body, headers=origin)
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["X-Frame-Options"] == "DENY"
    assert response.headers["Cache-Control"] == "no-store"
    assert not [name for name in response.headers if name.startswith("access-control")]
    app = make_app(backend, cors_origins=["https://elsewhere.example"], keys=(KEY,))
    preflight = {
        **origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    response = call(backend, "OPTIONS", "/v1/answer", headers=preflight, app=app)
    assert response.headers["access-control-allow-origin"] == "https://elsewhere.example"
    other = call(
        backend,
        "OPTIONS",
        "/v1/answer",
        headers={**preflight, "Origin": "https://third.example"},
        app=app,
    )
    assert "access-control-allow-origin" not in other.headers


def test_the_audit_log_has_no_questions_unless_told(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ray.serve.audit")
    headers = {"X-API-Key": "secret", "X-Request-ID": "r-1"}
    for audit_text in (False, True):
        app = make_app(backend, keys=(KEY,), audit_text=audit_text)
        call(
            backend, "POST", "/v1/answer", json={"question": "a secret?"}, headers=headers, app=app
        )
    first, second = [json.loads(r.message) for r in caplog.records if r.name == "ray.serve.audit"]
    assert {
        "request_id": "r-1",
        "key": "mine",
        "route": "/v1/answer",
        "status": 200,
    }.items() <= first.items()
    assert first["question_chars"] == 9
    assert "a secret?" not in json.dumps(first)
    assert second["question"] == "a secret?"


def test_a_stream_that_fails_ends_with_an_error_event(backend: Backend) -> None:
    body = {"question": "Who?", "stream": True}
    text = call(backend, "POST", "/v1/answer", json=body).text
    assert [line[7:] for line in text.splitlines() if line.startswith("event: ")] == [
        "passages",
        "delta",
        "delta",
        "answer",
        "done",
    ]

    class Breaking(Backend):
        async def stream(self, question: Question) -> AsyncIterator[str | Reply]:
            yield "one"
            raise KeyError("a secret path /srv/x")

    text = call(Breaking(), "POST", "/v1/answer", json=body).text
    events = [line[7:] for line in text.splitlines() if line.startswith("event: ")]
    assert events == ["passages", "delta", "error", "done"]
    assert '"code":"internal"' in text
    assert "secret" not in text
    chat = {"model": "invar-rag", "messages": [{"role": "user", "content": "Who?"}], "stream": True}
    lines = [
        line
        for line in call(Breaking(), "POST", "/v1/chat/completions", json=chat).text.splitlines()
        if line
    ]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2][6:])["error"]["type"] == "server_error"


def test_failures_of_the_backend_keep_the_form_and_hide_their_cause(backend: Backend) -> None:
    body = {"question": "Who?"}
    backend.error = Overloaded("too many", retry_after_s=1.2)
    response = call(backend, "POST", "/v1/answer", json=body)
    fault(response, 503, "overloaded")
    assert response.headers["Retry-After"] == "2"
    fault(call(backend, "GET", "/readyz"), 503, "overloaded")
    backend.error = RequestError("the question takes 90 tokens", expected="at most 64")
    assert "90 tokens" in fault(
        call(backend, "POST", "/v1/answer", json=body), 422, "invalid_request"
    )
    backend.error = KeyError("a secret path /srv/x")
    message = fault(call(backend, "POST", "/v1/answer", json=body), 500, "internal")
    assert "secret" not in message


def test_requests_beyond_the_limit_are_told_to_come_back(backend: Backend) -> None:
    async def crowd() -> list[httpx.Response]:
        backend.gate = asyncio.Event()
        app = make_app(backend, max_in_flight=2)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://service"
        ) as client:
            waiting = [
                asyncio.create_task(client.post("/v1/answer", json={"question": "Who?"}))
                for _ in range(2)
            ]
            await asyncio.sleep(0.05)
            refused = await client.post("/v1/answer", json={"question": "Who?"})
            alive = await client.get("/healthz")
            backend.gate.set()
            done = await asyncio.gather(*waiting)
            again = await client.post("/v1/answer", json={"question": "Who?"})
            return [refused, alive, *done, again]

    refused, *others = asyncio.run(crowd())
    fault(refused, 503, "overloaded")
    assert refused.headers["Retry-After"] == "1"
    assert [response.status_code for response in others] == [200] * 4


def test_index_route_tells_requested_and_active(backend: Backend) -> None:
    body = call(backend, "GET", "/v1/index").json()
    assert body["index"] == {"requested_uri": "new", "active_uri": "old", "error": "new is damaged"}
    assert body["limits"]["max_top_k"] == 10


def test_pages_need_nothing_from_outside_and_their_policy_admits_them(backend: Backend) -> None:
    for page in ("/", "/docs"):
        response = call(backend, "GET", page, keys=(KEY,))
        assert response.headers["Content-Type"].startswith("text/html")
        policy = response.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=", response.text)
        named = re.findall(r'(?:src|href)="([^"#]+)"', response.text)
        assert {name for name in named if "." in name.replace("./", "")} >= {"web/icon.svg"}
        while named:
            name = named.pop()
            if name in {"docs", "./", "openapi.json"}:
                continue
            assert name.startswith("web/"), name
            part = call(backend, "GET", f"/{name}", keys=(KEY,))
            assert part.status_code == 200, name
            if "swagger" in name:
                continue
            assert not re.search(
                r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|innerHTML|\beval\(", part.text
            ), name
            named += [f"web/{each}" for each in re.findall(r'from "\./([^"]+)"', part.text)]
    assert "unsafe" not in call(backend, "GET", "/").headers["Content-Security-Policy"]


def test_page_files_have_their_type_and_are_sent_again_only_if_changed(backend: Backend) -> None:
    for path in sorted(PATHS):
        response = call(backend, "GET", path)
        kind = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}.get(
            path.rpartition(".")[2], "text/html"
        )
        assert response.headers["Content-Type"].startswith(kind), path
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        again = call(backend, "GET", path, headers={"If-None-Match": response.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert call(backend, "HEAD", path).headers["ETag"] == response.headers["ETag"]
    fault(call(backend, "GET", "/web/../api.py"), 404, "not_found")
    fault(call(backend, "GET", "/web/nothing.js", keys=(KEY,)), 401, "unauthorized")
    folder = Path(serve.http.pages.__file__).parents[1] / "web"
    assert {f"/web/{each.name}" for each in folder.iterdir() if each.suffix != ".html"} <= PATHS


def test_openapi_has_examples_and_the_error_form(backend: Backend) -> None:
    schema = call(backend, "GET", "/openapi.json").json()
    assert {"/v1/retrieve", "/v1/answer", "/v1/index", "/healthz", "/readyz"} <= set(
        schema["paths"]
    )
    assert schema["components"]["schemas"]["AnswerRequest"]["examples"]
    assert "4XX" in schema["paths"]["/v1/answer"]["post"]["responses"]
    assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert all(
        "security" in op
        for path, ops in schema["paths"].items()
        if "z" not in path
        for op in ops.values()
    )


def test_request_ids_that_could_harm_a_log_are_replaced() -> None:
    assert request_id("a-b_c.9") == "a-b_c.9"
    for bad in (None, "", "a b", "a\nb", "x" * 65):
        assert re.fullmatch("[0-9a-f]{32}", request_id(bad))


def test_a_busy_worker_is_healthy_until_it_is_stuck() -> None:
    async def scenario() -> None:
        worker, gate, probes = Worker(stuck_s=0.3), threading.Event(), []
        await worker.check(lambda: probes.append(1))
        assert probes == [1]
        task = asyncio.create_task(worker.run(gate.wait, 5))
        await asyncio.sleep(0.05)
        start = time.monotonic()
        await worker.check(lambda: probes.append(2))
        assert time.monotonic() - start < 0.2
        assert probes == [1]
        await asyncio.sleep(0.35)
        with pytest.raises(RuntimeError, match=r"more than 0\.3 s"):
            await worker.check(lambda: None)
        gate.set()
        await task

        def failing() -> None:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await worker.check(failing)
        worker.close()

    asyncio.run(scenario())


def test_batches_fill_up_keep_their_order_and_fail_alone() -> None:
    batches: list[list[int]] = []

    async def work(items: list[int]) -> list[int | Exception]:
        batches.append(items)
        await asyncio.sleep(0.02)
        if 100 in items:
            raise OSError("the whole batch")
        return [KeyError("odd") if item == 7 else item * 10 for item in items]

    async def scenario() -> None:
        batcher: Batcher[int, int] = Batcher(work, max_size=4, wait_s=0.01)
        assert await asyncio.gather(*(batcher(n) for n in range(6))) == [0, 10, 20, 30, 40, 50]
        assert batches == [[0, 1, 2, 3], [4, 5]]
        results = await asyncio.gather(batcher(6), batcher(7), batcher(8), return_exceptions=True)
        assert (results[0], results[2]) == (60, 80)
        assert isinstance(results[1], KeyError)
        failed = await asyncio.gather(batcher(100), batcher(1), return_exceptions=True)
        assert [type(result) for result in failed] == [OSError, OSError]
        assert await batcher(1) == 10, "a failed batch does not end the batching"

    asyncio.run(scenario())


def test_a_caller_alone_does_not_wait_for_others() -> None:
    batches: list[list[int]] = []

    async def work(items: list[int]) -> list[int]:
        batches.append(items)
        await asyncio.sleep(0.05)
        return items

    async def scenario() -> None:
        batcher: Batcher[int, int] = Batcher(work, max_size=4, wait_s=60)
        async with asyncio.timeout(5):
            assert [await batcher(n) for n in range(3)] == [0, 1, 2]
            # What comes during a batch still becomes one, here at once because it is full.
            alone = asyncio.create_task(batcher(3))
            await asyncio.sleep(0.01)
            assert await asyncio.gather(*(batcher(n) for n in range(4, 8))) == [4, 5, 6, 7]
            assert await alone == 3
        assert batches == [[0], [1], [2], [3], [4, 5, 6, 7]]

    asyncio.run(scenario())


def test_callers_that_went_away_are_not_worked_for() -> None:
    batches: list[list[int]] = []

    async def work(items: list[int]) -> list[int]:
        batches.append(items)
        return items

    async def scenario() -> None:
        batcher: Batcher[int, int] = Batcher(work, max_size=4, wait_s=0.05)
        gone, stays = asyncio.create_task(batcher(1)), asyncio.create_task(batcher(2))
        await asyncio.sleep(0.01)
        gone.cancel()
        assert await stays == 2
        assert batches == [[2]]
        both = [asyncio.create_task(batcher(3)), asyncio.create_task(batcher(3))]
        await asyncio.sleep(0.01)
        for call in both:
            call.cancel()
        await asyncio.sleep(0.1)
        assert batches == [[2]]
        assert await batcher(4) == 4

    asyncio.run(scenario())
