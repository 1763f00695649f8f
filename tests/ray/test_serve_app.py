"""The composed application over small real artifacts: in this process without a cluster, and once
on a local Ray.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from pydantic import ValidationError

from invar_ray.errors import MissingArtifactError, RequestError, ResourceError
from invar_ray.store.artifacts import Plan, Store, open_artifact, split_uri
from invar_ray.store.published import Published
from serve.app import AppArgs, build_app, compose, start, stop
from serve.client import ask
from serve.http.index_forms import IndexResponse
from serve.http.protocol import AnswerResponse, RetrieveResponse
from tests.serving import TEXTS, Artifacts, fault, shared_artifacts
from tests.support import save_cross_encoder


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return shared_artifacts(tmp_path_factory)


def app_args(artifacts: Artifacts, **options: Any) -> AppArgs:
    values: dict[str, Any] = {
        "top_k": 3,
        "max_top_k": 4,
        "max_question_chars": 1500,
        "max_new_tokens": 4,
    }
    return AppArgs(
        index_uri=artifacts.index_uri, generator_uri=artifacts.generator_uri, **(values | options)
    )


class Local:
    """The application in this process; requests go to the ingress replica's web application."""

    def __init__(self, application: Any, *, ready: bool = True) -> None:
        from ray import serve

        self.handle = serve.run(application, _local_testing_mode=True)
        self.handle._init()  # Serve has no public way to the local replica's web application
        self.app = self.handle._router._user_callable_wrapper._callable.app
        # local testing does not wait for the retriever's first reconfigure
        deadline = time.monotonic() + 20
        while ready and self("GET", "/readyz").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.1)

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://service", timeout=60
            ) as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())


@pytest.fixture(scope="module")
def service(artifacts: Artifacts) -> Local:
    return Local(build_app(app_args(artifacts)))


def test_retrieve(service: Local) -> None:
    response = service(
        "POST", "/v1/retrieve", json={"question": "Who kept the light on Gorse Island?", "top_k": 2}
    )
    body = RetrieveResponse.model_validate(response.json())
    assert body.passages[0].title == "Gorse Island"
    assert [passage.rank for passage in body.passages] == [1, 2]
    assert body.passages[0].score >= body.passages[1].score
    assert {"index", "encoder"} <= set(body.versions)


@pytest.mark.parametrize("topology", ["split", "colocated"])
def test_a_reranker_is_a_deployment_of_its_own(
    artifacts: Artifacts, tmp_path: Path, topology: str
) -> None:
    cross = save_cross_encoder(tmp_path / "cross")
    args = app_args(artifacts, reranker=str(cross), rerank_depth=4, topology=topology)
    service = Local(build_app(args))
    body = {"query": "Who kept the light?", "documents": list(TEXTS.values()), "top_n": 2}
    ranked = service("POST", "/v1/rerank", json=body)
    assert ranked.status_code == 200, ranked.text
    assert len(ranked.json()["results"]) == 2
    found = service("POST", "/v1/retrieve", json={"question": body["query"], "top_k": 2}).json()
    assert found["versions"]["reranker"] == ranked.json()["invar"]["versions"]["reranker"]


def test_answer(service: Local) -> None:
    response = service("POST", "/v1/answer", json={"question": "When does the ferry leave?"})
    body = AnswerResponse.model_validate(response.json())
    assert body.passages[0].title == "Ferry"
    assert len(body.passages) == 3
    assert body.confidence is not None
    assert {citation.number for citation in body.citations} <= {1, 2, 3}
    assert {"retrieve_s", "generate_s", "total_s"} <= set(body.timings)
    assert {"index", "encoder", "generator"} <= set(body.versions)
    again = AnswerResponse.model_validate(
        service("POST", "/v1/answer", json={"question": "When does the ferry leave?"}).json()
    )
    assert again.answer == body.answer


def test_answers_in_a_crowd_equal_answers_alone(service: Local) -> None:
    questions = [
        "Who kept the light?",
        "Who kept the light on Gorse Island until the storm?",
        "What grows?",
        "Salt?",
    ]
    alone = [
        service("POST", "/v1/answer", json={"question": question}).json() for question in questions
    ]

    async def crowd() -> list[httpx.Response]:
        transport = httpx.ASGITransport(service.app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://service", timeout=60
        ) as client:
            sent = [
                client.post("/v1/answer", json={"question": question}) for question in questions
            ]
            too_long = client.post("/v1/answer", json={"question": "why " * 200})
            return list(await asyncio.gather(*sent, too_long))

    *together, refused = asyncio.run(crowd())
    fault(refused, 422, "invalid_request")  # and does not harm those it was batched with
    for one, other in zip(together, alone, strict=True):
        assert one.status_code == 200
        assert one.json()["answer"] == other["answer"]
        assert one.json()["confidence"] == pytest.approx(other["confidence"], abs=1e-3)


