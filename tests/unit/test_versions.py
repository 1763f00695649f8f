"""No step's code changes unnoticed: a stale artifact is worse than a slow run."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path

import pytest

import invar_ray
from invar_ray.versions import STEPS, StepCode
from tests.lock_steps import LOCK, code_hash, current, differences, module_file

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
    variants = [
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
    assert len({code_hash(source) for source in variants}) == len(variants)


def test_hash_sees_a_string_that_is_a_value() -> None:
    assert code_hash("x = 'a'") != code_hash("x = 'b'")
    assert code_hash("f('a')") != code_hash("f('b')")


def test_hash_is_the_same_in_every_supported_python() -> None:
    # Recorded; run in 3.11, 3.12 and 3.13. A generic tree dump differs between them.
    source = (
        "class A:\n    x: int = 1\n    def f(self, *a, k=None, **b): return f'{a!r:>{k}} {b}' 'c'\n"
    )
    assert code_hash(source) == "a4107197aaf22d90"


def test_every_module_exists() -> None:
    for name, step in STEPS.items():
        assert step.version >= 1
        assert len(set(step.modules)) == len(step.modules), f"{name} lists a module twice"
        for module in step.modules:
            assert module_file(module).is_file()


def test_code_of_every_step_is_recorded() -> None:
    lines = differences(json.loads(LOCK.read_text(encoding="utf-8")), current(STEPS))
    assert not lines, "\n" + "\n".join(lines)


def test_change_is_named_with_what_to_do() -> None:
    now = current(
        {"index": StepCode(1, ("invar_ray.index.faiss_index", "invar_ray.models.pooling"))}
    )
    locked = json.loads(json.dumps(now))
    assert differences(locked, now) == []
    locked["index"]["modules"]["invar_ray.models.pooling"] = "0" * 16
    (line,) = differences(locked, now)
    assert line == (
        "index: the code of invar_ray.models.pooling changed. Raise STEPS['index'].version in "
        "invar_ray/versions.py "
        "if the output changes, then run: python -m tests.lock_steps"
    )
    now["index"]["version"] = 2
    assert "version 2 is not recorded yet (recorded: 1)" in differences(locked, now)[0]
    assert "the step is new" in differences({}, now)[0]
    assert "the step is gone" in differences(locked, {})[0]


def test_module_added_to_a_step_is_a_change() -> None:
    old = current({"index": StepCode(1, ("invar_ray.index.faiss_index",))})
    new = current(
        {"index": StepCode(1, ("invar_ray.index.faiss_index", "invar_ray.models.pooling"))}
    )
    assert "invar_ray.models.pooling" in differences(old, new)[0]


# Modules that need no version, and why. Everything else must stand in a step.
EXEMPT = {
    "invar_ray.store.artifacts": "stores what steps make",
    "invar_ray.cli.main": "a shell",
    "invar_ray.cli.errors": "a shell",
    "invar_ray.cli.versions": "a shell",
    "invar_ray.store.conditional": "stores what steps make",
    "invar_ray.config": "its values are in the fingerprints",
    "invar_ray.cli.demo": "a shell",
    "invar_ray.cli.doctor": "a shell",
    "invar_ray.errors": "messages",
    "invar_ray.steps.blocks": "where blocks run",
    "invar_ray.store.files": "stores what steps make",
    "invar_ray.heap": "where memory lies, not what is in it",
    "invar_ray.store.garbage": "removes artifacts",
    "invar_ray.store.manifest": "stores what steps make, with a schema version of its own",
    "invar_ray.cli.documents": "a shell",
    "invar_ray.pipeline": "order of the steps",
    "invar_ray.console": "messages",
    "invar_ray.store.publication": "as published, with a schema version of its own",
    "invar_ray.store.published": "names what steps made",
    "invar_ray.schema": "records and their layout; readers would fail on another one",
    "invar_ray.executor": "where it runs",
    "invar_ray.versions": "this mechanism",
    "invar_ray.evaluation.plots": "pictures",
    "invar_ray.evaluation.report": "layout, with a schema version of its own",
    "invar_ray.evaluation.gate": "reads finished reports",
    "invar_ray.evaluation.tables": "print",
    "invar_ray.corpus.sources": "part of fingerprints itself",
    "invar_ray.steps.usage": "messages",
    "invar_ray.steps.verify": "checks what is made",
    "invar_ray.questions.asking": "makes files of questions, whose content is in the plans",
    "invar_ray.questions.cloze": "as asked",
    "invar_ray.corpus.facts": "the digest of the built-in corpus is in the plans",
    "invar_ray.questions.making": "as asked",
    "invar_ray.corpus.readlog": "messages",
    "invar_ray.training.checkpoint": "bit for bit, with a schema version of its own",
    "invar_ray.training.export": "copies, for others",
    "invar_ray.training.stages": "a registry",
    "invar_ray.training.tracking": "curves",
    "invar_ray.training.trainer": "starts workers",
}


def test_every_module_that_computes_is_in_a_step() -> None:
    root = Path(invar_ray.__file__).parent
    modules = {
        info.name
        for info in pkgutil.walk_packages([str(root)], "invar_ray.")
        if not info.ispkg and not info.name.startswith("invar_ray.text.data")
    }
    listed = {module for step in STEPS.values() for module in step.modules}
    assert not listed & EXEMPT.keys()
    assert not EXEMPT.keys() - modules, "exempt, but gone"
    forgotten = sorted(modules - listed - EXEMPT.keys())
    assert not forgotten, f"in no step of invar_ray/versions.py: {', '.join(forgotten)}"
