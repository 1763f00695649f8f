"""The application: for ``serve deploy serve/config.yaml``, ``serve run serve.app:build_app ...`` or
:func:`start`.

No ``from __future__ import annotations`` in this file: Serve reads ``build_app``'s annotation as an
object, and would hand over a plain dict without a word if it were a string.
"""

import logging
import os
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.schema import LoggingConfig

from invar_ray.errors import ResourceError
from serve.args import AppArgs
from serve.http.keys import keys_from_environment, service_keys
from serve.http.limits import SERVICE
from serve.ingress import IngressReplica
from serve.replicas.colocated import ColocatedReplica
from serve.replicas.generator import GeneratorLoader, TransformersEngine, load_generator
from serve.replicas.remote import OpenAIEngine
from serve.replicas.reranker import RerankerReplica, load_reranker
from serve.replicas.retriever import RetrieverLoader, RetrieverReplica, load_retriever
from serve.telemetry.metrics import Meter, RaySink
from serve.telemetry.tracing import Tracer
from serve.versions import Current

logger = logging.getLogger(__name__)
_INGRESS_REQUESTS = 10_000


def build_app(args: AppArgs) -> Application:
    """The application from its arguments; the import path for Serve is ``serve.app:build_app``."""
    return compose(args.resolved())


def compose(
    args: AppArgs,
    *,
    retriever_loader: RetrieverLoader | None = None,
    generator_loader: GeneratorLoader | None = None,
) -> Application:
    """The deployments, bound together; the loaders are for other retrievers and generators (of the
    split topology).
    """
    # Here as well as in each replica, whose environment may be another: a wrong key shows before
    # anything starts.
    service_keys(args.api_keys, os.environ)
    meter, tracer = Meter(RaySink()), Tracer(args.tracing)
    batches: dict[str, Any] = {
        "max_batch_size": args.max_batch_size,
        "batch_wait_s": args.batch_wait_s,
        "meter": meter,
        "tracer": tracer,
    }
    versions_uri = args.versions_uri()
    retriever: dict[str, Any] = batches | {
        "configured": args.configured,
        "current": Current(versions_uri) if versions_uri else None,
        "allowed_drop": args.shadow_allowed_drop,
    }
    search: dict[str, Any] = {
        "memory_map": args.memory_map,
        "mode": args.mode,
        "collapse": args.collapse_duplicates,
    }
    models: dict[str, Any] = {"device": args.device, "precision": args.precision}
    actor = {"num_cpus": args.num_cpus_per_replica}
    if args.num_gpus_per_replica > 0:
        actor["num_gpus"] = args.num_gpus_per_replica
    if args.topology == "colocated":
        both = _deployment(
            "ColocatedDeployment",
            ColocatedReplica,
            **_options(args, args.generator_replicas, actor),
            user_config={"index_uri": args.index_uri},
        ).bind(args.generator_uri, **models, **search, **retriever)
        shards, generator = [both], both
    else:
        loader = retriever_loader or partial(load_retriever, **models, **search)
        shards = [
            _deployment(
                "RetrieverDeployment" if shard == 0 else f"RetrieverDeployment{shard}",
                RetrieverReplica,
                **_options(args, args.retriever_replicas, actor),
                # In user_config, not an init argument: changing it changes the index in place,
                # without new replicas.
                user_config={"index_uri": uri},
            ).bind(loader, shard=shard, **retriever)
            for shard, uri in enumerate(args.configured)
        ]
        options = _options(args, args.generator_replicas, actor)
        if args.engine == "openai":
            generator = _deployment("GeneratorDeployment", OpenAIEngine, **options).bind(
                args.engine_url,
                args.engine_model,
                args.generator_uri,
                api=args.engine_api,
                key_env=args.engine_key_env,
                timeout_s=args.timeout_s,
                meter=meter,
                tracer=tracer,
            )
        else:
            generator = _deployment("GeneratorDeployment", TransformersEngine, **options).bind(
                args.generator_uri, generator_loader or partial(load_generator, **models), **batches
            )
    reranker = None
    if args.reranker is not None:
        reranker = _deployment(
            "RerankerDeployment",
            RerankerReplica,
            **_options(args, args.reranker_replicas, actor),
        ).bind(
            partial(load_reranker, args.reranker, args.index_uri, **models),
            args.max_batch_size,
            meter=meter,
            tracer=tracer,
        )
    # The ingress refuses by itself, in the service's error form, before Serve would in plain text.
    # It takes whatever comes, since requests whose bodies have not arrived are among these.
    ingress_options = _options(args, args.ingress_replicas, {"num_cpus": args.num_cpus_per_ingress})
    ingress_options["max_ongoing_requests"] = _INGRESS_REQUESTS
    ingress_options["max_queued_requests"] = -1
    ingress_options["autoscaling_config"].target_ongoing_requests = args.max_in_flight / 2
    ingress_options["backpressure_config"] = BackpressureConfig(
        status_code=503, retry_after_s=args.retry_after_s
    )
    application: Application = _deployment(
        "IngressDeployment", IngressReplica, **ingress_options
    ).bind(
        shards,
        generator,
        args,
        reranker,
        # A key in this process's environment is meant to be asked for: replicas that lack it fail
        # rather than open up.
        require_api_key=args.require_api_key or bool(keys_from_environment(os.environ)),
        meter=meter,
        tracer=tracer,
    )
    return application


def _deployment(name: str, replica: type[Any], **options: Any) -> Any:
    return serve.deployment(name=name, **options)(replica)


