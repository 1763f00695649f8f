"""Finding and opening input files: local paths, ``file://``, ``s3://`` and ``gs://`` through one
code, pyarrow.fs.
"""

from __future__ import annotations

import io
import os
import posixpath
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from invar_ray.corpus.readlog import ReadLog
from invar_ray.errors import DataError

# Endings that say how a file is read; the longest that fits wins.
ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".tsv": "tsv",
    ".csv": "csv",
    ".json": "json",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".markdown": "text",
    ".rst": "text",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".xml": "xml",
    ".epub": "epub",
    ".pdf": "pdf",
    ".docx": "docx",
    ".pptx": "pptx",
    ".xlsx": "xlsx",
    ".ipynb": "ipynb",
    **dict.fromkeys(
        """.py .pyi .js .ts .java .c .h .cc .cpp .hpp .cs .go .rs .rb .php .pl .lua .r .jl .scala
        .kt .swift .sh .sql .tex .toml .yaml .yml .ini .cfg .log""".split(),
        "text",
    ),
}
ENDINGS |= {
    f"{ending}.{packed}": kind
    for ending, kind in ENDINGS.items()
    if kind in {"jsonl", "tsv", "csv", "json", "text", "html", "xml"}
    for packed in ("gz", "zst")
}
ROW_FORMATS = frozenset({"jsonl", "parquet", "tsv"})
"""Formats whose files hold a document a row (CSV and JSON files may, a TSV file may be a plain
table); any other is one document.
"""
_BENCHMARKS = ROW_FORMATS - {"parquet"} | {"csv", "json"}


@dataclass(frozen=True)
class InputFile:
    """A file to read.

    Attributes:
        uri: how messages and records name it: the caller's own URI or path, with the place inside a
            folder added.
        name: path relative to the folder that was given, or the file's own name; what cannot be
            printed in it, and bytes that are not UTF-8, as hexadecimal.
        path: its path for ``filesystem``.
        format: how it is read: a value of :data:`ENDINGS`.
        size: in bytes.
    """

    uri: str
    name: str
    path: str
    format: str
    filesystem: pafs.FileSystem
    size: int = 0

    def stream(self) -> io.BufferedReader:
        """Open for reading from front to back; ``.gz`` and ``.zst`` are unpacked on the way."""
        packed = {".gz": "gzip", ".zst": "zstd"}.get(posixpath.splitext(self.path)[1].lower())
        source = self.raw_stream()
        return io.BufferedReader(pa.CompressedInputStream(source, packed) if packed else source)

    def raw_stream(self) -> Any:
        """Open for reading as it lies there."""
        if isinstance(self.filesystem, pafs.LocalFileSystem) and not self.path.isprintable():
            # pyarrow takes no name that is not UTF-8.
            return pa.PythonFile(open(self.path, "rb"), mode="r")
        return self.filesystem.open_input_stream(self.path, compression=None)

    def seekable(self) -> Any:
        """Open for reading at any place."""
        if isinstance(self.filesystem, pafs.LocalFileSystem):
            return pa.PythonFile(open(self.path, "rb"), mode="r")
        return self.filesystem.open_input_file(self.path)