def test_index_health_and_page(service: Local, artifacts: Artifacts) -> None:
    body = IndexResponse.model_validate(service("GET", "/v1/index").json())
    assert body.index.active_uri == body.index.requested_uri == artifacts.index_uri
    assert body.index.error is None
    assert body.generator.max_context == 160
    assert body.limits.max_top_k == 4
    assert service("GET", "/healthz").json() == {"service": "invar-ray", "status": "ok"}
    assert service("GET", "/readyz").json()["status"] == "ready"
    assert "<form" in service("GET", "/").text
    assert service("GET", "/docs").status_code == 200


def test_bad_requests(service: Local) -> None:
    for path in ("/v1/answer", "/v1/retrieve"):
        assert "empty" in fault(
            service("POST", path, json={"question": "  "}), 422, "invalid_request"
        )
        assert "1500" in fault(
            service("POST", path, json={"question": "x" * 1501}), 422, "invalid_request"
        )
        assert "1 to 4" in fault(
            service("POST", path, json={"question": "Who?", "top_k": 5}), 422, "invalid_request"
        )
        fault(
            service("POST", path, content=b"{", headers={"Content-Type": "application/json"}),
            400,
            "invalid_json",
        )
        fault(service("GET", path), 405, "method_not_allowed")
    fault(service("POST", "/v1/answer", json={"question": "x" * 70_000}), 413, "body_too_large")
    fault(service("GET", "/v2"), 404, "not_found")
    message = fault(
        service("POST", "/v1/answer", json={"question": "why " * 200}), 422, "invalid_request"
    )
    assert "tokens as a prompt" in message
    assert "context of 160" in message


def test_key(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Exception, match="INVAR_API_KEY"):
        Local(build_app(app_args(artifacts, require_api_key=True)))
    monkeypatch.setenv("INVAR_API_KEY", "sesame")
    service = Local(build_app(app_args(artifacts)))
    fault(service("POST", "/v1/answer", json={"question": "Who?"}), 401, "unauthorized")
    assert service("GET", "/healthz").status_code == 200
    headers = {"Authorization": "Bearer sesame"}
    assert (
        service("POST", "/v1/answer", json={"question": "Who?"}, headers=headers).status_code == 200
    )


def test_with_a_wrong_index_it_never_becomes_ready(artifacts: Artifacts) -> None:
    args = app_args(artifacts).model_copy(update={"index_uri": artifacts.generator_uri})
    service = Local(build_app(args), ready=False)
    for _ in range(3):
        fault(service("GET", "/readyz"), 503, "unavailable")
        time.sleep(0.2)


def test_a_slow_generator_times_out_and_a_broken_one_shows_no_trace(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    class Failing:
        """Passes the probes at start, then hangs until it is let go, then fails."""

        max_context, version = 500, "f"

        def count_tokens(self, text: str) -> int:
            return len(text.split())

        def generate(self, prompts: list[str], **options: Any) -> list[Any]:
            return self.run(prompts)

        def run(self, tasks: list[Any]) -> list[Any]:
            if asked.exists():  # probes before that pass, however many there are
                if not let_go.exists():
                    while not let_go.exists():
                        time.sleep(0.02)
                    return []
                raise OSError("secret device name")
            return []

    asked, let_go = tmp_path / "asked", tmp_path / "let_go"  # files: Serve pickles the class
    args = app_args(artifacts, request_timeout_s=0.4)
    service = Local(compose(args, generator_loader=lambda uri: Failing()))  # type: ignore[arg-type,return-value]
    asked.touch()
    response = service("POST", "/v1/answer", json={"question": "Who?"})
    fault(response, 504, "timeout")
    assert response.headers["Retry-After"] == "1"
    let_go.touch()
    for _ in range(20):  # until the hung call is through
        response = service("POST", "/v1/answer", json={"question": "Who?"})
        if response.status_code != 504:
            break
    assert "secret" not in fault(response, 500, "internal")
    time.sleep(1.1)  # a success counts for a second
    assert "secret" not in fault(service("GET", "/readyz"), 503, "unavailable")


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 9, "max_top_k": 4},
        {"retriever_replicas": [3, 2]},
        {"generator_replicas": [0, 2]},
        {"max_batch_size": 64, "max_ongoing_requests": 8},
        {"index_uri": ""},
        {"engine": "openai"},
        {"topology": "colocated", "shard_uris": ["a"]},
        {"unknown": 1},
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AppArgs(**({"index_uri": "i", "generator_uri": "g"} | wrong))


