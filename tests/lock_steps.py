"""Records the code behind every artifact kind, so that a change to it cannot go by unnoticed.

    python -m tests.lock_steps

Run it after a change, once ``VERSION`` in the step's file is right: raised if the output changed,
as it was if not.  ``tests/unit/steps/test_versions.py`` compares.  What a step's code is, nobody
lists: it is all that its file imports, directly or not.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grimp

LOCK = Path(__file__).parent / "assets" / "step_code.json"
KINDS = (
    "base precision passages questions vectors shards centroids index trainset retriever hits "
    "readings generator report"
).split()
NOT_CONTENT = (
    "invar_ray.console",
    "invar_ray.errors",
    "invar_ray.executor",  # where it runs
    "invar_ray.heap",
    "invar_ray.session",
    "invar_ray.evaluation.plots",
    *(
        f"invar_ray.config.{name}"  # its values are in the fingerprints
        for name in (
            "corpus experimental faults fields load measuring models run scale training".split()
        )
    ),
    *(
        f"invar_ray.store.{name}"  # keeps what steps make, with a schema version of its own
        for name in "artifacts conditional files garbage manifest publication published".split()
    ),
)
"""Modules that cannot change what an artifact holds."""
# Added to the syntax tree by Python 3.12, and empty here.
_IGNORED_FIELDS = {"type_params"}


def code_hash(source: str) -> str:
    """16 hex digits that change with the code, but not with comments, docstrings or layout.

    The same for all Python versions that the project supports: absent and empty fields are left
    out.
    """
    return hashlib.sha256(json.dumps(_tree(ast.parse(source))).encode()).hexdigest()[:16]


@cache
def closure(kind: str) -> frozenset[str]:
    """The modules whose code decides what an artifact of this kind holds: all that its step
    imports.  Other steps' files are not among them: their artifacts are its parents, and carry
    versions of their own.
    """
    graph = grimp.build_graph("invar_ray")
    step = f"invar_ray.steps.{kind}"
    for other in (*NOT_CONTENT, *(f"invar_ray.steps.{name}" for name in KINDS if name != kind)):
        graph.remove_module(other)
    return frozenset({step, *graph.find_upstream_modules(step)})


def current() -> dict[str, dict[str, Any]]:
    """Version and code of every step as they are now."""
    return {
        kind: {
            "version": import_module(f"invar_ray.steps.{kind}").VERSION,
            "modules": {module: _hash_of(module) for module in sorted(closure(kind))},
        }
        for kind in KINDS
    }


@cache
def _hash_of(module: str) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module {module}")
    return code_hash(Path(spec.origin).read_text(encoding="utf-8"))


def differences(locked: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is to be decided, one line a step; empty if nothing changed."""
    lines = []
    for kind in sorted({*locked, *now}):
        old, new = locked.get(kind), now.get(kind)
        if old is None or new is None:
            state = "new" if old is None else "gone"
            lines.append(f"{kind}: the step is {state}. Run: python -m tests.lock_steps")
            continue
        changed = sorted(
            module
            for module in {*old["modules"], *new["modules"]}
            if old["modules"].get(module) != new["modules"].get(module)
        )
        if old["version"] != new["version"]:
            lines.append(
                f"{kind}: version {new['version']} is not recorded yet (recorded: "
                f"{old['version']}). Run: python -m tests.lock_steps"
            )
        elif changed:
            lines.append(
                f"{kind}: the code of {', '.join(changed)} changed. Raise VERSION in "
                f"invar_ray/steps/{kind}.py if the output changes, then run: "
                "python -m tests.lock_steps"
            )
    return lines


def _tree(node: Any) -> Any:
    if isinstance(node, ast.JoinedStr):
        return ["JoinedStr", [_tree(value) for value in _joined(node.values)]]
    if isinstance(node, ast.AST):
        fields = {
            name: _tree(value)
            for name, value in ast.iter_fields(node)
            if name not in _IGNORED_FIELDS
        }
        return [
            type(node).__name__,
            {name: value for name, value in fields.items() if value not in (None, [])},
        ]
    if isinstance(node, list):
        return [_tree(item) for item in node if not _is_text(item)]
    return (
        node
        if node is None or isinstance(node, (str, bool, int))
        else [type(node).__name__, repr(node)]
    )


def _joined(values: list[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string without the empty text that some Python versions put between
    them.
    """
    return [
        value for value in values if not (isinstance(value, ast.Constant) and value.value == "")
    ]


def _is_text(node: Any) -> bool:
    """A string on its own line: a docstring, of whatever."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def main() -> None:
    """Record, and say what changed."""
    locked = json.loads(LOCK.read_text(encoding="utf-8")) if LOCK.exists() else {}
    now = current()
    lines = differences(locked, now)
    LOCK.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines) if lines else "nothing changed", flush=True)


if __name__ == "__main__":
    main()