def find_files(
    uri: str, format: str = "auto", *, log: ReadLog | None = None, exclude: str = ""
) -> list[InputFile]:
    """Files to read at ``uri``: the file itself, or those in the folder (and below) whose ending
    says how, by name.

    Hidden files and folders (``.x``, ``_x``) are left out.  Links are followed, each folder is read
    once.

    Args:
        uri: local path, ``file://``, ``s3://`` or ``gs://``.
        format: ``auto`` goes by the ending; any other reads a named file so whatever it is called,
            and takes only such files from a folder.
        log: hears what else lies in a folder and is left out.
        exclude: local folder that is left out if it lies below ``uri``, such as the store of the
            run's own results.

    Raises:
        DataError: there is nothing at ``uri``, nothing that can be read, or its store cannot be
            reached.
    """
    if format not in {"auto", *ENDINGS.values()}:
        raise ValueError(
            f"format {format!r}: expected auto or one of {sorted(set(ENDINGS.values()))}"
        )
    filesystem, path = _open_filesystem(uri)
    try:
        kind_there, size = what_is_at(filesystem, path)
        if kind_there == pafs.FileType.NotFound:
            raise DataError(
                f"there is no file or folder at {uri}",
                action="check the path, or make the file first",
            )
        if kind_there == pafs.FileType.File:
            kind = _format_of(path) if format == "auto" else format
            if kind is None:
                raise DataError(
                    f"{uri}: the file's ending does not say how to read it",
                    expected=_wanted("auto"),
                    action="rename it or name its format",
                )
            name = printable(posixpath.basename(path))
            return [InputFile(printable(uri), name, path, kind, filesystem, size)]
        if isinstance(filesystem, pafs.LocalFileSystem):
            entries = list(_walk(path, log, os.path.realpath(exclude) if exclude else ""))
        else:
            found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
            entries = [
                (entry.path, entry.size) for entry in found if entry.type == pafs.FileType.File
            ]
    except OSError as error:
        raise DataError(
            f"{uri} cannot be read ({_first_line(error)})", action="check address and rights"
        ) from error
    return _in_folder(uri, format, path, filesystem, entries, log)


def benchmark_files(uri: str) -> list[InputFile]:
    """The files of questions at ``uri``: the file whatever it is called, or every JSON, JSON lines,
    TSV and CSV file of the folder; errors as :func:`find_files`.
    """
    try:
        found = [file for file in find_files(uri) if file.format in _BENCHMARKS]
    except DataError:
        found = []
    return found or find_files(uri, "jsonl")


def corpus_files(
    uri: str, format: str = "auto", *, log: ReadLog | None = None, exclude: str = ""
) -> list[InputFile]:
    """As :func:`find_files`; of a BEIR folder its ``corpus.jsonl`` alone, as its queries and
    judgements are no documents.
    """
    files = find_files(uri, format, log=log, exclude=exclude)
    if format != "auto":
        return files
    corpus = [file for file in files if file.name.startswith("corpus.jsonl")]
    beside = [file for file in files if file.name.startswith(("queries.jsonl", "qrels/"))]
    return corpus if corpus and beside else files


def _walk(folder: str, log: ReadLog | None, exclude: str) -> Iterator[tuple[str, int]]:
    """Path and size of each file below a local folder.  Links to folders are followed last, so that
    a folder that can be reached both ways keeps its own name.
    """
    seen: set[tuple[int, int]] = set()
    linked: list[str] = []
    waiting = [folder]
    while waiting or linked:
        place = waiting.pop() if waiting else linked.pop(0)
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:
            _left_out(
                log,
                f"{posixpath.relpath(place, folder)} leads to a folder that is read already (a "
                "link). To do: nothing.",
            )
            continue
        seen.add((status.st_dev, status.st_ino))
        if exclude and os.path.realpath(place) == exclude:
            continue
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            if place == folder:
                raise
            _left_out(
                log,
                f"{posixpath.relpath(place, folder)}/ cannot be listed ({error.strerror}). To do: "
                "check its rights.",
            )
            continue
        for entry in entries:
            path = f"{place}/{entry.name}"
            name = posixpath.relpath(path, folder)
            if entry.name.startswith((".", "_")):
                continue
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                _left_out(
                    log, f"{name} is a link that leads nowhere ({error.strerror}). To do: mend it."
                )
                continue
            if stat.S_ISDIR(mode):
                (linked if entry.is_symlink() else waiting).append(path)
            elif stat.S_ISREG(mode):
                yield path, entry.stat().st_size
            else:
                _left_out(
                    log,
                    f"{name} is no regular file (a pipe, a socket or a device). To do: remove it.",
                )