def test_arguments_can_be_written_and_read_again() -> None:
    args = AppArgs(index_uri="i", generator_uri="g", request_timeout_s=7.0, top_k=2)
    written = args.model_dump(mode="json")
    assert written["request_timeout_s"] == 7.0
    assert AppArgs.model_validate(written) == args
    assert args.limits().model_dump()["timeout_s"] == 7.0


def test_the_newest_artifacts_of_a_store_are_served(artifacts: Artifacts, tmp_path: Path) -> None:
    with pytest.raises(MissingArtifactError, match="no index below"):
        build_app(AppArgs(store_uri=str(tmp_path)))
    store, made = Store(str(tmp_path)), {}
    base = {"fingerprint": "b"}
    infos = {"index": {"encoder": {"base": base, "kind": "llm"}}, "generator": {"base": base}}
    for kind, name in (
        ("index", "retriever"),
        ("index", "minilm"),
        ("generator", "demo"),
    ):
        made[name] = store.get_or_build(
            Plan(kind, name, {}), lambda building, kind=kind: building.info.update(infos[kind])
        )[0].uri
    other = {"base": {"fingerprint": "another base"}}
    store.get_or_build(Plan("generator", "other", {}), lambda building: building.info.update(other))
    args = AppArgs(store_uri=str(tmp_path)).resolved()
    assert (args.index_uri, args.generator_uri) == (made["retriever"], made["demo"])
    named = AppArgs(store_uri=str(tmp_path), index_uri=made["minilm"]).resolved()
    assert (named.index_uri, named.generator_uri) == (made["minilm"], made["demo"])
    assert args.versions_uri() == f"{tmp_path}/published/main"
    Published(store).publish([store.open(made["minilm"].removeprefix(f"{tmp_path}/"), "index")])
    assert AppArgs(store_uri=str(tmp_path)).resolved().index_uri == made["minilm"]


