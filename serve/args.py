"""The application's arguments, and what each deployment gets of them.

No ``from __future__ import annotations`` here: Serve reads ``build_app``'s annotation as an object.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from invar_ray.errors import ConfigError
from serve.keys import ApiKey, KeyRing
from serve.limits import Limits
from serve.metrics import Meter
from serve.tracing import Tracer, Tracing

if TYPE_CHECKING:
    from serve.answering import AnswerEngine, GeneratorLoader


class AppArgs(BaseModel):
    """What is served, and on how much.  Model and prompts come from the artifacts' manifests."""

    model_config = ConfigDict(extra="forbid")

    store_uri: str = Field(
        "",
        description="Store of a run, e.g. runs/demo: its newest stage-1 index and generator are served where "
        "the two fields below name none. A relative path is looked for here, then beside the "
        "package.",
    )
    index_uri: str = Field("", description="Index artifact.")
    shard_uris: list[str] = Field(
        default_factory=list,
        description="More index artifacts of the same encoder: each is a shard with a deployment of its own, and every "
        "search asks all of them.",
    )
    generator_uri: str = Field("", description="Generator artifact.")
    topology: Literal["split", "colocated"] = Field(
        "split",
        description="Retriever and generator scaled apart, or both adapters over one base in each replica.",
    )
    engine: Literal["transformers", "openai"] = Field(
        "transformers",
        description="What generates: this service, or a server that speaks OpenAI's protocol.",
    )
    engine_url: str = Field(
        "", description="For `openai`: its base URL, e.g. http://127.0.0.1:8001/v1."
    )
    engine_model: str = Field("", description="For `openai`: the model's name there.")
    engine_api: Literal["completions", "chat"] = Field(
        "completions", description="For `openai`: send the prompt as it is, or as a user's message."
    )
    engine_key_env: str = Field(
        "INVAR_ENGINE_KEY", description="For `openai`: environment variable of its key."
    )
    ingress_replicas: tuple[int, int] = Field((1, 2), description="Fewest and most HTTP replicas.")
    retriever_replicas: tuple[int, int] = Field(
        (1, 4), description="Fewest and most retriever replicas, per shard."
    )
    generator_replicas: tuple[int, int] = Field(
        (1, 4), description="Fewest and most generator or colocated replicas."
    )
    num_gpus_per_replica: float = Field(
        0.0, ge=0, description="GPU share of a retriever or generator replica."
    )
    num_cpus_per_replica: float = Field(
        0.5, ge=0, description="CPU share of a retriever or generator replica."
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Of both models; bf16 is for GPUs."
    )
    num_cpus_per_ingress: float = Field(0.1, ge=0, description="CPU share of an HTTP replica.")
    top_k: int = Field(
        5, ge=1, description="Passages per answer unless the request says otherwise."
    )
    max_top_k: int = Field(20, ge=1, description="Most passages that a request may ask for.")
    max_question_chars: int = Field(2000, ge=1, description="Longest question in characters.")
    max_new_tokens: int = Field(32, ge=1, description="Longest answer in tokens.")
    max_body_bytes: int = Field(65536, ge=256, description="Longest request body in bytes.")
    max_inputs: int = Field(64, ge=1, description="Most texts that one request may have embedded.")
    max_rewrites: int = Field(5, ge=1, description="Most rewordings of a stability request.")
    max_batch_size: int = Field(8, ge=1, description="Questions that a replica handles together.")
    batch_wait_s: float = Field(
        0.005,
        ge=0,
        description="How long a batch waits for more, in seconds; a call alone does not wait.",
    )
    max_ongoing_requests: int = Field(
        32, ge=1, description="Requests that a replica takes at once."
    )
    max_queued_requests: int = Field(
        128, ge=1, description="Requests that wait for a replica, per HTTP replica."
    )
    request_timeout_s: float = Field(
        60.0, gt=0, description="Longest that a request may take, in seconds."
    )
    shard_timeout_s: float = Field(
        5.0, gt=0, description="Longest wait for one of several shards, in seconds."
    )
    retry_after_s: float = Field(
        1.0, gt=0, description="Retry-After of a refused request, in seconds."
    )
    upscale_delay_s: float = Field(
        10.0, ge=0, description="Load must last this long before replicas are added."
    )
    downscale_delay_s: float = Field(
        300.0, ge=0, description="Calm must last this long before replicas are removed."
    )
    target_ongoing_requests: float = Field(
        0.0,
        ge=0,
        description="Load per replica that autoscaling aims at; 0 takes half of max_ongoing_requests.",
    )
    health_check_period_s: float = Field(
        10.0, gt=0, description="Time between health checks, in seconds."
    )
    health_check_timeout_s: float = Field(
        30.0, gt=0, description="Longest health check, in seconds."
    )
    graceful_shutdown_timeout_s: float = Field(
        20.0, ge=0, description="How long a leaving replica may work on."
    )
    record_uri: str | None = Field(
        None,
        description="JSON file that keeps changes of the index over restarts; null puts it into the index's store, an "
        "empty string keeps none and refuses changes.",
    )
    shadow_allowed_drop: float = Field(
        0.2,
        ge=0,
        le=1,
        description="By how much a new index's recall and overlap on probes may be below the old's.",
    )
    memory_map: bool = Field(
        False, description="Map the index file in place of reading it: replicas share its pages."
    )
    collapse_duplicates: bool = Field(
        False,
        description="Of passages of a shard with nearly the same text, find the best one only.",
    )
    follow_uri: str = Field(
        "",
        description="Where it stands which index to serve: published versions, <root>/published/<name>, or a file with "
        "the URI of the index (of each shard) on a line; empty: nowhere.",
    )
    require_api_key: bool = Field(
        False, description="Refuse to start without a key, see docs/design/serving.md."
    )
    api_keys: list[ApiKey] = Field(
        default_factory=list, description="Hashed keys, beside those of the environment."
    )
    cors_origins: list[str] = Field(
        default_factory=list, description="Origins whose pages may call; none by default."
    )
    audit_text: bool = Field(False, description="Write questions into the audit log.")
    tracing: Tracing = Field("off", description="OpenTelemetry spans: off, log, or otlp.")
    stability_share: float = Field(
        0.0, ge=0, le=1, description="Share of answers whose stability is measured."
    )

    @model_validator(mode="after")
    def _ranges(self) -> "AppArgs":
        if not self.store_uri and not (self.index_uri and self.generator_uri):
            raise ValueError("nothing to serve: give index_uri and generator_uri, or store_uri")
        for name in ("ingress_replicas", "retriever_replicas", "generator_replicas"):
            fewest, most = getattr(self, name)
            if not 1 <= fewest <= most:
                raise ValueError(
                    f"{name} is [{fewest}, {most}]: expected [fewest, most] with 1 <= fewest <= "
                    "most"
                )
        if self.top_k > self.max_top_k:
            raise ValueError(f"top_k ({self.top_k}) is larger than max_top_k ({self.max_top_k})")
        if self.max_batch_size > self.max_ongoing_requests:
            raise ValueError(
                "max_batch_size is larger than max_ongoing_requests: such a batch could never fill"
            )
        if self.engine == "openai" and not (self.engine_url and self.engine_model):
            raise ValueError("engine is openai: engine_url and engine_model are needed")
        try:
            KeyRing(self.api_keys)
        except ConfigError as error:
            raise ValueError(f"api_keys: {error}") from None
        if self.topology == "colocated" and (self.shard_uris or self.engine != "transformers"):
            raise ValueError("topology colocated serves one index and the engine transformers only")
        return self

    def resolved(self) -> "AppArgs":
        """With the artifacts of ``store_uri`` where none are named.

        Raises:
            MissingArtifactError: if the store has none.
        """
        if self.index_uri and self.generator_uri:
            return self
        from invar_ray.errors import MissingArtifactError
        from invar_ray.store.artifacts import Store

        root = self.store_uri
        if "://" not in root and not Path(root).is_dir():
            beside = Path(__file__).parents[1] / root
            root = str(beside if beside.is_dir() else Path(root))
        store = Store(root if "://" in root else str(Path(root).resolve()))
        found = {}
        for name, kind in (("index_uri", "index"), ("generator_uri", "generator")):
            artifacts = [
                a for a in store.list(kind) if kind != "index" or a.manifest.name == "retriever"
            ]
            if not artifacts:
                raise MissingArtifactError(
                    f"no {kind} of a trained run below {store.root_uri}",
                    action="run make demo or invar-ray train first, or name both artifacts",
                )
            found[name] = getattr(self, name) or artifacts[-1].uri
        return self.model_copy(update=found)

    @property
    def configured(self) -> tuple[str, ...]:
        """Index URI of each shard."""
        return (self.index_uri, *self.shard_uris)

    @property
    def device(self) -> str:
        """Where models run."""
        return "cuda" if self.num_gpus_per_replica > 0 else "cpu"

    def limits(self) -> Limits:
        """What requests may ask for."""
        return Limits(
            top_k=self.top_k,
            max_top_k=self.max_top_k,
            max_question_chars=self.max_question_chars,
            max_new_tokens=self.max_new_tokens,
            max_body_bytes=self.max_body_bytes,
            max_inputs=self.max_inputs,
            max_rewrites=self.max_rewrites,
            timeout_s=self.request_timeout_s,
        )

    def record(self) -> str:
        """Where changes of the index are kept: ``<store>/serving/<index folder's name>.json``
        unless said otherwise.
        """
        if self.record_uri is not None:
            return self.record_uri
        from invar_ray.store.files import join_uri

        root, _, name = self.index_uri.rstrip("/").rpartition("/")
        store = root.rpartition("/")[0]
        return join_uri(store, f"serving/{name}.json") if store else ""


