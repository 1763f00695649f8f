"""JSON files of benchmarks, read entry by entry so that a fault has a file and a line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from invar_ray.corpus.rows import json_row, kind_of
from invar_ray.corpus.storage import InputFile, read_bytes, read_lines
from invar_ray.errors import DataError

_SPACE = re.compile(r"[\s,]*")


def text_of(file: InputFile) -> str:
    """The whole file as UTF-8 (a byte order mark is dropped).

    Raises:
        DataError: it cannot be read or is not UTF-8.
    """
    try:
        return read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file.uri}, line {line}: not UTF-8 text (byte {error.object[error.start]:#04x} at "
            f"offset {error.start})",
            action="convert the file to UTF-8",
        ) from error


def malformed(file: InputFile, error: json.JSONDecodeError) -> DataError:
    """What to raise for text that is not JSON."""
    return DataError(
        f"{file.uri}, line {error.lineno}: malformed JSON ({error.msg})", action="download it again"
    )


def json_lines(file: InputFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSON lines file with their places."""
    for number, line in read_lines(file):
        place = f"{file.uri}, line {number}"
        yield place, json_row(line, place)


def json_entries(file: InputFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of one JSON list with their places, read one by one so that a fault has a line."""
    text = text_of(file)
    start = _skip(text, 0)
    if not text.startswith("[", start):
        raise DataError(f"{file.uri}, line 1: is no JSON list", expected="[{..}, ..]")
    yield from _entries(file, text, start, lambda number, line: f"entry {number + 1} (line {line})")


def json_members(file: InputFile, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of the list ``name`` of a file that is one JSON object, with their places, read one
    by one.
    """
    text = text_of(file)
    position = _skip(text, 0)
    if not text.startswith("{", position):
        raise DataError(
            f"{file.uri}, line 1: is no JSON object", expected=f'{{"{name}": [{{..}}, ..]}}'
        )
    position = _skip(text, position + 1)
    while not text.startswith("}", position):
        key, position = _value(file, text, position)
        position = _skip(text, position)
        if not isinstance(key, str) or not text.startswith(":", position):
            raise malformed(
                file, json.JSONDecodeError("Expecting a name and a colon", text, position)
            )
        position = _skip(text, position + 1)
        if key == name:
            if not text.startswith("[", position):
                _value(file, text, position)  # if it is no JSON either, that is the fault
                raise DataError(
                    f"{file.uri}, line {_line(text, position)}: {name!r} is no list",
                    expected="[{..}, ..]",
                )
            yield from _entries(
                file, text, position, lambda number, line: f"{name}[{number}] (line {line})"
            )
            return
        _, position = _value(file, text, position)
        position = _skip(text, position)
    raise DataError(
        f"{file.uri}, line 1: {name!r} is missing", expected=f'{{"{name}": [{{..}}, ..]}}'
    )


def _entries(
    file: InputFile, text: str, start: int, named: Callable[[int, int], str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of the list whose bracket stands at ``start``."""
    position, number, line, counted = start + 1, 0, _line(text, start), start
    while True:
        position = _skip(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            return
        place = f"{file.uri}, {named(number, line)}"
        value, position = _value(file, text, position, place)
        number += 1
        yield place, as_object(value, place)


def _value(file: InputFile, text: str, position: int, place: str = "") -> tuple[Any, int]:
    """The JSON value at a position, and where it ends; a fault in it names ``place``, if given, and
    its line.
    """
    try:
        return json.JSONDecoder().raw_decode(text, position)
    except json.JSONDecodeError as error:
        if not place:
            raise malformed(file, error) from error
        raise DataError(
            f"{place}: malformed JSON ({error.msg} in line {error.lineno})",
            action="download it again",
        ) from error
    except RecursionError as error:
        raise DataError(
            f"{file.uri}, line {_line(text, position)}: JSON nested too deep",
            action="download it again",
        ) from error


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def as_object(value: Any, place: str) -> dict[str, Any]:
    """A value that must be an object; raises :class:`DataError`, which names ``place``."""
    if not isinstance(value, dict):
        raise DataError(f"{place}: is {kind_of(value)}", expected="a JSON object")
    return value


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position
