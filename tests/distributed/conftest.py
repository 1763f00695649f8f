"""One launch per world size for all tests of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.engine_worker import BF16_OVERRIDES
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
    return runs_in(tmp_path_factory.mktemp("engine"), "pairwise")


@pytest.fixture(scope="session")
def bf16_runs(tmp_path_factory: pytest.TempPathFactory) -> EngineRuns:
    """The same with the two ranks in bf16, and a projection."""
    return runs_in(tmp_path_factory.mktemp("bf16"), "bf16", BF16_OVERRIDES)


def runs_in(folder: Path, grid: str, overrides: Sequence[str] = ()) -> EngineRuns:
    small_store(folder / "s", overrides)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda world: launch(folder, world, grid), (1, 2)))
    return EngineRuns(folder)
