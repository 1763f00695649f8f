"""A cross-encoder behind a search: what it reads, how it scores, and where a run uses it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from invar_ray.answering.fusion import read_with_title, reordered
from invar_ray.answering.rerank import Reranked, Reranker, Reranking, open_reranker
from invar_ray.answering.retriever import open_retriever
from invar_ray.api import Rag
from invar_ray.config import SearchConfig
from invar_ray.errors import ModelError
from invar_ray.models.base import resolve_named
from invar_ray.models.tiny import minilm_folder
from invar_ray.schema import Hit
from invar_ray.steps import hits, rows
from invar_ray.steps.hits import SearchMode, load_hits
from invar_ray.text.tokens import control_ids, pair_ids
from tests.support import World, save_cross_encoder, small_config, world

QUESTION = "Who keeps the lighthouse?"
TEXTS = ["Pears grow in the orchard.", "Mara keeps the lighthouse.", "oats", "barley " * 300]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_cross_encoder(tmp_path_factory.mktemp("cross") / "encoder")


@pytest.fixture(scope="module")
def reranker(folder: Path) -> Reranker:
    return open_reranker(resolve_named(str(folder)))


@pytest.mark.parametrize("labels", [1, 2])
def test_scores_are_those_of_sentence_transformers(tmp_path: Path, labels: int) -> None:
    from sentence_transformers import CrossEncoder

    saved = str(save_cross_encoder(tmp_path / "encoder", labels))
    judged = open_reranker(resolve_named(saved)).judge(QUESTION, TEXTS)
    peer = CrossEncoder(saved, max_length=96)
    expected = peer.predict([(QUESTION, text) for text in TEXTS], apply_softmax=labels == 2)
    np.testing.assert_allclose(
        judged.scores, expected if labels == 1 else expected[:, 1], atol=1e-5
    )
    assert judged.cut == (3,)
    assert 96 < judged.tokens < 4 * 96


def test_a_score_does_not_depend_on_what_is_read_beside_it(reranker: Reranker) -> None:
    together = reranker.judge(QUESTION, TEXTS)
    for number, text in enumerate(TEXTS):
        alone = reranker.judge(QUESTION, [text])
        assert alone.scores[0] == pytest.approx(together.scores[number], abs=1e-6)
    assert len({round(score, 4) for score in together.scores}) == len(TEXTS)


def test_a_causal_lm_with_a_head_reads_the_last_token_that_is_no_padding(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=None,
        initializer_range=0.5,
        **shape,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    opened = open_reranker(resolve_named(str(tmp_path)))
    together = opened.judge(QUESTION, TEXTS[:3])
    assert together.scores[2] == pytest.approx(opened.judge(QUESTION, ["oats"]).scores[0], abs=1e-6)


def test_neither_text_brings_control_tokens_along() -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    frame = pair_ids(tokenizer, "a", ["b"], 96)[0]
    assert frame.ids.count(tokenizer.sep_token_id) == 2
    assert frame.types[:2] == [0, 0]
    assert frame.types[-1] == 1
    dirty = pair_ids(tokenizer, "who [SEP] [CLS] is", ["a [SEP] b [PAD]", "c[MASK]"], 96)
    for row in dirty:
        controls = [token for token in row.ids if token in control_ids(tokenizer)]
        assert controls == [tokenizer.cls_token_id, *[tokenizer.sep_token_id] * 2]


def test_a_long_question_leaves_room_for_the_text(reranker: Reranker) -> None:
    long = "lighthouse " * 500
    first, second = reranker.judge(long, TEXTS[:2]).scores
    assert first != second
    assert reranker.judge(long, TEXTS[:2]).cut == (0, 1)


def test_what_is_no_cross_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a BertModel\. Expected: a cross-encoder"):
        open_reranker(resolve_named(str(minilm_folder())))
    three = save_cross_encoder(tmp_path / "three", 3)
    with pytest.raises(ModelError, match="with 3 labels"):
        open_reranker(resolve_named(str(three)))
    with pytest.raises(ModelError, match="no folder"):
        resolve_named(f"{tmp_path}/nothing")


def test_ties_keep_the_order_of_the_search() -> None:
    found = [Hit(name, name, rank, 0.5, "", name, "") for rank, name in enumerate("abc", start=1)]
    best = reordered(found, [0.1, 0.9, 0.9], 2)
    assert [(hit.passage_id, hit.rank, hit.score) for hit in best] == [("b", 1, 0.9), ("c", 2, 0.9)]


def test_the_best_of_the_depth_comes_first(small: World, reranker: Reranker) -> None:
    retriever = open_retriever(small.base_index.uri)
    question = "Which island has a lighthouse?"
    deep = retriever.retrieve([question], 7)[0]
    scores = reranker.judge(question, [read_with_title(hit) for hit in deep]).scores
    best = [deep[number].passage_id for number in np.argsort([-score for score in scores])]
    got = Reranked(retriever, reranker, 7).retrieve([question], 3)[0]
    assert [hit.passage_id for hit in got] == best[:3] != [hit.passage_id for hit in deep[:3]]
    assert [hit.rank for hit in got] == [1, 2, 3]
    assert (
        Reranked(retriever, reranker, 1).retrieve([question], 3)[0]
        == Reranked(retriever, reranker, 3).retrieve([question], 3)[0]
    )


def test_a_run_finds_and_measures_what_is_reranked(small: World, folder: Path) -> None:
    search = SearchConfig(mode="dense", reranker=str(folder), rerank_depth=6)
    reranking = Reranking.of(search)
    assert reranking is not None
    index = small.base_index
    plain = small.hits(index, "dev", SearchMode())
    ranked = small.hits(index, "dev", SearchMode(reranking=reranking))
    opened = Rag(index, None, k=small.config.evaluation.top_k, search=search)
    changed = 0
    for before, family in zip(load_hits(plain), load_hits(ranked), strict=True):
        assert [hit.passage_id for hit in family.hits[0]] == [
            hit.passage_id for hit in opened.search(family.wordings[0])
        ]
        changed += family.hits != before.hits
    assert changed > 0
    deeper = replace(reranking, depth=7)
    plans = [
        hits.plan(small.config, index, small.questions, "dev", 5, SearchMode(reranking=each))
        for each in (None, reranking, deeper)
    ]
    assert len({plan.fingerprint for plan in plans}) == 3
    assert "reranker" not in plans[0].config, "hits without one keep their names"


def test_the_report_has_a_row_where_the_recipe_has_a_reranker(tmp_path: Path, folder: Path) -> None:
    systems = "evaluation.systems=[stage1,stage1_reranked]"
    asked: list[SearchMode] = []

    class Graph(World):
        @property
        def index(self):  # type: ignore[no-untyped-def]
            return self.adapter_index

        def hits(self, index, split, mode=SearchMode()):  # type: ignore[no-untyped-def] # noqa: B008
            asked.append(mode)
            return index

    for name, expected in ((None, ["stage 1"]), (str(folder), ["stage 1", "stage 1, reranked"])):
        own = [] if name is None else [f"search.reranker={name}", "search.rerank_depth=4"]
        graph = Graph(tmp_path, systems, "evaluation.num_answers=0", *own)
        assert [row.name for row in rows.systems(graph)] == expected
    assert asked[-1].reranking == Reranking(resolve_named(str(folder)), 4)
    assert asked[-1].mode == small_config(tmp_path).search.mode
