"""The planner's predictions against what is built: memory, build time, latency, recall@10, for each
index type.

``python -m benchmarks.index_planner FOLDER [--rows N] [--out FILE.json]`` reads ``vectors.npy`` and
``queries.npy`` of ``benchmarks/wiki_vectors.py``.  Memory is what a fresh process's private memory
grows by when it loads the index. Times are CPU times of one thread.  Ends with 1 if a prediction of
memory is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import faiss
import numpy as np

from invar_ray.index.blocks import of_matrix
from invar_ray.index.build import Trial, fill, measure_recall, sampled_trial, tune
from invar_ray.index.faiss_index import Index, build_faiss, exact_best, open_index, save_index
from invar_ray.index.planner import Need, candidates, plan_index, render

ALLOWED = 0.10


def main() -> None:
    """Build each type, measure, print the table as Markdown."""
    if sys.argv[1:2] == ["--load"]:
        print(growth(Path(sys.argv[2])))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--target", type=float, default=0.95)
    parser.add_argument("--only", default="", help="only factories that contain this")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/index_planner.json"))
    args = parser.parse_args()
    faiss.omp_set_num_threads(1)
    matrix = np.load(args.folder / "vectors.npy")[: args.rows]
    blocks, asked = of_matrix(matrix), np.load(args.folder / "queries.npy")[:500]
    need = Need(len(matrix), matrix.shape[1], args.target)
    print(render(plan_index(need)), flush=True)
    own = sampled_trial(blocks, 500)
    outside = Trial(asked, exact_best(asked, blocks.some(), 10), np.full(len(asked), -1))
    header = (
        "| type | factory | bytes/vector | memory predicted | measured | off | build predicted | "
        "measured | "
    )
    print(
        f"{header}depth | recall@10 | of short queries | ms/query |\n|" + " --- |" * 12, flush=True
    )
    rows = []
    for candidate in candidates(need):
        if args.only not in candidate.factory:
            continue
        started = time.process_time()
        built = fill(blocks, candidate.factory, candidate.training_rows)
        seconds = time.process_time() - started
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder, "index.faiss")
            save_index(built, place)
            size = place.stat().st_size
            memory = int(
                subprocess.check_output(
                    [sys.executable, "-m", "benchmarks.index_planner", "--load", place]
                )
            )
            mapped = open_index(place, memory_map=True)
            assert mapped.size == len(matrix)
            del mapped
        index = Index(built)
        depth, recall, latency = tune(index, candidate, own, need.recall_target)
        short = measure_recall(index, outside, depth)
        off = candidate.memory_bytes / memory - 1
        curve = {d: round(measure_recall(index, own, d), 4) for d in candidate.depths}
        rows.append(
            {
                "candidate": asdict(candidate),
                "memory_bytes": memory,
                "file_bytes": size,
                "off": off,
                "build_seconds": seconds,
                "depth": depth,
                "recall_at_10": recall,
                "recall_at_10_of_short_queries": short,
                "latency_ms": latency,
                "recall_by_depth": curve,
            }
        )
        shown = depth if candidate.depths else "-"
        print(
            f"| {candidate.kind} | `{candidate.factory}` | {candidate.bytes_per_vector:.1f} | "
            f"{candidate.memory_bytes / 1e6:.2f} MB | {memory / 1e6:.2f} MB | {off:+.1%} | "
            f"{candidate.build_seconds:.1f} s | {seconds:.1f} s | {shown} | {recall:.3f} | "
            f"{short:.3f} | {latency:.2f} (predicted {candidate.latency_ms:.2f}) |",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"faiss": faiss.__version__, "cpus": os.cpu_count(), "rows": rows}, indent=1)
    )
    wrong = [row["candidate"]["factory"] for row in rows if abs(row["off"]) > ALLOWED]
    if wrong:
        raise SystemExit(f"memory predictions off by more than {ALLOWED:.0%}: {', '.join(wrong)}")


def growth(place: Path) -> int:
    """Bytes by which this process's private memory grows with the index."""
    # code and buffers of FAISS are not the index's
    build_faiss(np.eye(8, dtype=np.float32), "IVF1,Flat")
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # nor should it fill what imports left free
    before = private()
    index = open_index(place)
    after = private()
    assert index.size
    return after - before


def private() -> int:
    """Anonymous resident bytes of this process."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    main()
