"""What all commands and jobs share: one clear error instead of a traceback, and a clean end on
Ctrl-C.
"""

from __future__ import annotations

import errno
import io
import os
import re
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
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
# Faults of the machine -> what to do.
_MACHINE = {
    errno.ENOSPC: "free some disk, or set storage.root_uri and TMPDIR to another one",
    errno.EDQUOT: "free some of your quota, or set storage.root_uri to another disk",
    errno.EROFS: "set storage.root_uri to a folder that can be written",
    errno.EACCES: "check the rights, or set storage.root_uri to a folder of yours",
    errno.EPERM: "check the rights, or set storage.root_uri to a folder of yours",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EIO: "look at the disk: it cannot be read or written there",
    errno.ENAMETOOLONG: "use a shorter path",
    errno.ENOTDIR: "check the path: a part of it is no folder",
    errno.ENOMEM: "free some memory, or raise its limit (ulimit -v)",
    errno.ESTALE: "mount the disk again",
}
_SAID = re.compile(r"\(os error (\d+)\)|Cannot allocate memory|can't allocate memory")


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
    """A user's mistake prints one error and exits 1, so does a fault of the machine (a full disk,
    a folder that cannot be written); Ctrl-C and SIGTERM clean up and exit 130.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    reach_loopback_directly()
    try:
        os.getcwd()
    except FileNotFoundError as error:
        print("error: the current folder is gone. To do: cd to one that exists.", file=sys.stderr)
        raise SystemExit(1) from error
    for stream in (sys.stdout, sys.stderr):  # an ASCII terminal shows what it can
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except InvarError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except Exception as error:
        number = _errno(error)
        if number not in _MACHINE:
            raise
        name = getattr(error, "filename", None)
        where = f" ({name})" if name else ""
        print(f"error: {os.strerror(number)}{where}. To do: {_MACHINE[number]}.", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        print("interrupted; what was finished stands, run again to go on", file=sys.stderr)
        raise SystemExit(130) from error


def _errno(error: BaseException) -> int:
    """The operating system's number of a fault; 0 if it is none.  Libraries in C++ and Rust say it
    in their sentence alone.
    """
    if isinstance(error, OSError):
        return error.errno or 0
    said = _SAID.search(str(error))
    if isinstance(error, MemoryError) or (said and not said.group(1)):
        return errno.ENOMEM
    return int(said.group(1)) if said else 0


def reach_loopback_directly() -> None:
    """Where the environment names a proxy, let this machine's own addresses go without it: Ray and
    the clients of the service talk to themselves.
    """
    if not any(os.environ.get(name) for name in _PROXIES):
        return
    for name in ("no_proxy", "NO_PROXY"):
        known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        parts = [part.strip() for part in known.split(",") if part.strip()]
        if "*" not in parts:
            os.environ[name] = ",".join(dict.fromkeys([*parts, *_LOOPBACK]))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
