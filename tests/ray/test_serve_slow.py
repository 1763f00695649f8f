"""The service while replicas die and come, on a local Ray: minutes each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.app import AppArgs, start, stop
from tests.serving import Artifacts, shared_artifacts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return shared_artifacts(tmp_path_factory)


def test_no_request_fails_while_replicas_die_and_the_index_changes(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    seconds = os.environ.get("INVAR_CHAOS_SECONDS", "180")
    command = [
        *(
            sys.executable,
            str(ROOT / "benchmarks" / "serve_chaos.py"),
            "--index",
            artifacts.index_uri,
        ),
        *("--other", artifacts.other_index_uri, "--broken", artifacts.scrambled_index_uri),
        *(
            "--generator",
            artifacts.generator_uri,
            "--seconds",
            seconds,
            "--out",
            str(tmp_path / "chaos.json"),
        ),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850)
    assert (tmp_path / "chaos.json").exists(), done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads((tmp_path / "chaos.json").read_text())
    print(json.dumps(result, indent=1))
    assert result["failed"] == 0, result
    assert result["faults of the drill"] == []
    assert result["answered"] == result["asked"] > 20
    assert len(result["answers by index version"]) == 2
    assert done.returncode == 0


@pytest.fixture
def scaling(local_ray: Any, artifacts: Artifacts) -> Iterator[str]:
    args = AppArgs(
        index_uri=artifacts.index_uri,
        generator_uri=artifacts.generator_uri,
        published="",
        ingress_replicas=(1, 1),
        retriever_replicas=(1, 1),
        generator_replicas=(1, 2),
        num_cpus_per_replica=0.2,
        target_ongoing_requests=1,
        upscale_delay_s=1,
        downscale_delay_s=3,
        graceful_shutdown_timeout_s=3,
        max_new_tokens=32,
    )
    yield start(args, port=0, ready_timeout_s=400)
    stop()


def test_load_adds_a_replica_and_calm_takes_it_away(scaling: str) -> None:
    from ray import serve

    def running() -> int:
        deployment = serve.status().applications["invar-ray"].deployments["GeneratorDeployment"]
        return int(deployment.replica_states.get("RUNNING", 0))

    def until(condition: Callable[[], bool], timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{running()} replicas"
            time.sleep(0.3)

    calm, statuses = threading.Event(), []

    def caller() -> None:
        while not calm.is_set():
            body = {"question": "Who keeps the light?", "top_k": 1}
            statuses.append(
                httpx.post(
                    f"{scaling}/v1/answer", json=body, timeout=120, trust_env=False
                ).status_code
            )

    assert running() == 1
    callers = [threading.Thread(target=caller) for _ in range(6)]
    for thread in callers:
        thread.start()
    try:
        until(lambda: running() == 2)
    finally:
        calm.set()
        for thread in callers:
            thread.join()
    until(lambda: running() == 1)
    assert set(statuses) == {200}
