"""``invar-ray plan``: what a run will take, before it is paid for."""

from __future__ import annotations

from collections.abc import Sequence

from invar_ray.config import load_config
from invar_ray.console import duration
from invar_ray.errors import ResourceError
from invar_ray.footprint import (
    GB,
    Corpus,
    Machines,
    Step,
    footprint,
    host_bytes,
    remedies,
)


def print_plan(
    recipe: str,
    overrides: Sequence[str],
    corpus: Corpus,
    machines: Machines,
    *,
    gpu_flops: float,
) -> None:
    """Print the ledger of a run.

    Args:
        recipe, overrides: the run.
        corpus: its size.
        machines: where it is to run.
        gpu_flops: see :func:`invar_ray.footprint.footprint`.

    Raises:
        ResourceError: it does not fit; with what would, for each step.
    """
    steps = footprint(load_config(recipe, overrides), corpus, gpu_flops=gpu_flops)
    print(render(steps, machines))
    found = remedies(recipe, overrides, corpus, machines)
    if found:
        lines = [
            f"  - {fault.text}{f'; {change} would do' if change else ''}" for fault, change in found
        ]
        raise ResourceError(
            f"{recipe} does not fit here:\n" + "\n".join(lines),
            action="change what the lines name, or take larger or more machines",
        )


def render(steps: Sequence[Step], machines: Machines) -> str:
    """The ledger as a table: a line for each kind of process, in the order of the steps."""
    width = max(len(step.label) for step in steps)
    names = max(len(actor.name) for step in steps for actor in step.actors)
    lines = [
        f"{'step':<{width}}  {'process':<{names}}  {'n':>3}  {'host GB':>8}  {'GPU GB':>7}  "
        f"{'of a node':>9}  {'time':>8}  {'written':>8}"
    ]
    for step in steps:
        node = f"{host_bytes(step, machines) / GB:.1f}"
        took = "" if step.seconds is None else duration(step.seconds)
        written = "" if not step.written else _size(step.written)
        label = step.label
        for actor in step.actors:
            gpu = f"{actor.gpu / GB:.1f}" if actor.gpu else ""
            lines.append(
                f"{label:<{width}}  {actor.name:<{names}}  {actor.count:>3}  "
                f"{actor.host / GB:>8.1f}  {gpu:>7}  {node:>9}  {took:>8}  {written:>8}".rstrip()
            )
            label = node = took = written = ""
    total = sum(step.seconds or 0.0 for step in steps)
    stored = sum(step.written for step in steps)
    lines.append(f"in all {duration(total)}, {_size(stored)} written")
    return "\n".join(lines)


def _size(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.0f} kB"
