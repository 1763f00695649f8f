"""What all commands and jobs share: one clear error instead of a traceback, and a clean end on
Ctrl-C.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import ParamSpec

from invar_ray.console import quieten_libraries
from invar_ray.errors import InvarError

P = ParamSpec("P")


def explain_errors(
    command: Callable[P, None], early: Callable[P, None] | None = None
) -> Callable[P, None]:
    """The command, with its errors as :func:`explained` has them.

    Args:
        command: the command.
        early: runs before it with the same arguments, and before Ray and transformers are imported,
            which takes seconds on a busy machine: for mistakes that can be seen at once.
    """

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with explained():
            if early is not None:
                early(*args, **kwargs)
            quieten_libraries()
            command(*args, **kwargs)

    return run


@contextmanager
def explained() -> Iterator[None]:
    """A user's mistake prints one error and exits 1; Ctrl-C and SIGTERM clean up and exit 130."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    except InvarError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        print("interrupted; what was finished stands, run again to go on", file=sys.stderr)
        raise SystemExit(130) from error


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
