"""Other stage 1s beside the run's own: ``evaluation.arms``."""

from __future__ import annotations

from pathlib import Path

import pytest

from invar_ray.config import arm_config, load_config
from invar_ray.errors import ConfigError
from invar_ray.executor import Here
from invar_ray.pipeline import _Dry, _Missing, _standing
from invar_ray.steps import retriever
from tests.support import World


def _recipe(folder: Path, arms: str) -> Path:
    file = folder / "arms.yaml"
    file.write_text(f"extends: tiny\nname: arms\nevaluation:\n  arms:\n{arms}", encoding="utf-8")
    return file


def test_an_arm_changes_its_sections_and_nothing_else(tmp_path: Path) -> None:
    file = _recipe(
        tmp_path,
        "    plain: {retriever: {invariance_weight: 0.0, lora: {rank: 4}}}\n"
        "    short: {model: {retriever_layers: 1}}\n",
    )
    config = load_config(str(file))
    plain, short = arm_config(config, "plain"), arm_config(config, "short")
    assert plain.retriever.invariance_weight == 0.0
    assert (plain.retriever.lora.rank, plain.retriever.lora.alpha) == (4, 32)
    assert plain.retriever.steps == config.retriever.steps
    assert short.model.retriever_layers == 1
    assert short.retriever == config.retriever
    assert plain.name == config.name
    assert plain.corpus == config.corpus
    assert not plain.evaluation.arms


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ("    a: {retriever: {invariance_wieght: 0.0}}\n", "did you mean retriever.invariance_w"),
        ("    a: {corpus: {chunk_tokens: 64}}\n", "evaluation.arms.a: changes corpus, expected"),
        ("    a: {retriever: {steps: 0}}\n", "evaluation.arms.a.retriever.steps"),
        ("    a b: {retriever: {steps: 3}}\n", "evaluation.arms"),
        ("    a: {retriever: 3}\n", "evaluation.arms"),
    ],
)
def test_faults_of_an_arm_are_told_with_its_name(tmp_path: Path, arms: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(str(_recipe(tmp_path, arms)))
    assert said in str(error.value)


def test_an_arm_trains_another_adapter_on_the_same_artifacts(tmp_path: Path) -> None:
    world = World(tmp_path, "evaluation.arms={plain: {retriever: {invariance_weight: 0.0}}}")
    own = retriever.plan(world.config, world.base, world.trainset)
    arm = world.arm("plain")
    other = retriever.plan(arm.config, arm.base, arm.trainset, arm="plain")
    assert arm.trainset.ref == world.trainset.ref
    assert own.fingerprint != other.fingerprint
    assert other.name == f"{own.name}-plain"
    assert "plain: training set" in arm.reused
    assert {label for label, _ in world._of_arm("plain", (12, 12))} == {
        "plain: stage 1: retriever",
        "plain: embed passages (arm)",
        "plain: index (arm)",
        "plain: hits of dev questions in the arm index",
    }
    assert not world.reused  # made by this very run, so nothing stands from an earlier one


def test_what_stands_is_looked_up_without_training_an_arm(tmp_path: Path) -> None:
    world = World(tmp_path, "evaluation.arms={plain: {retriever: {invariance_weight: 0.0}}}")
    world.trainset  # noqa: B018
    dry = _Dry(world.config, quiet=True, executor=Here())
    with pytest.raises(_Missing):
        dry.arm("plain").retriever  # noqa: B018
    assert "plain: training set" in dry.reused
    assert not world.store.list("retriever")


def test_what_stands_behind_a_missing_step_is_seen(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.trainset  # noqa: B018
    # The report asks for hits of dev questions first, of which there are none.
    assert "training set" in _standing(world.config, "report")
