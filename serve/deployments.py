"""The three deployments: ingress (HTTP), retriever and generator.  Options come from ``serve/app.py``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from invar_ray.errors import ConfigError, RequestError
from invar_ray.schema import Answer
from serve.api import make_api
from serve.engines import (
    Batcher,
    Found,
    GeneratorEngine,
    GeneratorLoader,
    Question,
    RetrieverEngine,
    RetrieverLoader,
    Worker,
    load_generator,
    load_retriever,
)
from serve.protocol import Limits, ServiceError

API_KEY_ENV = "INVAR_API_KEY"
logger = logging.getLogger("ray.serve")
T = TypeVar("T")


@serve.deployment(name="RetrieverDeployment")
class RetrieverDeployment:
    """Searches the index.  ``user_config: {index_uri: ...}`` says which; a new value is loaded beside the old index.

    Args:
        max_batch_size: questions that are encoded and searched together.
        batch_wait_s: how long the first of them waits for others.
        loader: index URI in, ready retriever out.
    """

    def __init__(self, max_batch_size: int, batch_wait_s: float, loader: RetrieverLoader = load_retriever) -> None:
        self._engine, self._worker = RetrieverEngine(loader), Worker()
        self._search: Batcher[tuple[str, int], Found] = Batcher(self._search_batch, max_batch_size, batch_wait_s)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve another index; what is in service stays so until the new one has answered a search."""
        uri = user_config.get("index_uri")
        if not isinstance(uri, str) or not uri:
            raise ConfigError("user_config has no index_uri", expected="user_config: {index_uri: <index artifact>}")
        await asyncio.to_thread(self._engine.open, uri)  # not in the worker's thread, which goes on searching

    async def retrieve(self, question: str, top_k: int) -> Found:
        """The best passages for a question."""
        return await self._search((question, top_k))

    async def _search_batch(self, requests: list[tuple[str, int]]) -> list[Found]:
        return await self._worker.run(self._engine.search, requests)

    async def describe(self) -> dict[str, Any]:
        """Index, state and versions."""
        return self._engine.describe()

    async def check_health(self) -> None:
        """Search for real; Serve calls this now and then, and replaces the replica if it fails."""
        await self._worker.check(self._engine.probe)

    def __del__(self) -> None:
        self._worker.close()


@serve.deployment(name="GeneratorDeployment")
class GeneratorDeployment:
    """Answers questions from their passages.

    Args:
        uri: generator artifact.
        max_batch_size: questions that are answered together.
        batch_wait_s: how long the first of them waits for others.
        loader: generator URI in, ready generator out.
    """

    def __init__(
        self, uri: str, max_batch_size: int, batch_wait_s: float, loader: GeneratorLoader = load_generator
    ) -> None:
        self._engine, self._worker = GeneratorEngine(uri, loader, max_batch_size), Worker()
        self._generate: Batcher[Question, Answer] = Batcher(self._answer_batch, max_batch_size, batch_wait_s)

    async def answer(self, question: Question) -> tuple[Answer, dict[str, str]]:
        """The answer and the generator's versions.

        Raises:
            RequestError: if the question does not fit the model's context.
        """
        return await self._generate(question), self._engine.describe()["versions"]

    async def _answer_batch(self, questions: list[Question]) -> list[Answer | RequestError]:
        return await self._worker.run(self._engine.answer, questions)

    async def describe(self) -> dict[str, Any]:
        """Generator and version."""
        return self._engine.describe()

    async def check_health(self) -> None:
        """Generate a token for real; Serve calls this now and then, and replaces the replica if it fails."""
        await self._worker.check(self._engine.probe)

    def __del__(self) -> None:
        self._worker.close()


