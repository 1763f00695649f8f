"""The doctor holds a machine against a recipe; machines are made up, the judging is real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from invar_ray.cli.doctor import Check, run_checks
from invar_ray.cli.doctor_recipe import Seen, judge, look
from invar_ray.config import load_config
from tests.support import save_llama

LAPTOP = Seen((), "", None, False, ("faiss-cpu",), 16 * 10**9)
H100S = Seen((80 * 10**9,) * 8, "580.95.05", "13.0", True, ("faiss-gpu",), 2000 * 10**9)
TINY = load_config("tiny")
LARGE = load_config("llama3_8b")


def only(checks: list[Check]) -> Check:
    assert len(checks) == 1, checks
    return checks[0]


def test_what_fits() -> None:
    assert only(judge(TINY, LAPTOP)).status == "ok"
    assert only(judge(LARGE, H100S)).status == "ok"
    assert "GB of a GPU" in only(judge(LARGE, H100S)).detail


def test_this_machine_is_looked_at() -> None:
    seen = look()
    assert seen.host_bytes > 10**9
    assert len(seen.faiss) == 1


@pytest.mark.parametrize(
    ("seen", "status", "said", "action"),
    [
        (replace(H100S, driver="550.54.14"), "fail", "driver is 550.54.14", "driver 580"),
        (replace(H100S, gpus=H100S.gpus[:4]), "warn", "asks for 8 GPUs, torch sees 4", "cluster"),
        (replace(H100S, gpus=(24 * 10**9,) * 8), "fail", "of a GPU, which has 24", "plan"),
        (replace(H100S, faiss=("faiss-cpu",)), "warn", "FAISS has no GPU", "invar-ray[gpu]"),
        (replace(H100S, nccl=False), "fail", "no NCCL", "CUDA build"),
        (replace(H100S, host_bytes=64 * 10**9), "warn", "a node needs", "--memory"),
    ],
)
def test_what_lacks(seen: Seen, status: str, said: str, action: str) -> None:
    check = only(judge(LARGE, seen))
    assert check.status == status
    assert said in check.detail
    assert action in check.action


def test_a_recipe_that_leaves_gpus_idle() -> None:
    check = only(judge(TINY, H100S))
    assert check.status == "warn"
    assert "leaves 8 GPUs idle" in check.detail
    half = load_config("smollm2_135m", ["scale.use_gpu=true"])
    check = only(judge(half, H100S))
    assert "embeds and answers on CPUs" in check.detail
    assert "scale.embed_gpus_per_worker" in check.action


def test_alone_a_machine_must_have_what_is_asked_for() -> None:
    alone = load_config("llama3_8b", ["scale.ray_address=null"])
    found = judge(alone, LAPTOP)
    assert {check.status for check in found} == {"fail"}
    assert any("asks for 8 GPUs, torch sees 0" in check.detail for check in found)


def test_a_base_below_the_recipes_first_layer_is_no_broken_check(tmp_path: Path) -> None:
    base = str(save_llama(tmp_path / "shallow"))
    config = load_config("demo", [f"model.base={base}"])
    checks = run_checks(str(tmp_path), base, recipe=lambda: judge(config, LAPTOP))
    found = only([check for check in checks if check.name == "recipe"])
    assert (found.status, found.action) == ("fail", "set generator.first_layer=1, or 0")
    assert "generator.first_layer is 12" in found.detail
    assert "has 2 layers" in found.detail
