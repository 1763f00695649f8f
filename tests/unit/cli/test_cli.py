"""The command line: what a user sees who makes a mistake, and the commands that need no cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from invar_ray import __version__
from invar_ray.cli.ask import print_answer
from invar_ray.cli.main import app

run = CliRunner()


def test_help_lists_the_commands() -> None:
    shown = run.invoke(app, ["--help"]).output
    for command in ("demo", "index", "train", "evaluate", "ask", "serve", "doctor"):
        assert command in shown


def test_version() -> None:
    result = run.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == __version__


def test_all_faults_of_a_config_in_one_error_without_traceback() -> None:
    result = run.invoke(app, ["evaluate", "retriever.lr=1", "seed=x"])
    assert result.exit_code == 1
    assert "2 faults" in result.stderr
    assert "retriever.lr: unknown key" in result.stderr
    assert "seed: " in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_recipe_names_the_known_ones() -> None:
    result = run.invoke(app, ["evaluate", "--config", "tinny"])
    assert result.exit_code == 1
    assert "did you mean 'tiny'" in result.stderr


def test_asking_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run.invoke(app, ["ask", "Which element has the symbol Fr?"])
    assert result.exit_code == 1
    assert "no index below" in result.stderr
    assert "invar-ray demo" in result.stderr


def test_asking_a_service_that_is_not_there() -> None:
    result = run.invoke(app, ["ask", "who?", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "cannot reach http://127.0.0.1:9/v1/answer" in result.stderr


def test_unknown_stage() -> None:
    result = run.invoke(app, ["train", "both_of_them"])
    assert result.exit_code == 2
    assert "retriever, generator or both" in result.stderr


def test_missing_corpus(tmp_path: Path) -> None:
    place = tmp_path / "nowhere.jsonl"
    result = run.invoke(app, ["index", str(place), f"storage.root_uri={tmp_path / 'runs'}"])
    assert result.exit_code == 1
    assert "nowhere.jsonl" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists(), "it loaded the base first"


def test_answer_is_printed_with_its_citations(capsys: pytest.CaptureFixture[str]) -> None:
    passage = {"passage_id": "p1", "title": "Francium", "text": "Francium is a metal."}
    citation = {"number": 1, "passage_id": "p1", "title": "Francium", "source": "generated"}
    print_answer(
        {
            "answer": "Fr",
            "citations": [citation],
            "passages": [passage],
            "notes": ["one passage was dropped"],
        }
    )
    assert capsys.readouterr().out.splitlines() == [
        "answer: Fr",
        "  [1] Francium: Francium is a metal.",
        "  note: one passage was dropped",
    ]


def test_empty_answer_is_said_and_its_passages_named(capsys: pytest.CaptureFixture[str]) -> None:
    passage = {"passage_id": "p1", "title": "Francium", "text": "Francium is a metal."}
    print_answer({"answer": "", "citations": [], "passages": [passage]})
    shown = capsys.readouterr().out
    assert "(the model wrote nothing)" in shown
    assert "no citation; the passages were:\n  (1) Francium: Francium is a metal." in shown


def test_a_guess_is_told_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"answer": "The passages do not answer the question.", "citations": [], "passages": []}
    print_answer({**found, "low_confidence": True, "guess": "Fr", "probability": 0.456})
    shown = capsys.readouterr().out
    assert "answer: none is sure enough; best guess (46%): Fr" in shown
    assert "do not answer" not in shown


def test_no_text_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "a\x1b[2J\u202eb\x07"
    passage = {"passage_id": "p1", "title": evil, "text": evil}
    citation = {"number": 1, "passage_id": "p1", "title": evil, "place": evil, "source": "matched"}
    found = {"answer": evil, "citations": [citation], "passages": [passage], "notes": [evil]}
    print_answer(found)
    print_answer({**found, "citations": []})
    print_answer({**found, "low_confidence": True, "guess": evil, "probability": 0.5})
    shown = capsys.readouterr().out
    assert not set(shown) & set("\x1b\u202e\x07")
    assert shown.count("a [2J b") == 12


def test_serving_a_mistyped_store_fails_at_once_and_makes_nothing(tmp_path: Path) -> None:
    place = tmp_path / "mistyped"
    # In a process of its own: what it had to import says how fast it can be on any machine.
    code = (
        "import sys\nfrom invar_ray.cli.main import app\n"
        f"try: app(['serve', 'storage.root_uri={place}', 'serve.port=0'])\n"
        "finally: print(sorted({'ray', 'torch', 'transformers'} & set(sys.modules)))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100
    )
    assert found.returncode == 1
    assert found.stdout == "[]\n"
    assert found.stderr == (
        f"error: storage.root_uri is {place}, and nothing is there. Expected: the store of a "
        "finished run. "
        "To do: correct storage.root_uri, or make one with invar-ray demo or invar-ray train.\n"
    )
    assert not place.exists()


def test_serving_a_store_of_something_else_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a folder, but no store")
    result = run.invoke(app, ["serve", f"storage.root_uri={tmp_path}"])
    assert result.exit_code == 1
    assert f"storage.root_uri is {tmp_path}, which holds no index" in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
