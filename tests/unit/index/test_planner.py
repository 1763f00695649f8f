"""The planner's arithmetic by hand, its choices, and its predicted memory against what FAISS
takes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from invar_ray.errors import ResourceError
from invar_ray.index.blocks import of_matrix
from invar_ray.index.build import fill
from invar_ray.index.faiss_index import save_index
from invar_ray.index.planner import (
    Need,
    candidates,
    expected_depth,
    memory_of,
    number_of_lists,
    plan_index,
    render,
)


def test_memory_by_hand() -> None:
    # 1,000 vectors of 8 dimensions.
    assert memory_of("Flat", 1000, 8) == (32.0, 0)
    # 4 lists: 4 centroids of 32 bytes and 4 headers of 180; 32 + 8 bytes a vector.
    assert memory_of("IVF-Flat", 1000, 8, lists=4) == (40.0, 4 * (32 + 180))
    # 8 + 8 bytes a vector; two floats a dimension for the scale of the scalars.
    assert memory_of("IVF-SQ8", 1000, 8, lists=4) == (16.0, 848 + 64)
    # 2 + 8 bytes a vector; codebooks 256 x 8 floats; rotation 8 x 8 floats.
    assert memory_of("IVF-PQ", 1000, 8, lists=4, code=2) == (10.0, 848 + 8192 + 256)
    # 32 bytes, 64 + 32/31 links of 4 bytes, 12 for offset and level.
    each, fixed = memory_of("HNSW", 1000, 8)
    assert (each, fixed) == (pytest.approx(32 + 256 + 128 / 31 + 12), 0)


def test_lists_that_are_searched_through_a_graph_cost_more() -> None:
    few, many = (memory_of("IVF-Flat", 1, 8, lists=lists)[1] / lists for lists in (65_536, 131_072))
    assert many - few == 8 * 32 + 12


@pytest.mark.parametrize(
    "rows, lists",
    # 4 sqrt(N): 1264.9, 4,000, 18,337, 126,491; 39 rows a list: 2,000 / 39 = 51.3, 12,000 / 39 =
    # 307; 100 / 39 < 4.
    [
        (100_000, 1024),
        (10**6, 4096),
        (21_015_324, 16_384),
        (10**9, 131_072),
        (12_000, 256),
        (2_000, 32),
        (100, 1),
    ],
)
def test_number_of_lists(rows: int, lists: int) -> None:
    assert number_of_lists(rows) == lists


def test_depth_that_is_expected() -> None:
    # 2 * 256^0.4 = 2 * 2^3.2 = 18.4; 2 * 1024^0.4 = 2 * 2^4 = 32.
    assert [number_of_lists(0), expected_depth(256), expected_depth(1024)] == [1, 18, 32]


def test_small_corpus_is_searched_exactly() -> None:
    choice = plan_index(Need(10_000, 384))
    assert choice.tries[0].kind == "Flat"
    assert choice.tries[0].memory_bytes == 10_000 * 384 * 4
    assert [each.kind for each in choice.tries] == ["Flat", "IVF-Flat", "IVF-SQ8", "HNSW"]
    assert {each.kind for each, _ in choice.rejected} == {"IVF-PQ"}


def test_latency_rules_exact_search_out() -> None:
    choice = plan_index(Need(21_000_000, 768))
    assert choice.tries[0].kind == "IVF-SQ8"
    reasons = {candidate.kind: reason for candidate, reason in choice.rejected}
    assert reasons["Flat"].startswith("takes ")
    fast = plan_index(Need(21_000_000, 768, max_latency_ms=1000.0)).tries[0]
    assert fast.kind == "IVF-Flat"


@pytest.mark.parametrize(
    "memory, target, kind",
    [
        # 1,000,000 x 768: 3.07 GB of floats, 0.78 GB of bytes, about 0.2 GB of codes of 192 bytes.
        (4_000_000_000, 0.95, "IVF-Flat"),
        (1_000_000_000, 0.95, "IVF-SQ8"),
        (300_000_000, 0.6, "IVF-PQ"),
    ],
)
def test_memory_decides(memory: int, target: float, kind: str) -> None:
    choice = plan_index(Need(1_000_000, 768, target, memory))
    assert choice.tries[0].kind == kind
    assert all(each.memory_bytes <= memory for each in choice.tries)


def test_codes_are_as_long_as_memory_allows() -> None:
    sizes = [
        plan_index(Need(1_000_000, 768, 0.1, memory)).tries[0].factory.rpartition("PQ")[2]
        for memory in (250_000_000, 150_000_000, 100_000_000)
    ]
    assert sizes == ["192x8np", "96x8np", "48x8np"]


def test_a_graph_that_takes_a_night_is_not_chosen() -> None:
    need = Need(21_000_000, 4096)  # 32 hours of one process
    with pytest.raises(ResourceError, match=r"takes 32\.5 h to build, by one process"):
        plan_index(need)
    choice = plan_index(need, strict=False)  # the 50 ms are nobody's wish
    assert [each.kind for each in choice.tries] == ["IVF-SQ8", "IVF-Flat", "Flat"]
    assert all(each.merges for each in choice.tries)
    assert choice.tries[0].depths[-1] == number_of_lists(need.rows)
    reasons = {candidate.kind: reason for candidate, reason in choice.rejected}
    assert reasons["HNSW"] == "takes 32.5 h to build, by one process"
    part = plan_index(replace(need, rows=need.rows // 16))
    assert part.tries[0].kind == "IVF-SQ8"


def test_what_cannot_be_done_says_by_how_much() -> None:
    with pytest.raises(ResourceError) as caught:
        plan_index(Need(1_000_000, 768, 0.95, 50_000_000))
    message = str(caught.value)
    assert "no index type fits" in message
    assert "needs 3.1 GB" in message
    assert "raise index.max_memory_mb" in message


def test_table_names_every_type_before_anything_is_built() -> None:
    text = render(plan_index(Need(100_000, 384, max_memory_bytes=60_000_000)))
    assert text.splitlines()[0] == (
        "index plan: 100,000 vectors of 384 dimensions; memory 60.0 MB, a query within 50 ms on "
        "one core, recall@10 of "
        "0.95 or more"
    )
    for name in ("Flat", "IVF1024,Flat", "IVF1024,SQ8", "HNSW32,Flat", "OPQ96,IVF1024,PQ96x8np"):
        assert name in text
    (first,) = [line for line in text.splitlines() if line.endswith("first")]
    assert "IVF1024,SQ8" in first
    assert "392.0" in first
    assert "out: needs 153.6 MB" in text


def test_odd_dimensions_have_the_codes_that_divide_them() -> None:
    assert [c.factory for c in candidates(Need(100_000, 36)) if c.kind == "IVF-PQ"] == [
        "OPQ9,IVF1024,PQ9x8np"
    ]
    assert not [c for c in candidates(Need(100_000, 35)) if c.kind == "IVF-PQ"]
    assert not [c for c in candidates(Need(2_000, 64)) if c.kind == "IVF-PQ"], (
        "too few rows for codebooks"
    )


def test_a_larger_corpus_costs_more() -> None:
    before = None
    for rows in (10**5, 10**6, 10**7, 10**8, 10**9):
        now = {c.kind + str(c.bytes_per_vector): c for c in candidates(Need(rows, 768))}
        if before is not None:
            for name, candidate in now.items():
                assert candidate.memory_bytes > before[name].memory_bytes
                assert candidate.build_seconds > before[name].build_seconds
                assert candidate.latency_ms > before[name].latency_ms
        before = now


def test_predicted_memory_is_the_size_of_the_file(tmp_path: object) -> None:
    """A file holds what memory holds, but for list headers; memory itself:
    benchmarks/index_planner.py.
    """
    matrix = np.random.default_rng(0).normal(size=(10_240, 32)).astype(np.float32)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    for candidate in candidates(Need(len(matrix), 32)):
        place = tmp_path / "index.faiss"  # type: ignore[operator]
        save_index(fill(of_matrix(matrix), candidate.factory, candidate.training_rows), place)
        lists = 0 if candidate.kind in {"Flat", "HNSW"} else number_of_lists(len(matrix)) * 172
        assert math.isclose(place.stat().st_size, candidate.memory_bytes - lists, rel_tol=0.02), (
            candidate.factory
        )
