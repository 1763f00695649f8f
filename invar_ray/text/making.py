"""Training questions for a corpus that has none, by rule: from plain sentences, definitions and headings.

A sentence with a span of a known type (a year, a date, a number of things, a name ..) becomes the question for that
span: ``The harbour was dug in 1841.`` gives ``In which year was the harbour dug?``, with ``The harbour was dug in which
year?``, a gap text and keywords as other wordings.  The answer stands in the document, the question can be understood
without it.  Everything hangs on hashes of the texts and the seed: the same documents give the same questions anywhere.
Rules are for English. [ours]
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from invar_ray.schema import Document, Example
from invar_ray.text.answers import contains_answer
from invar_ray.text.lexicon import (
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
from invar_ray.text.parsing import third_person
from invar_ray.text.rules import comparison_key
from invar_ray.text.sentences import sentence_starts
from invar_ray.text.stable import stable_hash

_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_NAME = r"[A-Z][\w'’-]+(?: (?:of |de |van |von |da )?[A-Z][\w'’-]+){0,3}"
_COUNT = (
    r"\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|"
    r"thirty|forty|fifty|sixty|seventy|eighty|ninety"
)
# After a whole name: the sentence's end, a comma, or a word that opens another phrase; not "American history",
# "St. Paul", "Bergen and Oslo".
_OPENING = "after as at before between by during for from in into near on over since to until when where with".split()
_CLOSED = rf"(?=$|,|\)| (?:{'|'.join(_OPENING)})\b)"
# Type of answer, where it stands (group a; the whole match is what the wh-phrase replaces), the wh-phrase.
_SPANS: tuple[tuple[str, re.Pattern[str], str], ...] = tuple(
    (kind, re.compile(pattern), wh)
    for kind, pattern, wh in (
        ("date", rf"\b(?:[Oo]n )?(?P<a>\d{{1,2}} {_MONTH} \d{{4}}|{_MONTH} \d{{1,2}},? \d{{4}})\b", "on which date"),
        ("year", r"\b(?P<p>[Ii]n|[Ss]ince|[Uu]ntil|from) (?P<a>1\d{3}|20\d{2})\b(?![\d-])", "{p} which year"),
        ("percentage", r"(?<![\w.])(?P<a>\d+(?:\.\d+)? ?(?:%|percent\b|per cent\b))", "what percentage"),
        ("money", r"(?<!\w)(?P<a>[$€£] ?\d[\d,]*(?:\.\d+)?(?: (?:million|billion))?)\b", "how much money"),
        (
            "number",
            rf"(?<![\w.,$€£-])(?<!\bthe )(?<!\bthese )(?<!\bthose )(?P<a>{_COUNT}) (?P<n>[a-z]{{3,}}s)\b",
            "how many {n}",
        ),
        ("agent", rf"(?<=[a-z]) by (?P<a>{_NAME}){_CLOSED}", " by whom"),
        ("name", rf"\b(?P<p>called|named) [\"“]?(?P<a>{_NAME})[\"”]?{_CLOSED}", "{p} what"),
        ("place", rf"(?<=[a-z]) (?P<p>in|at|near|from) (?P<a>{_NAME}){_CLOSED}", " {p} which place"),
    )
)
_SUBJECT = re.compile(rf"(?P<a>{_NAME}) (?P<rest>(?P<v>[a-z]+)\b.*)")
_DEFINITION = re.compile(r"(?P<s>[A-Z][^,;:.()]{2,60}?) (?P<v>is|was|are|were) (?P<a>(?:an?|the) [^,.;:()]{3,80})")
_DEFINITION_END = re.compile(
    r" (?:(?:that|which|who|whose|where|when|with|for|because|until|after|before)\b|(?:and|but) [a-z]).*"
)
_NOT_A_PLACE = re.compile(rf"{_MONTH}|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|\w+(?:ish|ese|ism|ic)$|I$")
_MARKUP = re.compile(r"!?\[([^\]\n]*)\]\([^)\n]*\)|(?<!\w)[*_]{1,3}(?=\S)|(?<=\S)[*_]{1,3}(?!\w)|`")
_LIST_MARK = re.compile(r"^(?:[-*•+>]|\(?\d{1,2}[.)])\s+")
_OPENERS = PRONOUNS | frozenset(
    """this that these those here such his her its their my your our who what which when where why how and but or so
    thus hence therefore however also then instead both neither either one some others another see note please if""".split()
)
_LEANING = frozenset("it he she they we i you this these those his her its their such".split())
_BROKEN = re.compile(r"[a-z0-9)]\.[A-Z]|^\w+, (?:and|or|but) ")
_RELATIVE = frozenset("that which who whose whom where when while because".split())
_VERBS = frozenset(PAST.values()) | PARTICIPLES | frozenset(third_person(base) for base in PAST)
_BASES = {past: base for base, past in sorted(PAST.items(), reverse=True)}
_DEV_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class MadeQuestion:
    """A question made from a document.

    Attributes:
        example: what a reader of questions gets; ``positive_ids`` is the document.
        answer_type: ``year``, ``date``, ``number``, ``percentage``, ``money``, ``agent``, ``name``, ``place``,
            ``subject``, ``definition``, ``section`` or, from a language model, ``model``.
        start: character offset of its sentence in the document's text.
    """

    example: Example
    answer_type: str
    start: int


def make_questions(document: Document, *, most: int, seed: int) -> list[MadeQuestion]:
    """At most ``most`` questions about a document, types taking turns, in text order."""
    drafts: dict[str, list[MadeQuestion]] = {}
    for made in _drafts(document):
        drafts.setdefault(made.answer_type, []).append(made)
    for kind, group in drafts.items():
        group.sort(key=lambda made: stable_hash("question", seed, kind, made.example.question))
    taken: list[MadeQuestion] = []
    sentences: set[int] = set()
    while any(drafts.values()) and len(taken) < most:
        for group in drafts.values():
            # One question a sentence while there are others: two gaps of one sentence teach little more than one.
            at = next((at for at, made in enumerate(group) if made.start not in sentences), 0)
            if group and len(taken) < most:
                taken.append(group.pop(at))
                sentences.add(taken[-1].start)
    return sorted(taken, key=lambda made: (made.start, made.example.id))


def without_clashes(made: Iterable[MadeQuestion]) -> list[MadeQuestion]:
    """Questions of a corpus without duplicates: one that several documents ask stays once if they agree on the answer,
    and goes altogether if they do not.
    """
    by_key: dict[str, list[MadeQuestion]] = {}
    for question in made:
        by_key.setdefault(comparison_key(question.example.question), []).append(question)
    kept = []
    for same in by_key.values():
        answers = {comparison_key(question.example.answers[0]) for question in same}
        if len(answers) == 1:
            kept.append(same[0])
    return kept


def split_by_document(
    made: list[MadeQuestion], texts: dict[str, str], seed: int
) -> tuple[list[MadeQuestion], list[MadeQuestion]]:
    """Train and dev questions, about a fifth dev, no document in both (copies of one text stay together).

    Questions about a single document are split by place instead: dev is its last fifth.

    Args:
        made: questions.
        texts: document id -> text.
        seed: of the draw.
    """
    groups: dict[int, list[MadeQuestion]] = {}
    for question in made:
        groups.setdefault(stable_hash("split", seed, texts[question.example.positive_ids[0]]), []).append(question)
    if len(groups) < 2:
        ordered = sorted(made, key=lambda question: question.start)
        count = round(len(ordered) * _DEV_SHARE) or min(1, len(ordered) - 1)
        return ordered[: len(ordered) - count], ordered[len(ordered) - count :]
    keys = sorted(groups)
    dev = set(keys[: max(1, round(_DEV_SHARE * len(keys)))])
    train = [question for question in made if not _is_in(question, groups, dev)]
    return train, [question for question in made if _is_in(question, groups, dev)]


def is_sound(question: str, answer: str, document: Document) -> bool:
    """Whether the answer stands in the document and not in the question, and the question has something to say."""
    content = [word for word in re.findall(r"[^\W_]+", question) if word.lower() not in FUNCTION_WORDS]
    return (
        len(content) >= 3
        and len(answer.split()) <= 20
        and contains_answer(document.text, [answer])
        and not contains_answer(question, [answer])
    )


def _is_in(question: MadeQuestion, groups: dict[int, list[MadeQuestion]], keys: set[int]) -> bool:
    return any(question in groups[key] for key in keys)


def _drafts(document: Document) -> Iterator[MadeQuestion]:
    taken: set[str] = set()
    for start, sentence in _sentences(document.text):
        for kind, answer, wordings in _of_sentence(sentence, document):
            made = _made(document, kind, answer, wordings, start)
            key = comparison_key(wordings[0])
            if made is not None and key not in taken:
                taken.add(key)
                yield made
    for start, heading, sentence in _sections(document):
        wording = f'What does "{document.title}" say about {heading}?'
        made = _made(document, "section", sentence, [wording, f"{document.title} {heading}"], start)
        if made is not None and comparison_key(wording) not in taken:
            taken.add(comparison_key(wording))
            yield made


def _made(document: Document, kind: str, answer: str, wordings: list[str], start: int) -> MadeQuestion | None:
    if not is_sound(wordings[0], answer, document):
        return None
    rewrites = [text for text in wordings[1:] if not contains_answer(text, [answer])]
    number = f"{stable_hash(kind, wordings[0]):016x}"[:8]
    example = Example(f"{document.id}:{number}", wordings[0], (answer,), (document.id,), tuple(dict.fromkeys(rewrites)))
    return MadeQuestion(example, kind, start)


def _sentences(text: str) -> Iterator[tuple[int, str]]:
    """Plain statements with their offsets: no headings, tables, code, questions or sentences that lean on others."""
    for start, stop in itertools.pairwise([*sentence_starts(text), len(text)]):
        raw = text[start:stop].strip()
        sentence = " ".join(_MARKUP.sub(lambda match: match.group(1) or "", _LIST_MARK.sub("", raw)).split())
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
        and any(word.lower() in AUXILIARIES or word in _VERBS or word.endswith("ed") for word in words[1:])
    )


def _of_sentence(sentence: str, document: Document) -> Iterator[tuple[str, str, list[str]]]:
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
        asked = wh.format(**{key: value.lower() for key, value in match.groupdict().items() if key != "a"})
        gap = body[: match.start()] + match.group().replace(answer, "____") + body[match.end() :]
        in_place = f"{body[: match.start()]}{asked}{body[match.end() :]}".strip()
        yield kind, answer, _wordings(body, match.span(), asked.strip(), in_place, gap, document)
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
            yield "subject", subject["a"], [asked, f"____ {subject['rest']}.", _keywords(subject["rest"])]
    definition = _DEFINITION.match(body)
    if definition and any(word[0].isupper() for word in _small_start(definition["s"]).split()):
        answer = _DEFINITION_END.sub("", definition["a"]).strip()
        subject_text = _small_start(definition["s"])
        verb = definition["v"]
        wordings = [f"What {verb} {subject_text}?", f"{definition['s']} {verb} what?", f"define {subject_text}"]
        if len(answer.split()) >= 2 and not set(definition["s"].lower().split()) & (
            AUXILIARIES | PREPOSITIONS - {"of"}
        ):
            yield "definition", answer, [f"What kind of thing {verb} {subject_text}?", *wordings]


def _wordings(body: str, span: tuple[int, int], asked: str, in_place: str, gap: str, document: Document) -> list[str]:
    """The question first, then its other wordings."""
    own = [_capital(f"{in_place}?"), f"Fill in the gap: {gap}."]
    front = _fronted(body, span, asked)
    if front is not None:
        own = [front, *(own if span[0] else own[1:])]
    if span[0] == 0 and front is None:
        return [""]  # "In which year, the mill burnt down?" is no question; an empty one is not sound
    title = document.title
    says = _says_something(title) and not contains_answer(in_place, [title])
    context = f'According to "{title}", {_small_start(in_place)}?' if says else None
    if _is_anchored(in_place):
        return [*own, _keywords(in_place), *([context] if context else [])]
    return [context, *own] if context else [""]


def _fronted(body: str, span: tuple[int, int], asked: str) -> str | None:
    """``In which year did Mara paint the door?``: the wh-phrase first, where subject and verb are easy to tell."""
    after = body[span[1] :]
    if span[0] == 0:  # "In 1841 the harbour was dug": all of the clause comes after
        words, after = after.lstrip(", ").split(), ""
    else:
        words = body[: span[0]].split()
    at = next((at for at, word in enumerate(words) if at and (word in BE | HAVE | MODAL or word in _BASES)), None)
    if at is None or at > 6 or any(word.endswith(",") or word.lower() in PREPOSITIONS - {"of"} for word in words[:at]):
        return None
    tail = words[at + 1 :] + after.split()
    if {word.strip(",").lower() for word in tail} & (_RELATIVE | {"and", "but"}) or any("," in word for word in words):
        return None  # a second clause, whose verb would not move
    subject, verb, rest = _small_start(" ".join(words[:at])), words[at], " ".join(words[at + 1 :])
    if verb in BE | HAVE | MODAL:
        if verb in HAVE and not any(word in PARTICIPLES or word.endswith("ed") for word in words[at + 1 : at + 3]):
            return None  # "has 52 rooms": here it is the main verb
        return _tidy(f"{asked} {verb} {subject} {rest}{after}")
    return _tidy(f"{asked} did {subject} {_BASES[verb]} {rest}{after}")


def _sections(document: Document) -> Iterator[tuple[int, str, str]]:
    """Start, heading and first sentence of each section, where heading and title say something."""
    if not document.places or not _says_something(document.title):
        return
    ends = [place.start for place in document.places[1:]] + [len(document.text)]
    for place, stop in zip(document.places, ends, strict=True):
        heading = place.label.strip('"')
        if not place.label.startswith('"') or not _says_something(heading) or heading == document.title:
            continue
        for start, sentence in _sentences(document.text[place.start : stop]):
            if len(sentence.split()) <= 20:
                yield place.start + start, heading, sentence
            break


def _tidy(question: str) -> str:
    return _capital(" ".join(question.split()).replace(" ,", ",") + "?")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _small_start(text: str) -> str:
    """Without a capital that only marks the start of the sentence."""
    first, space, rest = text.partition(" ")
    return f"{first.lower()}{space}{rest}" if first.lower() in FUNCTION_WORDS else text


def _keywords(text: str) -> str:
    kept = [word.strip(",;:") for word in text.split() if word.lower() not in AUXILIARIES | {"the", "a", "an", "of"}]
    return " ".join(kept)


def _is_anchored(text: str) -> bool:
    """Whether a text names something that can be looked for: a capital inside it, or a number."""
    words = text.split()
    named = any(word[:1].isupper() and word != "I" for word in words[1:])
    opening = words[:1] and words[0][:1].isupper() and words[0].lower() not in FUNCTION_WORDS and len(words) > 1
    return named or any(character.isdigit() for character in text) or bool(opening and _looks_like_name(words))


def _looks_like_name(words: list[str]) -> bool:
    """``Arvon is``: a capital right before a verb; ``Farmers grow`` has one too, but no plural is a name here."""
    return _is_verb(words[1]) and not words[0].endswith("s")


def _is_verb(word: str) -> bool:
    return word in AUXILIARIES or word in _VERBS or word.endswith("ed")


def _says_something(title: str) -> bool:
    words = re.findall(r"[^\W\d_]{2,}", title)
    return (
        1 <= len(words) <= 12
        and sum(map(len, words)) >= 4
        and any(word.lower() not in FUNCTION_WORDS for word in words)
    )
