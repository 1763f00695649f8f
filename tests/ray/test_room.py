"""More than a cluster has is refused within a minute, where Ray would wait for ever: on a Ray that
believes in two GPUs.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from invar_ray import session
from invar_ray.errors import ResourceError
from invar_ray.pipeline import Pipeline
from tests.distributed.small_store import small_config, small_store
from tests.ray.test_training import OVERRIDES

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ON_GPUS = ["scale.use_gpu=true", "model.precision=fp32", "scale.cpus_per_worker=0.5"]
REFRESHED = [
    "experimental.retriever.refresh_every=2",
    "scale.num_workers=2",
    "scale.embed_gpus_per_worker=1",
]


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[None]:
    """A Ray of its own; nothing is ever placed on these GPUs."""
    ray.shutdown()
    folder = tempfile.mkdtemp(prefix="ig", dir="/tmp")
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,
        include_dashboard=False,
        object_store_memory=128 * 1024**2,
        _temp_dir=folder,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with everything that comes before stage 1."""
    root = tmp_path_factory.mktemp("room") / "s"
    small_store(root, OVERRIDES)
    return root


@pytest.fixture(autouse=True)
def nodes_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_NODES_JOIN_S", 1.0)


def refused(root: Path, *overrides: str) -> str:
    """What a training is refused with."""
    started = time.monotonic()
    with Pipeline(small_config(root, [*OVERRIDES, *ON_GPUS, *overrides]), quiet=True) as pipeline:
        assert pipeline.trainset
        with pytest.raises(ResourceError) as caught:
            assert pipeline.retriever
    assert time.monotonic() - started < 60
    return str(caught.value)


def test_more_training_workers_than_gpus(two_gpus: None, prepared: Path) -> None:
    assert refused(prepared, "scale.num_workers=4") == (
        "training of the retriever asks for 4 x (0.5 CPUs, 1 GPU); Ray has room for 2 of these 4 "
        "(nodes: 1 x (4 CPUs, 2 GPUs)). To do: lower scale.num_workers or scale.cpus_per_worker, "
        "or add nodes."
    )


def test_refreshed_negatives_need_a_gpu_that_training_leaves(
    two_gpus: None, prepared: Path
) -> None:
    message = refused(prepared, *REFRESHED)
    assert "with refreshed negatives beside it asks for 2 x (0.5 CPUs, 1 GPU)" in message
    assert "room for 4 of these 5" in message
    assert "To do: leave a GPU to the embedding (scale.num_workers below the number of" in message


def test_an_embedding_actor_that_fits_no_node(two_gpus: None, tmp_path: Path) -> None:
    config = small_config(tmp_path / "s", ["scale.embed_gpus_per_worker=3"])
    with Pipeline(config, quiet=True) as pipeline:
        with pytest.raises(ResourceError, match=r"embed base asks for 1 x \(1 CPU, 3 GPUs\)"):
            assert pipeline.base_index


@pytest.mark.slow
def test_gpus_that_others_hold_are_waited_for_and_not_for_ever(
    two_gpus: None, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are room for the check, and a limit to the starts ends the wait."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")

    @ray.remote(num_gpus=2, num_cpus=0)
    class Holder:
        def ready(self) -> bool:
            return True

    holder = Holder.remote()
    assert ray.get(holder.ready.remote())
    try:
        message = refused_after_all(prepared)
    finally:
        ray.kill(holder)
    assert "training of the retriever failed" in message


def refused_after_all(root: Path) -> str:
    config = small_config(root, [*OVERRIDES, *ON_GPUS, "scale.num_workers=1"])
    with Pipeline(config, quiet=True) as pipeline, pytest.raises(ResourceError) as caught:
        assert pipeline.retriever
    return str(caught.value)
