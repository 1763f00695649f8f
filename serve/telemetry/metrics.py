"""What the service measures: one list of metrics, recorded through Ray (Prometheus, from every
process) or in memory.

Ray exports them on each node's metrics port under the names below with the prefix ``ray_``, and
``GET /metrics`` for keys of scope ``metrics``; ``cluster/observability`` has a dashboard of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric's name, kind, meaning, labels and (for histograms) upper bounds of its buckets."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


CATALOG = {
    metric.name: metric
    for metric in (
        Metric("invar_requests_total", "counter", "Requests answered.", ("route", "status")),
        Metric(
            "invar_request_seconds", "histogram", "Whole request, in seconds.", ("route",), _SECONDS
        ),
        Metric(
            "invar_stage_seconds",
            "histogram",
            "One stage of a request, in seconds.",
            ("stage",),
            _SECONDS,
        ),
        Metric("invar_in_flight", "gauge", "Requests that an HTTP replica is answering."),
        Metric(
            "invar_queue", "gauge", "Calls that wait for the next batch of a replica.", ("engine",)
        ),
        Metric(
            "invar_batch_size",
            "histogram",
            "Calls in a batch.",
            ("engine",),
            (1, 2, 4, 8, 16, 32, 64),
        ),
        Metric("invar_tokens_total", "counter", "Tokens generated."),
        Metric(
            "invar_tokens_per_second",
            "histogram",
            "Tokens a second of a batch.",
            (),
            (1, 5, 10, 50, 100, 500, 1000),
        ),
        Metric(
            "invar_top_score",
            "histogram",
            "Score of the best passage, in [0, 1]: see PassageOut.",
            (),
            _SHARES,
        ),
        Metric(
            "invar_answers_total", "counter", "Answers, by whether the model refused.", ("refused",)
        ),
        Metric(
            "invar_stability_overlap",
            "histogram",
            "Overlap of the hits of two wordings, sampled.",
            (),
            _SHARES,
        ),
        Metric(
            "invar_index_changes_total",
            "counter",
            "Changes of the index, by outcome.",
            ("outcome",),
        ),
        Metric(
            "invar_retries_total",
            "counter",
            "Calls sent again because a replica died.",
            ("target",),
        ),
    )
}
"""Every metric by name."""

Sink = Callable[[Metric, float, dict[str, str]], None]


class Meter:
    """Records metrics of :data:`CATALOG`.

    Args:
        sink: where values go; ``None`` drops them.
    """

    def __init__(self, sink: Sink | None = None) -> None:
        self._sink = sink

    def record(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter, set a gauge, or observe into a histogram.

        Raises:
            KeyError, ValueError: if the metric is not in the catalog or has other labels: a bug.
        """
        metric = CATALOG[name]
        if set(labels) != set(metric.labels):
            raise ValueError(f"{name} has the labels {metric.labels}, got {tuple(labels)}")
        if self._sink is not None:
            self._sink(metric, value, labels)


class RaySink:
    """A sink that records through Ray; travels to a replica, where its instruments are made."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return type(self), ()

    def __call__(self, metric: Metric, value: float, labels: dict[str, str]) -> None:
        """Record a value, in a process that is connected to Ray."""
        instrument = self._made.get(metric.name) or self._make(metric)
        if metric.kind == "histogram":
            instrument.observe(value, tags=labels)
        elif metric.kind == "counter":
            instrument.inc(value, tags=labels)
        else:
            instrument.set(value, tags=labels)

    def _make(self, metric: Metric) -> Any:
        from ray.util import metrics

        options: dict[str, Any] = {"description": metric.help, "tag_keys": metric.labels}
        if metric.kind == "histogram":
            made: Any = metrics.Histogram(metric.name, boundaries=list(metric.buckets), **options)
        else:
            made = (metrics.Counter if metric.kind == "counter" else metrics.Gauge)(
                metric.name, **options
            )
        self._made[metric.name] = made
        return made


async def exposition() -> str:
    """The service's metrics of every process of the cluster, in Prometheus' text form.

    Nodes that do not answer within fifteen seconds are left out.
    """
    import httpx
    import ray

    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
    urls = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes
    ]
    async with httpx.AsyncClient(timeout=15, trust_env=False) as client:
        pages = await asyncio.gather(*map(client.get, urls), return_exceptions=True)
    families: dict[str, list[str]] = {}  # a family's lines belong together, its head comes once
    for page in pages:
        if isinstance(page, BaseException) or page.status_code != 200:
            continue
        lines: list[str] = []
        for line in page.text.splitlines():
            if line.startswith("# "):
                lines = families.setdefault(line.split(" ", 3)[2], [])
                if line not in lines:
                    lines.append(line)
            else:
                lines.append(line)
    return "".join(
        f"{line}\n"
        for name, lines in sorted(families.items())
        if name.startswith("ray_invar_")
        for line in lines
    )
