"""What the documentation tells people to type: every command parses, every setting exists, and the
notebook runs.

``test_documented_commands.py`` runs them.
"""

from __future__ import annotations

import json
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from invar_ray.cli.main import app
from invar_ray.config import load_config, recipe_names

ROOT = Path(__file__).parents[3]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NOT_OURS = {
    "pip",
    "export",
    "ray",
    "serve",
    "ray-auth",
    "tensorboard",
    ".",
    "cd",
    "docker",
    "git",
    "curl",
}
"""Programs of others: what they do with these lines is theirs to test."""
GIVEN = {"mine.yaml": "demo"}
"""Files that the text has just told people to write, and what stands for them here."""


def commands(kind: str) -> list[tuple[str, str]]:
    """(page, command) of all fenced blocks of a language."""
    found = []
    for page in PAGES:
        for block in re.findall(rf"```{kind}\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if command := re.sub(r"(^|\s)#.*", "", line).strip():
                    found.append((page.name, command))
    return found


@pytest.mark.parametrize(("page", "command"), commands("bash"))
def test_every_command_is_one(page: str, command: str) -> None:
    words = shlex.split(command)
    if words[0] == "export" and "&&" in words:
        return
    program = words[0].removeprefix(".venv/bin/")
    if words[:3] == ["ray", "job", "submit"]:
        words = words[words.index("--") + 1 :]
        program = words[0]
    if program == "invar-ray":
        parse(words[1:])
    elif program == "python":
        if words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file()
            return
        assert words[1] == "-m"
        assert find_spec(words[2]) is not None, words[2]
        if words[2].startswith("benchmarks."):  # these take no recipe
            return
        recipe, overrides = words[words.index("--config") + 1], words[words.index("--config") + 2 :]
        own = getattr(import_module(words[2]), "_OPTIONS", {})
        overrides = [each for each in overrides if each.partition("=")[0] not in own]
        load_config(GIVEN.get(recipe, recipe), overrides)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text("utf-8")
        assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE), command
    else:
        assert program in NOT_OURS, f"{page}: {command}"


def parse(words: list[str]) -> None:
    """As the program does before it runs a command; overrides and recipe are loaded."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("invar-ray", list(words), resilient_parsing=False)
    rest = [*context._protected_args, *context.args]
    while hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
        context = command.make_context(name, rest, parent=context)
        rest = [*getattr(context, "_protected_args", []), *context.args]
    given = context.params
    overrides = given.get("overrides") or []
    if isinstance(given.get("stage"), str) and "=" in given["stage"]:
        overrides = [given["stage"], *overrides]
    load_config(GIVEN.get(given.get("config") or "demo", given.get("config") or "demo"), overrides)


def test_the_recipes_that_are_shown_are_recipes(tmp_path: Path) -> None:
    shown = 0
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            values = yaml.safe_load(block)
            if isinstance(values, dict) and "extends" in values:
                shown += 1
                (tmp_path / "mine.yaml").write_text(block)
                assert load_config(str(tmp_path / "mine.yaml")).name == values["name"]
    assert shown
    assert "demo" in recipe_names()


def test_a_command_that_is_not_there_is_seen() -> None:
    with pytest.raises(Exception, match="steps_of"):
        parse(["train", "both", "retriever.steps_of=3"])
    with pytest.raises(KeyError):
        parse(["trian"])


def test_the_python_that_is_shown_imports_what_there_is() -> None:
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            compile(block, page.name, "exec")
            for line in re.findall(r"^(?:from|import) (?:invar_ray|serve).*$", block, re.MULTILINE):
                exec(line, {})
            for name in re.findall(r"invar_ray\.(\w+)\(", block):
                import invar_ray

                assert name in invar_ray.__all__


@pytest.mark.timeout(600)
def test_the_notebook_runs_and_shows_what_it_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "docs" / "guides" / "quickstart.ipynb", as_version=4)
    stored = _results(notebook)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert _results(notebook) == stored


def _results(notebook: Any) -> list[str]:
    """What cells end with; numbers to two digits, which differ between machines beyond that."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output["output_type"] == "execute_result":
                text = "".join(output["data"]["text/plain"])
                found.append(re.sub(r"\d+\.\d+", lambda n: f"{float(n[0]):.2f}", text))
    return found


def test_the_notebook_is_small_and_plain() -> None:
    text = (ROOT / "docs" / "guides" / "quickstart.ipynb").read_text("utf-8")
    assert len(text) < 20_000
    assert not re.search(r"/(home|root|tmp|work)/", json.loads(text) and text)
