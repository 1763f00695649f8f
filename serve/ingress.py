"""The HTTP replicas: the web application over the handles of the other deployments."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from invar_ray.errors import ConfigError
from serve.args import AppArgs
from serve.http.api import make_api
from serve.http.keys import KEY_ENV, KEYS_ENV, service_keys
from serve.index import ServedIndex
from serve.replicas.handles import Handle
from serve.service import Service
from serve.telemetry.metrics import Meter, exposition
from serve.telemetry.tracing import Tracer
from serve.versions import Current


@serve.ingress()
class IngressReplica:
    """HTTP in front of the others.

    Args:
        shards, generator: handles, from ``bind``; in the colocated topology they are the same.
        reranker: a handle, if there is one.
        args: limits, keys and waiting.
        require_api_key: refuse to start without a key.
    """

    def __init__(
        self,
        shards: Sequence[DeploymentHandle[Any]],
        generator: DeploymentHandle[Any],
        args: AppArgs,
        reranker: DeploymentHandle[Any] | None = None,
        *,
        require_api_key: bool,
        meter: Meter,
        tracer: Tracer,
    ) -> None:
        self._args = args
        self._keys = service_keys(args.api_keys, os.environ)
        if require_api_key and not self._keys:
            raise ConfigError(
                f"the replica's environment has neither {KEY_ENV} nor {KEYS_ENV}, and the "
                "configuration asks for a key",
                action=f"set {KEY_ENV} where the Ray nodes start, or in the application's "
                "runtime_env.env_vars",
            )
        names = (
            ["retriever"]
            if len(shards) == 1
            else [f"retriever shard {number}" for number in range(len(shards))]
        )
        versions_uri = args.versions_uri()
        shard_targets = [
            Handle(name, handle, args.retry_after_s, meter)
            for name, handle in zip(names, shards, strict=True)
        ]
        current = Current(versions_uri) if versions_uri else None
        self._service = Service(
            shard_targets,
            Handle("generator", generator, args.retry_after_s, meter, "describe_generator"),
            ServedIndex(shard_targets, current, meter, retry_after_s=args.retry_after_s),
            reranker=reranker
            and Handle("reranker", reranker, args.retry_after_s, meter, "describe_reranker"),
            rerank_depth=args.rerank_depth,
            shard_timeout_s=args.shard_timeout_s,
            retry_after_s=args.retry_after_s,
            stability_share=args.stability_share,
            meter=meter,
            tracer=tracer,
        )
        self._following: asyncio.Task[None] | None = None

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve once the constructor is done: only then are limits and keys known."""
        return make_api(
            self._service,
            self._args.limits(),
            keys=self._keys,
            max_in_flight=self._args.max_in_flight,
            retry_after_s=self._args.retry_after_s,
            cors_origins=self._args.cors_origins,
            audit_text=self._args.audit_text,
            examples=self._args.examples,
            metrics=exposition,
        )

    async def there(self) -> None:
        """Answers: this replica is there."""

    async def check_health(self) -> None:
        """Cannot fail by itself. Also compares the replicas with what is published."""
        if self._following is None or self._following.done():
            self._following = asyncio.create_task(self._service.index.follow())
