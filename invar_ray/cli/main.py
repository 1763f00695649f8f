"""``invar-ray``: the command line. Thin: every command loads a recipe and asks the pipeline."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invar_ray import __version__
from invar_ray.cli.errors import explain_errors
from invar_ray.cli.versions import versions_app
from invar_ray.console import set_verbose
from invar_ray.errors import DataError, RequestError, ResourceError

app = typer.Typer(
    help="Invariant retrieval-augmented generation on Ray: index, train, evaluate, serve, ask.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would take half of the time of --help
)

app.add_typer(
    versions_app,
    name="index-versions",
    short_help="Publish an index, list versions, go back, clean up.",
)

if TYPE_CHECKING:
    from invar_ray.config import Config

DEFAULT = "demo"
"""The recipe of every command without ``--config``: what one command makes, the next one finds."""

Recipe = Annotated[str, typer.Option("--config", help="Name of a recipe, or path of a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="Settings to change; invar-ray config lists them."),
]


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """As :func:`invar_ray.config.load_config`, imported when it is called: asking over HTTP needs
    no settings.
    """
    from invar_ray import config

    return config.load_config(recipe, overrides)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say everything, Ray's and workers' lines too.")
    ] = False,
) -> None:
    if verbose:
        set_verbose()
    if version:
        print(__version__)
        raise typer.Exit


@app.command(short_help="Corpus to served answer on this machine, one command.")
@explain_errors
def demo(
    overrides: Overrides = None,
    config: Recipe = DEFAULT,
    question: Annotated[str | None, typer.Option(help="What to ask at the end.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Go on serving until Ctrl-C.")] = False,
) -> None:
    """The whole way on this machine: corpus, index, both trainings, report, endpoint, one answer
    over HTTP.
    """
    from invar_ray.cli.demo import run_demo

    run_demo(load_config(config, ["serve.port=0", *(overrides or [])]), question, keep=keep)


def _corpus_is_there(corpus: str, *_: Any, **__: Any) -> None:
    if "://" not in corpus and not corpus.startswith("builtin:"):
        place = os.path.expanduser(corpus)
        if not os.path.exists(place):
            raise DataError(
                f"no file or folder {corpus}",
                action="check the path; relative paths start where you run the command",
            )


@app.command(short_help="Index documents, say what to try next.")
@partial(explain_errors, early=_corpus_is_there)
def index(
    corpus: Annotated[str, typer.Argument(help="File, folder or URI of documents.")],
    overrides: Overrides = None,
    config: Recipe = DEFAULT,
    adapter: Annotated[
        str | None,
        typer.Option(help="URI of a stage-1 adapter, or base (untrained); else the newest one."),
    ] = None,
) -> None:
    """Index documents, print the index's URI, and say what to try next."""
    from invar_ray.cli.documents import index_documents

    settings = load_config(
        config, [*(overrides or []), f"corpus.uri={json.dumps(corpus)}", "corpus.distractors=null"]
    )
    options = "" if config == DEFAULT else f"--config {shlex.quote(config)} "
    if settings.storage.root_uri != load_config(config).storage.root_uri:
        options += f"--root {shlex.quote(settings.storage.root_uri)} "
    print(index_documents(settings, adapter, options).uri)


@app.command(short_help="Make training questions for documents that have none.")
@partial(explain_errors, early=_corpus_is_there)
def questions(
    corpus: Annotated[str, typer.Argument(help="File, folder or URI of documents.")],
    overrides: Overrides = None,
    config: Recipe = DEFAULT,
    out: Annotated[
        str, typer.Option(help="Writes NAME.train.jsonl and NAME.dev.jsonl.")
    ] = "questions.jsonl",
    per_document: Annotated[int, typer.Option(min=1, help="Most questions a document.")] = 8,
    endpoint: Annotated[
        str | None, typer.Option(help="Let a model ask: base URL of an OpenAI-compatible server.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The model to ask for, with --endpoint.")
    ] = None,
    key_env: Annotated[
        str, typer.Option(help="Environment variable that holds the key.")
    ] = "OPENAI_API_KEY",
) -> None:
    """Make training questions for documents that have none, for training and dev apart."""
    from invar_ray.cli.documents import write_questions
    from invar_ray.questions.llm import ChatEndpoint

    if (endpoint is None) != (model is None):
        raise typer.BadParameter("--endpoint and --model go together")
    settings = load_config(
        config, [*(overrides or []), f"corpus.uri={json.dumps(corpus)}", "corpus.distractors=null"]
    )
    asker = (
        None if endpoint is None else ChatEndpoint(endpoint, str(model), key_env, f"{out}.replies")
    )
    for file in write_questions(settings, out, per_document=per_document, endpoint=asker):
        print(file)


