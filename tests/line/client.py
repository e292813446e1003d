"""What a client does at the far end of a line, and what it sees when. One measurement, given and reported as JSON.

    python -m tests.line.client JOB

| member of JOB | |
|---|---|
| `protocol` | `h1` with at most six connections, as browsers have; `h2` and `h3` with one |
| `url`, `token` | the front, and the bearer token of a user |
| `do` | the name of a function below; the other members are its arguments |

Times are seconds since it began to connect; bytes are those of all IP packets that it received until then.
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpcore._async.http2  # noqa: F401  httpx imports it when it has connected
import httpx
from http3 import Http3

TUS = {"Tus-Resumable": "1.0.0"}
URGENT = -10  # niceness; before that it only imports
TOP = 3  # pictures of the feed that a person looks at first
PIECE = 16384  # bytes that are given to a connection at a time
# A connection that breaks loses what it has not sent yet: close() sends an RST. The send buffer is small, so that this
# is less than a tenth of the photograph, and still more than any of these lines holds.
BREAKING = [
    (socket.SOL_SOCKET, socket.SO_SNDBUF, 65536),
    (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)),
]


def received() -> int:
    """Bytes of all packets that this network namespace has received."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    return sum(int(line.split(":")[1].split()[0]) for line in lines if not line.strip().startswith("lo:"))


class Clock:
    """Tells seconds and bytes since its creation."""

    def __init__(self):
        self.began, self.before = time.monotonic(), received()

    def now(self) -> tuple[float, int]:
        return time.monotonic() - self.began, received() - self.before


def connect(
    protocol: str, url: str, token: str, keep: bool = True, breaking: bool = False, tickets: list | None = None
) -> httpx.AsyncClient:
    """A client that connects at its first request. `keep` is whether it uses a connection for more than one request.

    `tickets` are of earlier connections by HTTP/3. With them it sends its first request as early data.
    """
    headers = {"Authorization": f"Bearer {token}", "Accept-Encoding": "br, gzip"}
    options = {"base_url": url, "headers": headers, "timeout": 600}
    if protocol == "h3":
        return httpx.AsyncClient(transport=Http3(tickets), **options)
    limits = httpx.Limits(max_connections=1 if protocol == "h2" else 6, max_keepalive_connections=None if keep else 0)
    transport = httpx.AsyncHTTPTransport(
        verify=False, http2=protocol == "h2", limits=limits, socket_options=BREAKING if breaking else None
    )
    return httpx.AsyncClient(transport=transport, **options)


async def warm_up() -> None:
    """Lets httpx import what it imports at its first request, which would then be late. Nothing listens on port 9."""
    async with httpx.AsyncClient() as client:
        with contextlib.suppress(httpx.ConnectError):
            await client.get("http://127.0.0.1:9")


async def screen(connection: dict, feed: str, looks: bool, flight: int, comes_back: bool = False) -> dict:
    """Loads the feed and all its pictures, at most `flight` at a time.

    With `looks` it loads all first looks at once, and then the rest of each picture. Returns times and bytes: of the
    feed; of the first look of each picture and of each whole picture, in the order in which they came; and of the
    moment at which the first TOP pictures of the feed were whole. With `comes_back` it has been here before.
    """
    seen, whole, top, gate = [], [], [], asyncio.Semaphore(flight)
    tickets = []
    if comes_back:
        async with connect(**connection, tickets=tickets) as client:
            (await client.get(feed)).raise_for_status()

    async def load(image: dict, begin: int, end: int) -> None:
        """Loads bytes of a picture, `end` excluded."""
        at, first = begin, image["scans"][0]
        async with client.stream("GET", image["url"], headers={"Range": f"bytes={begin}-{end - 1}"}) as answer:
            assert answer.status_code == 206, answer.status_code
            async for piece in answer.aiter_raw():
                if at < first <= at + len(piece):
                    seen.append(clock.now())
                at += len(piece)
        assert at == end
        if end == image["bytes"]:
            whole.append(clock.now())
            if image in images[:TOP]:
                top.append(clock.now())

    async def rest(image: dict) -> None:
        async with gate:
            begin = image["scans"][0] if looks else 0
            if begin < image["bytes"]:
                await load(image, begin, image["bytes"])

    async with connect(**connection, tickets=tickets) as client:
        await warm_up()
        clock = Clock()
        items = (await client.get(feed)).raise_for_status().json()["items"]
        listed, images = clock.now(), [item["image"] for item in items]
        if looks:
            await asyncio.gather(*(load(image, 0, image["scans"][0]) for image in images))
        await asyncio.gather(*map(rest, images))
    return {"feed": listed, "seen": seen, "top": top[TOP - 1], "whole": whole}


async def pieces(data: bytes, end: int | None = None) -> AsyncIterator[bytes]:
    """The bytes of a body. Raises BrokenPipeError after `end` of them."""
    for at in range(0, len(data), PIECE):
        if end is not None and at >= end:
            raise BrokenPipeError
        yield data[at : at + PIECE]


