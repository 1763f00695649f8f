"""What is said of a setting that pydantic refuses: its key, what is asked, what was got."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

_SENTENCES = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be {ge:g} or more",
    "less_than_equal": "must be at most {le:g}",
    "too_short": "must name {min_length} or more",
    "literal_error": "must be {expected}",
    "value_error": "{error}",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a text",
    "tuple_type": "must be a list",
    "none_required": "must be null",
    "dataclass_type": "must be a section",
}
"""What is asked, by pydantic's name of the fault; another fault keeps pydantic's words."""
_OF_TYPE = frozenset(name for name in _SENTENCES if name.endswith(("_type", "_parsing", "_float")))
"""Faults of a value that is of another kind altogether."""

WENT = {
    "evaluation.provider": "rewrites.provider serves both kinds of questions",
    "evaluation.file_uri": "rewrites.uri holds those of both kinds of questions",
    "index.adapter_uri": "index.encoder takes the adapter's URI",
    "model.revision": "put it behind the name: model.base=name@revision",
    "retriever.lora.first_layer": "model.retriever_layers makes stage 1 cheaper",
    "generator.lora.first_layer": "it is generator.first_layer",
    "scale.embed_workers_max": "scale.embed_workers takes [fewest, most]",
    "scale.cut_workers": "it is scale.cpu_workers",
    "scale.tokenize_workers": "it is scale.cpu_workers",
    "scale.index_workers": "it is scale.cpu_workers",
    "variants": "the section is called rewrites; uri is its one address, and an endpoint's key is "
    "read from OPENAI_API_KEY",
    "scale.local_num_cpus": "start a Ray of your own (ray start --head --num-cpus N) and set "
    "scale.ray_address to auto",
}
"""What became of keys that a recipe of before may have."""


def explain_invalid(error: ValidationError, known: Sequence[str]) -> dict[str, str]:
    """What is asked of each key that is at fault, and what was got.

    Args:
        error: of the whole config.
        known: every key, so that pydantic's names of a union's members are told from fields.
    """
    of_field: dict[str, list[tuple[str, str]]] = {}
    for fault in error.errors(include_url=False):
        key = ""
        for part in fault["loc"]:
            longer = f"{key}.{part}" if key else str(part)
            if longer not in known:
                break
            key = longer
        sentence = _SENTENCES.get(fault["type"])
        message = sentence.format(**fault.get("ctx", {})) if sentence else fault["msg"]
        of_field.setdefault(key, []).append((fault["type"], f"{message} (got {fault['input']!r})"))
    said = {}
    for key, faults in of_field.items():
        # A field of several types has a fault for each of them: those that it comes close to count.
        near = [message for kind, message in faults if kind not in _OF_TYPE]
        said[key] = ", or: ".join(near or [message for _, message in faults])
    return said


def known_only(
    values: Mapping[str, Any], known: Sequence[str], prefix: str, faults: list[str]
) -> dict[str, Any]:
    """``values`` without unknown keys, so that the rest is checked too; each unknown key is a
    fault.
    """
    kept: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if path not in known:
            faults.append(f"{path}: unknown key{_hint(path, known)}")
        elif isinstance(value, Mapping) and any(name.startswith(f"{path}.") for name in known):
            kept[key] = known_only(value, known, f"{path}.", faults)
        else:
            kept[key] = value
    return kept


def _hint(path: str, known: Sequence[str]) -> str:
    if path in WENT:
        return f"; {WENT[path]}"
    if f"experimental.{path}" in known:
        return f"; it is experimental.{path}"
    last = path.rpartition(".")[2]
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.5) or [
        name for name in known if name.rpartition(".")[2] == last
    ]
    return f"; did you mean {close[0]}?" if close else ""
