"""Rewordings from a language model behind an OpenAI-compatible ``/chat/completions``."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from invar_ray.errors import ConfigError, DataError, ResourceError
from invar_ray.schema import Example, Variant
from invar_ray.text.answers import contains_answer
from invar_ray.text.rules import RuleRewriter, comparison_key

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_LIST_MARK = re.compile(r"^\s*(?:[-*•]|\(?\d{1,2}[.):])\s+")
_RETRY = frozenset({408, 409, 425, 429})
_LONGEST_WAIT_S = 30.0
_PROMPT = (
    "Rewrite the question below in {count} different ways. Each rewording must ask for the same answer, keep every name"
    " and number, and not contain the answer. Reply with a JSON array of {count} strings and nothing else.\n\n"
    "Question: {question}"
)


class _MalformedReply(Exception):
    pass


class EndpointRewriter:
    """Asks a server for rewordings, checks them, and fills up from the rules what the server's lack.

    A rewording is dropped if it equals the question or another one (case and punctuation ignored), lacks a number of
    the question, brings in an answer, or is more than four times as long.  Replies are kept in ``cache_path``, so that
    a re-run asks nothing and gives the same; with a cache, the same arguments give the same variants.

    Args:
        url: base URL, such as ``http://127.0.0.1:8000/v1``.
        model: the model to ask for.
        key_env: name of the environment variable that holds the key; unset or empty sends none.  The key is read at
            each request and stored, logged and pickled nowhere.
        cache_path: JSON lines file, appended to; ``None`` keeps replies in memory only.  One process writes it.
        timeout_s: per request.
        attempts: tries per request; busy (429), failing (5xx) and silent servers and malformed replies are tried again.
        backoff_s: first wait between tries; doubles.  A ``Retry-After`` of up to 30 s is kept to.
        temperature: of the server's sampling.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_env: str = "OPENAI_API_KEY",
        cache_path: str | Path | None = None,
        *,
        timeout_s: float = 60.0,
        attempts: int = 5,
        backoff_s: float = 0.5,
        temperature: float = 0.7,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts={attempts}: expected at least 1")
        self.url, self.model, self.key_env = url.rstrip("/"), model, key_env
        self.cache_path = None if cache_path is None else Path(cache_path)
        self.timeout_s, self.attempts, self.backoff_s, self.temperature = timeout_s, attempts, backoff_s, temperature
        self._fallback = RuleRewriter()
        self._cache: dict[str, str] | None = None
        self._client: httpx.Client | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Without connection and lock, so that Ray can send the rewriter to a worker."""
        return {**self.__dict__, "_client": None, "_lock": None, "_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Counterpart of :meth:`__getstate__`."""
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the connection; a later call opens a new one."""
        with self._lock:
            if self._client is not None:
                self._client.close()
            self._client = None

    def rewrite(self, example: Example, count: int, seed: int) -> list[Variant]:
        """See :class:`invar_ray.text.variants.Rewriter`.

        Raises:
            ConfigError: the server refuses the request: address, model or key are wrong.
            ResourceError: the server cannot be reached or keeps failing.
            DataError: the server keeps answering in a form that is not the protocol's.
        """
        if count < 1:
            return []
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": _PROMPT.format(count=count, question=example.question)}],
            "temperature": self.temperature,
            "seed": seed,
        }
        texts = _checked(example, _parse_list(self._reply(body)))[:count]
        provider = f"endpoint:{self.model}"
        given = [
            Variant(example.id, number, text, "paraphrase", provider) for number, text in enumerate(texts, start=1)
        ]
        return self._fallback.fill(example, given, count, seed)

    def _reply(self, body: dict[str, Any]) -> str:
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode("utf-8")).hexdigest()
        with self._lock:
            if self._cache is None:
                self._cache = self._load_cache()
            if key in self._cache:
                return self._cache[key]
        reply = self._ask(body)
        with self._lock:
            self._cache[key] = reply
            if self.cache_path is not None:
                with self.cache_path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "model": self.model, "reply": reply}) + "\n")
        return reply

    def _load_cache(self) -> dict[str, str]:
        if self.cache_path is None:
            return {}
        self.cache_path.parent.mkdir(parents=True, exist_ok=True)
        if not self.cache_path.exists():
            return {}
        cache: dict[str, str] = {}
        content = self.cache_path.read_text(encoding="utf-8")
        for line in content.splitlines():
            try:
                row = json.loads(line)
                cache[row["key"]] = row["reply"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # a line that was cut off by a crash: its question is asked again
        if content and not content.endswith("\n"):
            with self.cache_path.open("a", encoding="utf-8") as file:
                file.write("\n")
        return cache

    def _ask(self, body: dict[str, Any]) -> str:
        address = f"{self.url}/chat/completions"
        problem: ResourceError | DataError = ResourceError(f"{address} was not asked")
        for attempt in range(self.attempts):
            wait = min(_LONGEST_WAIT_S, self.backoff_s * 2**attempt)
            try:
                response = self._open().post(address, json=body, headers=self._headers())
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise ConfigError(f"{self.url!r} is not a usable URL ({error})", expected="http(s)://host/v1") from None
            except httpx.TransportError as error:
                problem = ResourceError(
                    f"{address} does not answer ({type(error).__name__})", action="start the server or correct the URL"
                )
            else:
                if response.is_success:
                    try:
                        return _content(response)
                    except _MalformedReply as error:
                        problem = DataError(
                            f"{address} answered {error}",
                            expected='{"choices": [{"message": {"content": "..."}}]}',
                            action="check that the server speaks the OpenAI chat protocol",
                        )
                elif response.status_code in _RETRY or response.status_code >= 500:
                    problem = ResourceError(
                        f"{address} failed {attempt + 1} times, last with HTTP {response.status_code}",
                        action="look at the server's log, or try later",
                    )
                    wait = _retry_after(response, wait)
                else:
                    raise self._refused(address, response)
            if attempt + 1 < self.attempts:
                time.sleep(wait)
        raise problem

    def _open(self) -> httpx.Client:
        with self._lock:
            if self._client is None:
                self._client = httpx.Client(timeout=self.timeout_s)
            return self._client

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            return {}
        if not (key.isascii() and key.isprintable()):
            # httpx's own error would print the value
            raise ConfigError(
                f"the key in {self.key_env} holds characters that no header can carry", action="set it again"
            )
        return {"Authorization": f"Bearer {key}"}

    def _refused(self, address: str, response: httpx.Response) -> ConfigError:
        key = os.environ.get(self.key_env, "").strip()
        said = " ".join(response.text[:2000].split())
        if key:
            said = said.replace(key, "***")
        hint = f"put a valid key into {self.key_env}" if response.status_code in {401, 403} else "check URL and model"
        return ConfigError(f"{address} refused with HTTP {response.status_code} ({said[:200]})", action=hint)


def _content(response: httpx.Response) -> str:
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except ValueError:
        raise _MalformedReply("with something that is not JSON") from None
    except (KeyError, IndexError, TypeError):
        raise _MalformedReply("JSON without a message") from None
    if not isinstance(content, str):
        raise _MalformedReply("a message without text")
    return content


def _retry_after(response: httpx.Response, default: float) -> float:
    try:
        return min(_LONGEST_WAIT_S, max(0.0, float(response.headers["Retry-After"])))
    except (KeyError, ValueError):  # absent, or a date
        return default


def _parse_list(reply: str) -> list[str]:
    """The strings of a reply: a JSON array (also inside prose or a code block), else its lines without list marks."""
    start, stop = reply.find("["), reply.rfind("]")
    if 0 <= start < stop:
        try:
            items = json.loads(reply[start : stop + 1])
        except json.JSONDecodeError:
            items = None
        if isinstance(items, list):
            return [item for item in items if isinstance(item, str)]
    lines = [_LIST_MARK.sub("", line).strip().strip('"') for line in reply.splitlines()]
    return [line for line in lines if line and not line.startswith("```") and not line.endswith(":")]


def _checked(example: Example, texts: list[str]) -> list[str]:
    question = example.question
    numbers = Counter(_NUMBER.findall(question))
    taken = {comparison_key(question), ""}
    kept: list[str] = []
    for text in texts:
        clean = " ".join(text.split())
        key = comparison_key(clean)
        loses_numbers = numbers - Counter(_NUMBER.findall(clean))
        gives_away = contains_answer(clean, example.answers) and not contains_answer(question, example.answers)
        if key in taken or loses_numbers or gives_away or len(clean) > 4 * len(question) + 40:
            continue
        taken.add(key)
        kept.append(clean)
    return kept
