"""The application: for ``serve deploy serve/config.yaml``, ``serve run serve.app:build_app ...`` or :func:`start`.

No ``from __future__ import annotations`` in this file: Serve reads ``build_app``'s annotation as an object, and would
hand over a plain dict without a word if it were a string.
"""

import logging
import os
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig, ProxyLocation
from ray.serve.schema import LoggingConfig

from invar_ray.errors import ResourceError
from serve.deployments import API_KEY_ENV, GeneratorDeployment, IngressDeployment, RetrieverDeployment
from serve.engines import GeneratorLoader, RetrieverLoader, load_generator, load_retriever
from serve.protocol import SERVICE, Limits

logger = logging.getLogger(__name__)


class AppArgs(BaseModel):
    """What is served, and on how much.  Model and prompts come from the artifacts' manifests."""

    model_config = ConfigDict(extra="forbid")

    index_uri: str = Field(min_length=1, description="Index artifact.")
    generator_uri: str = Field(min_length=1, description="Generator artifact.")
    ingress_replicas: tuple[int, int] = Field((1, 2), description="Fewest and most HTTP replicas.")
    retriever_replicas: tuple[int, int] = Field((1, 4), description="Fewest and most retriever replicas.")
    generator_replicas: tuple[int, int] = Field((1, 4), description="Fewest and most generator replicas.")
    num_gpus_per_replica: float = Field(0.0, ge=0, description="GPU share of a retriever or generator replica.")
    num_cpus_per_replica: float = Field(0.5, ge=0, description="CPU share of a retriever or generator replica.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Of both models; bf16 is for GPUs.")
    num_cpus_per_ingress: float = Field(0.1, ge=0, description="CPU share of an HTTP replica.")
    top_k: int = Field(5, ge=1, description="Passages per answer unless the request says otherwise.")
    max_top_k: int = Field(20, ge=1, description="Most passages that a request may ask for.")
    max_question_chars: int = Field(2000, ge=1, description="Longest question in characters.")
    max_new_tokens: int = Field(32, ge=1, description="Longest answer in tokens.")
    max_body_bytes: int = Field(65536, ge=256, description="Longest request body in bytes.")
    max_batch_size: int = Field(8, ge=1, description="Questions that a replica handles together.")
    batch_wait_s: float = Field(0.005, ge=0, description="How long the first of a batch waits for others, in seconds.")
    max_ongoing_requests: int = Field(32, ge=1, description="Requests that a replica takes at once.")
    max_queued_requests: int = Field(128, ge=1, description="Requests that wait for a replica, per HTTP replica.")
    request_timeout_s: float = Field(60.0, gt=0, description="Longest wait for a search or an answer, in seconds.")
    retry_after_s: float = Field(1.0, gt=0, description="Retry-After of a refused request, in seconds.")
    upscale_delay_s: float = Field(10.0, ge=0, description="Load must last this long before replicas are added.")
    downscale_delay_s: float = Field(300.0, ge=0, description="Calm must last this long before replicas are removed.")
    health_check_period_s: float = Field(10.0, gt=0, description="Time between health checks, in seconds.")
    health_check_timeout_s: float = Field(30.0, gt=0, description="Longest health check, in seconds.")
    graceful_shutdown_timeout_s: float = Field(
        20.0, ge=0, description="How long a leaving replica may finish its work."
    )
    require_api_key: bool = Field(False, description="Refuse to start without the environment variable INVAR_API_KEY.")

    @model_validator(mode="after")
    def _ranges(self) -> "AppArgs":
        for name in ("ingress_replicas", "retriever_replicas", "generator_replicas"):
            fewest, most = getattr(self, name)
            if not 1 <= fewest <= most:
                raise ValueError(f"{name} is [{fewest}, {most}]: expected [fewest, most] with 1 <= fewest <= most")
        if self.top_k > self.max_top_k:
            raise ValueError(f"top_k ({self.top_k}) is larger than max_top_k ({self.max_top_k})")
        if self.max_batch_size > self.max_ongoing_requests:
            raise ValueError("max_batch_size is larger than max_ongoing_requests: such a batch could never fill")
        return self


def build_app(args: AppArgs) -> Application:
    """The application from its arguments; the import path for Serve is ``serve.app:build_app``."""
    device = "cuda" if args.num_gpus_per_replica > 0 else "cpu"
    return compose(
        args,
        retriever_loader=partial(load_retriever, device=device, precision=args.precision),
        generator_loader=partial(load_generator, device=device, precision=args.precision),
    )


