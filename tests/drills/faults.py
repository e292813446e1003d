"""What breaks without dying: a torn file, a failing store, a full disk, a full memory. And a large data set.

cut     Cuts the append-only file at each record boundary in its last 16 KiB and at random bytes. The scripts wrote the
        comments in it. After each cut a server starts on the file. It must have every comment that was complete before
        the cut, and no part of another.
store   A store that fails before or after it has done what was requested. Shippers that are killed during a put. Two
        shippers at once: exactly one must stop. One flipped bit in each object. Then S3 on a connection that falls
        silent or is cut. No answered write may be lost.
full    A disk of 4 MiB under the append-only file, then a memory limit. Times the API's answers. Mounting the disk
        needs root.
scale   2 million comments: shipped and restored as commands, then as a base.
"""

import asyncio
import os
import random
import re
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import RedisServer, Site, connect
from conftest import until as wait
from making import make_post
from parts import redis_on, restored, s3_server, s3_url, shipped, shipping, until, writing
from proxy import Proxy
from test_storage_ship import Faulty, begin, end, read_all

from storage import comments, keys
from storage.backup import aof, chain, ship
from storage.backup.restore import restore, running
from storage.db.client import Redis
from storage.objects import open_store
from tests.bench import fill
from tests.drills.crashes import settings_in, start_shipper

TAIL = 16 * 1024  # bytes at the end of the file; the drill cuts at every record boundary in them
MIB = 1024 * 1024


async def cut(server: str, tail: int = TAIL, anywhere: int = 200) -> str:
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        settings = settings_in(folder, server)
        async with redis_on(settings) as redis:
            db = Redis(settings.redis_url)
            post = await make_post(db, "alice")
            file = redis.increment()
            published = file.stat().st_size
            sizes: list[int] = []  # of the file after each comment, bytes
            while not sizes or sizes[-1] < published + 2 * tail:
                await comments.add(db, "bob", post, f"comment {len(sizes)} " + "x" * random.randrange(200))
                sizes.append(file.stat().st_size)
            await db.close()
        data = file.read_bytes()
        last = len(data) - tail
        cuts = [match.start() for match in re.finditer(rb"(?<=\r\n)[*#]", data) if match.start() >= last]
        boundaries = len(cuts)
        assert boundaries, "the end of the file has no record boundary"
        cuts += random.sample(range(last, len(data)), anywhere)
        for at in cuts:
            file.write_bytes(data[:at])
            async with running(settings, settings.data / "redis") as client:
                complete = sum(size <= at for size in sizes)
                stream = await client.xrange(keys.comments(post))
                assert [int(fields[b"text"].split()[1]) for _, fields in stream] == list(range(complete))
                assert await client.zscore(keys.feed(0), post) == complete
                newest = [entry.split(b'"')[1] for entry in await client.lrange(keys.latest(post), 0, -1)]
                assert newest == [comment_id for comment_id, _ in stream[:-3:-1]]
    return f"file cut at {boundaries} boundaries and {anywhere} random bytes: {len(cuts)} starts, no comment half there"


async def store(server: str) -> str:
    return f"{await _failing(server)}; {await _cut_off(server)}"


def _require_all(writers, lists) -> str:
    """Asserts that no answered write is missing in the restored lists. Returns the figures."""
    answers = sum(len(writer.answered) for writer in writers)
    lost = sum(len(set(writer.answered) - set(numbers)) for writer, numbers in zip(writers, lists, strict=True))
    assert answers and not lost, f"{lost} of {answers} answered writes lost"
    return f"{lost} of {answers} answered writes lost"


async def _cut_off(server: str) -> str:
    """S3 behind a proxy whose connection falls silent, is reset or is closed while an answer is on its way."""
    ways = 3 * ("silence", "rst", "fin")
    with (
        tempfile.TemporaryDirectory(prefix="ig-") as folder,
        pytest.MonkeyPatch.context() as patch,
        Proxy(int(s3_server().rpartition(":")[2])) as proxy,
    ):
        url = s3_url(patch)
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        settings = replace(settings_in(folder, server), ship_interval=0.2, backup_store_url=url)
        real = open_store(url)
        async with redis_on(settings), shipping(settings, real) as shipper:
            async with writing(settings, 8) as writers:
                for way in ways:
                    await shipped(shipper)
                    proxy.lose(how=way)
                    assert await asyncio.to_thread(proxy.lost.wait, 20)
            await shipped(shipper)
        await read_all(real)
        _, lists = await restored(settings, real, writers, Path(folder))
    return f"S3 cut off or silent {len(ways)} times: {_require_all(writers, lists)}"


