"""Every metric, and how the processes of a command count together.

    process 1 ──► slice 1 ─┐
    process 2 ──► slice 2 ─┼──► a scrape, by any of them, adds the slices
    process 3 ──► slice 3 ─┘

The slices are one shared memory, which the command's first process creates (`share`) and all of its processes use
(`attach`). A process adds to numbers in its own slice, so there is no lock, and a scrape misses nothing. A counter
takes 0.05 µs, a histogram 0.2. What a process has counted stays when it is killed. All numbers begin at 0 when the
command starts again; Prometheus' `rate` expects that.

prometheus_client writes the text. Its own mode for several processes was rejected. It takes 0.7 µs for a counter and
1.6 for a histogram. It also leaves a file for each process that ever ran, and a worker forks one for each image.

docs/metrics.md says what each metric means.
"""

import logging
import mmap
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

log = logging.getLogger("imagegram.metrics")

# Bytes of a slice: enough for 1,000 series. Label values are bounded, and a busy API process has about 200 series.
# Only pages that are used take memory.
SLICE = 256 * 1024
WORD = 8  # bytes


class Metric(NamedTuple):
    """What docs/metrics.md lists: a name, what it means, the names of its labels, and for a histogram its buckets."""

    parts: str  # which commands serve it: api, worker, ship
    name: str
    kind: str  # counter, gauge, histogram
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper bounds, ascending; one more without a bound follows

    def series(self, *values: str) -> "Series":
        """The series with these label values. The same values give the same object. Their number must be bounded."""
        key = "\0".join((self.name, *values)).encode()
        if key not in _series:
            _series[key] = Series(key, self.buckets)
        return _series[key]


class Series:
    """The numbers of one metric and one combination of label values, in the slice of this process."""

    __slots__ = ("_key", "_buckets", "_cells", "_at")

    def __init__(self, key: bytes, buckets: tuple[float, ...]):
        self._key, self._buckets = key, buckets
        self.place()

    def place(self) -> None:
        """Find this process's numbers, or begin them at 0."""
        self._cells, self._at = _own.find(self._key, len(self._buckets) + 2 if self._buckets else 1)

    def add(self, amount: float = 1.0) -> None:
        """Count, in a counter. A gauge may also count down."""
        self._cells[self._at] += amount

    def observe(self, value: float) -> None:
        """Count a value in its bucket and in the sum, in a histogram."""
        cells, at = self._cells, self._at
        cells[at] += value
        cells[at + 1 + bisect_left(self._buckets, value)] += 1.0