def compose(
    args: AppArgs,
    *,
    retriever_loader: RetrieverLoader = load_retriever,
    generator_loader: GeneratorLoader = load_generator,
) -> Application:
    """The three deployments, bound together; the loaders are for embedding other retrievers and generators."""
    # Serve's decorator turns the classes into deployments, which type checkers do not see.
    ingress_class: Any = IngressDeployment
    retriever_class: Any = RetrieverDeployment
    generator_class: Any = GeneratorDeployment
    engine_actor = {"num_cpus": args.num_cpus_per_replica, "num_gpus": args.num_gpus_per_replica}
    if args.num_gpus_per_replica == 0:
        del engine_actor["num_gpus"]
    retriever = retriever_class.options(
        **_options(args, args.retriever_replicas, engine_actor),
        # In user_config, not an init argument: changing it changes the index in place, without new replicas.
        user_config={"index_uri": args.index_uri},
    ).bind(args.max_batch_size, args.batch_wait_s, retriever_loader)
    generator = generator_class.options(**_options(args, args.generator_replicas, engine_actor)).bind(
        args.generator_uri, args.max_batch_size, args.batch_wait_s, generator_loader
    )
    # The ingress refuses by itself, in the service's error form, before Serve would in plain text.
    in_flight = args.max_ongoing_requests + args.max_queued_requests
    ingress_options = _options(args, args.ingress_replicas, {"num_cpus": args.num_cpus_per_ingress})
    ingress_options["max_ongoing_requests"] = 4 * in_flight
    ingress_options["autoscaling_config"].target_ongoing_requests = in_flight / 2
    ingress_options["backpressure_config"] = BackpressureConfig(status_code=503, retry_after_s=args.retry_after_s)
    return ingress_class.options(**ingress_options).bind(
        retriever,
        generator,
        Limits(
            top_k=args.top_k,
            max_top_k=args.max_top_k,
            max_question_chars=args.max_question_chars,
            max_new_tokens=args.max_new_tokens,
            max_body_bytes=args.max_body_bytes,
        ),
        args.request_timeout_s,
        in_flight,
        args.retry_after_s,
        # A key in this process's environment is meant to be asked for: replicas that lack it fail rather than open up.
        args.require_api_key or bool(os.environ.get(API_KEY_ENV)),
    )


def _options(args: AppArgs, replicas: tuple[int, int], actor: dict[str, Any]) -> dict[str, Any]:
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=replicas[0],
            max_replicas=replicas[1],
            initial_replicas=replicas[0],
            target_ongoing_requests=max(1.0, args.max_ongoing_requests / 2),
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
    """Start the service on the Ray that this process is connected to (``ray.init`` first), and wait until it is ready.

    Args:
        args: what to serve; local artifact paths are made absolute, since replicas have other working directories.
        host: address to listen on.
        port: HTTP port; 0 takes a free one.
        name: name of the Serve application.
        blocking: stay here until Ctrl-C or SIGTERM, then stop the service.
        ready_timeout_s: how long it may take to become ready, in seconds.
        log_level: of Serve's own processes; ``INFO`` has a line for each request.

    Returns:
        The service's address, e.g. ``http://127.0.0.1:8000``.

    Raises:
        ResourceError: if the port is taken, or the service does not become ready in time.
    """
    absolute = {"index_uri": _absolute(args.index_uri), "generator_uri": _absolute(args.generator_uri)}
    args = args.model_copy(update=absolute)
    if not serve.status().proxies:
        port = _free_port(host, port)
    location = ProxyLocation.HeadOnly if host in {"127.0.0.1", "localhost", "::1"} else ProxyLocation.EveryNode
    logs = LoggingConfig(log_level=log_level)
    serve.start(http_options={"host": host, "port": port}, proxy_location=location, logging_config=logs)
    logging.getLogger("ray.serve").setLevel(log_level)
    try:
        serve.run(build_app(args), name=name, logging_config=logs)
    except RuntimeError as error:
        raise ResourceError(
            f"the service did not start: {str(error).splitlines()[0]}",
            action="read the replicas' log lines above; check both artifact URIs and the cluster's free CPUs and GPUs",
        ) from error
    url = _url(host, port)
    _wait_until_ready(url, ready_timeout_s)
    logger.info("serving at %s", url)
    if blocking:
        _wait_for_signal()
        stop()
    return url


def stop() -> None:
    """Stop Serve on this cluster: replicas finish what they have taken (``graceful_shutdown_timeout_s``)."""
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
        action="look at `serve status`; a Serve that was already running keeps its own host and port",
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
