"""``invar-ray demo`` as a user runs it: corpus to served answer, and nothing left running."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
TINY = [
    "experimental.model.tiny.num_layers=1",
    "experimental.model.tiny.intermediate_size=64",
    "questions.train_limit=15",
    "questions.dev_limit=6",
    "corpus.distractors=10",
    "retriever.steps=2",
    "generator.steps=2",
    "generator.max_new_tokens=6",
    "evaluation.num_answers=4",
]


class Demo:
    """A running demo: its output so far, and every process it ever started."""

    def __init__(self, root: Path, log: Path, *options: str) -> None:
        self.log = log
        self.seen: set[psutil.Process] = set()
        with open(log, "w") as stream:
            self.process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("invar-ray")),
                    "demo",
                    "--config",
                    "tiny",
                    *options,
                    f"storage.root_uri={root}",
                    *TINY,
                ],
                cwd=ROOT,
                # Short, for Ray's sockets below it.
                env=os.environ
                | {"TMPDIR": tempfile.mkdtemp(prefix="id", dir="/tmp"), "PYTHONUNBUFFERED": "1"},
                stdout=stream,
                stderr=stream,
            )

    def text(self) -> str:
        """What it printed, but for a helper actor of Ray Train's that cannot bear a second Ray on
        the machine.
        """
        return "".join(line for line in open(self.log) if "(PlacementGroupCleaner pid=" not in line)

    def wait(self, until: str | None, timeout_s: float) -> None:
        """Until it has printed ``until``, or has ended."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None and (until is None or until not in self.text()):
            assert time.monotonic() < deadline, self.text()[-4000:]
            try:
                self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.3)

    def left(self, timeout_s: float = 45) -> list[str]:
        """Names of its processes that are still there."""
        _, alive = psutil.wait_procs(self.seen, timeout=timeout_s)
        return [process.name() for process in alive]

    def end(self) -> None:
        for process in [psutil.Process(self.process.pid)] if self.process.poll() is None else []:
            process.kill()
        for process in self.seen:
            if process.is_running():
                process.kill()


def check_report(path: Path, question: str) -> None:
    """The schema that ``invar_ray/evaluation/report.py`` documents."""
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert report["schema_version"] == 1
    assert {row["system"] for row in report["rows"]} >= {"MiniLM", "base", "stage 1", "both stages"}
    for row in report["rows"]:
        assert row.keys() >= {"system", "dataset", "metrics"}
        assert all(isinstance(value, float) for value in row["metrics"].values())
    assert report["seconds"].keys() >= {
        "stage 1: retriever",
        "stage 2: generator",
        "report",
        "serve and answer",
    }
    assert all(value >= 0 for value in report["seconds"].values())
    assert report["answer"].keys() == {"question", "text", "citations"}
    assert report["answer"]["question"] == question
    assert isinstance(report["answer"]["text"], str)
    for citation in report["answer"]["citations"]:
        assert citation.keys() >= {"number", "passage_id", "title"}
    assert Path(report["meta"]["index"], "manifest.json").is_file()
    assert Path(report["meta"]["generator"], "manifest.json").is_file()


def test_the_demo_answers_and_leaves_only_its_files_and_then_serves_until_ctrl_c(
    tmp_path: Path,
) -> None:
    root, question = tmp_path / "s", "Which element has the symbol Fe?"
    demo = Demo(root, tmp_path / "first.log", "--question", question)
    try:
        demo.wait(None, 600)
        text = demo.text()
        assert demo.process.wait() == 0, text[-4000:]
        assert len(demo.seen) > 3, "no process of its Ray was seen: the test proves nothing"
        assert demo.left() == []
    finally:
        demo.end()
    assert "everything is shut down" in text
    assert "Traceback" not in text
    assert re.search(r"^answer: ", text, re.MULTILINE)
    assert re.search(r"^  (\[\d\] |no citation; the passages were: )", text, re.MULTILINE), text[
        -3000:
    ]
    assert "recall@5" in text
    # What a user reads: the plan, a line a step, the end; nothing of Ray's.
    assert len(text.splitlines()) <= 60, text
    assert "steps, about" in text
    assert re.search(r"^\[\d+/\d+\] stage 1: retriever: ", text, re.MULTILINE)
    assert not re.search(r"core_worker|TrainingReport|infinite retries|raylet|\x1b|re-used", text)
    assert len(text.partition("system ")[2].splitlines()) <= 25, text
    check_report(root / "report.json", question)

    # Again, from what stands; this time it goes on serving.
    demo = Demo(root, tmp_path / "second.log", "--keep")
    try:
        demo.wait("until Ctrl-C", 300)
        text = demo.text()
        found = re.search(r"serving at (\S+) until Ctrl-C", text)
        assert found is not None, text[-4000:]
        assert re.search(r"\d+ steps stand from an earlier run", text)
        assert "stage 1: retriever: " not in text, "it trained again"
        answer = httpx.post(
            f"{found[1]}/v1/answer", json={"question": question}, timeout=60, trust_env=False
        ).json()
        assert len(answer["passages"]) == 3
        assert all(passage["text"] for passage in answer["passages"])
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(timeout=120) == 130, demo.text()[-4000:]
        assert demo.left() == []
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{found[1]}/readyz", timeout=5, trust_env=False)
    finally:
        demo.end()
    assert "Traceback" not in demo.text()
