"""The whole pipeline on a small corpus, in processes of a local Ray: what is made, what is re-used,
what is repeatable.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from invar_ray.answering.current import current_index, newest_generator
from invar_ray.config import load_config
from invar_ray.errors import ConfigError, DataError
from invar_ray.evaluation.per_question import open_report
from invar_ray.evaluation.report import Report, write_report
from invar_ray.pipeline import Pipeline
from invar_ray.session import RaySession
from invar_ray.store.artifacts import Artifact
from invar_ray.store.published import Published
from tests.distributed.small_store import small_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1800)]

OVERRIDES = (
    "retriever.steps=2",
    "generator.steps=2",
    "generator.max_new_tokens=4",
    "evaluation.num_rewrites=1",
    "evaluation.num_answers=2",
    "evaluation.answer_wordings=2",
    "scale.embed_workers=1",
    # Work of both kinds: both trainings, the search for the 15 questions of training and the base's
    # answers on Ray; what is smaller here. Embedding on Ray is test_embedding's.
    "scale.in_process_below=10",
    "scale.shard_rows=32",
)
RETRIEVING = [
    "BM25",
    "MiniLM",
    "MiniLM + BM25",
    "base",
    "stage 1",
    "stage 1 + BM25",
    "stage 1, rewrites fused",
]
SYSTEMS = [
    "BM25",
    "MiniLM",
    "MiniLM + BM25",
    "base",
    "base, closed book",
    "base, oracle passage",
    "stage 1",
    "stage 1 + BM25",
    "stage 1, rewrites fused",
    "both stages",
    "both stages, closed book",
    "both stages, oracle passage",
    "both stages, document gone",
]
ANSWERING = [
    name
    for name in SYSTEMS
    if name not in {"BM25", "MiniLM", "MiniLM + BM25", "stage 1 + BM25", "stage 1, rewrites fused"}
]
UNBOUNDED = {"gold_rank_std", "removed_citations", "num_families", "num_answered"}


class StartsRay(Exception):
    """A step wanted Ray."""


def pipeline_in(root: Path | str, *overrides: str) -> Pipeline:
    return Pipeline(small_config(root, [*OVERRIDES, *overrides]), quiet=True)


def adapter_hashes(adapter: Artifact) -> dict[str, str]:
    files = {
        name: entry["sha256"]
        for name, entry in adapter.manifest.files.items()
        if name.startswith("adapter/")
    }
    assert "adapter/adapter_model.safetensors" in files
    return files


@pytest.fixture(scope="module")
def first(
    local_ray: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Pipeline, Report, dict[str, str]]:
    """A run of everything: the pipeline, its report, and the stage-1 adapter's hashes from before
    stage 2.
    """
    pipeline = pipeline_in(tmp_path_factory.mktemp("p") / "s")
    before = adapter_hashes(pipeline.retriever)
    return pipeline, pipeline.run(), before


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any step that needs a cluster fails the test."""

    def refuse(self: RaySession) -> None:
        raise StartsRay

    monkeypatch.setattr(RaySession, "ensure", refuse)


def test_the_report_has_every_row_and_metrics_in_range(
    first: tuple[Pipeline, Report, dict[str, str]],
) -> None:
    _, report, _ = first
    assert [row.system for row in report.rows] == SYSTEMS
    for row in report.rows:
        for name, value in row.metrics.items():
            assert value is not None, (row.system, name)
            assert value >= 0.0, (row.system, name)
            assert value <= 1.0 or name in UNBOUNDED, (row.system, name, value)
    by_name = {row.system: row.metrics for row in report.rows}
    wanted = (
        "recall_at_1 recall_at_5 mrr_at_10 ndcg_at_10 answer_recall_at_5 overlap_at_5 "
        "worst_recall_at_5"
    )
    for system in (*RETRIEVING, "both stages"):
        assert set(wanted.split()) <= by_name[system].keys(), system
        assert by_name[system]["num_families"] == 6
    for system in ANSWERING:
        assert {
            "exact_match",
            "f1",
            "accuracy",
            "abstained",
            "calibration_error",
            "num_answered",
        } <= by_name[system].keys(), system
    assert by_name["both stages"]["recall_at_5"] == by_name["stage 1 + BM25"]["recall_at_5"], (
        "stage 2 retrieves as it is served"
    )
    assert by_name["MiniLM"]["recall_at_5"] > 0, (
        "MiniLM finds nothing at all: hits and questions are out of step"
    )


