"""Conditions on passages over HTTP, and keys that are bound to them: nobody reads another tenant's
passages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from invar_ray.answering.filters import Where
from invar_ray.errors import ConfigError
from serve.http.conditions import MOST_BEGINNINGS, MOST_VALUES, Conditions
from serve.http.keys import ApiKey, keys_from_environment
from tests.serving import TENANTS, Artifacts, Live, fault, shared_artifacts

FERRY = "When does the ferry leave?"
LAND = {title for title, tenant in TENANTS.items() if tenant == "land"}


def key(name: str, **values: Any) -> ApiKey:
    return ApiKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), **values)


KEYS = [
    key("anyone"),
    key("land", where={"equals": {"tenant": "land"}}),
    key("sea", where={"starts": {"uri": ["s3://corpus/sea/"]}}),
    key("nobody", where={"equals": {"tenant": "no such"}}),
    key("root", scopes=("query", "admin"), where={"equals": {"tenant": "land"}}),
]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return shared_artifacts(tmp_path_factory)


@pytest.fixture(scope="module")
def live(artifacts: Artifacts) -> Iterator[Live]:
    service = Live(
        artifacts, shards=[artifacts.tenants_index_uri], keys=KEYS, service={"stability_share": 1.0}
    )
    yield service
    service.close()


def ask(live: Live, path: str = "/v1/retrieve", who: str = "anyone", **body: Any) -> Any:
    response = live("POST", path, json={"question": FERRY, **body}, headers={"X-API-Key": who})
    assert response.status_code == 200, response.text
    return response.json()


def titles(response: dict[str, Any]) -> list[str]:
    return [passage["title"] for passage in response["passages"]]


def test_conditions_narrow_what_is_found(live: Live) -> None:
    everything = titles(ask(live, top_k=4))
    assert everything[0] == "Ferry"
    assert len(everything) == 4
    land = ask(live, top_k=4, where={"equals": {"tenant": "land"}})
    assert set(titles(land)) == LAND  # two passages in all, and not the best ones of all
    assert [passage["rank"] for passage in land["passages"]] == [1, 2]
    assert titles(
        ask(live, where={"equals": {"tenant": ["land"], "document_id": ["Mill", "Ferry"]}})
    ) == ["Mill"]
    assert titles(ask(live, top_k=1, where={"starts": {"uri": "s3://corpus/land/"}}))[0] in LAND
    assert "Ferry" not in titles(ask(live, top_k=4, where={"without": ["Ferry:0"]}))
    assert titles(ask(live, where={"equals": {"tenant": "no such"}})) == []
    assert ask(live, top_k=4, where={})["passages"] == ask(live, top_k=4)["passages"]


def test_keys_and_conditions_hold_in_every_mode(live: Live) -> None:
    for mode in ("dense", "bm25", "hybrid"):
        found = ask(live, who="land", top_k=4, mode=mode)
        assert found["mode"] == mode
        assert set(titles(found)) <= LAND
        assert "Ferry" not in titles(ask(live, top_k=4, mode=mode, where={"without": ["Ferry:0"]}))
        wordings = ask(live, "/v1/stability", "land", rewrites=2, mode=mode)
        assert wordings["mode"] == mode
        assert all(set(titles(each)) <= LAND for each in wordings["wordings"])


def test_answers_streams_wordings_and_chat_keep_to_them(live: Live) -> None:
    where = {"equals": {"tenant": "land"}}
    answer = ask(live, "/v1/answer", where=where)
    assert set(titles(answer)) == LAND
    with live.client.stream(
        "POST",
        "/v1/answer",
        json={"question": FERRY, "where": where, "stream": True},
        headers={"X-API-Key": "anyone"},
    ) as stream:
        lines = list(stream.iter_lines())
    passages = json.loads(lines[lines.index("event: passages") + 1].removeprefix("data: "))
    assert {each["title"] for each in passages["passages"]} == LAND
    wordings = ask(live, "/v1/stability", where=where, rewrites=2)["wordings"]
    assert len(wordings) == 3
    assert all(set(titles(each)) == LAND for each in wordings)
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="anyone", max_retries=0)
    completion: Any = client.chat.completions.create(
        model="invar-rag",
        messages=[{"role": "user", "content": FERRY}],
        extra_body={"where": where},
    )
    assert set(titles(completion.invar)) == LAND


def test_nothing_found_is_answered_all_the_same(live: Live) -> None:
    for who, where in (("anyone", {"equals": {"tenant": "no such"}}), ("nobody", {})):
        answer = ask(live, "/v1/answer", who, where=where)
        assert titles(answer) == []
        assert answer["citations"] == []


@pytest.mark.parametrize("path", ["/v1/retrieve", "/v1/answer", "/v1/stability"])
def test_a_bound_key_finds_its_own_passages_only(live: Live, path: str) -> None:
    found = ask(live, path, "land")
    lists = (
        [titles(each) for each in found["wordings"]] if path == "/v1/stability" else [titles(found)]
    )
    assert all(set(each) == LAND for each in lists)


@pytest.mark.parametrize(
    "where",
    [
        {"equals": {"tenant": "sea"}},
        {"equals": {"tenant": ["sea", "land"]}},
        {"equals": {"tenant": ["sea", "land", "no such"], "document_id": list(TENANTS)}},
        {"starts": {"tenant": ["s", "l"]}},
        {"starts": {"uri": "s3://corpus/sea/"}},
        {"starts": {"uri": ["s3://", "x"]}},
        {"equals": {}, "starts": {}, "without": []},
    ],
)
def test_a_request_cannot_widen_what_a_key_is_bound_to(live: Live, where: dict[str, Any]) -> None:
    assert set(titles(ask(live, who="land", top_k=4, where=where))) <= LAND
    assert not set(titles(ask(live, who="sea", top_k=4, where=where))) & LAND
    assert titles(ask(live, who="nobody", top_k=4, where=where)) == []
    assert set(titles(ask(live, who="root", top_k=4, where=where))) <= LAND


def test_callers_of_one_batch_get_each_their_own(artifacts: Artifacts) -> None:
    """Searches that run together do not mix: forty at once, four callers, in one batch after the
    other.
    """
    from concurrent.futures import ThreadPoolExecutor

    live = Live(artifacts, shards=[artifacts.tenants_index_uri], keys=KEYS)
    try:
        turns = [
            ("land", LAND),
            ("sea", set(TENANTS) - LAND),
            ("nobody", set()),
            ("anyone", set(TENANTS)),
        ] * 10
        with ThreadPoolExecutor(20) as pool:
            found = list(pool.map(lambda turn: titles(ask(live, who=turn[0], top_k=4)), turns))
            wrong = pool.submit(
                lambda: live(
                    "POST",
                    "/v1/retrieve",
                    json={"question": FERRY, "where": {"equals": {"colour": "red"}}},
                    headers={"X-API-Key": "anyone"},
                )
            )
            fault(wrong.result(), 422, "invalid_request")
        for (who, allowed), each in zip(turns, found, strict=True):
            assert set(each) <= allowed, who
            assert len(each) == min(4, len(allowed)), who
        assert max(live.memory.of("invar_batch_size")) > 1
    finally:
        live.close()


def test_an_unknown_column_is_refused_with_the_known_ones(live: Live, artifacts: Artifacts) -> None:
    for who in ("anyone", "land"):
        response = live(
            "POST",
            "/v1/retrieve",
            json={"question": FERRY, "where": {"equals": {"colour": "red"}}},
            headers={"X-API-Key": who},
        )
        message = fault(response, 422, "invalid_request")
        assert "no text column 'colour'" in message
        assert "tenant" in message
    chat = {"model": "invar-rag", "messages": [{"role": "user", "content": FERRY}]}
    response = live(
        "POST",
        "/v1/chat/completions",
        json={**chat, "where": {"equals": {"start": "0"}}},  # there is one, but it holds numbers
        headers={"X-API-Key": "anyone"},
    )
    fault(response, 400, "invalid_request")


def test_a_bound_key_finds_nothing_in_an_index_without_its_column(artifacts: Artifacts) -> None:
    """An index that knows no tenants is refused, not searched as a whole; over shards as well."""
    for shards in ([artifacts.index_uri], [artifacts.left_index_uri, artifacts.right_index_uri]):
        live = Live(artifacts, shards=shards, keys=KEYS)
        try:
            response = live(
                "POST", "/v1/retrieve", json={"question": FERRY}, headers={"X-API-Key": "land"}
            )
            assert "no text column 'tenant'" in fault(response, 422, "invalid_request")
            # uri is a column everywhere
            assert set(titles(ask(live, who="sea", top_k=4))) == set(TENANTS) - LAND
        finally:
            live.close()


@pytest.mark.parametrize(
    "where",
    [
        {"equal": {"tenant": "a"}},
        {"equals": {"tenant": 1}},
        {"equals": {"tenant": []}},
        {"equals": {"tenant": None}},
        {"equals": ["tenant"]},
        {"equals": {"": "a"}},
        {"equals": {"t" * 65: "a"}},
        {"equals": {f"c{n}": "a" for n in range(17)}},
        {"starts": {"uri": ""}},
        {"starts": {"uri": ["a"] * (MOST_BEGINNINGS + 1)}},
        {"without": "Ferry:0"},
        {"without": ["x"] * (MOST_VALUES + 1)},
        {"equals": {"tenant": "\ud800"}},
        "tenant=a",
        7,
    ],
)
def test_conditions_that_are_none_are_refused(live: Live, where: Any) -> None:
    for path in ("/v1/retrieve", "/v1/answer", "/v1/stability"):
        response = live(
            "POST",
            path,
            content=json.dumps({"question": FERRY, "where": where}),
            headers={"X-API-Key": "land", "Content-Type": "application/json"},
        )
        assert response.status_code in (400, 422), (where, response.text)


def test_the_schema_describes_them(live: Live) -> None:
    schemas = live("GET", "/openapi.json").json()["components"]["schemas"]
    assert {"equals", "starts", "without"} == set(schemas["Conditions"]["properties"])
    for name in ("RetrieveRequest", "AnswerRequest", "StabilityRequest", "ChatRequest"):
        assert "Conditions" in json.dumps(schemas[name]["properties"]["where"]), name


def test_keys_of_the_environment_can_be_bound() -> None:
    digest = hashlib.sha256(b"k").hexdigest()
    entries = f"a:{digest}:query:60:tenant=acme&uri^=s3://b/x/&tenant=acme-eu, b:{digest}:query"
    bound, free = keys_from_environment({"INVAR_API_KEYS": entries})
    assert bound.requests_per_minute == 60
    assert bound.where.to_where() == Where.of({"tenant": ["acme", "acme-eu"]}, {"uri": "s3://b/x/"})
    assert not free.where.to_where()
    for wrong in ("tenant", "tenant=", "=a", "", "uri^=", "a=b&", "tenant=\ud800"):
        with pytest.raises(ConfigError, match="entry 1 of INVAR_API_KEYS is malformed"):
            keys_from_environment({"INVAR_API_KEYS": f"a:{digest}:query:0:{wrong}"})


def test_parsed_conditions_equal_written_ones() -> None:
    assert Conditions.parse("a=1&a=2&b^=x=y") == Conditions(
        equals={"a": ["1", "2"]}, starts={"b": ["x=y"]}
    )


def test_conditions_of_both_hold() -> None:
    one, other = (
        Where.of({"t": ["a", "b"]}, without=["p"]),
        Where.of({"t": "b", "u": "c"}, without=["q"]),
    )
    both = one.also(other)
    assert both == other.also(one)
    assert both == both.also(one)
    assert ("t", ("a", "b")) in both.equals
    assert ("t", ("b",)) in both.equals
    assert both.without == {"p", "q"}
    assert not Where()
    assert Where().also(one) == one
