"""Recompute a report's retrieval metrics from its TREC files with ir-measures, an independent library.

    .venv/bin/python -m benchmarks.recompute_metrics runs/demo/report.json

Reads ``trec/qrels.txt`` and each system's ``trec/<system>.wording-0.run`` beside the report (or in the artifact that it
names) and compares every metric with ``report.json``.  Exits 1 where one differs by more than 1e-9.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import ir_measures
from ir_measures import AP, RR, Success, nDCG

from invar_ray.evaluation.report import read_report
from invar_ray.evaluation.trec import file_name

TOLERANCE = 1e-9
MEASURES = {"mrr_at_10": RR @ 10, "ndcg_at_10": nDCG @ 10, "map": AP}


def recompute(run_file: Path, qrels_file: Path, ks: Sequence[int] = (1, 5, 20, 100)) -> dict[str, float]:
    """The metrics' means over the questions of the qrels; questions without a hit count as 0."""
    measures = {f"recall_at_{k}": Success @ k for k in ks} | MEASURES
    qrels = list(ir_measures.read_trec_qrels(str(qrels_file)))
    run = list(ir_measures.read_trec_run(str(run_file)))
    if not run:
        return dict.fromkeys(measures, 0.0)
    found = ir_measures.calc_aggregate(list(measures.values()), qrels, run)
    return {name: float(found[measure]) for name, measure in measures.items()}


def main() -> int:
    """Compare, print a line for each metric, say whether all agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        for name, value in recompute(run_file, folder / "qrels.txt", ks).items():
            reported = row.metrics.get(name)
            if reported is None:
                continue
            worst, compared = max(worst, abs(value - reported)), compared + 1
            print(f"{row.system:28} {name:12} {reported:.9f} {value:.9f}")
    print(f"{compared} numbers compared, largest difference {worst:.1e} (allowed: {TOLERANCE:.0e})")
    return 0 if compared and worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
