"""Writes that only one of several writers can win: create a file unless it is there, replace it
unless it changed.

Local and shared file systems do it with ``link``, object stores with a conditional put, which
pyarrow does not have. The only file that imports obstore.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pyarrow import fs

from invar_ray.errors import ArtifactError
from invar_ray.store.files import resolve_uri, write_atomic

_TRIES = 20


def create_if_absent(uri: str, content: bytes) -> bool:
    """Create a file unless there is one; a reader sees all of it or nothing.

    Args:
        uri: local path, ``file://``, ``s3://``, ``gs://`` (``hdfs://`` is untested).
        content: must differ between writers (hold a random token), so that a writer knows its own
            again.

    Returns:
        Whether the file holds this writer's ``content``.

    Raises:
        ArtifactError: if the store cannot be reached or has no conditional put.
    """
    filesystem, path = resolve_uri(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        return _link(Path(path), content)
    if _is_object_store(uri):
        import obstore

        store, key = _object_store(uri)
        with _clear(uri):
            try:
                obstore.put(store, key, content, mode="create")
            except obstore.exceptions.AlreadyExistsError:
                # A put whose answer was lost is sent again by the client, and then finds itself.
                return bytes(obstore.get(store, key).bytes()) == content
        return True
    return _move(filesystem, path, content)


def replace(uri: str, make: Callable[[], bytes]) -> None:
    """Replace a file by ``make()`` so that of several writers the one that called ``make`` last is
    written last.

    Args:
        uri: as :func:`create_if_absent`.
        make: reads the state that the file stands for; called anew where another writer was faster.

    Raises:
        ArtifactError: if the store cannot be reached, or other writers are faster time and again.
    """
    filesystem, path = resolve_uri(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(place.with_name(f".{place.name}.lock"), "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_atomic(place, make())
        return
    if not _is_object_store(uri):
        with filesystem.open_output_stream(path) as stream:
            stream.write(make())
        return
    import obstore

    store, key = _object_store(uri)
    with _clear(uri):
        for _ in range(_TRIES):
            mode: Any = "create"
            with contextlib.suppress(FileNotFoundError, obstore.exceptions.NotFoundError):
                found = obstore.head(store, key)
                mode = {
                    name: found[name] for name in ("e_tag", "version") if found[name] is not None
                }
            try:
                obstore.put(store, key, make(), mode=mode)
                return
            except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError):
                continue
    raise ArtifactError(
        f"{uri} was changed by other writers {_TRIES} times in a row", action="try again"
    )


def _link(path: Path, content: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # O_EXCL on the name itself would show a reader an empty file; a link appears with its
        # content.
        try:
            os.link(temporary, path)
        except FileExistsError:
            return path.read_bytes() == content
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _move(filesystem: fs.FileSystem, path: str, content: bytes) -> bool:
    """HDFS: its rename refuses an existing target.  Untested."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}"
    filesystem.create_dir(path.rpartition("/")[0])
    if filesystem.get_file_info(path).type != fs.FileType.NotFound:
        return False
    with filesystem.open_output_stream(temporary) as stream:
        stream.write(content)
    with contextlib.suppress(OSError):
        filesystem.move(temporary, path)
    if filesystem.get_file_info(temporary).type != fs.FileType.NotFound:
        filesystem.delete_file(temporary)
    with filesystem.open_input_stream(path) as stream:
        return bool(stream.read() == content)


def _is_object_store(uri: str) -> bool:
    return urlsplit(uri).scheme in {"s3", "gs", "gcs"}


def _object_store(uri: str) -> tuple[Any, str]:
    """Obstore's store of a URI's bucket, and the key in it; pyarrow's query options are
    understood.
    """
    from obstore.store import GCSStore, S3Store

    parts = urlsplit(uri)
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    key = parts.path.strip("/")
    if parts.scheme != "s3":
        return GCSStore(parts.netloc), key
    filesystem, _ = resolve_uri(uri)
    settings: dict[str, Any] = {"region": options.get("region") or filesystem.region or "us-east-1"}
    endpoint, scheme = options.get("endpoint_override"), options.get("scheme", "https")
    if endpoint:
        settings["endpoint"] = endpoint if "://" in endpoint else f"{scheme}://{endpoint}"
        settings["virtual_hosted_style_request"] = (
            options.get("force_virtual_addressing", "false") == "true"
        )
    if options.get("allow_http") or scheme == "http":
        settings["client_options"] = {"allow_http": True}
    if parts.username and parts.password:
        settings |= {"access_key_id": parts.username, "secret_access_key": parts.password}
    return S3Store(parts.hostname, **settings), key


@contextlib.contextmanager
def _clear(uri: str) -> Iterator[None]:
    import obstore

    try:
        yield
    except (obstore.exceptions.BaseError, OSError) as error:
        raise ArtifactError(
            f"cannot write {uri} ({str(error).splitlines()[0][:300]})",
            expected="a store with conditional put (If-None-Match): S3, GCS, MinIO, or a local or "
            "shared folder",
            action="check the bucket, the credentials and the network",
        ) from error
