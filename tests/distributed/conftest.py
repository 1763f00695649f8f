"""One launch per world size for all tests of the engine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.launch import launch
from tests.distributed.small_store import small_store


class EngineRuns:
    """What the engine's worker processes wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, name: str) -> dict[str, Tensor]:
        return load_file(self._folder / f"{name}.safetensors")


@pytest.fixture(scope="session")
def engine_runs(tmp_path_factory: pytest.TempPathFactory) -> EngineRuns:
    """One process without DeepSpeed and two ranks with it, at the same time."""
    folder = tmp_path_factory.mktemp("engine")
    small_store(folder / "s")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda world: launch(folder, world), (1, 2)))
    return EngineRuns(folder)
