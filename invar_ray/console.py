"""One line of progress now and then: done, rate, time left.  Works in terminals and in job logs
alike.
"""

from __future__ import annotations

import sys
import time


class Progress:
    """Prints ``label: done/total unit, rate, ETA`` at most every ``every_s`` seconds, and once at
    the end.

    Args:
        label: what is going on.
        total: how much there is; 0 if unknown.
        unit: of what.
        done: how much stood before (resumed work does not count for the rate).
    """

    def __init__(
        self, label: str, total: int, unit: str, *, done: int = 0, every_s: float = 5.0
    ) -> None:
        self.label, self._total, self._unit, self._every_s = label, total, unit, every_s
        self._done = self._start_done = done
        self._start = self._last = time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        """``count`` more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._last >= self._every_s or (self._total and self._done >= self._total):
            self._last = now
            self._print(now, note)

    def _print(self, now: float, note: str) -> None:
        elapsed = max(now - self._start, 1e-9)
        rate = (self._done - self._start_done) / elapsed
        of = f"/{self._total:,}" if self._total else ""
        parts = [f"{self.label}: {self._done:,}{of} {self._unit}", f"{rate:,.1f} {self._unit}/s"]
        if self._total and rate > 0:
            left = (self._total - self._done) / rate
            parts.append(f"ETA {left:.0f} s" if left > 0 else f"took {elapsed:.0f} s")
        if note:
            parts.append(note)
        print("  " + ", ".join(parts), file=sys.stderr, flush=True)
