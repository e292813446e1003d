"""What breaks without dying: a torn file, a store that fails, a disk or a memory that is full, much data.

cut     the append-only file of comments made by the scripts, cut at each record's boundary in its last 16 KiB and at
        random bytes; a server starts on it and has every comment that is whole, and no half of one.
store   the store fails before or after it did as told; the shipper is killed in mid-put; two shippers at once; one
        flipped bit in each object. Then S3 on a line that falls silent or is cut.
full    a disk of 4 MiB under the append-only file, then a bounded memory, with the API's answers timed. Mounting the
        disk needs root.
scale   2 million comments: shipped and restored as commands, then as a base.
"""

import asyncio
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, RedisServer, Site, connect
from conftest import until as wait
from making import make_post
from parts import (
    redis_on,
    restored,
    s3_server,
    s3_url,
    shipped,
    shipping,
    until,
    writing,
)
from proxy import Proxy
from test_storage_ship import Faulty, begin, end, whole

from storage import comments, keys
from storage.backup import aof, chain, ship
from storage.backup.restore import restore, running
from storage.db.client import Redis
from storage.objects import open_store
from tests.bench import fill
from tests.drills.crashes import settings_in

TAIL = 16 * 1024  # bytes at the end of the file whose record boundaries are all tried
MIB = 1024 * 1024


async def cut(server: str, tail: int = TAIL, anywhere: int = 200) -> str:
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        settings = settings_in(folder, server)
        async with redis_on(settings) as redis:
            db = Redis(settings.redis_url)
            post = await make_post(db, "alice")
            file, sizes = redis.increment(), []
            while not sizes or sizes[-1] < 2 * tail:
                await comments.add(db, "bob", post, f"comment {len(sizes)} " + "x" * random.randrange(200))
                sizes.append(file.stat().st_size)
            await db.close()
        data = file.read_bytes()
        last = len(data) - tail
        cuts = [found.start() for found in re.finditer(rb"(?<=\r\n)[*#]", data) if found.start() >= last]
        boundaries = len(cuts)
        cuts += random.sample(range(last, len(data)), anywhere)
        for at in cuts:
            file.write_bytes(data[:at])
            async with running(settings, settings.data / "redis") as client:
                kept = sum(size <= at for size in sizes)
                stream = await client.xrange(keys.comments(post))
                assert [int(fields[b"text"].split()[1]) for _, fields in stream] == list(range(kept))
                assert await client.zscore(keys.feed(0), post) == kept
                newest = [entry.split(b'"')[1] for entry in await client.lrange(keys.latest(post), 0, -1)]
                assert newest == [id for id, _ in stream[:-3:-1]]
    return f"file cut at {boundaries} boundaries and {anywhere} random bytes: {len(cuts)} starts, no comment half there"


async def store(server: str) -> str:
    return f"{await _failing(server)}; {await _cut_off(server)}"


def _lost(writers, lists) -> str:
    lost = sum(len(set(writer.answered) - set(found)) for writer, found in zip(writers, lists, strict=True))
    return f"{lost} of {sum(len(writer.answered) for writer in writers)} answered writes lost"


async def _cut_off(server: str) -> str:
    """S3 behind a line that falls silent, is reset or ends while an answer is on its way."""
    hows = 3 * ("silence", "rst", "fin")
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
                for how in hows:
                    await shipped(shipper)
                    proxy.lose(how=how)
                    assert await asyncio.to_thread(proxy.lost.wait, 20)
            await shipped(shipper)
        await whole(real)
        _, lists = await restored(settings, real, writers, Path(folder))
    return f"S3 cut off or silent {len(hows)} times: {_lost(writers, lists)}"


async def _failing(server: str, kills: int = 20) -> str:
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        settings = replace(settings_in(folder, server), ship_interval=0.2)
        real = open_store(settings.backup_store_url)
        faulty, ship.PUT_RETRY = Faulty(real, 0.3), 0.05
        digests: dict[str, bytes] = {}

        async def unchanged() -> None:
            """Nothing that was put has become something else."""
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
                    await _killed(settings, real)
                    await unchanged()
                stopped = 0
                for _ in range(5):
                    shippers = [begin(settings), begin(settings)]
                    done, _ = await asyncio.wait(
                        [one.task for one in shippers], return_when="FIRST_COMPLETED", timeout=20
                    )
                    stopped += sum(isinstance(task.exception(), ship.Stopped) for task in done)
                    for one in shippers:
                        if not one.task.done():
                            await shipped(one)
                            await end(one)
                    await unchanged()
            async with shipping(settings, real) as shipper:
                await shipped(shipper)
        await unchanged()
        await whole(real)
        _, lists = await restored(settings, real, writers, Path(folder))
        flipped = await _flipped(settings, real, Path(folder, "flipped"))
    return (
        f"store: {faulty.failed} puts and reads failed, {kills} shippers killed, {stopped} of 5 second ones stopped;"
        f" {len(digests)} objects, 0 replaced; {_lost(writers, lists)}; {flipped} flipped bits, all found"
    )


async def _killed(settings, real) -> None:
    """A shipper that is killed as soon as a put of its own has begun: the tmp file of the put is there."""
    program = "from storage import settings; from storage.backup import ship; ship.main(settings.load())"
    environ = {
        **os.environ,
        "IMAGEGRAM_DATA": str(settings.data),
        "IMAGEGRAM_BACKUP_STORE": settings.backup_store_url,
        "IMAGEGRAM_VERIFY_EVERY": "0",
    }
    backup = Path(settings.backup_store_url.removeprefix("file://"))
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environ, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while not list(backup.glob("*/*/.tmp-*")) and time.monotonic() < deadline:
        await asyncio.sleep(0)
    process.kill()
    process.wait()


