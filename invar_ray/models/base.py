"""From a name to a model: a built-in base, a folder, or a model hub's name.

A built-in base, and one that a URI names, is written out once, as an artifact of kind ``model``;
folders and hub names are used where they are, hub names at one commit. The generator's base is a
causal LM, and the retriever's the same one, unless it has a base of its own: an encoder, or another
causal LM.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils.hub import cached_file

from invar_ray.config import ModelConfig
from invar_ray.errors import ModelError
from invar_ray.models.pooling import Pooling
from invar_ray.store.artifacts import Artifact, Store, digest

SMOLLM2, TINY, MINILM = "builtin:smollm2", "builtin:tiny", "builtin:minilm"
BUILTIN = (SMOLLM2, TINY)
"""Bases of both adapters."""
BUILTIN_RETRIEVER = (*BUILTIN, MINILM)
"""Bases of the retriever."""
_ARTIFACT = "artifact:"
_COMMIT = re.compile("[0-9a-f]{40}")
_HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class BaseRef:
    """A resolved base model, small enough to travel to workers and into manifests.

    Attributes:
        location: ``artifact:<ref>`` below the store's root, a folder, or a hub name.
        revision: commit of a hub name: every node and every later day takes the same weights.
        fingerprint: changes whenever the weights or the tokenizer could.
        pooling: of an encoder (BERT, ModernBERT ..): how its token states were trained to become
            one vector; ``None`` for a causal LM.
        query_prefix, passage_prefix: what an encoder was trained to see before its texts.
    """

    location: str
    revision: str | None
    fingerprint: str
    pooling: Pooling | None = None
    query_prefix: str = ""
    passage_prefix: str = ""

    @property
    def is_encoder(self) -> bool:
        """Whether it is an encoder, and no causal LM."""
        return self.pooling is not None

    def folder_or_name(self, store: Store | None) -> str:
        """What ``from_pretrained`` takes, on this node; the store is that of a built-in base.

        Raises:
            ModelError: if the folder's weights are not those that were resolved.  ArtifactError:
                see :meth:`Store.open`.
        """
        if store is not None and self.location.startswith(_ARTIFACT):
            return str(store.open(self.location.removeprefix(_ARTIFACT), "model").path())
        folder = Path(self.location)
        if folder.is_dir() and folder_fingerprint(folder) != self.fingerprint:
            raise ModelError(
                f"the base in {folder} has changed since it was used (fingerprint "
                f"{folder_fingerprint(folder)})",
                expected=f"fingerprint {self.fingerprint}",
                action="put the old weights back, or train and index again with the new ones",
            )
        return self.location


def is_remote(base: str) -> bool:
    """Whether a base is a folder that its URI names (s3://, gs:// ..)."""
    return "://" in base


def name_and_revision(base: str) -> tuple[str, str | None]:
    """A base's name and, for a hub name with an ``@``, the commit behind it."""
    if Path(base).expanduser().is_dir():
        return base, None
    name, _, commit = base.partition("@")
    return name, commit or None


def resolve_base(config: ModelConfig, built: Artifact | None) -> BaseRef:
    """Find the base without loading it.

    Args:
        config: names it.
        built: the artifact of a built-in base, where ``config.base`` is one.

    Raises:
        ModelError: if a folder lacks its files.
    """
    return _resolve(config.base, BUILTIN, built)


def resolve_retriever_base(name: str, built: Artifact | None) -> BaseRef:
    """As :func:`resolve_base`, for ``model.retriever_base``: of an encoder, also how it pools and
    what it wants before its texts.

    Raises:
        ModelError: as there, and if its description cannot be read.
    """
    found = _resolve(name, BUILTIN_RETRIEVER, built)
    source = found.location if built is None else str(built.path())
    described = description(source, found.revision)
    named = (described.architectures or [""])[0]
    if described.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or named.endswith(
        "ForCausalLM"
    ):
        return found
    pooling, query, passage = stored_form(source, found.revision)
    return replace(found, pooling=pooling, query_prefix=query, passage_prefix=passage)


def stored_form(source: str, revision: str | None) -> tuple[Pooling, str, str]:
    """How a model's sentence-transformers files say that texts become vectors: the pooling, and
    what stands before a query and a passage; without such files the mean, and nothing.

    Raises:
        ModelError: it pools in a way that is not known here, or changes vectors after it.
    """
    prompts = _stored_json(source, revision, "config_sentence_transformers.json").get("prompts", {})
    query = prompts.get("query", "")
    return (
        _stored_pooling(source, revision),
        query or "",
        prompts.get("document", prompts.get("passage", "")) or "",
    )


def resolve_named(name: str) -> BaseRef:
    """A folder or a hub name, whatever kind of model it is.

    Raises:
        ModelError: if there is no such folder, or it lacks its description.
    """
    return _resolve(name, (), None)


def stored_base(model: Artifact) -> BaseRef:
    """The base that stands in a store as an artifact of kind ``model``."""
    return BaseRef(f"{_ARTIFACT}{model.ref}", None, model.fingerprint)


def _resolve(base: str, builtin: tuple[str, ...], built: Artifact | None) -> BaseRef:
    if built is not None and (base in builtin or is_remote(base)):
        return stored_base(built)
    if base in builtin or is_remote(base):
        raise ModelError(
            f"the base {base} has not been built into the store",
            action="run python -m jobs.run_pipeline",
        )
    if base.startswith("builtin:"):
        expected = " or ".join(builtin) or "a folder or a hub name"
        raise ModelError(f"there is no base {base!r}", expected=expected)
    folder = Path(base).expanduser()
    if folder.is_dir():
        return BaseRef(str(folder.resolve()), None, folder_fingerprint(folder))
    if base.startswith((".", "/", "~")):
        raise ModelError(
            f"no folder {base!r}",
            expected="a folder with config.json, tokenizer and safetensors",
        )
    name, revision = name_and_revision(base)
    commit = hub_commit(name, revision)
    return BaseRef(name, commit, digest({"name": name, "revision": commit}))


def hub_commit(name: str, revision: str | None) -> str:
    """The commit that a hub name stands for: the hub's newest of a branch or tag, or, where the hub
    cannot be asked, the one in the local cache.

    Args:
        name: of the hub.
        revision: a commit, which is taken as it is, a branch or a tag; ``None`` is ``main``.

    Raises:
        ModelError: neither knows it.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    refused: Exception = OSError("HF_HUB_OFFLINE is set, and it is not in the local cache")
    if not constants.is_offline_mode():
        try:
            asked = HfApi(constants.ENDPOINT).model_info(
                name, revision=revision, timeout=_HUB_TIMEOUT_S
            )
        except Exception as error:  # its HTTP library differs by version, and so do its errors
            refused = error
        else:
            return str(asked.sha)
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        return Path(cached).parent.name  # snapshots/<commit>/config.json
    raise unresolved(name, refused) from refused


def _stored_pooling(source: str, revision: str | None) -> Pooling:
    """How an encoder's sentence-transformers description says that it pools; without one: mean.

    Raises:
        ModelError: in a way that is not known here.
    """
    modules = _stored_json(source, revision, "modules.json") or []
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    more = [kind for kind in kinds if kind not in {"Transformer", "Pooling", "Normalize"}]
    if more:
        raise ModelError(
            f"{source!r} has a part that is not known here: {more[0]}",
            expected="a transformer, a pooling and a normalisation",
            action="use another encoder",
        )
    paths = [str(module["path"]) for module in modules if str(module["type"]).endswith("Pooling")]
    if not paths:
        return "mean"
    values = _stored_json(source, revision, f"{paths[0]}/config.json")
    switched = {key for key, value in values.items() if key.startswith("pooling_mode_") and value}
    stated = {str(values.get("pooling_mode", ""))} | switched
    ways: dict[str, Pooling] = {
        "mean": "mean",
        "pooling_mode_mean_tokens": "mean",
        "cls": "cls",
        "pooling_mode_cls_token": "cls",
        "lasttoken": "last",
        "pooling_mode_lasttoken": "last",
    }
    known = {ways[name] for name in stated if name in ways}
    if len(known) != 1 or switched - set(ways):
        raise ModelError(
            f"{source!r} pools by {', '.join(sorted(stated - {''})) or 'nothing'}",
            expected="mean, cls or lasttoken, one of them",
            action="use another encoder",
        )
    return known.pop()


def _stored_json(source: str, revision: str | None, name: str) -> Any:
    """A JSON file of a model, or an empty dict where it has none."""
    file = cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def description(source: str, revision: str | None = None) -> Any:
    """A model's configuration, of transformers.

    Raises:
        ModelError: if it cannot be loaded.
    """
    try:
        return AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise unresolved(source, error) from error


def load_tokenizer(
    source: str, revision: str | None = None, *, ends: bool = True
) -> PreTrainedTokenizerBase:
    """A tokenizer with an end token and a padding token (the end token where the model has none).

    Args:
        source: folder or hub name.
        revision: commit of a hub name.
        ends: ``False`` for an encoder: its own template frames texts, no end token is needed.

    Raises:
        ModelError: if it cannot be loaded, or lacks what it needs.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise unresolved(source, error) from error
    if ends and tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {source!r} has no end token",
            expected="an eos_token, which queries and passages end in",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer of {source!r} has no padding token")
    return tokenizer


def describe(ref: BaseRef, store: Store) -> Any:
    """The description of a resolved base, as transformers reads it from its config.json.

    Raises:
        ModelError: if it cannot be loaded.
    """
    return description(ref.folder_or_name(store), ref.revision)


def layer_sizes(ref: BaseRef, store: Store) -> tuple[int, int]:
    """Sizes of a resolved base's hidden states and inside its MLP, without its weights.

    Raises:
        ModelError: if its description cannot be loaded.
    """
    found = describe(ref, store)
    width = int(found.hidden_size)
    return width, int(getattr(found, "intermediate_size", 4 * width))


def hidden_size(ref: BaseRef, store: Store) -> int:
    """H of a resolved base, without its weights.

    Raises:
        ModelError: if its description cannot be loaded.
    """
    return int(describe(ref, store).hidden_size)


def folder_fingerprint(folder: Path) -> str:
    """16 hex digits that change with a model folder's content (weights are sampled at both ends),
    the sentence-transformers descriptions below it included.

    Raises:
        ModelError: if it has no config.json.
    """
    names = sorted(
        path
        for path in [*folder.iterdir(), *folder.glob("*/config.json")]
        if path.suffix in {".json", ".safetensors", ".model", ".txt"}
    )
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} has no config.json", expected="a folder written by save_pretrained"
        )
    parts = {}
    for path in names:
        with open(path, "rb") as stream:
            # A safetensors header lists every tensor; weights of tens of gigabytes are sampled, not
            # read.
            content = stream.read(1 << 20)
            stream.seek(max(0, path.stat().st_size - (1 << 20)))
            parts[path.relative_to(folder).as_posix()] = [
                path.stat().st_size,
                hashlib.sha256(content + stream.read()).hexdigest(),
            ]
    return digest(json.loads(json.dumps(parts)))


def unresolved(source: str, error: Exception) -> ModelError:
    """What to raise where a model cannot be loaded."""
    return ModelError(
        f"cannot load {source!r} ({str(error).splitlines()[0]})",
        expected="a folder with config.json, tokenizer files and safetensors weights, or a hub "
        "name that is cached or "
        "reachable",
        action="download it on a machine with network (hf download NAME --local-dir DIR) and set "
        "model.base=DIR, "
        "or use model.base=builtin:smollm2; invar-ray doctor checks this",
    )