class Slice:
    """The numbers of one process. Only this process writes there.

    In words of 8 bytes: how many words are used, then the series one after the other. A series is the length of its
    key, the number of its cells, the key, and the cells. The first word is written last, so a scrape of another process
    sees a series whole or not at all.
    """

    def __init__(self, memory: memoryview):
        self._bytes, self._words, self._cells = memory, memory.cast("q"), memory.cast("d")
        self._places: dict[bytes, int] = {}  # key -> the word where its cells begin
        self._read = 1  # the words before this one are in `_places`

    def series(self, start: int = 1) -> Iterator[tuple[bytes, int, int]]:
        """The key of each series, the word where its cells begin, and how many cells it has."""
        at, used = start, self._words[0]
        while at < used:
            length, size = self._words[at], self._words[at + 1]
            cells = at + 2 + -(-length // WORD)
            yield bytes(self._bytes[(at + 2) * WORD :][:length]), cells, size
            at = cells + size

    def numbers(self) -> Iterator[tuple[bytes, list[float]]]:
        for key, at, size in self.series():
            yield key, self._cells[at : at + size].tolist()

    def find(self, key: bytes, size: int) -> tuple[memoryview, int]:
        """The cells of a series, and where they begin. A slice that is full gives cells that no scrape reads."""
        for known, cells, count in self.series(self._read):  # a process that used this slice before may have begun it
            self._places[known], self._read = cells, cells + count
        if key not in self._places:
            at = self._read
            cells = at + 2 + -(-len(key) // WORD)
            if cells + size > len(self._words):
                log.error("%r is not counted: there are too many series", key)
                return memoryview(bytearray(size * WORD)).cast("d"), 0
            self._words[at], self._words[at + 1] = len(key), size
            self._bytes[(at + 2) * WORD :][: len(key)] = key
            self._words[0] = self._read = cells + size
            self._places[key] = cells
        return self._cells, self._places[key]


_series: dict[bytes, Series] = {}
_own = Slice(memoryview(bytearray(SLICE)))  # of a process that shares nothing
_slices = [_own]  # of all processes of this command


def share(processes: int) -> int:
    """Create the shared memory for a command's processes. Returns its file descriptor.

    A fork inherits it. A program that is started must be passed it.
    """
    memory = os.memfd_create("imagegram-metrics")
    os.ftruncate(memory, processes * SLICE)
    return memory


def attach(memory: int, number: int) -> None:
    """From now on this process counts in slice `number`, from 0 on, of a shared memory.

    No other process may do so at the same time, but one after the other may.
    """
    global _own, _slices
    whole = memoryview(mmap.mmap(memory, 0))
    _slices = [Slice(whole[start : start + SLICE]) for start in range(0, len(whole), SLICE)]
    _own = _slices[number]
    for series in _series.values():
        series.place()


# What is read at the moment of a scrape: a gauge, its label values, its value
Reading = tuple[Metric, tuple[str, ...], float]


def collect(part: str, readings: Iterable[Reading]) -> Iterator[Family]:
    """The metrics of all processes of a command (api, worker or ship), and the gauges that were just read.

    It runs in a thread. Python lets another thread that waits run only after 5 ms, which is long for the API's event
    loop. So this one gives way (`sleep(0)`) after each step.
    """
    totals: dict[bytes, list[float]] = {}
    for each in _slices:
        for key, numbers in each.numbers():
            known = totals.get(key)
            totals[key] = numbers if known is None else [a + b for a, b in zip(known, numbers, strict=True)]
        time.sleep(0)
    families: dict[str, Family] = {}
    for key, numbers in sorted(totals.items()):
        name, *values = key.decode().split("\0")
        metric = METRICS[name]
        if part not in metric.parts:
            continue
        if metric.kind != "histogram":
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            families.setdefault(name, kind(name, metric.help, labels=metric.labels)).add_metric(values, numbers[0])
        else:
            histogram = families.setdefault(name, HistogramMetricFamily(name, metric.help, labels=metric.labels))
            buckets, below = [], 0.0
            for bound, count in zip((*metric.buckets, float("inf")), numbers[1:], strict=True):
                below += count
                buckets.append((f"{bound:g}" if bound < float("inf") else "+Inf", below))
            histogram.add_metric(values, buckets, numbers[0])
    for metric, labels, value in readings:
        gauge = families.setdefault(metric.name, GaugeMetricFamily(metric.name, metric.help, labels=metric.labels))
        gauge.add_metric(labels, value)
    for family in families.values():
        yield family
        time.sleep(0)


class _Collected(Collector):
    def __init__(self, part: str, read: Callable[[], Iterable[Reading]]):
        self._part, self._read = part, read

    def collect(self) -> Iterator[Family]:
        return collect(self._part, self._read())


def _registry(part: str, read: Callable[[], Iterable[Reading]]) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(part, read))
    return registry


def render(part: str, readings: Iterable[Reading]) -> bytes:
    """Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats/)."""
    return generate_latest(_registry(part, lambda: readings))


def serve(part: str, address: tuple[str, int] | None, read: Callable[[], Iterable[Reading]] = tuple) -> None:
    """Answer scrapes at a host and a port, in a thread, for a command that serves nothing else. None: do not.

    If the address is taken, this is logged and the command goes on: several workers may have the same settings, and
    their work is worth more than their metrics.
    """
    if address:
        host, port = address
        try:
            server, _ = start_http_server(port, host, _registry(part, read))
        except OSError as error:
            log.error("no metrics at %s:%d: %s", host, port, error.strerror)
        else:
            log.info("metrics at http://%s:%d/metrics", host, server.server_port)


METRICS: dict[str, Metric] = {}  # by name


def _define(
    parts: str, kind: str, name: str, about: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = ()
) -> Metric:
    METRICS[name] = Metric(parts, name, kind, about, labels, buckets)
    return METRICS[name]


def _counter(parts: str, name: str, about: str, *labels: str) -> Metric:
    return _define(parts, "counter", name, about, labels)


def _gauge(parts: str, name: str, about: str, *labels: str) -> Metric:
    return _define(parts, "gauge", name, about, labels)


# Upper bounds in seconds. Around the promise of 50 ms they are close, so that a percentile there is exact.
REQUEST_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.1, 0.25, 1.0, 5.0, 30.0)
ROUND_TRIP_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)  # 0.9 s is the deadline
PIPELINE_COMMANDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
# A small image takes 0.2 s. An attempt that a crash has cut short is repeated after one minute.
READY_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 1800.0)

