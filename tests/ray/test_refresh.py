"""Negatives that follow the model: a version counts from its step on, and a run that dies repeats
all of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from invar_ray.store.artifacts import Artifact, Store
from invar_ray.training import trainer
from invar_ray.training.batches import Trainset
from tests.distributed.small_store import small_store
from tests.ray.test_training import OVERRIDES, adapter_files, copied, log_of, train, work_that_dies

# Slow: every version of the negatives starts actors of its own.
# tests/unit/training/test_refresh_schedule.py is the fast part.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, EVERY, DELAY = 6, 2, 1
PLAIN = (f"retriever.steps={STEPS}", "retriever.optimizer.learning_rate=0.01")
REFRESHED = (
    *PLAIN,
    f"experimental.retriever.refresh_every={EVERY}",
    f"experimental.retriever.refresh_delay={DELAY}",
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with everything that comes before training."""
    root = tmp_path_factory.mktemp("r") / "s"
    small_store(root, OVERRIDES)
    return root


@pytest.fixture(scope="module")
def refreshed(local_ray: Any, prepared: Path) -> Artifact:
    return train(copied(prepared, "refreshed"), "retriever", *REFRESHED)


def test_a_version_counts_from_its_step_on_and_not_before(
    refreshed: Artifact, prepared: Path
) -> None:
    plain = train(copied(prepared, "plain"), "retriever", *PLAIN)
    found, without = log_of(refreshed), log_of(plain)
    assert [record["negatives_version"] for record in found] == [0, 0, 0, 1, 1, 2]
    assert all("negatives_version" not in record for record in without)
    same = [
        {key: value for key, value in record.items() if key != "negatives_version"}
        for record in found
    ]
    first = EVERY + DELAY
    assert same[:first] == without[:first], "bit for bit, before the first version counts"
    assert same[first]["loss"] != without[first]["loss"]
    assert adapter_files(refreshed) != adapter_files(plain)

    first_version, second = refreshed.info["refreshes"]
    assert (first_version["step"], first_version["adopted"]) == (2, 3)
    assert (second["step"], second["adopted"]) == (4, 5)
    assert 0 < first_version["changed_share"] <= 1
    for version in (first_version, second):
        mined = refreshed.store.open(version["trainset"], "trainset")
        assert version["mining"] == json.loads(
            mined.path("mining.json").read_text(encoding="utf-8")
        )
        assert version["mining"]["kept"] == sum(map(len, Trainset(mined).negatives)) > 0
        assert version["mining"]["dropped"]["copy of the positive"] >= 1
    # What they were mined from is gone; the adapters and training sets stay.
    assert not [
        artifact.ref
        for artifact in refreshed.store.list("vectors")
        if artifact.manifest.name == "refresh"
    ]
    assert not [
        artifact.ref
        for artifact in refreshed.store.list("index")
        if artifact.manifest.name == "refresh"
    ]


def test_a_run_that_died_twice_equals_an_uninterrupted_one(
    refreshed: Artifact, prepared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = copied(prepared, "died-refreshed")
    # Before step 4 the first version is in use, before step 5 the second one has just been taken.
    monkeypatch.setattr(trainer, "_work", work_that_dies(tmp_path, deaths=2, dies_at=(4, 5)))
    monkeypatch.setattr(trainer, "KEEP_CHECKPOINTS", 9)
    found = train(root, "retriever", *REFRESHED, "scale.checkpoint_every=1")
    assert (tmp_path / "died-1").exists(), "nothing died twice: the test proves nothing"
    assert log_of(found) == log_of(refreshed)
    assert adapter_files(found) == adapter_files(refreshed)
    timeless = [
        [
            {key: value for key, value in version.items() if key != "seconds"}
            for version in adapter.info["refreshes"]
        ]
        for adapter in (found, refreshed)
    ]
    assert timeless[0] == timeless[1]

    kept: dict[int, dict[str, Any]] = {}
    for place in root.glob(".train/*/checkpoint_*/negatives.json"):
        step = json.loads((place.parent / "state.json").read_text(encoding="utf-8"))["step"]
        kept[step] = json.loads(place.read_text(encoding="utf-8"))
    assert (len(kept[3]["history"]), kept[3]["pending"]["step"]) == (0, 2), (
        "under way, and on record"
    )
    assert (len(kept[4]["history"]), kept[4]["pending"]) == (1, None)
    assert (len(kept[5]["history"]), kept[5]["pending"]["step"]) == (1, 4)


def test_asynchronous_versions_count_when_they_stand(local_ray: Any, prepared: Path) -> None:
    found = train(
        copied(prepared, "asynchronous"),
        "retriever",
        "retriever.steps=400",
        "experimental.retriever.refresh_every=2",
        "experimental.retriever.refresh_async=true",
        "experimental.retriever.refresh_share=0.5",
        "scale.checkpoint_every=100",
    )
    versions = [record["negatives_version"] for record in log_of(found)]
    assert versions == sorted(versions)
    assert versions[2] == 0, "nobody waited"
    refreshes = found.info["refreshes"]
    assert versions[-1] == len(refreshes) > 0
    assert [versions.index(number) for number in range(1, len(refreshes) + 1)] == [
        r["adopted"] for r in refreshes
    ]
    everything = Store(found.store.root_uri).list("passages")[0].info["passages"]
    assert refreshes[0]["passages"] < everything
