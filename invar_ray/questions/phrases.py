"""Wording kinds of the rule-based rewriter: the same question, said otherwise.

Each is a pure function ``(question, generator) -> str | None``; ``None`` where it has nothing safe
to offer.  They move whole phrases and swap function words and fixed frames only, so names, numbers
and content words stay as they are. (A title written in small letters that holds a preposition,
"life in the fast lane", can still be parted by ``clause``.)
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from invar_ray.questions.lexicon import (
    AGENTS,
    AUXILIARIES,
    BE,
    DETERMINERS,
    IMPERATIVES,
    MEASURES,
    PARTICIPLES,
    PAST,
    PREPOSITIONS,
    PRONOUNS,
    STOP_WORDS,
    WH,
)
from invar_ray.questions.parsing import (
    Question,
    Style,
    is_subject_question,
    parse_question,
    split_style,
)

_X = r"(?P<x>.+)"
# Body pattern -> rewrites. Content words outside <x>, <r> and <n> are part of the frame that is
# replaced.
_FRAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (rf"what (?P<r>is|was) the name of {_X}", ("what {r} {x} called", "by what name {r} {x} known")),
    (rf"what (?P<n>is|was) (?P<r>(?:the|an?) [^ ]+(?: [^ ]+)?) of {_X}", ("which {n} {r} of {x}",)),
    (rf"what is {_X}'s occupation", ("what does {x} do for a living", "what is the profession of {x}")),
    (
        rf"in (?:what|which) (?P<n>city|town|country|place|state|village) (?:was|were) {_X} born",
        ("what is the birthplace of {x}", "which {n} is the birthplace of {x}", "{x} was born in which {n}"),
    ),
    (rf"where (?:was|were) {_X} born", ("what is the birthplace of {x}", "what is the place of birth of {x}")),
    (rf"when (?:was|were) {_X} born", ("what is the birth date of {x}", "on what date was {x} born")),
    (rf"when did {_X} die", ("what is the date of death of {x}", "on what date did {x} die")),
    (rf"where is {_X} located(?: at)?", ("what is the location of {x}", "where can {x} be found")),
    (rf"when did {_X} come out", ("what is the release date of {x}", "when was {x} released")),
    (rf"when (?:was|were) {_X} released", ("what is the release date of {x}", "when did {x} come out")),
    (rf"how many people live in {_X}", ("what is the population of {x}", "how many inhabitants does {x} have")),
    (rf"what is the population of {_X}", ("how many people live in {x}", "how many inhabitants does {x} have")),
    (rf"what (?:is|was) another (?P<n>word|name|term) (?P<r>used )?for {_X}", ("what other {n} is used for {x}",)),
    (rf"what does {_X} stand for", ("what is {x} short for", "what is the meaning of the letters {x}")),
    (rf"what does {_X} mean", ("what is meant by {x}", "what is the meaning of {x}")),
    (rf"how far is {_X}", ("what is the distance from {x}",)),
    (rf"how much (?:does|did) {_X} cost", ("what is the price of {x}", "what is the cost of {x}")),
    (rf"what (?P<n>kind|type|sort) of {_X}", ("which {n} of {x}", "what sort of {x}", "what type of {x}")),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern, re.IGNORECASE), forms) for pattern, forms in _FRAMES)
# First word(s) -> other ways to start the same question.
_OPENINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"when (?=(?:did|do|does|was|were|will|is|are)\b)",
        ("at what time ", "at what point in time ", "when exactly "),
    ),
    (
        r"where (?=(?:did|do|does|was|were|can|is|are)\b)",
        ("in what place ", "at which location ", "where exactly "),
    ),
    (
        r"why (?=(?:did|do|does|was|were|is|are|has|have)\b)",
        ("for what reason ", "what is the reason why "),
    ),
    (r"how (?=(?:did|do|does|was|were|is|are|can)\b)", ("in what way ", "in which manner ")),
    (
        r"how many (?!(?:of|is|are|was|were|do|does|did|has|have|had|can|could|will|would|should)\b)",
        ("what number of ",),
    ),
    (r"how much (?=[a-z]+ (?:did|do|does|was|is|are)\b)", ("what amount of ",)),
    (r"how often ", ("how frequently ", "with what frequency ")),
    (r"what year (?=\w)", ("in which year ", "in what year ")),
    (r"in what year ", ("in which year ", "during what year ")),
    (
        r"what (?=[a-z]+ "
        r")(?!(?:is|are|was|were|do|does|did|has|have|had|can|could|will|would|should)\b)"
        r"(?!\w+(?:ed|s) (?:to|in|on|the|a|an|by|when|if|for)\b)",
        ("which ",),
    ),
    (r"which ", ("what ",)),
    (r"who (?=(?:is|was) the )", ("which person ", "what person ")),
)
_COMPILED_OPENINGS = tuple(
    (re.compile(pattern, re.IGNORECASE), forms) for pattern, forms in _OPENINGS
)
_IN_PLACE = re.compile(
    r"(?P<s>\S.*?) (?P<aux>is|are|was|were|can|could|will|would|should|must) (?P<rest>(?:.+? )??)"
    r"(?P<wh>(?:(?:in|on|at|by|for|from|to|with|between|against|through|after) "
    r")?(?:what|which|whom|who|where|when)"
    r"(?: [\w'-]+){0,3})",
    re.IGNORECASE,
)
_MOVABLE = frozenset(
    """in during after before at on since under among between according until throughout within while because unlike
    besides despite following when if""".split()
)
_SUBORDINATE = frozenset({"while", "because", "when", "if"})

_ASK_INDIRECT = (
    "do you know {q}",
    "can you tell me {q}",
    "could you tell me {q}",
    "do you happen to know {q}",
)
_TELL_INDIRECT = (
    "tell me {q}",
    "please tell me {q}",
    "I would like to know {q}",
    "I want to find out {q}",
)
_TELL_NOUN = ("tell me {q}", "name {q}", "give me {q}", "please tell me {q}")
_PREFIXED = (
    "quick question: {q}",
    "question: {q}",
    "I have a question: {q}",
    "please answer this: {q}",
    "tell me: {q}",
)


def template(question: str, generator: random.Random) -> str | None:
    """Another question form: fixed frames (``where was X born`` ->
    ``what is the birthplace of X``), other openings (``when`` -> ``at what time``), the wh-phrase
    in place or at the front.
    """
    body, style = split_style(question)
    forms: list[str] = []
    for pattern, outputs in _COMPILED:
        match = pattern.fullmatch(body)
        if match is not None and not _has_question_word(match.group("x")):
            forms += [output.format(**match.groupdict()) for output in outputs]
            break
    forms += _agent_forms(body)
    parsed = parse_question(body)
    if parsed is not None:
        forms.append(parsed.in_place)
    fronted = _front(body)
    if fronted is not None:
        forms.append(fronted)
    if len(forms) < 2:  # a new opening changes least: only where little else is on offer
        for pattern, outputs in _COMPILED_OPENINGS:
            if pattern.match(body):
                forms += [pattern.sub(output, body, count=1) for output in outputs]
                break
    return _choose(forms, body, style, generator)


def clause(question: str, generator: random.Random) -> str | None:
    """Another order of clauses: ``who won the cup in 1990`` -> ``in 1990, who won the cup``, and
    back.
    """
    body, style = split_style(question)
    forms = []
    head, comma, tail = body.partition(", ")
    if (
        comma
        and "," not in tail
        and _starts_question(tail)
        and head.split()[0].lower() in _MOVABLE | PREPOSITIONS
    ):
        forms.append(
            f"{tail}, {head}"
            if head.split()[0].lower() not in {"in", "on", "at"}
            else f"{tail} {head}"
        )
    moved = _move_last_clause(body)
    if moved is not None:
        forms.append(moved)
    topic = _topic_last(body)
    if topic is not None:
        forms.append(topic)
    return _choose(forms, body, style, generator)


def request(question: str, generator: random.Random) -> str | None:
    """A request instead of a bare question: ``tell me ...``, ``do you know when ...``."""
    body, style = split_style(question)
    if not body:
        return None
    if body.split()[0].lower() in IMPERATIVES:
        if generator.random() < 0.5:
            return style.finish(f"please {body}", mark=".")
        return style.finish(f"{generator.choice(('can', 'could', 'would'))} you {body}", mark="?")
    parsed = parse_question(body)
    nouns = _asked_noun(body, parsed)
    if nouns is not None:
        return style.finish(generator.choice(_TELL_NOUN).format(q=nouns), mark=".")
    indirect = None
    if parsed is not None and not (parsed.copula and len(parsed.subject.split()) > 6):
        indirect = parsed.indirect
    elif is_subject_question(body):
        indirect = body
    if indirect is None:
        return style.finish(generator.choice(_PREFIXED).format(q=body))
    if generator.random() < 0.5:
        return style.finish(generator.choice(_ASK_INDIRECT).format(q=indirect), mark="?")
    return style.finish(generator.choice(_TELL_INDIRECT).format(q=indirect), mark=".")


def keywords(question: str, generator: random.Random) -> str | None:
    """As typed into a search box: function words left out, the wh-word kept (it says what is
    asked).
    """
    body, _ = split_style(question)
    words = [word.strip(",;:") for word in body.split()]
    kept = [
        word for index, word in enumerate(words) if index == 0 or word.lower() not in STOP_WORDS
    ]
    if len(kept) < 3 or len(kept) == len(words):
        return None
    bare = words[0].lower() in WH and (words[0].lower() == "who" or words[1].lower() in AUXILIARIES)
    if bare and generator.random() < 0.4:
        kept = [*kept[1:], kept[0]]
    return " ".join(kept)


def _choose(forms: list[str], body: str, style: Style, generator: random.Random) -> str | None:
    usable = [form for form in dict.fromkeys(forms) if form != body]
    return style.finish(generator.choice(usable)) if usable else None


def _has_question_word(text: str) -> bool:
    return any(word in WH - {"which", "where", "when", "who"} for word in text.lower().split())


def _agent_forms(body: str) -> list[str]:
    """``who wrote X`` -> ``who is the author of X``, ``by whom was X written``."""
    match = re.fullmatch(r"who (?P<verb>\w+) (?P<x>.+)", body)
    if match is None or match.group("verb") not in AGENTS:
        return []
    noun, participle = AGENTS[match.group("verb")]
    x = match.group("x")
    first = x.split()[0].lower()
    if (
        first in PREPOSITIONS
        or first in PRONOUNS
        or re.search(r"\b(?:and|who|when|while|if|in \d+)\b", x)
    ):
        return []
    verb = "were" if _is_plural(x) else "was"
    return [
        f"who is the {noun} of {x}",
        f"by whom {verb} {x} {participle}",
        f"{x} {verb} {participle} by whom",
    ]


def _is_plural(noun_phrase: str) -> bool:
    words = noun_phrase.split()
    head = next(
        (words[at - 1] for at in range(1, len(words)) if words[at].lower() in PREPOSITIONS),
        words[-1],
    )
    return head.islower() and head.endswith("s") and not head.endswith(("ss", "us", "is", "'s"))


def _front(body: str) -> str | None:
    """``X was written by whom`` -> ``by whom was X written``."""
    match = _IN_PLACE.fullmatch(body)
    if match is None:
        return None
    subject, rest, wh = match.group("s"), match.group("rest").strip(), match.group("wh")
    lower = subject.lower().split()
    tail = [word.lower() for word in wh.split()[1:]]
    if set(lower) & (WH | AUXILIARIES) or set(tail) & (AUXILIARIES | PREPOSITIONS | DETERMINERS):
        return None
    if "," in rest or rest.split()[-1:] == ["to"]:
        return None
    return f"{wh} {match.group('aux')} {subject} {rest}".strip()


def _starts_question(text: str) -> bool:
    words = text.lower().split()
    return bool(words) and (
        words[0] in WH or (len(words) > 1 and words[0] in PREPOSITIONS and words[1] in WH)
    )


def _move_last_clause(body: str) -> str | None:
    if not _starts_question(body) or "," in body:
        return None
    words = body.split()
    lower = [word.lower() for word in words]
    for at in range(len(words) - 2, 3, -1):
        if lower[at] not in _MOVABLE:
            continue
        clause_words = lower[at + 1 :]
        if len(clause_words) > 8 or set(clause_words) & (WH | {"and", "or", "to", "that"}):
            return None
        if lower[at] in {"between", "among"} or (
            lower[at] == "following" and lower[at - 1] in DETERMINERS
        ):
            return None
        if lower[at] not in _SUBORDINATE and _holds_verb(words[at + 1 :]):
            return None
        if _is_past_or_participle(lower[at - 1]) and lower[0] == "what" and lower[1] in BE:
            return (
                None  # "what is the name of the muse carved on ...": the phrase belongs to the noun
            )
        if lower[at - 1] in PREPOSITIONS | AUXILIARIES | DETERMINERS or lower[at - 1] in {
            "as",
            "and",
            "most",
            "only",
        }:
            return None
        return f"{' '.join(words[at:])}, {' '.join(words[:at])}"
    return None


def _is_past_or_participle(word: str) -> bool:
    return word in PARTICIPLES or word.endswith("ed")


def _holds_verb(words: list[str]) -> bool:
    lower = [word.lower() for word in words]
    return (
        any(word in PARTICIPLES or word in PAST or word in AUXILIARIES for word in lower)
        or lower[-1] in PREPOSITIONS
    )


def _topic_last(body: str) -> str | None:
    """``game of thrones why are there chains`` -> ``why are there chains, game of thrones``."""
    words = body.split()
    lower = [word.lower() for word in words]
    for at in range(1, min(6, len(words) - 2)):
        if lower[at] in WH and lower[at + 1] in AUXILIARIES:
            topic = lower[:at]
            if (
                set(topic) & (AUXILIARIES | WH)
                or topic[-1] in PREPOSITIONS | DETERMINERS
                or topic[0] in PREPOSITIONS
            ):
                return None
            return f"{' '.join(words[at:])}, {' '.join(words[:at])}".replace(",,", ",").rstrip(",")
    return None


def _asked_noun(body: str, parsed: Question | None) -> str | None:
    """``what is the capital of X`` asks for ``the capital of X``."""
    if parsed is None or not parsed.copula or parsed.wh != "what":
        match = re.fullmatch(r"how (?P<m>\w+) (?:is|was) (?P<x>.+)", body)
        if (
            match is not None
            and match.group("m") in MEASURES
            and not _holds_verb(match.group("x").split())
        ):
            return f"the {MEASURES[match.group('m')]} of {match.group('x')}"
        return None
    return (
        parsed.subject
        if parsed.subject.split()[0].lower() == "the" or "'s " in parsed.subject
        else None
    )


WORDING: dict[str, Callable[[str, random.Random], str | None]] = {
    "template": template,
    "clause": clause,
    "request": request,
    "keywords": keywords,
}
