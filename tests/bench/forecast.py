"""The whole system, as `make run` starts it, at the forecast and far above it; who took longest is named.

Redis, API, worker and shipper share the cores with the driver, as they would on a machine of this size. A snapshot is
forced in the middle, so that a rewrite of the append-only file falls into each run.
"""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson
import redis

from tests.bench import fill
from tests.bench.images import photograph
from tests.bench.parts import DAY, Filling
from tests.bench.table import Row
from tests.conftest import ROOT, Site, until

POSTS, COMMENTS = 10_000, 100_000
FEED = "/v1/posts?limit=10"
STALL_MS = 5  # what Redis' latency monitor notes
BOUNDARY = "------------------------d74496d66958873e"


@dataclass
class Load:
    """Calls a second of each kind, and what must hold: `share` percent of all calls but uploads within `most` ms."""

    name: str
    comments: float
    feeds: float
    images: float
    share: float
    most: float = 50


LOADS = [
    Load("the forecast", 28, 72, 1000 / 3600, 100),
    Load("50 × the comments, 3.6 × the images", 1400, 300, 1, 99.9),
]


class System(Filling, Site):
    """All parts, on an embedded Redis, with as many API processes as cores."""

    def __init__(self, folder: Path):
        self.socket = f"{folder}/redis/redis.sock"
        super().__init__(f"unix://{self.socket}", folder, workers=os.cpu_count())
        self.start("storage", "redis")
        self.client = redis.Redis(unix_socket_path=self.socket, decode_responses=True)
        until(self.client.ping, what="Redis")

    def ready(self) -> bool:
        """Every post has ended, and every chunk is erased."""
        return not self.client.zcard("due:{0}") and not self.client.zcard("turns:{0}")


def form(image: bytes) -> dict:
    begin = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'.encode()
    body = begin + image + f"\r\n--{BOUNDARY}--\r\n".encode()
    return {"body": body.decode("latin-1"), "headers": {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}}


def plan(system: System, load: Load, ids: list[str], image: bytes) -> dict:
    bearer = {"Authorization": f"Bearer {system.token('forecaster', exp=int(time.time()) + DAY)}"}
    comment = orjson.dumps({"text": fill.TEXT}).decode()
    places = [FEED] * 100 + [f"{FEED}&cursor={cursor}" for cursor in fill.cursors(system, 100)]
    sent = form(image)
    plain = {"headers": {"Accept-Encoding": "br"}, "body": "", "status": 200}
    streams = [
        {"name": "feed", "rate": load.feeds, "method": "GET", "paths": places, **plain},
        {
            **{"name": "comment", "rate": load.comments, "method": "POST", "body": comment, "headers": bearer},
            **{"paths": [f"/v1/posts/{post}/comments" for post in ids], "status": 201},
        },
        {
            **{"name": "upload", "rate": load.images, "method": "POST", "paths": ["/v1/posts"], "status": 201},
            **{"headers": {**bearer, **sent["headers"]}, "body": sent["body"]},
        },
    ]
    return {"port": system.port, "streams": streams}


def stalls(client: redis.Redis) -> dict[tuple[str, int], int]:
    """Redis' latency events by name and second: the longest of each in ms. Redis keeps 160 seconds of an event."""
    events = [event for event, *_ in client.execute_command("LATENCY", "LATEST_COMMENTS")]
    return {
        (event, second): ms for event in events for second, ms in client.execute_command("LATENCY", "HISTORY", event)
    }


