"""No step's code changes unnoticed: a stale artifact is worse than a slow run."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from invar_ray import steps
from tests.lock_steps import KINDS, LOCK, closure, code_hash, current, differences

PLAIN = """
import math
RATE = 0.5

def scale(x: float) -> float:
    return math.sqrt(x) * RATE
"""
DRESSED = '''
"""What this is."""

import math  # roots

RATE = 0.5
"""What the rate is."""


def scale(x: float) -> float:
    """What it does."""
    # why
    return (
        math.sqrt(x) * RATE
    )
'''


def test_hash_ignores_comments_docstrings_and_layout() -> None:
    assert code_hash(DRESSED) == code_hash(PLAIN)


@pytest.mark.parametrize(
    "old, new",
    [
        ("RATE = 0.5", "RATE = 0.25"),
        ("RATE = 0.5", "RATE = '0.5'"),
        ("RATE = 0.5", "RATE = 5"),
        ("math.sqrt(x) * RATE", "math.sqrt(x) / RATE"),
        ("math.sqrt(x) * RATE", "math.exp(x) * RATE"),
        ("x: float)", "x: float, y: float = 1.0)"),
        ("return math", "x += 1\n    return math"),
    ],
)
def test_hash_sees_changed_code(old: str, new: str) -> None:
    assert old in PLAIN
    assert code_hash(PLAIN.replace(old, new)) != code_hash(PLAIN)


def test_hash_tells_values_of_equal_text_apart() -> None:
    rewrites = [
        "x = 1",
        "x = 1.0",
        "x = True",
        "x = '1'",
        "x = b'1'",
        "x = None",
        "x = ...",
        "x = []",
        "x = ()",
    ]
    assert len({code_hash(source) for source in rewrites}) == len(rewrites)


def test_hash_sees_a_string_that_is_a_value() -> None:
    assert code_hash("x = 'a'") != code_hash("x = 'b'")
    assert code_hash("f('a')") != code_hash("f('b')")


def test_hash_is_the_same_in_every_supported_python() -> None:
    # Recorded; run in 3.11, 3.12 and 3.13. A generic tree dump differs between them.
    source = (
        "class A:\n    x: int = 1\n    def f(self, *a, k=None, **b): return f'{a!r:>{k}} {b}' 'c'\n"
    )
    assert code_hash(source) == "a4107197aaf22d90"


def test_code_of_every_step_is_recorded() -> None:
    lines = differences(json.loads(LOCK.read_text(encoding="utf-8")), current())
    assert not lines, "\n" + "\n".join(lines)


def test_change_is_named_with_what_to_do() -> None:
    now: dict[str, Any] = {"index": {"version": 1, "modules": {"a.b": "0" * 16, "a.c": "1" * 16}}}
    locked = json.loads(json.dumps(now))
    assert differences(locked, now) == []
    locked["index"]["modules"]["a.c"] = "2" * 16
    (line,) = differences(locked, now)
    assert line == (
        "index: the code of a.c changed. Raise VERSION in invar_ray/steps/index.py if the output "
        "changes, then run: python -m tests.lock_steps"
    )
    now["index"]["version"] = 2
    assert "version 2 is not recorded yet (recorded: 1)" in differences(locked, now)[0]
    assert "the step is new" in differences({}, now)[0]
    assert "the step is gone" in differences(locked, {})[0]


def test_module_that_a_step_newly_imports_is_a_change() -> None:
    old = {"index": {"version": 1, "modules": {"a.b": "0"}}}
    new = {"index": {"version": 1, "modules": {"a.b": "0", "a.c": "1"}}}
    assert "the code of a.c changed" in differences(old, new)[0]


@pytest.mark.parametrize(
    ("kind", "far"),
    [
        ("passages", "invar_ray.corpus.formats.pdf"),
        ("passages", "invar_ray.text.chunking"),
        ("questions", "invar_ray.questions.lexicon"),
        ("vectors", "invar_ray.models.encoder"),
        ("index", "invar_ray.index.planner"),
        ("trainset", "invar_ray.training.mining"),
        ("retriever", "invar_ray.losses.invariance"),
        ("generator", "invar_ray.losses.answer"),
        ("hits", "invar_ray.answering.bm25"),
        ("report", "invar_ray.evaluation.variance"),
    ],
)
def test_what_a_step_imports_by_way_of_others_counts(kind: str, far: str) -> None:
    assert far in closure(kind)


def test_every_step_with_a_version_is_looked_after() -> None:
    folder = Path(steps.__file__).parent
    with_version = {
        file.stem
        for file in folder.glob("*.py")
        if hasattr(import_module(f"invar_ray.steps.{file.stem}"), "VERSION")
        and "def plan(" in file.read_text(encoding="utf-8")
    }
    assert with_version == set(KINDS)