@pytest.mark.parametrize("name", ["config.yaml", "config.tiny.yaml"])
def test_config_files_are_valid_for_serve(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ServeDeploySchema

    path = Path(__file__).parents[2] / "serve" / name
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    (application,) = schema.applications
    assert application.import_path == "serve.app:build_app"
    args = AppArgs.model_validate(application.args)
    assert schema.http_options.host == "127.0.0.1"
    monkeypatch.setattr(
        AppArgs, "resolved", lambda self: self.model_copy(update={"index_uri": "i"})
    )
    built = build_app(args)
    assert {deployment.name for deployment in application.deployments} <= {
        "RetrieverDeployment",
        "GeneratorDeployment",
        "IngressDeployment",
    }
    assert built is not None


# On a local Ray, over HTTP.


RUNNING: dict[str, Any] = {
    "num_cpus_per_replica": 0.2,
    "retriever_replicas": (2, 2),
    "generator_replicas": (2, 2),
    "ingress_replicas": (1, 1),
    "health_check_period_s": 1,
    "graceful_shutdown_timeout_s": 2,
    "published": "rolling",
}


@pytest.fixture(scope="module")
def running(local_ray: Any, artifacts: Artifacts) -> Iterator[str]:
    url = start(app_args(artifacts, **RUNNING), port=0)
    try:
        yield url
    finally:
        stop()


@pytest.mark.timeout(300)
def test_over_http(running: str) -> None:
    answer = ask(running, "When does the ferry leave?", top_k=2)
    assert answer["passages"][0]["title"] == "Ferry"
    with pytest.raises(RequestError, match=r"HTTP 422.*1 to 4"):
        ask(running, "Who?", top_k=9)
    with pytest.raises(ResourceError, match="cannot reach"):
        ask("http://127.0.0.1:9", "Who?")
    response = httpx.post(
        f"{running}/v1/answer",
        json={"question": "why " * 200},
        headers={"X-Request-ID": "mine-1"},
        timeout=60,
    )
    assert "context of 160" in fault(response, 422, "invalid_request")
    assert response.headers["X-Request-ID"] == response.json()["error"]["request_id"] == "mine-1"


@pytest.mark.timeout(300)
def test_a_replica_that_dies_costs_no_request(running: str, local_ray: Any) -> None:
    stopped = False
    codes: list[int] = []

    def hammer(number: int) -> None:
        with httpx.Client(timeout=60, trust_env=False) as client:
            for _ in range(200):
                if stopped:
                    return
                codes.append(
                    client.post(
                        f"{running}/v1/retrieve", json={"question": f"Ferry {number}?"}
                    ).status_code
                )

    with ThreadPoolExecutor(3) as pool:
        tasks = [pool.submit(hammer, number) for number in range(3)]
        time.sleep(1.0)
        os.kill(_replica_pid(local_ray, "RetrieverDeployment"), signal.SIGKILL)
        killed, deadline = len(codes), time.monotonic() + 120
        time.sleep(4.0)
        # on a busy machine these take longer
        while len(codes) < killed + 20 and time.monotonic() < deadline:
            time.sleep(0.2)
        stopped = True
        for task in tasks:
            task.result()
    assert len(codes) >= killed + 20
    assert set(codes) == {200}


def _replica_pid(local_ray: Any, deployment: str) -> int:
    from ray import serve

    replicas = serve.status().applications["invar-ray"].deployments[deployment]
    assert replicas.status == "HEALTHY"
    handle = local_ray.get_actor(min(_replicas(local_ray, deployment)), namespace="serve")
    return int(local_ray.get(handle.__ray_call__.remote(lambda replica: os.getpid())))


@pytest.mark.timeout(1500)
def test_the_index_changes_in_place(running: str, artifacts: Artifacts, local_ray: Any) -> None:
    """As `serve deploy` with another user_config: the same replicas, a wrong index is noted, a good
    one is served.
    """
    _deploy(artifacts, artifacts.index_uri)
    assert _state(running, artifacts.index_uri) == (artifacts.index_uri, None)
    before = _replicas(local_ray, "RetrieverDeployment")
    _deploy(artifacts, artifacts.generator_uri)
    active, error = _state(running, artifacts.generator_uri)
    assert active == artifacts.index_uri
    assert error is not None
    assert "kind 'index'" in error
    assert ask(running, "What grows in the orchard?")["passages"][0]["title"] == "Orchard"
    _deploy(artifacts, artifacts.other_index_uri)
    assert _state(running, artifacts.other_index_uri) == (artifacts.other_index_uri, None)
    assert {
        p["title"] for p in ask(running, "What grows in the orchard?", top_k=4)["passages"]
    } == set(list(TEXTS)[:3])
    assert _replicas(local_ray, "RetrieverDeployment") == before


@pytest.mark.timeout(1500)
def test_replicas_follow_what_is_published(
    running: str, artifacts: Artifacts, local_ray: Any
) -> None:
    _until_running()
    before = _replicas(local_ray, "RetrieverDeployment")
    versions = Published(Store(split_uri(artifacts.index_uri)[0]), "rolling")
    for uri in (artifacts.tenants_index_uri, artifacts.index_uri):
        versions.publish([open_artifact(uri, "index")])
        assert _state(running, uri) == (uri, None)
    body = IndexResponse.model_validate(httpx.get(f"{running}/v1/index", timeout=60).json())
    assert [replica.active_uri for replica in body.replicas] == [artifacts.index_uri] * 2
    assert body.history == [artifacts.tenants_index_uri]
    assert httpx.get(f"{running}/readyz", timeout=60).status_code == 200
    assert _replicas(local_ray, "RetrieverDeployment") == before


def _deploy(artifacts: Artifacts, index_uri: str) -> None:
    # what `serve deploy` reaches through the dashboard
    from ray.serve.context import (
        _get_global_client,
    )
    from ray.serve.schema import ServeDeploySchema

    application = {
        "name": "invar-ray",
        "route_prefix": "/",
        "import_path": "serve.app:build_app",
        "args": app_args(artifacts, **RUNNING).model_dump(mode="json"),
        "deployments": [{"name": "RetrieverDeployment", "user_config": {"index_uri": index_uri}}],
    }
    _get_global_client().deploy_apps(
        ServeDeploySchema.model_validate({"applications": [application]})
    )
    _until_running()


def _until_running() -> None:
    """Wait for it; a rolling restart of its five processes took 4 minutes on a busy machine."""
    from ray import serve

    deadline = time.monotonic() + 900
    while True:
        state = serve.status().applications["invar-ray"]
        if state.status == "RUNNING":
            return
        assert state.status != "DEPLOY_FAILED", state.message
        assert time.monotonic() < deadline, state
        time.sleep(0.2)


def _state(url: str, requested_uri: str) -> tuple[str, str | None]:
    """(active, error) once several answers in a row, so both replicas, name the requested index."""
    deadline, same = time.monotonic() + 400, 0
    body: dict[str, Any] = {}
    while same < 8:
        assert time.monotonic() < deadline, body
        response = httpx.get(f"{url}/v1/index", timeout=60)
        body = response.json().get("index", {}) if response.status_code == 200 else {}
        same = same + 1 if body.get("requested_uri") == requested_uri else 0
        time.sleep(0.1)
    return body["active_uri"], body["error"]


def _replicas(local_ray: Any, deployment: str) -> set[str]:
    actors = local_ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in actors if deployment in actor["name"]}
