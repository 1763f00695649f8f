"""A small WordPiece vocabulary out of MiniLM's: the tokens that texts use most, and every single character."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_BATCH = 1000


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[int]:
    """How often each token id occurs in ``texts``."""
    tokenizer.encode_special_tokens = True  # what stands in a text is no control token
    counts: Counter[int] = Counter()
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            _add(counts, tokenizer, batch)
            batch = []
    _add(counts, tokenizer, batch)
    return counts


def prune_tokenizer(
    tokenizer_json: Path, counts: Counter[int], size: int, max_positions: int
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The tokenizer with ``size`` of its tokens.

    WordPiece takes the longest piece that it knows, so a word whose token is gone falls into pieces that are kept; all
    single characters that occurred stay, so that nothing becomes unknown that was known.

    Args:
        tokenizer_json: of a WordPiece tokenizer.
        counts: from :func:`count_tokens`; ties are broken by id.
        size: tokens to keep, special ones and characters included.
        max_positions: longest input of the model.

    Returns:
        The tokenizer, which adds no special tokens by itself and ends texts in ``[SEP]``, and the old id of each new
        one.

    Raises:
        ValueError: if the special tokens and characters alone are more than ``size``.
    """
    spec = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    text_of = {old: text for text, old in vocabulary.items()}
    kept = [vocabulary[text] for text in SPECIAL]
    for text, old in sorted(vocabulary.items(), key=lambda item: item[1]):
        bare = text.removeprefix("##")
        if len(bare) == 1 and (counts[old] or ord(bare) < 128):
            kept.append(old)
    if len(kept) > size:
        raise ValueError(f"{len(kept)} special tokens and characters do not fit into {size} tokens")
    have = set(kept)
    common = sorted((old for old in counts if old not in have), key=lambda old: (-counts[old], old))
    kept = kept[: len(SPECIAL)] + sorted(kept[len(SPECIAL) :] + common[: size - len(kept)])
    spec["model"]["vocab"] = {text_of[old]: new for new, old in enumerate(kept)}
    for added in spec["added_tokens"]:
        added["id"] = spec["model"]["vocab"][added["content"]]
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        eos_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=max_positions,
    )
    return tokenizer, kept


def _add(counts: Counter[int], tokenizer: Tokenizer, batch: list[str]) -> None:
    for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
        counts.update(encoding.ids)
