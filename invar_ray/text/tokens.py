"""The one door through which texts become token ids: what stands in a text is never a control
token.

A document or a question may hold ``<|im_end|>``, ``</s>`` or ``[SEP]`` literally. A tokenizer reads
such a string as the real token, and whoever wrote the text could end it, open a turn, or stop the
model. Here these strings are read letter by letter; control tokens come from the frame alone: the
tokenizer's own template (start token, ``[CLS]`` ..) and the end tokens that the callers append.
The ids of a text that holds no such string are what the tokenizer itself gives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from invar_ray.errors import ModelError

_CONTROL_FORM = re.compile(r"<[|\uff5c][^<>\s]{1,64}[|\uff5c]>")
# Breaking a control string apart could put another one together; this often at most. [ours]
_ROUNDS = 8
_known: WeakKeyDictionary[Any, tuple[int, frozenset[int]]] = WeakKeyDictionary()


def text_ids(
    tokenizer: Any, texts: Sequence[str], *, max_tokens: int | None = None, framed: bool = True
) -> list[list[int]]:
    """Token ids of texts from outside, one row each.

    Args:
        tokenizer: a Hugging Face *fast* tokenizer.
        texts: whatever they hold, no control token but the frame's comes out.
        max_tokens: cut rows to this length, the frame included; ``None`` leaves them whole.
        framed: add what the tokenizer's template adds (start token, ``[CLS] .. [SEP]``).

    Raises:
        ModelError: the tokenizer is not a fast one.
    """
    encodings = _encodings(tokenizer, texts, max_tokens, framed)
    controls = control_ids(tokenizer)
    rows = []
    for text, encoding in zip(texts, encodings, strict=True):
        # Two kinds get past `split_special_tokens`: tokens that are added without being marked as
        # special, and pieces of a Unigram vocabulary.
        ids: list[int] = encoding.ids
        if _own_controls(tokenizer, controls, text, encoding):
            text = _apart(tokenizer, text, split=True)
            encoding = _encodings(tokenizer, [text], max_tokens, framed)[0]
            left = set(_own_controls(tokenizer, controls, text, encoding))
            ids = [token for place, token in enumerate(encoding.ids) if place not in left]
        rows.append(ids)
    return rows


@dataclass(frozen=True, slots=True)
class Pair:
    """A question and a text in one row, in the tokenizer's own frame for two.

    Attributes:
        ids: the tokens.
        types: of each, whether it is of the first (0) or of the second (1), where the model asks.
        cut: the end of the question or of the text was left out.
    """

    ids: list[int]
    types: list[int]
    cut: bool

    def __len__(self) -> int:
        return len(self.ids)


def pair_ids(tokenizer: Any, question: str, texts: Sequence[str], max_tokens: int) -> list[Pair]:
    """Rows of a question with each of some texts; a long text is cut at its end, a question at half
    of the row.

    Raises:
        ModelError: the tokenizer is not a fast one.
    """
    starts = token_starts(tokenizer, question)
    cut = len(starts) > max_tokens // 2
    if cut:
        question = question[: starts[max_tokens // 2]]
    controls = control_ids(tokenizer)

    def clean(of: Sequence[str]) -> list[str]:
        """As in :func:`text_ids`; strings that are read as a control token are rare."""
        encodings = _encodings(tokenizer, of, None, False)
        return [
            _apart(tokenizer, text, split=True)
            if _own_controls(tokenizer, controls, text, encoding)
            else text
            for text, encoding in zip(of, encodings, strict=True)
        ]

    question = clean([question])[0]
    rows = []
    for encoding in _encodings(
        tokenizer, [(question, text) for text in clean(texts)], max_tokens, True
    ):
        kept = [
            place
            for place, (token, framed) in enumerate(
                zip(encoding.ids, encoding.special_tokens_mask, strict=True)
            )
            if framed or token not in controls or token == tokenizer.unk_token_id
        ]
        ids = [encoding.ids[place] for place in kept]
        types = [encoding.type_ids[place] for place in kept]
        rows.append(Pair(ids, types, cut or bool(encoding.overflowing)))
    return rows


def token_starts(tokenizer: Any, text: str) -> list[int]:
    """The character at which each token of a text starts, ascending; no frame.

    Where :func:`text_ids` would have to break a string apart, each of its characters counts as a
    token: no fewer than come out.

    Raises:
        ModelError: the tokenizer is not a fast one.
    """
    encoding = _encodings(tokenizer, [text], None, False)[0]
    controls = set(_own_controls(tokenizer, control_ids(tokenizer), text, encoding))
    starts: list[int] = []
    for place, (start, end) in enumerate(encoding.offsets):
        starts += range(start, max(end, start + 1)) if place in controls else [start]
    return starts


def plain_text(tokenizer: Any, text: str) -> str:
    """The text for a server that tokenises by itself: a space inside each string that ``tokenizer``
    would read as a control token, or that has the form of one (``<|..|>``).  Any other text is
    unchanged.

    Raises:
        ModelError: the tokenizer is not a fast one.
    """
    text = _CONTROL_FORM.sub(lambda found: f"< {found.group()[1:]}", text)
    return _apart(tokenizer, text, split=False)


def control_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that mean something to a model beyond their text: special ones, and added ones
    that the chat template writes or that have the form ``<|..|>``.
    """
    size = len(tokenizer)
    found = _known.get(tokenizer)
    if found is None or found[0] != size:
        template = str(tokenizer.chat_template or "")
        added = {
            number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special
            or _CONTROL_FORM.fullmatch(token.content)
            or (token.content.strip() and token.content in template)
        }
        found = size, frozenset(added)
        _known[tokenizer] = found
    special = {
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.sep_token_id,
        tokenizer.pad_token_id,
    }
    return found[1] | (special - {None})


