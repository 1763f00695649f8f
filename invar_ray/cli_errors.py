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


def clear_errors(command: Callable[P, None]) -> Callable[P, None]:
    """A user's mistake prints one error and exits 1; Ctrl-C and SIGTERM clean up and exit 130."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        from invar_ray.session import quieten_libraries

        signal.signal(signal.SIGTERM, _interrupt)
        quieten_libraries()
        try:
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