async def send(client: httpx.AsyncClient, method: str, path: str, data: bytes, end: int | None = None, **headers):
    """Sends a body whose length is known. In the names of headers _ stands for -."""
    fields = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    fields |= {"Content-Length": str(len(data))}
    answer = await client.request(method, path, content=pieces(data, end), headers={**TUS, **fields})
    return answer.raise_for_status()


async def create(client: httpx.AsyncClient, **headers) -> str:
    return (await send(client, "POST", "/v1/uploads", b"", **headers)).headers["location"]


async def patch(client: httpx.AsyncClient, upload: str, data: bytes, at: int, end: int, breaks: int | None = None):
    kind = {"Content_Type": "application/offset+octet-stream"}
    await send(client, "PATCH", upload, data[at:end], breaks, Upload_Offset=at, **kind)


async def publish(client: httpx.AsyncClient, upload: str) -> str:
    answer = await client.post("/v1/posts", json={"upload": upload.rpartition("/")[2], "caption": ""})
    return answer.raise_for_status().json()["id"]


async def upload_form(client: httpx.AsyncClient, data: bytes, breaks: int | None = None) -> str:
    form = client.build_request("POST", "/v1/posts", files={"image": ("photo.jpg", data)}, data={"caption": "A photo"})
    body = b"".join([piece async for piece in form.stream])
    answer = await send(client, "POST", "/v1/posts", body, breaks, Content_Type=form.headers["Content-Type"])
    return answer.json()["id"]


async def upload_tus(client: httpx.AsyncClient, data: bytes, chunk: int) -> str:
    """In one PATCH for each `chunk` bytes."""
    upload = await create(client, Upload_Length=len(data))
    for at in range(0, len(data), chunk):
        await patch(client, upload, data, at, min(at + chunk, len(data)))
    return await publish(client, upload)


async def upload_parts(client: httpx.AsyncClient, data: bytes, parts: int) -> str:
    size = -(-len(data) // parts)

    async def part(at: int) -> str:
        own = data[at : at + size]
        kind = {"Content_Type": "application/offset+octet-stream", "Upload_Concat": "partial"}
        return (await send(client, "POST", "/v1/uploads", own, Upload_Length=len(own), **kind)).headers["location"]

    urls = await asyncio.gather(*(part(at) for at in range(0, len(data), size)))
    return await publish(client, await create(client, Upload_Concat=f"final;{' '.join(urls)}"))


async def upload(connection: dict, file: str, way: str, chunk: int = 1 << 30, parts: int = 1, breaks=False) -> dict:
    """Makes a post of a file. With `breaks` the connection breaks when half of it was sent. Returns its seconds."""
    data = Path(file).read_bytes()
    await warm_up()
    clock, half = Clock(), len(data) // 2
    if breaks:
        async with connect(**connection, breaking=True) as client:
            try:
                if way == "form":
                    await upload_form(client, data, half)
                else:
                    begun = await create(client, Upload_Length=len(data))
                    await patch(client, begun, data, 0, len(data), half)
                raise AssertionError("it did not break")
            except (BrokenPipeError, httpx.TransportError):
                pass
    async with connect(**connection) as client:
        if way == "form":
            await upload_form(client, data)
        elif parts > 1:
            await upload_parts(client, data, parts)
        elif breaks:
            answer = (await client.head(begun, headers=TUS)).raise_for_status()
            await patch(client, begun, data, int(answer.headers["upload-offset"]), len(data))
            await publish(client, begun)
        else:
            await upload_tus(client, data, chunk)
    return {"seconds": clock.now()[0]}


async def ready(connection: dict, file: str, wait: bool, times: int) -> dict:
    """Publishes a picture `times` times. Returns for each the seconds from the 201 until it is ready, and the requests.

    With `wait` it asks with `Prefer: wait=25`. Otherwise it asks again when Retry-After says so.
    """
    data, found = Path(file).read_bytes(), []
    async with connect(**connection) as client:
        for _ in range(times):
            post, began, requests = await upload_form(client, data), time.monotonic(), 0
            while True:
                requests += 1
                answer = await client.get(f"/v1/posts/{post}", headers={"Prefer": "wait=25"} if wait else {})
                status = answer.raise_for_status().json()["status"]
                if status != "processing":
                    break
                await asyncio.sleep(int(answer.headers["retry-after"]))
            assert status == "ready", status
            found.append((time.monotonic() - began, requests))
    return {"heard": found}


DO = {"screen": screen, "upload": upload, "ready": ready}


def main() -> None:
    os.setpriority(os.PRIO_PROCESS, 0, URGENT)
    job = json.loads(sys.argv[1])
    connection = {name: job.pop(name) for name in ("protocol", "url", "token", "keep") if name in job}
    print(json.dumps(asyncio.run(DO[job.pop("do")](connection, **job))))


if __name__ == "__main__":
    main()
