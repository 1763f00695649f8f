"""The deployments: ingress (HTTP), retriever, generator, or both on one base.  Options come from
``serve/app.py``.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from ray import serve
from ray.serve.handle import DeploymentHandle

from invar_ray.answering.filters import Where
from invar_ray.errors import ConfigError
from serve.answering import GeneratorCore
from serve.api import make_api
from serve.args import EngineOptions, IngressOptions, RetrieverOptions
from serve.handles import HandleTarget
from serve.keys import KEY_ENV, KEYS_ENV, service_keys
from serve.metrics import ray_meter
from serve.record import RecordFile
from serve.records import Embedded, Found, Prepared, Question, Reply, Vectors
from serve.retrieving import RetrieverCore, RetrieverLoader
from serve.service import Service
from serve.tracing import Tracer

logger = logging.getLogger("ray.serve")


class RetrieverReplica:
    """Searches one shard of the index.  ``user_config: {index_uri: ...}`` says which is configured.

    Args:
        options: batches, shard and record.
        loader: index URI in, ready retriever out.
    """

    def __init__(self, options: RetrieverOptions, loader: RetrieverLoader) -> None:
        self._retriever = _retriever_core(options, loader)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve another index; what is in service stays so until the new one has answered its
        probes.
        """
        uri = user_config.get("index_uri")
        if not isinstance(uri, str) or not uri:
            raise ConfigError(
                "user_config has no index_uri",
                expected="user_config: {index_uri: <index artifact>}",
            )
        await self._retriever.configure(uri)

    async def retrieve(
        self,
        question: str | Vectors,
        top_k: int,
        left_s: float,
        trace: dict[str, str],
        where: Where | None = None,
    ) -> Found:
        """See :class:`serve.retrieving.RetrieverCore`."""
        return await self._retriever.retrieve(question, top_k, left_s, trace, where)

    async def embed(
        self, texts: list[str], kind: Literal["query", "passage"], trace: dict[str, str]
    ) -> Embedded:
        """See :class:`serve.retrieving.RetrieverCore`."""
        return await self._retriever.embed(texts, kind, trace)

    async def prepare(self, uri: str) -> Prepared:
        """See :class:`serve.retrieving.RetrieverCore`."""
        return await self._retriever.prepare(uri)

    async def activate(self, uri: str) -> dict[str, Any]:
        """See :class:`serve.retrieving.RetrieverCore`."""
        return await self._retriever.activate(uri)

    async def discard(self, uri: str, error: str) -> dict[str, Any]:
        """See :class:`serve.retrieving.RetrieverCore`."""
        return await self._retriever.discard(uri, error)

    async def describe(self) -> dict[str, Any]:
        """See :class:`serve.retrieving.RetrieverCore`."""
        return await self._retriever.describe()

    async def check_health(self) -> None:
        """Search for real; Serve calls this now and then, and replaces the replica if it fails."""
        await self._retriever.check_health()

    def __del__(self) -> None:
        self._retriever.close()


class GeneratorReplica(GeneratorCore):
    """Answers questions from their passages."""

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options.make(ray_meter(), Tracer(options.tracing)))

    async def check_health(self) -> None:
        """Generate a token for real; Serve calls this now and then, and replaces the replica if it
        fails.
        """
        await self.check_generator()

    def __del__(self) -> None:
        self.engine.close()