@serve.deployment(name="IngressDeployment")
@serve.ingress()
class IngressDeployment:
    """HTTP in front of the two others: limits, key, errors, and one more try where a replica died.

    Args:
        retriever, generator: handles, from ``bind``.
        limits: what requests may ask for.
        timeout_s: longest wait for either of them, in seconds.
        max_in_flight: requests that are answered at once; more are told to come back.
        retry_after_s: when to come back, in seconds.
        require_api_key: refuse to start without the environment variable ``INVAR_API_KEY``.
    """

    def __init__(
        self,
        retriever: DeploymentHandle[Any],
        generator: DeploymentHandle[Any],
        limits: Limits,
        timeout_s: float,
        max_in_flight: int,
        retry_after_s: float,
        require_api_key: bool,
    ) -> None:
        self._retriever, self._generator, self._limits = retriever, generator, limits
        self._timeout_s, self._max_in_flight, self._retry_after_s = timeout_s, max_in_flight, retry_after_s
        self._ready_at = float("-inf")
        self._api_key = os.environ.get(API_KEY_ENV) or None
        if require_api_key and self._api_key is None:
            raise ConfigError(
                f"the replica's environment has no {API_KEY_ENV}, and the configuration asks for a key",
                action=f"set {API_KEY_ENV} where the Ray nodes start, or in the application's runtime_env.env_vars",
            )

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve once the constructor is done: only then are limits and key known."""
        return make_api(self, self._limits, api_key=self._api_key, max_in_flight=self._max_in_flight)

    async def retrieve(self, question: str, top_k: int) -> Found:
        """See :class:`serve.api.Backend`."""
        return await self._call("retriever", lambda: self._retriever.retrieve.remote(question, top_k))

    async def answer(self, question: Question) -> tuple[Answer, dict[str, str]]:
        """See :class:`serve.api.Backend`."""
        return await self._call("generator", lambda: self._generator.answer.remote(question))

    async def describe(self) -> dict[str, Any]:
        """See :class:`serve.api.Backend`."""
        index, generator = await asyncio.gather(
            self._call("retriever", lambda: self._retriever.describe.remote()),
            self._call("generator", lambda: self._generator.describe.remote()),
        )
        return {**index, **generator, "versions": {**index["versions"], **generator["versions"]}}

    async def check(self) -> None:
        """See :class:`serve.api.Backend`.  A success counts for a second: anyone may ask, and asking costs a search."""
        if time.monotonic() - self._ready_at < 1.0:
            return
        try:
            await asyncio.gather(
                self._call("retriever", lambda: self._retriever.check_health.remote()),
                self._call("generator", lambda: self._generator.check_health.remote()),
            )
        except ServiceError:
            raise
        except Exception as error:
            logger.exception("not ready")
            raise ServiceError(503, "unavailable", "a health check failed", self._retry_after_s) from error
        self._ready_at = time.monotonic()

    async def _call(self, name: str, send: Callable[[], Any]) -> Any:
        """Send a call and wait for it.  Both services only read, so a call may be sent twice where a replica died."""
        for last_try in (False, True):
            response = send()
            try:
                if not await _finished(response, self._timeout_s):
                    message = f"the {name} did not answer within {self._timeout_s:g} s"
                    raise ServiceError(504, "timeout", message, self._retry_after_s)
                return await response
            except BackPressureError as error:
                message = f"the {name} has too many requests waiting"
                raise ServiceError(503, "overloaded", message, self._retry_after_s) from error
            except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError) as error:
                if last_try or isinstance(error, DeploymentUnavailableError):
                    message = f"the {name} is not available"
                    raise ServiceError(503, "unavailable", message, self._retry_after_s) from error
                logger.warning("a replica of the %s died in a call (%s): trying once more", name, type(error).__name__)
            except RayTaskError as error:
                if isinstance(error.cause, RequestError):
                    raise error.cause from None  # the task error's text holds a stack trace
                raise
        raise AssertionError("unreachable")


async def _finished(response: Any, timeout_s: float) -> bool:
    """Whether a call ends, well or not, in time; it is cancelled if it does not, or if the client went away."""

    async def settle() -> None:
        with contextlib.suppress(Exception):
            await response

    # Not wait_for: what it cancels answers with an exception of Serve's own, which would hide the time-out.
    task = asyncio.create_task(settle())
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
    except asyncio.CancelledError:
        response.cancel()
        raise
    if not done:
        response.cancel()
    return bool(done)
