"""What was left out of a folder, and why: one line each."""

from __future__ import annotations

import json
import re
from pathlib import Path

from invar_ray import console
from invar_ray.console import Progress
from invar_ray.errors import DataError

_SHOWN = 20
_NAMED = re.compile(r"\S(?:.*?\S)?\.\w{1,8}(?=[ :])")
_FEW_ROWS = 1000


class Quarantine:
    """Where malformed rows of JSON lines, TSV and Parquet files go: a JSON line each, with file,
    line and reason.

    Args:
        path: written when the first row comes.
        max_share: of all rows; above it reading stops.

    Attributes:
        rows: rows seen.
        bad: rows put aside.
        is_full: the share was exceeded.
    """

    def __init__(self, path: Path, max_share: float) -> None:
        self.path = path
        self.rows = self.bad = 0
        self.is_full = False
        self._max_share = max_share
        self._first: DataError | None = None

    def put(self, file: str, number: int, error: DataError, excerpt: str) -> None:
        """Put a row aside; ``error`` says why."""
        self.bad += 1
        self._first = self._first or error
        entry = {"file": file, "line": number, "reason": str(error), "row": excerpt}
        with open(self.path, "a", encoding="utf-8", errors="replace") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def check(self, *, at_end: bool, strict: bool) -> None:
        """Stop when too much is malformed.

        Args:
            at_end: all is read; before, the share is judged once 1,000 rows are.
            strict: judge it at the end of fewer rows too: of a file that was named itself.

        Raises:
            DataError: the share is above the limit.
        """
        judged = self.rows >= _FEW_ROWS or (at_end and strict)
        if judged and self.bad > self._max_share * self.rows:
            self.is_full = True
            raise DataError(
                f"{self.bad:,} of {self.rows:,} rows are malformed (first: "
                f"{str(self._first).rstrip('.')})",
                expected=f"a share of at most {self._max_share:g} (corpus.max_malformed_share)",
                action="mend them, or raise corpus.max_malformed_share to go on without them",
            ) from self._first


class ReadLog:
    """Collects the lines of what a folder's reading leaves out.

    A reader that is given a log leaves out what it cannot read of a *folder* and says so here;
    without one, or for a file that was named itself, the first fault is raised.

    Args:
        echo: print the first lines, and progress, to standard error.
        quarantine: takes malformed rows, also those of a file that was named itself.

    Attributes:
        lines: what was left out or guessed, why, and what to do; in reading order.
        files: how many files were left out.
    """

    def __init__(self, *, echo: bool = False, quarantine: Quarantine | None = None) -> None:
        self.lines: list[str] = []
        self.files = 0
        self.quarantine = quarantine
        self._echo = echo
        self._said = 0
        self._progress: Progress | None = None

    def skip(self, line: str, files: int = 1) -> None:
        """Something is left out: so many whole files, or (0) a part of one."""
        self.lines.append(line)
        self.files += files

    def say(self) -> None:
        """Print what has come since the last time, if lines are printed at all."""
        if self._echo:
            echo_lines(self.lines[self._said :])
        self._said = len(self.lines)

    def start(self, files: int) -> None:
        """Reading of so many files begins."""
        if self._echo:
            self._progress = Progress("read", files, "files")

    def read(self, files: int = 1) -> None:
        """So many files more are done with."""
        if self._progress is not None:
            self._progress.advance(files)


def echo_lines(lines: list[str]) -> None:
    """Print lines, those that differ in the file's name alone as one, of all of them the first 20;
    and where to find the others.
    """
    groups: dict[str, list[str]] = {}
    for line in lines:
        # "NAME.pdf is encrypted. To do: ..": the name ends where an ending does.
        match = _NAMED.match(line)
        groups.setdefault(line[match.end() :] if match else line, []).append(line)
    for number, (rest, alike) in enumerate(groups.items()):
        if number == _SHOWN:
            console.say("  left out: more; all of them are in skipped.txt of the passages artifact")
            return
        first = alike[0].removesuffix(rest)
        line = alike[0] if len(alike) == 1 else f"{len(alike)} files (first: {first}){rest}"
        what = "note" if "(a guess)" in line or "read by OCR" in line else "left out"
        console.say(f"  {what}: {line}")
