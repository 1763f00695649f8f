"""What `house.py` runs inside a tree: prints one JSON object about the tree that PYTHONPATH names.

It knows a tree by what it can do and not by where its modules lie: a function or class is looked
up by its name in the sources (:func:`symbol`), so that the same probe runs before and after a move.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import itertools
import json
import os
import re
import runpy
import statistics
import sys
import tempfile
import threading
import time
import tomllib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

TREE = Path.cwd()
ROOTS = ("invar_ray", "jobs", "serve")
QUESTION = "Who kept the light on Gorse Island?"


def symbol(name: str, *roots: str) -> Any:
    """The function or class that a module below `roots` defines under this name, at its top level.

    Raises:
        LookupError: if no module does, or several do.
    """
    found = []
    for root in roots or ROOTS:
        for path in sorted((TREE / root).rglob("*.py")):
            nodes = ast.parse(path.read_text(encoding="utf-8")).body
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            if any(isinstance(node, kinds) and node.name == name for node in nodes):
                found.append(module_name(path))
    if len(found) != 1:
        raise LookupError(f"{name} is defined in {found or 'no module'} of {TREE}")
    return getattr(importlib.import_module(found[0]), name)


def module_name(path: Path) -> str:
    """Dotted name of a module of the tree."""
    parts = path.relative_to(TREE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# The public face


def config_keys() -> dict[str, dict[str, Any]]:
    """Every setting (leaf) of Config: its type, and its default as plain values."""
    from invar_ray.config import Config

    return dict(_leaves(Config, Config(), ""))


def _leaves(kind: type, value: Any, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    hints = typing.get_type_hints(kind)  # without constraints: Annotated[int, ..] is an int
    names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    for name in names or list(kind.model_fields):  # type: ignore[attr-defined]
        hint, inner = hints[name], getattr(value, name)
        if dataclasses.is_dataclass(hint) or hasattr(hint, "model_fields"):
            yield from _leaves(hint, inner, f"{prefix}{name}.")
        else:
            written = (
                hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
            )
            written = re.sub(r"\b(?:\w+\.)+(?=\w)", "", written)
            yield f"{prefix}{name}", {"type": written, "default": _plain(inner)}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def recipes() -> dict[str, dict[str, Any]]:
    """What each recipe of the package comes to, by dotted key."""
    from invar_ray.config import Config, load_config, recipe_names

    found = {}
    for name in recipe_names():
        leaves = _leaves(Config, load_config(name), "")
        found[name] = {key: leaf["default"] for key, leaf in leaves}
    return found


def service() -> dict[str, Any]:
    """The service's OpenAPI description and all its routes, without anything behind them."""
    build = symbol("openapi_app")
    hints = typing.get_type_hints(build)
    given = {}
    for name, parameter in inspect.signature(build).parameters.items():
        # limits have defaults; a service is not asked
        if parameter.default is inspect.Parameter.empty:
            kind = hints.get(name)
            given[name] = kind.model_construct() if hasattr(kind, "model_construct") else None
    app = build(**given)
    routes = _routes(app.routes, "")
    return {"openapi": app.openapi(), "routes": sorted(set(routes))}


def _routes(routes: Any, prefix: str) -> Iterator[str]:
    for route in routes:
        inner = getattr(route, "routes", None) or getattr(
            getattr(route, "original_router", None), "routes", None
        )
        path = prefix + getattr(route, "path", "")
        if inner:
            yield from _routes(inner, path)
        elif getattr(route, "methods", None):
            yield from (f"{method} {path}" for method in route.methods if method != "HEAD")
        elif path:
            yield f"* {path}"


