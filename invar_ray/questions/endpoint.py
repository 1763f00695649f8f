"""Rewrites from a language model behind an OpenAI-compatible ``/chat/completions``."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from invar_ray.questions.llm import ChatEndpoint
from invar_ray.questions.rules import RuleRewriter, comparison_key
from invar_ray.schema import Example, Rewrite
from invar_ray.text.answers import contains_answer

_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# "what" and "which" ask for anything, unless a noun says for what.
_ASKS = re.compile(
    r"\b(?:(?P<person>who|whom|whose|(?:what|which) (?:person|man|woman))"
    r"|(?P<time>when|(?:what|which) (?:year|date|day|month|century|time))"
    r"|(?P<place>where|(?:what|which) (?:place|city|town|country|location))"
    r"|(?P<number>how (?:many|much|old|tall|long|far|big|large|deep|high|often))"
    r"|(?P<reason>why))\b",
    re.IGNORECASE,
)
_LIST_MARK = re.compile(r"^\s*(?:[-*•]|\(?\d{1,2}[.):])\s+")
_PROMPT = (
    "Rewrite the question below in {count} different ways. Each rewording must ask for the same "
    "answer, keep every name"
    " and number, and not contain the answer. Reply with a JSON array of {count} strings and "
    "nothing else.\n\n"
    "Question: {question}"
)


class EndpointRewriter(ChatEndpoint):
    """Asks a server for rewrites, checks them, and fills up from the rules what the server's
    lack.

    A rewrite is dropped if it equals the question or another one (case and punctuation ignored),
    lacks a number of the question, brings in an answer, asks for another type of answer (who for
    when), or is more than four times as long.  With a cache, the same arguments give the
    same rewrites.  The arguments are those of :class:`ChatEndpoint`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._fallback = RuleRewriter()

    def rewrite(self, example: Example, count: int, seed: int) -> list[Rewrite]:
        """See :class:`invar_ray.questions.rewrites.Rewriter`.

        Raises:
            ConfigError: the server refuses the request: address, model or key are wrong.
            ResourceError: the server cannot be reached or keeps failing.
            DataError: the server keeps answering in a form that is not the protocol's.
        """
        if count < 1:
            return []
        prompt = _PROMPT.format(count=count, question=example.question)
        texts = _checked(example, _parse_list(self.reply(prompt, seed)))[:count]
        provider = f"endpoint:{self.model}"
        given = [
            Rewrite(example.id, number, text, "paraphrase", provider)
            for number, text in enumerate(texts, start=1)
        ]
        return self._fallback.fill(example, given, count, seed)


def _parse_list(reply: str) -> list[str]:
    """The strings of a reply: a JSON array (also inside prose or a code block), else its lines
    without list marks.
    """
    start, stop = reply.find("["), reply.rfind("]")
    if 0 <= start < stop:
        try:
            items = json.loads(reply[start : stop + 1])
        except json.JSONDecodeError:
            items = None
        if isinstance(items, list):
            return [item for item in items if isinstance(item, str)]
    lines = [_LIST_MARK.sub("", line).strip().strip('"') for line in reply.splitlines()]
    return [
        line for line in lines if line and not line.startswith("```") and not line.endswith(":")
    ]


def answer_type(question: str) -> str | None:
    """What kind of thing a question asks for, by its first question word; ``None`` where that does
    not say.
    """
    found = _ASKS.search(question)
    if found is None:
        return None
    return next(name for name, text in found.groupdict().items() if text)


def _checked(example: Example, texts: list[str]) -> list[str]:
    question = example.question
    numbers = Counter(_NUMBER.findall(question))
    taken = {comparison_key(question), ""}
    kept: list[str] = []
    for text in texts:
        clean = " ".join(text.split())
        key = comparison_key(clean)
        loses_numbers = numbers - Counter(_NUMBER.findall(clean))
        gives_away = contains_answer(clean, example.answers) and not contains_answer(
            question, example.answers
        )
        types = {answer_type(question), answer_type(clean)} - {None}
        if (
            key in taken
            or loses_numbers
            or gives_away
            or len(types) > 1
            or len(clean) > 4 * len(question) + 40
        ):
            continue
        taken.add(key)
        kept.append(clean)
    return kept