@app.command(short_help="Train retriever (stage 1), generator (stage 2), or both.")
@explain_errors
def train(
    stage: Annotated[
        str, typer.Argument(help="retriever (stage 1), generator (stage 2) or both.")
    ] = "both",
    overrides: Overrides = None,
    config: Recipe = DEFAULT,
) -> None:
    """Train the adapters and print their URIs; stage 2 makes the index that it read current."""
    from invar_ray.pipeline import Pipeline
    from invar_ray.store.published import Published

    if "=" in stage:  # no stage was named
        stage, overrides = "both", [stage, *(overrides or [])]
    if stage not in {"retriever", "generator", "both"}:
        raise typer.BadParameter(f"{stage!r} is not a stage: retriever, generator or both")
    with Pipeline(load_config(config, overrides or [])) as pipeline:
        pipeline.announce("retriever" if stage == "retriever" else "generator")
        if stage in {"retriever", "both"}:
            print(pipeline.retriever.uri)
        if stage in {"generator", "both"}:
            print(pipeline.generator.uri)
            Published(pipeline.store).publish([pipeline.index], verify=False)


@app.command(short_help="Try weights of the loss and of hybrid search, say which to set.")
@explain_errors
def tune(
    overrides: Overrides = None,
    config: Recipe = DEFAULT,
    weights: Annotated[
        str, typer.Option(help="Values of retriever.invariance_weight, with commas between.")
    ] = "0,10,40,160",
) -> None:
    """Train stage 1 once for each weight of the invariance loss, on part of the train questions,
    then search with each weight of vectors against words, and say which of both to set; the dev
    questions are not looked at.
    """
    from invar_ray.cli.tune import parse_weights, run_trials, told

    print(told(run_trials(load_config(config, overrides or []), parse_weights(weights))))


@app.command(short_help="Measure all systems; print tables, write the report.")
@explain_errors
def evaluate(overrides: Overrides = None, config: Recipe = DEFAULT) -> None:
    """Evaluate the systems that evaluation.systems names; print the tables and where the report
    is.
    """
    from invar_ray.evaluation.page import headline
    from invar_ray.evaluation.report import read_report
    from invar_ray.pipeline import Pipeline

    with Pipeline(load_config(config, overrides or [])) as pipeline:
        pipeline.announce("report")
        print(pipeline.report.path("table.txt").read_text(encoding="utf-8"))
        print("\n".join(headline(read_report(pipeline.report.path("report.json")))))
        print(f"{pipeline.report.uri}\n{pipeline.report.path('report.html')}")
        if written := pipeline.keep_numbers():
            print(written)


