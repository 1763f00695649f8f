"""The engine on any server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, a vendor's, or
this service.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from invar_ray.errors import RequestError
from invar_ray.questions.llm import check_url, key_headers, read_key
from invar_ray.text.prompts import format_style
from invar_ray.text.tokens import plain_text
from serve.errors import OutOfTime, ServiceError, Unavailable
from serve.records import GeneratorStatus, Question, Reply
from serve.replicas.generator import STYLE_UNUSED
from serve.replicas.retriever import PROBE
from serve.telemetry.metrics import Meter
from serve.telemetry.tracing import Tracer

if TYPE_CHECKING:  # imports torch: only replicas pay for that
    from invar_ray.answering.rag import AnswerPrompt

logger = logging.getLogger("ray.serve")
_RETRIES = 2
_SYSTEM_SHARE = 4  # a system prompt takes at most one part in so many of the context
_REFUSED = {400, 413, 422}  # what the prompt is to blame for


class _Budget:
    """Counts a prompt's tokens with a generator artifact's own tokenizer, for what fits into the
    context: the artifact's, unless told otherwise.
    """

    def __init__(self, generator_uri: str, max_context: int | None) -> None:
        from invar_ray.models.base import BaseRef, load_tokenizer
        from invar_ray.store.artifacts import open_artifact

        artifact = open_artifact(generator_uri, "generator")
        base = BaseRef(**artifact.info["base"])
        self.tokenizer = load_tokenizer(base.folder_or_name(artifact.store), base.revision)
        self.max_context: int = max_context or artifact.info["max_context"]
        self.version = artifact.fingerprint

    def count_tokens(self, text: str) -> int:
        from invar_ray.models.generator import encode_prompt

        return len(encode_prompt(self.tokenizer, plain_text(self.tokenizer, text)))


class OpenAIEngine:
    """Sends prompts to a server; implements :class:`serve.replicas.generator.AnswerEngine`.

    Args:
        url: its base URL, e.g. ``http://127.0.0.1:8001/v1``.
        model: the model's name there.
        generator_uri: the generator artifact that the server runs: its tokenizer fits passages into
            the prompt, and its fingerprint is the version that answers carry.
        api: ``completions`` sends the prompt as it is; ``chat`` sends it as a user's message, and a
            question's style as the system's.
        key_env: environment variable of the key, which is sent as ``Authorization: Bearer``; unset
            or empty sends none.
        max_context: most tokens of prompt and answer together; ``None`` takes the artifact's.
        timeout_s: longest wait for the server's next piece, in seconds.

    Raises:
        ConfigError: if the URL cannot be one, or no header can carry the key.
    """

    def __init__(
        self,
        url: str,
        model: str,
        generator_uri: str,
        *,
        api: Literal["completions", "chat"] = "completions",
        key_env: str = "INVAR_ENGINE_KEY",
        max_context: int | None = None,
        timeout_s: float = 120.0,
        meter: Meter | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        import openai

        self.url, self._model, self._api = check_url(url, "engine_url"), model, api
        self._budget = _Budget(generator_uri, max_context)
        self._meter, self._tracer = meter or Meter(), tracer or Tracer()
        self._client = openai.AsyncOpenAI(
            base_url=self.url,
            api_key="none",  # what is sent stands in the request
            timeout=timeout_s,
            max_retries=_RETRIES,
            # No proxy of the environment: the server is a neighbour.
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        )
        self._headers = key_headers(read_key(key_env))

    async def answer(self, question: Question) -> Reply:
        """See :class:`serve.replicas.generator.AnswerEngine`."""
        async for item in self.stream(question):
            if isinstance(item, Reply):
                return item
        raise AssertionError("a stream ends with its reply")

    async def stream(self, question: Question) -> AsyncIterator[str | Reply]:
        """See :class:`serve.replicas.generator.AnswerEngine`."""
        from invar_ray.answering.rag import STOP_STRINGS, read_answer
        from invar_ray.models.decoding import first_stop, steady
        from invar_ray.models.generator import Generation

        prompt, system = await asyncio.to_thread(self._prompt, question)
        start = time.perf_counter()
        deadline = time.monotonic() + question.left_s
        stops = (*STOP_STRINGS, *question.stop)
        written, sent, place = "", "", None
        finish, usage = "", dict[str, Any]()
        with self._tracer.span("generate", question.trace, passages=len(question.hits)):
            chunks = self._chunks(self._body(prompt.text, question, system), deadline)
            try:
                async for chunk in chunks:
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices") or []:
                        finish = choice.get("finish_reason") or finish
                        written += (
                            choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                        )
                    # The protocol takes four stop strings; all of them are looked for here.
                    ready = steady(written, stops)
                    if len(ready) > len(sent) and ready.startswith(sent):
                        yield ready[len(sent) :]
                        sent = ready
                    place = first_stop(written, stops)
                    if place is not None:
                        finish = "stop"
                        break
            finally:
                await chunks.aclose()  # type: ignore[attr-defined]
        if not finish:  # the connection was closed in the middle, which looks like an end
            raise self._unavailable("its stream broke off")
        text = written[:place].strip()
        if len(text) > len(sent):
            yield text[len(sent) :]
        seconds = time.perf_counter() - start
        completion = int(
            usage.get("completion_tokens") or self._budget.count_tokens(text) if text else 0
        )
        self._meter.record("invar_stage_seconds", seconds, stage="generate")
        self._meter.record("invar_tokens_total", completion)
        generation = Generation(text, [], completion, "length" if finish == "length" else "eos")
        answer = read_answer(question.text, prompt, generation, style=question.style)
        self._meter.record("invar_answers_total", refused=str(answer.refused).lower())
        yield Reply(
            answer=replace(answer, timings={"generate_s": seconds}),
            text=text,
            prompt_tokens=int(usage.get("prompt_tokens") or self._budget.count_tokens(prompt.text)),
            completion_tokens=completion,
            finish="length" if finish == "length" else "stop",
            versions=self._versions(),
        )

    def _prompt(self, question: Question) -> tuple[AnswerPrompt, str]:
        """What is sent: the prompt, and a system message (``""``: none)."""
        from invar_ray.answering.rag import build_prompt

        budget: Any = self._budget
        # The server tokenises by itself, and takes what looks like a control token for one.
        system, taken = "", 0
        if question.style and self._api == "chat":
            system = plain_text(budget.tokenizer, format_style(question.style))
            taken, most = budget.count_tokens(system), budget.max_context // _SYSTEM_SHARE
            if taken > most:
                raise RequestError(
                    f"the system prompt takes {taken} tokens with the words around it",
                    expected=f"at most {most}, so that passages have room",
                    action="shorten it",
                )
        prompt = build_prompt(
            budget, question.text, question.hits, max_new_tokens=question.max_new_tokens + taken
        )
        notes = prompt.notes
        if question.style and not system:
            notes = (*notes, STYLE_UNUSED)
        return replace(prompt, text=plain_text(budget.tokenizer, prompt.text), notes=notes), system

    def _body(self, prompt: str, question: Question, system: str = "") -> dict[str, Any]:
        from invar_ray.answering.rag import STOP_STRINGS

        asked: dict[str, Any] = {"prompt": prompt}
        if self._api == "chat":
            first = [{"role": "system", "content": system}] if system else []
            asked = {"messages": [*first, {"role": "user", "content": prompt}]}
        return {
            "model": self._model,
            **asked,
            "max_tokens": question.max_new_tokens,
            "temperature": question.temperature,
            "top_p": question.top_p,
            "seed": question.seed,
            "stop": [*STOP_STRINGS, *question.stop][:4],  # the protocol takes four
            "stream_options": {"include_usage": True},
        }

    async def _chunks(self, body: dict[str, Any], deadline: float) -> AsyncIterator[dict[str, Any]]:
        """The stream's chunks; the package asks again while the server is busy."""
        import openai

        api: Any = (
            self._client.completions
            if self._api == "completions"
            else self._client.chat.completions
        )
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                async with await api.create(
                    **body, stream=True, extra_headers=self._headers
                ) as stream:
                    async for chunk in stream:
                        yield chunk.to_dict()
        except TimeoutError:
            raise OutOfTime("the answer took longer than the request may", 1.0) from None
        except openai.APIStatusError as error:
            if error.status_code not in _REFUSED:
                raise self._unavailable(f"HTTP {error.status_code}") from error
            # What it says may hold the prompt, paths or names of its own: for the log alone.
            logger.warning("the engine refused a prompt: HTTP %d", error.status_code)
            logger.debug("it said: %s", str(error.body)[:300])
            raise RequestError(
                "the engine refused the prompt", action="ask a shorter question, or for less"
            ) from None
        except openai.OpenAIError as error:  # the connection, or an error event
            raise self._unavailable(type(error).__name__) from error
        except (ValueError, AttributeError) as error:
            raise self._unavailable("it sent something that is not the protocol's") from error

    def _unavailable(self, why: str) -> ServiceError:
        return Unavailable(f"the engine cannot answer now ({why})", 1.0)

    def _versions(self) -> dict[str, str]:
        return {"generator": f"{self._model}@{self._budget.version}"}

    async def describe_generator(self) -> GeneratorStatus:
        """See :class:`serve.replicas.generator.AnswerEngine`."""
        where = f"{self.url} {self._model}"
        return GeneratorStatus("openai", where, self._budget.max_context, self._versions())

    async def check_generator(self) -> None:
        """See :class:`serve.replicas.generator.AnswerEngine`."""
        question = Question(PROBE, (), 1, left_s=20.0)
        async for _ in self._chunks(self._body(PROBE, question), time.monotonic() + 20):
            pass

    async def check_health(self) -> None:
        """See :class:`serve.replicas.generator.AnswerEngine`."""
        await self.check_generator()

    def close(self) -> None:
        """See :class:`serve.replicas.generator.AnswerEngine`; connections end with the process."""
