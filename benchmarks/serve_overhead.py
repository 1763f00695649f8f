"""What Serve adds to a call: ``POST /v1/retrieve`` over HTTP on a local Ray against the same search
in this process.

One request at a time, both on this machine, interleaved; prints medians and their difference
(target: 10 ms idle).

    python benchmarks/serve_overhead.py --index URI --generator URI
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import ray

from serve.app import AppArgs, start, stop
from serve.replicas.retriever import load_retriever


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", required=True)
    parser.add_argument("--generator", required=True)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--out", default="runs/benchmarks/serve_overhead.json")
    options = parser.parse_args()
    retriever = load_retriever(options.index)
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        _temp_dir=tempfile.mkdtemp(prefix="io", dir="/tmp"),
    )
    try:
        args = AppArgs(
            index_uri=options.index,
            generator_uri=options.generator,
            retriever_replicas=(1, 1),
            generator_replicas=(1, 1),
            ingress_replicas=(1, 1),
            batch_wait_s=0.0,  # alone, a call waits for nobody
            published="",
        )
        url = start(args, port=0, log_level="WARNING")
        times: dict[str, list[float]] = {"direct_s": [], "served_s": []}
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            for number in range(options.requests + 20):
                question = f"Which river of number {number} flows past the old mill?"
                begin = time.perf_counter()
                retriever.retrieve([question], 5)
                middle = time.perf_counter()
                client.post(
                    "/v1/retrieve", json={"question": question, "top_k": 5}
                ).raise_for_status()
                if number >= 20:
                    times["direct_s"].append(middle - begin)
                    times["served_s"].append(time.perf_counter() - middle)
    finally:
        stop()
        ray.shutdown()
    result: dict[str, object] = {name: statistics.median(values) for name, values in times.items()}
    result["p95_served_s"] = sorted(times["served_s"])[int(0.95 * options.requests)]
    result["added_p50_s"] = statistics.median(times["served_s"]) - statistics.median(
        times["direct_s"]
    )
    result["load_average"] = os.getloadavg()
    result["settings"] = vars(options)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
