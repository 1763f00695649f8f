"""Starts the ranks of the engine's tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

WORKER = Path(__file__).with_name("engine_worker.py")
LAUNCH_TIMEOUT_S = int(os.environ.get("INVAR_LAUNCH_TIMEOUT_S", "600"))


def launch(folder: Path, world: int, grid: str = "pairwise") -> None:
    """Run engine_worker.py on ``world`` ranks; what they write lies in ``folder``.

    Raises:
        RuntimeError: with the end of the logs, if a rank fails or time is up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "DS_LOG_LEVEL": "error",
    }
    path = {"PYTHONPATH": str(WORKER.parents[2])}
    processes = []
    logs = [folder / f"w{world}-r{rank}.log" for rank in range(world)]
    deadline = time.monotonic() + LAUNCH_TIMEOUT_S
    try:
        for rank, log in enumerate(logs):
            command = [
                sys.executable,
                "-W",
                "ignore",
                str(WORKER),
                str(folder / "s"),
                str(folder),
                str(rank),
                str(world),
                grid,
            ]
            environment = os.environ | group | path | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(log, "w") as stream:
                processes.append(
                    subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
                )
        # If one fails the others would wait for it: look at all of them.
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline or any(
                process.poll() not in (None, 0) for process in processes
            ):
                break
            time.sleep(0.2)
        faults = [
            f"rank {rank}: rc {process.poll()}\n{log.read_text()[-3000:]}"
            for rank, (process, log) in enumerate(zip(processes, logs, strict=True))
            if process.poll() != 0
        ]
        if faults:
            raise RuntimeError("\n".join(faults))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
