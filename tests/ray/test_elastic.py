"""Elastic workers: a node that joins is used, and the loss stays on the curve of a fixed number of
workers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from invar_ray.training import trainer
from tests.distributed.small_store import small_store
from tests.ray.test_training import copied, log_of, train

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 40
OVERRIDES = (
    f"retriever.steps={STEPS}",
    "retriever.lora.dropout=0",  # its masks follow the rank
    "retriever.optimizer.learning_rate=0.003",
    "scale.checkpoint_every=4",
    "scale.cpus_per_worker=1",  # Ray counts whole ones for elastic groups
    "experimental.scale.resize_every_s=5",
)
_NODE = {"object_store_memory": 128 * 1024**2}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head with one CPU, connected; it is this test's own, and stopped by its processes."""
    import ray
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ie", dir="/tmp")
    os.environ["RAY_TMPDIR"] = folder
    os.mkdir(f"{folder}/ray")
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": False,
            "temp_dir": f"{folder}/ray",
            **_NODE,
        },
    )
    ray.shutdown()  # of the one that other tests share, if it runs
    ray.init(address=made.address, log_to_driver=False)
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        os.environ.pop("RAY_TMPDIR", None)
        shutil.rmtree(folder, ignore_errors=True)


def slow_work(folder: Path) -> Callable[[dict[str, Any]], Any]:
    """The training function with steps that take two seconds and are noted, so that a node can join
    meanwhile.
    """
    place = str(folder)

    def work(payload: dict[str, Any]) -> Any:
        import time
        from pathlib import Path

        from invar_ray.training.worker import STAGES, train_worker

        real = STAGES[payload["stage"]]

        def make(config: Any, store: Any, inputs: Any, rank: int, world_size: int) -> Any:
            stage = real(config, store, inputs, rank, world_size)
            plain_loss = stage.loss

            def loss(forward: Any, step: int) -> Any:
                if rank == 0:
                    with open(Path(place) / "steps", "a") as stream:
                        stream.write(f"{step}:{world_size} ")
                if world_size == 1:
                    time.sleep(2)
                return plain_loss(forward, step)

            stage.loss = loss
            return stage

        STAGES[payload["stage"]] = make
        return dict(train_worker(payload))

    return work


def begun(folder: Path) -> int:
    """Steps that workers began so far."""
    with contextlib.suppress(FileNotFoundError):
        return len((folder / "steps").read_text().split())
    return 0


def test_a_node_that_joins_is_used_and_the_curve_stays(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = tmp_path / "s"
    small_store(prepared, OVERRIDES)
    fixed = log_of(train(copied(prepared, "fixed"), "retriever", *OVERRIDES, "scale.num_workers=1"))
    assert all("workers" not in record for record in fixed)

    monkeypatch.setattr(trainer, "_work", slow_work(tmp_path))
    place = copied(prepared, "elastic")
    # the training's thread: Ray starts nodes in the main one only
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train, place, "retriever", *OVERRIDES, "scale.num_workers=[1, 2]")
        while not training.done() and begun(tmp_path) < 5:
            time.sleep(0.5)
        cluster.add_node(num_cpus=1, **_NODE)
        found = log_of(training.result())

    workers = [int(record["workers"]) for record in found]
    assert workers == sorted(workers), workers
    assert set(workers) == {1, 2}, "the group never grew: the test proves nothing"
    assert (
        [record["step"] for record in found]
        == [record["step"] for record in fixed]
        == list(range(1, STEPS + 1))
    )
    for record, other in zip(found, fixed, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-3), record["step"]
    assert found[0]["loss"] - found[-1]["loss"] > 0.1, "nothing was learnt: any run has this curve"
