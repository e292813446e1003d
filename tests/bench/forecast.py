"""Measures the whole system, as `make run` starts it, at the forecast load and far above it.

Redis, API, worker and shipper share the cores with the driver, as they would on a machine of this size. In the middle
of each run Redis rewrites its append-only file. The table names what else happened during the slowest calls.
"""

import contextlib
import io
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson
import redis

from tests.bench import fill
from tests.bench.drive import steady
from tests.bench.images import photograph
from tests.bench.parts import DAY, Filling
from tests.bench.table import Row
from tests.conftest import Site, until

POSTS, COMMENTS = 10_000, 100_000
FEED = "/v1/posts?limit=10"
TARGET = 50  # ms
STALL_MS = 5  # Redis' latency monitor records events that take this long
LIMITS = "read=9000000/s,comment=9000000/s,post=9000000/s,upload_bytes=9000G/d"  # are checked, and refuse nothing
AROUND = 0.6  # seconds: an event this close to a slow call may have slowed it
BOUNDARY = "------------------------d74496d66958873e"


@dataclass
class Load:
    """Calls a second of each kind. `share` percent of all calls except uploads must take at most TARGET ms."""

    name: str
    comments: float
    feeds: float
    images: float
    share: float


LOADS = [
    Load("the forecast", 28, 72, 1000 / 3600, 100),
    Load("50 × the comments, 3.6 × the images", 1400, 300, 1, 99.9),
]


class System(Filling, Site):
    """All parts on an embedded Redis, with as many API processes as cores."""

    def __init__(self, folder: Path):
        self.socket = f"{folder}/redis/redis.sock"
        super().__init__(f"unix://{self.socket}", folder, workers=os.cpu_count(), limits=LIMITS)
        self.start("storage", "redis")
        self.client = redis.Redis(unix_socket_path=self.socket, decode_responses=True)
        until(self.client.ping, what="Redis")

    def work_done(self) -> bool:
        """Whether every post is ready or failed and no chunk waits to be erased."""
        return not self.client.zcard("due:{0}") and not self.client.zcard("turns:{0}")


def form(image: bytes) -> tuple[dict[str, str], str]:
    """The headers and the body of a multipart form with an image."""
    begin = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'.encode()
    body = begin + image + f"\r\n--{BOUNDARY}--\r\n".encode()
    return {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}, body.decode("latin-1")


def plan(system: System, load: Load, ids: list[str], image: bytes) -> dict:
    """The plan for `steady`. Half of the feed calls are for the first page, half have one of 100 cursors."""
    bearer = {"Authorization": f"Bearer {system.token('forecaster', exp=int(time.time()) + DAY)}"}
    form_headers, form_body = form(image)
    feed = {
        "name": "feed",
        "rate": load.feeds,
        "method": "GET",
        "paths": [FEED] * 100 + [f"{FEED}&cursor={cursor}" for cursor in fill.cursors(system, system.url, 100)],
        "headers": {"Accept-Encoding": "br"},
        "body": "",
        "status": 200,
    }
    comment = {
        "name": "comment",
        "rate": load.comments,
        "method": "POST",
        "paths": [f"/v1/posts/{post}/comments" for post in ids],
        "headers": bearer,
        "body": orjson.dumps({"text": fill.TEXT}).decode(),
        "status": 201,
    }
    upload = {
        "name": "upload",
        "rate": load.images,
        "method": "POST",
        "paths": ["/v1/posts"],
        "headers": {**bearer, **form_headers},
        "body": form_body,
        "status": 201,
    }
    return {"port": system.port, "streams": [feed, comment, upload]}


def stalls(client: redis.Redis) -> dict[tuple[str, int], int]:
    """Redis' latency events: the longest in ms, by name and second. Redis keeps 160 seconds of an event."""
    events = [event for event, *_ in client.execute_command("LATENCY", "LATEST")]
    return {
        (event, second): ms for event in events for second, ms in client.execute_command("LATENCY", "HISTORY", event)
    }


