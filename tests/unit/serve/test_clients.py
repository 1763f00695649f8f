"""What common clients send: parameters that ask for nothing, many or long inputs, token ids."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.serving import Artifacts, Live, fault, shared_artifacts

FERRY = "When does the ferry leave?"
USER = {"role": "user", "content": FERRY}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return shared_artifacts(tmp_path_factory)


@pytest.fixture(scope="module")
def live(artifacts: Artifacts) -> Iterator[Live]:
    service = Live(artifacts)
    yield service
    service.close()


def chat(live: Live, **options: Any) -> httpx.Response:
    body = {"model": "invar-rag", "messages": [USER]} | options
    return live("POST", "/v1/chat/completions", json=body)


def embed(live: Live, given: Any, **options: Any) -> httpx.Response:
    body = {"model": "invar-encoder", "input": given} | options
    return live("POST", "/v1/embeddings", json=body)


NEUTRAL: list[dict[str, Any]] = [
    {"functions": None, "function_call": None, "tools": None, "tool_choice": None},
    {"tools": [], "tool_choice": "none", "parallel_tool_calls": False},
    {"functions": [], "function_call": "none", "tool_choice": "auto"},
    {"logprobs": False, "top_logprobs": None, "logit_bias": {}},
    {"response_format": {"type": "text"}, "modalities": ["text"], "audio": None},
    {"store": False, "metadata": {}, "service_tier": "auto", "prediction": None},
    {"n": 1, "presence_penalty": 0.0, "frequency_penalty": 0, "best_of": 1, "min_p": 0.0},
    {"reasoning_effort": None, "verbosity": None, "web_search_options": None},
    {"prompt_cache_key": "mine", "safety_identifier": "someone", "user": "u"},
    {"stop": None, "stream_options": None, "max_tokens": None, "seed": None, "top_k": None},
]


@pytest.mark.parametrize("options", NEUTRAL, ids=lambda options: "-".join(options))
def test_what_asks_for_nothing_changes_nothing(live: Live, options: dict[str, Any]) -> None:
    plain, other = chat(live).json(), chat(live, **options)
    assert other.status_code == 200, other.text
    assert other.json()["choices"] == plain["choices"]
    assert other.json()["usage"] == plain["usage"]


def test_all_neutral_parameters_at_once_and_in_a_stream(live: Live) -> None:
    everything = {name: value for options in NEUTRAL for name, value in options.items()}
    assert chat(live, **everything).json()["choices"] == chat(live).json()["choices"]
    assert "data: [DONE]" in chat(live, **everything, stream=True).text


def test_histories_of_other_services_are_read(live: Live) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "Be kind.", "cache_control": {"type": "ephemeral"}},
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "fog"},
        {"role": "function", "name": "look", "content": "fog"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot say."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": FERRY, "cache_control": {"type": "ephemeral"}}],
        },
    ]
    answer = chat(live, messages=messages)
    assert answer.status_code == 200, answer.text
    assert answer.json()["invar"]["question"] == FERRY


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "calls no tools"),
        ({"tool_choice": "required"}, "calls no tools"),
        ({"functions": [{"name": "f"}]}, "calls no tools"),
        ({"logprobs": True}, "log-probabilities are not given"),
        ({"top_logprobs": 3}, "log-probabilities are not given"),
        ({"n": 2}, "one answer is given"),
        ({"response_format": {"type": "json_object"}}, "JSON mode"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "JSON mode"),
        ({"store": True}, "nothing is stored"),
        ({"metadata": {"a": "b"}}, "nothing is stored"),
        ({"logit_bias": {"3": 1}}, "single tokens"),
        ({"presence_penalty": 0.5}, "penalties"),
        ({"modalities": ["text", "audio"]}, "only text"),
        ({"service_tier": "flex"}, "one tier"),
        ({"reasoning_effort": "high"}, "does not reason"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "a part that is no text",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_a_sentence(
    live: Live, options: dict[str, Any], sentence: str
) -> None:
    for stream in (False, True):
        message = fault(chat(live, **options, stream=stream), 400, "invalid_request")
        assert sentence in message
        assert "Extra inputs" not in message
        assert "Value error" not in message


def test_completions_are_refused_in_a_sentence(live: Live) -> None:
    body = {"model": "invar-rag", "prompt": "Once"}
    message = fault(live("POST", "/v1/completions", json=body), 404, "model_not_found")
    assert "use /v1/chat/completions" in message


def test_a_model_that_is_not_there_is_not_echoed_whole(live: Live) -> None:
    name = "gpt\u202e\n" + "x" * 5000
    message = fault(chat(live, model=name), 404, "model_not_found")
    assert len(message) < 200
    assert message.isascii()
    assert "use invar-rag" in message


def test_token_ids_are_refused_with_the_switch_that_sends_texts(live: Live) -> None:
    for given in ([1, 2, 3], [[1, 2], [3]]):
        message = fault(embed(live, given), 400, "invalid_request")
        assert "check_embedding_ctx_length=False" in message


def test_neutral_parameters_of_embeddings(live: Live) -> None:
    plain = embed(live, [FERRY]).json()
    for options in (
        {"dimensions": None, "encoding_format": None, "user": None, "input_type": None},
        {"truncate": True, "truncate_prompt_tokens": -1, "priority": 0},
    ):
        other = embed(live, [FERRY], **options)
        assert other.status_code == 200, other.text
        assert other.json()["data"] == plain["data"]


def test_the_side_of_passages_by_name_or_type(live: Live) -> None:
    query, passage, typed, both = (
        embed(live, FERRY, **options).json()
        for options in (
            {},
            {"model": "invar-encoder-passage"},
            {"input_type": "passage"},
            {"model": "invar-encoder-passage", "input_type": "query"},
        )
    )
    assert passage["data"] == typed["data"] != query["data"] == both["data"]
    assert passage["model"] == "invar-encoder-passage"
    names = [each["id"] for each in live("GET", "/v1/models").json()["data"]]
    assert names == ["invar-rag", "invar-encoder", "invar-encoder-passage"]


def test_a_thousand_inputs_are_one_request_and_equal_single_ones(live: Live) -> None:
    texts = [f"Boat {number} leaves at {number % 24} o'clock." for number in range(1000)]
    whole = embed(live, texts)
    assert whole.status_code == 200, whole.text
    rows = np.array([row["embedding"] for row in whole.json()["data"]])
    assert [row["index"] for row in whole.json()["data"]] == list(range(1000))
    for number in (0, 7, 8, 512, 999):
        alone = embed(live, texts[number]).json()["data"][0]["embedding"]
        np.testing.assert_allclose(rows[number], alone, atol=1e-5)
    assert "1 to 2048" in fault(embed(live, ["a"] * 2049), 400, "invalid_request")


def test_inputs_that_are_cut_are_named_and_unread_tokens_not_counted(live: Live) -> None:
    short, long = "a b c", "barley " * 800
    one, other, both = (embed(live, given).json() for given in (short, long, [short, long, short]))
    assert one["invar"]["cut"] == []
    assert other["invar"]["cut"] == [0]
    assert both["invar"]["cut"] == [1]
    assert 10 < other["usage"]["prompt_tokens"] < 300
    longer = embed(live, long + "oats").json()
    assert longer["usage"] == other["usage"]
    assert longer["data"] == other["data"], "what was not read changes nothing"
    assert both["usage"]["prompt_tokens"] == (
        2 * one["usage"]["prompt_tokens"] + other["usage"]["prompt_tokens"]
    )


def test_searches_come_between_the_inputs_of_others(live: Live) -> None:
    texts = [f"Barley and salt number {number}. " * 20 for number in range(1000)]
    embed(live, texts[:8])
    with ThreadPoolExecutor(1) as pool:
        embedding = pool.submit(embed, live, texts)
        time.sleep(0.1)
        for _ in range(3):
            assert live("POST", "/v1/retrieve", json={"question": FERRY}).status_code == 200
            assert embed(live, "alone").status_code == 200
        assert not embedding.done(), "they waited for all of it"
        assert embedding.result().status_code == 200


def test_langchain_embeds_unmodified(live: Live, artifacts: Artifacts) -> None:
    from langchain_openai import OpenAIEmbeddings

    from invar_ray.answering.retriever import open_retriever

    passages, questions = (
        OpenAIEmbeddings(
            model=name,
            base_url=f"{live.url}/v1",
            api_key="unused",  # type: ignore[arg-type]
            check_embedding_ctx_length=False,
            max_retries=0,
        )
        for name in ("invar-encoder-passage", "invar-encoder")
    )
    texts = [f"Pear {number}" for number in range(1001)]
    rows = passages.embed_documents(texts)
    assert len(rows) == 1001
    encoder = open_retriever(artifacts.index_uri).encoder
    expected = encoder.encode_passages([("", texts[1000])])[0]
    np.testing.assert_allclose(rows[1000], expected, atol=1e-5)
    asked = encoder.encode_queries([FERRY])[0]
    np.testing.assert_allclose(questions.embed_query(FERRY), asked, atol=1e-5)
    awaited = asyncio.run(questions.aembed_query(FERRY))
    np.testing.assert_allclose(awaited, asked, atol=1e-5)


@pytest.mark.slow  # its import alone takes seconds
def test_llama_index_embeds_unmodified(live: Live, artifacts: Artifacts) -> None:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    from invar_ray.answering.retriever import open_retriever

    passages, questions = (
        OpenAILikeEmbedding(
            model_name=name, api_base=f"{live.url}/v1", api_key="unused", max_retries=0
        )
        for name in ("invar-encoder-passage", "invar-encoder")
    )
    rows = passages.get_text_embedding_batch([f"Plum {number}" for number in range(151)])
    assert len(rows) == 151
    encoder = open_retriever(artifacts.index_uri).encoder
    np.testing.assert_allclose(rows[150], encoder.encode_passages([("", "Plum 150")])[0], atol=1e-5)
    asked = questions.get_query_embedding(FERRY)
    np.testing.assert_allclose(asked, encoder.encode_queries([FERRY])[0], atol=1e-5)


def test_openai_sends_its_defaults_unharmed(live: Live) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="unused", max_retries=0)
    answer = client.chat.completions.create(
        model="invar-rag",
        messages=[{"role": "user", "content": FERRY}],
        n=1,
        logprobs=False,
        store=False,
        metadata={},
        tools=[],
        response_format={"type": "text"},
        service_tier="auto",
    )
    assert answer.choices[0].message.content