def _options(args: AppArgs, replicas: tuple[int, int], actor: dict[str, Any]) -> dict[str, Any]:
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=replicas[0],
            max_replicas=replicas[1],
            initial_replicas=replicas[0],
            target_ongoing_requests=args.target_ongoing_requests
            or max(1.0, args.max_ongoing_requests / 2),
            upscale_delay_s=args.upscale_delay_s,
            downscale_delay_s=args.downscale_delay_s,
        ),
        "ray_actor_options": actor,
        "max_ongoing_requests": args.max_ongoing_requests,
        "max_queued_requests": args.max_queued_requests,
        "health_check_period_s": args.health_check_period_s,
        "health_check_timeout_s": args.health_check_timeout_s,
        "graceful_shutdown_timeout_s": args.graceful_shutdown_timeout_s,
    }


def check_start(args: AppArgs, host: str, port: int, *, joins: bool = False) -> None:
    """What :func:`start` would fail at and needs no Ray to know: keys, port, and a reranker that is
    none.

    Args:
        args: what is to be served.
        host, port: where.
        joins: Ray runs already, and its Serve may hold the port.

    Raises:
        ConfigError: a key is wrong.  ResourceError: the port is taken.  ModelError: the reranker is
            not there, or is no cross-encoder.
    """
    service_keys(args.api_keys, os.environ)
    if args.reranker is not None:
        from invar_ray.models.base import resolve_named
        from invar_ray.models.loading import check_cross_encoder

        check_cross_encoder(resolve_named(args.reranker))
    if not joins:
        _free_port(host, port)


def start(
    args: AppArgs,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str = SERVICE,
    blocking: bool = False,
    ready_timeout_s: float = 300.0,
    log_level: str = "INFO",
) -> str:
    """Start the service on the Ray that this process is connected to (``ray.init`` first), and wait
    until it is ready.

    Args:
        args: what to serve; local artifact paths are made absolute, since replicas have other
            working directories.
        host: address to listen on.
        port: HTTP port; 0 takes a free one. Where Serve runs already, its own address counts.
        name: name of the Serve application.
        blocking: stay here until Ctrl-C or SIGTERM, then stop the service.
        ready_timeout_s: how long it may take to become ready, in seconds.
        log_level: of Serve's own processes; ``INFO`` has a line for each request.

    Returns:
        The service's address, e.g. ``http://127.0.0.1:8000``.

    Raises:
        ResourceError: if the port is taken, or the service does not become ready in time.
    """
    args = args.resolved()
    absolute: dict[str, Any] = {
        name: _absolute(getattr(args, name)) for name in ("index_uri", "generator_uri")
    }
    absolute["shard_uris"] = [_absolute(uri) for uri in args.shard_uris]
    if args.reranker is not None and Path(args.reranker).expanduser().is_dir():
        absolute["reranker"] = str(Path(args.reranker).expanduser().resolve())
    args = args.model_copy(update=absolute)
    if serve.status().proxies:  # a Serve that runs keeps its own address
        http = _get_global_client().http_config
        host, port = http.host or host, http.port
    else:
        port = _free_port(host, port)
    location = (
        ProxyLocation.HeadOnly
        if host in {"127.0.0.1", "localhost", "::1"}
        else ProxyLocation.EveryNode
    )
    logs = LoggingConfig(log_level=log_level)
    logging.getLogger("ray.serve").setLevel(log_level)
    serve.start(
        # Serve's own limit, for what no replica answers.
        http_options={"host": host, "port": port, "request_timeout_s": args.timeout_s + 30},
        proxy_location=location,
        logging_config=logs,
    )
    logging.getLogger("ray.serve").setLevel(log_level)  # starting it sets its own
    try:
        serve.run(build_app(args), name=name, logging_config=logs)
    except RuntimeError as error:
        raise ResourceError(
            f"the service did not start: {str(error).splitlines()[0]}",
            action="read the replicas' log lines above; check both artifact URIs and the cluster's "
            "free CPUs and GPUs",
        ) from error
    url = _url(host, port)
    _wait_until_ready(url, ready_timeout_s)
    logger.info("serving at %s", url)
    if blocking:
        print(f"serving at {url} until Ctrl-C", flush=True)
        _wait_for_signal()
        stop()
    return url


def stop() -> None:
    """Stop Serve on this cluster: replicas finish what they have taken
    (``graceful_shutdown_timeout_s``).
    """
    serve.shutdown()


def _absolute(uri: str) -> str:
    return uri if "://" in uri or uri.startswith("builtin:") else str(Path(uri).resolve())


def _free_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"cannot listen on {host}:{port}: {error.strerror}",
                action="choose another port (0 takes a free one), or stop what is listening there",
            ) from error
        return int(probe.getsockname()[1])


def _url(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _wait_until_ready(url: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    last = "no answer"
    with httpx.Client(timeout=30, trust_env=False) as client:
        while time.monotonic() < deadline:
            try:
                response = client.get(f"{url}/readyz")
                last = f"HTTP {response.status_code}: {response.text[:300]}"
                if response.status_code == 200 and response.json().get("service") == SERVICE:
                    return
            except (httpx.HTTPError, ValueError) as error:
                last = f"{type(error).__name__}: {error}"
            time.sleep(0.2)
    raise ResourceError(
        f"the service at {url} is not ready after {timeout_s:g} s (last: {last})",
        action="look at `serve status`; a Serve that was already running keeps its own host and "
        "port",
    )


def _wait_for_signal() -> None:
    stopped = threading.Event()
    previous = None
    if threading.current_thread() is threading.main_thread():
        previous = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        while not stopped.wait(0.5):
            pass
    except KeyboardInterrupt:
        pass
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
