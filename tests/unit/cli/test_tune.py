"""Which weight is advised; the trainings themselves are in ``tests/ray/test_training.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from invar_ray.cli.main import app
from invar_ray.cli.tune import Trial, Trials, chosen, told


def trial(weight: float, recall: float, overlap: float) -> Trial:
    return Trial(weight, recall, recall, overlap, questions=100)


def test_recall_comes_first_and_steadiness_decides_among_those_within_one_error() -> None:
    # The best recall is 0.90: sqrt(0.9 * 0.1 / 100) = 0.03, so 0.87 and more will do.
    trials = [trial(0, 0.90, 0.40), trial(40, 0.88, 0.55), trial(160, 0.86, 0.70)]
    assert chosen(trials).weight == 40
    lines = told(Trials(trials, [])).splitlines()
    assert lines[-1].startswith("retriever.invariance_weight=40: ")
    assert "at least 0.870" in lines[-1]


def test_a_weight_of_hybrid_search_is_advised_where_one_was_tried() -> None:
    hybrid = [trial(0.4, 0.96, 0.3), trial(0.8, 0.95, 0.5), trial(1.0, 0.90, 0.6)]
    lines = told(Trials([trial(40, 0.9, 0.5)], hybrid)).splitlines()
    assert lines[-2].startswith("retriever.invariance_weight=40: ")
    assert lines[-1].startswith("search.dense_weight=0.8: ")


def test_of_equals_the_lighter_weight_is_taken() -> None:
    assert chosen([trial(40, 0.9, 0.5), trial(10, 0.9, 0.5)]).weight == 10


@pytest.mark.parametrize("weights", ["0,ten", "", "-1,2", "4,4", "1,nan", "inf"])
def test_weights_that_are_none_are_refused_before_anything_is_made(
    weights: str, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    found = CliRunner().invoke(app, ["tune", "--weights", weights, f"storage.root_uri={root}"])
    assert found.exit_code == 1
    assert "weights are" in found.output
    assert not root.exists()
