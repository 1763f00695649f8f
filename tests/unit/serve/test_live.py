"""The service over small real artifacts, in this process behind a real web server; the real
``openai`` client.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from invar_ray.answering.certainty import SIGNS, Certainty
from invar_ray.config import SearchConfig
from invar_ray.text.prompts import REFUSAL
from serve.http.keys import ApiKey
from serve.http.openai_forms import LOW_CONFIDENCE
from serve.http.protocol import AnswerResponse, StabilityResponse
from serve.replicas.generator import STYLE_UNUSED, TransformersEngine, load_generator
from tests.serving import LIMITS, TEXTS, Artifacts, Live, fault, shared_artifacts

FERRY = "When does the ferry leave?"
ADMIN = ApiKey(name="ops", sha256=hashlib.sha256(b"root").hexdigest(), scopes=("query", "admin"))
ROOT = {"X-API-Key": "root"}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return shared_artifacts(tmp_path_factory)


@pytest.fixture(scope="module")
def live(artifacts: Artifacts) -> Iterator[Live]:
    service = Live(artifacts)
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0)


def chat(client: openai.OpenAI, text: str = FERRY, **options: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        **({"model": "invar-rag", "messages": messages} | options)
    )


def events(text: str) -> list[tuple[str, Any]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [
        (lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: ")))
        for lines in blocks
    ]


def test_chat_equals_the_answer_and_counts_its_tokens(live: Live, client: openai.OpenAI) -> None:
    completion = chat(client, seed=3, temperature=0, user="someone")
    answer = AnswerResponse.model_validate(
        live("POST", "/v1/answer", json={"question": FERRY}).json()
    )
    extension = AnswerResponse.model_validate(completion.invar)
    assert extension.answer == answer.answer
    assert extension.versions == answer.versions
    assert extension.passages[0].title == "Ferry"
    (choice,) = completion.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert completion.usage.completion_tokens == 6
    assert completion.usage.prompt_tokens > 30
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 6
    assert (
        completion.system_fingerprint
        == f"{answer.versions['index']}-{answer.versions['generator']}"
    )


def test_a_chat_stream_adds_up_to_the_plain_answer(client: openai.OpenAI) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    *_, finished, usage = chunks
    assert finished.choices[0].finish_reason == "length"
    assert AnswerResponse.model_validate(finished.invar).answer == whole.invar["answer"]
    assert usage.usage == whole.usage
    assert usage.choices == []
    assert not any(chunk.usage for chunk in chat(client, stream=True))


def test_sampling_options_reach_the_model(client: openai.OpenAI) -> None:
    greedy = chat(client).choices[0].message.content
    warm = [
        chat(client, temperature=2.0, seed=seed).choices[0].message.content for seed in (1, 1, 2)
    ]
    assert warm[0] == warm[1]
    assert len({greedy, *warm}) == 3
    assert chat(client, temperature=2.0, top_p=1e-6, seed=5).choices[0].message.content == greedy
    short = chat(client, max_tokens=2)
    assert short.usage.completion_tokens == 2
    assert chat(client, max_completion_tokens=3).usage.completion_tokens == 3
    assert chat(client, max_tokens=10_000).usage.completion_tokens == LIMITS.max_new_tokens
    stopped = chat(client, stop=[greedy[2]])
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].message.content == greedy[: greedy.index(greedy[2])].strip()


def test_of_several_messages_the_last_is_searched_with(client: openai.OpenAI) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who kept the light on Gorse Island?"},
        {"role": "assistant", "content": "Mara Voss [1]"},
        {"role": "user", "content": [{"type": "text", "text": FERRY}]},
    ]
    completion = chat(client, messages=messages)
    assert completion.invar["question"] == FERRY
    assert completion.invar["passages"][0]["title"] == "Ferry"
    assert "2 other messages were not used" in completion.invar["notes"][0]
    assert STYLE_UNUSED in completion.invar["notes"]
    assert completion.invar["answer"] == chat(client).invar["answer"]
    with pytest.raises(openai.BadRequestError, match="last message is of the assistant"):
        chat(client, messages=messages[:3])


def test_a_request_chooses_how_it_is_searched(live: Live, client: openai.OpenAI) -> None:
    found = {
        mode: live("POST", "/v1/retrieve", json={"question": FERRY, "mode": mode}).json()
        for mode in (None, "dense", "bm25", "hybrid")
    }
    assert found[None]["mode"] == SearchConfig.mode
    assert found[None]["passages"] == found[SearchConfig.mode]["passages"]
    assert len({found[mode]["passages"][0]["score"] for mode in ("dense", "bm25", "hybrid")}) == 3
    assert chat(client, extra_body={"mode": "bm25"}).invar["mode"] == "bm25"
    fault(
        live("POST", "/v1/retrieve", json={"question": FERRY, "mode": "fuzzy"}),
        422,
        "invalid_request",
    )


def test_an_index_without_bm25_is_searched_densely(artifacts: Artifacts) -> None:
    old = Live(artifacts, shards=[artifacts.other_index_uri])
    try:
        assert old("POST", "/v1/retrieve", json={"question": FERRY}).json()["mode"] == "dense"
        refused = old("POST", "/v1/answer", json={"question": FERRY, "mode": "hybrid"})
        assert "has no BM25" in fault(refused, 422, "invalid_request")
    finally:
        old.close()


def test_shards_are_joined_before_their_lists_are_fused(live: Live, artifacts: Artifacts) -> None:
    parts = Live(artifacts, shards=[artifacts.left_index_uri, artifacts.right_index_uri])
    old = Live(artifacts, shards=[artifacts.other_index_uri, artifacts.right_index_uri])
    question = {"question": "In which season does the harbour trade barley?", "top_k": 4}
    try:
        for mode in ("dense", "hybrid"):
            whole = live("POST", "/v1/retrieve", json=question | {"mode": mode}).json()
            joined = parts("POST", "/v1/retrieve", json=question | {"mode": mode}).json()
            assert joined["mode"] == mode
            assert [p["title"] for p in joined["passages"]] == [
                p["title"] for p in whole["passages"]
            ]
        best = parts("POST", "/v1/retrieve", json=question | {"mode": "bm25"}).json()
        assert best["passages"][0]["title"] == "Harbour"
        mixed = old("POST", "/v1/retrieve", json=question).json()
        assert mixed["mode"] == "dense", "a shard without BM25 makes all of them dense"
        assert not mixed["partial"]
    finally:
        parts.close()
        old.close()


def test_what_it_is_not_sure_of_is_refused_and_said_everywhere(
    live: Live, artifacts: Artifacts
) -> None:
    never = Certainty((0.0,) * len(SIGNS), -3.0, 0.5, 0.1, 0.4, 0.0, 0.0, 80)

    def unsure(uri: str) -> Any:
        generator = load_generator(uri)
        generator.certainty = never.to_json()
        return generator

    doubting = Live(artifacts, engine=TransformersEngine(artifacts.generator_uri, unsure))
    try:
        body = {"question": FERRY}
        given = live("POST", "/v1/answer", json=body).json()
        assert (given["low_confidence"], given["guess"], given["probability"]) == (False, "", None)
        refused = doubting("POST", "/v1/answer", json=body).json()
        assert (refused["answer"], refused["refused"]) == (REFUSAL, True)
        assert refused["low_confidence"]
        assert refused["guess"] == given["answer"]
        assert refused["probability"] == pytest.approx(1 / (1 + math.exp(3)))
        assert refused["citations"] == []
        assert refused["passages"] == given["passages"]
        streamed = events(doubting("POST", "/v1/answer", json=body | {"stream": True}).text)
        whole = next(data for name, data in streamed if name == "answer")
        assert (whole["answer"], whole["guess"]) == (REFUSAL, refused["guess"])
        said = doubting("POST", "/v1/stability", json=body | {"rewrites": 1}).json()
        assert [wording["refused"] for wording in said["wordings"]] == [True, True]
        other = openai.OpenAI(base_url=f"{doubting.url}/v1", api_key="unused", max_retries=0)
        plain = chat(other).choices[0].message.content
        assert plain.endswith(LOW_CONFIDENCE)
        chunks = chat(other, stream=True)
        assert plain == "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    finally:
        doubting.close()


def test_a_follow_up_is_read_in_the_light_of_the_turns_before(client: openai.OpenAI) -> None:
    turns = [
        {"role": "user", "content": "Who kept the light on Gorse Island?"},
        {"role": "assistant", "content": "Mara Voss [1]"},
    ]
    asked = chat(client, messages=[*turns, {"role": "user", "content": "And when was it left?"}])
    assert asked.invar["read_as"] == "When was Gorse Island left?"
    assert asked.invar["question"] == "And when was it left?"
    assert asked.invar["passages"][0]["title"] == "Gorse Island"
    assert not any("not used" in note for note in asked.invar["notes"])
    alone = chat(client, messages=[*turns, {"role": "user", "content": FERRY}])
    assert alone.invar["read_as"] is None
    assert alone.invar["passages"] == chat(client).invar["passages"]
    briefly = {"role": "system", "content": "Say that the ferry leaves at ten."}
    styled = chat(client, messages=[briefly, *turns, {"role": "user", "content": FERRY}])
    assert styled.invar["answer"] == alone.invar["answer"], "no evidence comes from a system prompt"
    assert STYLE_UNUSED in styled.invar["notes"]
    assert STYLE_UNUSED not in alone.invar["notes"]


def test_errors_are_those_that_the_client_knows(
    artifacts: Artifacts, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="gpt-4o")
    assert missing.value.code == "model_not_found"
    for wrong in (
        {"messages": []},
        {"temperature": 3},
        {"n": 2},
        {"stop": ["a"] * 5},
        {"max_tokens": 0},
        {"logprobs": True},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"extra_body": {"top_k": 99}},
        {"messages": [{"role": "user", "content": " "}]},
        {"messages": [{"role": "user", "content": "why " * 300}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
            ]
        },
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, **wrong)
        assert caught.value.type == "invalid_request_error", wrong
        with pytest.raises(openai.BadRequestError):
            list(chat(client, stream=True, **wrong))
    locked = Live(artifacts, keys=(ADMIN,))
    try:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0).models.list()
        assert (
            openai.OpenAI(base_url=f"{locked.url}/v1", api_key="root", max_retries=0)
            .models.list()
            .data
        )
    finally:
        locked.close()


def test_embeddings(live: Live, client: openai.OpenAI, artifacts: Artifacts) -> None:
    from invar_ray.answering.retriever import open_retriever

    encoder = open_retriever(artifacts.index_uri).encoder
    texts = [FERRY, "Pears and plums"]
    # the client asks for base64
    packed = client.embeddings.create(model="invar-encoder", input=texts)
    plain = client.embeddings.create(model="invar-encoder", input=texts, encoding_format="float")
    expected = encoder.encode_queries(texts)
    np.testing.assert_allclose([row.embedding for row in packed.data], expected, atol=1e-5)
    np.testing.assert_allclose([row.embedding for row in plain.data], expected, atol=1e-5)
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 5
    passage = client.embeddings.create(
        model="invar-encoder", input=FERRY, extra_body={"input_type": "passage"}
    )
    np.testing.assert_allclose(
        passage.data[0].embedding, encoder.encode_passages([("", FERRY)])[0], atol=1e-5
    )
    assert client.embeddings.create(
        model="invar-encoder", input="a", dimensions=encoder.dimension
    ).data
    for wrong in (
        {"dimensions": 5},
        {"input": []},
        {"input": ["a", " "]},
        {"input": ["a"] * 2049},
        {"input": [1, 2]},
    ):
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(**({"model": "invar-encoder", "input": "a"} | wrong))


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [
        "invar-rag",
        "invar-encoder",
        "invar-encoder-passage",
    ]
    assert client.models.retrieve("invar-rag").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_an_answer_stream_ends_with_the_whole_answer(live: Live) -> None:
    body = {"question": FERRY, "top_k": 2}
    plain = live("POST", "/v1/answer", json=body).json()
    response = live("POST", "/v1/answer", json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    names, values = zip(*events(response.text), strict=True)
    assert names[0] == "passages"
    assert names[-2:] == ("answer", "done")
    assert set(names[1:-2]) == {"delta"}
    assert values[0]["passages"] == plain["passages"]
    answer = AnswerResponse.model_validate(values[-2])
    assert (answer.answer, answer.versions) == (plain["answer"], plain["versions"])
    fault(
        live("POST", "/v1/answer", json={"question": "why " * 300, "stream": True}),
        422,
        "invalid_request",
    )


def test_stability_is_what_the_parts_say(live: Live) -> None:
    body = {"question": "Who kept the light on Gorse Island?", "rewrites": 4, "top_k": 2}
    result = StabilityResponse.model_validate(live("POST", "/v1/stability", json=body).json())
    assert len(result.wordings) == 5
    assert len({wording.text for wording in result.wordings}) == 5
    assert (result.wordings[0].kind, result.wordings[0].overlap) == ("anchor", 1.0)
    found = []
    for wording in result.wordings:
        alone = live("POST", "/v1/answer", json={"question": wording.text, "top_k": 2}).json()
        assert [p["passage_id"] for p in alone["passages"]] == [
            p.passage_id for p in wording.passages
        ]
        assert alone["answer"] == wording.answer
        found.append(({p.passage_id for p in wording.passages}, wording.answer))
    pairs = [(a, b) for n, a in enumerate(found) for b in found[n + 1 :]]
    assert result.overlap == pytest.approx(
        sum(len(a[0] & b[0]) / len(a[0] | b[0]) for a, b in pairs) / len(pairs)
    )
    assert result.agreement is not None
    assert 0 <= result.agreement <= 1
    hits_only = live("POST", "/v1/stability", json={**body, "answers": False}).json()
    assert hits_only["agreement"] is None
    assert hits_only["overlap"] == result.overlap
    fault(live("POST", "/v1/stability", json={**body, "rewrites": 6}), 422, "invalid_request")


def test_shards_find_what_one_index_finds_and_say_when_one_is_missing(
    artifacts: Artifacts, live: Live
) -> None:
    sharded = Live(artifacts, shards=[artifacts.left_index_uri, artifacts.right_index_uri])
    try:
        for question in (FERRY, "What grows in the orchard?", "Who kept the light?"):
            # BM25 weighs words by their frequency in a shard: only cosines are equal.
            body = {"question": question, "top_k": 4, "mode": "dense"}
            one = live("POST", "/v1/retrieve", json=body).json()
            both = sharded("POST", "/v1/retrieve", json=body).json()
            assert [p["passage_id"] for p in both["passages"]] == [
                p["passage_id"] for p in one["passages"]
            ]
            assert [p["rank"] for p in both["passages"]] == [1, 2, 3, 4]
            assert [p["score"] for p in both["passages"]] == pytest.approx(
                [p["score"] for p in one["passages"]], abs=1e-5
            )
            assert not both["partial"]
            assert both["versions"]["encoder"] == one["versions"]["encoder"]
            assert both["versions"]["index"].count("+") == 1

        async def gone(*args: Any) -> Any:
            raise OSError("the shard's node is gone")

        sharded.retrievers[1].retrieve = gone  # type: ignore[method-assign]
        partial = sharded("POST", "/v1/answer", json={"question": FERRY, "top_k": 4}).json()
        assert (partial["partial"], partial["missing_shards"]) == (True, ["1"])
        assert {p["title"] for p in partial["passages"]} <= set(list(TEXTS)[:3])
        sharded.retrievers[0].retrieve = gone  # type: ignore[method-assign]
        fault(sharded("POST", "/v1/retrieve", json={"question": FERRY}), 503, "unavailable")
    finally:
        sharded.close()


def test_a_deadline_ends_the_work(live: Live) -> None:
    response = live(
        "POST", "/v1/answer", json={"question": FERRY}, headers={"X-Request-Timeout": "0.000001"}
    )
    fault(response, 504, "timeout")
    assert response.headers["Retry-After"]
    for wrong in ("0", "-1", "nan", "inf", "soon"):
        response = live(
            "POST", "/v1/answer", json={"question": FERRY}, headers={"X-Request-Timeout": wrong}
        )
        fault(response, 400, "invalid_request")


def test_a_client_that_leaves_stops_the_model(artifacts: Artifacts) -> None:
    live = Live(artifacts, limits=LIMITS.model_copy(update={"max_new_tokens": 60}))
    steps, slow = [0], threading.Event()
    model = live.engine._generator.model  # type: ignore[attr-defined]
    forward = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        slow.wait(0.05)
        return forward(*args, **kwargs)

    model.forward = counted
    try:
        for stream in (True, False):
            steps[0] = 0
            body = {"question": FERRY, "stream": stream, "max_new_tokens": 60}
            if stream:
                with live.client.stream("POST", "/v1/answer", json=body) as response:
                    assert next(response.iter_text())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"{live.url}/v1/answer", json=body, timeout=0.4, trust_env=False)
            live.run(asyncio.sleep(0.3))
            seen = steps[0]
            live.run(asyncio.sleep(0.5))
            assert steps[0] == seen < 40
        assert live("GET", "/readyz").status_code == 200
    finally:
        live.close()


def test_metrics_of_a_request(artifacts: Artifacts) -> None:
    live = Live(artifacts, service={"stability_share": 1.0})
    try:
        assert live("POST", "/v1/answer", json={"question": FERRY}).status_code == 200
        live("GET", "/nowhere/at/all")
        deadline = time.monotonic() + 20
        while not live.memory.of("invar_stability_overlap"):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        values = live.memory.values
        assert values["invar_requests_total", (("route", "/v1/answer"), ("status", "200"))] == [1.0]
        assert ("invar_requests_total", (("route", "other"), ("status", "404"))) in values
        assert values["invar_tokens_total", ()] == [6.0]
        assert values["invar_batch_size", (("engine", "generator"),)] == [1.0]
        # two of them for the sample
        assert len(values["invar_stage_seconds", (("stage", "search"),)]) == 3
        assert 0 < live.memory.of("invar_top_score")[0] <= 1
        assert 0 <= live.memory.of("invar_stability_overlap")[0] <= 1
    finally:
        live.close()


def test_a_slow_client_is_dropped_and_the_service_lives(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.http.guard.BODY_TIMEOUT_S", 0.3)
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        slow.sendall(
            b"POST /v1/answer HTTP/1.1\r\nHost: x\r\nContent-Type: "
            b"application/json\r\nContent-Length: 90\r\n\r\n{"
        )
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")
    assert live("POST", "/v1/retrieve", json={"question": FERRY}).status_code == 200
