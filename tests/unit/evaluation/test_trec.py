"""Run and qrels files, and every retrieval metric recomputed from them by ir-measures (trec_eval's
code).
"""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean
from urllib.parse import unquote

import ir_measures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.recompute_metrics import MEASURES, recompute
from invar_ray.evaluation.metrics import average_precision, ndcg_at_k, recall_at_k, reciprocal_rank
from invar_ray.evaluation.trec import file_name, write_qrels, write_run

Run = dict[str, list[str]]


def ours(run: Run, gold: Run) -> dict[str, float]:
    lists = [(run.get(question, []), names) for question, names in gold.items()]
    found = {f"recall_at_{k}": fmean(recall_at_k(r, g, k) for r, g in lists) for k in (1, 5, 20)}
    found["mrr_at_10"] = fmean(reciprocal_rank(r, g) for r, g in lists)
    found["ndcg_at_10"] = fmean(ndcg_at_k(r, g, 10) for r, g in lists)
    found["map"] = fmean(average_precision(r, g) for r, g in lists)
    return found


def read_run(path: Path) -> Run:
    """Question -> documents by falling score, read by ir-measures."""
    found: dict[str, list[tuple[float, str]]] = {}
    for line in ir_measures.read_trec_run(str(path)):
        found.setdefault(unquote(line.query_id), []).append((-line.score, unquote(line.doc_id)))
    return {question: [name for _, name in sorted(lines)] for question, lines in found.items()}


def read_qrels(path: Path) -> Run:
    """Question -> its gold documents, sorted, read by ir-measures."""
    gold: Run = {}
    for line in ir_measures.read_trec_qrels(str(path)):
        assert line.relevance == 1
        gold.setdefault(unquote(line.query_id), []).append(unquote(line.doc_id))
    return {question: sorted(names) for question, names in gold.items()}


def check(folder: Path, run: Run, gold: Run) -> None:
    run_file = write_run(folder / "x.run", run, "a system")
    qrels_file = write_qrels(folder / "qrels.txt", gold)
    assert read_run(run_file) == {question: ranked for question, ranked in run.items() if ranked}
    assert read_qrels(qrels_file) == {question: sorted(names) for question, names in gold.items()}
    theirs = recompute(run_file, qrels_file, ks=(1, 5, 20))
    mine = ours(run, gold)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert theirs[name] == pytest.approx(value, abs=1e-9), name


def test_random_runs_equal_the_reference(tmp_path: Path) -> None:
    for seed in range(30):
        draw = random.Random(seed)
        names = [f"d{n}" for n in range(30)]
        gold = {f"q{n}": draw.sample(names, draw.randint(1, 12)) for n in range(draw.randint(1, 8))}
        run = {question: draw.sample(names, draw.randint(0, 25)) for question in gold}
        check(tmp_path, run, gold)


NAMES = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from(" \t\n%"),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_odd_names_and_sizes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    documents = data.draw(st.lists(NAMES, min_size=1, max_size=8, unique=True))
    questions = data.draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    orders = st.permutations(documents)
    gold = {q: data.draw(orders)[: data.draw(st.integers(1, len(documents)))] for q in questions}
    run = {q: data.draw(orders)[: data.draw(st.integers(0, len(documents)))] for q in questions}
    check(tmp_path_factory.mktemp("trec"), run, gold)


def test_edges(tmp_path: Path) -> None:
    check(tmp_path, {"q": [f"d{n}" for n in range(11)]}, {"q": ["d10"]})  # just beyond 10
    check(tmp_path, {"q": ["d0"]}, {"q": ["d0", "d1", "d2"]})
    check(tmp_path, {"q": []}, {"q": ["d0"]})  # nothing found: 0, not left out
    check(tmp_path, {}, {"q": ["d0"]})


def test_the_columns(tmp_path: Path) -> None:
    text = write_run(tmp_path / "a.run", {"q 1": ["x", "y%z"]}, "stage 1").read_text()
    assert text == "q%201 Q0 x 1 2 stage%201\nq%201 Q0 y%25z 2 1 stage%201\n"
    assert write_qrels(tmp_path / "q", {"q": ["x", "x"]}).read_text() == "q 0 x 1\n"
    assert file_name("stage 1, rewrites fused") == "stage-1-rewrites-fused"
    with pytest.raises(ValueError, match="twice"):
        write_run(tmp_path / "b.run", {"q": ["x", "x"]}, "s")


def test_measures_are_named_as_in_the_report() -> None:
    assert MEASURES.keys() == {"mrr_at_10", "ndcg_at_10", "map"}
