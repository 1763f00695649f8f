"""Commands that do not surprise: what they refuse at once, what they choose, what they list."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from invar_ray.cli.main import app
from invar_ray.config import Config, config_keys, load_config
from invar_ray.config.load import explain_settings
from invar_ray.corpus.readlog import ReadLog
from invar_ray.errors import DataError
from invar_ray.evaluation.gate import best_system
from invar_ray.evaluation.page import headline
from invar_ray.evaluation.report import Report, Row
from invar_ray.questions.benchmarks import read_benchmark
from invar_ray.steps.passages import read_corpus
from tests.support import documents, write_lines

NOT_FOR_A_QUESTION = {
    *("torch", "ray", "transformers", "pyarrow", "numpy", "yaml", "fsspec"),
    *("httpx", "rich", "asyncio", "invar_ray.config", "invar_ray.pipeline", "serve.app"),
}
"""What neither a question to a service nor ``--help`` may import."""


@pytest.mark.parametrize("command", ["index", "questions"])
def test_a_corpus_that_is_not_there_fails_before_anything_is_made(
    command: str, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    found = CliRunner().invoke(
        app, [command, str(tmp_path / "nothing"), f"storage.root_uri={root}"]
    )
    assert found.exit_code == 1
    assert "no file or folder" in found.output
    assert not root.exists()


def test_a_store_that_is_not_there_has_no_versions(tmp_path: Path) -> None:
    shown = ["index-versions", "list", "--root"]
    missing = CliRunner().invoke(app, [*shown, str(tmp_path / "nothing")])
    assert missing.exit_code == 1
    assert "there is no store at" in missing.output
    empty = CliRunner().invoke(app, [*shown, str(tmp_path)])
    assert empty.exit_code == 0
    assert "nothing has been published" in empty.output


def test_asking_over_http_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, time\n"
        "sys.argv = ['invar-ray', 'ask', 'Who?', '--url', 'http://127.0.0.1:9']\n"
        "from invar_ray.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 1\n"
        f"heavy = {NOT_FOR_A_QUESTION} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(time.process_time())"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "cannot reach http://127.0.0.1:9" in made.stderr
    assert float(made.stdout) < 2.0  # measured: 0.6 s; a busy machine's caches are cold


def test_no_line_of_the_help_is_cut() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "..." not in shown.partition("Commands:")[2]
    assert max(map(len, shown.splitlines())) <= 80


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, time\n"
        "sys.argv = ['invar-ray', 'ask', '--help']\n"
        "from invar_ray.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"heavy = {NOT_FOR_A_QUESTION} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_settings_are_listed_with_meaning_and_default() -> None:
    config = load_config("demo")
    listed = {setting.key: setting for setting in explain_settings(config)}
    leaves = {
        key for key in config_keys() if not any(k.startswith(f"{key}.") for k in config_keys())
    }
    assert listed.keys() == leaves
    assert not [key for key, setting in listed.items() if not setting.meaning]
    steps = listed["retriever.steps"]
    assert (steps.value, steps.default, steps.meaning) == (
        config.retriever.steps,
        Config().retriever.steps,
        "Optimizer steps.",
    )
    shown = CliRunner().invoke(app, ["config", "--changed", "--key", "retriever.steps"])
    assert shown.output.startswith("retriever.steps = 60   (default 1000)\n    Optimizer steps.")
    assert "seed" not in CliRunner().invoke(app, ["config", "--changed"]).output.split()


def report(**recall: float) -> Report:
    rows = [Row(name.replace("_", " "), "dev", {"recall_at_5": r}) for name, r in recall.items()]
    return Report(rows)


def test_the_gate_judges_the_trained_row_that_finds_most() -> None:
    assert best_system(report(BM25=0.9, base=0.3, stage_1=0.6), 5) == "stage 1"
    assert best_system(report(stage_1=0.6, both_stages=0.6), 5) == "both stages"
    mixed = Report([*report(stage_1=0.6).rows, Row("stage 1 + BM25", "d", {"recall_at_5": 0.8})])
    assert best_system(mixed, 5) == "stage 1 + BM25"
    with pytest.raises(DataError, match="no trained system"):
        best_system(report(BM25=0.9, base=0.3), 5)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.2, "better than its base"),
        (-0.2, -0.1, "WORSE than its base"),
        (-0.1, 0.1, "no difference"),
    ],
)
def test_a_report_says_whether_training_helped_and_what_to_do(
    low: float, high: float, said: str
) -> None:
    entry = {"first": "base", "second": "stage 1", "metric": "recall_at_5", "low": low}
    found = headline(
        Report(report(base=0.3, stage_1=0.4, BM25=0.9).rows, comparisons=[{**entry, "high": high}])
    )
    assert found[0] == "Document among the first 5: stage 1 40%, base 30%, BM25 90%."
    assert said in found[-1]
    assert ("To do:" in found[-1]) == (low <= 0)
    # The demo's report has no base row: MiniLM is what its stage 1 starts from.
    demo = {**entry, "first": "MiniLM", "high": high}
    found = headline(Report(report(MiniLM=0.3, stage_1=0.4).rows, comparisons=[demo]))
    assert said.replace("its base", "MiniLM") in found[-1]


def squad(path: Path, names: list[str]) -> Path:
    rows = [row for row in documents() if row["title"] in names]
    data = [
        {
            "title": row["title"],
            "paragraphs": [
                {
                    "context": row["text"],
                    "qas": [
                        {
                            "id": f"q-{row['title']}",
                            "question": f"What do farmers grow on {row['title']}?",
                            "answers": [{"text": "barley", "answer_start": 0}],
                        }
                    ],
                }
            ],
        }
        for row in rows
    ]
    path.write_text(json.dumps({"version": "1.1", "data": data}))
    return path


def test_a_squad_file_is_corpus_and_questions(tmp_path: Path) -> None:
    folder = tmp_path / "squad"
    folder.mkdir()
    train = squad(folder / "train-v1.1.json", ["Arvon", "Belisk"])
    dev = squad(folder / "dev-v1.1.json", ["Corrie"])
    for uri, files in ((str(dev), [dev]), (str(folder), [train, dev])):
        config = load_config("tiny", [f"corpus.uri={uri}"])
        ids = {document.id for document in read_corpus(config, ReadLog())}
        asked = {
            name
            for file in files
            for example in read_benchmark(str(file)).examples
            for name in example.positive_ids
        }
        assert asked
        assert asked == ids
    plain = write_lines(tmp_path / "docs" / "corpus.jsonl", documents())
    config = load_config("tiny", [f"corpus.uri={plain.parent}"])
    assert len(list(read_corpus(config, ReadLog()))) == len(documents())