@app.command(short_help="May a candidate be served? Exit 0 or 1, with reasons.")
@explain_errors
def gate(
    baseline: Annotated[str, typer.Option(help="report.json, or the folder that holds it.")],
    candidate: Annotated[str, typer.Option(help="report.json, or the folder that holds it.")],
    max_variance: Annotated[
        float | None, typer.Option(help="Largest 1 - overlap@k of the candidate.")
    ] = None,
    min_recall: Annotated[
        float | None, typer.Option(help="Least recall@k of the candidate.")
    ] = None,
    min_exact_match: Annotated[
        float | None, typer.Option(help="Least exact match of the candidate.")
    ] = None,
    max_variance_rise: Annotated[
        float | None, typer.Option(help="Largest against the baseline; default: any within chance.")
    ] = None,
    max_recall_drop: Annotated[
        float | None, typer.Option(help="Largest against the baseline; default: any within chance.")
    ] = None,
    max_exact_match_drop: Annotated[
        float | None, typer.Option(help="Largest against the baseline; default: any within chance.")
    ] = None,
    k: Annotated[int, typer.Option(help="k of recall@k and overlap@k.")] = 5,
    system: Annotated[
        str | None,
        typer.Option(help="The candidate's row; default: the trained one that finds most."),
    ] = None,
    baseline_system: Annotated[
        str | None, typer.Option(help="The baseline's row, if another.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Where the reports have several.")] = None,
) -> None:
    """Hold a candidate's report against limits and a baseline: exit 0 if it may be promoted, 1 with
    reasons if not.
    """
    from invar_ray.evaluation.gate import Limits, best_system, run_gate
    from invar_ray.evaluation.per_question import open_report

    limits = Limits(
        k,
        max_variance,
        min_recall,
        min_exact_match,
        max_variance_rise,
        max_recall_drop,
        max_exact_match_drop,
    )
    measured = open_report(candidate)
    chosen = system or best_system(measured[0], k)
    print(f"judged: {chosen}")
    checks = run_gate(
        open_report(baseline),
        measured,
        limits,
        system=chosen,
        baseline_system=baseline_system,
        dataset=dataset,
    )
    for check in checks:
        print(f"{'pass' if check.passed else 'FAIL'}  {check.text}")
    failed = sum(not check.passed for check in checks)
    if failed:
        print(f"the gate stays shut: {failed} of {len(checks)} checks failed")
        raise typer.Exit(1)
    print(f"the gate is open: all {len(checks)} checks passed")


@app.command(short_help="Compare two reports question by question.")
@explain_errors
def compare(
    first: Annotated[str, typer.Argument(help="report.json, or the folder that holds it.")],
    second: Annotated[
        str, typer.Argument(help="Another, or the same for two systems of one report.")
    ],
    system: Annotated[
        str | None, typer.Option(help="One row; without it all that both reports have.")
    ] = None,
    second_system: Annotated[
        str | None, typer.Option(help="The second report's row, if another.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Where the reports have several.")] = None,
) -> None:
    """Compare two reports question by question: paired differences with 95 % intervals."""
    from invar_ray.evaluation.page import render_comparisons
    from invar_ray.evaluation.per_question import compare_reports, open_report

    found = compare_reports(
        open_report(first)[1],
        open_report(second)[1],
        system=system,
        second_system=second_system,
        dataset=dataset,
    )
    print(render_comparisons(found))


@app.command(short_help="Rewrite a public benchmark as JSON lines.")
@explain_errors
def convert(
    source: Annotated[str, typer.Argument(help="A benchmark's file, or BEIR's folder.")],
    folder: Annotated[str, typer.Argument(help="Where to write questions.jsonl and corpus.jsonl.")],
    format: Annotated[
        str,
        typer.Option(help="A format of docs/design/benchmarks.md; auto looks into the file."),
    ] = "auto",
    split: Annotated[str, typer.Option(help="Which qrels of BEIR: train or dev.")] = "dev",
) -> None:
    """Rewrite a public benchmark as the project's own JSON lines: its questions, and the documents
    that it carries.
    """
    from invar_ray.questions.benchmarks import convert_benchmark

    if split not in {"train", "dev"}:
        raise typer.BadParameter(f"{split!r} is no split: train or dev")
    made = convert_benchmark(source, folder, format, split="train" if split == "train" else "dev")
    documents = (
        f"{len(made.documents):,} documents"
        if made.documents
        else "no documents (the format carries none)"
    )
    print(f"{made.format}: {len(made.examples):,} questions and {documents} -> {folder}")


