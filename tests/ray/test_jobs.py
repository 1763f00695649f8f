"""Jobs as a user starts them: one clear error, a clean end on SIGTERM, and ``ray job submit``."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
SMALL = [
    "experimental.model.tiny.num_layers=1",
    "experimental.model.tiny.intermediate_size=64",
    "questions.train_limit=15",
    "questions.dev_limit=6",
    "corpus.distractors=10",
    "scale.shard_rows=4",  # one or two shards would be embedded without a Ray
]


def start_job(verb: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"jobs.{verb}", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_users_mistake_is_one_error() -> None:
    job = start_job("index_base", "--config", "tiny", "scale.shard_row=3")
    try:
        output, errors = job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode == 1, errors
    assert output == ""
    lines = [line for line in errors.splitlines() if "accelerator" not in line]
    assert lines[0].startswith("error: ")
    assert "scale.shard_row: unknown key; did you mean scale.shard_rows?" in errors
    assert "Traceback" not in errors
    assert errors.count("error: ") == 1


def test_sigterm_ends_a_job_and_its_ray(tmp_path: Path) -> None:
    # The folder of this job's Ray goes to TMPDIR: short, for its sockets.
    folder = tempfile.mkdtemp(prefix="ij", dir="/tmp")
    log = tmp_path / "log"
    with open(log, "w") as stream:
        job = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jobs.index_base",
                "--config",
                "tiny",
                f"storage.root_uri={tmp_path / 's'}",
                *SMALL,
            ],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": folder},
            stdout=stream,
            stderr=stream,
        )
    own: set[psutil.Process] = set()
    try:
        deadline = time.monotonic() + 120
        while not any("MapWorker" in _name(process) for process in own):
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
            own = set(psutil.Process(job.pid).children(recursive=True))
        assert not list((tmp_path / "s").glob("vectors/*")), (
            "it was through before it could be interrupted"
        )
        (kept,) = Path(folder).glob("invar-ray-*")
        assert stat.S_IMODE(kept.stat().st_mode) == 0o700, "a kill would leave it to everybody"
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=90) == 130, log.read_text()
        _, alive = psutil.wait_procs(own, timeout=30)
        assert not alive, f"left behind: {[_name(process) for process in alive]}"
    finally:
        job.kill()
        for process in own:
            if process.is_running():
                process.kill()
    text = log.read_text()
    assert "interrupted; what was finished stands, run again to go on" in text
    assert "Traceback" not in text
    assert not list((tmp_path / "s").glob("index/base-*"))
    assert [
        path.name for path in Path(folder).iterdir() if path.name.startswith("invar-ray-")
    ] == []


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:1]) or process.name()
    except psutil.Error:
        return "gone"


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """A head node with a dashboard of its own, ended by its process ids; yields the environment to
    reach it.
    """
    folder = tempfile.mkdtemp(prefix="ih", dir="/tmp")
    gcs, dashboard, client, agent = (_free_port() for _ in range(4))
    log = Path(folder) / "head.log"
    with open(log, "w") as stream:
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--head",
            "--block",
            "--num-cpus=4",
        ]
        command += [
            f"--port={gcs}",
            f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}",
        ]
        # Its default is one number for all Rays of a machine; without the agent no job is taken.
        command += [f"--dashboard-agent-listen-port={agent}"]
        command += [
            "--dashboard-host=127.0.0.1",
            "--node-ip-address=127.0.0.1",
            f"--temp-dir={folder}/r",
        ]
        command += ["--object-store-memory=268435456", "--disable-usage-stats"]
        # A job's `python` is the first on its head's PATH.
        path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, start_new_session=True, env=os.environ | path
        )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        _wait_for(lambda: _listens(dashboard), 120, log)
        yield {"RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": address}
    finally:
        family = [*_children(process.pid), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        for left in psutil.wait_procs(family, timeout=20)[1]:
            left.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _free_port() -> int:
    # Outside 10002-19999, where Ray's workers listen.
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if not 10000 <= port <= 19999:
            return port


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(condition: Any, timeout_s: float, log: Path) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def submit(head: dict[str, str], verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``ray job submit --working-dir . -- python -m jobs.VERB --config tiny ..``, as the README has
    it.
    """
    command = [
        str(Path(sys.executable).with_name("ray")),
        "job",
        "submit",
        "--working-dir",
        ".",
        "--",
    ]
    command += ["python", "-m", f"jobs.{verb}", "--config", "tiny", *arguments]
    deadline = time.monotonic() + 120
    while True:
        result = subprocess.run(
            command, cwd=ROOT, env=os.environ | head, capture_output=True, text=True, timeout=800
        )
        # The dashboard listens some seconds before the node's agent does.
        if "No available agent" not in result.stdout + result.stderr or time.monotonic() > deadline:
            return result
        time.sleep(3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ray_job_submit_trains_on_a_cluster(head: dict[str, str], tmp_path: Path) -> None:
    result = submit(
        head, "train_retriever", f"storage.root_uri={tmp_path / 's'}", *SMALL, "retriever.steps=3"
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    found = re.search(r"^adapter: (/\S+)", result.stdout, re.MULTILINE)
    assert found is not None, result.stdout[-3000:]
    assert (Path(found[1]) / "manifest.json").is_file()
    assert (Path(found[1]) / "adapter" / "adapter_model.safetensors").is_file()
    assert "goes when Ray clears it" not in result.stdout + result.stderr

    wrong = submit(head, "train_retriever", "retriever.nosuch=1")
    said = wrong.stdout + wrong.stderr
    assert wrong.returncode == 1
    assert "retriever.nosuch: unknown key" in said
    assert len(re.findall("^error: ", said, re.MULTILINE)) == 1
    assert "Traceback" not in said
