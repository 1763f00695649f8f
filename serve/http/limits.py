"""What requests may ask for."""

from __future__ import annotations

import re
import uuid

from pydantic import BaseModel, ConfigDict, Field

from invar_ray.errors import RequestError

SERVICE = "invar-ray"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,64}")


class Limits(BaseModel):
    """What a request may ask for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top_k: int = Field(
        5, ge=1, description="Passages per answer unless the request says otherwise."
    )
    max_top_k: int = Field(20, ge=1, description="Most passages that a request may ask for.")
    max_question_chars: int = Field(2000, ge=1, description="Longest question in characters.")
    max_new_tokens: int = Field(
        32, ge=1, description="Longest answer in tokens; a request may ask for less."
    )
    max_body_bytes: int = Field(65536, ge=256, description="Longest request body in bytes.")
    max_inputs: int = Field(
        2048, ge=1, description="Most texts that one request may have embedded."
    )
    max_documents: int = Field(
        256, ge=1, description="Most documents that one request may have reranked."
    )
    max_rewrites: int = Field(
        5, ge=1, description="Most rewordings that one stability request may ask for."
    )
    timeout_s: float = Field(60.0, gt=0, description="Longest that a request may take, in seconds.")

    def most_bytes(self, path: str) -> int:
        """Longest body of a request to ``path``; some may hold many texts."""
        if path == "/v1/embeddings":
            return max(self.max_body_bytes, 4096 * self.max_inputs)
        if path == "/v1/rerank":
            return max(self.max_body_bytes, 4096 * self.max_documents)
        return self.max_body_bytes

    def check_question(self, question: str) -> str:
        """The question without outer whitespace.

        Raises:
            RequestError: if nothing is left of it or it is too long.
        """
        text = question.strip()
        if not text:
            raise RequestError("the question is empty", expected="some words")
        if len(text) > self.max_question_chars:
            raise RequestError(
                f"the question has {len(text)} characters",
                expected=f"at most {self.max_question_chars}",
            )
        return text

    def check_top_k(self, top_k: int | None) -> int:
        """How many passages to take.

        Raises:
            RequestError: if it is out of range.
        """
        return self._within("top_k", top_k, self.top_k, self.max_top_k)

    def check_max_new_tokens(self, max_new_tokens: int | None, name: str = "max_new_tokens") -> int:
        """How long the answer may be, in tokens; ``name`` is what the request calls it.

        Raises:
            RequestError: if it is out of range.
        """
        return self._within(name, max_new_tokens, self.max_new_tokens, self.max_new_tokens)

    def check_rewrites(self, rewrites: int | None) -> int:
        """How many rewordings to try.

        Raises:
            RequestError: if it is out of range.
        """
        return self._within("rewrites", rewrites, min(3, self.max_rewrites), self.max_rewrites)

    def check_inputs(self, texts: list[str]) -> list[str]:
        """Texts to embed.

        Raises:
            RequestError: if there are none or too many, or one is blank or too long.
        """
        return self._texts("input", texts, self.max_inputs)

    def check_documents(self, texts: list[str]) -> list[str]:
        """Texts to rerank; errors as :meth:`check_inputs`."""
        return self._texts("documents", texts, self.max_documents)

    def _texts(self, name: str, texts: list[str], most: int) -> list[str]:
        if not 1 <= len(texts) <= most:
            raise RequestError(f"{name} holds {len(texts)} texts", expected=f"1 to {most}")
        for number, text in enumerate(texts):
            if not text.strip():
                raise RequestError(f"{name} {number} is empty", expected="some words")
            if len(text) > 4 * self.max_question_chars:
                raise RequestError(
                    f"{name} {number} has {len(text)} characters",
                    expected=f"at most {4 * self.max_question_chars}",
                )
        return texts

    def check_timeout(self, given: str | None) -> float:
        """Seconds that a request may take: what its ``X-Request-Timeout`` header says, within the
        service's limit.

        Raises:
            RequestError: if the header is no positive number.
        """
        if given is None:
            return self.timeout_s
        try:
            seconds = float(given)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < float("inf"):
            raise RequestError("X-Request-Timeout is no usable number", expected="seconds above 0")
        return min(seconds, self.timeout_s)

    @staticmethod
    def _within(name: str, given: int | None, default: int, most: int) -> int:
        if given is None:
            return default
        if not 1 <= given <= most:
            raise RequestError(f"{name} is {given}", expected=f"a number from 1 to {most}")
        return given


def request_id(given: str | None) -> str:
    """The caller's id of a request if it is fit for logs and headers, else a new one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