@dataclass(frozen=True)
class RetrieverOptions:
    """What a retriever replica gets."""

    max_batch_size: int
    batch_wait_s: float
    configured: tuple[str, ...]
    shard: int = 0
    record_uri: str = ""
    allowed_drop: float = 0.2
    tracing: Tracing = "off"


@dataclass(frozen=True)
class EngineOptions:
    """What a generator replica gets."""

    args: AppArgs
    loader: "GeneratorLoader | None" = None

    @property
    def tracing(self) -> Tracing:
        """See :class:`AppArgs`."""
        return self.args.tracing

    @property
    def device(self) -> str:
        """See :class:`AppArgs`."""
        return self.args.device

    @property
    def precision(self) -> str:
        """See :class:`AppArgs`."""
        return self.args.precision

    def make(
        self, meter: Meter, tracer: Tracer, loader: "GeneratorLoader | None" = None
    ) -> "AnswerEngine":
        """The engine; ``loader`` goes before the options' own."""
        from functools import partial

        from serve.answering import TransformersEngine, load_generator

        args = self.args
        if args.engine == "openai":
            from serve.remote import OpenAIEngine

            return OpenAIEngine.over_artifact(
                args.engine_url,
                args.engine_model,
                args.generator_uri,
                key_env=args.engine_key_env,
                api=args.engine_api,
                timeout_s=args.request_timeout_s,
                meter=meter,
                tracer=tracer,
            )
        chosen: Any = loader or self.loader
        if chosen is None:
            chosen = partial(load_generator, device=self.device, precision=self.precision)
        return TransformersEngine(
            args.generator_uri,
            chosen,
            args.max_batch_size,
            args.batch_wait_s,
            meter=meter,
            tracer=tracer,
        )


@dataclass(frozen=True)
class IngressOptions:
    """What an HTTP replica gets."""

    limits: Limits
    configured: tuple[str, ...]
    max_in_flight: int
    retry_after_s: float
    require_api_key: bool = False
    keys: tuple[ApiKey, ...] = ()
    cors_origins: tuple[str, ...] = ()
    audit_text: bool = False
    record_uri: str = ""
    follow_uri: str = ""
    shard_timeout_s: float = 5.0
    stability_share: float = 0.0
    tracing: Tracing = "off"
