"""A built-in base model, or one that a URI names (s3://, gs:// ..): the ``model`` artifact, which
every node can open.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from pyarrow import fs
from transformers import AutoModel, AutoTokenizer

from invar_ray.config import Config, to_dict
from invar_ray.errors import ModelError
from invar_ray.models.base import BUILTIN, MINILM, SMOLLM2, folder_fingerprint, is_remote
from invar_ray.models.smollm2 import PACKAGE, SHA256, load_smollm2
from invar_ray.models.tiny import build_tiny, minilm_folder
from invar_ray.store.artifacts import Building, Plan
from invar_ray.store.files import resolve_uri

__all__ = ["BUILTIN", "VERSION", "build", "plan"]

VERSION = 1
_KEPT = {"json", "safetensors", "model", "txt", "jinja"}
"""Endings of a model's files."""
_COPIED_AT_ONCE = 1 << 24


def plan(config: Config, name: str | None = None) -> Plan:
    """The artifact of a base.

    Args:
        config: the run.
        name: one of :data:`invar_ray.models.base.BUILTIN_RETRIEVER`, or the URI of a folder;
            ``None`` is ``model.base``.

    Raises:
        ModelError: if MiniLM's package is not installed, or the folder is no model.
    """
    name = name or config.model.base
    content: dict[str, Any] = {
        "tiny": to_dict(config.experimental.model.tiny),
        "seed": config.seed,
    }
    if name == SMOLLM2:
        content = {"package": PACKAGE, "sha256": SHA256}
    elif name == MINILM:
        content = {"folder": folder_fingerprint(minilm_folder())}
    elif is_remote(name):
        content = {"uri": name, "files": [entry[1:] for entry in _remote_files(name)]}
        name = re.sub(r"[^A-Za-z0-9._-]", "-", resolve_uri(name)[1].rstrip("/").rpartition("/")[2])
    return Plan(kind="model", name=name.removeprefix("builtin:"), config=content, version=VERSION)


def build(building: Building, config: Config, name: str | None = None) -> None:
    """Write a base into an artifact under construction; ``name`` as in :func:`plan`.

    Raises:
        ModelError: if the package that carries its weights is not installed.
    """
    name = name or config.model.base
    if is_remote(name):
        filesystem, _ = resolve_uri(name)
        for path, relative, _, _ in _remote_files(name):
            target = building.path / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            with filesystem.open_input_stream(path) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, _COPIED_AT_ONCE)
        return
    model: Any
    tokenizer: Any
    if name == SMOLLM2:
        model, tokenizer = load_smollm2()
    elif name == MINILM:
        folder = minilm_folder()
        model = AutoModel.from_pretrained(folder, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        _copy_descriptions(folder, building.path)
    else:
        model, tokenizer = build_tiny(config.experimental.model.tiny, config.seed)
    model.save_pretrained(building.path)
    tokenizer.save_pretrained(building.path)
    building.info["parameters"] = sum(parameter.numel() for parameter in model.parameters())


def _remote_files(uri: str) -> list[tuple[str, str, int, int]]:
    """Path, name below the folder, size and time of change in ns of a model's files, by name; never
    a pickle.

    Raises:
        ModelError: it has no config.json or no safetensors, or cannot be listed.
    """
    try:
        filesystem, root = resolve_uri(uri)
        listed = filesystem.get_file_info(fs.FileSelector(root.rstrip("/"), recursive=True))
    except OSError as error:
        raise ModelError(
            f"the base {uri} cannot be read ({str(error).splitlines()[0][:200]})",
            action="check the address and the credentials",
        ) from error
    found = sorted(
        (
            entry.path,
            entry.path.removeprefix(root.rstrip("/")).lstrip("/"),
            int(entry.size),
            int(entry.mtime_ns or 0),
        )
        for entry in listed
        if entry.type == fs.FileType.File and entry.extension in _KEPT
    )
    names = {name for _, name, _, _ in found}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"the base {uri} lacks {'weights' if 'config.json' in names else 'config.json'}",
            expected="a folder with config.json, tokenizer and safetensors",
        )
    return found


def _copy_descriptions(source: Path, target: Path) -> None:
    """What sentence-transformers says of an encoder: how it pools, how long its texts are."""
    for path in [
        *source.glob("modules.json"),
        *source.glob("*sentence*.json"),
        *source.glob("*/config.json"),
    ]:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes())
