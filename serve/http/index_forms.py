"""Which index and generator are served, and a change of it, as they go over HTTP."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field, field_validator

from serve.changes import Change
from serve.errors import plain
from serve.http.limits import Limits
from serve.http.protocol import VERSIONS, clean_text
from serve.records import GeneratorStatus, ReplicaStatus, Serving


class IndexChange(BaseModel):
    """Ask for another index, or for the one before."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"index_uri": "s3://bucket/invar/index/retriever-3f0c9a1b"}]
        },
    )

    index_uri: str | list[str] | None = Field(
        None, description="Index artifact (one for each shard, where the service has several)."
    )
    rollback: bool = Field(
        False, strict=True, description="Instead: go back to what was served before."
    )
    mend: bool = Field(
        False,
        strict=True,
        description="Instead: where the record of the newest version is damaged, pass over it, and "
        "serve the newest that can be read.",
    )
    wait: bool = Field(
        False,
        strict=True,
        description="Answer when it is made or refused; it goes on if you do not wait so long.",
    )

    @field_validator("index_uri")
    @classmethod
    def _clean(cls, value: str | list[str] | None) -> str | list[str] | None:
        return (
            [clean_text(each) for each in value]
            if isinstance(value, list)
            else value and clean_text(value)
        )


ChangeId = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="Id of a change.")]


class ChangeOut(BaseModel):
    """How far a change of the index is."""

    id: str
    state: str = Field(
        description="`running`, `done`, `refused` (the old index serves on), `cancelled`, or `lost`"
        ": the replica died that worked on it, and `GET /v1/index` says what is served."
    )
    step: str = Field(
        description="`loading` (every replica loads and tries it), `publishing` or `switching`."
    )
    code: str | None = Field(description="Of the refusal, as an error's.")
    error: str | None = Field(description="Why it was refused.")
    report: dict[str, Any] = Field(description="Of the probe, once it is done.")
    seconds: float = Field(description="From its begin to its last sign.")

    @classmethod
    def of(cls, change: Change) -> "ChangeOut":
        """From a change."""
        return cls(
            id=change.id,
            state=change.state,
            step=change.step,
            code=change.code,
            error=change.error and plain(change.error),
            report=change.report,
            seconds=round(change.updated - change.begun, 3),
        )


class IndexState(BaseModel):
    """The index that is served.  After a failed change the old one stays in service."""

    requested_uri: str = Field(description="The index that was asked for last.")
    active_uri: str = Field(description="The index that is being searched.")
    error: str | None = Field(
        description="Why the requested index is not the active one; null if it is."
    )

    @classmethod
    def of_all(cls, serving: Serving) -> "IndexState":
        """Of the whole service."""
        return cls(
            requested_uri=plain(serving.requested_uri),
            active_uri=plain(serving.active_uri),
            error=serving.error and plain(serving.error),
        )


class ReplicaState(IndexState):
    """The same for one replica."""

    shard: str
    replica: str
    version: str = Field(description="Fingerprint of the active index.")

    @classmethod
    def of(cls, status: ReplicaStatus) -> "ReplicaState":
        """From what a replica says."""
        return cls(
            requested_uri=plain(status.requested_uri),
            active_uri=plain(status.active_uri),
            error=status.error and plain(status.error),
            shard=status.shard,
            replica=status.replica,
            version=status.versions["index"],
        )


class GeneratorState(BaseModel):
    """The generator that a replica serves."""

    engine: str = Field(
        "transformers", description="`transformers`, or `openai` for a server elsewhere."
    )
    uri: str
    max_context: int = Field(description="Most tokens of prompt and answer together.")

    @classmethod
    def of(cls, status: GeneratorStatus) -> "GeneratorState":
        """From what a generator says."""
        return cls(engine=status.engine, uri=plain(status.uri), max_context=status.max_context)


class IndexResponse(BaseModel):
    """What is being served."""

    index: IndexState
    replicas: list[ReplicaState] = Field(
        default_factory=list, description="Every retriever replica's own state."
    )
    history: list[str] = Field(
        default_factory=list, description="Indexes that were served before, oldest first."
    )
    generator: GeneratorState
    versions: dict[str, str] = VERSIONS
    limits: Limits
    examples: list[str] = Field(
        default_factory=list, description="Questions that the indexed documents answer."
    )

    @classmethod
    def of(cls, serving: Serving, limits: Limits, examples: Sequence[str] = ()) -> "IndexResponse":
        """From what is served."""
        return cls(
            index=IndexState.of_all(serving),
            replicas=[ReplicaState.of(each) for each in serving.replicas],
            history=[plain(each) for each in serving.history],
            generator=GeneratorState.of(serving.generator),
            versions=serving.versions,
            limits=limits,
            examples=list(examples),
        )


class IndexChangeResponse(BaseModel):
    """What came of a change: every replica serves the new index."""

    index: IndexState
    replicas: list[ReplicaState]
    report: dict[str, Any] = Field(
        description="Of the probe: cosine of the probe texts, and how the searches for them differ "
        "from the old index."
    )
    versions: dict[str, str] = VERSIONS
    request_id: str

    @classmethod
    def of(cls, serving: Serving, request_id: str) -> "IndexChangeResponse":
        """From what is served after the change."""
        return cls(
            index=IndexState.of_all(serving),
            replicas=[ReplicaState.of(each) for each in serving.replicas],
            report=serving.report,
            versions=serving.versions,
            request_id=request_id,
        )
