"""What was left out of a folder, and why: one line each."""

from __future__ import annotations

import sys

from invar_ray.progress import Progress

_SHOWN = 20


class ReadLog:
    """Collects the lines of what a folder's reading leaves out.

    A reader that is given a log leaves out what it cannot read of a *folder* and says so here; without one, or for a
    file that was named itself, the first fault is raised.

    Args:
        echo: print the first lines, and progress, to standard error.

    Attributes:
        lines: what was left out, why, and what to do; in reading order.
    """

    def __init__(self, *, echo: bool = False) -> None:
        self.lines: list[str] = []
        self._echo = echo
        self._progress: Progress | None = None

    def skip(self, line: str) -> None:
        """Something is left out."""
        self.lines.append(line)
        if self._echo:
            echo_lines(self.lines, first=len(self.lines) - 1)

    def start(self, files: int) -> None:
        """Reading of so many files begins."""
        if self._echo:
            self._progress = Progress("read", files, "files")

    def read(self, files: int = 1) -> None:
        """So many files more are done with."""
        if self._progress is not None:
            self._progress.advance(files)


def echo_lines(lines: list[str], first: int = 0) -> None:
    """Print ``lines`` from number ``first`` on, of all of them the first 20, and where to find the others."""
    for number in range(first, len(lines)):
        if number < _SHOWN:
            print(f"  left out: {lines[number]}", file=sys.stderr, flush=True)
        elif number == _SHOWN:
            print(
                "  left out: more; all of them are in skipped.txt of the passages artifact", file=sys.stderr, flush=True
            )
