"""The reranker in the service: its own route, and every search behind it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from invar_ray.answering.fusion import read_with_title
from invar_ray.answering.rerank import Judged, Reranker, open_reranker
from invar_ray.answering.retriever import open_retriever
from invar_ray.errors import ModelError
from invar_ray.models.base import resolve_named
from invar_ray.models.precision import made_in
from invar_ray.store.artifacts import open_artifact
from serve.app import build_app, check_start
from serve.args import AppArgs
from serve.http.keys import ApiKey
from serve.replicas.reranker import RerankerReplica, load_reranker
from serve.replicas.targets import LocalTarget
from tests.serving import TEXTS, Artifacts, Live, fault, shared_artifacts
from tests.support import save_cross_encoder

QUESTION = "Who kept the light?"
DOCUMENTS = list(TEXTS.values())


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return shared_artifacts(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_cross_encoder(tmp_path_factory.mktemp("cross") / "encoder")


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return open_reranker(resolve_named(str(folder)))


def started(artifacts: Artifacts, loader: Any, depth: int = 5, **options: Any) -> Live:
    target = LocalTarget("reranker", RerankerReplica(loader, 2))
    return Live(artifacts, service={"reranker": target, "rerank_depth": depth}, **options)


@pytest.fixture(scope="module")
def live(artifacts: Artifacts, folder: Path) -> Iterator[Live]:
    service = started(artifacts, lambda: load_reranker(str(folder), artifacts.index_uri))
    yield service
    service.close()


def rerank(live: Live, **body: Any) -> Any:
    return live("POST", "/v1/rerank", json={"query": QUESTION, "documents": DOCUMENTS} | body)


def test_documents_come_back_by_the_cross_encoder_s_scores(live: Live, reranker: Reranker) -> None:
    scores = reranker.judge(QUESTION, DOCUMENTS).scores
    response = rerank(live).json()
    results = response["results"]
    assert [each["index"] for each in results] == sorted(range(5), key=lambda n: -scores[n])
    for each in results:
        assert each["relevance_score"] == pytest.approx(scores[each["index"]], abs=1e-5)
        assert each["document"] is None
    assert response["model"] == "invar-reranker"
    assert response["usage"]["total_tokens"] == reranker.judge(QUESTION, DOCUMENTS).tokens
    assert response["invar"]["versions"] == {"reranker": reranker.fingerprint}
    best = rerank(live, top_n=2, return_documents=True, model="invar-reranker").json()["results"]
    assert [each["index"] for each in best] == [each["index"] for each in results[:2]]
    assert best[0]["document"] == {"text": DOCUMENTS[best[0]["index"]]}
    assert len(rerank(live, top_n=99).json()["results"]) == 5


def test_documents_may_be_objects_and_long_ones_are_named(live: Live) -> None:
    plain = rerank(live).json()["results"]
    assert rerank(live, documents=[{"text": text} for text in DOCUMENTS]).json()["results"] == plain
    long = "barley " * 300
    assert rerank(live, documents=["oats", long]).json()["invar"]["cut"] == [1]


@pytest.mark.parametrize(
    "body, said",
    [
        ({"documents": []}, "1 to 256"),
        ({"documents": ["x"] * 257}, "holds 257 texts"),
        ({"documents": ["x", " "]}, "documents 1 is empty"),
        ({"documents": ["x" * 6001]}, "at most 6000"),
        ({"query": " "}, "the question is empty"),
        ({"query": "x" * 1501}, "at most 1500"),
        ({"top_n": 0}, "top_n"),
        ({"top_n": "1"}, "top_n"),
        ({"rank_fields": ["text"]}, "rank_fields"),
        ({"documents": [{"title": "x"}]}, "documents"),
        ({"documents": ["\ud800"]}, "surrogate"),
    ],
)
def test_what_cannot_be_reranked_is_refused(live: Live, body: dict[str, Any], said: str) -> None:
    content = json.dumps({"query": QUESTION, "documents": DOCUMENTS} | body)
    sent = live("POST", "/v1/rerank", content=content, headers={"Content-Type": "application/json"})
    assert said in fault(sent, 422, "invalid_request")


def test_another_model_and_a_service_without_one(live: Live, artifacts: Artifacts) -> None:
    assert "use invar-reranker" in fault(rerank(live, model="bge"), 404, "model_not_found")
    without = Live(artifacts)
    try:
        assert "has no reranker" in fault(rerank(without), 404, "not_found")
        assert "reranker" not in without("GET", "/v1/index").json()["versions"]
    finally:
        without.close()


def test_keys_and_sizes_hold_as_elsewhere(artifacts: Artifacts, reranker: Reranker) -> None:
    digest = hashlib.sha256(b"mine").hexdigest()
    keys = (ApiKey(name="mine", sha256=digest, scopes=("query",), requests_per_minute=2),)
    service = started(artifacts, lambda: reranker, keys=keys)
    try:
        fault(rerank(service), 401, "unauthorized")
        body = {"query": QUESTION, "documents": ["x" * 5000] * 250}
        own = {"X-API-Key": "mine"}
        fault(service("POST", "/v1/rerank", json=body, headers=own), 413, "body_too_large")
        body = {"query": QUESTION, "documents": ["word " * 1000] * 20}  # more than others may send
        assert service("POST", "/v1/rerank", json=body, headers=own).status_code == 200
        limited = service("POST", "/v1/rerank", json=body, headers=own)
        fault(limited, 429, "rate_limited")
        assert int(limited.headers["Retry-After"]) >= 1
    finally:
        service.close()


@pytest.mark.parametrize("mode", ["dense", "hybrid"])
def test_every_search_is_reranked(
    live: Live, artifacts: Artifacts, reranker: Reranker, mode: str
) -> None:
    deep = open_retriever(artifacts.index_uri).retrieve([QUESTION], 5, mode=mode)[0]  # type: ignore[arg-type]
    scores = reranker.judge(QUESTION, [read_with_title(hit) for hit in deep]).scores
    order = sorted(range(5), key=lambda number: -scores[number])[:2]
    asked = {"question": QUESTION, "top_k": 2, "mode": mode}
    found = live("POST", "/v1/retrieve", json=asked).json()
    expected = [deep[number].passage_id for number in order]
    assert [each["passage_id"] for each in found["passages"]] == expected
    assert expected != [hit.passage_id for hit in deep[:2]]
    assert found["versions"]["reranker"] == reranker.fingerprint
    answer = live("POST", "/v1/answer", json=asked).json()
    assert [each["passage_id"] for each in answer["passages"]] == expected
    stability = live("POST", "/v1/stability", json=asked | {"answers": False}).json()
    first = stability["wordings"][0]["passages"]
    assert [each["passage_id"] for each in first] == expected
    assert live("GET", "/v1/index").json()["versions"]["reranker"] == reranker.fingerprint


def test_shards_are_merged_first_and_conditions_hold(
    artifacts: Artifacts, live: Live, reranker: Reranker
) -> None:
    shards = [artifacts.left_index_uri, artifacts.right_index_uri]
    split = started(artifacts, lambda: reranker, shards=shards)
    try:
        asked = {"question": QUESTION, "top_k": 3, "mode": "dense"}
        found = [s("POST", "/v1/retrieve", json=asked).json()["passages"] for s in (split, live)]
        of_both, of_one = ([each["passage_id"] for each in passages] for passages in found)
        assert of_both == of_one
        nothing = {"equals": {"document_id": "nobody"}}
        asked = {"question": QUESTION, "where": nothing, "answers": False}
        empty = split("POST", "/v1/stability", json=asked)
        assert empty.status_code == 200, empty.text
        assert empty.json()["wordings"][0]["passages"] == []
    finally:
        split.close()


class Slow:
    """A reranker whose every batch takes its time."""

    fingerprint = "slow"

    def __init__(self) -> None:
        self.judged: list[str] = []
        self.broken = False

    def judge(self, question: str, texts: Sequence[str]) -> Judged:
        if self.broken:
            raise ModelError("weights are gone")
        time.sleep(0.1)
        self.judged.append(question)
        return Judged(tuple(0.5 for _ in texts), len(texts), ())


def test_what_reads_long_holds_up_neither_others_nor_its_own_deadline(
    artifacts: Artifacts,
) -> None:
    slow = Slow()
    service = started(artifacts, lambda: slow)
    try:
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(rerank, service, documents=["x"] * 60)  # 30 batches, 3 s
            time.sleep(0.3)
            body = {"model": "invar-encoder", "input": "ferry"}
            assert service("POST", "/v1/embeddings", json=body).status_code == 200
            short = rerank(service, query="short", documents=["x"])
            assert short.status_code == 200
            assert not long.done(), "it waited for all of the long one"
            assert long.result().status_code == 200
        began = len(slow.judged)
        late = service(
            "POST",
            "/v1/rerank",
            json={"query": QUESTION, "documents": ["x"] * 100},
            headers={"X-Request-Timeout": "0.35"},
        )
        fault(late, 504, "timeout")
        assert late.headers["Retry-After"]
        time.sleep(0.5)
        assert len(slow.judged) - began <= 6, "it went on for nobody"
        slow.broken = True
        failed = rerank(service)
        assert "gone" not in fault(failed, 500, "internal")
        assert service("GET", "/readyz").status_code == 503
    finally:
        service.close()


def test_what_is_no_reranker_shows_before_anything_starts(
    artifacts: Artifacts, tmp_path: Path, folder: Path
) -> None:
    both = {"index_uri": artifacts.index_uri, "generator_uri": artifacts.generator_uri}
    with pytest.raises(ModelError, match="no folder"):
        check_start(AppArgs(**both, reranker=str(tmp_path / "none")), "127.0.0.1", 0)
    check_start(AppArgs(**both, reranker=str(folder)), "127.0.0.1", 0)
    build_app(AppArgs(**both, reranker=str(folder)))


def test_it_runs_in_the_precision_of_the_index_unless_told_otherwise(
    artifacts: Artifacts, folder: Path
) -> None:
    assert made_in(open_artifact(artifacts.index_uri, "index")) == "fp32"
    for asked, dtype in ((None, torch.float32), ("bf16", torch.bfloat16)):
        opened = load_reranker(str(folder), artifacts.index_uri, precision=asked)  # type: ignore[arg-type]
        assert {each.dtype for each in opened._model.parameters()} == {dtype}
