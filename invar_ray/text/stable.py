"""Draws that are the same in every process and on every machine: Python's ``hash()`` is salted per
process.
"""

from __future__ import annotations

import hashlib
import random


def stable_hash(*parts: object) -> int:
    """A 64-bit number from the texts of ``parts``; ``("ab", "c")`` and ``("a", "bc")`` differ."""
    joined = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(
        hashlib.sha256(joined.encode("utf-8", "surrogatepass")).digest()[:8], "big"
    )


def stable_random(*parts: object) -> random.Random:
    """A generator of its own, seeded by :func:`stable_hash` of ``parts``."""
    return random.Random(stable_hash(*parts))
