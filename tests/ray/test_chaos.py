"""Reindexing under SIGKILL; the whole table: ``python -m tests.ray.chaos``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ray.chaos import KINDS, run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


def test_kills_change_nothing_and_undo_nothing(tmp_path: Path) -> None:
    outcome = run(tmp_path, kills=3, copies=60, seed=1, deadline_s=1300)
    assert sorted(kill.kind for kill in outcome.kills) == sorted(KINDS)
    assert outcome.same_ids
    assert outcome.same_bits
    assert outcome.redone == 0, "a shard that stood was made again"
    assert outcome.faults == ""
