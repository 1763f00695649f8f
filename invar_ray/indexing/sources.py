"""What the inputs are, by content: a changed file gives another fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import astuple

from pyarrow import fs

from invar_ray.artifacts import digest, resolve_uri
from invar_ray.errors import DataError
from invar_ray.text import facts

BUILTIN_FACTS = "builtin:facts"


def source_digest(uri: str) -> str:
    """16 hex digits that change with the content of a file or folder (or of the built-in corpus).

    Raises:
        DataError: if nothing is there.
    """
    if uri == BUILTIN_FACTS:
        return digest(
            [
                [[document.id, document.title, document.text] for document in facts.documents()],
                [astuple(example) for example in facts.questions("train")],
                [astuple(example) for example in facts.questions("dev")],
            ]
        )
    filesystem, path = resolve_uri(uri)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise DataError(
            f"no file or folder {uri}", action="check the path; relative paths start where you run the command"
        )
    if info.type == fs.FileType.File:
        return _file_digest(filesystem, path)
    entries = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    names = sorted(entry.path for entry in entries if entry.type == fs.FileType.File)
    return digest([[name[len(path) :], _file_digest(filesystem, name)] for name in names])


def _file_digest(filesystem: fs.FileSystem, path: str) -> str:
    hasher = hashlib.sha256()
    with filesystem.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()[:16]
