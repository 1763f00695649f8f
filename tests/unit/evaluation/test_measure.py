"""Hits and answers into columns, by hand; the baselines' hits from real artifacts."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from invar_ray.answering.fusion import fuse_hits, query_rewrites
from invar_ray.answering.retriever import open_retriever
from invar_ray.config import SearchConfig
from invar_ray.evaluation.calibration import risk_coverage
from invar_ray.evaluation.measure import (
    Answered,
    FoundFamily,
    answer_columns,
    between_questions,
    change_column,
    probability,
    ranked_documents,
    retrieval_columns,
)
from invar_ray.evaluation.scoring import answer_rule
from invar_ray.executor import Here
from invar_ray.models.generator import Generation
from invar_ray.models.precision import Precision
from invar_ray.pipeline import Pipeline
from invar_ray.schema import Hit
from invar_ray.steps import answers as steps_answers
from invar_ray.steps.answers import AnswerBlock, System, answer_tasks
from invar_ray.steps.hits import (
    SearchBlock,
    SearchMode,
    bm25_plan,
    load_hits,
)
from invar_ray.steps.hits import build_bm25 as build_bm25_hits
from invar_ray.steps.hits import plan as hits_plan
from invar_ray.steps.passages import load_documents
from invar_ray.steps.questions import load_examples, load_wordings
from invar_ray.store.artifacts import Artifact
from tests.support import World, world

RULE = answer_rule("squad")
PRECISIONS: tuple[Precision, Precision] = ("fp32", "bf16")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory)


def hits(names: str) -> tuple[Hit, ...]:
    """Passages of the documents named; two passages of one document are two letters."""
    return tuple(
        Hit(f"{n}{rank}", n, rank, 0.5, n, f"text {n}") for rank, n in enumerate(names, start=1)
    )


def family(
    name: str, *lists: str, gold: str = "g", answers: tuple[str, ...] = ("g",)
) -> FoundFamily:
    return FoundFamily(
        name,
        tuple(f"{name}{n}" for n in range(len(lists))),
        answers,
        tuple(gold),
        tuple(map(hits, lists)),
    )


def test_retrieval_by_hand() -> None:
    # Document a fills two passages before g: g's rank is 2.
    columns = retrieval_columns(
        [family("p", "aagb", "gab"), family("q", "xyz", "xyz", gold="")], 2, 5, RULE
    )
    assert columns["recall_at_1"] == [0.0, None]
    assert columns["recall_at_5"] == [1.0, None]
    assert "recall_at_20" not in columns
    assert columns["mrr_at_10"] == [0.5, None]
    assert columns["ndcg_at_10"] == [pytest.approx(1 / math.log2(3)), None]
    assert columns["map"] == [0.5, None]
    assert columns["worst_recall_at_1"] == [0.0, None]
    assert columns["overlap_at_2"] == [1.0, 1.0]
    assert columns["change_by_rewrite_at_2"] == [0.0, 0.0]
    # The answer "g" stands in the third passage of the first, and in none of the second.
    assert columns["answer_recall_at_5"] == [1.0, 0.0]
    assert columns["gold_rank_std"] == [0.5, None]


def test_questions_without_answers_or_hits() -> None:
    columns = retrieval_columns([family("p", "", "g", answers=())], 5, 20, RULE)
    assert columns["answer_recall_at_5"] == [None]
    assert columns["recall_at_20"] == [0.0]
    assert columns["overlap_at_5"] == [0.0]
    assert between_questions([family("p", "a")], 5) is None


def test_change_by_hand() -> None:
    first = [family("p", "abc", "x"), family("q", "abc")]
    second = [family("p", "abd", "y"), family("q", "abc")]
    assert change_column(first, second, 3) == [0.5, 0.0]  # of the anchors: 2 shared of 4
    with pytest.raises(ValueError, match="different questions"):
        change_column(first, second[::-1], 3)


def said(
    text: str, cited: str = "", shown: str = "ga", refused: bool = False, removed: int = 0
) -> Answered:
    return Answered(text, refused, -0.5, tuple(cited), tuple(shown), 0.1, removed)


def test_answers_by_hand() -> None:
    families = [family("p", "ga", "ag", "ag"), family("q", "ab", "ab"), family("r", "ab", gold="")]
    answers = [
        [said("G", "ga", removed=2), said("g"), said("other", removed=1)],
        [said("I do not know", shown="ab", refused=True), said("g")],
        [said("the g is it", "a", shown="ab")],
    ]
    columns = answer_columns(families, answers, RULE)
    assert columns["exact_match"] == [1.0, 0.0, 0.0]
    assert columns["accuracy"] == [1.0, 0.0, 1.0]
    assert columns["abstained"] == [0.0, 1.0, 0.0]
    assert columns["wrong_given"] == [0.0, 0.0, 0.0]
    guessed = [[replace(said("no"), unsure=unsure)] for unsure in (False, True, True)]
    assert answer_columns(families, guessed, RULE)["wrong_given"] == [1.0, 0.0, 0.0]
    # the second's anchor is wrong, the third has no rewrite
    assert columns["flip_rate"] == [
        0.5,
        None,
        None,
    ]
    # "G" and "g" are one answer, "other" is not; a refusal agrees with a refusal only
    assert columns["answer_agreement"] == [0.5, 0.0, None]
    assert columns["answer_agreement_f1"] == [0.5, 0.0, None]
    assert columns["citation_precision"] == [0.5, None, None]
    assert columns["removed_citations"] == [2.0, 0.0, 0.0]
    assert columns["citation_recall"] == [1.0, None, None]
    assert probability(said("x")) == pytest.approx(math.exp(-0.5))
    assert probability(Answered("x", False, None, (), (), 0.1)) is None


def test_the_order_of_passages_by_hand() -> None:
    families = [family(name, "ga", "ag") for name in "pqr"]
    again = "the g", "a", None  # right again; wrong; not asked
    answers = [[replace(said("g"), reordered=text)] for text in again]
    assert answer_columns(families, answers, RULE)["order_flip_rate"] == [0.0, 1.0, None]


def made(small: World) -> Artifact:
    plan = bm25_plan(small.passages, small.questions, "dev", 5)
    return small.get(
        plan, lambda building: build_bm25_hits(building, small.passages, small.questions)
    )


def test_bm25_finds_the_islands(small: World) -> None:
    families = load_hits(made(small))
    examples, wordings = (
        load_examples(small.questions, "dev"),
        load_wordings(small.questions, "dev"),
    )
    assert [f.question_id for f in families] == [example.id for example in examples]
    assert [list(f.wordings) for f in families] == [wordings[example.id] for example in examples]
    columns = retrieval_columns(families, 5, 5, RULE)
    assert sum(columns["recall_at_5"]) == len(examples)  # type: ignore[arg-type]
    assert all(len(found) == 5 for f in families for found in f.hits)


def test_hits_of_a_hybrid_search_are_those_that_a_service_would_find(small: World) -> None:
    index, wordings = small.base_index, ["What grows on the terraces of Kelda?"]
    block = SearchBlock(index.uri, 6, "fp32", mode="hybrid")
    (found,) = block({"block": 0, "wordings": [wordings]})["hits"][0]
    (served,) = open_retriever(index.uri, mode="hybrid").retrieve(wordings, 6)
    assert [hit["passage_id"] for hit in found] == [hit.passage_id for hit in served]


def test_stage_two_and_its_row_read_what_is_served(small: World) -> None:
    """``search.mode`` decides the hits of readings and of the row ``both``, and no other's."""
    config = replace(small.config, search=SearchConfig(mode="dense"))
    for run, mode in ((small, "hybrid"), (Pipeline(config, quiet=True, executor=Here()), "dense")):
        assert run.served == SearchMode(mode=mode)
        dev = hits_plan(run.config, small.base_index, small.questions, "dev", 5, run.served)
        assert dev.config["mode"] == mode


