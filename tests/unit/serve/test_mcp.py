"""The service as tools of the Model Context Protocol, asked by the package's own client."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from mcp import Client, StdioServerParameters
from typer.testing import CliRunner

from invar_ray.cli.main import app
from serve.http.keys import ApiKey
from serve.mcp import make_server
from tests.serving import Live, shared_artifacts

FERRY = "When does the ferry leave?"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    digest = hashlib.sha256(b"mine").hexdigest()
    service = Live(
        shared_artifacts(tmp_path_factory),
        keys=(ApiKey(name="mine", sha256=digest, scopes=("query",)),),
    )
    yield service
    service.close()


def with_client(server: Any, use: Callable[[Client], Awaitable[None]]) -> None:
    async def run() -> None:
        async with Client(server) as client:
            await use(client)

    asyncio.run(asyncio.wait_for(run(), 120))


def test_the_program_serves_three_tools_over_standard_streams(live: Live) -> None:
    environment = {**os.environ, "INVAR_API_KEY": "mine\n", "PYTHONPATH": os.pathsep.join(sys.path)}
    program = StdioServerParameters(
        command=sys.executable,
        args=["-m", "invar_ray.cli.main", "mcp", "--url", live.url],
        env=environment,
    )
    own = {"X-API-Key": "mine"}

    async def use(client: Client) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"search", "answer", "stability"}
        for tool in tools.values():
            assert tool.annotations is not None
            assert tool.annotations.read_only_hint
            assert tool.input_schema["required"] == ["question"]
        for name, path, body in (
            ("search", "/v1/retrieve", {"question": FERRY, "top_k": 2, "mode": "bm25"}),
            ("answer", "/v1/answer", {"question": FERRY, "top_k": 2}),
            ("stability", "/v1/stability", {"question": FERRY, "rewrites": 1}),
        ):
            result = await client.call_tool(name, body)
            assert not result.is_error, result.content
            expected = live("POST", path, json=body, headers=own).json()
            given = result.structured_content
            assert given is not None
            for each in (given, expected):
                del each["request_id"], each["timings"]
            assert given == expected

    with_client(program, use)


def test_refusals_are_errors_of_the_tool_that_say_what_to_do(live: Live) -> None:
    def said(server: Any, **body: Any) -> str:
        told: list[str] = []

        async def use(client: Client) -> None:
            result = await client.call_tool("answer", body)
            assert result.is_error
            told.append(" ".join(getattr(part, "text", "") for part in result.content))

        with_client(server, use)
        return told[0]

    assert "set INVAR_API_KEY" in said(make_server(live.url), question=FERRY)
    keyed = make_server(live.url, "mine")
    assert "the question is empty" in said(keyed, question=" ")
    assert "a number from 1 to 4" in said(keyed, question=FERRY, top_k=99)
    assert "question" in said(keyed)
    assert "cannot reach" in said(make_server("http://127.0.0.1:9"), question=FERRY)


def test_an_address_that_is_none_is_one_clear_error() -> None:
    result = CliRunner().invoke(app, ["mcp", "--url", "localhost:8000"])
    assert result.exit_code == 1
    assert "'localhost:8000' is no address" in result.stderr
