"""What a run says: one line a finished step, how far the run is and how long it will still take.

On a terminal the last line moves; in a file or a job's log nothing does, and a long step says where
it stands every one to five minutes.  What only helps to find a fault is said with ``-v``
(:func:`detail`).  Workers of a local Ray hand their lines to the driver, which knows the run
(:func:`from_worker`); what else they print, Ray's own notices above all, is shown with ``-v`` only.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from typing import Any

_VERBOSE = "INVAR_VERBOSE"
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
_LOG_EVERY_S = (60.0, 300.0)
_LOG_SHARE = 0.1
"""A log hears of a long step after so much of the whole run's time, within these limits: a slow
machine says no more than a quick one."""
_WORKER_EVERY_S = 1.0
_WORTH_A_LINE_S = (5.0, 60.0)
_WORTH_A_LINE = 0.02
"""A step that took a smaller share of what the whole run was thought to take, within these limits
in seconds, is counted, and printed with ``-v`` only."""
_TRUSTED_SHARE = 0.2
"""Of a step: from here on how long the rest takes is judged by how long this took."""
_AS_LINE, _AS_PROGRESS = "invar-says ", "invar-progress "

_TURNS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]+")

in_worker = False
"""Set in the processes of a local Ray: what they say goes to the driver."""


def set_verbose() -> None:
    """Say everything, in this process and in those that it starts."""
    os.environ[_VERBOSE] = "1"


def is_verbose() -> bool:
    """Whether everything is said."""
    return os.environ.get(_VERBOSE) == "1"


def say(text: str) -> None:
    """A line on standard error, above the one that moves."""
    if in_worker:
        print(f"{_AS_LINE}{text}", flush=True)
    else:
        run.line(text)


def detail(text: str) -> None:
    """A line that only helps to find a fault, or to tune a run."""
    if is_verbose():
        say(text)


def from_worker(line: str) -> None:
    """A line that a worker of a local Ray printed: its progress, something to say, or noise."""
    if line.startswith(_AS_PROGRESS):
        run.progress(**json.loads(line.removeprefix(_AS_PROGRESS)))
    elif line.startswith(_AS_LINE):
        run.line(line.removeprefix(_AS_LINE))
    else:
        detail(f"  worker: {line}")


def quieten_libraries() -> None:
    """For entry points: no progress bars and notices of other libraries between a run's own lines.
    It imports none of them: they read the environment when they are imported.
    """
    if is_verbose():
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if "transformers" in sys.modules:  # too late for the environment
        notices = sys.modules["transformers"].utils.logging
        notices.disable_progress_bar()
        notices.set_verbosity_error()
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it speaks of every oddity that it mends
    # DeepSpeed sets its own level when it is imported; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def label(text: str) -> str:
    """A title or a place for one line on a page or in a terminal: without control characters, and
    without those that turn the direction of what stands after them.
    """
    return _TURNS.sub(" ", text).strip()


def duration(seconds: float) -> str:
    """``40 s``, ``3 min`` or ``2 h 10 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


class Run:
    """The steps of a run, of which some are done: what is said about them.

    There is one a process (:data:`run`); its methods may be called from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._live: Any = None
        self.expect(())

    def expect(self, steps: Iterable[tuple[str, float]]) -> None:
        """What will be done: (label, seconds that it may take); replaces what was expected."""
        with self._lock:
            self._left = dict(steps)
            self._total, self._done = len(self._left), 0
            self._took = self._guessed = 0.0
            self._label, self._started, self._share = "", time.monotonic(), 0.0
            self._said = self._began = time.monotonic()
            least, most = _WORTH_A_LINE_S
            self._worth = min(most, max(least, _WORTH_A_LINE * sum(self._left.values())))

    def begin(self, label: str) -> None:
        """A step begins."""
        with self._lock:
            self._label, self._share = label, 0.0
            self._started = self._said = time.monotonic()
            detail(f"{label} ...")
            self._show("")

    def end(self, label: str, note: str = "", *, reused: bool = False) -> None:
        """A step is done; ``note`` is said with ``-v``, ``reused``: it stood already."""
        with self._lock:
            seconds = 0.0 if reused else time.monotonic() - self._started
            guess = self._left.pop(label, None)
            self._done += guess is not None
            if guess is not None and not reused:
                self._took, self._guessed = self._took + seconds, self._guessed + guess
            self._label = ""
            if is_verbose() or (seconds >= self._worth and not reused):
                count = f"[{self._done:>2}/{self._total}] " if guess is not None else ""
                what = "stands" if reused else duration(seconds)
                text = f"{count}{label}: {what}{f' -> {note}' if note and is_verbose() else ''}"
                left = self.seconds_left()
                self.line(f"{text:<66} {f'about {duration(left)} left' if left else ''}".rstrip())
            self._hide()

    def progress(self, label: str, done: int, total: int, unit: str, note: str = "") -> None:
        """How far the present step is."""
        with self._lock:
            self._share = done / total if total else 0.0
            of = f"/{total:,}" if total else ""
            text = f"{label}: {done:,}{of} {unit}{f', {note}' if note else ''}"
            self._show(text)
            now = time.monotonic()
            if _is_terminal() or done >= (total or done + 1):
                return
            left = self.seconds_left()
            least, most = _LOG_EVERY_S
            if now - self._said >= min(most, max(least, _LOG_SHARE * (now - self._began + left))):
                self._said = now
                self.line(f"  {text}{f'; about {duration(left)} left in all' if left else ''}")

    def seconds_left(self) -> float:
        """Of all steps that are expected, by how long those took that are done; 0: not known."""
        with self._lock:
            left = dict(self._left)
            now = left.pop(self._label, 0.0) if self._label else 0.0
            speed = self._took / self._guessed if self._guessed else 1.0
            passed = time.monotonic() - self._started
            here = max(0.0, speed * now - passed)
            if now and self._share > 0:
                # A beginning holds the start of processes: it says little of what is to come.
                trust = min(1.0, self._share / _TRUSTED_SHARE)
                found = passed / self._share * (1 - self._share)
                here = trust * found + (1 - trust) * here
            return here + speed * sum(left.values())

    def line(self, text: str) -> None:
        """A line that stays."""
        with self._lock:
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Leave the terminal as it was: something failed, or asks for it."""
        with self._lock:
            self._hide()

    def _show(self, text: str) -> None:
        """The line that moves, on a terminal; rich is imported only there."""
        if not _is_terminal():
            return
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), transient=True, refresh_per_second=4)
            self._live.start()
        left = self.seconds_left()
        parts = [f"[{self._done + 1}/{self._total}] " if self._total else "", text or self._label]
        parts.append(f"   about {duration(left)} left in all" if left else "")
        from rich.text import Text

        self._live.update(Text("".join(parts), overflow="ellipsis", no_wrap=True, style="dim"))

    def _hide(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


run = Run()


def _is_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class Progress:
    """How far a piece of work is: said by :data:`run` here, handed to the driver in a worker.

    Args:
        label: what is going on.
        total: how much there is; 0 if unknown.
        unit: of what.
        done: how much stood before.
    """

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0) -> None:
        self.label, self._total, self._unit, self._done = label, total, unit, done
        self._last = float("-inf")

    def advance(self, count: int, note: str = "") -> None:
        """``count`` more are done."""
        self._done += count
        values = {
            "label": self.label,
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
            "note": note,
        }
        now = time.monotonic()
        if not in_worker:
            run.progress(**values)  # type: ignore[arg-type]
        elif now - self._last >= _WORKER_EVERY_S or self._done >= self._total:
            self._last = now
            print(f"{_AS_PROGRESS}{json.dumps(values)}", flush=True)
