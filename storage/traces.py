"""OpenTelemetry traces: a request, its calls of Redis, and the job that makes its post's image.

    request (api.protocol) ──► call of Redis (trace_calls, below)
        └──► job (workers.__main__), at another time: the post stores the trace until its image is made

Without OpenTelemetry's variables nothing of it is imported: only `start` imports it. Its SDK reads the variables
itself: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/

Spans have names and numbers of this project: no arguments, addresses, texts or messages of errors.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from storage.db.client import Redis
from storage.errors import Refusal

STOP_GRACE = 1.0  # seconds in which the last spans are sent when a process stops

log = logging.getLogger("imagegram.traces")

tracer: Any = None  # OpenTelemetry's, or None: this process makes no traces
_provider: Any = None
_outcomes: tuple[int, int] = -1, -1  # a pipe, from a job to the process that forked it
_current: ContextVar[Any] = ContextVar("span", default=None)  # the span of this request


class Exporter:
    """Sends spans by another exporter. Logs its first failure and its recovery, not each failure as the SDK does."""

    def __init__(self, exporter):
        self._exporter, self._fails = exporter, False
        self.shutdown, self.force_flush = exporter.shutdown, exporter.force_flush

    def export(self, spans):
        result = self._exporter.export(spans)
        fails = result.name != "SUCCESS"
        if fails and not self._fails:
            log.warning("the collector of traces does not take them: they are dropped until it does")
        elif self._fails and not fails:
            log.info("the collector of traces takes them again")
        self._fails = fails
        return result


def start(service: str) -> None:
    """Make traces in this process. It must have forked already, because a thread sends the spans.

    `service` is the name of the service, unless OTEL_SERVICE_NAME is set. Raises SystemExit without the extra `trace`.
    """
    global tracer, _provider
    find_opentelemetry()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise SystemExit("OTEL_…: traces need the extra `trace`: pip install 'imagegram[trace]'") from None
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # Exporter logs instead
    resource = Resource({"service.name": service}).merge(OTELResourceDetector().detect())
    _provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(Exporter(OTLPSpanExporter())))
    tracer = _provider.get_tracer("imagegram")


def find_opentelemetry() -> None:
    """Let this process import OpenTelemetry, which `storage/__init__.py` hides."""
    if sys.modules.get("opentelemetry", sys) is None:
        del sys.modules["opentelemetry"]


def stop() -> None:
    """Send the last spans. A collector that hangs delays this by STOP_GRACE at most."""
    if _provider:
        sending = threading.Thread(target=_provider.shutdown, daemon=True)
        sending.start()
        sending.join(STOP_GRACE)


def begin(traceparent: str) -> Any:
    """Begin the span of a request, as a part of the caller's trace, if there is one. It becomes this task's span.

    `traceparent` is the request's header, which may be malformed or empty. https://www.w3.org/TR/trace-context/
    """
    from opentelemetry.trace import SpanKind

    span = tracer.start_span("request", _parent(traceparent), SpanKind.SERVER)
    _current.set(span)
    return span


def end(span, name: str, status: int, attributes: dict[str, Any]) -> None:
    """End the span of a request that is answered with an HTTP status."""
    from opentelemetry.trace import StatusCode

    span.update_name(name)
    span.set_attributes({**attributes, "http.response.status_code": status})
    if status >= 500:
        span.set_status(StatusCode.ERROR)
    span.end()


def traceparent() -> str:
    """This task's span for a post or another process, as the header of that name. Empty: it is not recorded."""
    span = _current.get() if tracer else None
    if span is None or not span.is_recording():
        return ""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def keep(fly: Callable[[], Awaitable]) -> Callable[[], Awaitable]:
    """`fly`, with this task's span wherever it runs. A task that several requests share has the span of the first."""
    span = _current.get()

    def fly_in_span() -> Awaitable:
        _current.set(span)
        return fly()

    return fly_in_span


@contextmanager
def _child(name: str) -> Iterator[None]:
    """A span below this task's span, unless that has ended: a task may go on in the background."""
    from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

    parent = _current.get()
    if parent is None or not parent.is_recording():
        yield
        return
    span = tracer.start_span(name, set_span_in_context(parent), SpanKind.CLIENT, {"db.system.name": "redis"})
    try:
        yield
    except Refusal as refusal:
        span.set_attribute("imagegram.refusal", refusal.word)
        raise
    except BaseException:
        span.set_status(StatusCode.ERROR)
        raise
    finally:
        span.end()


def trace_calls(db: Redis) -> None:
    """Make a span for each call of a script, from the call to the reply. Do nothing if this process makes no traces."""
    if tracer is None:
        return
    call = db.call

    async def traced(name: str, keys: list[str], *args: Any) -> Any:
        with _child(name):
            return await call(name, keys, *args)

    db.call = traced  # type: ignore[method-assign]


# Jobs. RQ forks for each job. The fork has no thread that sends spans, and would have to wait for a collector. So it
# tells the process that forked it only how the job ended.


def expect_jobs() -> None:
    """Prepare a process that forks jobs. It has called `start`."""
    global _outcomes
    _outcomes = os.pipe()
    os.set_blocking(_outcomes[0], False)


def tell_outcome(outcome: str) -> None:
    """In a job: say how it ended, in one word."""
    if _outcomes[1] >= 0:
        os.write(_outcomes[1], outcome.encode())


def end_job(name: str, meta: dict[str, Any], began_ns: int) -> None:
    """Make the span of a job that has ended, in the trace of the request that created the post.

    `meta` has that request's `trace`, a traceparent, and the `post`. It is empty where that request was not traced.
    """
    from opentelemetry.trace import SpanKind, StatusCode

    outcome = ""  # of a job that was killed
    with suppress(BlockingIOError):
        outcome = os.read(_outcomes[0], 100).decode()
    if "trace" not in meta:
        return
    attributes = {"imagegram.post": str(meta.get("post")), "imagegram.outcome": outcome or "killed"}
    span = tracer.start_span(name, _parent(str(meta["trace"])), SpanKind.CONSUMER, attributes, start_time=began_ns)
    if outcome in ("", "died"):
        span.set_status(StatusCode.ERROR)
    span.end(time.time_ns())


def _parent(traceparent: str) -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})