async def _failing(server: str, kills: int = 20, races: int = 5) -> str:
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        settings = replace(settings_in(folder, server), ship_interval=0.2)
        real = open_store(settings.backup_store_url)
        faulty, ship.PUT_RETRY = Faulty(real, 0.3), 0.05
        digests: dict[str, bytes] = {}

        async def unchanged() -> None:
            """Asserts that every object has the bytes that it had when it was first read."""
            for name in [entry.name async for entry in real.list()]:
                if not name.startswith("verified"):
                    data = await real.get(name)
                    assert digests.setdefault(name, data) == data, name

        async with redis_on(settings) as redis:
            async with writing(settings, 8) as writers:
                async with shipping(settings, faulty) as shipper:
                    for _ in range(10):
                        await shipped(shipper)
                        await redis.rewrite()
                    faulty.rate = 0
                    await shipped(shipper)
                await unchanged()
                for _ in range(kills):
                    await _kill_in_put(settings)
                    await unchanged()
                for _ in range(races):
                    await _race(settings)
                    await unchanged()
            async with shipping(settings, real) as shipper:
                await shipped(shipper)
        await unchanged()
        await read_all(real)
        _, lists = await restored(settings, real, writers, Path(folder))
        flipped = await _flip_bits(settings, real, Path(folder, "flipped"))
    assert faulty.failed, "the store never failed"
    return (
        f"store: {faulty.failed} puts and reads failed, {kills} shippers killed in a put, {races} of {races} second"
        f" ones stopped; {len(digests)} objects, 0 replaced; {_require_all(writers, lists)};"
        f" {flipped} flipped bits, all detected"
    )


async def _race(settings) -> None:
    """Starts two shippers at once. Asserts that exactly one of them stops and that the other ships everything."""
    shippers = [begin(settings), begin(settings)]
    ended, _ = await asyncio.wait([one.task for one in shippers], return_when="FIRST_COMPLETED", timeout=20)
    assert len(ended) == 1, f"{len(ended)} of two shippers stopped"
    with pytest.raises(ship.Stopped):
        ended.pop().result()
    (winner,) = [one for one in shippers if not one.task.done()]
    await shipped(winner)  # raises Stopped if this one stops, too
    await end(winner)


async def _kill_in_put(settings) -> None:
    """Starts a shipper and kills it as soon as a put of its own has begun: the temporary file of the put exists."""
    backup = Path(settings.backup_store_url.removeprefix("file://"))
    leftover = set(backup.glob("*/*/.tmp-*"))  # of shippers that were killed before
    process = start_shipper(settings)
    try:
        deadline = time.monotonic() + 20
        # Polls without a pause: the file exists for a few milliseconds only. The writers need the event loop.
        while not set(backup.glob("*/*/.tmp-*")) - leftover:
            assert process.poll() is None, f"the shipper ended with {process.returncode}"
            assert time.monotonic() < deadline, "the shipper began no put"
            await asyncio.sleep(0)
    finally:
        process.kill()
        process.wait()


async def _flip_bits(settings, real, to: Path) -> int:
    """Flips a bit in each object of the newest generation in turn. A restore must refuse each time."""
    newest = max(await chain.descriptions(real))
    names = [entry.name async for entry in real.list(f"{newest:08}/")]
    assert names
    for name in names:
        good = await real.get(name)
        bad = bytearray(good)
        bad[random.randrange(len(bad))] ^= 1 << random.randrange(8)
        await real.put(name, bytes(bad))
        try:
            await restore(settings, real, to, report=lambda text: None)
        except aof.Damaged:
            await real.put(name, good)
        else:
            raise AssertionError(f"{name}: a flipped bit was restored")
    return len(names)


class Caller:
    """Sends comments one after the other and times the refusals."""

    def __init__(self, site: Site, post: str):
        self.client, self.post = site.client("bob"), post
        self.slowest = 0.0  # seconds until the slowest 503

    def write(self) -> bool:
        """Sends a comment. Returns whether it was written. Any other answer must be 503 with Retry-After."""
        begun = time.monotonic()
        answer = self.client.post(f"/v1/posts/{self.post}/comments", json={"text": "x" * 2000})
        if answer.status_code != 201:
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            self.slowest = max(self.slowest, time.monotonic() - begun)
        return answer.status_code == 201

    def reads(self) -> bool:
        return self.client.get("/v1/posts").status_code == 200


@contextmanager
def api_on(redis: RedisServer):
    """Starts an API on a Redis. Yields a Caller that comments on a new post."""
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        site = Site(redis.url, Path(folder))

        async def create_post() -> str:
            db = connect(redis)
            post = await make_post(db, "alice")
            await db.close()
            return post

        site.api()
        try:
            yield Caller(site, asyncio.run(create_post()))
        finally:
            site.close()


async def full(server: str) -> str:
    figures = [await asyncio.to_thread(_disk, server, policy) for policy in ("always", "everysec")]
    return "; ".join([*figures, await asyncio.to_thread(_memory, server)])


