"""OpenTelemetry traces reach a collector, the OTLP/HTTP receiver of this file. Without its variables none is made."""

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import create_server

import psutil
import pytest
from conftest import ROOT, Furnished, create_post, photograph, until, wait_until_processed
from wire import Line, exchange, head

from storage import traces

traces.find_opentelemetry()
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest  # noqa: E402

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


class Collector:
    """Receives spans. `spans` are tuples of the service's name and the span."""

    def __init__(self):
        self.spans, self.bodies = [], b""

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = handler.rfile.read(int(handler.headers["content-length"]))
                self.bodies += body
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    (service,) = [a.value.string_value for a in resource.resource.attributes if a.key == "service.name"]
                    self.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
                handler.send_response(200)
                handler.send_header("Content-Length", "0")
                handler.end_headers()

            def log_message(handler, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def of_trace(self, trace: str) -> dict[str, tuple]:
        """Service and span of each span of a trace, by the span's name."""
        return {span.name: (service, span) for service, span in self.spans if span.trace_id.hex() == trace}


@pytest.fixture(scope="module")
def collector():
    collector = Collector()
    yield collector
    collector.server.shutdown()


@contextmanager
def traced(server, folder, endpoint: str, **variables: str):
    server.client.flushall()
    site = Furnished(server.url, folder, log="json", api_processes=1)
    site.environment |= {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100", **variables}
    try:
        with open(folder / "log", "ab") as log:
            site.api(stderr=log)
        site.furnish(server)
        yield site
    finally:
        site.close()


@pytest.fixture(scope="module")
def site(embedded, collector, tmp_path_factory):
    with traced(embedded, tmp_path_factory.mktemp("site"), collector.url) as site:
        yield site


def attributes(span) -> dict:
    return {a.key: a.value.string_value or a.value.int_value for a in span.attributes}


def test_a_comment_is_a_span_of_the_callers_trace_with_its_call_of_redis_below(site, collector):
    with site.client("bob") as bob:
        sent = {**HEADERS, "Idempotency-Key": "secret-key"}
        answer = bob.post(f"/v1/posts/{site.post}/comments?q=secret-query", json={"text": "secret-text"}, headers=sent)
        assert answer.status_code == 201 and answer.headers["request-id"] == TRACE
    spans = until(lambda: len(found := collector.of_trace(TRACE)) == 2 and found, what="both spans")
    service, request = spans["POST /v1/posts/{post}/comments"]
    assert service == "imagegram-api" and request.parent_span_id.hex() == PARENT
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/v1/posts/{post}/comments",
        "http.response.status_code": 201,
    }
    _, call = spans["add_comment"]
    assert call.parent_span_id == request.span_id
    assert request.start_time_unix_nano <= call.start_time_unix_nano <= call.end_time_unix_nano
    assert call.end_time_unix_nano <= request.end_time_unix_nano
    assert b"secret" not in collector.bodies and site.token("bob").encode() not in collector.bodies


def test_the_job_of_an_image_is_in_the_trace_of_the_request_that_created_the_post(site, collector):
    site.start("workers")
    trace = TRACE.replace("0", "1")
    with site.client("alice") as alice:
        alice.headers["traceparent"] = f"00-{trace}-{PARENT}-01"
        created = create_post(alice, photograph())
        del alice.headers["traceparent"]
        key = f"post:{{0}}:{created['id']}"
        assert re.fullmatch(rf"00-{trace}-[0-9a-f]{{16}}-01", site.server.client.hget(key, "trace"))
        wait_until_processed(alice, created)
    service, job = until(lambda: collector.of_trace(trace).get("make_image"), what="the span of the job")
    _, request = until(lambda: collector.of_trace(trace).get("POST /v1/posts"), what="the span of the request")
    assert service == "imagegram-worker" and job.parent_span_id == request.span_id
    assert attributes(job) == {"imagegram.post": created["id"], "imagegram.outcome": "ready"}
    assert not site.server.client.hexists(key, "trace"), "what is stored for it is gone"


def test_a_request_without_a_trace_begins_one_and_one_that_must_not_be_recorded_is_not(site, collector):
    before = len(collector.spans)
    exchange(site.port, head("GET", "/v1/posts", f"traceparent: 00-{'2' * 32}-{PARENT}-00"))
    exchange(site.port, head("GET", "/v2/nothing", "traceparent: 00-malformed"))
    exchange(site.port, b"GET / HTTP/1.1\r\nbad header\r\n\r\n")
    until(lambda: any(span.name == "GET -" for _, span in collector.spans[before:]), what="the span")
    assert not collector.of_trace("2" * 32)


async def test_requests_that_share_a_call_have_it_once_and_each_flight_is_in_the_trace_of_its_first_request(
    site, collector
):
    """A task makes one flight after the other. Each call of Redis must be below a request that waits for it."""
    before = len(collector.spans)

    async def read() -> None:
        async with Line(site.port) as line:
            for _ in range(20):
                assert (await line.ask("GET", "/v1/posts?limit=7")).status == 200

    await asyncio.gather(*(read() for _ in range(8)))

    def arrived():
        spans = [span for _, span in collector.spans[before:]]
        return sum(span.name == "GET /v1/posts" for span in spans) == 160 and spans

    spans = until(arrived, what="all spans")
    requests = {span.span_id: span for span in spans if span.name == "GET /v1/posts"}
    calls = [span for span in spans if span.name == "feed_page"]
    assert 20 <= len(calls) <= 160
    for call in calls:
        request = requests[call.parent_span_id]
        assert request.start_time_unix_nano <= call.start_time_unix_nano
        assert call.end_time_unix_nano <= request.end_time_unix_nano
    assert len({call.parent_span_id for call in calls}) == len(calls)


def test_a_request_that_waits_has_its_own_calls_of_redis_and_not_those_that_ask_for_all_who_wait(site, collector):
    trace = TRACE.replace("0", "3")
    parent = f"traceparent: 00-{trace}-{PARENT}-01"
    name = "GET /v1/changes"
    since = exchange(site.port, head("GET", "/v1/changes")).json()["next"]
    waits = head("GET", f"/v1/changes?since={since}", parent, "Prefer: wait=1")
    assert exchange(site.port, waits).json()["items"] == []
    until(lambda: name in collector.of_trace(trace), what="the span of the request")
    assert sorted(span.name for _, span in collector.spans if span.trace_id.hex() == trace) == [
        name,
        "changes_page",
        "changes_page",
    ]


@pytest.mark.parametrize("kind", ["away", "hangs"])
def test_a_collector_that_is_away_or_hangs_slows_nothing_and_is_logged_once(kind, embedded, tmp_path):
    with create_server(("127.0.0.1", 0)) as listening:  # it accepts connections and never answers
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        if kind == "away":
            listening.close()
        with traced(embedded, tmp_path, url, OTEL_EXPORTER_OTLP_TIMEOUT="1") as site:
            with site.client("bob") as bob:
                took = []
                for _ in range(100):
                    began = time.monotonic()
                    assert bob.post(f"/v1/posts/{site.post}/comments", json={"text": "a"}).status_code == 201
                    took.append(time.monotonic() - began)
                assert sorted(took)[50] < 0.1
                log = tmp_path / "log"
                until(lambda: "collector of traces" in log.read_text(), 30, "a line about it")
                for _ in range(20):
                    bob.post(f"/v1/posts/{site.post}/comments", json={"text": "a"})
            began = time.monotonic()
            site.processes[0].terminate()
            assert site.processes[0].wait(20) == 0
            assert time.monotonic() - began < 5
            assert log.read_text().count("collector of traces") == 1 and "opentelemetry" not in log.read_text()


PROGRAM = """
import asyncio, json, sys
from api.app import create
from storage import settings
import workers.__main__, workers.jobs, storage.__main__
app = create(settings.load())
print([name for name, module in sys.modules.items() if module and name.startswith("opentelemetry")])
"""


def test_without_its_variables_nothing_of_opentelemetry_is_imported(serving, tmp_path):
    """Neither when the modules of all processes are imported, nor in an API process that has answered requests."""
    exchange(serving.port, head("GET", "/v1/posts", f"traceparent: {HEADERS['traceparent']}"))
    (child,) = psutil.Process(serving.processes[0].pid).children()
    assert not [file.path for file in child.memory_maps() if "google" in file.path or "protobuf" in file.path]
    environment = {**serving.environment, "OTEL_TRACES_EXPORTER": "none"}
    run = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_exporter_that_there_is_not_is_refused_in_one_line(tmp_path):
    environment = {**os.environ, "OTEL_TRACES_EXPORTER": "zipkin", "IMAGEGRAM_DATA": str(tmp_path)}
    run = [sys.executable, "-m", "api"]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "OTEL_TRACES_EXPORTER=zipkin: expected otlp or none\n")