def run(system: System, load: Load, ids: list[str], image: bytes, seconds: float) -> tuple[dict, list]:
    """Runs a load. Returns the driver's results and what Redis did meanwhile, as pairs of unix time and text."""
    events: list[tuple[float, str]] = []
    stalled: dict[tuple[str, int], int] = {}
    system.client.config_set("latency-monitor-threshold", STALL_MS)
    system.client.execute_command("LATENCY", "RESET")
    with steady(plan(system, load, ids, image)) as results:
        end = time.monotonic() + seconds
        rewritten = False
        while time.monotonic() < end:
            if not rewritten and end - time.monotonic() < seconds / 2:
                system.client.bgrewriteaof()
                rewritten = True
            if system.client.info("persistence")["aof_rewrite_in_progress"]:
                events.append((time.time(), "a rewrite of the append-only file"))
            stalled |= stalls(system.client)
            time.sleep(0.2)
    stalled |= stalls(system.client)
    events += [(second + 0.5, f"Redis: {event}, {ms} ms") for (event, second), ms in stalled.items()]
    until(system.work_done, 300, "the end of all image work")
    return results, events


def cause(moment: float, ms: float, late: list, events: list[tuple[float, str]]) -> str:
    """What else happened during a call that was due at `moment` (unix time) and took `ms`.

    `late` has the ticks of the driver that came late: ms and unix time.
    """
    end = moment + ms / 1000
    during = [what for at, what in events if moment - AROUND <= at <= end + AROUND]
    lags = [lag for lag, at in late if moment - 0.02 <= at <= end + 0.02]
    if lags:
        during.append(f"the driver itself had no core for {max(lags):.0f} ms")
    return "; ".join(dict.fromkeys(during)) or "nothing that was recorded"


def load_rows(load: Load, results: dict, events: list) -> list[Row]:
    """The rows of the table for a load: all calls except uploads, then each kind of call."""
    streams = results["streams"]
    others = [stream for name, stream in streams.items() if name != "upload"]
    value = max(dict(map(tuple, stream["percentiles"]))[load.share] for stream in others)
    worst_ms, worst_at = max(tuple(call) for stream in others for call in stream["worst"])
    errors = sum(sum(stream["errors"].values()) for stream in streams.values())
    note = ", ".join(f"{stream['rate']:,.1f} {name}s/s" for name, stream in streams.items())
    if worst_ms > TARGET:
        note += f"; during the slowest call: {cause(worst_at, worst_ms, results['late'], events)}"
    what = "the slowest call except uploads" if load.share == 100 else f"p{load.share:g} of all calls except uploads"
    rows = [Row(f"{load.name}: {what}", value, TARGET, most=True, unit="ms", note=note, errors=errors)]
    for name, stream in streams.items():
        at = dict(map(tuple, stream["percentiles"]))
        during = cause(stream["worst"][0][1], at[100], results["late"], events)
        note = f"p99.9 {at[99.9]:.1f} ms; during the slowest: {during}"
        rows.append(Row(f"{load.name}: {name}", rate=stream["rate"], p50=at[50], p99=at[99], max=at[100], note=note))
    return rows


def shipped(folder: Path) -> int:
    """Bytes of increments in the backup store."""
    return sum(path.stat().st_size for path in folder.glob("backup/*/*.incr.aof/*"))


def measure(seconds: float) -> tuple[list[Row], dict[str, dict]]:
    """Measures each load for `seconds` s. Returns the rows of the table, and the driver's results by load."""
    rows, results = [], {}
    picture = io.BytesIO()
    photograph(1632, 1224).save(picture, "JPEG", quality=85)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ig-")))
        system = System(folder)
        stack.callback(system.close)
        ids = fill.fill(system, fill.counts(POSTS, COMMENTS))
        for command in (("api",), ("workers",), ("storage", "ship")):
            system.start(*command)
        until(lambda: httpx.get(f"{system.url}/readyz").status_code == 200, what="the API")
        for load in LOADS:
            before = shipped(folder)
            results[load.name], events = run(system, load, ids, picture.getvalue(), seconds)
            rows += load_rows(load, results[load.name], events)
            hourly = (shipped(folder) - before) * 3600 / seconds / 2**20
            rows.append(Row(f"{load.name}: shipped to the backup, without bases", hourly, unit="MiB/h"))
    return rows, results
