"""The script that a GPU is tried with runs here on a CPU, without Ray, FAISS and DeepSpeed, and
fails where something is wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from benchmarks import gpu_check

ROOT = Path(__file__).parents[2]


def test_the_whole_script_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    code = (
        "import sys\n"
        "for name in ('ray', 'faiss', 'deepspeed'): sys.modules[name] = None\n"
        "from benchmarks.gpu_check import main\n"
        f"sys.exit(main(['--device', 'cpu', '--tiny', '--out', {str(out)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert [json.loads(line) for line in done.stdout.splitlines()] == rows  # as it goes
    status = {row["check"]: row["status"] for row in rows}
    skipped = {name for name, said in status.items() if said == "skipped"}
    assert skipped == {"out of memory", "ZeRO stages"}
    assert {said for name, said in status.items() if name not in skipped} == {"ok"}
    assert list(status) == [*gpu_check.CORRECTNESS, *gpu_check.speed(tiny=True)]
    speeds = [row for row in rows if row["check"] in gpu_check.speed(tiny=True)]
    assert all(row["tokens_per_s"] > 0 and row["share_of_measured_rate"] > 0 for row in speeds)


def test_a_fault_fails_the_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = gpu_check.BiEncoder.forward

    def faulty(self: gpu_check.BiEncoder, ids: Tensor, mask: Tensor) -> Tensor:
        # the states of another token than the last one
        return plain(self, ids, mask * (mask.cumsum(dim=1) <= 5))

    def found() -> str:
        out = tmp_path / "gpu.json"
        options = ["--device", "cpu", "--tiny", "--only", "vectors", "--out", str(out)]
        assert gpu_check.main(options) == int(status(out) == "failed")
        return status(out)

    def status(out: Path) -> str:
        return str(json.loads(out.read_text(encoding="utf-8"))[0]["status"])

    assert found() == "ok"
    rows = iter(range(100))
    monkeypatch.setattr(
        gpu_check.BiEncoder,
        "forward",
        lambda self, ids, mask: (plain if next(rows) % 2 else faulty)(self, ids, mask),
    )
    assert found() == "failed"


def test_no_time_is_said(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    gpu_check.main(["--device", "cpu", "--tiny", "--seconds", "-1", "--out", str(out)])
    rows = json.loads(out.read_text(encoding="utf-8"))
    assert {row["status"] for row in rows} == {"no time"}
