"""Searching by vectors, by words and by both, one question after the other: FAISS and bm25s bare,
and what this project puts around them (ties in one order, only rows that share a word, fusion).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contest import OURS, Contest, Measured, Side
from benchmarks.groups.texts import mixed_lengths

K, DIMENSION = 10, 384


def contests(full: bool, folder: Path) -> list[Contest]:
    """Vectors, words, both."""
    rows, asked = (126_000, 200) if full else (20_000, 200)
    given = {"rows": rows, "asked": asked}
    found = []
    for name, target in (("vectors", None), ("words", None), ("hybrid", 1 / 1.2)):
        sides = (
            Side(OURS, "search:ours", {"what": name, **given}),
            Side(
                {"vectors": "FAISS bare", "words": "bm25s bare"}.get(name, "both bare"),
                "search:bare",
                {"what": name, **given},
            ),
        )
        found.append(Contest(f"search {name}", "question", asked, sides, target))
    return found


def _world(rows: int, asked: int) -> tuple[Any, list[str], Any, list[str]]:
    """Unit vectors [rows, D] and texts, and as many questions of each kind as are asked."""
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((rows, DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = vectors[draw.integers(0, rows, asked)] + 0.05 * draw.standard_normal(
        (asked, DIMENSION)
    )
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    words = sorted({word for text in mixed_lengths(400) for word in text.split()})
    pick = random.Random(0)
    texts = [" ".join(pick.choices(words, k=60)) for _ in range(rows)]
    return vectors, texts, queries, [" ".join(pick.choices(words, k=8)) for _ in range(asked)]


def ours(what: str, rows: int, asked: int) -> Callable[[], Measured]:
    """Our index and our BM25."""
    from invar_ray.answering.bm25 import Bm25
    from invar_ray.answering.fusion import fuse_hits
    from invar_ray.index.faiss_index import Index, build_faiss
    from invar_ray.schema import Hit

    vectors, texts, queries, questions = _world(rows, asked)
    dense = Index(build_faiss(vectors, "Flat")) if what != "words" else None
    sparse = Bm25(texts) if what != "vectors" else None

    def hits(pairs: list[tuple[int, float]]) -> list[Hit]:
        return [
            Hit(str(row), str(row), rank, score, "", texts[row])
            for rank, (row, score) in enumerate(pairs, start=1)
        ]

    def work() -> Measured:
        first = 0.0
        for number in range(asked):
            lists = []
            if dense is not None:
                scores, found = dense.search(queries[number : number + 1], K)
                lists.append(list(zip(found[0].tolist(), scores[0].tolist(), strict=True)))
            if sparse is not None:
                lists.append(sparse.search([questions[number]], K)[0])
            if what == "hybrid":
                fuse_hits([hits(pairs) for pairs in lists], K)
            first += sum(pairs[0][0] for pairs in lists)
        return Measured(proof=[first])

    return work


def bare(what: str, rows: int, asked: int) -> Callable[[], Measured]:
    """The libraries as their own pages show them; of both, one after the other without fusion."""
    import bm25s
    import faiss

    vectors, texts, queries, questions = _world(rows, asked)
    dense = faiss.IndexFlatIP(DIMENSION)
    dense.add(vectors)
    sparse = bm25s.BM25()
    if what != "vectors":
        sparse.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)

    def work() -> Measured:
        first = 0.0
        for number in range(asked):
            if what != "words":
                first += float(dense.search(queries[number : number + 1], K)[1][0][0])
            if what != "vectors":
                tokens = bm25s.tokenize(questions[number], show_progress=False)
                first += float(sparse.retrieve(tokens, k=K, show_progress=False)[0][0][0])
        return Measured(proof=[first])

    return work
