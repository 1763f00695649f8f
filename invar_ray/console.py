"""One line of progress now and then: done, rate, time left.  Works in terminals and in job logs
alike.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def quieten_libraries() -> None:
    """For entry points: no progress bars and notices of other libraries between a run's own lines.
    It imports none of them: they read the environment when they are imported.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if "transformers" in sys.modules:  # too late for the environment
        notices = sys.modules["transformers"].utils.logging
        notices.disable_progress_bar()
        notices.set_verbosity_error()
    for place in ("pypdf", "DeepSpeed"):  # they speak of every oddity that they mend
        logging.getLogger(place).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


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
