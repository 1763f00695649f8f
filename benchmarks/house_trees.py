"""How `house.py` looks at a checkout: its files, its layout, its public face."""

from __future__ import annotations

import ast
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOTS = ("invar_ray", "jobs", "serve")
PROBE = Path(__file__).with_name("house_probe.py")
ENTRY = """
import importlib, sys, tomllib
name = tomllib.load(open(sys.argv[1] + "/pyproject.toml", "rb"))["project"]["scripts"]["invar-ray"]
module, _, function = name.partition(":")
sys.argv = ["invar-ray", *sys.argv[2:]]
sys.exit(getattr(importlib.import_module(module), function)())
"""
# Arguments of the command line and of jobs that must fail (or not) in the same way. {empty} is an
# empty folder, {missing} a path at which nothing lies.
CASES: dict[str, list[str]] = {
    "version": ["cli", "--version"],
    "no verb": ["cli"],
    "unknown verb": ["cli", "nosuchverb"],
    "unknown option": ["cli", "evaluate", "--nosuch"],
    "unknown key": ["cli", "evaluate", "nosuch.key=1"],
    "value of a wrong type": ["cli", "evaluate", "retriever.steps=many"],
    "value out of range": ["cli", "evaluate", "retriever.steps=0"],
    "unknown recipe": ["cli", "evaluate", "--config", "nosuch"],
    "unknown stage": ["cli", "train", "nosuch", "storage.root_uri={empty}"],
    "ask an empty store": ["cli", "ask", "Who?", "--root", "{empty}"],
    "ask an index that is not there": ["cli", "ask", "Who?", "--index", "{missing}/index/a-1"],
    "index a missing corpus": ["cli", "index", "{missing}", "storage.root_uri={empty}"],
    "gate without reports": ["cli", "gate"],
    "gate on missing reports": [
        "cli",
        "gate",
        "--baseline",
        "{missing}",
        "--candidate",
        "{missing}",
    ],
    "compare missing reports": ["cli", "compare", "{missing}", "{missing}"],
    "export a missing adapter": ["cli", "export", "{missing}/retriever/a-1", "{empty}/out"],
    "convert a missing file": ["cli", "convert", "{missing}", "{empty}"],
    "roll back with nothing published": ["cli", "index-versions", "rollback", "--root", "{empty}"],
    "job without a recipe": ["jobs.reindex"],
    "job with an unknown recipe": ["jobs.reindex", "--config", "nosuch"],
    "job with an unknown key": ["jobs.reindex", "--config", "tiny", "nosuch.key=1"],
}


def environment(tree: Path) -> dict[str, str]:
    """What a subprocess of a tree runs in: its modules first, no colours, no network."""
    return os.environ | {
        "PYTHONPATH": str(tree),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
        "TERM": "dumb",
        "NO_COLOR": "1",
    }


