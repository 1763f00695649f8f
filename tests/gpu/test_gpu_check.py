"""The checks of ``benchmarks/gpu_check.py`` on a CUDA device, one test each."""

from __future__ import annotations

import time

import pytest

from benchmarks.gpu_check import CORRECTNESS, Run, speed


@pytest.mark.parametrize("name", CORRECTNESS)
def test_a_gpu_computes_what_a_cpu_does(name: str) -> None:
    run = Run("cuda", False, None, time.monotonic() + 300)
    run.add(name, CORRECTNESS[name])
    assert run.rows[0]["status"] in {"ok", "skipped"}, run.rows[0]


@pytest.mark.parametrize("name", [one for one in speed(tiny=False) if "135M" in one])
def test_a_gpu_holds_what_the_ledger_says(name: str) -> None:
    run = Run("cuda", False, None, time.monotonic() + 300)
    assert run.add(name, speed(tiny=False)[name]), run.rows[0]
    row = run.rows[0]
    assert row["peak_gb"] == pytest.approx(row["ledger_gb"], rel=0.15)
