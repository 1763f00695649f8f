"""Which index to build: predicted memory, build time, latency and recall of each type, and the
first that fits.

Formulas in closed form over rows N, dimensions D, lists L, subquantizers M, neighbours G; the rates
are of one CPU core, measured by ``benchmarks/index_planner.py`` (docs/design/indexes.md has the
table).  A plan is a function of what was asked alone, not of the machine that plans, so that every
machine builds the same index.  Recall here is a guess to order the attempts by: what is built is
measured (:mod:`invar_ray.index.build`), and refused below the target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from invar_ray.errors import ResourceError

Kind = Literal["Flat", "IVF-Flat", "IVF-SQ8", "HNSW", "IVF-PQ"]
AUTO = "auto"
DEFAULT_RECALL, DEFAULT_LATENCY_MS = 0.95, 50.0

_ID = 8
"""Bytes of a row number in an inverted list."""
_LIST_OVERHEAD = 180
"""Bytes of an empty inverted list: two vectors' headers and what malloc rounds up."""
_CENTROIDS = 256
"""Entries of a PQ codebook (8 bits)."""
CODEBOOK_ROWS = 16_384
"""Training rows of a codebook: 64 an entry.  FAISS's own 65,536 cost four times as much."""
OPQ_ROWS = 8192
"""Training rows of OPQ's rotation."""
OPQ_ROUNDS = (8, 10, 2)
"""Rounds of OPQ, rounds of k-means in the first of them, and in each later one (FAISS's own: 50,
40, 4).
"""
_NEIGHBOURS = 32
"""G of the graph; its lowest layer keeps 2 G."""
POINTS_PER_LIST = 64
"""Training rows per list; FAISS warns below 39 and drops those above 256."""
MOST_ALONE_S = 7200.0
"""Longest build by one process, in seconds: what cannot be built in parts, a graph, is out above
it, for it would keep a nightly job to the day."""
_FLAT_QUANTIZER = 65_536
"""Most lists whose centroids are compared one by one; above, a graph finds them."""


@dataclass(frozen=True)
class Rates:
    """What one core does, in units per second; measured on 2026-11-25 on a Xeon with AVX-512 (2
    virtual cores).
    """

    multiply_adds: float = 1.5e10
    """Of big matrix products (k-means, assignment)."""
    codebook_seconds: float = 3.0e-9
    """Seconds to compare a part of a row with one entry of its codebook: far from what a core could
    do.
    """
    scanned_bytes: float = 1.0e10
    """Of float rows compared with one query."""
    scanned_sq_bytes: float = 5.0e9
    """Of 8-bit scalar codes."""
    scanned_pq_bytes: float = 1.2e9
    """Of PQ codes (table look-ups)."""
    graph_bytes: float = 5.0e9
    """Of rows that a walk through a graph meets in no order."""


RATES = Rates()
_EXPECTED: dict[str, float] = {"IVF-Flat": 0.98, "IVF-SQ8": 0.97, "IVF-PQ": 0.0}
_EXPECTED_PQ = {4: 0.68, 8: 0.49, 16: 0.35}
"""Recall@10 by dimensions per code byte, all lists visited."""


@dataclass(frozen=True)
class Need:
    """What the index must do.

    Attributes:
        rows: N. dimension: D.
        recall_target: least recall@10 against exact search.
        max_memory_bytes: most memory of the loaded index; ``None``: no limit.
        max_latency_ms: longest search of one query by one thread.
    """

    rows: int
    dimension: int
    recall_target: float = DEFAULT_RECALL
    max_memory_bytes: int | None = None
    max_latency_ms: float = DEFAULT_LATENCY_MS


