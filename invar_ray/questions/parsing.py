"""A shallow parse of English questions: enough to move their parts without changing a content word.

``when did the romans start building the via apia`` becomes wh ``when``, subject ``the romans``,
predicate ``started building the via apia``.  Where the parts cannot be told apart safely there is
no parse, and the kinds that need one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from invar_ray.questions.lexicon import (
    AUXILIARIES,
    BE,
    DETERMINERS,
    DO,
    FUNCTION_WORDS,
    HAVE,
    MODAL,
    PARTICIPLES,
    PAST,
    PREPOSITIONS,
    WH,
)

_ADVERBIAL = frozenset({"when", "where", "why"})
_TIME_NOUNS = frozenset("year month day date century decade time season".split())
_OBJECT_LAST = frozenset({"call", "name", "consider"})
# With a bare "what is", a participle may belong to the noun ("the first game released"): only these
# close a question.
_NAMING = frozenset({"called", "named", "known", "considered"})
# These stand before the participle and go with it.
_ADVERBS = frozenset(
    """first originally mostly officially also last longer no often initially finally eventually usually
primarily mainly formally recently previously currently once still""".split()
)
_NEVER_PREDICATE = frozenset("united red hundred need seed speed breed indeed bed".split())


@dataclass(frozen=True)
class Style:
    """How a question was written, so that its rewrite is written alike."""

    capital: bool
    mark: str

    def finish(self, text: str, mark: str | None = None) -> str:
        """``text`` with the question's own capital and mark; ``mark`` replaces that mark, if it had
        one.
        """
        text = " ".join(text.split()).replace(" ,", ",")
        if self.capital:
            text = text[:1].upper() + text[1:]
        return text + (self.mark if mark is None or not self.mark else mark)


@dataclass(frozen=True)
class Question:
    """Parts of a question: ``wh aux subject predicate``.

    Attributes:
        wh: ``when``, ``in which city``, ``how many people``.
        subject: what the question is about.
        before, after: the predicate, inflected; the wh-phrase stood between the two halves (or
            after both).
        copula: True for ``what is <subject>``, where ``before`` is only the verb.
    """

    wh: str
    subject: str
    before: str
    after: str
    copula: bool = False

    @property
    def in_place(self) -> str:
        """``the romans started building the via apia when``."""
        return f"{self.subject} {self.before} {self.wh} {self.after}".strip()

    @property
    def indirect(self) -> str:
        """``when the romans started building the via apia``."""
        return f"{self.wh} {self.subject} {self.before} {self.after}".strip()


def split_style(question: str) -> tuple[str, Style]:
    """The question without its final mark and without a capital that only marks its start, and how
    it was written.
    """
    stripped = " ".join(question.split())
    body = stripped.rstrip("?.! ")
    style = Style(
        capital=body[:1].isupper(), mark=stripped[-1:] if stripped.endswith(("?", ".")) else ""
    )
    first, _, rest = body.partition(" ")
    if first != "I" and first.lower().rstrip(",") in FUNCTION_WORDS:
        body = f"{first.lower()} {rest}".strip()
    return body, style


def parse_question(body: str) -> Question | None:
    """Parts of a question that starts with its wh-phrase (see :func:`split_style`), or ``None``
    where unsure.
    """
    words = body.split()
    lead = _wh_length(words)
    if lead is None or lead + 1 >= len(words):
        return None
    wh, aux, rest = words[:lead], words[lead].lower(), words[lead + 1 :]
    if {"not", "n't"} & {word.lower() for word in rest[:3]} or rest[0].lower() == "it":
        return None
    phrase = " ".join(wh)
    if aux in BE:
        return _parse_be(phrase, wh, aux, rest)
    if aux in DO or aux in MODAL:
        at = _only(_verbs(rest))
        if at is None:
            return None
        if phrase == "how" and rest[0].lower() in {"you", "i", "we"}:
            return None
        verb = rest[at].lower() if aux in MODAL else _inflect(rest[at].lower(), aux)
        head = f"{aux} {verb}" if aux in MODAL else verb
        return _with_object(phrase, wh, " ".join(rest[:at]), head, rest[at + 1 :], rest[at].lower())
    if aux in HAVE:
        at = _only(_participles(rest))
        return None if at is None else _with_participle(phrase, wh, aux, rest, at)
    return None


def is_subject_question(body: str) -> bool:
    """Whether the wh-phrase is the subject (``who wrote ...``), so that the body is its own
    indirect question.
    """
    words = body.lower().split()
    if len(words) < 3 or words[0] not in {"who", "what", "which"}:
        return False
    at = 1 if words[0] == "who" else 2
    verb, following = words[at], words[at + 1 :]
    if verb in BE | HAVE:
        return bool(following) and following[0] in PARTICIPLES and verb != "are"
    return verb in PAST.values() or verb in _THIRD_PERSONS


def third_person(base: str) -> str:
    """``carry`` -> ``carries``."""
    if base in {"have", "do", "go"}:
        return {"have": "has", "do": "does", "go": "goes"}[base]
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ies"
    return base + ("es" if base.endswith(("s", "sh", "ch", "x", "z")) else "s")


_THIRD_PERSONS = frozenset(third_person(base) for base in PAST) | {"plays", "stars"}


def _wh_length(words: list[str]) -> int | None:
    """Words up to the auxiliary that follows the wh-phrase."""
    lower = [word.lower() for word in words]
    first = 1 if lower and lower[0] in PREPOSITIONS else 0
    if len(lower) <= first or lower[first] not in WH:
        return None
    for index in range(first + 1, min(len(lower), first + 6)):
        if lower[index] in AUXILIARIES:
            phrase = lower[first:index]
            bare = phrase[0] in _ADVERBIAL | {"who", "whom"}
            return index if len(phrase) == 1 or not bare else None
        if lower[index] in PAST.values() or lower[index].endswith(","):
            return None
    return None


def _parse_be(phrase: str, wh: list[str], aux: str, rest: list[str]) -> Question | None:
    if rest[0].lower() == "there":
        if wh[0].lower() in _ADVERBIAL | PREPOSITIONS:
            return Question(phrase, "there", " ".join([aux, *rest[1:]]), "")
        return Question(phrase, "there", aux, " ".join(rest[1:]))
    found = _participles(rest)
    if phrase in {"what", "who"}:
        named = [
            at
            for at in found
            if rest[at].lower() in _NAMING
            and (at + 1 == len(rest) or rest[at + 1].lower() in PREPOSITIONS | {"to"})
        ]
        if len(named) == 1 and phrase == "what":
            return _with_participle(phrase, wh, aux, rest, named[0])
        names_it = (
            rest[0].lower() in DETERMINERS
            or (
                (rest[0][:1].isupper() or "'s" in rest[0])
                # a second noun phrase ("who was Frederic a guest of") is no part of a name
                and not any(
                    rest[at].lower() in DETERMINERS and rest[at - 1][:1].isupper()
                    for at in range(1, len(rest))
                )
            )
        )
        if names_it and rest[-1].lower() not in PREPOSITIONS:
            return Question(phrase, " ".join(rest), aux, "", copula=True)
        return None
    at = _only(found)
    return None if at is None else _with_participle(phrase, wh, aux, rest, at)


def _with_participle(
    phrase: str, wh: list[str], aux: str, rest: list[str], at: int
) -> Question | None:
    start = _before_adverbs(rest, at)
    return _with_object(
        phrase,
        wh,
        " ".join(rest[:start]),
        " ".join([aux, *rest[start : at + 1]]),
        rest[at + 1 :],
        "",
    )


def _with_object(
    phrase: str, wh: list[str], subject: str, verb: str, after: list[str], base: str
) -> Question:
    """Place the wh-phrase: an adverbial one at the end, an object behind its verb unless another
    object is there.
    """
    adverbial = (
        phrase in _ADVERBIAL | {"how"}
        or wh[0].lower() in PREPOSITIONS
        or wh[-1].lower() in _TIME_NOUNS
    )
    if wh[0].lower() == "how" and len(wh) == 2:
        adverbial = True  # how long, how often
    if not adverbial and after and after[0].endswith("ing"):
        verb, after = f"{verb} {after[0]}", after[1:]  # stopped doing
    stranded = [word.lower() in PREPOSITIONS | {"to"} for word in after]
    if not adverbial and stranded[:2] == [True, True]:
        verb, after = f"{verb} {after[0]}", after[1:]  # lost to (whom) in the finals
    behind_verb = not after or after[0].lower() in PREPOSITIONS | {"to"}
    stranded_last = bool(after) and after[-1].lower() in PREPOSITIONS
    called = base in _OBJECT_LAST and not behind_verb
    if adverbial or called or not behind_verb or stranded_last:
        return Question(phrase, subject, " ".join([verb, *after]), "")
    return Question(phrase, subject, verb, " ".join(after))


def _participles(rest: list[str]) -> list[int]:
    return [
        at
        for at in range(1, len(rest))
        if _is_participle(rest[at]) and not _opens_noun(rest[_before_adverbs(rest, at) - 1])
    ]  # fmt: skip


def _before_adverbs(rest: list[str], at: int) -> int:
    """Where the adverbs right before ``at`` start (``at`` where there are none); never 0, the
    subject's place.
    """
    while at > 1 and rest[at - 1].lower() in _ADVERBS:
        at -= 1
    return at


def _is_participle(word: str) -> bool:
    if word != word.lower() or word in _NEVER_PREDICATE:
        return False
    return word in PARTICIPLES or (word.endswith("ed") and len(word) > 4)


def _verbs(rest: list[str]) -> list[int]:
    return [at for at in range(1, len(rest)) if rest[at] in PAST and not _opens_noun(rest[at - 1])]


def _opens_noun(word: str) -> bool:
    """Whether ``word`` makes the next one part of a noun phrase or an infinitive, not the main
    verb.
    """
    lower = word.lower()
    return (
        lower in DETERMINERS | PREPOSITIONS
        or lower in {"and", "or"}
        or lower.endswith(("'s", "s'"))
    )


def _only(found: list[int]) -> int | None:
    return found[0] if len(found) == 1 else None


def _inflect(base: str, aux: str) -> str:
    return {"did": PAST[base], "does": third_person(base), "do": base}[aux]
