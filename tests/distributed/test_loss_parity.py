"""Two ranks give the gradient of one process with the global batch; known wrong gathers do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

TOLERANCE = 2e-5  # of the largest gradient entry, float32
RIGHT = [
    "contrastive",
    "alignment",
    "invariance_soft",
    "invariance_hard",
    "risk_variance",
    "risk_of_averaged_losses",
    "answer",
    "all",
    "matryoshka",
    "contrastive@all_gather_tensor_autograd",
    "contrastive@torch.distributed.nn",
    "contrastive@detached_times_world",
]
WRONG = [
    "contrastive@wrong_detached",
    "contrastive@wrong_detached_documents",
    "risk_variance@wrong_local",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of two ranks and of one process, each from processes of their own."""
    folder = tmp_path_factory.mktemp("parity")
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).with_name("loss_parity_worker.py")),
    ]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, world in ((0, 2), (1, 2), (0, 1))
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return load_file(folder / "world2.safetensors"), load_file(folder / "world1.safetensors")


def relative_error(runs: tuple[dict[str, Tensor], dict[str, Tensor]], case: str) -> float:
    """max |g - g_ref| / max |g_ref| of a case, against the plain way in one process."""
    ranks, single = runs
    reference = single[f"{case.partition('@')[0]}/grad"]
    assert torch.isfinite(ranks[f"{case}/grad"]).all()
    assert reference.abs().max() > 1e-3, (
        "the reference has no gradient to speak of: the case proves nothing"
    )
    return float((ranks[f"{case}/grad"] - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("case", RIGHT)
def test_two_ranks_give_the_gradient_of_one(
    runs: tuple[dict[str, Tensor], dict[str, Tensor]], case: str
) -> None:
    assert relative_error(runs, case) <= TOLERANCE


@pytest.mark.parametrize("case", [name for name in RIGHT if "@" not in name])
def test_the_mean_of_the_ranks_losses_is_the_loss_of_one(
    runs: tuple[dict[str, Tensor], dict[str, Tensor]], case: str
) -> None:
    torch.testing.assert_close(
        runs[0][f"{case}/loss"], runs[1][f"{case}/loss"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("case", WRONG)
def test_wrong_gathers_are_caught(
    runs: tuple[dict[str, Tensor], dict[str, Tensor]], case: str
) -> None:
    assert relative_error(runs, case) > 100 * TOLERANCE