@dataclass(frozen=True)
class Candidate:
    """One way to do it, with what is predicted.

    Attributes:
        factory: FAISS's string.
        depths: search depths to try, from the quickest on; empty for an exact index.
        training_rows: size of the training sample.
        bytes_per_vector: of codes, row numbers and links.
        fixed_bytes: what does not grow with N: centroids, codebooks, list headers.
        memory_bytes: of the loaded index; its file has about the same size.
        build_seconds: CPU time of one core: training, assignment, encoding.
        latency_ms: of one query at the depth that is expected to do.
        recall: a guess, from the table in docs/design/indexes.md.
        merges: parts can be built apart and merged.
    """

    kind: Kind
    factory: str
    depths: tuple[int, ...]
    training_rows: int
    bytes_per_vector: float
    fixed_bytes: int
    memory_bytes: int
    build_seconds: float
    latency_ms: float
    recall: float
    merges: bool


@dataclass(frozen=True)
class Choice:
    """A plan: what to try, in order, and why the rest is out."""

    need: Need
    tries: tuple[Candidate, ...]
    rejected: tuple[tuple[Candidate, str], ...]


def plan_index(need: Need, *, strict: bool = True) -> Choice:
    """Order the types by what they lose: exact, IVF on floats, IVF on 8-bit scalars, a graph,
    product codes.

    The graph comes late although it is the quickest to search: it can neither be built in parts nor
    shrink.

    Args:
        need: what it must do.
        strict: ``False``: nobody asked for the latency, so where no type has it, those that miss
            nothing else are taken, the quickest first, at any depth.

    Raises:
        ResourceError: if no type can meet the limits; says by how much each misses.
    """
    choice = _choice(need)
    if not choice.tries and not strict:
        slower = _choice(replace(need, max_latency_ms=math.inf))
        by_latency = sorted(slower.tries, key=lambda candidate: candidate.latency_ms)
        choice = Choice(need, tuple(by_latency), slower.rejected)
    if not choice.tries:
        raise ResourceError(
            f"no index type fits:\n{render(choice)}\n",
            action="raise index.max_memory_mb or index.max_latency_ms, lower index.recall_target, "
            "or let jobs.reindex cut the corpus into shards (index.shards)",
        )
    return choice


def _choice(need: Need) -> Choice:
    tries, rejected = [], []
    for candidate in candidates(need):
        reason = _reason(candidate, need)
        if reason:
            rejected.append((candidate, reason))
        else:
            tries.append(candidate)
    return Choice(need, tuple(tries), tuple(rejected))


def named(factory: str, need: Need) -> Candidate:
    """What is predicted of an explicit factory: as of the planner's own of its type."""
    parts = (("PQ", "IVF-PQ"), ("SQ8", "IVF-SQ8"), ("HNSW", "HNSW"), ("IVF", "IVF-Flat"))
    kind = next((kind for part, kind in parts if part in factory), "Flat")
    found = candidates(need)
    return next((one for one in found if one.kind == kind), found[0])