def test_search_fused_over_rewrites_of_each_wording_alone(small: World) -> None:
    index, wording = small.base_index, "What do farmers grow on Kelda?"
    plain = SearchBlock(index.uri, 4, "fp32")
    fused = SearchBlock(index.uri, 4, "fp32", num_rewrites=2, seed=3)
    alone = fused({"block": 0, "wordings": [[wording]]})["hits"][0][0]
    beside = fused({"block": 0, "wordings": [["Which crop comes from Lunna?", wording]]})["hits"][
        0
    ][1]
    assert alone == beside, "what another wording of the family says must not matter"
    texts = [wording, *query_rewrites(wording, 2, 3)]
    lists = plain({"block": 0, "wordings": [texts]})["hits"][0]
    wanted = fuse_hits([[Hit(**hit) for hit in found] for found in lists], 4)
    assert [hit["passage_id"] for hit in alone] == [hit.passage_id for hit in wanted]


def test_exact_search_equals_a_flat_index(small: World) -> None:
    approximate = small.with_factory("IVF2,Flat").base_index
    row = {
        "block": 0,
        "wordings": [["What do farmers grow on Kelda?", "When does the ferry leave Elvay?"]],
    }
    exact = SearchBlock(approximate.uri, 5, "fp32", exact=True)(row)["hits"]
    flat = SearchBlock(small.base_index.uri, 5, "fp32")(row)["hits"]
    ids = [[[hit["passage_id"] for hit in found] for found in block[0]] for block in (exact, flat)]
    assert ids[0] == ids[1]


