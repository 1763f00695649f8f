"""What stands in front of the HTTP replicas: Serve's proxy, HAProxy, or nothing.

Two HTTP replicas over small artifacts on a local Ray.  One caller first: latency, and the processor
time that the front takes for a request.  Then four callers, who ask on while one HTTP replica is
killed, and while the front itself is: what failed, in whose form, and for how long.

    python -m benchmarks.serve_fronts            (all three, each in a process of its own)
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

FRONTS = {
    "proxy": {},
    "haproxy": {"RAY_SERVE_ENABLE_HA_PROXY": "1"},
    "direct": {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "1"},
}
BODY = {"question": "When does the ferry leave?", "top_k": 2, "mode": "bm25"}
LOOPBACK = {"127.0.0.1", "::1"}
CALLERS, ALONE = 4, 200


def processes(part: str) -> list[psutil.Process]:
    me = psutil.Process()
    found = []
    for each in me.children(recursive=True):
        try:
            if part in " ".join(each.cmdline()):
                found.append(each)
        except psutil.Error:
            continue
    return found


def seconds_of(part: str) -> float:
    return sum(sum(each.cpu_times()[:2]) for each in processes(part))


class Callers:
    """Ask for some time and keep score, each at the next address in turn."""

    def __init__(self, urls: list[str], seconds: float) -> None:
        self.urls, self.end = urls, time.monotonic() + seconds
        self.seen: list[tuple[float, str]] = []
        self.threads = [threading.Thread(target=self.ask, args=(n,)) for n in range(CALLERS)]
        for thread in self.threads:
            thread.start()

    def ask(self, number: int) -> None:
        with httpx.Client(trust_env=False, timeout=30) as client:
            while time.monotonic() < self.end:
                number += 1
                url = self.urls[number % len(self.urls)]
                try:
                    answer = client.post(f"{url}/v1/retrieve", json=BODY)
                    what = str(answer.status_code)
                    if answer.status_code != 200:
                        ours = "error" in answer.text and "request_id" in answer.text
                        what += " ours" if ours else " not ours"
                except httpx.HTTPError as error:
                    what = type(error).__name__
                self.seen.append((time.monotonic(), what))
                time.sleep(0.05)

    def outcome(self, killed: float) -> dict[str, Any]:
        for thread in self.threads:
            thread.join()
        failed = [at for at, what in self.seen if what != "200"]
        return {
            "asked": len(self.seen),
            "failed": dict(Counter(what for _, what in self.seen if what != "200")),
            "failing for, s": round(max(failed) - killed, 2) if failed else 0.0,
        }


def measure(front: str, index: str, generator: str) -> dict[str, Any]:
    from invar_ray.config import ScaleConfig
    from invar_ray.session import RaySession
    from serve.app import AppArgs, _free_port, build_app, start, stop

    args = AppArgs(
        index_uri=index,
        generator_uri=generator,
        ingress_replicas=(2, 2),
        retriever_replicas=(1, 1),
        generator_replicas=(1, 1),
        num_cpus_per_replica=0.1,
        max_new_tokens=4,
        published="",
        health_check_period_s=2,
    )
    session = RaySession(ScaleConfig())
    session.ensure()
    try:
        if front == "direct":
            from ray import serve

            serve.start(http_options={"host": "127.0.0.1", "port": _free_port("127.0.0.1", 0)})
            serve.run(build_app(args), name="invar-ray")
            urls = [f"http://127.0.0.1:{port}" for port in listening("IngressDeployment")]
        else:
            urls = [start(args, port=0, log_level="WARNING")]
        result = {"addresses": len(urls)}
        with httpx.Client(trust_env=False, timeout=60) as client:
            for number in range(40):
                client.post(f"{urls[number % len(urls)]}/v1/retrieve", json=BODY)
            name = {"proxy": "ProxyActor", "haproxy": "haproxy", "direct": "no front"}[front]
            before, took = seconds_of(name), []
            for number in range(ALONE):
                begin = time.perf_counter()
                answer = client.post(f"{urls[number % len(urls)]}/v1/retrieve", json=BODY)
                took.append(time.perf_counter() - begin)
                assert answer.status_code == 200, answer.text
            result["front, CPU ms a request"] = round(1e3 * (seconds_of(name) - before) / ALONE, 2)
        took.sort()
        result["alone p50, ms"] = round(1e3 * statistics.median(took), 1)
        result["alone p95, ms"] = round(1e3 * took[int(0.95 * ALONE)], 1)
        result["listening elsewhere than on loopback"] = outside()
        result["one HTTP replica killed"] = kill("IngressDeployment", urls, 20.0)
        time.sleep(20)
        if front != "direct":
            result["front killed"] = kill(name, urls, 60.0)
        return result
    finally:
        stop()
        session.close()


def kill(name: str, urls: list[str], seconds: float) -> dict[str, Any]:
    callers = Callers(urls, seconds)
    time.sleep(3)
    victim = min(processes(name), key=lambda each: each.create_time())
    killed = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    return callers.outcome(killed)


def listening(name: str) -> list[int]:
    """HTTP ports of the replicas of a deployment."""
    found = {
        each.laddr.port
        for process in processes(name)
        for each in process.net_connections("inet")
        if each.status == psutil.CONN_LISTEN and 30000 <= each.laddr.port <= 31000
    }
    return sorted(found)


def outside() -> list[str]:
    me = psutil.Process()
    family = {each.pid: each for each in me.children(recursive=True)}
    found = Counter()
    for each in psutil.net_connections("inet"):
        open_to_others = each.laddr and each.laddr.ip.removeprefix("::ffff:") not in LOOPBACK
        if each.pid in family and each.status == psutil.CONN_LISTEN and open_to_others:
            found[f"{family[each.pid].name()[:24]} {each.laddr.ip}:{each.laddr.port}"] += 1
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--front", choices=FRONTS)
    parser.add_argument("--index")
    parser.add_argument("--generator")
    parser.add_argument("--out", default="runs/benchmarks/serve_fronts.json")
    options = parser.parse_args()
    if options.front:
        print("RESULT", json.dumps(measure(options.front, options.index, options.generator)))
        return
    from tests.serving import make_artifacts

    artifacts = make_artifacts(Path(tempfile.mkdtemp(prefix="fronts")))
    results = {}
    for front, environment in FRONTS.items():
        command = [sys.executable, "-m", "benchmarks.serve_fronts", "--front", front]
        command += ["--index", artifacts.index_uri, "--generator", artifacts.generator_uri]
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=600
        )
        told = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        results[front] = json.loads(told[-1][7:]) if told else done.stderr[-2000:]
        print(front, json.dumps(results[front], indent=1), flush=True)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