def probe(tree: Path, verb: str, *arguments: str) -> Any:
    """Run a verb of `house_probe.py` in a tree and read its answer.

    Raises:
        SystemExit: if it fails; what it said is on standard error.
    """
    with tempfile.TemporaryDirectory(prefix="house") as folder:
        target = Path(folder) / "answer.json"
        command = [sys.executable, "-P", str(PROBE), str(target), verb, *arguments]
        done = subprocess.run(
            command, cwd=tree, env=environment(tree), stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.stderr.write(done.stdout)
            raise SystemExit(f"`{verb}` failed in {tree}")
        return json.loads(target.read_text(encoding="utf-8"))


def tracked(tree: Path, *roots: str) -> list[Path]:
    """The Python files below these folders that git knows, sorted."""
    command = ["git", "-C", str(tree), "ls-files", "-z", "--", *roots]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    names = [name for name in done.stdout.split("\0") if name.endswith(".py")]
    return [tree / name for name in sorted(names) if (tree / name).is_file()]


def lines(path: Path) -> int:
    """Lines of a file, blank ones and comments included."""
    return len(path.read_text(encoding="utf-8").splitlines())


def statements(path: Path) -> int:
    """Statements of a file, docstrings left out: a size that no wrapping of lines changes."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return sum(isinstance(node, ast.stmt) and not _is_text(node) for node in nodes)


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


# Layout


def layout(tree: Path) -> dict[str, str]:
    """The numbers of docs/design/layout.md, by label."""
    sizes = {path: lines(path) for path in tracked(tree, *ROOTS)}
    markers = [path for path in sizes if path.name == "__init__.py" and sizes[path] <= 6]
    real = {path: size for path, size in sizes.items() if path not in markers}
    largest = max(real, key=lambda path: real[path])
    chart = probe(tree, "graph")
    keys = list(probe(tree, "config_keys"))
    tried = [key for key in keys if key.startswith("experimental.")]
    ways = probe(tree, "stays")
    opened, asked = ways["open_retriever"], ways["http_question"]
    handing = {name for classes in asked["same_name"].values() for name in classes}
    tests = tracked(tree, "tests")
    table = {
        "modules": f"{len(sizes)} ({len(markers)} of them package markers)",
        "source lines": f"{sum(sizes.values()):,}",
        "source statements": f"{sum(map(statements, sizes)):,}",
        "test lines": f"{sum(map(lines, tests)):,}",
        "test statements": f"{sum(map(statements, tests)):,}",
        "median module, lines": f"{statistics.median(real.values()):g}",
        "largest module, lines": f"{real[largest]} ({largest.relative_to(tree)})",
        "modules above 350 lines": str(sum(size > 350 for size in real.values())),
        "layers: rooms on the longest chain of imports": str(chart["room_layers"]),
        "layers: modules on it": str(chart["module_layers"]),
        "settings": str(len(keys) - len(tried)),
        "settings in `experimental`": str(len(tried)),
    }
    for name, way in {"`open_retriever`": opened, "a question over HTTP": asked}.items():
        table[f"{name}: modules on the way"] = str(len(set(way["modules"])))
        table[f"{name}: stays in a module"] = str(len(way["modules"]))
        table[f"{name}: climbs to a higher room"] = str(way["climbs"])
    table["a question over HTTP: classes whose methods run"] = str(len(asked["classes"]))
    names = ", ".join(f"`{method}`" for method in asked["same_name"])
    table[f"of these, classes with a method {names}"] = str(len(handing & {*asked["classes"]}))
    for method, classes in asked["same_name"].items():
        table[f"classes with a method `{method}`, all"] = str(len(classes))
    return table


def ways(tree: Path) -> str:
    """The ways through the code, spelled out."""
    found = probe(tree, "stays")
    told = []
    for name, way in found.items():
        told.append(f"{name}: {' > '.join(way['modules'])}")
        told += [f"  class {each}" for each in way.get("classes", [])]
        for method, classes in way.get("same_name", {}).items():
            told.append(f"  with `{method}`: {', '.join(classes)}")
    return "\n".join(told)


def side_by_side(tables: dict[str, dict[str, str]]) -> str:
    """Tables with the same labels as columns of one, in markdown."""
    rows = [["", *tables], ["---"] * (len(tables) + 1)]
    rows += [[label, *(t[label] for t in tables.values())] for label in next(iter(tables.values()))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# Dump


def dump(tree: Path) -> dict[str, Any]:
    """The public face of a tree, its tests, and how it fails; `house_compare` reads it."""
    commit = subprocess.run(
        ["git", "-C", str(tree), "rev-parse", "HEAD"], stdout=subprocess.PIPE, text=True, check=True
    )
    return {
        "kind": "face",
        "commit": commit.stdout.strip(),
        **probe(tree, "face"),
        "exits": exits(tree),
        "tests": collected(tree),
        "assertions": assertions(tree),
    }


def exits(tree: Path) -> dict[str, dict[str, Any]]:
    """Exit code, and what is said on standard error, of each of `CASES`."""
    found = {}
    for label, (program, *arguments) in CASES.items():
        with tempfile.TemporaryDirectory(prefix="house") as folder:
            empty = Path(folder, "empty")
            empty.mkdir()
            given = [text.format(empty=empty, missing=f"{folder}/missing") for text in arguments]
            start = ["-c", ENTRY, str(tree)] if program == "cli" else ["-m", program]
            command = [sys.executable, "-P", *start, *given]
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment(tree),
                capture_output=True,
                text=True,
                check=False,
            )
            found[label] = {"rc": done.returncode, "stderr": done.stderr.replace(folder, "..")}
    return found


def collected(tree: Path) -> dict[str, list[str]]:
    """Names of all tests, slow ones included, by file.

    Raises:
        SystemExit: if pytest cannot collect them all.
    """
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"pytest cannot collect the tests of {tree}:\n{done.stdout}{done.stderr}")
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        file, separator, name = line.partition("::")
        if separator and file.endswith(".py"):
            found.setdefault(file, []).append(name)
    return found


def assertions(tree: Path) -> dict[str, dict[str, int]]:
    """Checks in each test function, and in other functions of test files (as `helpers`), by
    file.
    """
    found = {}
    for path in tracked(tree, "tests"):
        counts = dict.fromkeys(["helpers"], 0)
        for node in ast.walk(module := ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                and node.name[:5] == "test_"
            ):
                counts[node.name] = counts.get(node.name, 0) + _checks(node)
        counts["helpers"] = _checks(module) - sum(counts.values())
        found[path.relative_to(tree).as_posix()] = counts
    return found


def _checks(node: ast.AST) -> int:
    calls = {"raises", "warns", "fail"}
    return sum(
        isinstance(inner, ast.Assert)
        or (
            isinstance(inner, ast.Call)
            and isinstance(inner.func, ast.Attribute)
            and inner.func.attr in calls
            and isinstance(inner.func.value, ast.Name)
            and inner.func.value.id == "pytest"
        )
        for inner in ast.walk(node)
    )
