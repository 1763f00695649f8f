"""The gradient parity suite: ``python -m tests.distributed.parity [--out docs/parity.md]``
(``make parity``).

1, 2 and 4 ranks x ZeRO 0-3 x GradCache x gradient checkpointing x each loss, all against one
process without DeepSpeed, float32, no dropout.  One launch per number of ranks.  Writes the table,
and ends with code 1 if a cell is above the tolerance or a planted fault is not.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.engine_worker import (
    GENERATOR_CASES,
    MODES,
    PLANTED,
    RETRIEVER_CASES,
    ZERO_STAGES,
    cell,
)
from tests.distributed.launch import launch

TOLERANCE = 2e-5  # of the largest gradient entry, float32
CAUGHT = 100 * TOLERANCE
WORLDS = (1, 2, 4)
COMMAND = "make parity"
NAMES = {
    "contrastive": "contrastive alone",
    "alignment": "+ alignment",
    "invariance_soft": "+ invariance, soft patterns",
    "invariance_hard": "+ invariance, hard patterns",
    "risk_variance": "+ risk variance",
    "all": "all of them",
    "matryoshka": "all, at three sizes",
    "all_odd": "all, 5 questions (padded rows)",
    "answer": "stage 2: answer",
    "answer_odd": "stage 2, 3 sequences",
    "answer_single": "stage 2, 1 sequence",
}


def flat_gradient(run: dict[str, Tensor], case: str) -> Tensor:
    """All parameters' gradients of a case in one vector; finite."""
    names = sorted(name for name in run if name.startswith(f"{case}/grad/"))
    if not names:
        raise KeyError(f"no gradients of {case!r}")
    return torch.cat([run[name].flatten() for name in names])


def relative_error(found: Tensor, reference: Tensor) -> float:
    """max |g - g_ref| / max |g_ref|; infinite where a gradient is not finite or the reference has
    none to speak of.
    """
    largest = float(reference.abs().max())
    error = float((found - reference).abs().max()) / largest if largest > 1e-3 else float("inf")
    return error if error == error else float("inf")


def errors_of(folder: Path, world: int) -> dict[tuple[str, str, int], float]:
    """(case, mode, ZeRO stage) -> error, the largest over the ranks."""
    reference = load_file(folder / "parity-zNone-w1-r0.safetensors")
    found: dict[tuple[str, str, int], float] = {}
    for zero_stage in ZERO_STAGES:
        runs = [
            load_file(folder / f"parity-z{zero_stage}-w{world}-r{rank}.safetensors")
            for rank in range(world)
        ]
        for case in [*RETRIEVER_CASES, *GENERATOR_CASES]:
            wanted = flat_gradient(reference, case)
            for mode in MODES:
                label = cell(case, mode)
                errors = [relative_error(flat_gradient(run, label), wanted) for run in runs]
                found[case, label.partition("|")[2], zero_stage] = max(errors)
        for case in PLANTED if world > 1 else ():
            wanted = flat_gradient(reference, "all")
            found[case, "", zero_stage] = min(
                relative_error(flat_gradient(run, case), wanted) for run in runs
            )
    return found


def table(
    errors: dict[int, dict[tuple[str, str, int], float]], seconds: float, cpu_seconds: float
) -> str:
    """The page: one table per mode, a row per loss, a column per ranks and ZeRO stage.

    Args:
        errors: number of ranks -> what :func:`errors_of` found.
        seconds: by the clock; ``cpu_seconds`` of all ranks together, which other work on the
            machine stretches less.
    """
    cells = {
        (world, *key): value for world, found in errors.items() for key, value in found.items()
    }
    plain = {key: value for key, value in cells.items() if key[1] not in PLANTED}
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "deepspeed", "peft", "transformers")
    )
    columns = [(world, zero_stage) for world in errors for zero_stage in ZERO_STAGES]
    lines = [
        "# Gradient parity",
        "",
        "max |g - g_ref| / max |g_ref| over all adapter weights, the largest over the ranks. The "
        "reference is one",
        "process with plain autograd over the whole batch, without DeepSpeed; g comes from "
        "`safe_get_full_grad` after",
        "the engine's backward. float32, gloo on CPU, no dropout, the one-layer base of the tests, "
        "adapters that are",
        "not zero. Losses other than the contrastive one carry weights at which they stand out "
        "from it.",
        "",
        f"{len(plain)} cells, largest {max(plain.values()):.1e}, tolerance {TOLERANCE:.0e}. "
        f"Written by `{COMMAND}` on "
        f"{date.today().isoformat()} in {seconds:.0f} s ({cpu_seconds:.0f} s of CPU time): Python "
        f"{platform.python_version()}, {packages}.",
    ]
    titles = {
        "plain,keep": "Neither GradCache nor gradient checkpointing",
        "cache,keep": "GradCache (stage 2: gradient accumulation)",
        "plain,recompute": "Gradient checkpointing",
        "cache,recompute": "GradCache and gradient checkpointing",
    }
    for mode, title in titles.items():
        lines += ["", f"## {title}", ""]
        lines.append(
            "| loss | " + " | ".join(f"{w} rank{'s'[: w > 1]}, ZeRO {z}" for w, z in columns) + " |"
        )
        lines.append("|---|" + "---|" * len(columns))
        for case, name in NAMES.items():
            values = (
                f"{cells[world, case, mode, zero_stage]:.0e}" for world, zero_stage in columns
            )
            lines.append(f"| {name} | " + " | ".join(values) + " |")
    lines += ["", "## Faults planted to see the suite catch them", ""]
    lines.append(f"Each must be above {CAUGHT:.0e}.")
    several = [column for column in columns if column[0] > 1]
    lines += ["", "| fault | " + " | ".join(f"{w} ranks, ZeRO {z}" for w, z in several) + " |"]
    lines.append("|---|" + "---|" * len(several))
    for case in PLANTED:
        values = (f"{cells[world, case, '', zero_stage]:.2f}" for world, zero_stage in several)
        lines.append(f"| {case.removeprefix('planted: ')} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/parity.md"))
    out: Path = parser.parse_args().out
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    started = time.monotonic()
    errors = {}
    with tempfile.TemporaryDirectory(prefix="invar-parity-") as name:
        for world in WORLDS:
            launch(Path(name), world, "full")
            errors[world] = errors_of(Path(name), world)
            print(
                f"{world} rank(s): {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True
            )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    out.write_text(
        table(errors, time.monotonic() - started, used.ru_utime + used.ru_stime), encoding="utf-8"
    )
    faults = []
    for world, found in errors.items():
        for (case, mode, zero_stage), error in found.items():
            place = f"{case} {mode} ranks={world} zero={zero_stage}: {error:.1e}"
            if case in PLANTED and error <= CAUGHT:
                faults.append(f"not caught: {place}")
            elif case not in PLANTED and error > TOLERANCE:
                faults.append(f"above {TOLERANCE:.0e}: {place}")
    print(
        "\n".join(faults) if faults else f"every cell within {TOLERANCE:.0e}; table in {out}",
        file=sys.stderr,
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