def test_questions_in_the_other_precision_find_about_the_same(small: World) -> None:
    row = {
        "block": 0,
        "wordings": [["What do farmers grow on Kelda?", "When does the ferry leave Elvay?"]],
    }
    both = [
        SearchBlock(small.base_index.uri, 5, precision)(row)["hits"][0] for precision in PRECISIONS
    ]
    assert [[hit["score"] for hit in found] for found in both[0]] != [
        [hit["score"] for hit in found] for found in both[1]
    ], "bf16 on a CPU is bf16"
    for full, half in zip(*both, strict=True):
        assert {hit["passage_id"] for hit in full[:2]} & {hit["passage_id"] for hit in half[:2]}
        assert [hit["score"] for hit in full] == pytest.approx(
            [hit["score"] for hit in half], abs=0.02
        )


def test_the_mode_is_in_the_fingerprint_only_where_it_acts(small: World) -> None:
    def plan(mode: SearchMode) -> str:
        return hits_plan(
            small.config, small.base_index, small.questions, "dev", 5, mode
        ).fingerprint

    modes = [
        SearchMode(),
        SearchMode(2),
        SearchMode(3),
        SearchMode(exact=True),
        SearchMode(precision="bf16"),
        SearchMode(mode="bm25"),
        SearchMode(mode="hybrid"),
    ]
    assert len({plan(mode) for mode in modes}) == len(modes)


def test_gold_documents_make_the_oracle_rows(small: World, tmp_path: Path) -> None:
    bm25 = made(small)
    families = load_hits(bm25)[:2]
    gold = {name for family in families for name in family.positive_ids}
    documents = load_documents(small.passages, gold)
    assert set(documents) == gold
    system = System("base", bm25, "", shows_bounds=True)
    tasks = answer_tasks(system, families, documents, small.config)
    assert [task.label for task in tasks] == ["base", "base, closed book", "base, oracle passage"]
    assert [hit.document_id for hit in tasks[2].prompts[0][0][1]] == list(families[0].positive_ids)
    assert tasks[1].prompts[0][0] == (families[0].wordings[0], [])
    assert answer_tasks(System("BM25", bm25, None), families, documents, small.config) == []
    evaluation = replace(small.config.evaluation, answer_wordings=2, num_reworded_answers=1)
    config = replace(small.config, evaluation=evaluation)
    tasks = answer_tasks(system, families, documents, config)
    # What is asked in several wordings is asked with its passages in reverse, too.
    assert [bool(task.gold) for task in tasks] == [True, False, False]
    assert list(tasks[0].gold) == [family.answers for family in families]


def test_a_quarter_is_asked_without_its_documents(small: World) -> None:
    bm25 = made(small)
    families = load_hits(bm25)
    trained = System("both stages", bm25, bm25, shows_bounds=True)  # any artifact: none is opened
    tasks = {task.label: task for task in answer_tasks(trained, families, {}, small.config)}
    prompts = tasks["both stages, document gone"].prompts
    assert len(prompts) == -(-len(families) // 4)
    assert any(family.positive_ids[0] in ranked_documents(family)[0] for family in families)
    for family, ((wording, hits),) in zip(families, prompts, strict=False):
        assert wording == family.wordings[0]
        assert not {hit.document_id for hit in hits} & set(family.positive_ids)
        assert hits, "others are left"


def test_refusals_count_in_coverage_and_say_nothing_of_certainty() -> None:
    points = risk_coverage([0.9, 0.4], [True, False], asked=4)
    assert [(p.coverage, p.risk) for p in points] == [(0.25, 0.0), (0.5, 0.5)]


class Reads:
    """Says what the first passage says, and keeps the prompts."""

    max_context = 400

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def generate(self, prompts: list[str], **options: Any) -> list[Generation]:
        self.prompts += prompts
        said = [prompt.split("[1] ")[1].split("\n")[0] for prompt in prompts]
        return [Generation(text, [-0.1], 1, "eos") for text in said]


def test_only_right_answers_are_asked_again_with_their_passages_in_reverse(
    small: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Any = Reads()
    monkeypatch.setattr(steps_answers, "open_base_generator", lambda *_, **__: reads)
    block = AnswerBlock(small.store.root_uri, asdict(small.base), "", small.config)
    one, other = ({"passage_id": n, "document_id": n, "rank": 1, "score": 1.0} for n in "ab")
    found = [one | {"title": "", "text": "Salt"}, other | {"title": "", "text": "Ice"}]
    asked: dict[str, Any] = {
        "block": 0,
        "questions": ["right", "alone", "wrong", "no gold"],
        "hits": [found, found[:1], found, found],
        "gold": [["the salt"], ["Salt"], ["Ice"], []],
    }
    answers = block(asked)["answers"]
    assert [answer["text"] for answer in answers] == ["Salt"] * 4
    assert [answer["reordered"] for answer in answers] == ["Ice", None, None, None]
    assert len(reads.prompts) == 5
