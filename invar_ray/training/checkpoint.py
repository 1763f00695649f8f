"""Checkpoints of our own: safetensors + JSON, no pickle, bound to no world size.

A checkpoint folder holds ``parameters.safetensors``, ``moments.safetensors``, ``state.json`` (step,
Adam's step, fingerprint of the run), ``log.jsonl`` (the metrics so far, so that a resumed run's log
is whole) and, where steps are measured, ``best.safetensors``; where negatives are refreshed,
``negatives.json``.  Data position and dropout need no state: both are functions of (seed, step,
rank).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from invar_ray.errors import MixedArtifactsError
from invar_ray.training.engine import EngineState
from invar_ray.training.stage import NEGATIVES_FILE

SCHEMA_VERSION = 1


@dataclass
class Checkpoint:
    """What a run resumes from: ``step`` optimizer steps are done."""

    step: int
    engine: EngineState
    log: list[dict[str, Any]]
    best: dict[str, Tensor] | None = None
    """Parameters of the best step so far, where steps are measured."""
    negatives: dict[str, Any] | None = None
    """Which version of the negatives is in use, and which is under way; ``None`` where they are not
    refreshed.
    """


def save_checkpoint(folder: Path, checkpoint: Checkpoint, run: str) -> None:
    """Write into an existing empty folder (the caller publishes it); ``run`` is the fingerprint of
    what is trained.
    """
    save_file(checkpoint.engine.parameters, str(folder / "parameters.safetensors"))
    if checkpoint.best is not None:
        save_file(checkpoint.best, str(folder / "best.safetensors"))
    if checkpoint.negatives is not None:
        (folder / NEGATIVES_FILE).write_text(
            json.dumps(checkpoint.negatives, indent=1), encoding="utf-8"
        )
    flat = {
        f"{key}/{name}": value
        for key, group in checkpoint.engine.moments.items()
        for name, value in group.items()
    }
    save_file(flat, str(folder / "moments.safetensors"))
    (folder / "log.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in checkpoint.log), encoding="utf-8"
    )
    state = {
        "schema_version": SCHEMA_VERSION,
        "step": checkpoint.step,
        "adam_step": checkpoint.engine.adam_step,
        "run": run,
    }
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")


def load_checkpoint(folder: Path, run: str) -> Checkpoint:
    """Read a checkpoint back.

    Raises:
        MixedArtifactsError: if another run wrote it.
    """
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state["run"] != run or state["schema_version"] != SCHEMA_VERSION:
        raise MixedArtifactsError(
            f"checkpoint {folder} is of run {state['run']} (schema {state['schema_version']})",
            expected=f"run {run} (schema {SCHEMA_VERSION})",
            action="delete it, or train under another storage root",
        )
    moments: dict[str, dict[str, Any]] = {}
    for path, value in load_file(folder / "moments.safetensors").items():
        key, _, name = path.partition("/")
        moments.setdefault(key, {})[name] = value
    log = [
        json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    engine = EngineState(
        load_file(folder / "parameters.safetensors"), moments, int(state["adam_step"])
    )
    best = (
        load_file(folder / "best.safetensors") if (folder / "best.safetensors").is_file() else None
    )
    place = folder / NEGATIVES_FILE
    negatives = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else None
    return Checkpoint(int(state["step"]), engine, log, best, negatives)
