"""The harness of `make bench`: ratios are of the same round, and what got slower is named."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from benchmarks.bench import slower, table
from benchmarks.contest import OURS, Contest, Side, ratios, run


def sleeping(name: str, seconds: float) -> Side:
    return Side(name, "start:command", {"command": ["sleep", str(seconds)]})


def test_a_slower_peer_has_a_ratio_above_one() -> None:
    contest = Contest("nap", "nap", 1, (sleeping(OURS, 0.0), sleeping("peer", 0.4)), by="clock")
    found = run(contest, 2)
    least, median, most = found["ratios"]["peer"]["clock"]
    assert 1 < least <= median <= most
    assert [len(side["clock"]) for side in found["measured"].values()] == [2, 2]
    assert min(found["measured"]["peer"]["clock"]) >= 0.4


def test_a_side_that_fails_ends_the_contest_with_its_words() -> None:
    side = Side(OURS, "start:command", {"command": ["ls", "/nowhere at all"]})
    with pytest.raises(SystemExit, match=r"(?s)invar_ray.*nowhere at all"):
        run(Contest("wrong", "run", 1, (side,)), 1)


def test_a_ratio_is_of_the_two_times_of_a_round() -> None:
    ours = {"clock": [1.0, 2.0, 4.0], "cpu": [1.0, 1.0, 1.0]}
    peer = {"clock": [2.0, 2.0, 2.0], "cpu": [3.0, 2.0, 1.0]}
    assert ratios({OURS: ours, "peer": peer}) == {
        "peer": {"clock": [0.5, 1.0, 2.0], "cpu": [1.0, 2.0, 3.0]}
    }


def result(ours: list[float], peer: list[float] | None = None) -> dict[str, Any]:
    measured = {OURS: {"clock": ours, "cpu": ours}}
    if peer:
        measured["peer"] = {"clock": peer, "cpu": peer}
    contest = {
        "name": "encode",
        "unit": "passage",
        "count": 10,
        "target": None,
        "by": "cpu",
        "measured": measured,
        "ratios": ratios(measured),
    }
    return {"commit": "abc", "contests": [contest]}


def test_what_got_slower_is_named_with_its_interval() -> None:
    before = result([1.0, 1.0, 1.1])
    assert slower(result([1.05, 1.05, 1.05]), [before]) == []
    (line,) = slower(result([1.3, 1.4, 1.5]), [before])
    assert line == "SLOWER: encode costs 1.40 times what it did in abc (1.18 to 1.50)"
    (line,) = slower(result([1.0, 1.4, 1.5]), [before])
    assert "the interval includes no change" in line


def test_a_machine_that_is_slower_as_a_whole_is_no_fault_of_ours() -> None:
    before = result([1.0, 1.0, 1.0], peer=[2.0, 2.0, 2.0])
    assert slower(result([3.0, 3.0, 3.0], peer=[6.0, 6.0, 6.0]), [before]) == []
    assert len(slower(result([3.0, 3.0, 3.0], peer=[2.0, 2.0, 2.0]), [before])) == 1


def test_another_size_is_not_compared() -> None:
    other = copy.deepcopy(result([1.0]))
    other["contests"][0]["count"] = 99
    assert slower(result([5.0]), [other]) == []


def test_the_table_gives_our_cost_and_each_ratio() -> None:
    shown = result([1.0, 1.0, 1.0], peer=[2.0, 3.0, 4.0]) | {
        "time": "2026-11-27T10:00:00",
        "full": False,
        "rounds": 3,
        "load_before": [0.5, 0, 0],
        "hardware": {"processor": "p", "cores": 2, "flags": ["avx2"], "memory_gb": 8},
    }
    assert "| encode, a passage | peer | 100 | 300 | 2.00, 3.00, 4.00 |" in table(shown)