@app.command(short_help="Write an adapter as a PEFT folder with a model card.")
@explain_errors
def export(
    adapter: Annotated[str, typer.Argument(help="URI of a stage-1 or stage-2 adapter.")],
    folder: Annotated[str, typer.Argument(help="New folder to write.")],
    report: Annotated[
        str | None, typer.Option(help="URI of a report, for the model card's tables.")
    ] = None,
    merged: Annotated[
        bool,
        typer.Option(
            "--merged", help="Base and adapter as one model, too; for sentence-transformers."
        ),
    ] = False,
    gguf: Annotated[
        bool,
        typer.Option("--gguf", help="And as one file for llama.cpp, by its own converter on PATH."),
    ] = False,
    push: Annotated[
        str | None, typer.Option(help="Upload it to this repository of a hub, owner/name.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let everyone see a repository that --push makes.")
    ] = False,
) -> None:
    """Write an adapter as a plain PEFT folder with a model card."""
    from pathlib import Path

    from invar_ray.store.artifacts import open_artifact
    from invar_ray.training.export import (
        export_adapter,
        find_gguf_converter,
        open_adapter,
        push_folder,
        write_gguf,
    )

    converter = find_gguf_converter() if gguf else None  # before minutes are spent
    measured = open_artifact(report, "report") if report else None
    made = export_adapter(
        open_adapter(adapter), Path(folder), report=measured, merged=merged or gguf, name=push
    )
    print(made.folder)
    if made.merged is not None:
        print(f"{made.merged} (lowest cosine with the unmerged outputs {made.lowest_cosine:.7f})")
        if converter is not None:
            print(write_gguf(converter, made.merged))
    if push is not None:
        print(push_folder(made.folder, push, private=not public))


def _has_what_is_served(
    overrides: list[str] | None, config: str, index_uri: str | None, generator_uri: str | None
) -> None:
    from invar_ray.store.artifacts import check_trained

    settings = load_config(config, overrides or [])
    if index_uri is None:  # else its own store counts
        check_trained(settings.storage.root_uri, "index")
        if generator_uri is None:
            check_trained(settings.storage.root_uri, "generator")


@app.command(short_help="Serve over HTTP until Ctrl-C.")
@partial(explain_errors, early=_has_what_is_served)
def serve(
    overrides: Overrides = None,
    config: Recipe = DEFAULT,
    index_uri: Annotated[str | None, typer.Option("--index", help="URI of an index.")] = None,
    generator_uri: Annotated[
        str | None, typer.Option("--generator", help="URI of a stage-2 adapter.")
    ] = None,
) -> None:
    """Serve over HTTP until Ctrl-C: what is current in the store, or what is given; nothing is
    trained for it.
    """
    from invar_ray.cli.serving import serve_until_stopped

    serve_until_stopped(load_config(config, overrides or []), index_uri, generator_uri)


@app.command(short_help="Ask one question, here or of a running service.")
@explain_errors
def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    url: Annotated[
        str | None,
        typer.Option(help="Address of a running service; without it, answer right here."),
    ] = None,
    config: Recipe = DEFAULT,
    index_uri: Annotated[str | None, typer.Option("--index", help="URI of an index.")] = None,
    generator_uri: Annotated[
        str | None, typer.Option("--generator", help="URI of a stage-2 adapter.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Number of passages.")] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Ask the newest index of this file or folder.")
    ] = None,
    root: Annotated[str | None, typer.Option(help="Storage root, if not the recipe's.")] = None,
    untrained: Annotated[
        bool,
        typer.Option("--untrained", help="Search and answer with untrained models, too."),
    ] = False,
) -> None:
    """Ask one question: of a running service (--url), or of what was indexed or trained last,
    without Ray.
    """
    from invar_ray.cli.ask import ask_here, ask_service, print_answer

    if url is not None:
        print_answer(ask_service(url, question, top_k, os.environ.get("INVAR_API_KEY")))
        return
    settings = load_config(config, [] if root is None else [f"storage.root_uri={json.dumps(root)}"])
    answer = ask_here(
        settings,
        question,
        index=index_uri,
        generator=generator_uri,
        top_k=top_k,
        corpus=corpus,
        untrained=untrained,
    )
    print_answer(answer)


@app.command(short_help="Offer a running service as tools of an assistant.")
@explain_errors
def mcp(
    url: Annotated[
        str, typer.Option(help="Address of a running service.")
    ] = "http://127.0.0.1:8000",
) -> None:
    """Offer a running service to assistants as tools (Model Context Protocol over standard input
    and output); its key comes from INVAR_API_KEY.
    """
    if not url.startswith(("http://", "https://")):
        raise RequestError(f"{url!r} is no address", expected="e.g. http://127.0.0.1:8000")
    try:
        module = importlib.import_module("serve.mcp")  # a top level package above this one
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "mcp":
            raise
        raise ResourceError(
            "the package mcp is not installed", action="pip install 'invar-ray[mcp]'"
        ) from error
    module.make_server(url, os.environ.get("INVAR_API_KEY")).run("stdio")