# Requests
REQUESTS = _counter("api", "imagegram_requests_total", "Answered requests.", "route", "method", "status")
DURATIONS = _define(
    "api",
    "histogram",
    "imagegram_request_duration_seconds",
    "From the end of a request's header to the beginning of its answer.",
    ("route", "method"),
    REQUEST_SECONDS,
)
PROBLEMS = _counter("api", "imagegram_problems_total", "Answers that are a problem, by code.", "code")
LIMITED = _counter("api", "imagegram_limited_requests_total", "Requests over a rate limit, by its class.", "class")
FLIGHTS = _counter("api", "imagegram_flights_total", "Reads that requests for one address share.").series()
PASSENGERS = _counter("api", "imagegram_flight_requests_total", "Requests that shared these reads.").series()

WAITING_REQUESTS = _gauge("api", "imagegram_requests_waiting", "Requests that wait for news (Prefer: wait).").series()

# Redis, by every process that calls it with storage/db/client.py
PIPELINES = _define(
    "api worker",
    "histogram",
    "imagegram_redis_pipeline_commands",
    "Commands that left together.",
    ("channel",),
    PIPELINE_COMMANDS,
)
ROUND_TRIPS = _define(
    "api worker",
    "histogram",
    "imagegram_redis_round_trip_seconds",
    "From sending a pipeline to its last reply.",
    ("channel",),
    ROUND_TRIP_SECONDS,
)

# Uploads and images
UPLOADS = _counter("api worker", "imagegram_uploads_total", "What happened to uploads.", "event")
OPENED, RESUMED, CONCATENATED, FINISHED, DROPPED, EXPIRED = map(
    UPLOADS.series, ("opened", "resumed", "concatenated", "finished", "dropped", "expired")
)
UPLOAD_BYTES = _counter("api", "imagegram_upload_bytes_total", "Bytes of images that were stored.").series()
IMAGES = _counter("worker", "imagegram_images_total", "Attempts at images, by how they ended.", "outcome")
READY_AFTER = _define(
    "worker",
    "histogram",
    "imagegram_image_ready_seconds",
    "From the creation of a post to its picture.",
    (),
    READY_SECONDS,
).series()

# The backup
SHIPPED_OBJECTS = _counter("ship", "imagegram_backup_objects_total", "Objects put into the backup store.").series()
SHIPPED_BYTES = _counter("ship", "imagegram_backup_bytes_total", "Bytes put into the backup store.").series()

# Read at the moment of a scrape
REDIS_UP = _gauge("api", "imagegram_redis_up", "1 if Redis has answered this scrape.")
# `node` is `host:port` of a primary of a Cluster. A single Redis has no such label.
NODE_UP = _gauge("api", "imagegram_redis_node_up", "1 if this primary of a Cluster has answered this scrape.", "node")
MEMORY = _gauge("api", "imagegram_redis_memory_bytes", "Memory that Redis uses.", "node")
MEMORY_LIMIT = _gauge(
    "api", "imagegram_redis_memory_limit_bytes", "maxmemory, or the memory of Redis' machine.", "node"
)
AOF_OK = _gauge("api", "imagegram_redis_aof_ok", "1 if Redis could write and rewrite its file the last time.", "node")
FORK = _gauge("api", "imagegram_redis_fork_seconds", "How long the last fork stopped Redis.", "node")
OPERATIONS = _gauge("api", "imagegram_redis_commands_per_second", "Commands a second, as Redis counts them.", "node")
OPEN_UPLOADS = _gauge("api", "imagegram_uploads_open", "Uploads that can be continued.")
WAITING = _gauge("api", "imagegram_work_waiting", "Work that is due.", "queue")
OLDEST = _gauge("api", "imagegram_work_oldest_seconds", "How long the oldest due work has waited.", "queue")
STORE_FREE = _gauge("api", "imagegram_store_free_bytes", "Free space on the disk of the store of images.")
STORE_SIZE = _gauge("api", "imagegram_store_size_bytes", "Size of that disk.")
LAG = _gauge("api ship", "imagegram_backup_lag_seconds", "Seconds of data that a lost machine would cost.")
TRIAL = _gauge("api ship", "imagegram_backup_trial_timestamp_seconds", "When the last trial restore began.")
TRIAL_OK = _gauge("api ship", "imagegram_backup_trial_ok", "1 if the last trial restore succeeded.")
TRIAL_FLAWS = _gauge("api ship", "imagegram_backup_trial_flaws", "Flaws in the data that it restored.")
