"""One's own documents: index a folder and say what came of it, and find what was indexed last."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from invar_ray.artifacts import Artifact, Store, open_artifact
from invar_ray.config import Config
from invar_ray.errors import InvarError, MissingArtifactError
from invar_ray.indexing.passages import load_skipped
from invar_ray.pipeline import Pipeline
from invar_ray.text.readlog import echo_lines

_LATEST = "latest_index.json"
_NO_BASELINE = {"base", "retriever"}  # MiniLM's index is a baseline


def index_documents(config: Config, adapter_uri: str | None, options: str = "") -> Artifact:
    """Index ``config.corpus``; prints what was read and left out, and what to do next, to standard error.

    Args:
        config: the run.
        adapter_uri: a stage-1 adapter; ``None`` embeds with the bare base.
        options: what the user gave the command beyond the folder, repeated in the commands that are proposed.
    """
    started = time.monotonic()
    with Pipeline(config) as pipeline:
        if adapter_uri is None:
            index = pipeline.base_index
        else:
            index = pipeline.index_with(open_artifact(adapter_uri, "retriever"))
        passages = pipeline.passages
        if "passages" in pipeline.reused:
            echo_lines(load_skipped(passages))
        remember_index(pipeline.store, index)
    seconds = time.monotonic() - started
    info = passages.info
    _say(
        f"indexed {info['documents']:,} documents from {info['files']:,} files as {info['passages']:,} passages, "
        f"left out {info['skipped']:,}; {seconds:.0f} s"
    )
    if adapter_uri is None:
        _say("the base finds passages without having been trained on these documents")
    _say("\nask:    " + f'invar-ray ask {options}"..."')
    corpus = shlex.quote(config.corpus.uri)
    _say(f"train:  invar-ray questions {corpus}   (makes questions from the documents and says how to go on)\n")
    return index


def remember_index(store: Store, index: Artifact) -> None:
    """Note that ``index`` is the one to ask, until a newer one is made.  Only a local store keeps the note."""
    if store.is_local:
        note = {"ref": index.ref, "time": _now()}
        Path(store.root, _LATEST).write_text(json.dumps(note), encoding="utf-8")


def latest_index(store: Store, corpus: str | None = None) -> Artifact:
    """The index that was made, or asked for with ``invar-ray index``, last.

    Args:
        store: where to look.
        corpus: only those of this file or folder.

    Raises:
        MissingArtifactError: there is none.
    """
    found = [artifact for artifact in store.list("index") if artifact.manifest.name in _NO_BASELINE]
    if corpus is not None:
        wanted = {corpus, str(Path(corpus).expanduser().absolute()).rstrip("/")}
        found = [artifact for artifact in found if str(_source(artifact)).rstrip("/") in wanted]
    if not found:
        raise MissingArtifactError(
            f"no index {f'of {corpus} ' if corpus else ''}below {store.root_uri}",
            action="run invar-ray index FOLDER, invar-ray demo or invar-ray train first, or name one with its option",
        )
    # What a run makes within one second: the trained index after the base's.
    newest = max(found, key=lambda artifact: (artifact.manifest.created, artifact.manifest.name == "retriever"))
    noted = _noted(store)
    if noted is not None and noted["time"] >= newest.manifest.created:
        return next((artifact for artifact in found if artifact.ref == noted["ref"]), newest)
    return newest


def describe_index(index: Artifact) -> str:
    """One line: whose documents, how many passages, which retriever."""
    info = index.parent("passages").info
    encoder = index.info["encoder"]
    retriever = f"retriever {encoder['adapter']}" if encoder["adapter"] else "the base as retriever (not trained)"
    return f"{info.get('source', index.uri)}: {info['passages']:,} passages, {retriever}"


def _source(index: Artifact) -> Any:
    try:
        return index.parent("passages").info.get("source")
    except InvarError:  # its passages are gone: the index cannot be asked
        return None


def _noted(store: Store) -> dict[str, str] | None:
    if not store.is_local:
        return None
    try:
        note = json.loads(Path(store.root, _LATEST).read_text(encoding="utf-8"))
        return {"ref": str(note["ref"]), "time": str(note["time"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
