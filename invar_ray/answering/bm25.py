"""BM25 over passages.  The only file that imports bm25s.

Words (``text/words.py``) are folded, neither stemmed nor stopped (the inverse document frequency
does most of what a stop list would).  An index artifact holds it in the folder ``bm25/``, row i
being passage i, and it is searched from there without being read into memory.  To make it takes
21 s and 0.6 GB for 126,000 passages of 100 words; above :data:`MOST_PASSAGES` none is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import bm25s
import numpy as np
import numpy.typing as npt

from invar_ray.errors import DataError, RequestError
from invar_ray.schema import Hit, Passage
from invar_ray.text.words import terms

FOLDER = "bm25"
"""Where it lies in an index artifact."""
MOST_PASSAGES = 2_000_000
"""An index of more is searched by its vectors alone: to make BM25 of them takes over 10 GB."""
_K1, _B = 0.9, 0.4


def build_bytes(passages: int, text_bytes: float) -> float:
    """Memory in bytes that making it of so many passages takes, whose texts have so many bytes in
    all (measured: 0.6 GB for 76 MB); 0 where none is made.
    """
    return 10.0 * text_bytes if passages <= MOST_PASSAGES else 0.0


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

    def __init__(self, texts: Sequence[str], *, k1: float = _K1, b: float = _B) -> None:
        same: dict[
            str, str
        ] = {}  # one string for each word: a corpus repeats them millions of times
        tokens = [[same.setdefault(word, word) for word in terms(text)] for text in texts]
        if not same:
            raise DataError(
                f"BM25 got {len(texts)} texts without a word", expected="texts with words"
            )
        self._index: Any = bm25s.BM25(k1=k1, b=b, method="lucene")
        self._index.index(tokens, show_progress=False)

    @classmethod
    def open(cls, folder: Path) -> Bm25:
        """What :meth:`save` wrote; its arrays are mapped, not read."""
        opened = cls.__new__(cls)
        opened._index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        return opened

    def save(self, folder: Path) -> None:
        """Write arrays (npy) and words (JSON) into a new folder."""
        self._index.save(folder, show_progress=False)

    @property
    def size(self) -> int:
        """Number of texts."""
        return int(self._index.scores["num_docs"])

    def search(
        self, queries: Sequence[str], top_k: int, *, allowed: npt.NDArray[np.bool_] | None = None
    ) -> list[list[tuple[int, float]]]:
        """The best rows of each query.

        Args:
            queries: texts.
            top_k: how many rows for each.
            allowed: [size] True for rows that may be found.

        Returns:
            For each query at most ``top_k`` (row, score) pairs, best first, ties by row; only rows
            that share a word with it, so that there may be none.

        Raises:
            RequestError: ``top_k`` is below 1, or ``allowed`` has another length.
        """
        if top_k < 1:
            raise RequestError(f"top_k is {top_k}", expected="1 or more")
        if allowed is not None and allowed.shape != (self.size,):
            raise RequestError(
                f"the filter has shape {allowed.shape}", expected=f"({self.size},), one per row"
            )
        found: list[list[tuple[int, float]]] = []
        for query in queries:
            tokens = [word for word in terms(query) if word in self._index.vocab_dict]
            if not tokens:
                found.append([])
                continue
            scores = np.asarray(self._index.get_scores(tokens))
            rows = np.flatnonzero(scores > 0.0 if allowed is None else (scores > 0.0) & allowed)
            if len(rows) > top_k:  # sort what can be among the first, ties with the last included
                least = np.partition(scores[rows], -top_k)[-top_k]
                rows = rows[scores[rows] >= least]
            best = rows[np.lexsort((rows, -scores[rows]))][:top_k]
            found.append([(int(row), float(scores[row])) for row in best])
        return found


class Bm25Retriever:
    """BM25 behind the interface of :class:`invar_ray.answering.retriever.Retriever`; title and text
    are searched.
    """

    def __init__(self, passages: PassageTable, *, k1: float = _K1, b: float = _B) -> None:
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
