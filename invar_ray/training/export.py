"""A trained adapter as a folder for others: plain PEFT, a model card, pictures, and merged weights
on request.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from invar_ray import __version__
from invar_ray.errors import DataError, MixedArtifactsError, ResourceError
from invar_ray.models.adapters import load_merged
from invar_ray.models.base import BaseRef
from invar_ray.models.batching import pad_right
from invar_ray.models.encoder import (
    MERGE_TOLERANCE,
    BiEncoder,
    EncoderSpec,
    load_projection,
    open_trunk,
    query_ids,
)
from invar_ray.models.loading import open_model
from invar_ray.models.precision import Precision, made_in
from invar_ray.models.trunk import trunk
from invar_ray.store.artifacts import Artifact, open_artifact
from invar_ray.text.tokens import text_ids
from invar_ray.training.card import MERGED, model_card

_PACKAGE = "sentence_transformers.models"
_POOLING_MODES = (
    "cls_token mean_tokens max_tokens mean_sqrt_len_tokens weightedmean_tokens lasttoken".split()
)
_CONVERTER = "convert_hf_to_gguf.py"
SHARD_BYTES = 2_000_000_000
"""Of a file of merged weights; writing takes as much memory beside the model."""
_TOLERANCE: dict[Precision, float] = {"fp32": 1e-6, "bf16": MERGE_TOLERANCE[torch.bfloat16]}
"""How far merging may turn an output: unit vectors within 1.4e-3 in fp32, where it stays within
some 1e-5."""
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
    adapter: Artifact,
    folder: Path,
    *,
    report: Artifact | None = None,
    merged: bool = False,
    name: str | None = None,
) -> Exported:
    """Write an adapter for use outside of this project.

    Args:
        adapter: a ``retriever`` or ``generator`` artifact.
        folder: new or empty.  It gets the PEFT files, ``README.md`` (a model card), ``training/``
            (log, losses) and, with a report, ``evaluation/`` (report, table, pictures).
        report: a ``report`` artifact that the adapter is part of.
        merged: write ``merged/`` too: the base with the update folded in.  Of a retriever it is a
            folder for sentence-transformers.
        name: on the hub, ``owner/name``, for the card; ``None`` takes the folder's.

    Raises:
        DataError: ``folder`` is not empty.  MixedArtifactsError: the report is of another adapter.
            ModelError: merged weights do not reproduce the unmerged ones.  ArtifactError: an
            artifact cannot be used.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(
            f"{folder} is there and not empty", expected="a new folder", action="name another one"
        )
    adapter.verify_copy()
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
    card = model_card(adapter, report, folder, lowest, name or folder.name)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for path in folder.rglob("*"):  # weights come out of private temporary files
        path.chmod(0o755 if path.is_dir() else 0o644)
    return Exported(folder, place, lowest)


def find_gguf_converter() -> str:
    """llama.cpp's own converter of a model's folder to GGUF, on PATH.

    Raises:
        ResourceError: it is not there.
    """
    found = shutil.which(_CONVERTER)
    if found is None:
        raise ResourceError(
            f"llama.cpp's {_CONVERTER}, which writes GGUF, is not on PATH",
            action="install llama.cpp (a checkout of github.com/ggml-org/llama.cpp has it at its "
            "top), or export without --gguf",
        )
    return found


