"""Recompute a report's retrieval numbers from its TREC files with ir-measures, an independent
library.

    .venv/bin/python -m benchmarks.recompute_metrics runs/demo/report.json

Reads ``trec/qrels.txt`` and each system's ``trec/<system>.wording-<n>.run`` beside the report (or
in the artifact that it names) and compares with ``report.json``: what the anchors find (recall,
MRR, nDCG, MAP), what families find (recall of the rewrites, of the worst wording, its deviation;
from ir-measures' values of single questions) and the overlap of their lists (a Jaccard index is in
no such library: sets of ids, as the files have them).  What does not follow from these files
(answers, answer recall, RBO, ranks beyond the list) is left out.  Exits 1 where a number differs by
more than 1e-9.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import ir_measures
from ir_measures import AP, RR, Success, nDCG

from invar_ray.evaluation.report import read_report
from invar_ray.evaluation.trec import file_name

TOLERANCE = 1e-9
MEASURES = {"mrr_at_10": RR @ 10, "ndcg_at_10": nDCG @ 10, "map": AP}


def recompute(
    run_file: Path, qrels_file: Path, ks: Sequence[int] = (1, 5, 20, 100)
) -> dict[str, float]:
    """The metrics' means over the questions of the qrels; questions without a hit count as 0."""
    measures = {f"recall_at_{k}": Success @ k for k in ks} | MEASURES
    qrels = list(ir_measures.read_trec_qrels(str(qrels_file)))
    run = list(ir_measures.read_trec_run(str(run_file)))
    if not run:
        return dict.fromkeys(measures, 0.0)
    found = ir_measures.calc_aggregate(list(measures.values()), qrels, run)
    return {name: float(found[measure]) for name, measure in measures.items()}


def recompute_families(
    folder: Path, name: str, ks: Sequence[int], overlap_k: int
) -> dict[str, float]:
    """The metrics over wordings, from the runs of all wordings; questions with one wording have
    none.
    """
    runs = []
    while (file := folder / f"{name}.wording-{len(runs)}.run").is_file():
        runs.append(list(ir_measures.read_trec_run(str(file))))
    if len(runs) < 2:
        return {}
    qrels = list(ir_measures.read_trec_qrels(str(folder / "qrels.txt")))
    judged = {entry.query_id for entry in qrels}
    # A wording that a question does not have is in no run; one that found nothing neither, but then
    # all are short.
    asked = [{entry.query_id for entry in run} for run in runs]
    families = {query: [n for n, have in enumerate(asked) if query in have] for query in asked[0]}
    found: dict[str, float] = {}
    for k in ks:
        values = [
            {
                value.query_id: value.value
                for value in ir_measures.iter_calc([Success @ k], qrels, run)
            }
            for run in runs
        ]
        rows = [
            [values[n].get(query, 0.0) for n in have]
            for query, have in families.items()
            if query in judged
        ]
        found[f"worst_recall_at_{k}"] = fmean(min(row) for row in rows)
        found[f"reworded_recall_at_{k}"] = fmean(fmean(row[1:]) for row in rows if len(row) > 1)
        found[f"recall_at_{k}_std"] = fmean(pstdev(row) for row in rows)
    tops: list[dict[str, set[str]]] = []
    for run in runs:
        ranked: dict[str, list[Any]] = {}
        for entry in run:
            ranked.setdefault(entry.query_id, []).append(entry)
        tops.append(
            {
                q: {e.doc_id for e in sorted(es, key=lambda e: -e.score)[:overlap_k]}
                for q, es in ranked.items()
            }
        )
    overlaps = [
        fmean(
            len(tops[0][query] & tops[n][query]) / len(tops[0][query] | tops[n][query])
            for n in have[1:]
        )
        for query, have in families.items()
        if len(have) > 1
    ]
    found[f"overlap_at_{overlap_k}"] = fmean(overlaps)
    found[f"change_by_rewrite_at_{overlap_k}"] = 1.0 - fmean(overlaps)
    return found


def main() -> int:
    """Compare, print a line for each metric, say whether all agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="a report.json, or the folder that holds it")
    place = parser.parse_args().report
    path = place / "report.json" if place.is_dir() else place
    report = read_report(path)
    folder = path.parent / "trec"
    if not folder.is_dir() and "report" in report.meta:
        folder = Path(str(report.meta["report"])) / "trec"
    worst, compared = 0.0, 0
    for row in report.rows:
        run_file = folder / f"{file_name(row.system)}.wording-0.run"
        if not run_file.is_file():
            continue
        ks = [k for k in (1, 5, 20, 100) if f"recall_at_{k}" in row.metrics]
        overlap_k = next(
            (
                int(n.removeprefix("overlap_at_"))
                for n in row.metrics
                if n.startswith("overlap_at_")
            ),
            5,
        )
        again = recompute(run_file, folder / "qrels.txt", ks)
        again |= recompute_families(folder, file_name(row.system), ks, overlap_k)
        for name, value in again.items():
            reported = row.metrics.get(name)
            if reported is None:
                continue
            worst, compared = max(worst, abs(value - reported)), compared + 1
            print(f"{row.system:28} {name:24} {reported:.9f} {value:.9f}")
    print(f"{compared} numbers compared, largest difference {worst:.1e} (allowed: {TOLERANCE:.0e})")
    return 0 if compared and worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
