"""A language model behind an OpenAI-compatible ``/chat/completions``: asked once, remembered in a
file.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from invar_ray.errors import ConfigError, DataError, ResourceError

_RETRY = frozenset({408, 409, 425, 429})
_LONGEST_WAIT_S = 30.0


class _MalformedReply(Exception):
    pass


class ChatEndpoint:
    """Asks a server, and keeps its replies.

    Replies are kept in ``cache_path``, so that a re-run asks nothing and gives the same.

    Args:
        url: base URL, such as ``http://127.0.0.1:8000/v1``.
        model: the model to ask for.
        key_env: name of the environment variable that holds the key; unset or empty sends none.
            The key is read at each request and stored, logged and pickled nowhere.
        cache_path: JSON lines file, appended to; ``None`` keeps replies in memory only.  One
            process writes it.
        timeout_s: per request.
        attempts: tries per request; busy (429), failing (5xx) and silent servers and malformed
            replies are tried again.
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
        self.timeout_s, self.attempts, self.backoff_s, self.temperature = (
            timeout_s,
            attempts,
            backoff_s,
            temperature,
        )
        self._cache: dict[str, str] | None = None
        self._client: httpx.Client | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Without connection and lock, so that Ray can send it to a worker."""
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

    def reply(self, prompt: str, seed: int) -> str:
        """What the model answers to ``prompt``; the same arguments give the same reply, from the
        cache.

        Raises:
            ConfigError: the server refuses the request: address, model or key are wrong.
            ResourceError: the server cannot be reached or keeps failing.
            DataError: the server keeps answering in a form that is not the protocol's.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": self.temperature,
            "seed": seed,
        }
        return self._reply(body)

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
                raise ConfigError(
                    f"{self.url!r} is not a usable URL ({error})", expected="http(s)://host/v1"
                ) from None
            except httpx.TransportError as error:
                problem = ResourceError(
                    f"{address} does not answer ({type(error).__name__})",
                    action="start the server or correct the URL",
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
                        f"{address} failed {attempt + 1} times, last with HTTP "
                        f"{response.status_code}",
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
                f"the key in {self.key_env} holds characters that no header can carry",
                action="set it again",
            )
        return {"Authorization": f"Bearer {key}"}

    def _refused(self, address: str, response: httpx.Response) -> ConfigError:
        key = os.environ.get(self.key_env, "").strip()
        said = " ".join(response.text[:2000].split())
        if key:
            said = said.replace(key, "***")
        hint = (
            f"put a valid key into {self.key_env}"
            if response.status_code in {401, 403}
            else "check URL and model"
        )
        return ConfigError(
            f"{address} refused with HTTP {response.status_code} ({said[:200]})", action=hint
        )


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
