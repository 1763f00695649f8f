"""Finding and opening input files: local paths, ``file://``, ``s3://`` and ``gs://`` through one code, pyarrow.fs."""

from __future__ import annotations

import io
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs as pafs

from invar_ray.errors import DataError

# Endings that say how a file is read; the longest that fits wins.
ENDINGS = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson": "jsonl",
    ".ndjson.gz": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
    ".markdown": "text",
}


@dataclass(frozen=True)
class InputFile:
    """A file to read.

    Attributes:
        uri: how messages and records name it: the caller's own URI or path, with the place inside a folder added.
        name: path relative to the folder that was given, or the file's own name.
        path: its path for ``filesystem``.
        format: ``jsonl``, ``parquet`` or ``text``.
    """

    uri: str
    name: str
    path: str
    format: str
    filesystem: pafs.FileSystem

    def stream(self) -> io.BufferedReader:
        """Open for reading from front to back; ``.gz`` is unpacked on the way."""
        return io.BufferedReader(self.filesystem.open_input_stream(self.path, compression="detect"))


def find_files(uri: str, format: str = "auto") -> list[InputFile]:
    """Files to read at ``uri``: the file itself, or those in the folder (and below) whose ending says how, by name.

    Args:
        uri: local path, ``file://``, ``s3://`` or ``gs://``.
        format: ``auto`` goes by the ending; ``jsonl``, ``parquet`` or ``text`` reads a named file so whatever it is
            called, and takes only such files from a folder.  Hidden files (``.x``, ``_x``) are left out.

    Raises:
        DataError: there is nothing at ``uri``, nothing that can be read, or its store cannot be reached.
    """
    if format not in {"auto", *ENDINGS.values()}:
        raise ValueError(f"format {format!r}: expected auto, jsonl, parquet or text")
    filesystem, path = _open_filesystem(uri)
    try:
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.NotFound:
            raise DataError(f"there is no file or folder at {uri}", action="check the path, or make the file first")
        if info.type == pafs.FileType.File:
            kind = _format_of(path) if format == "auto" else format
            if kind is None:
                raise DataError(
                    f"{uri}: the file's ending does not say how to read it",
                    expected=", ".join(ENDINGS),
                    action="rename it or name its format",
                )
            return [InputFile(uri, posixpath.basename(path), path, kind, filesystem)]
        entries = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    except OSError as error:
        raise DataError(f"{uri} cannot be read ({_first_line(error)})", action="check address and rights") from error
    return _in_folder(uri, format, path, filesystem, entries)


def _in_folder(
    uri: str, format: str, folder: str, filesystem: pafs.FileSystem, entries: list[pafs.FileInfo]
) -> list[InputFile]:
    found = []
    for entry in entries:
        name = posixpath.relpath(entry.path, folder)
        kind = _format_of(name)
        hidden = any(part.startswith((".", "_")) for part in name.split("/"))
        if entry.type == pafs.FileType.File and kind is not None and not hidden and format in {"auto", kind}:
            found.append(InputFile(f"{uri.rstrip('/')}/{name}", name, entry.path, kind, filesystem))
    if not found:
        wanted = [ending for ending, kind in ENDINGS.items() if format in {"auto", kind}]
        raise DataError(
            f"the folder {uri} holds no file to read ({len(entries)} entries seen)",
            expected=f"files ending in {', '.join(wanted)}",
        )
    return sorted(found, key=lambda file: file.name)


def _open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri)).replace(os.sep, "/")
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{uri!r} is not a usable URI ({_first_line(error)})",
            expected="a local path, file://, s3:// or gs:// (a space is written %20 in a URI)",
        ) from error
    except OSError as error:
        raise DataError(f"{uri} cannot be reached ({_first_line(error)})", action="check address and rights") from error
    return filesystem, path


def _format_of(name: str) -> str | None:
    fitting = [ending for ending in ENDINGS if name.lower().endswith(ending)]
    return ENDINGS[max(fitting, key=len)] if fitting else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_lines(file: InputFile) -> Iterator[tuple[int, bytes]]:
    """Lines that hold something, with their 1-based numbers.

    Raises:
        DataError: the file is cut off or not the gzip file that its name says.
    """
    number = 0
    try:
        with file.stream() as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(
            f"{file.uri} cannot be read beyond line {number} ({_first_line(error)})", action="copy or download it again"
        ) from error


def read_text(file: InputFile) -> str:
    """A whole file as UTF-8 (a byte order mark is dropped).

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    try:
        with file.stream() as stream:
            return stream.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file.uri} is not UTF-8 text (byte {error.object[error.start]:#04x} at offset {error.start})",
            action="convert it to UTF-8",
        ) from error
    except OSError as error:
        raise DataError(
            f"{file.uri} cannot be read ({_first_line(error)})", action="check address and rights"
        ) from error