def _encodings(
    tokenizer: Any,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    max_tokens: int | None,
    framed: bool,
    *,
    split: bool = True,
) -> list[Any]:
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} does not say where its tokens stand in a text",
            expected="a fast tokenizer (tokenizer.json)",
        )
    if not texts:
        return []
    paired = not isinstance(texts[0], str)
    encoded = tokenizer(
        list(texts),
        add_special_tokens=framed,
        truncation=False if max_tokens is None else "only_second" if paired else "longest_first",
        max_length=max_tokens,
        split_special_tokens=split,
        return_attention_mask=False,
        verbose=False,  # no warning that a whole document is longer than the model's context
    )
    found: list[Any] = encoded.encodings
    return found


def _own_controls(tokenizer: Any, controls: frozenset[int], text: str, encoding: Any) -> list[int]:
    """Places of control tokens that the text brought along; those of the frame are marked as
    such.
    """
    places = [place for place, token in enumerate(encoding.ids) if token in controls]
    if places:
        framed = encoding.special_tokens_mask
        places = [place for place in places if not framed[place]]
    if not places:  # nearly always; offsets are costly to ask for
        return []
    offsets, unknown = encoding.offsets, tokenizer.unk_token_id

    def is_written(place: int) -> bool:
        # A character that the vocabulary lacks becomes the unknown token too, and may stay so.
        start, end = offsets[place]
        return encoding.ids[place] != unknown or str(tokenizer.unk_token) in text[start:end]

    return [place for place in places if is_written(place)]


def _apart(tokenizer: Any, text: str, *, split: bool) -> str:
    """The text with a space inside each string that is read as a control token."""
    for _ in range(_ROUNDS):
        encoding = _encodings(tokenizer, [text], None, False, split=split)[0]
        written = _own_controls(tokenizer, control_ids(tokenizer), text, encoding)
        spans = [encoding.offsets[place] for place in written]
        if not spans:
            break
        for start, end in reversed(spans):
            token = text[start:end]
            # some tokens take the white space before them along
            begin = len(token) - len(token.lstrip())
            broken = f"{token[: begin + 1]} {token[begin + 1 :]}" if len(token.strip()) > 1 else " "
            text = text[:start] + broken + text[end:]
    return text
