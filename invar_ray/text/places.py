"""Offsets into places that a person can turn to: ``manual.pdf, page 3`` or
``notes.md, "Install", lines 12-30``.
"""

from __future__ import annotations

import bisect
import re

from invar_ray.schema import Document

_SEPARATORS = {"line": "\n", "paragraph": "\n\n", "row": "\n\n", "item": "\n\n"}
_NUMBERED = re.compile(r"(\w+) (\d+)")
_LABEL_CHARS = 80


class PlaceFinder:
    """Names spans of one document.

    Args:
        document: its ``places`` are ascending; one without a ``file`` has no places.
    """

    def __init__(self, document: Document) -> None:
        self._document = document
        self._starts = [place.start for place in document.places]
        self._separator = _SEPARATORS.get(document.unit, "")
        self._offset, self._number = 0, 1

    def of(self, start: int, end: int) -> str:
        """The place of ``text[start:end]``; empty for a document without a file.  Quickest with
        rising starts.
        """
        if not self._document.file:
            return ""
        parts = [self._document.file]
        first, last = self._label(start), self._label(max(start, end - 1))
        if first or last:
            parts.append(_joined(first, last))
        if self._separator:
            number = self._count_to(start)
            parts.append(
                _joined(
                    f"{self._document.unit} {number}",
                    f"{self._document.unit} {self._ending(end, number)}",
                )
            )
        return ", ".join(parts)

    def _label(self, offset: int) -> str:
        at = bisect.bisect_right(self._starts, offset) - 1
        label = self._document.places[at].label if at >= 0 else ""
        if len(label) <= _LABEL_CHARS:
            return label
        return (
            label[: _LABEL_CHARS - 2] + "…" + label[-1:]
            if label.endswith('"')
            else label[:_LABEL_CHARS]
        )

    def _count_to(self, offset: int) -> int:
        if offset < self._offset:
            self._offset, self._number = 0, 1
        self._number += self._document.text.count(self._separator, self._offset, offset)
        self._offset = offset
        return self._number

    def _ending(self, end: int, number: int) -> int:
        return number + self._document.text.count(self._separator, self._offset, end)


def _joined(first: str, last: str) -> str:
    if first == last or not last:
        return first
    if not first:
        return last
    one, two = _NUMBERED.fullmatch(first), _NUMBERED.fullmatch(last)
    if one and two and one.group(1) == two.group(1):
        return f"{one.group(1)}s {one.group(2)}-{two.group(2)}"
    return f"{first} to {last}"
