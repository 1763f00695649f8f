"""The service under load while things break: replicas die, the index is switched ten times and once
to a broken one.

Two replicas of everything on a local Ray.  The capacity is measured first; then questions arrive at
half of it, however long answers take.  A client waits and asks again on a 503 or 504 with
``Retry-After``; anything else that is no 200 is a failure.  Every answer is checked: it names one
index version, and its passages are in that index.

    python benchmarks/serve_chaos.py --index URI --other URI --broken URI --generator URI --seconds
    180
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import ray
from ray import serve

from invar_ray.store.artifacts import open_artifact
from serve.app import AppArgs, start, stop
from serve.http.keys import ApiKey

KEY = {"X-API-Key": "chaos"}
MOST_WAITS = 60


class Load:
    """Asks questions and keeps score.

    Args:
        url: of the service.
        passages: ids of the passages of each index version.
    """

    def __init__(self, url: str, passages: dict[str, set[str]]) -> None:
        self.url, self.passages = url, passages
        self.client = httpx.Client(
            base_url=url,
            timeout=120,
            trust_env=False,
            headers=KEY,
            limits=httpx.Limits(max_connections=200),
        )
        self.lock = threading.Lock()
        self.statuses: collections.Counter[str] = collections.Counter()
        self.versions: collections.Counter[str] = collections.Counter()
        self.seconds: list[float] = []
        self.waits = 0
        self.failures: list[str] = []

    def ask(self, number: int) -> None:
        path = "/v1/answer" if number % 2 else "/v1/retrieve"
        body = {"question": f"Who keeps the lighthouse of number {number}?", "top_k": 2}
        begin = time.perf_counter()
        for _ in range(MOST_WAITS):
            try:
                response = self.client.post(path, json=body)
            except httpx.HTTPError as error:
                return self._fail(type(error).__name__)
            if response.status_code in {503, 504} and "Retry-After" in response.headers:
                with self.lock:
                    self.waits += 1
                time.sleep(float(response.headers["Retry-After"]))
                continue
            break
        if response.status_code != 200:
            return self._fail(f"HTTP {response.status_code}: {response.text[:200]}")
        reply = response.json()
        version = reply["versions"]["index"]
        strangers = {p["passage_id"] for p in reply["passages"]} - self.passages.get(version, set())
        if strangers:
            return self._fail(f"version {version} has no passage {sorted(strangers)[0]}")
        with self.lock:
            self.statuses["200"] += 1
            self.versions[version] += 1
            self.seconds.append(time.perf_counter() - begin)

    def _fail(self, why: str) -> None:
        with self.lock:
            self.statuses["failed"] += 1
            self.failures.append(why)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("index", "other", "broken", "generator"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--switches", type=int, default=10)
    parser.add_argument("--out", default="runs/benchmarks/serve_chaos.json")
    options = parser.parse_args()
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        _temp_dir=tempfile.mkdtemp(prefix="ic", dir="/tmp"),
    )
    try:
        result = run(options)
    finally:
        stop()
        ray.shutdown()
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name:<{width}}  {value}")
    sys.exit(1 if result["failed"] or result["faults of the drill"] else 0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    key = ApiKey(
        name="chaos", sha256=hashlib.sha256(b"chaos").hexdigest(), scopes=("query", "admin")
    )
    args = AppArgs(
        index_uri=options.index,
        generator_uri=options.generator,
        retriever_replicas=(2, 2),
        generator_replicas=(2, 2),
        ingress_replicas=(1, 1),
        num_cpus_per_replica=0.2,
        max_new_tokens=8,
        health_check_period_s=2,
        published=f"chaos-{os.getpid()}",
        api_keys=[key],
    )
    load = Load(
        start(args, port=0, log_level="WARNING"), passages_of([options.index, options.other])
    )
    with ThreadPoolExecutor(100) as pool:
        capacity = measure(load, pool)
        faults: list[str] = []
        rate, begin = capacity / 2, time.monotonic()
        drill = threading.Thread(target=break_things, args=(options, load, begin, faults))
        drill.start()
        sent = 0
        while (now := time.monotonic() - begin) < options.seconds or drill.is_alive():
            while sent < now * rate:
                pool.submit(load.ask, sent)
                sent += 1
            time.sleep(0.005)
        drill.join()
    ordered = sorted(load.seconds)
    return {
        "capacity, requests/s": round(capacity, 2),
        "asked at, requests/s": round(rate, 2),
        "seconds": round(now, 1),
        "asked": sent,
        "answered": load.statuses["200"],
        "failed": load.statuses["failed"],
        "first failures": load.failures[:3],
        "503 waited for": load.waits,
        "p50 s": round(statistics.median(ordered), 3),
        "p95 s": round(ordered[int(0.95 * len(ordered))], 3),
        "p99 s": round(ordered[int(0.99 * len(ordered))], 3),
        "answers by index version": dict(load.versions),
        "faults of the drill": faults,
    }


def passages_of(uris: list[str]) -> dict[str, set[str]]:
    found = {}
    for uri in uris:
        artifact = open_artifact(uri, "index")
        table = pq.read_table(artifact.parent("passages").path("passages.parquet"), columns=["id"])
        found[artifact.fingerprint] = set(table.column("id").to_pylist())
    return found


def measure(load: Load, pool: ThreadPoolExecutor, seconds: float = 8.0) -> float:
    """Answers a second with sixteen callers who ask again at once."""
    end = time.monotonic() + seconds

    def caller(number: int) -> int:
        done = 0
        while time.monotonic() < end:
            load.ask(number + done)
            done += 1
        return done

    list(pool.map(load.ask, range(8)))
    begin = time.monotonic()
    end = begin + seconds
    total = sum(pool.map(caller, range(16)))
    rate = total / (time.monotonic() - begin)
    load.statuses.clear(), load.versions.clear(), load.seconds.clear()
    return rate


def break_things(options: argparse.Namespace, load: Load, begin: float, faults: list[str]) -> None:
    """Kill one replica of each kind and Serve's controller, and switch the index; what does not
    happen as meant is a fault.
    """
    steps: list[tuple[float, str]] = [
        (0.2, "kill RetrieverDeployment"),
        (0.55, "kill GeneratorDeployment"),
        (0.8, "kill SERVE_CONTROLLER"),
    ]
    steps += [
        (0.05 + 0.85 * number / options.switches, f"switch {number}")
        for number in range(options.switches)
    ]
    steps.append((0.47, "break"))
    current = options.index
    for share, step in sorted(steps):
        time.sleep(max(0.0, begin + share * options.seconds - time.monotonic()))
        try:
            if step.startswith("kill"):
                os.kill(replica_pid(step.split()[1]), signal.SIGKILL)
                continue
            wanted = options.other if current == options.index else options.index
            wanted = options.broken if step == "break" else wanted
            response = change(load.url, wanted)
            if step == "break":
                if response.status_code != 409:
                    faults.append(
                        f"the broken index got {response.status_code}: {response.text[:200]}"
                    )
            elif response.status_code == 200:
                current = wanted
            else:
                faults.append(f"{step} got {response.status_code}: {response.text[:200]}")
        except Exception as error:
            faults.append(f"{step}: {error!r}")


def change(url: str, index_uri: str) -> httpx.Response:
    for _ in range(20):
        response = httpx.post(
            f"{url}/admin/index",
            json={"index_uri": index_uri, "wait": True},
            headers=KEY,
            timeout=300,
            trust_env=False,
        )
        if response.status_code != 503:
            break
        time.sleep(float(response.headers.get("Retry-After", 1)))
    return response


def replica_pid(deployment: str) -> int:
    """Process id of a running replica, as Serve lists it."""
    assert serve.status().applications
    names = sorted(
        a["name"]
        for a in ray.util.list_named_actors(all_namespaces=True)
        if deployment in a["name"]
    )
    for name in names:
        try:
            handle = ray.get_actor(name, namespace="serve")
            return int(ray.get(handle.__ray_call__.remote(lambda replica: os.getpid()), timeout=30))
        except (ray.exceptions.RayError, ValueError):
            continue
    raise RuntimeError(f"no replica of {deployment} answers")


if __name__ == "__main__":
    main()
