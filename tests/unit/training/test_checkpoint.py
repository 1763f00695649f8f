"""A checkpoint gives back what it was given, bit for bit, and only to the run that wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from invar_ray.errors import MixedArtifactsError
from invar_ray.training.checkpoint import (
    SCHEMA_VERSION,
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from invar_ray.training.engine import EngineState

NAMES = ("base.model.layers.0.self_attn.q_proj.lora_A.default.weight", "projection.weight")


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(5, 3, generator=generator) for name in NAMES}
    # Values that a text format or a rounding would lose.
    found[NAMES[0]][0] = torch.tensor([1e-45, -0.0, 3.4028235e38])
    found[NAMES[0]][1] = torch.tensor([float("inf"), -float("inf"), 1 / 3])
    return found


def checkpoint() -> Checkpoint:
    moments = {"exp_avg": tensors(1), "exp_avg_sq": tensors(2)}
    log = [
        {"step": 1, "loss": 0.1 + 0.2, "learning_rate": 1e-4 / 3},
        {"step": 2, "loss": 1e-17, "tokens": 3.0},
    ]
    return Checkpoint(2, EngineState(tensors(0), moments, 2), log)


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and torch.equal(first[name].view(torch.int32), second[name].view(torch.int32))
        for name in first
    )


def test_round_trip_is_equal_bit_for_bit(tmp_path: Path) -> None:
    saved = checkpoint()
    save_checkpoint(tmp_path, saved, "run")
    loaded = load_checkpoint(tmp_path, "run")
    assert (loaded.step, loaded.engine.adam_step) == (2, 2)
    assert same_bits(loaded.engine.parameters, saved.engine.parameters)
    assert loaded.engine.moments.keys() == saved.engine.moments.keys()
    for key, group in saved.engine.moments.items():
        assert same_bits(loaded.engine.moments[key], group)
    assert loaded.log == saved.log


def test_saving_what_was_loaded_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    save_checkpoint(tmp_path / "one", checkpoint(), "run")
    save_checkpoint(tmp_path / "two", load_checkpoint(tmp_path / "one", "run"), "run")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["log.jsonl", "moments.safetensors", "parameters.safetensors", "state.json"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(0, EngineState(tensors(0), {}, 0), []), "run")
    loaded = load_checkpoint(tmp_path, "run")
    assert (loaded.step, loaded.engine.adam_step, loaded.engine.moments, loaded.log) == (
        0,
        0,
        {},
        [],
    )


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(), "aaaa")
    with pytest.raises(MixedArtifactsError) as caught:
        load_checkpoint(tmp_path, "bbbb")
    assert str(caught.value) == (
        f"checkpoint {tmp_path} is of run aaaa (schema {SCHEMA_VERSION}). "
        f"Expected: run bbbb (schema {SCHEMA_VERSION}). To do: delete it, or train under another "
        "storage root."
    )


def test_checkpoint_of_another_layout_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(), "run")
    state = json.loads((tmp_path / "state.json").read_text(encoding="utf-8"))
    (tmp_path / "state.json").write_text(
        json.dumps({**state, "schema_version": SCHEMA_VERSION + 1}), encoding="utf-8"
    )
    with pytest.raises(MixedArtifactsError, match=rf"\(schema {SCHEMA_VERSION + 1}\)"):
        load_checkpoint(tmp_path, "run")


def test_no_pickle(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(), "run")
    for path in tmp_path.iterdir():
        assert path.suffix in {".json", ".jsonl", ".safetensors"}
        assert not path.read_bytes().startswith((b"\x80", b"PK"))
