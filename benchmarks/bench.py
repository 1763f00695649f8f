"""`make bench`: this project against what a user would pick instead, alternating in one run.

    python -m benchmarks.bench [--only encode,search] [--full] [--table FILE]

Prints a line for each contest, writes ``benchmarks/results/<time>.json`` (settings, versions,
hardware, every round), draws ``trend.png`` there, and compares with the last run of the same sizes
on the same hardware: what got slower by more than 10 % is named, with the interval of the rounds.
A ratio is the peer's time over ours in the same round: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contest import OURS, ROOT, Contest, run

GROUPS = ("start", "search", "encode", "train", "answer", "keep", "serve")
RESULTS = ROOT / "benchmarks" / "results"
SLOWER = 1.10
_PACKAGES = (
    "torch transformers peft ray deepspeed faiss-cpu bm25s fastapi uvicorn sentence-transformers "
    "trl optimum-intel"
).split()
_PAGE = """# Speed, side by side

What `make bench` printed (how it measures: `benchmarks/README.md`): one thread a process, both
sides in turn, ratio = the peer's time over ours in the same round, so above 1 ours is faster.

"""
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


def main() -> None:
    """Run, print, write, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"groups, or contests: {', '.join(GROUPS)}, ..")
    parser.add_argument("--full", action="store_true", help="large sizes, five rounds")
    parser.add_argument("--rounds", type=int, help="of each contest; 3, or 5 with --full")
    parser.add_argument("--table", type=Path, help="write docs/speed.md or another page")
    given = parser.parse_args()
    rounds = given.rounds or (5 if given.full else 3)
    wanted = [name for name in given.only.split(",") if name]
    hardware = describe_hardware()
    result: dict[str, Any] = {
        "schema_version": 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "commit": _git("describe", "--always", "--dirty"),
        "full": given.full,
        "rounds": rounds,
        "hardware": hardware,
        "versions": _versions(),
        "load_before": os.getloadavg(),
        "contests": [],
    }
    target = RESULTS / f"{result['time'].replace(':', '')}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory(prefix="invar-bench-", dir="/tmp") as folder:
        for contest in _contests(wanted, given.full, Path(folder)):
            started = time.monotonic()
            try:
                found = run(contest, rounds)
            except SystemExit as error:  # the others are worth having
                print(f"{contest.name}: {error}", flush=True)
                failed.append(contest.name)
                continue
            found["took_s"] = round(time.monotonic() - started, 1)
            result["contests"].append(found)
            print("\n".join(lines(found)), flush=True)
            result["load_after"] = os.getloadavg()
            target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for line in slower(result, earlier(result, target)):
        print(line)
    if given.table:
        given.table.write_text(_PAGE + table(result), encoding="utf-8")
    draw_trend(result)
    print(f"written to {target}")
    if failed or not result["contests"]:
        raise SystemExit(f"failed: {', '.join(failed) or 'nothing was run'}")


def _contests(wanted: list[str], full: bool, folder: Path) -> Iterator[Contest]:
    """Group by group: what a group prepares is made when its turn comes."""
    for group in GROUPS:
        named = [name for name in wanted if name == group or name.startswith(f"{group} ")]
        if wanted and not named:
            continue
        (folder / group).mkdir()
        module = importlib.import_module(f"benchmarks.groups.{group}")
        try:
            contests = module.contests(full, folder / group)
        except SystemExit as error:  # the other groups are worth having
            print(f"{group}: {error}", flush=True)
            continue
        for contest in contests:
            if not named or group in named or contest.name in named:
                yield contest


def lines(contest: dict[str, Any]) -> list[str]:
    """A contest for people: our speed, then a line for each peer."""
    found = []
    for name, side in contest["measured"].items():
        clock, cpu = (median(side[by]) / contest["count"] for by in ("clock", "cpu"))
        ratio = contest["ratios"].get(name)
        versus = ""
        if ratio:
            shown = [" / ".join(f"{value:.2f}" for value in ratio[by]) for by in ("cpu", "clock")]
            versus = f"  x{shown[0]} by CPU, x{shown[1]} by the clock"
        found.append(
            f"{contest['name']:34} {name:32} {cpu * 1000:9.2f} ms CPU {clock * 1000:9.2f} ms a "
            f"{contest['unit']}{versus}"
        )
    return found


