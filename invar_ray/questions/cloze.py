"""One plain sentence into the questions that it answers, by rule; see
:mod:`invar_ray.questions.making`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from invar_ray.questions.lexicon import (
    AUXILIARIES,
    BE,
    FUNCTION_WORDS,
    HAVE,
    MODAL,
    PARTICIPLES,
    PAST,
    PREPOSITIONS,
    PRONOUNS,
)
from invar_ray.questions.parsing import third_person
from invar_ray.text.answers import contains_answer
from invar_ray.text.sentences import sentence_starts

_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_NAME = r"[A-Z][\w'’-]+(?: (?:of |de |van |von |da )?[A-Z][\w'’-]+){0,3}"
_COUNT = (
    r"\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|"
    r"thirty|forty|fifty|sixty|seventy|eighty|ninety"
)
# After a whole name: the sentence's end, a comma, or a word that opens another phrase; not
# "American history", "St. Paul", "Bergen and Oslo".
_OPENING = "after as at before between by during for from in into near on over since to until when where with".split()
_CLOSED = rf"(?=$|,|\)| (?:{'|'.join(_OPENING)})\b)"
# Type of answer, where it stands (group a; the whole match is what the wh-phrase replaces), the
# wh-phrase.
_SPANS: tuple[tuple[str, re.Pattern[str], str], ...] = tuple(
    (kind, re.compile(pattern), wh)
    for kind, pattern, wh in (
        (
            "date",
            rf"\b(?:[Oo]n )?(?P<a>\d{{1,2}} {_MONTH} \d{{4}}|{_MONTH} \d{{1,2}},? \d{{4}})\b",
            "on which date",
        ),
        (
            "year",
            r"\b(?P<p>[Ii]n|[Ss]ince|[Uu]ntil|from) (?P<a>1\d{3}|20\d{2})\b(?![\d-])",
            "{p} which year",
        ),
        (
            "percentage",
            r"(?<![\w.])(?P<a>\d+(?:\.\d+)? ?(?:%|percent\b|per cent\b))",
            "what percentage",
        ),
        (
            "money",
            r"(?<!\w)(?P<a>[$€£] ?\d[\d,]*(?:\.\d+)?(?: (?:million|billion))?)\b",
            "how much money",
        ),
        (
            "number",
            rf"(?<![\w.,$€£-])(?<!\bthe )(?<!\bthese )(?<!\bthose )(?P<a>{_COUNT}) "
            rf"(?P<n>[a-z]{{3,}}s)\b",
            "how many {n}",
        ),
        ("agent", rf"(?<=[a-z]) by (?P<a>{_NAME}){_CLOSED}", " by whom"),
        ("name", rf"\b(?P<p>called|named) [\"“]?(?P<a>{_NAME})[\"”]?{_CLOSED}", "{p} what"),
        (
            "place",
            rf"(?<=[a-z]) (?P<p>in|at|near|from) (?P<a>{_NAME}){_CLOSED}",
            " {p} which place",
        ),
    )
)
_SUBJECT = re.compile(rf"(?P<a>{_NAME}) (?P<rest>(?P<v>[a-z]+)\b.*)")
_DEFINITION = re.compile(
    r"(?P<s>[A-Z][^,;:.()]{2,60}?) (?P<v>is|was|are|were) (?P<a>(?:an?|the) [^,.;:()]{3,80})"
)
_DEFINITION_END = re.compile(
    r" (?:(?:that|which|who|whose|where|when|with|for|because|until|after|before)\b|(?:and|but) "
    r"[a-z]).*"
)
_NOT_A_PLACE = re.compile(
    rf"{_MONTH}|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|\w+(?:ish|ese|ism|ic)$|I$"
)
_MARKUP = re.compile(r"!?\[([^\]\n]*)\]\([^)\n]*\)|(?<!\w)[*_]{1,3}(?=\S)|(?<=\S)[*_]{1,3}(?!\w)|`")
_LIST_MARK = re.compile(r"^(?:[-*•+>]|\(?\d{1,2}[.)])\s+")
_OPENERS = PRONOUNS | frozenset(
    """this that these those here such his her its their my your our who what which when where why how and but or so
    thus hence therefore however also then instead both neither either one some others another see note
    please if nobody everybody anybody everyone anyone nothing everything none""".split()
)
_LEANING = frozenset("it he she they we i you this these those his her its their such".split())
# The second: a heading and a sentence that a page ran together ("Brackwater tunnel The tunnel is").
_BROKEN = re.compile(
    r"[a-z0-9)]\.[A-Z]|[a-z] (?:The|This|These|It|They|There|An|Its|Our|Your) [a-z]"
    r"|^\w+, (?:and|or|but) "
)
_RELATIVE = frozenset("that which who whose whom where when while because".split())
_VERBS = frozenset(PAST.values()) | PARTICIPLES | frozenset(third_person(base) for base in PAST)
_PRESENT = {third_person(base): base for base in PAST}
_BEFORE_AN_AMOUNT = frozenset(
    "than every least most about only nearly almost up some over under roughly around".split()
)
"""What stays with a number: "more than 9 hours" does not part into "How many hours .. more than"."""
_BASES = {past: base for base, past in sorted(PAST.items(), reverse=True)}


def plain_sentences(text: str) -> Iterator[tuple[int, str]]:
    """Plain statements with their offsets: no headings, tables, code, questions or sentences that
    lean on others.
    """
    for start, stop in itertools.pairwise([*sentence_starts(text), len(text)]):
        raw = text[start:stop].strip()
        sentence = " ".join(
            _MARKUP.sub(lambda match: match.group(1) or "", _LIST_MARK.sub("", raw)).split()
        )
        if _is_plain(sentence, raw):
            yield start, sentence


def _is_plain(sentence: str, raw: str) -> bool:
    words = sentence.rstrip(".!").split()
    letters = sum(character.isalpha() or character.isspace() for character in sentence)
    return (
        5 <= len(words) <= 28
        and sentence.endswith(".")
        and (sentence[0].isupper() or sentence[0].isdigit())
        and words[0].lower().rstrip(",") not in _OPENERS
        and not any(word.lower().rstrip(",") in _LEANING for word in words[:6])
        and not _BROKEN.search(sentence)
        and not raw.startswith(("#", "|", "    ", "```"))
        and not any(mark in sentence for mark in ("://", "|", "{", "=", "…", "..", "?", ";"))
        and sentence.count("(") == sentence.count(")")
        and sentence.count('"') % 2 == 0
        and letters >= 0.75 * len(sentence)
        and any(
            word.lower() in AUXILIARIES or word in _VERBS or word.endswith("ed")
            for word in words[1:]
        )
    )


def questions_of(sentence: str, title: str) -> Iterator[tuple[str, str, list[str]]]:
    """Type, answer and wordings of each question that the sentence answers."""
    body = sentence.rstrip(".")
    for kind, pattern, wh in _SPANS:
        found = list(pattern.finditer(body))
        if len(found) != 1:
            continue  # two gaps of a kind: the question would not say which
        match = found[0]
        answer = match["a"]
        if kind in {"place", "agent", "name"} and _NOT_A_PLACE.search(answer):
            continue
        if body.count(answer) > 1:
            continue
        before = body[: match.start()].split()
        if kind == "number" and before and _is_named(before):
            continue  # "Bus 47 stops": no number of stops
        if kind == "agent" and not any(_is_participle(word) for word in before):
            continue  # "the book Moss by Ada Morvane": nobody did it
        asked = wh.format(
            **{key: value.lower() for key, value in match.groupdict().items() if key != "a"}
        )
        gap = body[: match.start()] + match.group().replace(answer, "____") + body[match.end() :]
        in_place = f"{body[: match.start()]}{asked}{body[match.end() :]}".strip()
        yield kind, answer, _wordings(body, match.span(), asked.strip(), in_place, gap, title)
    subject = _SUBJECT.fullmatch(body)
    opening = subject["a"].split()[0].lower() if subject else ""
    if (
        subject
        and " " in subject["a"]
        and opening not in FUNCTION_WORDS - {"the", "a", "an"}
        and _is_verb(subject["v"])
        and body.count(subject["a"]) == 1
    ):
        asked = f"Who or what {subject['rest']}?"
        if _is_anchored(subject["rest"]):
            yield (
                "subject",
                subject["a"],
                [asked, f"____ {subject['rest']}.", _keywords(subject["rest"])],
            )
    definition = _DEFINITION.match(body)
    if definition and any(word[0].isupper() for word in _small_start(definition["s"]).split()):
        answer = _DEFINITION_END.sub("", definition["a"]).strip()
        subject_text = _small_start(definition["s"])
        verb = definition["v"]
        wordings = [
            f"What {verb} {subject_text}?",
            f"{definition['s']} {verb} what?",
            f"define {subject_text}",
        ]
        if len(answer.split()) >= 2 and not set(definition["s"].lower().split()) & (
            AUXILIARIES | PREPOSITIONS - {"of"}
        ):
            yield "definition", answer, [f"What kind of thing {verb} {subject_text}?", *wordings]


def _wordings(
    body: str, span: tuple[int, int], asked: str, in_place: str, gap: str, title: str
) -> list[str]:
    """The question first, then its other wordings."""
    own = [_capital(f"{in_place}?"), f"Fill in the gap: {gap}."]
    front = _fronted(body, span, asked)
    if front is not None:
        own = [front, *(own if span[0] else own[1:])]
    if span[0] == 0 and front is None:
        # "In which year, the mill burnt down?" is no question; an empty one is not sound
        return [""]
    says = says_something(title) and not contains_answer(in_place, [title])
    context = f'According to "{title}", {_small_start(in_place)}?' if says else None
    if _is_anchored(in_place):
        return [*own, _keywords(in_place), *([context] if context else [])]
    return [context, *own] if context else [""]


def _fronted(body: str, span: tuple[int, int], asked: str) -> str | None:
    """``In which year did Mara paint the door?``: the wh-phrase first, where subject and verb are
    easy to tell.
    """
    after = body[span[1] :]
    if span[0] == 0:  # "In 1841 the harbour was dug": all of the clause comes after
        words, after = after.lstrip(", ").split(), ""
    else:
        words = body[: span[0]].split()
    at = next(
        (
            at
            for at, word in enumerate(words)
            if at and (word in BE | HAVE | MODAL or word in _BASES)
        ),
        None,
    )
    if words and words[-1].lower() in _BEFORE_AN_AMOUNT | (PREPOSITIONS - {"by"}):
        return None  # it would be left behind
    if span[0] and at is None and words and (plain := _without_auxiliary(words, asked, after)):
        return plain
    if (
        at is None
        or at > 6
        or any(word.endswith(",") or word.lower() in PREPOSITIONS - {"of"} for word in words[:at])
    ):
        return None
    tail = words[at + 1 :] + after.split()
    if {word.strip(",").lower() for word in tail} & (_RELATIVE | {"and", "but"}) or any(
        "," in word for word in words
    ):
        return None  # a second clause, whose verb would not move
    subject, verb, rest = _small_start(" ".join(words[:at])), words[at], " ".join(words[at + 1 :])
    if verb in BE | HAVE | MODAL:
        if verb in HAVE and not any(
            word in PARTICIPLES or word.endswith("ed") for word in words[at + 1 : at + 3]
        ):
            return None  # "has 52 rooms": here it is the main verb
        return _tidy(f"{asked} {verb} {subject} {rest}{after}")
    return _tidy(f"{asked} did {subject} {_BASES[verb]} {rest}{after}")


def _without_auxiliary(words: list[str], asked: str, after: str) -> str | None:
    """``A wagon holds nine tonnes``: the verb right before what is asked for, its subject short."""
    *subject, verb = words
    if not 1 <= len(subject) <= 4 or verb not in _PRESENT:
        return None
    if any(word.endswith(",") or word.lower() in PREPOSITIONS for word in subject):
        return None
    said = _small_start(" ".join(subject))
    return _tidy(f"{asked} does {said} {_PRESENT[verb]}{after}")


def _is_named(before: list[str]) -> bool:
    """Whether a number that follows these words belongs to a name: ``Bus 47``."""
    return before[-1][:1].isupper() and before[-1].lower() not in FUNCTION_WORDS


def _is_participle(word: str) -> bool:
    return word in PARTICIPLES or word.endswith("ed")


def _tidy(question: str) -> str:
    return _capital(" ".join(question.split()).replace(" ,", ",") + "?")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _small_start(text: str) -> str:
    """Without a capital that only marks the start of the sentence."""
    first, space, rest = text.partition(" ")
    return f"{first.lower()}{space}{rest}" if first.lower() in FUNCTION_WORDS else text


def _keywords(text: str) -> str:
    kept = [
        word.strip(",;:")
        for word in text.split()
        if word.lower() not in AUXILIARIES | {"the", "a", "an", "of"}
    ]
    return " ".join(kept)


def _is_anchored(text: str) -> bool:
    """Whether a text names something that can be looked for: a capital inside it, or a number."""
    words = text.split()
    named = any(word[:1].isupper() and word != "I" for word in words[1:])
    opening = (
        words[:1]
        and words[0][:1].isupper()
        and words[0].lower() not in FUNCTION_WORDS
        and len(words) > 1
    )
    return (
        named
        or any(character.isdigit() for character in text)
        or bool(opening and _looks_like_name(words))
    )


def _looks_like_name(words: list[str]) -> bool:
    """``Arvon is``: a capital right before a verb; ``Farmers grow`` has one too, but no plural is a
    name here.
    """
    return _is_verb(words[1]) and not words[0].endswith("s")


def _is_verb(word: str) -> bool:
    return word in AUXILIARIES or word in _VERBS or word.endswith("ed")


def says_something(title: str) -> bool:
    """Whether a title or heading can stand in a question: some words, not only small ones, not a
    file's number.
    """
    words = re.findall(r"[^\W\d_]{2,}", title)
    return (
        1 <= len(words) <= 12
        and sum(map(len, words)) >= 4
        and any(word.lower() not in FUNCTION_WORDS for word in words)
    )
