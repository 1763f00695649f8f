"""The demo: the whole way, then one question over HTTP, with its answer and citations printed."""

from __future__ import annotations

import os
import shlex
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from invar_ray import console
from invar_ray.cli.ask import ask_service, print_answer
from invar_ray.cli.serving import start_service, stop_service
from invar_ray.config import Config
from invar_ray.corpus.sources import BUILTIN_FACTS
from invar_ray.evaluation.metrics import OVERLAP_K
from invar_ray.evaluation.page import headline
from invar_ray.evaluation.report import Row, write_report
from invar_ray.evaluation.tables import render_table
from invar_ray.pipeline import Pipeline
from invar_ray.steps.questions import load_examples
from invar_ray.store.published import Published

_COLUMNS = (
    *("recall_at_1", "recall_at_5", "mrr_at_10", f"overlap_at_{OVERLAP_K}"),
    *("worst_recall_at_5", "exact_match", "f1"),
)
_ASKED = "Who painted Las Meninas?"
"""Of the built-in corpus, where no question is given: about a painting that no training question is
about.
"""


def run_demo(config: Config, question: str | None, *, keep: bool) -> None:
    """Run everything, serve, ask, write ``report.json``, shut everything down (also on Ctrl-C).

    Args:
        config: the run; ``serve.port`` 0 takes a free port.
        question: what to ask; ``None`` takes one about the built-in corpus, or the first dev
            question of another one.
        keep: go on serving until Ctrl-C.
    """
    started = time.monotonic()
    with Pipeline(config) as pipeline:
        pipeline.announce("report")
        report = pipeline.run()
        Published(pipeline.store).publish([pipeline.index], verify=False)
        folder = (
            Path(pipeline.store.root) if pipeline.store.is_local else Path("runs") / config.name
        )
        asked = question or _default_question(pipeline)
        pipeline.executor.connect()
        try:
            served = time.monotonic()
            console.run.begin("serve and answer")
            url = start_service(pipeline.index, pipeline.generator, config, log_level="ERROR")
            answer = ask_service(url, asked, None, None)
            console.run.end("serve and answer")
            seconds = {**report.seconds, "serve and answer": round(time.monotonic() - served, 2)}
            written = write_report(
                replace(report, seconds=seconds, answer=_for_report(asked, answer)),
                folder / "report.json",
            )
            report_uri = (
                os.path.relpath(pipeline.report.uri)
                if pipeline.store.is_local
                else pipeline.report.uri
            )
            print(f"\n{render_table(_main_rows(report.rows), _COLUMNS, intervals=False)}\n")
            print("\n".join(textwrap.fill(text, 100) for text in headline(report, OVERLAP_K)[-2:]))
            print(f"\nquestion: {asked}")
            print_answer(answer)
            print(f"\nreport: {pipeline.report.path('report.html')}; numbers: {written}")
            stands = len(pipeline.reused)
            print(
                f"took {console.duration(time.monotonic() - started)}"
                + (f"; {stands} steps stand from an earlier run" if stands else "")
            )
            if keep:
                print(f"\nserving at {url} until Ctrl-C", flush=True)
                while True:
                    time.sleep(1)
        finally:
            stop_service()
    print(f"everything is shut down; {what_next(config, report_uri)}")


def _main_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows that fit a screen; the report has all."""
    shown = ("BM25", "MiniLM", "base", "both stages")
    return [row for row in rows if row.system in shown or row.system.startswith("stage 1")]


def _default_question(pipeline: Pipeline) -> str:
    corpus, questions = pipeline.config.corpus, pipeline.config.questions
    if (
        corpus.uri == BUILTIN_FACTS
        and corpus.limit is None
        and questions.train_uri == BUILTIN_FACTS
    ):
        return _ASKED
    return load_examples(pipeline.questions, "dev")[0].question


def what_next(config: Config, report_uri: str) -> str:
    """What to try after the demo, with exact commands."""
    program = os.path.relpath(sys.argv[0]) if Path(sys.argv[0]).name == "invar-ray" else "invar-ray"
    root = config.storage.root_uri
    where = "" if root == Config().storage.root_uri else f" storage.root_uri={shlex.quote(root)}"
    lines = {
        "ask it more (page at /, API at /docs)": f"serve{where}",
        "train without the invariance loss": f"demo{where} retriever.invariance_weight=0",
        "then: may that one be served?": f"gate --baseline {shlex.quote(report_uri)} --candidate "
        f"{shlex.quote(root)}",
        "index your own documents": f"index ./docs{where}",
    }
    width = max(map(len, lines))
    return "what to try next:\n" + "\n".join(
        f"  {text:{width}}  {program} {args}" for text, args in lines.items()
    )


def _for_report(question: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    return {"question": question, "text": answer["answer"], "citations": list(answer["citations"])}