async def _flipped(settings, real, to: Path) -> int:
    """Flips a bit of each object of the newest generation in turn; a restore must refuse each time."""
    newest = max(await chain.descriptions(real))
    names = [entry.name async for entry in real.list(f"{newest:08}/")]
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


class Asked:
    """Comments sent one after the other, and how long each answer took."""

    def __init__(self, site: Site, post: str):
        self.client, self.post = site.client("bob"), post
        self.slowest = 0.0  # seconds, of the answers that were no success

    def write(self) -> bool:
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
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        site = Site(redis.url, Path(folder))

        async def made() -> str:
            db = connect(redis)
            post = await make_post(db, "alice")
            await db.close()
            return post

        site.api()
        try:
            yield Asked(site, asyncio.run(made()))
        finally:
            site.close()


async def full(server: str) -> str:
    told = [await asyncio.to_thread(_disk, server, policy) for policy in ("always", "everysec")]
    return "; ".join([*told, await asyncio.to_thread(_memory, server)])


def _disk(server: str, policy: str) -> str:
    if os.geteuid():
        return f"disk full, {policy}: not tried, a mount needs root"
    with tempfile.TemporaryDirectory(prefix="ig-") as disk:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)
        redis = RedisServer(server, "--dir", disk, "--appendfsync", policy)
        try:
            with api_on(redis) as asked:
                answered = 0
                while asked.write():
                    answered += 1
                dead = policy == "always"
                if dead:
                    redis.process.wait(10)
                for _ in range(20):
                    assert not asked.write()
                    assert dead or asked.reads()
                subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
                begun = time.monotonic()
                if dead:
                    redis.start()
                wait(asked.write, what="health")
                healed = time.monotonic() - begun
                kept = redis.client.xlen(keys.comments(asked.post))
                assert answered + 1 <= kept <= answered + 2, (kept, answered)  # the one that is unknown may be there
        finally:
            redis.close()
            subprocess.run(["umount", disk], check=True)
    slowest, healed = asked.slowest * 1000, healed * 1000
    return f"disk full, {policy}: 503 after {slowest:.0f} ms at most, health {healed:.0f} ms after there was room"


def _memory(server: str) -> str:
    redis = RedisServer(server)
    try:
        with api_on(redis) as asked:
            redis.client.config_set("maxmemory", redis.client.info("memory")["used_memory"] + 2 * MIB)
            answered = 0
            while asked.write():
                answered += 1
            for _ in range(20):
                assert not asked.write() and asked.reads()
            alice = asked.client
            page = alice.get(f"/v1/posts/{asked.post}/comments?limit=100").json()["items"]
            deleted, begun = 0, time.monotonic()
            while not asked.write():
                gone = alice.delete(f"/v1/posts/{asked.post}/comments/{page[deleted]['id']}")
                assert gone.status_code == 204
                deleted += 1
            healed = time.monotonic() - begun
    finally:
        redis.close()
    return (
        f"memory full: 503 after {asked.slowest * 1000:.0f} ms at most,"
        f" health after {deleted} deletes, {healed * 1000:.0f} ms"
    )


async def scale(server: str, posts: int = 20_000, made: int = 2_000_000) -> str:
    told = []
    redis = RedisServer(server, "--auto-aof-rewrite-percentage", "0")
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        settings = settings_in(folder, server, redis_url=redis.url)
        settings.data.mkdir()
        (settings.data / "redis").symlink_to(redis.folder.name)
        real = open_store(settings.backup_store_url)
        try:
            async with shipping(settings, real) as shipper:
                await shipped(shipper)
                packed = fill.commands(fill.rows(fill.counts(posts, made)), int(time.time() * 1000))
                begun = time.monotonic()
                await asyncio.to_thread(fill.send, redis, packed)
                written = time.monotonic()
                await shipped(shipper)
                told.append(f"written in {written - begun:.0f} s, shipped {time.monotonic() - written:.1f} s later")
                told.append(await _restored(settings, real, Path(folder, "commands"), made))
                begun = time.monotonic()
                redis.client.bgrewriteaof()
                await until(lambda: shipper.chain.generation == 2, "the base is shipped", 120)
                told.append(f"rewritten and shipped in {time.monotonic() - begun:.1f} s")
            told.append(await _restored(settings, real, Path(folder, "base"), made))
            told.append(await asyncio.to_thread(_restarted, redis))
        finally:
            redis.close()
    return f"{made:,} comments, {posts:,} posts: " + "; ".join(told)


async def _restored(settings, real, to: Path, made: int) -> str:
    begun, said = time.monotonic(), []
    done = await restore(settings, real, to, report=said.append)
    took = time.monotonic() - begun
    size = float(re.search(r"([\d.]+) MiB read", " ".join(said))[1])
    stored = sum([one.size async for one in real.list(f"{done.generation:08}/")]) / MIB
    async with running(settings, to) as client:
        assert sum(int(count) for _, count in await client.zrange(keys.feed(0), 0, -1, withscores=True)) == made
    return f"restored in {took:.1f} s: {size:.0f} MiB ({stored:.0f} in the store), {size / took:.0f} MiB/s"


def _restarted(redis: RedisServer) -> str:
    """The API's answers while Redis loads it all."""
    with api_on(redis) as asked:
        assert asked.write()
        redis.kill()
        begun = time.monotonic()
        redis.process = subprocess.Popen(redis.process.args)  # without waiting until it answers
        while not asked.write():
            pass
        return f"killed and started: 503 within {asked.slowest:.2f} s, health after {time.monotonic() - begun:.1f} s"
