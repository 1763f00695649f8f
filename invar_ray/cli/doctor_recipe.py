"""This machine against a recipe: driver, torch, FAISS, NCCL, GPUs and memory, each with what to do.

On a cluster this machine is one of several, so what it lacks by itself is a warning there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from invar_ray.cli.doctor import Check, Status
from invar_ray.config import Config
from invar_ray.footprint import GB, Corpus, Machines, Step, faults, footprint, host_bytes

DRIVERS = {12: 525, 13: 580}
"""Least NVIDIA driver of a CUDA version, by its vendor's table of minor version compatibility."""
PASSAGES = 100_000
"""Of the corpus that the recipe is weighed with; `invar-ray plan` weighs others."""


@dataclass(frozen=True)
class Seen:
    """What this machine has.

    Attributes:
        gpus: bytes of each GPU that torch sees.
        driver: of NVIDIA; empty without.
        cuda: that torch was built with; ``None`` for a CPU build.
        nccl: whether torch has it.
        faiss: the installed wheels.
        host_bytes: of its memory.
    """

    gpus: tuple[int, ...]
    driver: str
    cuda: str | None
    nccl: bool
    faiss: tuple[str, ...]
    host_bytes: int


def check_recipe(config: Config) -> list[Check]:
    """Look at this machine for a recipe."""
    return judge(config, look())


def look() -> Seen:
    """What this machine has."""
    import torch

    driver = ""
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
        driver = (done.stdout.split() or [""])[0] if done.returncode == 0 else ""
    wheels = []
    for name in ("faiss-cpu", "faiss-gpu"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        wheels.append(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Seen(
        gpus=tuple(torch.cuda.get_device_properties(n).total_memory for n in range(count)),
        driver=driver,
        cuda=torch.version.cuda,
        nccl=torch.distributed.is_available() and torch.distributed.is_nccl_available(),
        faiss=tuple(wheels),
        host_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def judge(config: Config, seen: Seen) -> list[Check]:
    """The findings; one ``ok`` where nothing is lacking."""
    steps = footprint(config, Corpus(PASSAGES))
    lacks: Status = "warn" if config.scale.ray_address else "fail"
    found = [
        *_driver(seen),
        *_gpus(config, steps, seen, lacks),
        *_memory(steps, seen, lacks),
    ]
    return found or [Check("recipe", "ok", f"{config.name} fits this machine: {_needs(steps)}")]


def _driver(seen: Seen) -> list[Check]:
    if not seen.driver or seen.cuda is None:
        return []
    least = DRIVERS.get(int(seen.cuda.partition(".")[0]))
    if least is None or int(seen.driver.partition(".")[0]) >= least:
        return []
    detail = f"torch is built for CUDA {seen.cuda}, the NVIDIA driver is {seen.driver}"
    action = f"install driver {least} or newer, or a build of torch for an older CUDA"
    return [Check("recipe", "fail", detail, action)]


def _gpus(config: Config, steps: Sequence[Step], seen: Seen, lacks: Status) -> list[Check]:
    asked = max(sum(actor.count * actor.gpus for actor in step.actors) for step in steps)
    found: list[Check] = []
    if asked == 0:
        if seen.gpus:
            detail = f"{config.name} leaves {len(seen.gpus)} GPUs idle"
            action = (
                "set scale.use_gpu=true, scale.embed_gpus_per_worker=1 and "
                f"scale.num_workers={len(seen.gpus)} scale.embed_workers={len(seen.gpus)}"
            )
            found.append(Check("recipe", "warn", detail, action))
        return found
    if config.scale.use_gpu and config.scale.embed_gpus_per_worker == 0:
        detail = f"{config.name} trains on GPUs, and embeds and answers on CPUs beside them"
        action = "set scale.embed_gpus_per_worker=1 (0.5 puts two actors on a GPU)"
        found.append(Check("recipe", "warn", detail, action))
    if asked > len(seen.gpus):
        detail = f"{config.name} asks for {asked:g} GPUs, torch sees {len(seen.gpus)} here"
        action = "run it where they are, or set scale.num_workers and scale.embed_workers lower"
        if lacks == "warn":
            action = "see that the cluster has them"
        found.append(Check("recipe", lacks, detail, action))
    if seen.gpus:
        machine = Machines(gpus=len(seen.gpus), gpu_bytes=min(seen.gpus))
        small = [fault.text for fault in faults(steps, machine) if fault.what == "gpu"]
        if small:
            action = "`invar-ray plan` with --gpus and --gpu-memory says what would fit"
            found.append(Check("recipe", "fail", small[0], action))
        if "faiss-gpu" not in seen.faiss:
            detail = "FAISS has no GPU here: indexes are built and searched on CPUs"
            action = "pip uninstall -y faiss-cpu, then pip install 'invar-ray[gpu]'"
            found.append(Check("recipe", "warn", detail, action))
        if not seen.nccl and config.scale.use_gpu and config.scale.num_workers != 1:
            detail = "torch has no NCCL, over which training on several GPUs goes"
            found.append(Check("recipe", "fail", detail, "install a CUDA build of torch"))
    return found


def _memory(steps: Sequence[Step], seen: Seen, lacks: Status) -> list[Check]:
    machine = Machines(host_bytes=seen.host_bytes, gpus=len(seen.gpus))
    small = [fault.text for fault in faults(steps, machine) if fault.what == "host"]
    if not small:
        return []
    action = "`invar-ray plan` with --memory says what would fit; so does a machine with more"
    return [Check("recipe", lacks, f"{small[0]} (with {PASSAGES:,} passages)", action)]


def _needs(steps: Sequence[Step]) -> str:
    most = max(host_bytes(step, Machines()) for step in steps)
    gpu = max(actor.gpu for step in steps for actor in step.actors)
    on_gpu = f", {gpu / GB:.0f} GB of a GPU" if gpu else ""
    return f"{most / GB:.0f} GB of memory{on_gpu} with {PASSAGES:,} passages"
