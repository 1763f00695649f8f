"""A language model behind an OpenAI-compatible ``/chat/completions``: asked once, remembered in a
file.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from invar_ray.errors import ConfigError, DataError, ResourceError

if TYPE_CHECKING:  # half a second: only who asks pays for it
    import openai


class _MalformedReply(Exception):
    pass


def check_url(url: str, setting: str) -> str:
    """The base URL of a server, without a slash at its end.

    Raises:
        ConfigError: it is not a usable URL.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname)
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(
            f"{setting} is {url!r}, not a usable URL", expected="http(s)://host:port/v1"
        )
    return url.rstrip("/")


def read_key(key_env: str) -> str:
    """The key in an environment variable; empty where there is none.

    Raises:
        ConfigError: no header can carry it; the error does not show it.
    """
    key = os.environ.get(key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"the key in {key_env} holds characters that no header can carry",
            action="set it again",
        )
    return key


def key_headers(key: str) -> dict[str, Any]:
    """The headers that send this key with a request of ``openai``'s, or none.

    They are the request's and not the client's, which would otherwise insist on a key.
    """
    from openai import Omit

    return {"Authorization": f"Bearer {key}" if key else Omit()}


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
            replies are tried again.  How long to wait is up to the package ``openai``: half a
            second, doubling, or what ``Retry-After`` says.
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
        temperature: float = 0.7,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts={attempts}: expected at least 1")
        self.url, self.model, self.key_env = url.rstrip("/"), model, key_env
        self.cache_path = None if cache_path is None else Path(cache_path)
        self.timeout_s, self.attempts, self.temperature = timeout_s, attempts, temperature
        self._cache: dict[str, str] | None = None
        self._client: openai.OpenAI | None = None
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
        import openai

        address = f"{self.url}/chat/completions"
        headers = key_headers(read_key(self.key_env))
        client, left = self._open(), self.attempts
        malformed = ""
        while left > 0:
            asking = client.with_options(max_retries=left - 1)
            try:
                response = asking.chat.completions.with_raw_response.create(
                    **body, extra_headers=headers
                )
            except openai.APIConnectionError as error:  # a time-out is one as well
                raise ResourceError(
                    f"{address} does not answer ({type(error.__cause__ or error).__name__})",
                    action="start the server or correct the URL",
                ) from None
            except openai.APIStatusError as error:
                raise self._failed(address, error) from None
            try:
                return _content(response.http_response.text)
            except _MalformedReply as error:
                malformed = str(error)
                left -= 1 + response.retries_taken
        raise DataError(
            f"{address} answered {malformed}",
            expected='{"choices": [{"message": {"content": "..."}}]}',
            action="check that the server speaks the OpenAI chat protocol",
        )

    def _open(self) -> openai.OpenAI:
        import openai

        url = check_url(self.url, "the endpoint")
        with self._lock:
            if self._client is None:
                # The key goes with each request: the client would want one, and keep it.
                self._client = openai.OpenAI(base_url=url, api_key="none", timeout=self.timeout_s)
            return self._client

    def _failed(self, address: str, error: openai.APIStatusError) -> ConfigError | ResourceError:
        status = error.status_code
        if status in {408, 409, 429} or status >= 500:  # what the package tries again
            return ResourceError(
                f"{address} failed {self.attempts} times, last with HTTP {status}",
                action="look at the server's log, or try later",
            )
        key = read_key(self.key_env)
        said = " ".join(error.response.text[:2000].split())
        if key:
            said = said.replace(key, "***")
        hint = (
            f"put a valid key into {self.key_env}"
            if status in {401, 403}
            else "check URL and model"
        )
        return ConfigError(f"{address} refused with HTTP {status} ({said[:200]})", action=hint)


def _content(text: str) -> str:
    try:
        content = json.loads(text)["choices"][0]["message"]["content"]
    except ValueError:
        raise _MalformedReply("with something that is not JSON") from None
    except (KeyError, IndexError, TypeError):
        raise _MalformedReply("JSON without a message") from None
    if not isinstance(content, str):
        raise _MalformedReply("a message without text")
    return content
