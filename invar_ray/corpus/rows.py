"""Rows of input files: JSON lines into objects, fields into strings; every fault names its file and
line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from invar_ray.corpus.formats.parsed import clean_text
from invar_ray.errors import DataError


def json_row(line: bytes, place: str) -> dict[str, Any]:
    """A line as a JSON object; raises :class:`DataError`, which names ``place``."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text", action="convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{place}: malformed JSON ({error.msg} at character {error.pos + 1})",
            expected="one JSON object a line",
        ) from error
    except RecursionError as error:
        raise DataError(
            f"{place}: JSON nested too deep", expected="one JSON object a line"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: holds {kind_of(row)}", expected="one JSON object a line")
    return row


def string(row: dict[str, Any], name: str, place: str, *, filled: bool = False) -> str:
    """The field ``name`` of a row, a string (with text, if ``filled``); raises
    :class:`DataError`.
    """
    if name not in row:
        raise DataError(
            f"{place}: the field {name!r} is missing",
            expected=f"a row with {name!r}, got {sorted(row)}",
        )
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{place}: {name!r} is {kind_of(value)}", expected="a string")
    if filled and not value.strip():
        raise DataError(f"{place}: {name!r} is blank", expected="a string with text")
    return value


def id_string(row: dict[str, Any], name: str, place: str) -> str:
    """The field ``name`` of a row, an id: a string with text, or a whole number, as some files have
    it; raises :class:`DataError`.
    """
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return clean_text(string(row, name, place, filled=True))


def string_list(
    row: dict[str, Any], name: str, place: str, *, ids: bool = False
) -> tuple[str, ...]:
    """The field ``name`` of a row, a list of strings (of ids also whole numbers), each once; raises
    :class:`DataError`.
    """
    if name not in row:
        raise DataError(
            f"{place}: the field {name!r} is missing",
            expected=f"a row with {name!r}, got {sorted(row)}",
        )
    value = row[name]
    if not isinstance(value, list):
        raise DataError(f"{place}: {name!r} is {kind_of(value)}", expected="a list of strings")
    if ids:
        value = [str(each) if type(each) is int else each for each in value]
    for item in value:
        if not isinstance(item, str):
            raise DataError(
                f"{place}: {name!r} holds {kind_of(item)}", expected="a list of strings"
            )
    return tuple(dict.fromkeys(value))


def metadata(row: dict[str, Any], names: Iterable[str], place: str) -> tuple[tuple[str, str], ...]:
    """(name, value as text) of those fields that a row has; raises :class:`DataError` for a value
    that is no text, whole number or truth value.
    """
    found = []
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, int):
            value = str(value)
        elif not isinstance(value, str):
            raise DataError(
                f"{place}: the metadata {name!r} is {kind_of(value)}",
                expected="a string, a whole number, a truth value or null",
                action="change the row, or leave the name out of corpus.metadata",
            )
        found.append((name, clean_text(value)))
    return tuple(found)


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")
