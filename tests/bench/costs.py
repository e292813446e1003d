"""What single things cost: bytes in Redis' files, CPU time, requests to S3. docs/capacity.md computes with them."""

import asyncio
import io
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
from PIL import Image

from storage import comments, posts
from storage.db.cluster import connect
from tests.bench import fill, transfers
from tests.bench.parts import Redis
from tests.bench.table import Row
from tests.conftest import Site, create_post, free_port, until, wait_until_processed
from tests.making import make_post

ROUNDS = 3000  # writes that are counted
TOGETHER = 32  # that wait at the same time, as with 32 connections
LARGE = transfers.PNG + bytes(transfers.SIZE - len(transfers.PNG))  # an upload. It becomes no post
BASE = 100_000  # comments in a base that is measured


def used(server: Redis) -> float:
    """Seconds of CPU that the server has used."""
    cpu = server.client.info("cpu")
    return cpu["used_cpu_user"] + cpu["used_cpu_sys"]


def size(server: Redis, suffix: str) -> int:
    """Bytes of the server's append-only files whose names end so."""
    return sum(path.stat().st_size for path in Path(server.folder.name, "appendonlydir").glob(f"*{suffix}"))


async def written(server: Redis) -> dict[str, tuple[float, float]]:
    """Bytes in the increments and seconds of CPU, of a comment and of a post."""
    db = connect(server.url)
    found = {}
    ids = [await make_post(db, f"user{number}") for number in range(100)]

    async def measured(name: str, one) -> None:
        before = size(server, ".incr.aof"), used(server)
        for start in range(0, ROUNDS, TOGETHER):
            await asyncio.gather(*(one(number) for number in range(start, start + TOGETHER)))
        count = -(-ROUNDS // TOGETHER) * TOGETHER
        found[name] = (size(server, ".incr.aof") - before[0]) / count, (used(server) - before[1]) / count

    await measured("comment", lambda number: comments.add(db, fill.AUTHOR % number, ids[number % 100], fill.TEXT))
    await measured("post", lambda number: make_post(db, fill.AUTHOR % number))
    before = used(server)
    for _ in range(ROUNDS):
        await posts.feed(db, 1, 25)
    found["page"] = 0.0, (used(server) - before) / ROUNDS
    await db.close()
    return found


def image() -> bytes:
    """A PNG of 3 MB."""
    file = io.BytesIO()
    Image.frombytes("RGB", (1000, 1000), random.Random(3).randbytes(3_000_000)).save(file, "PNG", compress_level=0)
    return file.getvalue()


def store_requests() -> tuple[Counter, int]:
    """The requests to S3, by method, that an image of 3 MB takes until it has its picture and its chunks are erased.

    And the PUT requests for the chunks of an upload of 100 MiB.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ig-") as folder, open(f"{folder}/log", "w") as log:
        requests = Path(folder, "log").read_text
        program = Path(sys.executable).with_name("moto_server")
        store = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
        server = Redis()
        try:
            url = f"http://127.0.0.1:{port}/bucket"
            until(lambda: httpx.put(url).status_code == 200, what="moto")
            aws = {"ENDPOINT_URL": url.removesuffix("/bucket"), "ALLOW_HTTP": "true", "REGION": "us-east-1"}
            aws |= {"ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test"}
            os.environ |= {f"AWS_{name}": value for name, value in aws.items()}
            site = Site(server.url, Path(folder), store="s3://bucket", backup_store="s3://bucket/backup")
            site.api()
            site.worker()
            for _ in range(2):  # the first shows the process how fast the store is
                before = requests().count('"PUT /bucket/chunks/')
                transfers.by_tus(site, {"Authorization": f"Bearer {site.token('alice')}"}, memoryview(LARGE))
            large = requests().count('"PUT /bucket/chunks/') - before
            before = requests()
            with site.client("alice") as client:
                wait_until_processed(client, create_post(client, image()))
            until(lambda: "?delete" in requests(), what="the chunks are erased")
            site.close()
            # What the processes ask when they start and for `/readyz` names a prefix, and no object.
            found = re.findall(r'"([A-Z]+) /bucket[/?](?!\S*prefix=)', requests().removeprefix(before))
            return Counter(found), large
        finally:
            server.close()
            store.kill()
            store.wait()


def measure() -> list[Row]:
    requests, large = store_requests()
    server = Redis()
    try:
        found = asyncio.run(written(server))
        rows = [
            Row(f"{name}: bytes in the increments", size, unit="B") for name, (size, _) in found.items() if size
        ] + [Row(f"{name}: CPU of Redis", cpu * 1e6, unit="µs") for name, (_, cpu) in found.items()]
        server.client.flushall()
        fill.fill(server, fill.counts(BASE // 10, BASE))
        memory = server.client.info("memory")["used_memory"]
        began = time.monotonic()
        server.client.bgrewriteaof()
        until(server.rewrite_done, 60, "the rewrite")
        taken = time.monotonic() - began
        rows.append(Row("base: bytes for each byte in memory", size(server, ".base.rdb") / memory))
        rows.append(Row("rewrite: memory a second", memory / taken / 2**20, unit="MiB/s"))
        for method, count in sorted(requests.items()):
            rows.append(Row(f"image of 3 MB: {method} requests to S3", count, unit="×"))
        rows.append(Row("upload of 100 MiB: PUT requests to S3", large, unit="×"))
        return rows
    finally:
        server.close()