def entry_point() -> Callable[[], None]:
    """The function behind the script `invar-ray`."""
    declared = tomllib.loads((TREE / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, name = declared["project"]["scripts"]["invar-ray"].partition(":")
    return getattr(importlib.import_module(module), name)


def cli_help() -> dict[str, str]:
    """`--help` of the program and of every verb below it, at 100 columns."""
    import typer
    from typer.testing import CliRunner

    module = sys.modules[entry_point().__module__]
    apps = [value for value in vars(module).values() if isinstance(value, typer.Typer)]
    below = [group.typer_instance for app in apps for group in app.registered_groups]
    app = next(app for app in apps if app not in below)
    found: dict[str, str] = {}

    def visit(command: Any, path: list[str]) -> None:
        result = CliRunner().invoke(
            app, [*path, "--help"], prog_name="invar-ray", env={"COLUMNS": "100", "TERM": "dumb"}
        )
        if result.exit_code:
            raise RuntimeError(f"--help of {path} ends with {result.exit_code}: {result.output}")
        found[" ".join(["invar-ray", *path])] = result.output
        for name, inner in sorted(getattr(command, "commands", {}).items()):
            visit(inner, [*path, name])

    visit(typer.main.get_command(app), [])
    return found


def job_help() -> dict[str, str]:
    """`--help` of every module of jobs/ that runs as a program."""
    found = {}
    for path in sorted((TREE / "jobs").glob("*.py")):
        if "__main__" not in path.read_text(encoding="utf-8"):
            continue
        name, told = f"jobs.{path.stem}", io.StringIO()
        sys.argv = [str(path), "--help"]
        with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        found[name] = told.getvalue()
    return found


def face() -> dict[str, Any]:
    """All that others can see, in one process."""
    return {
        "config": config_keys(),
        "recipes": recipes(),
        **service(),
        "cli": cli_help(),
        "jobs": job_help(),
    }


# Ways through the code


class Walk:
    """Which modules and classes of the tree a call goes through, by a profiler hook."""

    def __init__(self) -> None:
        self.functions: list[CodeType] = []
        self._seen: set[CodeType] = set()
        self._lock = threading.Lock()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or code in self._seen or not is_ours(code) or code.co_name == "<module>":
            return
        with self._lock:
            self._seen.add(code)
            self.functions.append(code)

    def clear(self) -> None:
        """Begin anew."""
        with self._lock:
            self._seen.clear()
            self.functions.clear()

    def copy(self) -> Walk:
        """What was seen until now."""
        with self._lock:
            made = Walk()
            made.functions = list(self.functions)
            return made

    def modules(self) -> list[str]:
        """Modules in the order of the first call of each function, without repeats in a row."""
        order: list[str] = []
        for code in self.functions:
            name = module_name(Path(code.co_filename))
            if order[-1:] != [name]:
                order.append(name)
        return order

    def classes(self) -> list[str]:
        """`module.Class` of every method that was called, in order."""
        names: dict[str, None] = {}
        for code in self.functions:
            owner, _, method = code.co_qualname.replace("<locals>.", "").rpartition(".")
            is_method = code.co_varnames[:1] in {("self",), ("cls",)}
            if owner and is_method and not method.startswith("__"):
                names[f"{module_name(Path(code.co_filename))}.{owner}"] = None
        return list(names)


def is_ours(code: CodeType) -> bool:
    """Whether the code stands in the tree's own packages."""
    return any(code.co_filename.startswith(f"{TREE}{os.sep}{root}{os.sep}") for root in ROOTS)


def climbs(modules: list[str], ranks: dict[str, int]) -> int:
    """Steps of the way that lead to a higher room than the one before."""
    rooms = [room(name) for name in modules]
    return sum(ranks[after] > ranks[before] for before, after in itertools.pairwise(rooms))


def graph() -> dict[str, Any]:
    """Longest chains of the import graph, by rooms and by modules, and the rank of each module."""
    import grimp
    import networkx as nx

    found = grimp.build_graph(*ROOTS, cache_dir=None, exclude_type_checking_imports=True)
    modules, rooms = nx.DiGraph(), nx.DiGraph()
    for name in found.modules:
        modules.add_node(name)
        rooms.add_node(room(name))
        for imported in found.find_modules_directly_imported_by(name):
            modules.add_edge(name, imported)
            if room(name) != room(imported):
                rooms.add_edge(room(name), room(imported))
    ranks, layers = _ranks(rooms)
    chain = nx.dag_longest_path(houses := nx.condensation(rooms))
    return {
        "rooms": [" + ".join(sorted(houses.nodes[node]["members"])) for node in chain],
        "room_layers": layers,
        "module_layers": _ranks(modules)[1],
        "ranks": ranks,
    }


def _ranks(imports: Any) -> tuple[dict[str, int], int]:
    """For each node how long the chain of imports below it is, itself counted; and the longest."""
    import networkx as nx

    whole, ranks = nx.condensation(imports), {}
    for node in reversed(list(nx.topological_sort(whole))):
        ranks[node] = 1 + max((ranks[below] for below in whole.successors(node)), default=0)
    return {name: ranks[node] for name, node in whole.graph["mapping"].items()}, max(ranks.values())


def room(module: str) -> str:
    """The folder or file right below invar_ray; jobs and serve are one room each."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "invar_ray" else parts[0]


def stays() -> dict[str, Any]:
    """The ways of `open_retriever`, and of a question over HTTP, through a small store."""
    ranks = graph()["ranks"]
    open_retriever = symbol("open_retriever")
    with tempfile.TemporaryDirectory(prefix="house", dir="/tmp") as folder:
        artifacts = symbol("make_artifacts", "tests")(Path(folder))
        open_retriever(artifacts.index_uri)  # what is imported late is imported now
        walk = Walk()
        sys.setprofile(walk)
        open_retriever(artifacts.index_uri)
        sys.setprofile(None)
        asked = Walk()
        threading.setprofile(asked)  # the loop and the engine work in threads that start now
        with running(artifacts) as live:
            live("POST", "/v1/answer", json={"question": QUESTION}).raise_for_status()
            asked.clear()
            live("POST", "/v1/answer", json={"question": QUESTION}).raise_for_status()
            found = asked.copy()
        threading.setprofile(None)
    return {
        "open_retriever": {
            "modules": walk.modules(),
            "climbs": climbs(walk.modules(), ranks),
        },
        "http_question": {
            "modules": found.modules(),
            "climbs": climbs(found.modules(), ranks),
            "classes": found.classes(),
            "same_name": namesakes(),
        },
    }


def namesakes() -> dict[str, list[str]]:
    """Classes with a method `answer`, `stream` or `retrieve`: those that hand a question on."""
    found: dict[str, list[str]] = {"answer": [], "stream": [], "retrieve": []}
    for path in sorted(path for root in ROOTS for path in (TREE / root).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if (
                    isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef))
                    and inner.name in found
                ):
                    found[inner.name].append(f"{module_name(path)}.{node.name}")
    return found


@contextlib.contextmanager
def running(artifacts: Any) -> Iterator[Any]:
    """The service over small artifacts, in this process, behind a real web server
    (tests/serving.py).
    """
    live = symbol("Live", "tests")(artifacts)
    try:
        yield live
    finally:
        live.close()


# Numbers


def small_index(folder: str) -> dict[str, str]:
    """Small artifacts by this tree; URI of the index that holds all passages."""
    return {"index": symbol("make_artifacts", "tests")(Path(folder)).index_uri}


def hits(index: str, questions: str) -> dict[str, Any]:
    """What an index answers to questions (a file, one a line): passage ids and exact scores."""
    retriever = symbol("open_retriever")(index)
    asked = Path(questions).read_text(encoding="utf-8").splitlines()
    return {
        text: [[hit.passage_id, float(hit.score).hex()] for hit in found]
        for text, found in zip(asked, retriever.retrieve(asked, 10), strict=True)
    }


def encode(index: str, rows: str) -> dict[str, float]:
    """Rows a second, by the clock and by CPU time, of the encoder that an index names; one
    thread.
    """
    import torch

    torch.set_num_threads(1)
    encoder = symbol("open_retriever")(index).encoder
    sentence = (
        "The ferry to the mainland leaves at nine in the morning, and comes back before dark. "
    )
    pairs = [(f"Row {n}", f"{n}. " + sentence * (n % 4 + 1)) for n in range(int(rows))]
    encoder.encode_passages(pairs[:32])
    clock, cpu = time.perf_counter(), time.process_time()
    encoder.encode_passages(pairs)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    return {"rows_per_s": len(pairs) / clock, "rows_per_cpu_s": len(pairs) / cpu}


def serve(requests: str) -> dict[str, float]:
    """Median milliseconds of a search and of an answer over HTTP, one request at a time."""
    import torch

    torch.set_num_threads(1)
    result = {}
    with tempfile.TemporaryDirectory(prefix="house", dir="/tmp") as folder:
        with running(symbol("make_artifacts", "tests")(Path(folder))) as live:
            for path in ("/v1/retrieve", "/v1/answer"):
                times = []
                for number in range(int(requests) + 10):
                    begin = time.perf_counter()
                    live("POST", path, json={"question": f"{QUESTION} {number}"}).raise_for_status()
                    times.append(1000 * (time.perf_counter() - begin))
                result[f"{path} p50 ms"] = statistics.median(times[10:])
    return result


VERBS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (face, config_keys, graph, stays, small_index, hits, encode, serve)
}

if __name__ == "__main__":
    # Libraries print on standard output; the answer goes to the file named first.
    target, verb, *arguments = sys.argv[1:]
    answer = VERBS[verb](*arguments)
    Path(target).write_text(json.dumps(answer), encoding="utf-8")
