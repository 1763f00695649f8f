"""A question in other words: where its rewrites come from.

================  ==================================================================================
RuleRewriter      templates, clause order, requests, search-engine style, typos, speech, case
                  (questions/rules.py)
GivenRewriter     the wordings that came with the data, filled up from another rewriter
FileRewriter      the wordings of a file, nothing else
EndpointRewriter  asks an OpenAI-compatible server, fills up from the rules (questions/endpoint.py)
================  ==================================================================================
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from invar_ray.corpus.readers import read_rows
from invar_ray.errors import ConfigError
from invar_ray.questions.endpoint import EndpointRewriter
from invar_ray.questions.rules import RuleRewriter, comparison_key
from invar_ray.schema import Example, Rewrite

__all__ = [
    "EndpointRewriter",
    "FileRewriter",
    "GivenRewriter",
    "Rewriter",
    "RuleRewriter",
    "comparison_key",
    "make_rewriter",
]


class Rewriter(Protocol):
    """What makes rewrites."""

    def rewrite(self, example: Example, count: int, seed: int) -> list[Rewrite]:
        """At most ``count`` rewrites, numbered from 1 without gaps, none equal to the question or
        to another one.
        """
        ...


class GivenRewriter:
    """The wordings that came with the data (``example.rewrites``, in order), filled up by rule.

    Args:
        fallback: fills up what the data lacks; ``None`` leaves it at fewer.
    """

    def __init__(self, fallback: RuleRewriter | None = None) -> None:
        self.fallback = fallback

    def rewrite(self, example: Example, count: int, seed: int) -> list[Rewrite]:
        """See :class:`Rewriter`."""
        given = _numbered(example, [(text, "given") for text in example.rewrites], count, "data")
        return given if self.fallback is None else self.fallback.fill(example, given, count, seed)


class FileRewriter:
    """The wordings of a JSON lines file of ``{question_id, text, kind?}``, in file order.

    A question with fewer of them gets fewer (no rule fills up: a file of human rewrites is
    measured as it is).  The file is read once, at the first use.

    Args:
        uri: local path, ``file://``, ``s3://`` or ``gs://``; ``.gz`` is fine.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._rows: dict[str, list[tuple[str, str]]] | None = None

    def rewrite(self, example: Example, count: int, seed: int) -> list[Rewrite]:
        """See :class:`Rewriter`; ``seed`` has no effect.

        Raises:
            DataError: the file is missing, empty or malformed.
        """
        if self._rows is None:
            rows: dict[str, list[tuple[str, str]]] = {}
            for _, row in read_rows(self.uri, {"question_id": True, "text": True, "kind": False}):
                rows.setdefault(row["question_id"], []).append(
                    (row["text"], row.get("kind", "file"))
                )
            self._rows = rows
        return _numbered(example, self._rows.get(example.id, []), count, f"file:{self.uri}")


def make_rewriter(
    *,
    provider: str = "rules",
    uri: str | None = None,
    endpoint_model: str | None = None,
    cache_path: str | Path | None = None,
) -> Rewriter:
    """The rewriter that a config names; the arguments are those of ``RewritesConfig``.

    Args:
        provider: ``rules``, ``given``, ``file`` or ``endpoint``.
        uri: for ``file`` the file's, for ``endpoint`` the server's.
        endpoint_model: for ``endpoint``; the key is in the environment variable
            ``OPENAI_API_KEY``.
        cache_path: for ``endpoint``: local JSON lines file that keeps the answers; ``None`` keeps
            none.

    Raises:
        ConfigError: an unknown provider, or one that lacks what it needs.
    """
    if provider == "rules":
        return RuleRewriter()
    if provider == "given":
        return GivenRewriter(RuleRewriter())
    if provider == "file":
        if not uri:
            raise ConfigError("provider 'file' without a file", action="set rewrites.uri")
        return FileRewriter(uri)
    if provider == "endpoint":
        if not uri or not endpoint_model:
            raise ConfigError(
                "provider 'endpoint' without a server",
                action="set rewrites.uri and rewrites.endpoint_model",
            )
        return EndpointRewriter(uri, endpoint_model, cache_path=cache_path)
    raise ConfigError(f"no rewriter {provider!r}", expected="rules, given, file or endpoint")


def _numbered(
    example: Example, texts: list[tuple[str, str]], count: int, provider: str
) -> list[Rewrite]:
    """The first ``count`` texts that differ from the question and each other; case and punctuation
    count, since someone wrote them.
    """
    taken = {" ".join(example.question.split())}
    rewrites: list[Rewrite] = []
    for text, kind in texts:
        clean = " ".join(text.split())
        if len(rewrites) < count and clean and clean not in taken:
            taken.add(clean)
            rewrites.append(Rewrite(example.id, len(rewrites) + 1, clean, kind, provider))
    return rewrites
