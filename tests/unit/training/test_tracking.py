"""Trackers: what TensorBoard will read, what a restart replaces, and what a missing package
says.
"""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from invar_ray.config import ScaleConfig, load_config
from invar_ray.errors import ConfigError, ResourceError
from invar_ray.training.tracking import check_trackers, open_trackers
from invar_ray.training.worker import fault_of, memory_advice


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Every scalar of a folder's event files, read as TensorBoard does: a restart drops what came
    after its step.
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found: dict[tuple[str, int], float] = {}
    for path in sorted(folder.iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (size,) = struct.unpack("<Q", content[place : place + 8])
            event = Event.FromString(content[place + 12 : place + 12 + size])
            place += 16 + size
            if event.session_log.status == SessionLog.START:
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_tensorboard_holds_every_number_and_a_restart_replaces_the_rest(
    tmp_path: Path, scheme: str
) -> None:
    root = f"{scheme}{tmp_path}"
    for first, steps, loss in ((0, (1, 2, 3), 5.0), (2, (3, 4), 7.0)):
        (tracker,) = open_trackers(["tensorboard"], root, "retriever-x", {}, first)
        for step in steps:
            tracker.log({"step": step, "loss": loss, "note": "text"})
            tracker.flush()
        tracker.close()
    found = scalars(tmp_path / "tensorboard" / "retriever-x")
    assert found == {("loss", 1): 5.0, ("loss", 2): 5.0, ("loss", 3): 7.0, ("loss", 4): 7.0}


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_one_clear_error(name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(
        ResourceError, match=rf"the package {name} is not installed.*pip install {name}"
    ):
        check_trackers(["tensorboard", name])


def test_trackers_are_scale_and_checked() -> None:
    assert load_config("tiny").scale.trackers == ("tensorboard",)
    assert load_config("tiny", ["scale.trackers=[]"]).scale.trackers == ()
    with pytest.raises(ConfigError, match=r"scale\.trackers"):
        load_config("tiny", ["scale.trackers=[tensorbord]"])


def test_a_fault_names_what_is_not_finite() -> None:
    assert fault_of({"step": 3, "loss": 1.0, "gradient_norm": 0.5}) is None
    bad = fault_of(
        {"step": 3, "loss": float("nan"), "gradient_norm": float("inf"), "accuracy": 1.0}
    )
    assert bad == "step 3: loss, gradient_norm not a finite number"


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (
            {"train_tokens_per_chunk": 512},
            "halve scale.train_tokens_per_chunk (512), or set scale.gradient_checkpointing=true; ",
        ),
        (
            {"gradient_checkpointing": True},
            "set scale.train_tokens_per_chunk, for instance to 8192; training goes on",
        ),
    ],
)
def test_a_step_that_does_not_fit_says_what_to_do(settings: dict[str, Any], advice: str) -> None:
    with pytest.raises(ResourceError) as caught, memory_advice(ScaleConfig(**settings), 6):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")
    assert str(caught.value).startswith(
        "step 7 does not fit into a GPU's memory (CUDA out of memory. Tried to allocate 9 GiB.). "
        f"To do: {advice}"
    )
    with pytest.raises(RuntimeError, match="another"), memory_advice(ScaleConfig(), 6):
        raise RuntimeError("another")
