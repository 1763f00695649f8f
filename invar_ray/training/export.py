"""A trained adapter as a folder for others: plain PEFT, a model card, pictures, and merged weights
on request.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from invar_ray import __version__
from invar_ray.errors import DataError, MixedArtifactsError, ModelError, ResourceError
from invar_ray.evaluation.report import (
    RETRIEVAL_METRICS,
    VARIANCE_METRICS,
    read_report,
    render_table,
)
from invar_ray.evaluation.tables import ANSWER_METRICS, print_name
from invar_ray.models.adapters import load_adapter
from invar_ray.models.base import BaseRef, open_base
from invar_ray.models.batching import pad_right
from invar_ray.models.encoder import (
    PROJECTION_FILE,
    BiEncoder,
    EncoderSpec,
    load_projection,
    open_trunk,
    query_ids,
)
from invar_ray.store.artifacts import Artifact, open_artifact
from invar_ray.text.tokens import text_ids

MERGED = "merged"
MIN_COSINE = 1.0 - 1e-6  # unit vectors within 1.4e-3; merging in float32 stays within some 1e-5
_PROBES = (
    "Who keeps the light on the northern island?",
    "when was the first bridge over the river built",
    "The harbour was founded by fishermen. It has a lighthouse, two churches and a market that is "
    "held on Saturdays.",
    "What is the capital?",
)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: the PEFT folder.
        merged: the folder of merged weights, or ``None``.
        lowest_cosine: between merged and unmerged outputs over a few texts, or ``None``.
    """

    folder: Path
    merged: Path | None
    lowest_cosine: float | None


def export_adapter(
    adapter: Artifact, folder: Path, *, report: Artifact | None = None, merged: bool = False
) -> Exported:
    """Write an adapter for use outside of this project.

    Args:
        adapter: a ``retriever`` or ``generator`` artifact.
        folder: new or empty.  It gets the PEFT files, ``README.md`` (a model card), ``training/``
            (log, losses) and, with a report, ``evaluation/`` (report, table, pictures).
        report: a ``report`` artifact that the adapter is part of.
        merged: write ``merged/`` too: the base with the update folded in, for ``from_pretrained``
            alone.

    Raises:
        DataError: ``folder`` is not empty.  MixedArtifactsError: the report is of another adapter.
            ModelError: merged
        weights do not reproduce the unmerged ones.  ArtifactError: an artifact cannot be used.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{folder} is there and not empty", expected="a new folder", action="name another one"
        )
    adapter.verify()
    if report is not None and not _mentions(report, adapter.ref):
        raise MixedArtifactsError(
            f"{report.uri} does not measure {adapter.uri}",
            expected="a report of a run with this adapter",
        )
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(adapter.path("adapter"), folder, dirs_exist_ok=True)
    _copy(adapter, folder / "training", ("log.jsonl", "losses.png", "losses.csv"))
    if report is not None:
        names = (
            "report.json",
            "table.txt",
            "recall.png",
            "recall.csv",
            "variance.png",
            "variance.csv",
        )
        _copy(report, folder / "evaluation", names)
    place = lowest = None
    if merged:
        place = folder / MERGED
        lowest = _merge(adapter, place)
    (folder / "README.md").write_text(_card(adapter, report, folder, lowest), encoding="utf-8")
    return Exported(folder, place, lowest)


def push_folder(
    folder: Path, repo: str, *, private: bool = True, endpoint: str | None = None
) -> str:
    """Upload an exported folder to a model hub, as one commit; a repository that is not there is
    made.

    Args:
        folder: of :func:`export_adapter`.
        repo: ``owner/name``.
        private: of a repository that is made.
        endpoint: address of the hub; ``None`` is what ``HF_ENDPOINT`` names, or Hugging Face.  The
            token comes from ``HF_TOKEN`` or from ``hf auth login``.

    Returns:
        The address of the commit.

    Raises:
        DataError: ``repo`` is no name of a repository.
        ResourceError: the hub cannot be reached or refuses.
    """
    # Not at the top: nothing else here needs the network.
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi(endpoint=endpoint)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=f"invar_ray {__version__}"
        )
    except HFValidationError as error:
        raise DataError(f"{repo!r} is no name of a repository", expected="owner/name") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ResourceError(
            f"{api.endpoint} did not take {repo} ({lines[0] if lines else error!r})",
            action="check the network and the token (HF_TOKEN, or hf auth login); the folder "
            "stands as it is",
        ) from error
    return str(commit.commit_url)


def open_adapter(uri: str) -> Artifact:
    """The adapter artifact at ``uri``.

    Raises:
        MixedArtifactsError: it is of another kind.  ArtifactError: see :func:`open_artifact`.
    """
    artifact = open_artifact(uri)
    if artifact.manifest.kind not in {"retriever", "generator"}:
        raise MixedArtifactsError(
            f"{uri} is of kind {artifact.manifest.kind!r}", expected="a retriever or a generator"
        )
    return artifact


def _spec(adapter: Artifact) -> EncoderSpec:
    """The encoder of a ``retriever`` artifact."""
    return EncoderSpec.from_json(adapter.info["encoder"])


def _merge(adapter: Artifact, place: Path) -> float:
    """Write merged weights and tokenizer; the lowest cosine between the outputs of both ways."""
    source = adapter.path("adapter")

    def opened() -> tuple[Any, Any]:
        if adapter.manifest.kind == "retriever":
            return open_trunk(_spec(adapter), adapter.store, torch.float32)
        return open_base(BaseRef(**adapter.info["base"]), adapter.store)

    plain, tokenizer = opened()
    second, _ = opened()
    unmerged = _outputs(adapter, load_adapter(plain, source), tokenizer)
    whole = load_adapter(second, source, merge=True)
    merged = _outputs(adapter, whole, tokenizer)
    lowest = float(cosine_similarity(unmerged.double(), merged.double(), dim=-1).min())
    if not lowest >= MIN_COSINE:
        raise ModelError(
            f"merged weights give other outputs than the adapter (lowest cosine {lowest:.6f})",
            expected=f"{MIN_COSINE:.6f} or more",
            action="use the adapter unmerged",
        )
    whole.save_pretrained(place)
    tokenizer.save_pretrained(place)
    if (source / PROJECTION_FILE).is_file():
        save_file({"weight": load_projection(source)}, str(place / PROJECTION_FILE))
    elif adapter.manifest.kind == "retriever" and _spec(adapter).kind == "encoder":
        _describe_for_others(place, _spec(adapter), int(whole.config.hidden_size))
    return lowest


def _describe_for_others(place: Path, spec: EncoderSpec, width: int) -> None:
    """What sentence-transformers and servers of embeddings read beside an encoder's weights."""
    ways = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}
    package = "sentence_transformers.models"
    names = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": f"{package}.{name}"}
            for number, (path, name) in enumerate(names)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            **{f"pooling_mode_{name}": way == spec.pooling for way, name in ways.items()},
        },
        "sentence_bert_config.json": {
            "max_seq_length": max(spec.query_max_tokens, spec.passage_max_tokens),
            "do_lower_case": False,
        },
        "config_sentence_transformers.json": {
            "prompts": {"query": spec.query_prefix, "document": spec.passage_prefix},
        },
    }
    for name, content in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(json.dumps(content, indent=2), encoding="utf-8")