def _disk(server: str, policy: str) -> str:
    if os.geteuid():
        return f"disk full, {policy}: skipped, because a mount needs root"
    with tempfile.TemporaryDirectory(prefix="ig-") as disk:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)
        redis = RedisServer(server, "--dir", disk, "--appendfsync", policy)
        try:
            with api_on(redis) as caller:
                answered = 0
                while caller.write():
                    answered += 1
                dead = policy == "always"  # a failed write ends Redis; with `everysec` Redis refuses writes
                if dead:
                    redis.process.wait(10)
                for _ in range(20):
                    assert not caller.write()
                    assert dead or caller.reads()
                subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
                begun = time.monotonic()
                if dead:
                    redis.start()
                wait(caller.write, what="a comment written")
                recovery = (time.monotonic() - begun) * 1000
                stored = redis.client.xlen(keys.comments(caller.post))
                # Redis may have written the comment whose outcome was unknown to the API.
                assert answered + 1 <= stored <= answered + 2, (stored, answered)
        finally:
            redis.close()
            subprocess.run(["umount", disk], check=True)
    slowest = caller.slowest * 1000
    return f"disk full, {policy}: 503 after {slowest:.0f} ms at most, health {recovery:.0f} ms after space was free"


def _memory(server: str) -> str:
    redis = RedisServer(server)
    try:
        with api_on(redis) as caller:
            redis.client.config_set("maxmemory", redis.client.info("memory")["used_memory"] + 2 * MIB)
            while caller.write():
                pass
            for _ in range(20):
                assert not caller.write() and caller.reads()
            comments_path = f"/v1/posts/{caller.post}/comments"
            page: list[dict] = []
            deleted = 0
            begun = time.monotonic()
            while not caller.write():
                page = page or caller.client.get(f"{comments_path}?limit=100").json()["items"]
                answer = caller.client.delete(f"{comments_path}/{page.pop(0)['id']}")
                assert answer.status_code == 204
                deleted += 1
            recovery = time.monotonic() - begun
    finally:
        redis.close()
    return (
        f"memory full: 503 after {caller.slowest * 1000:.0f} ms at most,"
        f" health after {deleted} deletes, {recovery * 1000:.0f} ms"
    )


async def scale(server: str, posts: int = 20_000, comment_count: int = 2_000_000) -> str:
    figures = []
    redis = RedisServer(server, "--auto-aof-rewrite-percentage", "0")
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        settings = settings_in(folder, server, redis_url=redis.url)
        settings.data.mkdir()
        (settings.data / "redis").symlink_to(redis.folder.name)
        real = open_store(settings.backup_store_url)
        try:
            async with shipping(settings, real) as shipper:
                await shipped(shipper)
                packed = fill.commands(fill.rows(fill.counts(posts, comment_count)), int(time.time() * 1000))
                begun = time.monotonic()
                await asyncio.to_thread(fill.send, redis, packed)
                written = time.monotonic()
                await shipped(shipper)
                figures.append(f"written in {written - begun:.0f} s, shipped {time.monotonic() - written:.1f} s later")
                figures.append(await _restored(settings, real, Path(folder, "commands"), comment_count))
                begun = time.monotonic()
                redis.client.bgrewriteaof()
                await until(lambda: shipper.chain.generation == 2, "the base is in the store", 120)
                figures.append(f"rewritten and shipped in {time.monotonic() - begun:.1f} s")
            figures.append(await _restored(settings, real, Path(folder, "base"), comment_count))
            figures.append(await asyncio.to_thread(_restarted, redis))
        finally:
            redis.close()
    return f"{comment_count:,} comments, {posts:,} posts: " + "; ".join(figures)


async def _restored(settings, real, to: Path, comment_count: int) -> str:
    """Restores everything into `to` and checks the number of comments. Returns the figures."""
    lines: list[str] = []
    begun = time.monotonic()
    done = await restore(settings, real, to, report=lines.append)
    took = time.monotonic() - begun
    size = float(re.search(r"([\d.]+) MiB read", " ".join(lines))[1])
    stored = sum([entry.size async for entry in real.list(f"{done.generation:08}/")]) / MIB
    async with running(settings, to) as client:
        counts = await client.zrange(keys.feed(0), 0, -1, withscores=True)
        assert sum(int(count) for _, count in counts) == comment_count
    return f"restored in {took:.1f} s: {size:.0f} MiB ({stored:.0f} in the store), {size / took:.0f} MiB/s"


def _restarted(redis: RedisServer) -> str:
    """Times the API's answers while Redis loads its file."""
    with api_on(redis) as caller:
        assert caller.write()
        redis.kill()
        begun = time.monotonic()
        redis.process = subprocess.Popen(redis.process.args)  # does not wait until Redis answers
        wait(caller.write, 120, "a comment written after the restart")
        return f"killed and started: 503 within {caller.slowest:.2f} s, health after {time.monotonic() - begun:.1f} s"
