"""BM25 over passages.  The only file that imports bm25s.

Words (``text/words.py``) are folded, neither stemmed nor stopped (the inverse document frequency
does most of what a stop list would).  An index is made in memory and is not an artifact:
126,000 passages of 100 words take 21 s and 0.6 GB.  For tens of millions of passages leave its rows
out of ``evaluation.systems``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import bm25s
import numpy as np

from invar_ray.errors import DataError, RequestError
from invar_ray.schema import Hit, Passage
from invar_ray.text.words import terms


class PassageTable(Protocol):
    """What :class:`Bm25Retriever` needs of passages;
    :class:`invar_ray.answering.retriever.Passages` is one.
    """

    def __len__(self) -> int:
        """How many there are."""
        ...

    def rows(self, rows: Sequence[int]) -> list[Passage]:
        """The passages in these rows."""
        ...


class Bm25:
    """BM25 scores of texts (Lucene's rewrite).

    Args:
        texts: row i is text i.
        k1: how soon repeats of a word stop counting.
        b: how much long texts are held back, in [0, 1].

    Raises:
        DataError: no text has any word.

    Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009;
    the defaults are Anserini's for passages.
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 0.9, b: float = 0.4) -> None:
        same: dict[
            str, str
        ] = {}  # one string for each word: a corpus repeats them millions of times
        tokens = [[same.setdefault(word, word) for word in terms(text)] for text in texts]
        if not same:
            raise DataError(
                f"BM25 got {len(texts)} texts without a word", expected="texts with words"
            )
        self.size = len(texts)
        self._known = frozenset(same)
        self._index: Any = bm25s.BM25(k1=k1, b=b, method="lucene")
        self._index.index(tokens, show_progress=False)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[tuple[int, float]]]:
        """The best rows of each query.

        Returns:
            For each query at most ``top_k`` (row, score) pairs, best first, ties by row; only rows
            that share a word with it, so that there may be none.

        Raises:
            RequestError: ``top_k`` is below 1.
        """
        if top_k < 1:
            raise RequestError(f"top_k is {top_k}", expected="1 or more")
        found: list[list[tuple[int, float]]] = []
        for query in queries:
            tokens = [word for word in terms(query) if word in self._known]
            if not tokens:
                found.append([])
                continue
            scores = np.asarray(self._index.get_scores(tokens))
            rows = np.flatnonzero(scores > 0.0)
            best = rows[np.lexsort((rows, -scores[rows]))][:top_k]
            found.append([(int(row), float(scores[row])) for row in best])
        return found


class Bm25Retriever:
    """BM25 behind the interface of :class:`invar_ray.answering.retriever.Retriever`; title and text
    are searched.
    """

    def __init__(self, passages: PassageTable, *, k1: float = 0.9, b: float = 0.4) -> None:
        self.passages = passages
        everything = passages.rows(range(len(passages)))
        self.bm25 = Bm25([f"{passage.title} {passage.text}" for passage in everything], k1=k1, b=b)

    def retrieve(self, questions: Sequence[str], top_k: int) -> list[list[Hit]]:
        """The best passages for each question, best first; a hit's ``score`` is BM25's."""
        results = []
        for found in self.bm25.search(questions, top_k):
            passages = self.passages.rows([row for row, _ in found])
            results.append(
                [
                    Hit(p.id, p.document_id, rank, score, p.title, p.text, p.uri, p.place)
                    for rank, ((_, score), p) in enumerate(
                        zip(found, passages, strict=True), start=1
                    )
                ]
            )
        return results
