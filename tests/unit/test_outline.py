"""The plan that a run prints names the steps that the run then makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from invar_ray.models.base import describe
from invar_ray.models.meta import weigh
from invar_ray.outline import outline
from tests.support import World


def test_the_steps_of_the_outline_are_those_of_the_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(tmp_path)
    config = world.config
    shape = weigh(describe(world.base, world.store))
    said = [label for label, _ in outline(config, (shape, shape), "report", 24, 12, 12)]
    world.coarse_index  # noqa: B018
    world.trainset  # noqa: B018
    world.index_with(world.adapter)
    made = [label for label in world.seconds if label not in {"base model", "questions"}]
    assert {label for label in made if label != "passages"} <= set(said)
    assert [label for label in said if label in made] == [
        "embed passages (minilm)",
        "index (minilm)",
        "embed passages (base)",
        "index (base)",
        "training set",
        "embed passages (retriever)",
        "index (retriever)",
    ]


def test_more_work_is_guessed_to_take_longer(tmp_path: Path) -> None:
    world = World(tmp_path)
    shape = weigh(describe(world.base, world.store))
    given = world.config, (shape, shape)

    def total(goal: str, passages: int = 100) -> float:
        return sum(s for _, s in outline(*given, goal, passages, 50, 20))  # type: ignore[arg-type]

    assert total("retriever") < total("generator") < total("report")
    assert total("retriever") < total("retriever", 100_000)
