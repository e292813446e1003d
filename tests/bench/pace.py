"""Writes comments at a steady rate, whatever the answers take: `python -m tests.bench.pace port rate paths token`.

Says `writes` when it begins; at a line on its input it ends and says how many, in how many seconds, with how many
errors. Plain sockets: an HTTP library would take the core that it shares with the other driver.
"""

import asyncio
import random
import sys
import time
from pathlib import Path

import orjson
import uvloop

from tests.bench.fill import TEXT

CONNECTIONS = 32


async def write(port: int, rate: float, paths: list[str], authorization: str) -> tuple[int, float, int]:
    body = orjson.dumps({"text": TEXT})
    head = f"Host: 127.0.0.1:{port}\r\nAuthorization: {authorization}\r\nContent-Length: {len(body)}\r\n\r\n"
    rest = head.encode() + body
    waiting: asyncio.Queue = asyncio.Queue()
    count = errors = 0

    async def connection():
        nonlocal count, errors
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while path := await waiting.get():
            writer.write(b"POST %b HTTP/1.1\r\n%b" % (path.encode(), rest))
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            count += 1
            errors += not answer.startswith(b"HTTP/1.1 201")
        writer.close()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(CONNECTIONS):
            tasks.create_task(connection())
        ended = tasks.create_task(asyncio.to_thread(sys.stdin.readline))
        began, sent = time.monotonic(), 0
        print("writes", flush=True)
        while not ended.done():
            due = int((time.monotonic() - began) * rate)
            for _ in range(sent, due):
                waiting.put_nowait(random.choice(paths))
            sent = due
            await asyncio.sleep(0.002)
        written, seconds = count, time.monotonic() - began
        for _ in range(CONNECTIONS):
            waiting.put_nowait(None)
    return written, seconds, errors


if __name__ == "__main__":
    port, rate, paths, authorization = sys.argv[1:]
    print(*uvloop.run(write(int(port), float(rate), Path(paths).read_text().split(), authorization)))
