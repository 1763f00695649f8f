"""What an embedding actor frees it keeps: page faults are counted in a process that starts as a Ray
worker does.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from invar_ray.session import _WORKER_ENV

SCRIPT = """
import resource, torch
from invar_ray.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**21)  # 8 MiB, as an activation of 4,096 tokens
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(2**21)
before, understood = faults(), keep_freed_memory()
faults()  # the heap grows once
print(before, understood, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_blocks_are_used_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | _WORKER_ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, understood, after = done.stdout.split()
    assert understood == "True"
    assert int(before) >= 20, "a worker's blocks are mapped anew each time"
    assert int(after) <= int(before) / 10
