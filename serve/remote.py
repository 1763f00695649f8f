"""The engine on any server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, a vendor's, or
this service.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import httpx

from invar_ray.errors import ConfigError, RequestError
from invar_ray.text.tokens import plain_text
from serve.limits import ServiceError
from serve.metrics import Meter
from serve.records import Question, Reply
from serve.retrieving import PROBE
from serve.tracing import Tracer

if TYPE_CHECKING:  # imports torch: only replicas pay for that
    from invar_ray.answering.rag import AnswerPrompt

_BUSY = {408, 409, 425, 429, 500, 502, 503, 504}
_TRIES = 3


class _Budget:
    """Counts a prompt's tokens with the base's own tokenizer, for what fits into the context."""

    def __init__(self, tokenizer: Any, max_context: int) -> None:
        self.tokenizer, self.max_context = tokenizer, max_context

    def count_tokens(self, text: str) -> int:
        from invar_ray.models.generator import encode_prompt

        return len(encode_prompt(self.tokenizer, plain_text(self.tokenizer, text)))


class OpenAIEngine:
    """Sends prompts to a server; implements :class:`serve.answering.AnswerEngine`.

    Args:
        url: its base URL, e.g. ``http://127.0.0.1:8001/v1``.
        model: the model's name there.
        api: ``completions`` sends the prompt as it is; ``chat`` sends it as a user's message.
        tokenizer, max_context: of the model, to fit passages into the prompt.
        key: sent as ``Authorization: Bearer``, if there is one.
        version: what answers carry, beside the model's name.
        transport: another transport of httpx's, for tests.

    Raises:
        ConfigError: if the URL cannot be one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api: Literal["completions", "chat"],
        tokenizer: Any,
        max_context: int,
        key: str = "",
        version: str = "",
        timeout_s: float = 120.0,
        transport: Any = None,
        meter: Meter | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"engine_url is {url!r}", expected="http(s)://host:port/v1")
        self.url, self._model, self._api = url.rstrip("/"), model, api
        self._budget, self._version = _Budget(tokenizer, max_context), version
        self._meter, self._tracer = meter or Meter(), tracer or Tracer()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.AsyncClient(
            headers=headers, timeout=timeout_s, transport=transport, trust_env=False
        )

    @classmethod
    def over_artifact(
        cls, url: str, model: str, generator_uri: str, *, key_env: str, **options: Any
    ) -> OpenAIEngine:
        """The engine whose context and tokenizer are those of a generator artifact; its key is in
        ``key_env``.
        """
        from invar_ray.models.base import BaseRef, load_tokenizer
        from invar_ray.store.artifacts import open_artifact

        artifact = open_artifact(generator_uri, "generator")
        base = BaseRef(**artifact.info["base"])
        return cls(
            url,
            model,
            tokenizer=load_tokenizer(base.folder_or_name(artifact.store), base.revision),
            max_context=artifact.info["max_context"],
            key=os.environ.get(key_env, "").strip(),
            version=artifact.fingerprint,
            **options,
        )

    async def answer(self, question: Question) -> Reply:
        """See :class:`serve.answering.AnswerEngine`."""
        async for item in self.stream(question):
            if isinstance(item, Reply):
                return item
        raise AssertionError("a stream ends with its reply")

    async def stream(self, question: Question) -> AsyncIterator[str | Reply]:
        """See :class:`serve.answering.AnswerEngine`."""
        from invar_ray.answering.rag import read_answer
        from invar_ray.models.generator import Generation

        prompt = await asyncio.to_thread(self._prompt, question)
        start = time.perf_counter()
        deadline = time.monotonic() + question.left_s
        pieces: list[str] = []
        finish, usage = "stop", dict[str, Any]()
        with self._tracer.span("generate", question.trace, passages=len(question.hits)):
            chunks = self._chunks(self._body(prompt.text, question), deadline)
            try:
                async for chunk in chunks:
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices") or []:
                        finish = choice.get("finish_reason") or finish
                        text = (
                            choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                        )
                        text = text if pieces else text.lstrip()
                        if text:
                            pieces.append(text)
                            yield text
            finally:
                await chunks.aclose()  # type: ignore[attr-defined]
        seconds = time.perf_counter() - start
        text = "".join(pieces)
        completion = int(
            usage.get("completion_tokens") or self._budget.count_tokens(text) if text else 0
        )
        self._meter.record("invar_stage_seconds", seconds, stage="generate")
        self._meter.record("invar_tokens_total", completion)
        generation = Generation(
            text.strip(), [], completion, "length" if finish == "length" else "eos"
        )
        answer = read_answer(question.text, prompt, generation)
        self._meter.record("invar_answers_total", refused=str(answer.refused).lower())
        yield Reply(
            answer=replace(answer, timings={"generate_s": seconds}),
            text=text,
            prompt_tokens=int(usage.get("prompt_tokens") or self._budget.count_tokens(prompt.text)),
            completion_tokens=completion,
            finish="length" if finish == "length" else "stop",
            versions=self.describe()["versions"],
        )

    def _prompt(self, question: Question) -> AnswerPrompt:
        from invar_ray.answering.rag import build_prompt

        budget: Any = self._budget
        prompt = build_prompt(
            budget, question.text, question.hits, max_new_tokens=question.max_new_tokens
        )
        # The server tokenises by itself, and takes what looks like a control token for one.
        return replace(prompt, text=plain_text(self._budget.tokenizer, prompt.text))

    def _body(self, prompt: str, question: Question) -> dict[str, Any]:
        from invar_ray.answering.rag import STOP_STRINGS

        asked = (
            {"prompt": prompt}
            if self._api == "completions"
            else {"messages": [{"role": "user", "content": prompt}]}
        )
        return {
            "model": self._model,
            **asked,
            "max_tokens": question.max_new_tokens,
            "temperature": question.temperature,
            "top_p": question.top_p,
            "seed": question.seed,
            "stop": [*STOP_STRINGS, *question.stop][:4],  # the protocol takes four
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def _chunks(self, body: dict[str, Any], deadline: float) -> AsyncIterator[dict[str, Any]]:
        """The stream's chunks; sent again while the server is busy and nothing has come yet."""
        path = "/completions" if self._api == "completions" else "/chat/completions"
        for attempt in range(_TRIES):
            started = False
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    async with self._client.stream("POST", self.url + path, json=body) as response:
                        if response.status_code != 200:
                            await self._refused(response, attempt)
                            continue
                        async for chunk in _data(response):
                            started = True
                            yield chunk
                        return
            except TimeoutError:
                raise ServiceError(
                    504, "timeout", "the answer took longer than the request may", 1.0
                ) from None
            except httpx.HTTPError as error:
                if started or attempt == _TRIES - 1:
                    raise self._unavailable(type(error).__name__) from error
                await asyncio.sleep(0.1 * 2**attempt)

    async def _refused(self, response: httpx.Response, attempt: int) -> None:
        """Wait before the next try, or raise what the caller may know."""
        if response.status_code in _BUSY and attempt < _TRIES - 1:
            given = response.headers.get("Retry-After", "")
            await asyncio.sleep(min(5.0, float(given) if given.isdigit() else 0.2 * 2**attempt))
            return
        if response.status_code in {400, 413, 422}:
            content = (await response.aread())[:2000]
            try:
                message = str(json.loads(content)["error"]["message"])
            except (ValueError, KeyError, TypeError):
                message = f"HTTP {response.status_code}"
            raise RequestError(f"the engine refused the prompt ({message[:300]})")
        raise self._unavailable(f"HTTP {response.status_code}")

    def _unavailable(self, why: str) -> ServiceError:
        return ServiceError(503, "unavailable", f"the engine cannot answer now ({why})", 1.0)

    def describe(self) -> dict[str, Any]:
        """See :class:`serve.answering.AnswerEngine`."""
        state = {
            "engine": "openai",
            "uri": f"{self.url} {self._model}",
            "max_context": self._budget.max_context,
        }
        return {"generator": state, "versions": {"generator": f"{self._model}@{self._version}"}}

    async def check_health(self) -> None:
        """See :class:`serve.answering.AnswerEngine`."""
        question = Question(PROBE, (), 1, left_s=20.0)
        async for _ in self._chunks(self._body(PROBE, question), time.monotonic() + 20):
            pass

    def close(self) -> None:
        """See :class:`serve.answering.AnswerEngine`; connections end with the process."""


async def _data(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a response; raises what an error event says."""
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        try:
            chunk = json.loads(data)
        except ValueError:
            raise ServiceError(
                503, "unavailable", "the engine sent something that is not JSON", 1.0
            ) from None
        if "error" in chunk:
            raise ServiceError(503, "unavailable", "the engine's stream ended with an error", 1.0)
        yield chunk
