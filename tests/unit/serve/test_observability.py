"""Metrics, dashboard, traces, and the files that deploy the service."""

from __future__ import annotations

import importlib
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from invar_ray.errors import ConfigError
from serve.telemetry.metrics import CATALOG, Meter, RaySink
from serve.telemetry.tracing import Tracer
from tests.serving import Live, Memory, shared_artifacts

ROOT = Path(__file__).parents[3]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def live(
    tmp_path_factory: pytest.TempPathFactory, exporter: InMemorySpanExporter
) -> Iterator[Live]:
    service = Live(shared_artifacts(tmp_path_factory), tracer=Tracer(exporter=exporter))
    yield service
    service.close()


def test_a_request_is_one_trace(live: Live, exporter: InMemorySpanExporter) -> None:
    headers = {"traceparent": PARENT}
    assert (
        live(
            "POST", "/v1/answer", json={"question": "Who kept the light?"}, headers=headers
        ).status_code
        == 200
    )
    deadline = time.monotonic() + 10  # the request's span ends after its response has been sent
    while len(exporter.get_finished_spans()) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"request", "search", "generate"}
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {PARENT.split("-")[1]}
    assert f"{spans['request'].parent.span_id:016x}" == PARENT.split("-")[2]
    assert {spans[name].parent.span_id for name in ("search", "generate")} == {
        spans["request"].context.span_id
    }
    assert spans["request"].attributes["route"] == "/v1/answer"
    assert "light" not in json.dumps([dict(span.attributes) for span in spans.values()])


def test_spans_as_log_lines_and_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    with pytest.raises(KeyError), Tracer("log").span("search", None, top_k=3):
        raise KeyError
    line = json.loads(caplog.records[-1].message)
    assert (line["span"], line["top_k"], line["parent_id"]) == ("search", 3, None)
    with Tracer("off").span("search", {"traceparent": PARENT}) as carrier:
        assert carrier == {"traceparent": PARENT}


def test_a_missing_exporter_is_named() -> None:
    if importlib.util.find_spec("opentelemetry.exporter") and importlib.util.find_spec(
        "opentelemetry.exporter.otlp"
    ):
        pytest.skip("it is installed here")
    with pytest.raises(ConfigError, match="opentelemetry-exporter-otlp-proto-http"):
        Tracer("otlp")


def test_only_known_metrics_with_their_labels() -> None:
    memory = Memory()
    meter = Meter(memory)
    meter.record("invar_queue", 3, engine="retriever")
    assert memory.of("invar_queue") == [3]
    with pytest.raises(KeyError):
        meter.record("invar_nothing")
    with pytest.raises(ValueError, match="labels"):
        meter.record("invar_queue", 3)
    through_ray = Meter(RaySink())
    for metric in CATALOG.values():  # Ray refuses bad names, buckets and labels when they are made
        through_ray.record(metric.name, 1.0, **{label: "x" for label in metric.labels})


def test_the_dashboard_draws_every_metric_and_no_other() -> None:
    dashboard = json.loads(
        (ROOT / "cluster" / "observability" / "dashboard.json").read_text(encoding="utf-8")
    )
    drawn: set[str] = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            assert expression.count("(") == expression.count(")")
            for name in re.findall(r"ray_(invar_\w+)", expression):
                base = re.sub(r"_(bucket|sum|count)$", "", name)
                metric = CATALOG[base]
                assert (metric.kind == "histogram") == (base != name)
                drawn.add(base)
            for labels in re.findall(r"by \(([^)]*)\)", expression):
                names = {label.strip() for label in labels.split(",")} - {"le"}
                known = {
                    label
                    for name in CATALOG
                    if f"ray_{name}" in expression
                    for label in CATALOG[name].labels
                }
                assert names <= known, expression
    assert drawn == set(CATALOG)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_vllm_file_fits_serves_schema_and_its_two_applications_each_other() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.app import AppArgs

    values: dict[str, Any] = yaml.safe_load(
        (ROOT / "serve" / "vllm.yaml").read_text(encoding="utf-8")
    )
    schema = ServeDeploySchema.model_validate(values)
    assert set(values) <= set(ServeDeploySchema.model_fields)
    vllm, service = schema.applications
    assert vllm.import_path == "ray.serve.llm:build_openai_app"
    args = AppArgs.model_validate(service.args)
    (model,) = vllm.args["llm_configs"]
    assert args.engine == "openai"
    assert args.engine_model == model["model_loading_config"]["model_id"]
    assert args.engine_url == f"http://127.0.0.1:{schema.http_options.port}{vllm.route_prefix}/v1"
    assert set(model) <= {
        "model_loading_config",
        "accelerator_type",
        "engine_kwargs",
        "deployment_config",
    }
    source = importlib.util.find_spec("ray.serve")
    assert source is not None
    builders = Path(str(source.origin)).parent / "llm" / "__init__.py"
    assert "def build_openai_app" in builders.read_text(encoding="utf-8")