def run(system: System, load: Load, ids: list[str], image: bytes, seconds: float) -> tuple[dict, list]:
    """What the driver saw, and what Redis did meanwhile: (unix time, what)."""
    happened: list[tuple[float, str]] = []
    stalled: dict[tuple[str, int], int] = {}
    system.client.config_set("latency-monitor-threshold", STALL_MS)
    system.client.execute_command("LATENCY", "RESET")
    with tempfile.NamedTemporaryFile("wb", suffix=".json") as kept:
        kept.write(orjson.dumps(plan(system, load, ids, image)))
        kept.flush()
        command = [sys.executable, "-m", "tests.bench.pace", kept.name]
        driver = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert driver.stdout.readline() == "begins\n"
        ends, rewritten = time.monotonic() + seconds, False
        while time.monotonic() < ends:
            if not rewritten and ends - time.monotonic() < seconds / 2:
                system.client.bgrewriteaof()
                rewritten = True
            if system.client.info("persistence")["aof_rewrite_in_progress"]:
                happened.append((time.time(), "a rewrite of the append-only file"))
            stalled |= stalls(system.client)
            time.sleep(0.2)
        said, _ = driver.communicate("end\n", timeout=120)
    stalled |= stalls(system.client)
    happened += [(second + 0.5, f"Redis: {event}, {ms} ms") for (event, second), ms in stalled.items()]
    until(system.ready, 300, "the end of all image work")
    return orjson.loads(said), happened


def named(moment: float, ms: float, seen: dict, happened: list[tuple[float, str]]) -> str:
    """What else went on while a call was under way."""
    during = [what for at, what in happened if moment - 0.6 <= at <= moment + ms / 1000 + 0.6]
    late = [lag for lag, at in seen["late"] if moment - 0.02 <= at <= moment + ms / 1000 + 0.02]
    if late:
        during.append(f"the driver itself had no core for {max(late):.0f} ms")
    return "; ".join(dict.fromkeys(during)) or "nothing that was noted"


def row(load: Load, seen: dict, happened: list) -> list[Row]:
    calls = {name: stream for name, stream in seen["streams"].items() if name != "upload"}
    asked = max(next(ms for share, ms in stream["percentiles"] if share == load.share) for stream in calls.values())
    worst = max((tuple(call) for stream in calls.values() for call in stream["worst"]), default=(0, 0))
    errors = sum(sum(stream["errors"].values()) for stream in seen["streams"].values())
    rates = ", ".join(f"{stream['rate']:,.1f} {name}s/s" for name, stream in seen["streams"].items())
    what = "the slowest call but uploads" if load.share == 100 else f"p{load.share:g} of all calls but uploads"
    rows = [Row(f"{load.name}: {what}", asked, load.most, most=True, unit="ms", note=rates, errors=errors)]
    for name, stream in seen["streams"].items():
        at = dict(map(tuple, stream["percentiles"]))
        moment = stream["worst"][0][1]
        note = f"p99.9 {at[99.9]:.1f} ms; the slowest: {named(moment, at[100], seen, happened)}"
        rows.append(Row(f"{load.name}: {name}", rate=stream["rate"], p50=at[50], p99=at[99], max=at[100], note=note))
    if worst[0] > load.most:
        rows[0].note += f"; the slowest call: {named(worst[1], worst[0], seen, happened)}"
    return rows


def shipped(folder: Path) -> int:
    """Bytes of increments in the backup store."""
    return sum(path.stat().st_size for path in folder.glob("backup/*/*.incr.aof/*"))


def measure(seconds: float) -> tuple[list[Row], dict[str, dict]]:
    """Rows, and what the driver saw under each load."""
    rows, seen = [], {}
    picture = io.BytesIO()
    photograph(1632, 1224).save(picture, "JPEG", quality=85)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ig-")))
        system = System(folder)
        stack.callback(system.close)
        ids = fill.fill(system, fill.counts(POSTS, COMMENTS))
        for part in (("api",), ("workers",), ("storage", "ship")):
            system.start(*part)
        until(lambda: httpx.get(f"{system.url}/readyz").status_code == 200, what="the API")
        for load in LOADS:
            before = shipped(folder)
            seen[load.name], happened = run(system, load, ids, picture.getvalue(), seconds)
            rows += row(load, seen[load.name], happened)
            hourly = (shipped(folder) - before) * 3600 / seconds / 2**20
            rows.append(Row(f"{load.name}: shipped to the backup, bases aside", hourly, unit="MiB/h"))
    return rows, seen
