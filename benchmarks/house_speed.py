"""Speed of two checkouts, in turn on one machine: for `house.py speed`."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import house_trees


def speed(given: argparse.Namespace, folder: Path) -> str:
    """A table in markdown: medians of both, and new over old of each pair (least, median, most)."""
    trees = {"old": given.old.resolve(), "new": given.new.resolve()}
    index = given.index or house_trees.probe(trees["old"], "small_index", str(folder))["index"]
    measures: dict[str, Callable[[Path], dict[str, float]]] = {
        "import invar_ray": lambda tree: timed(tree, "-c", "import invar_ray"),
        "invar-ray --help": lambda tree: timed(tree, "-c", house_trees.ENTRY, str(tree), "--help"),
        "encode": lambda tree: house_trees.probe(tree, "encode", index, str(given.rows)),
        "serve": lambda tree: house_trees.probe(tree, "serve", str(given.requests)),
    }
    lines = ["| | old | new | new / old: least | median | most |", "|---|---|---|---|---|---|"]
    for name, measure in measures.items():
        if name in {"import invar_ray", "invar-ray --help"}:
            for tree in trees.values():  # compiles what has not been compiled
                measure(tree)
        runs: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
        for turn in range(given.runs):
            order = list(trees) if turn % 2 == 0 else list(trees)[::-1]
            for which in order:
                runs[which].append(measure(trees[which]))
        for part in runs["old"][0]:
            old, new = ([run[part] for run in runs[which]] for which in ("old", "new"))
            ratios = [after / before for before, after in zip(old, new, strict=True)]
            shown = [statistics.median(old), statistics.median(new)]
            shown += [min(ratios), statistics.median(ratios), max(ratios)]
            lines.append(f"| {name}, {part} | {' | '.join(f'{value:.4g}' for value in shown)} |")
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    return "\n".join([*lines, "", f"{given.runs} runs each, alternating; load average {load}"])


def timed(tree: Path, *arguments: str) -> dict[str, float]:
    """Seconds by the clock and of CPU that a process takes.

    Raises:
        SystemExit: if it fails.
    """
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-P", *arguments],
        cwd=tree,
        env=house_trees.environment(tree),
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{arguments[:2]} failed in {tree}")
    return {"s": time.perf_counter() - started, "CPU s": usage.ru_utime + usage.ru_stime}