class ColocatedReplica(RetrieverReplica):
    """Both adapters over one base: retriever and generator in one replica, each in a thread of its
    own.
    """

    def __init__(self, retriever: RetrieverOptions, generator: EngineOptions) -> None:
        from serve.colocated import SharedBase

        shared = SharedBase(
            generator.device,
            generator.precision,
            memory_map=generator.args.memory_map,
            collapse=generator.args.collapse_duplicates,
        )
        super().__init__(retriever, shared.retriever)
        self._generator = GeneratorCore(
            generator.make(ray_meter(), Tracer(generator.tracing), shared.generator)
        )

    async def answer(self, question: Question) -> Reply:
        """See :class:`serve.answering.GeneratorCore`."""
        return await self._generator.answer(question)

    async def stream(self, question: Question) -> AsyncIterator[str | Reply]:
        """See :class:`serve.answering.GeneratorCore`."""
        items = self._generator.stream(question)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()  # type: ignore[attr-defined]

    async def describe_generator(self) -> dict[str, Any]:
        """See :class:`serve.answering.GeneratorCore`."""
        return await self._generator.describe_generator()

    async def check_generator(self) -> None:
        """See :class:`serve.answering.GeneratorCore`."""
        await self._generator.check_generator()

    async def check_health(self) -> None:
        """Search and generate for real."""
        await asyncio.gather(super().check_health(), self.check_generator())

    def __del__(self) -> None:
        super().__del__()
        self._generator.engine.close()


def _retriever_core(options: RetrieverOptions, loader: RetrieverLoader) -> RetrieverCore:
    try:
        replica = serve.get_replica_context().replica_id.unique_id
    except Exception:  # local testing has no replicas
        replica = "local"
    return RetrieverCore(
        loader,
        options.max_batch_size,
        options.batch_wait_s,
        record=RecordFile(options.record_uri) if options.record_uri else None,
        shard=options.shard,
        configured=options.configured,
        allowed_drop=options.allowed_drop,
        replica=replica,
        meter=ray_meter(),
        tracer=Tracer(options.tracing),
    )


@serve.ingress()
class IngressReplica:
    """HTTP in front of the others.

    Args:
        shards, generator: handles, from ``bind``; in the colocated topology they are the same.
        options: limits, keys and waiting.
    """

    def __init__(
        self,
        shards: Sequence[DeploymentHandle[Any]],
        generator: DeploymentHandle[Any],
        options: IngressOptions,
    ) -> None:
        self._options, meter = options, ray_meter()
        self._keys = service_keys(options.keys, os.environ)
        if options.require_api_key and not self._keys:
            raise ConfigError(
                f"the replica's environment has neither {KEY_ENV} nor {KEYS_ENV}, and the "
                "configuration asks for a key",
                action=f"set {KEY_ENV} where the Ray nodes start, or in the application's runtime_env.env_vars",
            )
        names = (
            ["retriever"]
            if len(shards) == 1
            else [f"retriever shard {number}" for number in range(len(shards))]
        )
        self._service = Service(
            [
                HandleTarget(name, handle, options.retry_after_s, meter)
                for name, handle in zip(names, shards, strict=True)
            ],
            HandleTarget("generator", generator, options.retry_after_s, meter),
            configured=options.configured,
            record=RecordFile(options.record_uri) if options.record_uri else None,
            shard_timeout_s=options.shard_timeout_s,
            retry_after_s=options.retry_after_s,
            stability_share=options.stability_share,
            meter=meter,
            tracer=Tracer(options.tracing),
        )
        self._following: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve once the constructor is done: only then are limits and keys known."""
        return make_api(
            self._service,
            self._options.limits,
            keys=self._keys,
            max_in_flight=self._options.max_in_flight,
            retry_after_s=self._options.retry_after_s,
            cors_origins=self._options.cors_origins,
            audit_text=self._options.audit_text,
        )

    async def check_health(self) -> None:
        """Nothing here can fail alone; also the moment at which the file to follow is looked at."""
        if self._options.follow_uri and (self._following is None or self._following.done()):
            self._following = asyncio.create_task(self._service.follow(self._options.follow_uri))


RetrieverDeployment: Any = serve.deployment(name="RetrieverDeployment")(RetrieverReplica)
GeneratorDeployment: Any = serve.deployment(name="GeneratorDeployment")(GeneratorReplica)
ColocatedDeployment: Any = serve.deployment(name="ColocatedDeployment")(ColocatedReplica)
IngressDeployment: Any = serve.deployment(name="IngressDeployment")(IngressReplica)
