"""A corpus in shards under SIGKILL; with real passages: ``python -m tests.ray.chaos_shards``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ray.chaos import Cluster, make_corpus
from tests.ray.chaos_shards import PHASES, ask, contents, run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

SHARDS = 2
MORE = ("scale.shard_rows=64", "index.factory=IVF16,SQ8", "index.num_lists_searched=16")


def test_kills_lose_nothing_and_mix_nothing(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, copies=40)
    cluster = Cluster()
    try:
        whole = run(tmp_path / "whole", corpus, cluster, (), 1400, MORE, SHARDS)
        killed = run(tmp_path / "killed", corpus, cluster, PHASES, 1800, MORE, SHARDS)
    finally:
        cluster.close()
    assert [phase for phase, _ in killed.kills] == list(PHASES)
    assert set(killed.published) == set(whole.published), "a part of the index was current"
    assert len(set(whole.published)) == 1
    assert len(whole.published[0]) == SHARDS
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_exact_shards_find_what_one_exact_index_finds(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, copies=20)
    cluster = Cluster()
    try:
        outcome = run(
            tmp_path / "exact", corpus, cluster, (), 1400, ["scale.shard_rows=64"], SHARDS
        )
    finally:
        cluster.close()
    questions = [f"Who built the lighthouse? Says copy {copy}." for copy in range(50)]
    ask(outcome, tmp_path / "exact", questions)
    assert outcome.same_scores == 50
