"""What all commands share: one clear error instead of a traceback, and a clean end on Ctrl-C."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import ParamSpec

import typer

from invar_ray.errors import InvarError

P = ParamSpec("P")


def explain_errors(
    command: Callable[P, None], early: Callable[P, None] | None = None
) -> Callable[P, None]:
    """A user's mistake prints one error and exits 1; Ctrl-C and SIGTERM clean up and exit 130.

    Args:
        command: the command.
        early: runs before it with the same arguments, and before Ray and transformers are imported,
            which takes seconds on a busy machine: for mistakes that can be seen at once.
    """

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            if early is not None:
                early(*args, **kwargs)
            from invar_ray.session import quieten_libraries

            quieten_libraries()
            command(*args, **kwargs)
        except InvarError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            print("interrupted; what was finished stands, run again to go on", file=sys.stderr)
            raise typer.Exit(130) from error

    return run


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