def test_the_reports_files_are_there_and_whole(
    first: tuple[Pipeline, Report, dict[str, str]],
) -> None:
    pipeline, report, _ = first
    for artifact in (pipeline.report, pipeline.retriever, pipeline.generator, pipeline.index):
        artifact.verify()
    assert {
        "report.json",
        "table.txt",
        "answers.jsonl",
        "recall.png",
        "variance.png",
    } <= pipeline.report.manifest.files.keys()
    answers = [
        json.loads(line)
        for line in pipeline.report.path("answers.jsonl").read_text("utf-8").splitlines()
    ]
    assert [answer["system"] for answer in answers] == [
        system for system in ANSWERING for _ in range(1 if system.endswith("gone") else 2)
    ]
    assert all(len(answer["texts"]) == 2 for answer in answers if answer["system"] == "both stages")
    log = [
        json.loads(line)
        for line in pipeline.retriever.path("log.jsonl").read_text("utf-8").splitlines()
    ]
    assert [record["step"] for record in log] == [1, 2]
    assert report.meta["index"] == pipeline.index.uri


def test_stage_2_leaves_the_retriever_as_it_was(
    first: tuple[Pipeline, Report, dict[str, str]],
) -> None:
    pipeline, _, before = first
    assert pipeline.generator.manifest.kind == "generator"
    assert adapter_hashes(pipeline.store.open(pipeline.retriever.ref)) == before
    pipeline.retriever.verify()


@pytest.mark.usefixtures("no_ray")
def test_a_second_run_re_uses_everything_without_ray(
    first: tuple[Pipeline, Report, dict[str, str]],
) -> None:
    pipeline, report, _ = first
    again = pipeline_in(pipeline.store.root)
    repeated = again.run()
    assert again.seconds == {}, "steps were run again"
    assert len(again.reused) == len(set(again.reused)) == len(pipeline.seconds)
    assert repeated.rows == report.rows


def test_a_report_s_numbers_lie_at_the_top_and_a_run_s_own_stay(
    first: tuple[Pipeline, Report, dict[str, str]],
) -> None:
    pipeline, report, _ = first
    top = Path(pipeline.store.root) / "report.json"
    top.unlink(missing_ok=True)
    assert pipeline.keep_numbers() == top
    found, tables = open_report(top)  # where compare and gate look
    assert found.rows == report.rows
    assert tables
    write_report(replace(report, seconds={"serve and answer": 1.0}), top)
    pipeline.keep_numbers()
    assert open_report(top)[0].seconds == {"serve and answer": 1.0}


@pytest.mark.usefixtures("no_ray")
def test_scale_changes_nothing(first: tuple[Pipeline, Report, dict[str, str]]) -> None:
    pipeline, _, _ = first
    scaled = pipeline_in(
        pipeline.store.root,
        "scale.num_workers=1",
        "scale.zero_stage=3",
        "scale.embed_workers=3",
        "scale.shard_rows=5",
        "scale.checkpoint_every=1",
        "scale.embed_tokens_per_batch=512",
        "evaluation.answer_batch_size=3",
        "serve.port=0",
    )
    scaled.run()
    assert scaled.seconds == {}


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("override", "step", "kept"),
    [
        (
            "generator.steps=3",
            "stage 2: generator",
            "hits of train questions in the retriever index, hybrid",
        ),
        ("retriever.invariance_weight=0.7", "stage 1: retriever", "training set"),
        ("evaluation.num_answers=3", "report", "stage 2: generator"),
    ],
)
def test_a_change_is_felt_from_its_own_step_on(
    first: tuple[Pipeline, Report, dict[str, str]], override: str, step: str, kept: str
) -> None:
    pipeline, _, _ = first
    changed = pipeline_in(pipeline.store.root, override)
    with pytest.raises(StartsRay):
        changed.run()
    assert changed.seconds == {}
    assert kept in changed.reused
    assert step not in changed.reused


