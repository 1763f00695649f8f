"""Training questions from a language model: it reads a part of a document and asks; what it says is
checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from invar_ray.questions.llm import ChatEndpoint
from invar_ray.questions.making import MadeQuestion, is_sound
from invar_ray.questions.rules import comparison_key
from invar_ray.schema import Document, Example
from invar_ray.text.answers import find_answer
from invar_ray.text.sentences import sentence_starts
from invar_ray.text.stable import stable_hash

_PART_CHARS = 1200
_PROMPT = (
    "Write {count} questions that the text below answers. Each must be understood without the text "
    "(name what it is "
    "about, no 'this' or 'the text'), and must have one short answer, copied word for word from "
    "the text. Write each "
    'question in two wordings. Reply with a JSON array of objects {{"question": .., "rewording": .., "answer": ..}}'  # noqa: E501
    " and nothing else.\n\nTitle: {title}\nText: {text}"
)


def ask_for_questions(
    document: Document, endpoint: ChatEndpoint, *, most: int, seed: int
) -> list[MadeQuestion]:
    """At most ``most`` questions about a document, in text order, spread over its parts.

    A question is dropped unless its answer stands in the part that was shown, word for word, and
    not in the question.

    Raises:
        ConfigError, ResourceError, DataError: as :meth:`ChatEndpoint.reply`.
    """
    parts = list(_parts(document.text))
    # An even spread over a long document: a part asked for its share, the first ones for what is
    # left over.
    chosen = (
        parts
        if len(parts) <= most
        else [parts[number * len(parts) // most] for number in range(most)]
    )
    made: list[MadeQuestion] = []
    taken: set[str] = set()
    for number, (start, text) in enumerate(chosen):
        count = most // len(chosen) + (number < most % len(chosen))
        reply = endpoint.reply(_PROMPT.format(count=count, title=document.title, text=text), seed)
        shown = Document(document.id, document.title, text)
        for row in _rows(reply)[:count]:
            question, answer, rewrite = (
                " ".join(row[key].split()) for key in ("question", "answer", "rewording")
            )
            key = comparison_key(question)
            span = find_answer(text, [answer])
            if span is None or key in taken or not is_sound(question, answer, shown):
                continue
            taken.add(key)
            rewrites = (
                (rewrite,)
                if is_sound(rewrite, answer, shown) and comparison_key(rewrite) != key
                else ()
            )
            literal = " ".join(text[span[0] : span[1]].split())
            id = f"{document.id}:{stable_hash('model', question):016x}"
            example = Example(id[:-8], question, (literal,), (document.id,), rewrites)
            made.append(MadeQuestion(example, "model", start + span[0]))
    return made


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """The text in parts of some 1,200 characters, cut at sentences."""
    begin = 0
    for start in [*sentence_starts(text), len(text)]:
        if start - begin >= _PART_CHARS or start == len(text):
            if text[begin:start].strip():
                yield begin, text[begin : min(start, begin + 3 * _PART_CHARS)]
            begin = start


def _rows(reply: str) -> list[dict[str, str]]:
    """The objects of a JSON array, also inside prose or a code block; malformed ones are
    dropped.
    """
    start, stop = reply.find("["), reply.rfind("]")
    try:
        rows: Any = json.loads(reply[start : stop + 1]) if 0 <= start < stop else []
    except json.JSONDecodeError:
        return []
    kept = []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and all(
            isinstance(row.get(key), str) for key in ("question", "answer")
        ):
            rewording = row.get("rewording")
            kept.append({**row, "rewording": rewording if isinstance(rewording, str) else ""})
    return kept