def write_gguf(converter: str, merged: Path) -> Path:
    """Merged weights as one file for llama.cpp, beside their folder and in their precision.

    Args:
        converter: of :func:`find_gguf_converter`.
        merged: of :func:`export_adapter`.

    Raises:
        ResourceError: the converter fails; no file is left.
    """
    file = merged.with_suffix(".gguf")
    part = file.with_name(f"{file.name}.part")
    done = subprocess.run(
        [converter, str(merged), "--outfile", str(part), "--outtype", "auto"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not part.is_file():
        part.unlink(missing_ok=True)
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise ResourceError(
            f"{converter} ended with {done.returncode} ({lines[-1] if lines else 'no output'})",
            expected="a GGUF file",
            action=f"run it on {merged} by hand; the folder stands as it is",
        )
    part.rename(file)
    return file


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
    """Write merged weights and tokenizer, in the precision that the adapter was trained in; the
    lowest cosine between the outputs of both ways.
    """
    source, precision = adapter.path("adapter"), made_in(adapter)
    if adapter.manifest.kind == "retriever":
        base, tokenizer = open_trunk(_spec(adapter), adapter.store, precision)
    else:
        base, tokenizer = open_model(BaseRef(**adapter.info["base"]), adapter.store, precision)
    outputs = partial(_outputs, adapter, tokenizer=tokenizer)
    whole, lowest = load_merged(base, source, outputs, _TOLERANCE[precision])
    if adapter.manifest.kind == "retriever":
        _write_sentence_transformer(trunk(whole), tokenizer, _spec(adapter), source, place)
    else:
        whole.save_pretrained(place, max_shard_size=SHARD_BYTES)
        tokenizer.save_pretrained(place)
    return lowest


def _write_sentence_transformer(
    model: Any, tokenizer: Any, spec: EncoderSpec, source: Path, place: Path
) -> None:
    """The retriever as sentence-transformers, vLLM and text-embeddings-inference read it: a model
    without a head, and a file for each thing that :class:`BiEncoder` does after it.
    """
    model.save_pretrained(place, max_shard_size=SHARD_BYTES)
    tokenizer.chat_template = None  # a retriever does not chat
    tokenizer.save_pretrained(place)
    if spec.kind == "llm":  # an encoder's own frame is all that it adds
        _end_in_eos(place / "tokenizer.json", tokenizer.eos_token, int(tokenizer.eos_token_id))
    modes = {"last": "lasttoken", "mean": "mean_tokens", "cls": "cls_token"}
    width = int(model.config.hidden_size)
    pooling = {f"pooling_mode_{mode}": mode == modes[spec.pooling] for mode in _POOLING_MODES}
    parts: list[tuple[str, dict[str, Any]]] = [
        ("Pooling", {"word_embedding_dimension": width, **pooling, "include_prompt": True})
    ]
    if spec.projection_dim is not None:
        parts.append(
            (
                "Dense",
                {
                    "in_features": width,
                    "out_features": spec.projection_dim,
                    "bias": False,
                    "activation_function": "torch.nn.modules.linear.Identity",
                },
            )
        )
    parts.append(("Normalize", {}))
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{_PACKAGE}.Transformer"}]
    for number, (name, settings) in enumerate(parts, start=1):
        folder = f"{number}_{name}"
        (place / folder).mkdir()
        _write_json(place / folder / "config.json", settings)
        if name == "Dense":
            weights = {"linear.weight": load_projection(source)}
            save_file(weights, str(place / folder / "model.safetensors"))
        modules.append(
            {"idx": number, "name": str(number), "path": folder, "type": f"{_PACKAGE}.{name}"}
        )
    _write_json(place / "modules.json", modules)
    _write_json(
        place / "sentence_bert_config.json",
        {"max_seq_length": spec.passage_max_tokens, "do_lower_case": False},
    )
    prompts = {"query": spec.query_prefix, "document": spec.passage_prefix}
    _write_json(
        place / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def _end_in_eos(file: Path, token: str, number: int) -> None:
    """Let the tokenizer itself append the end token, which truncation keeps, as
    :func:`invar_ray.models.encoder.query_ids` does.
    """
    values = json.loads(file.read_text(encoding="utf-8"))
    end = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": token, "type_id": 0}},
        ],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": token, "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
            {"SpecialToken": {"id": token, "type_id": 1}},
        ],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    before = values.get("post_processor")
    if before is not None and before["type"] == "TemplateProcessing":
        first = before["single"][0].get("SpecialToken")
        if first is not None:  # a start token stays
            for key in ("single", "pair"):
                end[key].insert(0, {"SpecialToken": first})  # type: ignore[attr-defined]
            end["special_tokens"] |= before["special_tokens"]
        before = None
    elif before is not None and before["type"] == "Sequence":
        kept = [each for each in before["processors"] if each["type"] != "TemplateProcessing"]
        before = {"type": "Sequence", "processors": [*kept, end]}
    elif before is not None:
        before = {"type": "Sequence", "processors": [before, end]}
    values["post_processor"] = before or end
    _write_json(file, values)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.inference_mode()
def _outputs(adapter: Artifact, model: Any, tokenizer: Any) -> Tensor:
    """What the adapter is for, as unit rows: vectors [N, D] of stage 1, the last token's logits
    [N, V] of stage 2.
    """
    if adapter.manifest.kind == "retriever":
        spec = _spec(adapter)
        ids, mask = pad_right(query_ids(tokenizer, _PROBES, spec), int(tokenizer.pad_token_id))
        module = BiEncoder(model, spec.pooling, spec.projection_dim)
        if module.projection is not None:
            module.projection.weight.data.copy_(load_projection(adapter.path("adapter")))
        vectors: Tensor = module.eval()(ids, mask)
        return normalize(vectors.double(), dim=-1)
    rows = [[*row, int(tokenizer.eos_token_id)] for row in text_ids(tokenizer, _PROBES)]
    ids, mask = pad_right(rows, int(tokenizer.pad_token_id))
    logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return normalize(logits[torch.arange(len(rows)), mask.sum(dim=1) - 1].double(), dim=-1)


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
