"""Sends requests at steady rates, however long the answers take: `python -m tests.bench.pace PLAN`.

PLAN is a file with JSON: `port` and `streams`. A stream has `name`, `rate` (requests a second), `method`, `paths` (each
request takes one at random), `headers`, `body` and `status`, which the answers must have.

Prints `begins`. When a line comes on standard input it stops and prints its results as JSON. A request's time counts
from the moment at which it was due. So a request that waits behind slow ones counts as slow, too.

Uses plain sockets: an HTTP library would take too much of the core that the driver shares with the servers.
"""

import asyncio
import heapq
import random
import sys
import time
from collections import Counter
from pathlib import Path

import orjson
import uvloop

CONNECTIONS = 32  # of each stream
SHARES = (50, 75, 90, 95, 99, 99.5, 99.9, 99.99, 100)  # percent
WORST = 5  # slowest requests that the results name
TICK = 0.002  # seconds between two checks of what is due
LATE = 0.010  # seconds by which a tick may be late. If it is later, this process had no core: the results name it.


class Stream:
    """Requests of one kind. `due` is a queue of the times (monotonic) at which they are due; None ends a connection."""

    def __init__(self, port: int, plan: dict):
        self.name, self.rate, self.port = plan["name"], plan["rate"], port
        self.method = plan["method"].encode()
        self.paths = [path.encode() for path in plan["paths"]]
        body = plan["body"].encode("latin-1")
        fields = {"Host": f"127.0.0.1:{port}", **plan["headers"], **({"Content-Length": len(body)} if body else {})}
        headers = "".join(f"{field}: {value}\r\n" for field, value in fields.items())
        self.headers_and_body = headers.encode() + b"\r\n" + body
        self.expected = b"HTTP/1.1 %d" % plan["status"]
        self.due: asyncio.Queue = asyncio.Queue()
        self.durations: list[float] = []  # seconds
        self.worst: list[tuple[float, float]] = []  # ms, and the unix time at which it was due
        self.errors: Counter[str] = Counter()  # by status line

    async def connection(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        while due := await self.due.get():
            writer.write(b"%b %b HTTP/1.1\r\n%b" % (self.method, random.choice(self.paths), self.headers_and_body))
            answer = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            took = time.monotonic() - due
            self.durations.append(took)
            heapq.heappush(self.worst, (took * 1000, time.time() - took))
            if len(self.worst) > WORST:
                heapq.heappop(self.worst)
            if not answer.startswith(self.expected):
                self.errors[answer.split(b"\r\n")[0].decode()] += 1
        writer.close()

    def results(self, seconds: float) -> dict:
        """Figures of a stream that ran for `seconds` s. Percentiles are pairs of percent and ms."""
        self.durations.sort()
        count = len(self.durations)
        values = [self.durations[min(count - 1, int(count * share / 100))] * 1000 for share in SHARES]
        return {
            "count": count,
            "rate": count / seconds,
            "errors": dict(self.errors),
            "percentiles": list(zip(SHARES, values, strict=True)),
            "worst": sorted(self.worst, reverse=True),
        }


async def run(streams: list[Stream]) -> dict:
    """Sends the requests of all streams until a line comes on standard input. Returns the results."""
    late: list[tuple[float, float]] = []  # ms between two ticks, and unix time
    async with asyncio.TaskGroup() as tasks:
        for stream in streams:
            for _ in range(CONNECTIONS):
                tasks.create_task(stream.connection())
        line = tasks.create_task(asyncio.to_thread(sys.stdin.readline))
        sent = [0] * len(streams)
        began = before = time.monotonic()
        print("begins", flush=True)
        while not line.done():
            now = time.monotonic()
            if now - before > TICK + LATE:
                late.append(((now - before) * 1000, time.time()))
            before = now
            for number, stream in enumerate(streams):
                while sent[number] < (now - began) * stream.rate:
                    stream.due.put_nowait(began + sent[number] / stream.rate)
                    sent[number] += 1
            await asyncio.sleep(TICK)
        seconds = time.monotonic() - began
        for stream in streams:
            for _ in range(CONNECTIONS):
                stream.due.put_nowait(None)
    return {"late": late, "streams": {stream.name: stream.results(seconds) for stream in streams}}


if __name__ == "__main__":
    plan = orjson.loads(Path(sys.argv[1]).read_bytes())
    results = uvloop.run(run([Stream(plan["port"], stream) for stream in plan["streams"]]))
    sys.stdout.buffer.write(orjson.dumps(results) + b"\n")
