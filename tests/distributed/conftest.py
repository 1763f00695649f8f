"""One launch per world size for all tests of the engine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

WORKER = Path(__file__).with_name("engine_worker.py")
LAUNCH_TIMEOUT_S = 400


class EngineRuns:
    """What the engine's worker processes wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, name: str) -> dict[str, Tensor]:
        return load_file(self._folder / f"{name}.safetensors")


@pytest.fixture(scope="session")
def engine_runs(tmp_path_factory: pytest.TempPathFactory) -> EngineRuns:
    """One process without DeepSpeed, then two ranks with it."""
    folder = tmp_path_factory.mktemp("engine")
    _launch(folder, 1)
    _launch(folder, 2)
    return EngineRuns(folder)


def _launch(folder: Path, world: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "DS_LOG_LEVEL": "error"}
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
            ]
            environment = os.environ | group | path | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with open(log, "w") as stream:
                processes.append(subprocess.Popen(command, env=environment, stdout=stream, stderr=stream))
        # If one fails the others would wait for it: look at all of them.
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline or any(process.poll() not in (None, 0) for process in processes):
                break
            time.sleep(0.2)
        faults = [
            f"rank {rank}: rc {process.poll()}\n{log.read_text()[-3000:]}"
            for rank, (process, log) in enumerate(zip(processes, logs, strict=True))
            if process.poll() != 0
        ]
        assert not faults, "\n".join(faults)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
