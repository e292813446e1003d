"""Asks at steady rates, whatever the answers take: `python -m tests.bench.pace PLAN`.

PLAN is a file with JSON: `port`, and `streams`, each with `name`, `rate` a second, `method`, `paths` of which one is
drawn, `headers`, `body` and the `status` that is wanted. Says `begins`; at a line on its input it ends and prints as
JSON what it saw. A call's time runs from the moment it was due, so that none is spared by those before it that hang.

Plain sockets: an HTTP library would take the core that it shares with what it asks.
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
SHARES = (50, 90, 99, 99.9, 99.99, 100)
WORST = 5
LATE = 0.010  # seconds a timer of this process may be late before that is told: then the machine had no core for it


class Stream:
    def __init__(self, port: int, plan: dict):
        self.name, self.rate, self.method = plan["name"], plan["rate"], plan["method"].encode()
        self.paths, status = [path.encode() for path in plan["paths"]], plan["status"]
        data = plan["body"].encode("latin-1")
        fields = {"Host": f"127.0.0.1:{port}", **plan["headers"], **({"Content-Length": len(data)} if data else {})}
        head = "".join(f"{field}: {value}\r\n" for field, value in fields.items())
        self.rest, self.port, self.wanted = head.encode() + b"\r\n" + data, port, b"HTTP/1.1 %d" % status
        self.waiting: asyncio.Queue = asyncio.Queue()
        self.taken: list[float] = []  # seconds
        self.worst: list[tuple[float, float]] = []  # ms, and when it was due, unix time
        self.errors = Counter()

    async def connection(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        while due := await self.waiting.get():
            writer.write(b"%b %b HTTP/1.1\r\n%b" % (self.method, random.choice(self.paths), self.rest))
            answer = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            taken = time.monotonic() - due
            self.taken.append(taken)
            heapq.heappush(self.worst, (taken * 1000, time.time() - taken))
            if len(self.worst) > WORST:
                heapq.heappop(self.worst)
            if not answer.startswith(self.wanted):
                self.errors[answer.split(b"\r\n")[0].decode()] += 1
        writer.close()

    def told(self, seconds: float) -> dict:
        self.taken.sort()
        count = len(self.taken)
        at = [self.taken[min(count - 1, int(count * share / 100))] * 1000 for share in SHARES]
        bins = Counter(f"{taken * 1000:.2g}" for taken in self.taken)
        return {
            "count": count,
            "rate": count / seconds,
            "errors": dict(self.errors),
            "percentiles": list(zip(SHARES, at, strict=True)),
            "worst": sorted(self.worst, reverse=True),
            "histogram": sorted((float(ms), number) for ms, number in bins.items()),
        }


async def keep(streams: list[Stream]) -> dict:
    late: list[tuple[float, float]] = []  # ms, unix time
    async with asyncio.TaskGroup() as tasks:
        for stream in streams:
            for _ in range(CONNECTIONS):
                tasks.create_task(stream.connection())
        ended = tasks.create_task(asyncio.to_thread(sys.stdin.readline))
        began, sent, before = time.monotonic(), [0] * len(streams), time.monotonic()
        print("begins", flush=True)
        while not ended.done():
            now = time.monotonic()
            if now - before > 0.002 + LATE:
                late.append(((now - before) * 1000, time.time()))
            before = now
            for number, stream in enumerate(streams):
                while sent[number] < (now - began) * stream.rate:
                    stream.waiting.put_nowait(began + sent[number] / stream.rate)
                    sent[number] += 1
            await asyncio.sleep(0.002)
        seconds = time.monotonic() - began
        for stream in streams:
            for _ in range(CONNECTIONS):
                stream.waiting.put_nowait(None)
    return {"late": late, "streams": {stream.name: stream.told(seconds) for stream in streams}}


if __name__ == "__main__":
    plan = orjson.loads(Path(sys.argv[1]).read_bytes())
    made = [Stream(plan["port"], stream) for stream in plan["streams"]]
    sys.stdout.buffer.write(orjson.dumps(uvloop.run(keep(made))) + b"\n")
