"""The heap of a process that computes on CPUs: blocks that it frees stay with it."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
LARGEST, KEPT = 32 * 2**20, 512 * 2**20
# more than two of the 64 MiB heaps of a thread, which would be given back when empty
_PAD = 128 * 2**20


def keep_freed_memory() -> bool:
    """Serve blocks of up to 32 MiB from this process's heap, and give none of it back below 512
    MiB.

    A local Ray's workers map each block of 1 MiB or more by itself and give it back at once
    (:mod:`invar_ray.executor`): training, whose batches have ever other shapes, holds less memory
    that way, and waits longer (``scale.keep_freed_memory`` decides).  Encoding goes through the
    same few shapes again and again, by a budget of tokens; there the kernel would have to clear the
    pages of every activation anew.

    Returns:
        Whether this process's ``malloc`` understands it: glibc's does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Ray Data calls an actor's function in a thread of its own, whose heap is not the main one:
    # hence the padding.
    settings = ((_MMAP_THRESHOLD, LARGEST), (_TRIM_THRESHOLD, KEPT), (_TOP_PAD, _PAD))
    return all(mallopt(option, value) for option, value in settings)
