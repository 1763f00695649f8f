"""The model card of an exported adapter: what it is, how it is loaded elsewhere, what it was
trained on and what was measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from invar_ray import __version__
from invar_ray.evaluation.report import (
    RETRIEVAL_METRICS,
    VARIANCE_METRICS,
    read_report,
    render_table,
)
from invar_ray.evaluation.tables import ANSWER_METRICS, print_name
from invar_ray.models.encoder import PROJECTION_FILE, EncoderSpec
from invar_ray.store.artifacts import Artifact

MERGED = "merged"
"""Folder of merged weights in an exported folder."""
_HUB_NAMES = {
    "smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "minilm": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
}
"""Built-in bases: what they are called on the hub, and their licence."""
_BUILT_IN = re.compile(rf"(?:builtin:|artifact:model/)({'|'.join(_HUB_NAMES)})(?:-[0-9a-f]+)?")


def model_card(
    adapter: Artifact, report: Artifact | None, folder: Path, lowest: float | None, name: str
) -> str:
    """The model card of an exported folder, as Markdown with the hub's header.

    Args:
        adapter: what was exported.
        report: what was measured with it, if anything.
        folder: the exported folder; PEFT's files stand in it.
        lowest: cosine of merged and unmerged outputs, where merged weights were written.
        name: on a hub, or of the folder.
    """
    kind = adapter.manifest.kind
    description = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = str(description["base_model_name_or_path"])
    built_in = _BUILT_IN.fullmatch(base)
    hub_name, licence = _HUB_NAMES[built_in.group(1)] if built_in else (base, "other")
    stage = "stage 1, the retriever" if kind == "retriever" else "stage 2, the generator"
    task = "sentence-similarity" if kind == "retriever" else "text-generation"
    lines = ["---", "library_name: peft", f"license: {licence}", f"pipeline_tag: {task}"]
    if "/" in hub_name and not hub_name.startswith((".", "/", "builtin:", "artifact:")):
        lines += [f"base_model: {hub_name}", "base_model_relation: adapter"]
    lines += ["tags:", "- retrieval-augmented-generation", "- lora"]
    lines += ["- sentence-transformers"] * (kind == "retriever" and lowest is not None)
    lines += ["---", "", f"# {name}: {stage}", ""]
    lines += [
        f"A LoRA adapter (rank {description['r']}, alpha {description['lora_alpha']}) for "
        f"`{hub_name}`, trained with",
        f"invar_ray {__version__} after Invar-RAG (arXiv 2411.07021).",
        f"Artifact `{adapter.ref}`, {adapter.manifest.created}.",
        "",
        *(
            ["The licence is that of the base, which the project does not know."]
            if not built_in
            else []
        ),
        "",
        "## Use",
        "",
    ]
    if kind == "retriever":
        spec = EncoderSpec.from_json(adapter.info["encoder"])
        lines += _snippet(name, lowest is not None)
        causal = spec.kind == "llm"
        end = " and the end token" if causal else ""
        states = {"mean": "mean of the token states", "last": "last token state"}
        lines += [
            f"Query: `{spec.query_prefix}{{question}}`{end}, at most "
            f"{spec.query_max_tokens} tokens.",
            f"Passage: `{spec.passage_prefix}{{title}} {{text}}`{end}, at most "
            f"{spec.passage_max_tokens}.",
            f"Vector: {states.get(spec.pooling, 'first token state')}"
            + (" of `.model`" if causal else "")
            + (
                f", then `{PROJECTION_FILE}` ({spec.projection_dim} values)"
                if spec.projection_dim
                else ""
            )
            + ", L2 norm 1. Score: cosine.",
        ]
    else:
        lines += [
            "```python",
            "from peft import AutoPeftModelForCausalLM",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")',
            "```",
            "",
            f"At most {adapter.info['max_context']} tokens of context, "
            f"{adapter.info['max_new_tokens']} new ones.",
        ]
    if lowest is not None:
        lines += [
            "",
            f"`{MERGED}/` holds base and adapter in one; lowest cosine with the unmerged outputs "
            f"{lowest:.7f}.",
        ]
    lines += [
        "",
        "## Data",
        "",
        *_data(adapter),
        "",
        "## Training",
        "",
        *_settings(adapter.manifest.config),
    ]
    final = adapter.info.get("final")
    if final:
        lines += [
            "",
            f"After {adapter.info['steps']} steps:",
            "",
            "| measure | last step |",
            "|---|---|",
        ]
        lines += [
            f"| {print_name(name)} | {value:.4g} |"
            for name, value in final.items()
            if name != "step"
        ]
    if (folder / "training" / "losses.png").exists():
        lines += ["", "![losses](training/losses.png)"]
    lines += ["", "## Evaluation", ""]
    if report is None:
        lines.append("Not measured: no report was given to the export.")
    else:
        rows = read_report(report.path("report.json")).rows
        for title, names in (
            ("Recall", RETRIEVAL_METRICS),
            ("Variance", VARIANCE_METRICS),
            ("Answers", ANSWER_METRICS),
        ):
            held = [
                name for name in names if any(row.metrics.get(name) is not None for row in rows)
            ]
            if held:
                lines += [f"### {title}", "", render_table(rows, held, markdown=True), ""]
        lines += [f"![{name}](evaluation/{name}.png)" for name in ("recall", "variance")
                  if (folder / "evaluation" / f"{name}.png").exists()]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def _snippet(name: str, merged: bool) -> list[str]:
    """How the retriever is loaded elsewhere."""
    if not merged:
        return ["For sentence-transformers, vLLM and others: `invar-ray export --merged`.", ""]
    return [
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("{name}/{MERGED}")   # a folder; on a hub, download it first',
        'queries = model.encode_query(["Who painted Las Meninas?"])',
        'passages = model.encode_document(["Las Meninas The picture was painted by ..."])',
        "scores = model.similarity(queries, passages)",
        "```",
        "",
        "vLLM: `vllm serve FOLDER --runner pooling`; text-embeddings-inference: a base of a family",
        "that it supports. The layout is theirs; neither has been run on it here.",
        "",
    ]


def _data(adapter: Artifact) -> list[str]:
    """A line for each ancestor that says something about data."""
    lines: list[str] = []
    open_, seen = [adapter], {adapter.ref}
    while open_:
        artifact = open_.pop(0)
        for role, ref in artifact.manifest.parents.items():
            if ref in seen:
                continue
            seen.add(ref)
            parent = artifact.parent(role)
            open_.append(parent)
            numbers = {
                key: value for key, value in parent.info.items() if isinstance(value, (int, str))
            }
            told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in numbers.items())
            lines.append(f"- `{ref}`" + (f": {told}" if told else ""))
    return lines or ["- no parents recorded"]


def _settings(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            lines += _settings(value, f"{prefix}{key}.")
        else:
            lines.append(f"- {prefix}{key}: {value}")
    return lines
