"""LangChain over a finished run: a retriever and the embeddings of its encoder.

pip install 'invar-ray[cpu,langchain]'

rag = invar_ray.open_rag("runs/demo")
InvarRetriever(rag=rag, k=5).invoke("Who painted Las Meninas?")
"""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.retrievers import BaseRetriever

from invar_ray.api import Rag


class InvarRetriever(BaseRetriever):
    """The passages of a run as LangChain documents, best first.

    Attributes:
        rag: of :func:`invar_ray.open_rag`.
        k: how many passages.
    """

    rag: Any
    k: int = 5

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        return [
            Document(
                id=hit.passage_id,
                page_content=hit.text,
                metadata={
                    "title": hit.title,
                    "document_id": hit.document_id,
                    "source": hit.uri,
                    "place": hit.place,
                    "score": hit.score,
                },
            )
            for hit in self.rag.search(query, self.k)
        ]


class InvarEmbeddings(Embeddings):
    """The encoder of a run: queries and passages get their own prefixes.

    Args:
        rag: of :func:`invar_ray.open_rag`.
    """

    def __init__(self, rag: Rag) -> None:
        self._retriever = rag.retriever

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A unit vector for each text."""
        vectors: list[list[float]] = self._retriever.encode_passages(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """The unit vector of a question."""
        vector: list[float] = self._retriever.encode_queries([text])[0].tolist()
        return vector