def candidates(need: Need) -> list[Candidate]:
    """Every type for these rows and dimensions, in the order of preference; IVF only where its
    lists can be trained.
    """
    found = [_flat(need)]
    if number_of_lists(need.rows) > 1:
        found += [_ivf(need, "IVF-Flat"), _ivf(need, "IVF-SQ8")]
    found.append(_hnsw(need))
    if number_of_lists(need.rows) > 1 and need.rows >= 39 * _CENTROIDS:
        parts = [
            part for part in (4, 8, 16) if need.dimension % part == 0 and need.dimension > part
        ]
        found += [_ivf(need, "IVF-PQ", need.dimension // part) for part in parts]
    return found


def number_of_lists(rows: int) -> int:
    """The power of 2 nearest to 4 sqrt(N) that leaves 39 rows a list; 1 where IVF makes no
    sense.
    """
    most = rows // 39
    return (
        min(1 << round(math.log2(4.0 * math.sqrt(rows))), 1 << most.bit_length() - 1)
        if most >= 4
        else 1
    )


def expected_depth(lists: int) -> int:
    """Lists to visit for recall@10 of about 0.95: 2 L^0.4, from 18 of 256 and 32 of 1,024 that were
    measured.
    """
    return max(1, round(2.0 * lists**0.4))


def memory_of(
    kind: Kind, rows: int, dimension: int, *, lists: int = 1, code: int = 0
) -> tuple[float, int]:
    """Bytes per vector, and fixed bytes, of a loaded index.

    =========  =======================  ==========================================================
    type       per vector               fixed
    =========  =======================  ==========================================================
    Flat       4 D
    IVF-Flat   4 D + 8                  L (4 D + 180)
    IVF-SQ8    D + 8                    L (4 D + 180) + 8 D
    IVF-PQ     M + 8                    L (4 D + 180) + 4 * 256 D (codebooks) + 4 D^2 (rotation)
    HNSW       4 D + 8 G + 4 G / (G-1)  (with 8 + 4 bytes a vector for offset and level)
    =========  =======================  ==========================================================

    A quantizer that is a graph (more than 65,536 lists) adds 8 G + 12 bytes a list.
    """
    if kind == "Flat":
        return 4.0 * dimension, 0
    if kind == "HNSW":
        return 4.0 * dimension + 8.0 * _NEIGHBOURS + 4.0 * _NEIGHBOURS / (_NEIGHBOURS - 1) + 12.0, 0
    fixed = lists * (4 * dimension + _LIST_OVERHEAD)
    if lists > _FLAT_QUANTIZER:
        fixed += lists * (8 * _NEIGHBOURS + 12)
    if kind == "IVF-Flat":
        return 4.0 * dimension + _ID, fixed
    if kind == "IVF-SQ8":
        return float(dimension + _ID), fixed + 8 * dimension
    return float(code + _ID), fixed + 4 * _CENTROIDS * dimension + 4 * dimension * dimension


def render(choice: Choice) -> str:
    """A table of all types: what is predicted, what is tried first, why others are out."""
    need = choice.need
    limit = "no limit" if need.max_memory_bytes is None else _size(need.max_memory_bytes)
    lines = [
        f"index plan: {need.rows:,} vectors of {need.dimension} dimensions; memory {limit}, a "
        "query within "
        f"{need.max_latency_ms:g} ms on one core, recall@10 of {need.recall_target:g} or more",
        f"  {'type':<9} {'factory':<34} {'memory':>9} {'B/vector':>9} {'build':>9} {'ms/query':>9} "
        f"{'recall':>7}",
    ]
    notes = [
        (candidate, "first" if number == 0 else "then")
        for number, candidate in enumerate(choice.tries)
    ]
    for candidate, note in [
        *notes,
        *((candidate, f"out: {reason}") for candidate, reason in choice.rejected),
    ]:
        lines.append(
            f"  {candidate.kind:<9} {candidate.factory:<34} {_size(candidate.memory_bytes):>9} "
            f"{candidate.bytes_per_vector:>9.1f} {_time(candidate.build_seconds):>9} "
            f"{candidate.latency_ms:>9.2f} "
            f"{candidate.recall:>7.2f}  {note}"
        )
    return "\n".join(lines)


def _reason(candidate: Candidate, need: Need) -> str:
    reasons = []
    if need.max_memory_bytes is not None and candidate.memory_bytes > need.max_memory_bytes:
        reasons.append(f"needs {_size(candidate.memory_bytes)}")
    if candidate.latency_ms > need.max_latency_ms:
        reasons.append(f"takes {candidate.latency_ms:.3g} ms")
    if not candidate.merges and candidate.build_seconds > MOST_ALONE_S:
        reasons.append(f"takes {_time(candidate.build_seconds)} to build, by one process")
    if candidate.recall < need.recall_target:
        reasons.append(f"recall@10 of about {candidate.recall:.2f}")
    return " and ".join(reasons)


def _flat(need: Need) -> Candidate:
    each, fixed = memory_of("Flat", need.rows, need.dimension)
    total = each * need.rows
    seconds, latency = total / 1e9, 1e3 * total / RATES.scanned_bytes  # building is a copy
    return Candidate("Flat", "Flat", (), 0, each, fixed, int(total), seconds, latency, 1.0, True)


def _hnsw(need: Need) -> Candidate:
    each, fixed = memory_of("HNSW", need.rows, need.dimension)
    # A walk that keeps e candidates compares some e G / 2 rows, slowly more in a larger graph;
    # building walks once a row with e = 40 and then links.
    grown = 1.0 + math.log2(max(1.0, need.rows / 100_000)) / 10
    kept = grown * 4 * need.dimension * _NEIGHBOURS / 2 / RATES.graph_bytes
    seconds = 1.5 * need.rows * 40 * kept
    latency = {depth: 1e3 * depth * kept for depth in (16, 32, 64, 128, 256, 512)}
    depths = tuple(depth for depth, long in latency.items() if long <= need.max_latency_ms)
    total = int(each * need.rows)
    factory = f"HNSW{_NEIGHBOURS},Flat"
    return Candidate(
        "HNSW", factory, depths, 0, each, fixed, total, seconds, latency[64], 0.97, False
    )


def _ivf(need: Need, kind: Kind, code: int = 0) -> Candidate:
    rows, dimension, lists = need.rows, need.dimension, number_of_lists(need.rows)
    each, fixed = memory_of(kind, rows, dimension, lists=lists, code=code)
    sample = min(rows, max(POINTS_PER_LIST * lists, POINTS_PER_LIST * _CENTROIDS if code else 0))
    graph = lists > _FLAT_QUANTIZER
    quantizer = f"IVF{lists}_HNSW{_NEIGHBOURS}" if graph else f"IVF{lists}"
    compared = 64 * _NEIGHBOURS // 2 if graph else lists
    # 10 rounds of k-means on the sample; then each row is compared with the centroids.
    seconds = (10.0 * sample * lists + float(rows) * compared) * dimension / RATES.multiply_adds
    recall, factory = _EXPECTED[kind], f"{quantizer},{'SQ8' if kind == 'IVF-SQ8' else 'Flat'}"
    if kind == "IVF-PQ":
        rounds, first, later = OPQ_ROUNDS
        turned = (first + (rounds - 1) * later) * min(sample, OPQ_ROWS)
        trained = 25 * min(sample, CODEBOOK_ROWS)
        # Each row meets the 256 entries of each codebook, in rounds of training and once more when
        # it is encoded.
        seconds += (turned + trained + rows) * code * _CENTROIDS * RATES.codebook_seconds
        seconds += (rounds * 20.0 * dimension + rows) * dimension**2 / RATES.multiply_adds
        recall, factory = _EXPECTED_PQ[dimension // code], f"OPQ{code},{quantizer},PQ{code}x8np"

    def latency(depth: int) -> float:
        # The lists near a query are longer than the mean: dense regions have both more queries and
        # more rows.
        visited = min(1.0, 2.0 * depth / lists) * rows
        scan = {
            "IVF-Flat": 4 * dimension / RATES.scanned_bytes,
            "IVF-SQ8": dimension / RATES.scanned_sq_bytes,
            "IVF-PQ": code / RATES.scanned_pq_bytes,
        }[kind]
        tables = code * _CENTROIDS * RATES.codebook_seconds if code else 0.0
        return 1e3 * (compared * dimension * 4 / RATES.scanned_bytes + visited * scan + tables)

    depths = [1 << power for power in range(2, lists.bit_length())]
    allowed = tuple(depth for depth in depths if latency(depth) <= need.max_latency_ms)
    expected = latency(expected_depth(lists))
    total = int(each * rows + fixed)
    return Candidate(
        kind, factory, allowed, sample, each, fixed, total, seconds, expected, recall, True
    )


def _size(number: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"


def _time(seconds: float) -> str:
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"