@pytest.mark.slow
def test_more_steps_of_stage_2_make_stage_2_and_the_report_again(
    first: tuple[Pipeline, Report, dict[str, str]],
) -> None:
    pipeline, _, before = first
    longer = pipeline_in(pipeline.store.root, "generator.steps=3")
    longer.run()
    assert longer.seconds.keys() == {"stage 2: generator", "report"}
    assert longer.generator.info["steps"] == 3
    assert adapter_hashes(longer.retriever) == before
    # The first one stands beside it.
    assert pipeline.store.open(pipeline.generator.ref).info["steps"] == 2


@pytest.mark.slow
def test_the_same_seed_in_another_place_gives_the_same_numbers(
    first: tuple[Pipeline, Report, dict[str, str]], tmp_path: Path
) -> None:
    pipeline, report, before = first
    other = pipeline_in(tmp_path / "elsewhere")
    repeated = other.run()
    assert other.reused == []
    assert adapter_hashes(other.retriever) == before
    assert adapter_hashes(other.generator) == adapter_hashes(pipeline.generator)
    assert [(row.system, row.metrics) for row in repeated.rows] == [
        (row.system, row.metrics) for row in report.rows
    ]
    answers = [run.report.path("answers.jsonl").read_bytes() for run in (pipeline, other)]
    assert answers[0] == answers[1]


# What a user gets wrong: one error, before any cluster is started.


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows),
        encoding="utf-8",
    )
    return path


GOOD = {
    "id": "q1",
    "question": "Where does the ferry leave?",
    "answers": ["the pier"],
    "positive_ids": ["d1"],
}
DEV = {
    "id": "q2",
    "question": "When does the ferry leave?",
    "answers": ["nine"],
    "positive_ids": ["d1"],
}
DOCUMENT = {
    "id": "d1",
    "title": "Ferry",
    "text": "The ferry leaves the pier at nine in the morning.",
}


def run_on(tmp_path: Path, corpus: list[Any], train: list[Any], *overrides: str) -> None:
    sources = [
        f"corpus.uri={write(tmp_path / 'corpus.jsonl', corpus)}",
        f"questions.train_uri={write(tmp_path / 'train.jsonl', train)}",
        f"questions.dev_uri={write(tmp_path / 'dev.jsonl', [DEV])}",
        "rewrites.provider=rules",
    ]
    pipeline_in(tmp_path / "s", *sources, "corpus.distractors=null", *overrides).run()


@pytest.mark.usefixtures("no_ray")
def test_an_empty_corpus_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corpus\.jsonl is empty.*at least one document"):
        run_on(tmp_path, [], [GOOD])
    assert not list((tmp_path / "s").glob("passages/*"))


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"id": "q3", "question"', r"train\.jsonl, line 2: malformed JSON"),
        (
            {"id": "q3", "question": "Who?", "positive_ids": ["d1"]},
            r"train\.jsonl, line 2: the field 'answers'",
        ),
        (
            GOOD | {"id": "q3", "answers": "the pier"},
            r"train\.jsonl, line 2: 'answers' is a string",
        ),
        (
            GOOD | {"id": "q3", "positive_ids": ["gone"]},
            r"1 of 2 train questions have no positive document",
        ),
    ],
)
def test_a_faulty_question_is_one_error_before_any_work(
    tmp_path: Path, row: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        run_on(tmp_path, [DOCUMENT], [GOOD, row])


def test_a_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file or folder .*nowhere\.jsonl"):
        run_on(tmp_path, [DOCUMENT], [GOOD], f"corpus.uri={tmp_path / 'nowhere.jsonl'}")


def test_unknown_keys_are_one_error_that_lists_them_all() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", ["retriever.step=3", "generater.steps=3", "scale.zero_stage=5"])
    for part in (
        "retriever.step: unknown key; did you mean retriever.steps",
        "generater",
        "scale.zero_stage",
    ):
        assert part in str(caught.value)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("limit", [3, 7])
def test_a_limit_holds_for_the_built_in_corpus_too(tmp_path: Path, limit: int) -> None:
    made = pipeline_in(tmp_path / "s", f"corpus.limit={limit}", "corpus.distractors=null").passages
    assert made.info["documents"] == limit


def test_what_a_run_made_is_what_is_served(
    first: tuple[Pipeline, Report, dict[str, str]],
) -> None:
    made = first[0]
    Published(made.store).publish([made.index])
    index = current_index(made.store)
    generator = newest_generator(index)
    assert generator is not None
    assert (index.uri, generator.uri) == (made.index.uri, made.generator.uri)
