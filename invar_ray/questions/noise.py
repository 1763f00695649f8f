"""Noise kinds of the rule-based rewriter: how a question looks when typed in haste or heard by a
machine.

Each is a pure function ``(question, generator) -> str``.  The kinds follow NoiseQA (Ravichander et
al., EACL 2021: keyboard, speech recognition); no sentence comes from there.
"""

from __future__ import annotations

import random
import re
import string

from invar_ray.questions.lexicon import CONTRACTIONS, FILLERS, HOMOPHONES, NEIGHBOURS
from invar_ray.questions.numbers import numbers_to_words

# Share of a question's words that get a typo, at most: NoiseQA's keyboard noise hits about one in
# five.
_TYPO_SHARE = 0.2
_SHORTEST_TYPO = 4


def typo(question: str, generator: random.Random) -> str:
    """Keyboard slips: neighbouring key, swapped, dropped or doubled letter.

    At most one in five words (at least one word) has one slip each, in words of four letters or
    more, never in the first letter, never in a word with a digit.  Returns the question as it is
    where no word qualifies.
    """
    words = question.split(" ")
    open_to_slips = [
        index
        for index, word in enumerate(words)
        if sum(character.isalpha() for character in word) >= _SHORTEST_TYPO
        and not any(character.isdigit() for character in word)
    ]
    if not open_to_slips:
        return question
    most = max(1, int(len(words) * _TYPO_SHARE))
    for index in generator.sample(
        open_to_slips, min(len(open_to_slips), generator.randint(1, most))
    ):
        words[index] = _slip(words[index], generator)
    return " ".join(words)


def speech(question: str, generator: random.Random) -> str:
    """What a speech recogniser writes down: no capitals, no punctuation, numbers in words,
    contractions, now and then a homophone (at most two), a filler or a repeated first word.
    """
    spelled = numbers_to_words(question)
    spelled = (
        re.sub(r"(?<=\w)[-/\u2013\u2014](?=\w)", " ", spelled)
        .replace("&", " and ")
        .replace("%", " percent")
    )
    kept = "".join(
        c
        for c in spelled.lower().replace("’", "'")
        if c not in string.punctuation.replace("'", "") + "“”«»"
    )
    words = [word.strip("'") for word in kept.split()]
    words = _contract([word for word in words if word])
    swappable = [index for index, word in enumerate(words) if word in HOMOPHONES and index > 0]
    for index in generator.sample(swappable, min(len(swappable), generator.choice((0, 1, 1, 2)))):
        words[index] = HOMOPHONES[words[index]]
    slip = generator.random()
    if words and slip < 0.35:
        words.insert(generator.randint(0, len(words) - 1), generator.choice(FILLERS))
    elif words and slip < 0.5:
        words.insert(0, words[0])
    return " ".join(words)


def case(question: str, generator: random.Random) -> str:
    """Case and punctuation only: small letters, capitals, title case, no apostrophes or commas, no
    question mark.
    """
    bare = question.rstrip(" ?.!")
    unpunctuated = "".join(character for character in bare if character not in "',;:\"’“”")
    forms = [
        bare.lower(),
        question.upper(),
        " ".join(word[:1].upper() + word[1:] for word in bare.split(" ")),
        unpunctuated.lower(),
        f"{unpunctuated.lower()}??",
        f"{bare[:1].upper()}{bare[1:]}?",
        f"{bare} ?",
    ]
    changed = [form for form in dict.fromkeys(forms) if form != question]
    return generator.choice(changed)


def _slip(word: str, generator: random.Random) -> str:
    letters = [index for index, character in enumerate(word) if character.isalpha()][1:]
    index = generator.choice(letters)
    character = word[index]
    ways = ["neighbour"] * 3 + ["drop", "double", "swap"]
    way = generator.choice(ways)
    if way == "swap":
        pairs = [
            at for at in letters if at + 1 in letters and word[at].lower() != word[at + 1].lower()
        ]
        if pairs:
            at = generator.choice(pairs)
            return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if way == "drop":
        return word[:index] + word[index + 1 :]
    near = NEIGHBOURS.get(character.lower())
    if way == "double" or near is None:
        return word[:index] + character + word[index:]
    swapped = generator.choice(near)
    return word[:index] + (swapped.upper() if character.isupper() else swapped) + word[index + 1 :]


def _contract(words: list[str]) -> list[str]:
    out: list[str] = []
    index = 0
    while index < len(words):
        pair = tuple(words[index : index + 2])
        if len(pair) == 2 and (pair[0], pair[1]) in CONTRACTIONS:
            out.append(CONTRACTIONS[(pair[0], pair[1])])
            index += 2
        else:
            out.append(words[index])
            index += 1
    return out