@app.command("config", short_help="List settings with value, default and meaning.")
@explain_errors
def show_config(
    overrides: Overrides = None,
    config: Recipe = DEFAULT,
    key: Annotated[
        str | None, typer.Option(help="Only settings whose name holds this, e.g. retriever.")
    ] = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only what differs from the defaults.")
    ] = False,
) -> None:
    """List settings: name, value of this recipe, default where it differs, and meaning."""
    from invar_ray.config.load import explain_settings

    for setting in explain_settings(load_config(config, overrides or [])):
        differs = setting.value != setting.default
        if (key is None or key in setting.key) and (differs or not changed):
            default = f"   (default {json.dumps(setting.default)})" if differs else ""
            print(f"{setting.key} = {json.dumps(setting.value)}{default}")
            print(
                textwrap.fill(
                    setting.meaning,
                    96,
                    initial_indent="    ",
                    subsequent_indent="    ",
                    break_on_hyphens=False,  # names of models
                )
            )


@app.command(short_help="What a run will take: memory, hours, bytes.")
@explain_errors
def plan(
    overrides: Overrides = None,
    config: Recipe = DEFAULT,
    documents: Annotated[
        float, typer.Option(min=1, help="How many there are, e.g. 21e6; each of --tokens.")
    ] = 1e6,
    tokens: Annotated[int, typer.Option(min=1, help="Of a document, on average.")] = 128,
    questions: Annotated[
        int, typer.Option(min=1, help="To train on; a ninth of it to evaluate.")
    ] = 79_168,
    nodes: Annotated[int, typer.Option(min=1, help="Machines, all equal.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each machine.")] = 0,
    gpu_memory: Annotated[
        float | None, typer.Option(help="GB of each GPU; without it nothing is called too large.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GB of each machine; without it none is refused.")
    ] = None,
    head_memory: Annotated[
        float | None, typer.Option(help="GB where the job itself runs, if that is another machine.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(help="CPUs of each machine.")] = None,
    gpu_tflops: Annotated[
        float, typer.Option(help="What a GPU does in bf16; 400 is 40 % of an H100's peak.")
    ] = 400.0,
) -> None:
    """What a run will take, before it is paid for: memory of every process, hours, bytes; says what
    cannot fit, and what would.
    """
    from invar_ray.cli.plan import print_plan
    from invar_ray.footprint import GB, Corpus, Machines

    settings = load_config(config, overrides or []).corpus
    each = max(1, -(-tokens // settings.chunk_stride)) if tokens > settings.chunk_tokens else 1

    def size(given: float | None) -> float | None:
        return None if given is None else given * GB

    print_plan(
        config,
        overrides or [],
        Corpus(round(documents * each), round(tokens / each), questions, -(-questions // 9)),
        Machines(nodes, gpus, size(gpu_memory), size(memory), cpus, size(head_memory)),
        gpu_flops=gpu_tflops * 1e12,
    )


@app.command(short_help="Check this machine; say what to do for each fault.")
@explain_errors
def doctor(overrides: Overrides = None, config: Recipe = DEFAULT) -> None:
    """Check this machine: versions, GPUs, FAISS, memory, storage, models; says what to do for each
    fault.
    """
    from invar_ray.cli.doctor import has_failures, render, run_checks
    from invar_ray.cli.doctor_recipe import check_recipe

    settings: Config = load_config(config, overrides or [])
    checks: Any = run_checks(
        settings.storage.root_uri,
        settings.model.base,
        port=settings.serve.port,
        retriever_base=settings.model.retriever_base,
        recipe=lambda: check_recipe(settings),
    )
    print(render(checks))
    if has_failures(checks):
        raise ResourceError("this machine is not ready", action="see the lines marked fail above")


def main() -> None:
    """Entry point of the ``invar-ray`` script; ``-v`` may stand anywhere."""
    if options := {"-v", "--verbose"} & set(sys.argv[1:]):
        set_verbose()
        sys.argv = [argument for argument in sys.argv if argument not in options]
    app()


if __name__ == "__main__":
    main()
