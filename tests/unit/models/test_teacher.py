"""The teacher (``coarse``) against the sentence-transformers package itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3Model

from invar_ray.config import CoarseConfig
from invar_ray.errors import ModelError
from invar_ray.models.encoder import coarse_spec, open_encoder
from invar_ray.store.artifacts import Store
from tests.support import documents, save_bert, save_word_tokenizer

INSTRUCTION = "Instruct: Given a web search query, retrieve passages that answer it\\nQuery:"
KINDS: dict[str, tuple[str, str, dict[str, str]]] = {
    # kind -> architecture, pooling, prompts in its own files
    "bge": ("bert", "cls", {"query": "Represent this sentence for searching relevant passages: "}),
    "e5": ("bert", "mean", {"query": "query: ", "document": "passage: "}),
    "qwen3": ("qwen3", "lasttoken", {"query": INSTRUCTION, "document": ""}),
    "plain": ("bert", "mean", {}),
}
TEXTS = [row["text"] for row in documents()[:6]]
QUESTIONS = [" ".join(text.split()[:5]) for text in TEXTS]
PASSAGES = [(f"Number {number}" * (number % 2), text * 3) for number, text in enumerate(TEXTS)]


def save(folder: Path, kind: str) -> str:
    """A model of random weights with the files that sentence-transformers writes beside them."""
    architecture, pooling, prompts = KINDS[kind]
    if architecture == "bert":
        save_bert(folder)
    else:
        folder.mkdir()
        torch.manual_seed(3)
        words = save_word_tokenizer(folder)
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        Qwen3Model(Qwen3Config(vocab_size=words, **sizes, **layers)).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    modes = {f"pooling_mode_{mode}": False for mode in ("cls_token", "mean_tokens", "lasttoken")}
    name = next(mode for mode in modes if mode.removeprefix("pooling_mode_").startswith(pooling))
    values = {"word_embedding_dimension": width, **modes, name: True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(values))
    parts = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_N", "Normalize")]
    (folder / "2_N").mkdir()
    modules = [
        {"idx": int(n), "name": n, "path": path, "type": f"sentence_transformers.models.{part}"}
        for n, path, part in parts
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    described = {"prompts": prompts, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(described))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 60}')
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_gives_what_sentence_transformers_gives(tmp_path: Path, kind: str) -> None:
    package = pytest.importorskip("sentence_transformers")
    folder = save(tmp_path / kind, kind)
    theirs = package.SentenceTransformer(folder, device="cpu")
    spec = coarse_spec(CoarseConfig(model=folder))
    short = replace(spec, query_max_tokens=60, passage_max_tokens=60)
    ours = open_encoder(short, Store(str(tmp_path / "store")))
    pairs = [
        (ours.encode_queries(QUESTIONS), theirs.encode_query(QUESTIONS)),
        (
            ours.encode_passages(PASSAGES),
            theirs.encode_document([f"{title} {text}".strip() for title, text in PASSAGES]),
        ),
    ]
    for one, other in pairs:
        assert ((one * other).sum(axis=1) >= 0.9999).all()
    # Prompts and pooling are part of what it is.
    bare = replace(CoarseConfig(model=folder), query_prefix="", passage_prefix="")
    assert (coarse_spec(bare).fingerprint == spec.fingerprint) is (kind == "plain")
    if kind in {"bge", "e5", "qwen3"}:
        plain = open_encoder(coarse_spec(bare), Store(str(tmp_path / "store")))
        cosines = (plain.encode_queries(QUESTIONS) * pairs[0][1]).sum(axis=1)
        assert float(np.min(cosines)) < 0.9999


def test_a_teacher_with_another_part_is_refused(tmp_path: Path) -> None:
    folder = Path(save(tmp_path / "x", "plain"))
    modules = json.loads((folder / "modules.json").read_text())
    modules.append(
        {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.Dense"}
    )
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="has a part that is not known here: Dense"):
        coarse_spec(CoarseConfig(model=str(folder)))
