"""Files anywhere: local paths and URIs through pyarrow.fs, atomic writes, checksums."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pyarrow import fs

from invar_ray.errors import ArtifactError

_CHUNK = 1 << 20


def join_uri(root_uri: str, ref: str) -> str:
    """``root_uri`` with ``ref`` added to its path (a query part, e.g. an S3 endpoint, stays at the
    end).
    """
    if "://" not in root_uri:
        return f"{root_uri.rstrip('/')}/{ref}"
    parts = urlsplit(root_uri)
    return urlunsplit(
        (parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{ref}", parts.query, "")
    )


def resolve_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """File system and path for a URI or a local path.

    Raises:
        ArtifactError: if pyarrow does not know the scheme.
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError, TypeError) as error:
        raise ArtifactError(
            f"cannot open {uri!r} ({error})",
            expected="a local path, or a file://, s3:// or gs:// URI",
        ) from error
    return filesystem, path


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def inventory(filesystem: fs.FileSystem, prefix: str, skip: str) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each file below ``prefix`` by its name there, but for the one named
    ``skip`` and for hidden ones, which are half-written.
    """
    files = {}
    for entry in filesystem.get_file_info(fs.FileSelector(prefix, recursive=True)):
        name = entry.path[len(prefix) :].lstrip("/")
        if (
            entry.type == fs.FileType.File
            and name != skip
            and not name.rpartition("/")[2].startswith(".")
        ):
            files[name] = {"bytes": entry.size, "sha256": sha256(filesystem, entry.path)}
    return files


def sha256(filesystem: fs.FileSystem, path: str) -> str:
    """Hex SHA-256 of a file, as it lies there."""
    hasher = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def flush(folder: Path) -> None:
    """Ask the disk to keep every file below ``folder``."""
    # A rename may reach the disk before the files do: after a power cut the manifest must not
    # outlive its files.
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
