"""One's own documents: index a folder, make questions from it, say what to do next."""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from invar_ray.answering.bm25 import Bm25
from invar_ray.answering.current import current_index
from invar_ray.answering.retriever import open_retriever
from invar_ray.config import Config
from invar_ray.corpus.readlog import ReadLog, echo_lines
from invar_ray.errors import ArtifactError, DataError
from invar_ray.models.encoder import EncoderSpec, llm_spec
from invar_ray.pipeline import Pipeline
from invar_ray.questions.asking import ask_for_questions
from invar_ray.questions.llm import ChatEndpoint
from invar_ray.questions.making import (
    MadeQuestion,
    findable,
    make_questions,
    split_by_document,
    without_clashes,
)
from invar_ray.steps.passages import load_documents, load_skipped, read_corpus
from invar_ray.store.artifacts import Artifact, Store, open_artifact
from invar_ray.store.published import Published

_FOUND_AMONG = 5
"""A question is kept if its document is among so many."""
_ENOUGH = 100
"""So many questions are worth a training."""


def index_documents(config: Config, adapter_uri: str | None, options: str = "") -> Artifact:
    """Index ``config.corpus``; prints what was read and left out, and what to do next, to standard
    error.

    Args:
        config: the run.
        adapter_uri: a stage-1 adapter; ``base`` embeds with the bare base; ``None`` takes the
            newest adapter below the storage root that fits the recipe's model, and the bare base
            where there is none.
        options: what the user gave the command beyond the folder, repeated in the commands that are
            proposed.
    """
    started = time.monotonic()
    read_corpus(config, ReadLog())  # a mistyped folder shows now, not after the base was loaded
    with Pipeline(config) as pipeline:
        adapter = choose_adapter(pipeline, adapter_uri)
        index = pipeline.base_index if adapter is None else pipeline.index_with(adapter)
        passages = pipeline.passages
        if "passages" in pipeline.reused:
            echo_lines(load_skipped(passages))
        Published(pipeline.store).publish([index], verify=False)
    seconds = time.monotonic() - started
    info = passages.info
    _say(
        f"indexed {info['documents']:,} documents from {info['files']:,} files as "
        f"{info['passages']:,} passages, "
        f"left out {info['skipped']:,}; {seconds:.0f} s"
    )
    if adapter is not None and adapter_uri is None:
        _say(
            f"with the retriever that was trained last below {config.storage.root_uri}: "
            f"{adapter.ref}"
        )
    if adapter is None:
        _say("the base finds passages without having been trained on these documents")
        options += "--untrained "
    _say(f"\nask:    invar-ray ask {options}{shlex.quote(_some_question(passages))}")
    corpus = shlex.quote(config.corpus.uri)
    _say(
        f"train:  invar-ray questions {corpus}   (makes questions from the documents and says how "
        "to go on)\n"
    )
    return index


