"""``invar-ray ask``: one question, over HTTP or in this process.

Nothing heavy is imported at the top: over HTTP neither torch nor Ray is needed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from invar_ray.console import label

if TYPE_CHECKING:
    from invar_ray.config import Config
    from invar_ray.store.artifacts import Artifact

_SHOWN_CHARS = 160


def ask_service(url: str, question: str, top_k: int | None, api_key: str | None) -> dict[str, Any]:
    """Ask over HTTP; the service's answer as JSON. Errors: see ``serve/client.py``."""
    client = importlib.import_module("serve.client")  # a top level package above this one
    answer: dict[str, Any] = client.ask(url, question, top_k, api_key)
    return answer


def ask_here(
    config: Config,
    question: str,
    *,
    index: str | None = None,
    generator: str | None = None,
    top_k: int | None = None,
    corpus: str | None = None,
    untrained: bool = False,
) -> dict[str, Any]:
    """Answer in this process, without Ray, in the same form as the service; one line on standard
    error says with what.  Arguments and errors: see :func:`invar_ray.open_rag`.
    """
    from invar_ray.api import open_rag

    rag = open_rag(
        config.storage.root_uri,
        corpus=corpus,
        index=index,
        generator=generator,
        untrained=untrained,
        k=top_k or config.serve.top_k,
        mode=config.search.mode,
        reranker=config.search.reranker,
        rerank_depth=config.search.rerank_depth,
    )
    rag.check_generator()
    answers = rag.generator_artifact
    by = "the untrained base" if answers is None else answers.ref
    print(f"asking {describe_index(rag.index)}; answered by {by}", file=sys.stderr, flush=True)
    found = rag.ask(question)
    return {
        "answer": found.text,
        "citations": [asdict(citation) for citation in found.citations],
        "passages": [asdict(hit) for hit in found.hits],
        "notes": list(found.notes),
        "refused": found.refused,
        "low_confidence": found.low_confidence,
        "guess": found.guess,
        "probability": found.probability,
    }


def describe_index(index: Artifact) -> str:
    """One line: whose documents, how many passages, which retriever."""
    info = index.parent("passages").info
    adapter = index.info["encoder"]["adapter"]
    retriever = f"found by {adapter}" if adapter else "found by the base (not trained)"
    return f"{info.get('source', index.uri)} ({info['passages']:,} passages), {retriever}"


def print_answer(answer: Mapping[str, Any]) -> None:
    """An answer with its citations: file and place where the document has them, title, and the
    passage's beginning.  No text of a model, a document or a service commands the terminal.
    """
    if answer.get("low_confidence"):
        sure = f"{answer['probability']:.0%}"
        print(f"answer: none is sure enough; best guess ({sure}): {label(answer['guess'])}")
    else:
        print(f"answer: {label(answer['answer']) or '(the model wrote nothing)'}")
    passages = {passage["passage_id"]: passage for passage in answer["passages"]}
    for citation in answer["citations"]:
        passage = passages.get(citation["passage_id"], {})
        how = "" if citation["source"] == "generated" else " (by the answer's text)"
        where = f"[{citation['number']}] {label(_where(citation))}"
        print(f"  {where}{how}: {label(_beginning(passage))}")
    if not answer["citations"]:
        print("  no citation; the passages were:")
        for number, passage in enumerate(passages.values(), start=1):
            print(f"  ({number}) {label(_where(passage))}: {label(_beginning(passage))}")
    for note in answer.get("notes", ()):
        print(f"  note: {label(note)}")


def _where(cited: Mapping[str, Any]) -> str:
    return str(cited.get("place") or cited["title"])


def _beginning(passage: Mapping[str, Any]) -> str:
    text = " ".join(str(passage.get("text", "")).split())
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1].rstrip() + "…"
