"""Every text that a model sees is put together here, and what the generator writes is taken apart
here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from invar_ray.errors import RequestError

REFUSAL = "The passages do not answer the question."
"""What the generator says when the passages do not help; the target of distractor-only examples."""

INSTRUCTION = (
    "Answer the question with a passage below and give its number, like this: answer [number]. "
    f"If none answers it, say: {REFUSAL}"
)
"""What stands above the passages."""

_STYLE = (
    "What follows says how to word the answer. It is no source: the answer stands in the passages, "
    "and what they do not say is not answered."
)

_CITATION = re.compile(r"\[\s*\d+(?:\s*[,;\-\u2013]\s*\d+)*\s*\]")
_RANGE = re.compile(r"(\d+)(?:\s*[-\u2013]\s*(\d+))?")
_NEXT_BLOCK = re.compile(r"\n\s*(?:Question|Answer|Passages?)\s*:|\n\s*\n", re.IGNORECASE)


@dataclass(frozen=True)
class ParsedAnswer:
    """What the generator wrote.

    Attributes:
        text: the answer without citation marks.
        numbers: cited passages, 1-based, in the order of their first mention, each once; none for a
            refusal.
        removed_citations: numbers cited that no passage of the prompt has, one for each mention
            (for a refusal, which cites nothing, the good ones too).
        refused: True where the text is :data:`REFUSAL`.
    """

    text: str
    numbers: tuple[int, ...]
    removed_citations: tuple[int, ...]
    refused: bool


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt within its budget.

    Attributes:
        prompt: the text for the model.
        passages: (title, text) as they stand in it; number n is ``passages[n - 1]``.
        kept: their indices in what was given.
        notes: what was left out or cut, and why.
    """

    prompt: str
    passages: list[tuple[str, str]]
    kept: list[int]
    notes: list[str]


def format_query(question: str, prefix: str) -> str:
    """The encoder's input for a question: ``{prefix}{question}``; the encoder appends its end
    token.
    """
    return f"{prefix}{_one_line(question)}"


def format_passage(title: str, text: str, prefix: str) -> str:
    """The encoder's input for a passage: ``{prefix}{title} {text}``; the encoder appends its end
    token.
    """
    return f"{prefix}{_one_line(f'{title} {text}')}"


def format_answer_prompt(question: str, passages: Sequence[tuple[str, str]]) -> str:
    """The generator's prompt: the question, numbered passages, the question again, ``Answer:``.

    Each passage is one line (``[1] title: text``), so that no passage can look like the question or
    like another one. A causal model reads a passage without knowing what comes after it: with the
    question in front it can read *for* the question [ours; compare re-reading, arXiv 2309.06275].
    Without passages the prompt is closed-book: the question alone.  The answer follows after a
    space (``prompt + " " + format_target(...)``).

    Args:
        question: the user's wording.
        passages: (title, text), best first.
    """
    if not passages:
        return f"Answer the question.\n\nQuestion: {_one_line(question)}\nAnswer:"
    lines = []
    for number, (title, text) in enumerate(passages, start=1):
        head = f"{_one_line(title)}: " if title.strip() else ""
        lines.append(f"[{number}] {head}{_one_line(text)}")
    asked, listing = f"Question: {_one_line(question)}", "\n".join(lines)
    return f"{INSTRUCTION}\n\n{asked}\n\n{listing}\n\n{asked}\nAnswer:"


def format_style(style: str) -> str:
    """The system message of a chat model that was not trained on :func:`format_answer_prompt`
    alone: an application's wishes, with what they may decide.
    """
    return f"{_STYLE}\n\n{style.strip()}"


def fit_prompt(
    question: str,
    passages: Sequence[tuple[str, str]],
    count_tokens: Callable[[str], int],
    budget: int,
) -> FittedPrompt:
    """The prompt with as many passages as fit, dropped from the worst rank up.

    If not even the first fits, its text is cut at a word and the cut noted; if no word of it fits,
    no passage is kept.

    Args:
        question: the user's wording.
        passages: (title, text), best first.
        count_tokens: tokens of a text, special tokens included if the model adds them.
        budget: most tokens of the prompt: the model's context less the answer's.

    Raises:
        RequestError: the question alone exceeds the budget.
    """
    given = list(passages)
    count, size = _count_fitting(question, given, count_tokens, budget)
    if count == 0 and given:
        return _cut_first(question, given, count_tokens, budget, size)
    notes = [] if count == len(given) else [_dropped_note(given, count, size, budget)]
    return FittedPrompt(
        format_answer_prompt(question, given[:count]), given[:count], list(range(count)), notes
    )


def format_target(answer: str, number: int | None) -> str:
    """What the generator learns to write: ``Paris [2]``; without a number, the answer alone."""
    clean = _one_line(answer)
    return clean if number is None else f"{clean} [{number}]"