def _in_folder(
    uri: str,
    format: str,
    folder: str,
    filesystem: pafs.FileSystem,
    entries: list[tuple[str, int]],
    log: ReadLog | None,
) -> list[InputFile]:
    found = []
    foreign: dict[str, list[str]] = {}
    for path, size in entries:
        name = printable(posixpath.relpath(path, folder))
        kind = _format_of(name)
        if any(part.startswith((".", "_")) for part in name.split("/")):
            continue
        if kind is None:
            foreign.setdefault(posixpath.splitext(name)[1].lower(), []).append(name)
        elif format in {"auto", kind}:
            place = f"{printable(uri).rstrip('/')}/{name}"
            found.append(InputFile(place, name, path, kind, filesystem, size))
    wanted, said = _wanted(format), False
    for ending, names in sorted(foreign.items()):
        which = f"{min(names)}" if len(names) == 1 else f"{len(names)} files (first: {min(names)})"
        what = f"ending {ending}" if ending else "a name without ending"
        to_do = f"convert to one of {wanted}, or remove" if not said else "as for the first"
        said = True
        _left_out(log, f"{which}: nothing here reads {what}. To do: {to_do}.", len(names))
    if not found:
        raise DataError(
            f"the folder {uri} holds no file to read ({len(entries)} entries seen)",
            expected=f"files ending in {wanted}",
        )
    return sorted(found, key=lambda file: file.name)


def what_is_at(filesystem: pafs.FileSystem, path: str) -> tuple[Any, int]:
    """The kind (pyarrow's ``FileType``) and size of what a path leads to, whatever its name."""
    if isinstance(filesystem, pafs.LocalFileSystem) and not path.isprintable():
        if not os.path.exists(path):
            return pafs.FileType.NotFound, 0
        is_folder = os.path.isdir(path)
        return pafs.FileType.Directory if is_folder else pafs.FileType.File, os.path.getsize(path)
    info = filesystem.get_file_info(path)
    return info.type, info.size


def _wanted(format: str) -> str:
    """The endings of a format, or the main ones of all."""
    if format != "auto":
        return ", ".join(ending for ending, kind in ENDINGS.items() if kind == format)
    return (
        ".txt, .md, .rst, .html, .xml, .epub, .pdf, .docx, .pptx, .xlsx, .csv, .tsv, .json, "
        ".jsonl, .parquet, .ipynb, source text (.py ..); .gz of text"
    )


def printable(name: str) -> str:
    """A file's name as text."""
    if name.isprintable():
        return name
    plain = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in plain
    )


def _left_out(log: ReadLog | None, line: str, files: int = 1) -> None:
    if log is not None:
        log.skip(line, files)


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
        raise DataError(
            f"{uri} cannot be reached ({_first_line(error)})", action="check address and rights"
        ) from error
    return filesystem, path


def _format_of(name: str) -> str | None:
    fitting = [ending for ending in ENDINGS if name.lower().endswith(ending)]
    return ENDINGS[max(fitting, key=len)] if fitting else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_lines(file: InputFile, max_bytes: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Lines that hold something, with their 1-based numbers.

    Args:
        file: to read.
        max_bytes: of a longer line only its first ``max_bytes + 1`` are kept.

    Raises:
        DataError: the file is cut off or not the gzip file that its name says.
    """
    number = 0
    try:
        with file.stream() as stream:
            for number, line in enumerate(_bounded(stream, max_bytes), start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(
            f"{file.uri} cannot be read beyond line {number} ({_first_line(error)})",
            action="copy or download it again",
        ) from error


def _bounded(stream: io.BufferedReader, max_bytes: int | None) -> Iterator[bytes]:
    if max_bytes is None:
        yield from stream
        return
    while line := stream.readline(max_bytes + 1):
        rest = line
        while len(rest) > max_bytes and not rest.endswith(b"\n"):  # passed over, not kept
            rest = stream.readline(max_bytes + 1)
        yield line


def read_bytes(file: InputFile, max_bytes: int | None = None) -> bytes:
    """A whole file, unpacked.

    Args:
        file: to read.
        max_bytes: a larger one is read one byte further only.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with file.stream() as stream:
            return stream.read(-1 if max_bytes is None else max_bytes + 1)
    except OSError as error:
        raise DataError(
            f"{file.uri} cannot be read ({_reason(error)})", action="check address and rights"
        ) from error


def _reason(error: OSError) -> str:
    """``Permission denied`` rather than pyarrow's whole sentence with the path in it."""
    return os.strerror(error.errno) if error.errno else _first_line(error)