def write_questions(
    config: Config,
    out: str,
    *,
    per_document: int,
    endpoint: ChatEndpoint | None = None,
    samples: int = 3,
) -> tuple[Path, Path]:
    """Make training questions from ``config.corpus`` and write two files, for training and for dev.

    Args:
        config: the run; its ``corpus`` and ``seed`` count.
        out: ``questions.jsonl`` writes ``questions.train.jsonl`` and ``questions.dev.jsonl``.
        per_document: most questions a document.
        endpoint: a language model that asks; ``None`` makes them by rule.
        samples: how many to print.

    Returns:
        The two files; docs/design/questions.md has their format.

    Raises:
        DataError: the corpus cannot be read or gives too few questions to split.  Errors of the
            endpoint.
    """
    log = ReadLog(echo=True)
    texts: dict[str, str] = {}
    titles: dict[str, str] = {}
    asked: set[str] = set()
    found: list[MadeQuestion] = []
    for document in read_corpus(config, log):
        if endpoint is None:
            made = make_questions(document, most=per_document, seed=config.seed)
        else:
            made = ask_for_questions(document, endpoint, most=per_document, seed=config.seed)
        texts[document.id], titles[document.id] = document.text, document.title
        asked.update([document.id] if made else [])
        found += made
    unlike = without_clashes(found)
    kept = findable(unlike, _searches(config, titles, texts))
    if len(kept) < len(unlike):
        lost = next(each for each in unlike if each not in kept).example.question
        _say(f"left out {len(unlike) - len(kept)} questions that do not find their document")
        _say(f"  (first: {lost})")
    if len(kept) < 2:
        raise DataError(
            f"{config.corpus.uri} gave {len(kept)} questions",
            expected="at least 2, to train on one and check with another",
            action="add documents with whole English sentences, or let a language model ask "
            "(--endpoint, --model)",
        )
    stem = Path(out[: -len(".jsonl")] if out.endswith(".jsonl") else out)
    files = stem.with_name(f"{stem.name}.train.jsonl"), stem.with_name(f"{stem.name}.dev.jsonl")
    stem.parent.mkdir(parents=True, exist_ok=True)
    for file, part in zip(files, split_by_document(kept, texts, config.seed), strict=True):
        rows = [
            {**asdict(question.example), "answer_type": question.answer_type} for question in part
        ]
        file.write_text(
            "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8"
        )
        kinds = Counter(question.answer_type for question in part).most_common()
        _say(
            f"{file}: {len(part):,} questions "
            f"({', '.join(f'{count} {kind}' for kind, count in kinds)})"
        )
    if len(asked) == 1:
        _say(
            "only one document gave questions: dev is its last part, so the dev figures will "
            "flatter"
        )
    if len(kept) < _ENOUGH:
        _say(
            f"{len(kept)} questions show how it works and teach little; hundreds are better: more "
            "documents, or a language model that asks (--endpoint, --model)"
        )
    for question in kept[:: -(-len(kept) // samples)]:
        _say(f"  {question.example.question}  ->  {question.example.answers[0]}")
    _say("\nlook through them, then train on them (and ask again afterwards):")
    corpus, root = shlex.quote(config.corpus.uri), shlex.quote(config.storage.root_uri)
    _say(
        f"  invar-ray train both corpus.uri={corpus} "
        f"questions.train_uri={shlex.quote(str(files[0]))} "
        f"questions.dev_uri={shlex.quote(str(files[1]))} storage.root_uri={root}\n"
    )
    return files


def _searches(
    config: Config, titles: Mapping[str, str], texts: Mapping[str, str]
) -> list[Callable[[list[str]], list[list[str]]]]:
    """What looks for the documents of questions: BM25, and the retriever of the corpus's index
    where it has one.
    """
    ids = list(texts)
    words = Bm25([f"{titles[name]} {texts[name]}" for name in ids])

    def by_words(questions: list[str]) -> list[list[str]]:
        return [[ids[row] for row, _ in found] for found in words.search(questions, _FOUND_AMONG)]

    searches: list[Callable[[list[str]], list[list[str]]]] = [by_words]
    with contextlib.suppress(ArtifactError):  # nothing is indexed yet
        index = current_index(Store(config.storage.root_uri), config.corpus.uri)
        retriever = open_retriever(index.uri)
        searches.append(
            lambda questions: [
                [hit.document_id for hit in hits]
                for hits in retriever.retrieve(questions, _FOUND_AMONG)
            ]
        )
    return searches


def choose_adapter(pipeline: Pipeline, wanted: str | None) -> Artifact | None:
    """The stage-1 adapter to index with, as :func:`index_documents` describes; ``None`` is the bare
    base.

    Raises:
        ArtifactError: ``wanted`` is no retriever.
    """
    if wanted is not None:
        return None if wanted == "base" else open_artifact(wanted, "retriever")
    bare = llm_spec(pipeline.config.model, pipeline.retriever_base)

    def fits(artifact: Artifact) -> bool:
        if "arm" in artifact.info:  # of a report, to be compared with
            return False
        spec = EncoderSpec.from_json(artifact.info["encoder"])
        same = (
            replace(
                spec, base=bare.base, adapter=None, adapter_fingerprint=None, projection_dim=None
            )
            == bare
        )
        return same and spec.base.fingerprint == bare.base.fingerprint

    return pipeline.store.newest("retriever", fits)


def _some_question(passages: Artifact) -> str:
    """A question that the documents answer, to try; the first title where none can be made."""
    documents = load_documents(passages)
    for document in itertools.islice(documents.values(), 50):
        made = make_questions(document, most=1, seed=0)
        if made:
            return made[0].example.question
    return f"What is {next(iter(documents.values())).title or 'this'} about?"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
