"""The application's arguments.

No ``from __future__ import annotations`` here: Serve reads ``build_app``'s annotation as an object.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from invar_ray.config import SearchConfig
from invar_ray.errors import ConfigError
from invar_ray.schema import Mode
from invar_ray.store.published import FOLDER, is_published, open_published
from serve.http.keys import ApiKey, KeyRing
from serve.http.limits import Limits
from serve.telemetry.tracing import Tracing


def _fewest_and_most(value: tuple[int, int]) -> tuple[int, int]:
    fewest, most = value
    if not 1 <= fewest <= most:
        raise ValueError(f"[{fewest}, {most}]: expected [fewest, most] with 1 <= fewest <= most")
    return value


Replicas = Annotated[tuple[int, int], AfterValidator(_fewest_and_most)]


class AppArgs(Limits):
    """What is served, and on how much.  Model and prompts come from the artifacts' manifests.

    The one place of the service's settings: what requests may ask for stands in
    :class:`~serve.http.limits.Limits`, everything else here.
    """

    model_config = ConfigDict(serialize_by_alias=True)  # what is written can be read again

    store_uri: str = Field(
        "",
        description="Store of a run, e.g. runs/demo: its current index and newest generator are "
        "served where the two fields below name none. A relative path is looked for here, then "
        "beside the package.",
    )
    index_uri: str = Field(
        "",
        description="Index artifact; or published versions, <root>/published/<name>: what is "
        "current there, all its shards.",
    )
    shard_uris: list[str] = Field(
        default_factory=list,
        description="More index artifacts of the same encoder: each is a shard with a deployment "
        "of its own, and every search asks all of them.",
    )
    generator_uri: str = Field("", description="Generator artifact.")
    topology: Literal["split", "colocated"] = Field(
        "split",
        description="Retriever and generator scaled apart, or both adapters over one base in each "
        "replica.",
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
    ingress_replicas: Replicas = Field((1, 2), description="Fewest and most HTTP replicas.")
    retriever_replicas: Replicas = Field(
        (1, 4), description="Fewest and most retriever replicas, per shard."
    )
    generator_replicas: Replicas = Field(
        (1, 4), description="Fewest and most generator or colocated replicas."
    )
    reranker: str | None = Field(
        SearchConfig.reranker,
        description="Cross-encoder that sorts the best hits anew, and answers `/v1/rerank`: a "
        "folder that every node has, or a Hugging Face name.",
    )
    rerank_depth: int = Field(
        SearchConfig.rerank_depth, ge=1, description="How many hits of a question it reads."
    )
    reranker_replicas: Replicas = Field((1, 4), description="Fewest and most reranker replicas.")
    num_gpus_per_replica: float = Field(
        0.0, ge=0, description="GPU share of a retriever, generator or reranker replica."
    )
    num_cpus_per_replica: float = Field(
        0.5, ge=0, description="CPU share of a retriever, generator or reranker replica."
    )
    precision: Literal["fp32", "bf16"] | None = Field(
        None,
        description="Of both models; by default the one that each was made in, as its manifest "
        "says.",
    )
    num_cpus_per_ingress: float = Field(0.1, ge=0, description="CPU share of an HTTP replica.")
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
    timeout_s: float = Field(
        60.0,
        gt=0,
        alias="request_timeout_s",
        description="Longest that a request may take, in seconds.",
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
        description="Load per replica that autoscaling aims at; 0 takes half of "
        "max_ongoing_requests.",
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
    published: str = Field(
        "main",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$",
        description="Name of the published versions in the index's store: one that is newer than "
        "the deployment is served in place of index_uri, on every replica. Empty: none; the index "
        "is fixed, and POST /admin/index is refused.",
    )
    shadow_allowed_drop: float = Field(
        0.2,
        ge=0,
        le=1,
        description="By how much a new index's recall and overlap on probes may be below the "
        "old's.",
    )
    mode: Mode = Field(
        SearchConfig.mode,
        description="How to search unless the request says otherwise: `dense` by the encoder's "
        "vectors, `bm25` by words, `hybrid` by both. An index without BM25 is searched densely.",
    )
    memory_map: bool = Field(
        False, description="Map the index file in place of reading it: replicas share its pages."
    )
    collapse_duplicates: bool = Field(
        False,
        description="Of passages of a shard with nearly the same text, find the best one only.",
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
    examples: list[str] = Field(
        default_factory=list,
        description="Questions that the page offers; `invar-ray serve` takes some of the dev "
        "questions that its generator was measured with. A key that is bound to passages sees "
        "none.",
    )
    tracing: Tracing = Field("off", description="OpenTelemetry spans: off, log, or otlp.")
    stability_share: float = Field(
        0.0, ge=0, le=1, description="Share of answers whose stability is measured."
    )

    @model_validator(mode="after")
    def _together(self) -> "AppArgs":
        if not self.store_uri and not (self.index_uri and self.generator_uri):
            raise ValueError("nothing to serve: give index_uri and generator_uri, or store_uri")
        if self.shard_uris and is_published(self.index_uri):
            raise ValueError("shard_uris: the published version that index_uri names has its own")
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
        """With index artifacts for published versions, and with the current index of ``store_uri``
        and its base's newest generator where none are named.

        Raises:
            MissingArtifactError: if the store has none, or nothing has been published.
            ConfigError: if the published version has several shards and the topology is colocated.
        """
        if is_published(self.index_uri):
            return self._of_published().resolved()
        if self.index_uri and self.generator_uri:
            return self
        from invar_ray.answering.current import current_shards, newest_generator
        from invar_ray.errors import MissingArtifactError
        from invar_ray.store.artifacts import Store, open_artifact

        root = self.store_uri
        if "://" not in root and not Path(root).is_dir():
            beside = Path(__file__).parents[1] / root
            root = str(beside if beside.is_dir() else Path(root))
        store = Store(root if "://" in root else str(Path(root).resolve()))
        found: dict[str, Any] = {"generator_uri": self.generator_uri}
        if self.index_uri:
            index = open_artifact(self.index_uri, "index")
        else:
            index, *shards = current_shards(store, self.published or "main")
            found |= {"index_uri": index.uri}
            if shards:
                found["shard_uris"] = [shard.uri for shard in shards]
        if not self.generator_uri:
            generator = newest_generator(index)
            if generator is None:
                raise MissingArtifactError(
                    f"no generator of the base of {index.ref} below {store.root_uri}",
                    action="run make demo or invar-ray train first, or name both artifacts",
                )
            found["generator_uri"] = generator.uri
        return self.model_copy(update=found)

    def _of_published(self) -> "AppArgs":
        versions = open_published(self.index_uri)
        index, *shards = versions.uris()
        if shards and self.topology == "colocated":
            raise ConfigError(
                f"the current version at {versions.uri} has {len(shards) + 1} shards",
                expected="one index in topology colocated",
                action="set topology: split",
            )
        found = {"index_uri": index, "shard_uris": shards, "published": versions.name}
        return self.model_copy(update=found)

    @property
    def configured(self) -> tuple[str, ...]:
        """Index URI of each shard."""
        return (self.index_uri, *self.shard_uris)

    @property
    def max_in_flight(self) -> int:
        """Requests that an HTTP replica answers at once; it refuses more."""
        return self.max_ongoing_requests + self.max_queued_requests

    @property
    def device(self) -> str:
        """Where models run."""
        return "cuda" if self.num_gpus_per_replica > 0 else "cpu"

    def limits(self) -> Limits:
        """What requests may ask for, alone: clients are told it."""
        return Limits.model_validate({name: getattr(self, name) for name in Limits.model_fields})

    def versions_uri(self) -> str:
        """Where the versions are published, ``<root>/published/<name>``; empty: nowhere."""
        if not self.published:
            return ""
        from invar_ray.store.artifacts import split_uri
        from invar_ray.store.files import join_uri

        return join_uri(split_uri(self.index_uri)[0], f"{FOLDER}/{self.published}")
