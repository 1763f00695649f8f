"""OpenTelemetry spans by switch: request -> embed, search, generate, across processes (W3C
``traceparent``).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from invar_ray.errors import ConfigError

logger = logging.getLogger("ray.serve")
Tracing = Literal["off", "log", "otlp"]
Carrier = dict[str, str]


class Tracer:
    """Makes spans; :meth:`span` costs nothing where tracing is off.

    Args:
        mode: ``off``; ``log`` writes each span as a line of JSON to the log; ``otlp`` sends them to
            the collector that the usual variables name (``OTEL_EXPORTER_OTLP_ENDPOINT`` ..).
        service: the spans' ``service.name``.
        exporter: another exporter of OpenTelemetry's, for tests.

    Raises:
        ConfigError: if ``otlp`` is asked for and its package is not there.

    It travels between processes as its arguments, and opens its exporter anew.
    """

    def __init__(
        self, mode: Tracing = "off", service: str = "invar-ray", exporter: Any = None
    ) -> None:
        self._arguments = mode, service, exporter
        self._tracer: Any = None
        if mode == "off" and exporter is None:
            return
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        provider = TracerProvider(resource=Resource.create({"service.name": service}))
        if exporter is not None:
            provider.add_span_processor(SimpleSpanProcessor(exporter))
        elif mode == "log":
            provider.add_span_processor(SimpleSpanProcessor(_log_exporter()))
        else:
            provider.add_span_processor(BatchSpanProcessor(_otlp_exporter()))
        self._tracer = provider.get_tracer("serve")

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return type(self), self._arguments

    @contextlib.contextmanager
    def span(
        self, name: str, parent: Carrier | None = None, **attributes: str | int | float
    ) -> Iterator[Carrier]:
        """A span around the block; yields the carrier that makes later spans its children, in any
        process.
        """
        if self._tracer is None:
            yield parent or {}
            return
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        span = self._tracer.start_span(
            name, context=propagator.extract(parent or {}), attributes=attributes
        )
        carrier: Carrier = {}
        propagator.inject(carrier, context=trace.set_span_in_context(span))
        try:
            yield carrier
        except BaseException as error:
            span.set_status(trace.StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            span.end()


def _log_exporter() -> Any:
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class LogExporter(SpanExporter):
        def export(self, spans: Sequence[Any]) -> Any:
            for span in spans:
                values = {
                    "span": span.name,
                    "trace_id": f"{span.context.trace_id:032x}",
                    "span_id": f"{span.context.span_id:016x}",
                    "parent_id": f"{span.parent.span_id:016x}" if span.parent else None,
                    "seconds": round((span.end_time - span.start_time) / 1e9, 6),
                    **dict(span.attributes or {}),
                }
                logger.info("%s", json.dumps(values))
            return SpanExportResult.SUCCESS

    return LogExporter()


def _otlp_exporter() -> Any:
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    try:
        found = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise ConfigError(
            "tracing is 'otlp' and its exporter is not installed",
            action="pip install opentelemetry-exporter-otlp-proto-http, or set tracing to log or "
            "off",
        )
    return importlib.import_module(name).OTLPSpanExporter()
