"""What it costs that 2,000 requests wait (`Prefer: wait=18`), and how soon they hear of a change."""

import asyncio
import random
import tempfile
import time
from pathlib import Path

from storage import keys
from tests.bench import fill
from tests.bench.parts import Api, Redis
from tests.bench.table import Row

WAITERS = 2000  # each waits for a post of its own
SECONDS = 5  # for which Redis' time is counted
HEARD = 100  # posts that are processed one after the other
WAIT = 18  # seconds: as long as the measurement takes
EVERY = 0.07  # seconds between two of them, so that they fall into all parts of the pause between two questions


def pss(pid: int) -> int:
    """Bytes of memory of a process. Pages that it shares with others are divided among them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel does not tell")


def redis_seconds(server: Redis) -> float:
    """Seconds of CPU that the server has used."""
    cpu = server.client.info("cpu")
    return cpu["used_cpu_user"] + cpu["used_cpu_sys"]


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer

    async def ask(self, path: str, wait: int = 0) -> float:
        """The time (monotonic) at which the answer began."""
        prefer = f"Prefer: wait={wait}\r\n" if wait else ""
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{prefer}\r\n".encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        when = time.monotonic()
        assert head.startswith(b"HTTP/1.1 200"), head
        await self._reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
        return when


def process(server: Redis, post: str) -> float:
    """Ends the processing of a post. Returns when (monotonic)."""
    server.client.hset(keys.post(post), mapping={"status": "failed", "code": "truncated", "detail": "it ends"})
    return time.monotonic()


async def run(server: Redis, api: Api, posts: list[str]) -> dict:
    (pid,) = api.pids()
    clients = [Client(*await asyncio.open_connection("127.0.0.1", api.port)) for _ in posts]
    for client in clients:
        await client.ask(f"/v1/posts/{posts[0]}")
    idle = pss(pid)
    before = redis_seconds(server)
    await asyncio.sleep(SECONDS)
    alone = redis_seconds(server) - before

    waiting = {
        post: asyncio.create_task(client.ask(f"/v1/posts/{post}", WAIT))
        for post, client in zip(posts, clients, strict=True)
    }
    await asyncio.sleep(3)
    before = redis_seconds(server)
    await asyncio.sleep(SECONDS)
    asked = redis_seconds(server) - before - alone
    memory = pss(pid) - idle
    heard = []
    for post in random.sample(posts, HEARD):
        processed = process(server, post)
        heard.append(asyncio.create_task(_delay(waiting[post], processed)))
        await asyncio.sleep(EVERY)
    delays = sorted(await asyncio.gather(*heard))
    await asyncio.gather(*waiting.values())

    fresh = fill.post_id(int(time.time() * 1000))
    server.client.hset(keys.post(fresh), mapping={"author": "alice", "caption": "", "status": "processing"})
    together = [asyncio.create_task(client.ask(f"/v1/posts/{fresh}", WAIT)) for client in clients]
    await asyncio.sleep(3)
    processed = process(server, fresh)
    last = max(await asyncio.gather(*together)) - processed
    return {"share": asked / SECONDS, "memory": memory, "delays": delays, "last": last}


async def _delay(answer: asyncio.Task, since: float) -> float:
    return await answer - since


def measure() -> list[Row]:
    server = Redis()
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        api = Api(server, Path(folder))
        try:
            now = int(time.time() * 1000)
            posts = [fill.post_id(now + number) for number in range(WAITERS)]
            for number, post in enumerate(posts):
                fields = {"author": fill.AUTHOR % number, "caption": fill.CAPTION % number, "status": "processing"}
                server.client.hset(keys.post(post), mapping={**fields, "attempt": 0, "upload": f"u{post}"})
            found = asyncio.run(run(server, api, posts))
        finally:
            api.close()
            server.close()
    delays = found["delays"]
    return [
        Row(f"{WAITERS:,} wait: Redis' time", found["share"] * 100, 2, most=True, unit="%", note="of one core"),
        Row(f"{WAITERS:,} wait: memory of the API", found["memory"] / 1e6, 20, most=True, unit="MB"),
        Row(
            f"{WAITERS:,} wait: one hears of its post",
            delays[-1] * 1000,
            200,
            most=True,
            unit="ms",
            p50=delays[len(delays) // 2] * 1000,
            p99=delays[int(len(delays) * 0.99) - 1] * 1000,
            max=delays[-1] * 1000,
        ),
        Row(f"{WAITERS:,} wait for one post: the last one hears", found["last"] * 1000, unit="ms", note="one process"),
    ]
