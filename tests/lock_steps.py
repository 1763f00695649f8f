"""Records the code of every step, so that a change to it cannot go by unnoticed.

    python -m tests.lock_steps

Run it after a change to a step's modules, once its version in ``invar_ray/versions.py`` is right:
raised if the output changed, as it was if not.  ``tests/unit/test_versions.py`` compares.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from invar_ray.versions import STEPS, StepCode

LOCK = Path(__file__).parent / "assets" / "step_sources.json"
# Added to the syntax tree by Python 3.12, and empty here.
_IGNORED_FIELDS = {"type_params"}


def code_hash(source: str) -> str:
    """16 hex digits that change with the code, but not with comments, docstrings or layout.

    The same for all Python versions that the project supports: absent and empty fields are left
    out.
    """
    return hashlib.sha256(json.dumps(_tree(ast.parse(source))).encode()).hexdigest()[:16]


def module_file(module: str) -> Path:
    """Source file of a module.

    Raises:
        ModuleNotFoundError: if there is no such module.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module {module}")
    return Path(spec.origin)


def current(steps: Mapping[str, StepCode]) -> dict[str, dict[str, Any]]:
    """Version and code of every step as they are now."""
    hashes = {
        module: code_hash(module_file(module).read_text(encoding="utf-8"))
        for module in sorted({module for step in steps.values() for module in step.modules})
    }
    return {
        name: {
            "version": step.version,
            "modules": {module: hashes[module] for module in sorted(step.modules)},
        }
        for name, step in sorted(steps.items())
    }


def differences(locked: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is to be decided, one line a step; empty if nothing changed."""
    lines = []
    for name in sorted({*locked, *now}):
        old, new = locked.get(name), now.get(name)
        if old is None or new is None:
            lines.append(
                f"{name}: the step is {'new' if old is None else 'gone'}. Run: python -m "
                "tests.lock_steps"
            )
            continue
        changed = sorted(
            module
            for module in {*old["modules"], *new["modules"]}
            if old["modules"].get(module) != new["modules"].get(module)
        )
        if old["version"] != new["version"]:
            lines.append(
                f"{name}: version {new['version']} is not recorded yet (recorded: "
                f"{old['version']}). "
                "Run: python -m tests.lock_steps"
            )
        elif changed:
            lines.append(
                f"{name}: the code of {', '.join(changed)} changed. Raise STEPS[{name!r}].version "
                "in "
                "invar_ray/versions.py if the output changes, then run: python -m tests.lock_steps"
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
    """The parts of an f-string without the empty text that some Python versions put between them."""
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
    now = current(STEPS)
    lines = differences(locked, now)
    LOCK.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    print("\n".join(lines) if lines else "nothing changed", flush=True)


if __name__ == "__main__":
    main()