def table(result: dict[str, Any]) -> str:
    """The result in markdown: a row for each contest and peer."""
    rows = [
        "| | against | ms CPU, ours | ms CPU, theirs | ratio by CPU: least, median, most "
        "| ratio by the clock | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for contest in result["contests"]:
        ours = contest["measured"][OURS]
        own = {by: median(ours[by]) / contest["count"] * 1000 for by in ("cpu", "clock")}
        target = contest["target"]
        goal = ""
        if target is not None:
            goal = f">= {target:.2g}" if contest["ratios"] else f"<= {target:g} s"
            goal += "" if contest["by"] == "cpu" else " by the clock"
        name = f"{contest['name']}, a {contest['unit']}"
        if not contest["ratios"]:
            rows.append(f"| {name} | - | {own['cpu']:.4g} | | | {own['clock']:.4g} ms | {goal} |")
        for peer, ratio in contest["ratios"].items():
            theirs = median(contest["measured"][peer]["cpu"]) / contest["count"] * 1000
            by_cpu, by_clock = (
                ", ".join(f"{value:.2f}" for value in ratio[by]) for by in ("cpu", "clock")
            )
            rows.append(
                f"| {name} | {peer} | {own['cpu']:.4g} | {theirs:.4g} | {by_cpu} | {by_clock} "
                f"| {goal} |"
            )
    hardware = result["hardware"]
    load = result.get("load_after", result["load_before"])
    about = (
        f"{result['time'][:10]}, commit {result['commit']}, {hardware['processor']}, "
        f"{hardware['cores']} cores, {', '.join(hardware['flags'])}, {hardware['memory_gb']} GB; "
        f"{result['rounds']} rounds, {'large' if result['full'] else 'small'} sizes; load average "
        f"{result['load_before'][0]:.1f} before and {load[0]:.1f} after."
    )
    return "\n".join([*rows, "", about, ""])


def describe_hardware() -> dict[str, Any]:
    """What a speed depends on; results compare only where it is equal."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(
        (key.strip(), value.strip())
        for key, _, value in (line.partition(":") for line in info.splitlines())
        if value
    )
    known = fields.get("flags", "").split()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return {
        "processor": f"{fields.get('model name', platform.machine())} ({family})",
        "flags": [flag for flag in _FLAGS if flag in known],
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 2**30),
    }


def earlier(result: dict[str, Any], but: Path | None = None) -> list[dict[str, Any]]:
    """Earlier results of the same hardware and sizes, the newest last."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        if path == but:
            continue
        read = json.loads(path.read_text(encoding="utf-8"))
        same = all(read.get(key) == result[key] for key in ("schema_version", "hardware", "full"))
        if same and read["time"] <= result["time"]:
            found.append(read)
    return found


def slower(result: dict[str, Any], before: list[dict[str, Any]]) -> list[str]:
    """What got slower by more than 10 % since each contest's last result: by the ratio to the
    first peer, which other work on the machine moves little, or by our CPU time where there is
    none.  The interval is that of all pairs of an old and a new round.
    """
    found = []
    for contest in result["contests"]:
        name = contest["name"]
        last = next(
            (
                (read, old)
                for read in reversed(before)
                for old in read["contests"]
                if old["name"] == name and old["count"] == contest["count"]
            ),
            None,
        )
        if last is None:
            continue
        old, new = (_costs(each) for each in (last[1], contest))
        change = median(new) / median(old)
        least, most = min(new) / max(old), max(new) / min(old)
        if change > SLOWER:
            sure = "" if least > 1 else "; the interval includes no change"
            found.append(
                f"SLOWER: {name} costs {change:.2f} times what it did in {last[0]['commit']} "
                f"({least:.2f} to {most:.2f}){sure}"
            )
    return found


def _costs(contest: dict[str, Any]) -> list[float]:
    """Ours, a round; over the first peer's where there is one."""
    by = contest["by"]
    ours: list[float] = contest["measured"][OURS][by]
    peers = [name for name in contest["measured"] if name != OURS]
    if not peers:
        return ours
    theirs = contest["measured"][peers[0]][by]
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def draw_trend(result: dict[str, Any]) -> None:
    """``trend.png``: each contest's cost over all results of this hardware, the first one being
    1.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = earlier(result)
    names = [contest["name"] for contest in result["contests"]]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.25 * len(names) + 3))
    for name in names:
        costs = [
            (read["time"][5:16], median(_costs(contest)))
            for read in runs
            for contest in read["contests"]
            if contest["name"] == name
        ]
        if costs:
            values = [value / costs[0][1] for _, value in costs]
            axes.plot([at for at, _ in costs], values, marker="o", label=name)
    axes.axhline(SLOWER, color="grey", linestyle=":")
    axes.set_ylabel("cost, the first result being 1 (lower is better)")
    axes.tick_params(axis="x", rotation=60, labelsize=7)
    axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(RESULTS / "trend.png", dpi=110)
    pyplot.close(figure)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