@torch.inference_mode()
def _outputs(adapter: Artifact, model: Any, tokenizer: Any) -> Tensor:
    """What the adapter is for: vectors [N, D] of stage 1, the last token's logits [N, V] of stage
    2.
    """
    if adapter.manifest.kind == "retriever":
        spec = _spec(adapter)
        ids, mask = pad_right(query_ids(tokenizer, _PROBES, spec), int(tokenizer.pad_token_id))
        module = BiEncoder(model, spec.pooling, spec.projection_dim)
        if module.projection is not None:
            module.projection.weight.data.copy_(load_projection(adapter.path("adapter")))
        vectors: Tensor = module.eval()(ids, mask)
        return vectors
    rows = [[*row, int(tokenizer.eos_token_id)] for row in text_ids(tokenizer, _PROBES)]
    ids, mask = pad_right(rows, int(tokenizer.pad_token_id))
    logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits[torch.arange(len(rows)), mask.sum(dim=1) - 1].float()


def _mentions(report: Artifact, ref: str) -> bool:
    """Whether ``ref`` is among the report's parents, theirs, and so on."""
    open_, seen = [report], set()
    while open_:
        artifact = open_.pop()
        for role, parent in artifact.manifest.parents.items():
            if parent == ref:
                return True
            if parent not in seen:
                seen.add(parent)
                open_.append(artifact.parent(role))
    return False


def _copy(artifact: Artifact, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if name in artifact.manifest.files:
            folder.mkdir(exist_ok=True)
            shutil.copy(artifact.path(name), folder / name)


def _card(adapter: Artifact, report: Artifact | None, folder: Path, lowest: float | None) -> str:
    kind = adapter.manifest.kind
    description = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = str(description["base_model_name_or_path"])
    stage = "stage 1, the retriever" if kind == "retriever" else "stage 2, the generator"
    lines = [
        "---",
        "library_name: peft",
        *([] if base.startswith("builtin:") else [f"base_model: {base}"]),
    ]
    lines += ["tags:", "- retrieval-augmented-generation", "- lora", "---", ""]
    lines += [f"# {adapter.manifest.name}: {stage}", ""]
    lines += [
        f"A LoRA adapter (rank {description['r']}, alpha {description['lora_alpha']}) for "
        f"`{base}`, trained with",
        f"invar_ray {__version__} after Invar-RAG (arXiv 2411.07021).",
        f"Artifact `{adapter.ref}`, {adapter.manifest.created}.",
        "",
    ]
    if base.startswith("builtin:"):
        lines += [
            "The base is embedded in invar_ray: outside of it use merged weights (`export "
            "--merged`).",
            "",
        ]
    lines += ["## Use", ""]
    if kind == "retriever":
        spec = _spec(adapter)
        end = " and the end token" if spec.kind == "llm" else ""
        states = {"mean": "mean of the token states", "last": "last token state"}
        lines += [
            f"Query: `{spec.query_prefix}{{question}}`{end}, at most "
            f"{spec.query_max_tokens} tokens.",
            f"Passage: `{spec.passage_prefix}{{title}} {{text}}`{end}, at most "
            f"{spec.passage_max_tokens}.",
            f"Vector: {states.get(spec.pooling, 'first token state')}"
            + (" of `.model`" if spec.kind == "llm" else "")
            + (
                f", then `{PROJECTION_FILE}` ({spec.projection_dim} values)"
                if spec.projection_dim
                else ""
            )
            + ", L2 norm 1. Score: cosine.",
        ]
    else:
        lines += [
            f"At most {adapter.info['max_context']} tokens of context, "
            f"{adapter.info['max_new_tokens']} new ones."
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