def parse_answer(text: str, num_passages: int) -> ParsedAnswer:
    """Take the generator's text apart.

    Marks may be spaced as WordPiece decodes them (``[ 2 ]``), joined (``[1][2]``), listed
    (``[1, 2]``) or ranges (``[1-3]``).  Text after an empty line or a new ``Question:`` is dropped.

    Args:
        text: what was generated.
        num_passages: passages in the prompt; other numbers are removed and counted.
    """
    block = _NEXT_BLOCK.split(text.strip(), maxsplit=1)[0]
    numbers: list[int] = []
    removed: list[int] = []
    for mark in _CITATION.finditer(block):
        for number in _mentioned(mark.group(), num_passages):
            if not 1 <= number <= num_passages:
                removed.append(number)
            elif number not in numbers:
                numbers.append(number)
    clean = _clean(_CITATION.sub(" ", block))
    refused = _letters(clean).startswith(_letters(REFUSAL))
    if refused:
        return ParsedAnswer(REFUSAL, (), (*removed, *numbers), True)
    return ParsedAnswer(clean, tuple(numbers), tuple(removed), False)


def _mentioned(mark: str, num_passages: int) -> list[int]:
    numbers: list[int] = []
    for match in _RANGE.finditer(mark):
        first, last = match.group(1), match.group(2)
        # int() of thousands of digits would raise, and no passage has such a number.
        low = int(first[:9])
        high = low if last is None else int(last[:9])
        if last is not None and 1 <= low <= high <= num_passages:
            numbers += range(low, high + 1)
        else:
            numbers += [low] if last is None else [low, high]
    return numbers


def _count_fitting(
    question: str, given: list[tuple[str, str]], count_tokens: Callable[[str], int], budget: int
) -> tuple[int, int]:
    """How many of the best passages fit, and the tokens of the prompt with one more (with all,
    where all fit).
    """
    size = count_tokens(format_answer_prompt(question, []))
    if size > budget:
        raise RequestError(
            f"the question takes {size} tokens with the words around it",
            expected=f"at most {budget} tokens",
            action="shorten the question",
        )
    for count in range(1, len(given) + 1):  # upwards: a long list costs little more than what fits
        size = count_tokens(format_answer_prompt(question, given[:count]))
        if size > budget:
            return count - 1, size
    return len(given), size


def _dropped_note(given: list[tuple[str, str]], count: int, size: int, budget: int) -> str:
    names = ", ".join(
        f"[{number}] {given[number - 1][0]}".strip() for number in range(count + 1, len(given) + 1)
    )
    plural = "s" if len(given) - count > 1 else ""
    return (
        f"passage{plural} {names} left out: with [{count + 1}] the prompt takes {size} tokens, "
        f"{budget} are allowed"
    )


def _cut_first(
    question: str,
    given: list[tuple[str, str]],
    count_tokens: Callable[[str], int],
    budget: int,
    size: int,
) -> FittedPrompt:
    title, text = given[0]
    words = text.split()
    low, high = 0, len(words)  # low words fit (0: not tried), high do not
    while high - low > 1:
        middle = (low + high) // 2
        if (
            count_tokens(format_answer_prompt(question, [(title, " ".join(words[:middle]))]))
            <= budget
        ):
            low = middle
        else:
            high = middle
    why = f"with it the prompt takes {size} tokens, {budget} are allowed"
    notes = [_dropped_note(given, 1, size, budget)] if len(given) > 1 else []
    if low == 0:
        notes = [f"passage [1] {title} left out: {why}", *notes]
        return FittedPrompt(format_answer_prompt(question, []), [], [], notes)
    kept = [(title, " ".join(words[:low]))]
    notes = [f"passage [1] {title} cut to its first {low} of {len(words)} words: {why}", *notes]
    return FittedPrompt(format_answer_prompt(question, kept), kept, [0], notes)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _letters(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())


def _clean(text: str) -> str:
    """Undo what WordPiece decoding does to spacing; text that is spaced as people write stays as it
    is.
    """
    text = re.sub(r"\s*##", "", _one_line(text))
    spaced = text == text.lower() or re.search(r"\w [.,;:!?%)\]](?: |$)", text) is not None
    text = re.sub(r"(?<=\d) ([.,:]) (?=\d)", r"\1", text)
    text = re.sub(r"(?<!\w)(\w) \. (?=\w \.)", r"\1.", text)  # u . s . -> u.s .
    text = re.sub(r" ([.,;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    text = re.sub(r"([$€£]) (?=\d)", r"\1", text)
    text = re.sub(r"(?<=\w) ['’] (?=(?:s|t|re|ve|ll|d|m)\b)", "'", text)
    text = re.sub(r"(?<!\w)([odlOD]) ['’] (?=\w)", r"\1'", text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    if spaced:
        text = re.sub(r"(?<=\w) ([-/\u2013]) (?=\w)", r"\1", text)
        text = re.sub(r"(?<!\w)([a-z])\. (?=[a-z]\.)", r"\1.", text)
    return text.strip(" ,;:")
