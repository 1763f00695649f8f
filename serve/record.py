"""The index that a service was told to serve: one small file beside the artifacts, so that it
outlives every replica.

A change through the API is written here once all replicas have the new index ready.  A replica that
starts later, or missed the change, reads it here.  The record holds for the configured index that
it was made over: deploying the application with another ``index_uri`` overrules it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from invar_ray.errors import ArtifactError
from invar_ray.store.files import resolve_uri, write_atomic

_KEPT = 20


@dataclass(frozen=True, slots=True)
class Desired:
    """What the record says.

    Attributes:
        configured: index URIs of the deployed configuration, one per shard, that the record was
            made over.
        index: index URIs to serve.
        history: what was served before, oldest first.
        generation: counts the changes.
    """

    configured: tuple[str, ...]
    index: tuple[str, ...]
    history: tuple[tuple[str, ...], ...] = ()
    generation: int = 0

    def changed(self, index: tuple[str, ...]) -> Desired:
        """The record after a change to ``index``."""
        return Desired(
            self.configured, index, (*self.history, self.index)[-_KEPT:], self.generation + 1
        )

    def rolled_back(self) -> Desired:
        """The record after going back by one change; the caller has seen that there is one."""
        return Desired(self.configured, self.history[-1], self.history[:-1], self.generation + 1)


class RecordFile:
    """Where the record lies.

    Args:
        uri: local path or URI of a JSON file; all replicas must reach it.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def read(self, configured: tuple[str, ...]) -> Desired:
        """The record, or one without changes where there is none for this configuration.

        Raises:
            ArtifactError: if the file is there and cannot be read.
        """
        filesystem, path = resolve_uri(self.uri)
        plain = Desired(configured, configured)
        try:
            with filesystem.open_input_stream(path) as stream:
                values = json.loads(stream.read())
            record = _from_json(values)
        except FileNotFoundError:
            return plain
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"the record of the served index at {self.uri} cannot be read "
                f"({type(error).__name__})",
                expected="the file that POST /admin/index wrote",
                action="restore it, or remove it to serve the configured index",
            ) from error
        return record if record.configured == configured else plain

    def write(self, record: Desired) -> None:
        """Put ``record`` in place of the old one, at once or not at all."""
        filesystem, path = resolve_uri(self.uri)
        content = json.dumps(asdict(record), indent=1).encode()
        if isinstance(filesystem, fs.LocalFileSystem):
            write_atomic(Path(path), content)
            return
        with filesystem.open_output_stream(
            path
        ) as stream:  # an object store shows a whole object or the old one
            stream.write(content)


def named_index(uri: str) -> tuple[str, ...]:
    """The index (URI of each shard) that a place to follow names.

    Args:
        uri: ``<root>/published/<name>`` of published versions, or a file whose lines are URIs (#
            begins a comment).

    Raises:
        OSError: there is no such file.  ArtifactError: nothing has been published, or the store
            cannot be read.
    """
    from invar_ray.store.published import is_published, open_published

    if is_published(uri):
        return open_published(uri).uris()
    filesystem, path = resolve_uri(uri)
    with filesystem.open_input_stream(path) as stream:
        lines = [line.strip() for line in stream.read().decode().splitlines()]
    return tuple(line for line in lines if line and not line.startswith("#"))


def _from_json(values: dict[str, Any]) -> Desired:
    return Desired(
        tuple(values["configured"]),
        tuple(values["index"]),
        tuple(tuple(entry) for entry in values["history"]),
        int(values["generation"]),
    )
