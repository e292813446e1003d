"""What dies: Redis, the power, the machine; and the seconds of the past.

kill      kill -9 of Redis under 64 writers: nothing answered is lost, nothing is half there.
power     the append-only file is cut back to its last fsync at a moment chosen at random, as a power cut may leave it.
          The moment and the length at the last fsync come from strace of the server: it records each fsync of the
          increment and the writes before it. A recorder, not a file system that drops pages: it proves the order of
          write, fsync and answer, not the disk's honesty.
machine   Redis and shipper are killed under writes, Redis' folder is thrown away and restored from the store.
seconds   random seconds across rewrites, FLUSHALL included.
"""

import asyncio
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT
from parts import (
    PROGRAMS,
    RedisProcess,
    make_settings,
    redis_on,
    restored,
    shipped,
    shipping,
    until,
    writing,
)

from storage.backup.restore import restore, running  # noqa: E402
from storage.objects import open_store  # noqa: E402

SECONDS = 75  # after which a drill begins no further round


def settings_in(folder: str, server: str, **changes):
    data = Path(folder, "data")
    return make_settings(data, PROGRAMS[server], (Path(folder) / "backup").as_uri(), ship_interval=1, **changes)


async def kill(server: str, rounds: int = 50) -> str:
    lost = done = 0
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        settings = settings_in(folder, server)
        end = time.monotonic() + SECONDS
        async with redis_on(settings) as redis, writing(settings, 64, 0) as writers:
            while done < rounds and time.monotonic() < end:
                await until(lambda n=writers[0].number: writers[0].number > n + 5, "writes")
                await asyncio.sleep(random.random() / 10)
                redis.kill()
                await redis.start()
                for writer in writers:
                    answered = set(writer.answered)
                    found = await writer.read(redis.client)
                    lost += len(answered - set(found)) + len(found) - len(set(found))
                done += 1
            answers = sum(len(writer.answered) for writer in writers)
    assert not lost, f"{lost} of {answers} answered writes lost or double"
    return f"kill -9 of Redis, 64 writers, {done} times: {answers} answered writes, {lost} lost or double"


async def power(server: str, rounds: int = 20, policy: str = "always") -> str:
    lost = answered_in_all = 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="ig-") as folder:
            settings = settings_in(folder, server)
            redis = await RedisProcess(settings, "--appendfsync", policy).start()
            trace = Path(folder, "trace")
            watched = "trace=write,fdatasync,fsync"
            tracer = subprocess.Popen(
                ["strace", "-f", "-y", "-s", "64", "-e", watched, "-o", trace, "-p", str(redis.process.pid)],
                stderr=subprocess.DEVNULL,
            )
            await until(lambda t=trace: t.exists(), "strace is there")
            start = redis.increment().stat().st_size
            await redis.client.set("traced", "1")
            wrote = re.compile(rf"{re.escape(redis.increment().name)}>.*SET")
            await until(lambda t=trace, w=wrote: w.search(t.read_text(errors="replace")), "strace records")
            async with writing(settings, 16, 0) as writers:
                await until(lambda w=writers: w[0].number > 100, "writes")
                await asyncio.sleep(random.random() * 1.5)
                answered = [set(writer.answered) for writer in writers]  # by the moment of the cut
                redis.kill()
                for writer in writers:
                    writer.stopping = True
            tracer.wait()
            increment = redis.increment()
            size, synced = start, start
            waiting: dict[str, int] = {}  # thread -> size of the file when its fsync began
            writing_now: set[str] = set()  # threads in a write to it
            for line in trace.read_text(errors="replace").splitlines():
                thread = line.split()[0]
                count = re.search(r"= (\d+)$", line)
                if f"{increment.name}>" in line and "write(" in line:
                    size += int(count[1]) if count else 0
                    if not count:  # `<unfinished ...>`, or `= ?` of a server killed in its midst
                        writing_now.add(thread)
                elif "<... write resumed>" in line and thread in writing_now:
                    writing_now.discard(thread)
                    size += int(count[1]) if count else 0
                elif f"{increment.name}>" in line and re.search(r"f(data)?sync\(", line):
                    if line.endswith("= 0"):
                        synced = size
                    else:
                        waiting[thread] = size
                elif re.search(r"<... f(data)?sync resumed>", line) and line.endswith("= 0") and thread in waiting:
                    synced = max(synced, waiting.pop(thread))
            unrecorded = increment.stat().st_size - size  # the write in which the server was killed, or none
            assert unrecorded == 0 or writing_now, (size, unrecorded)
            os.truncate(increment, synced)
            await redis.start()
            for writer, before in zip(writers, answered, strict=True):
                lost += len(before - set(await writer.read(redis.client)))
                answered_in_all += len(before)
            await redis.stop()
    assert not lost or policy != "always", f"{lost} of {answered_in_all} answered writes lost"
    return f"power cut, appendfsync {policy}, {rounds} times: {answered_in_all} answered writes, {lost} lost"


async def machine(server: str, rounds: int = 20) -> str:
    losses, took = [], []
    end = time.monotonic() + SECONDS
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="ig-") as folder:
            settings = settings_in(folder, server)
            environ = {
                **os.environ,
                "IMAGEGRAM_DATA": str(settings.data),
                "IMAGEGRAM_REDIS_SERVER": settings.redis_server,
                "IMAGEGRAM_BACKUP_STORE": settings.backup_store_url,
                "IMAGEGRAM_VERIFY_EVERY": "0",
            }
            store = open_store(settings.backup_store_url)
            redis = await RedisProcess(settings).start()
            log = open(os.devnull, "w")  # noqa: SIM115
            shipper = subprocess.Popen([sys.executable, "-m", "storage", "ship"], cwd=ROOT, env=environ, stderr=log)
            async with writing(settings, 4, 0.02) as writers:  # about 200 writes a second

                async def described(store=store):
                    return [entry async for entry in store.list("generations/")]

                await until(described, "a generation")
                await asyncio.sleep(1 + random.random() * 2)
                dead = time.time()
                redis.kill()
                shipper.kill()
                shipper.wait()
                for writer in writers:
                    writer.stopping = True
            await redis.stop()
            shutil.rmtree(settings.data / "redis")
            begun = time.monotonic()
            to = Path(folder, "restored")
            await restore(settings, store, to, report=lambda text: None)
            took.append(time.monotonic() - begun)
            async with running(settings, to) as client:
                lost = []
                for writer in writers:
                    found = set(await writer.read(client))
                    lost += [when for n, when in writer.answered.items() if n not in found and when < dead]
            losses.append(dead - min(lost) if lost else 0.0)
        if time.monotonic() > end:
            break
    losses.sort()
    assert losses[-1] <= 2, losses
    middle = losses[len(losses) // 2]
    return (
        f"machine loss under writes, {len(losses)} times: of the last seconds lost p50 {middle:.2f},"
        f" max {losses[-1]:.2f}; restored in {max(took):.2f} s at most"
    )


async def seconds(server: str, count: int = 50) -> str:
    good = 0
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        settings = settings_in(folder, server)
        store = open_store(settings.backup_store_url)
        async with redis_on(settings) as redis, shipping(settings, store) as shipper:
            async with writing(settings, 4, 0.01) as writers:
                await shipped(shipper)
                begun = time.time()
                flushes = []
                for number in range(8):
                    await asyncio.sleep(3 + random.random() * 3)
                    if number % 3 == 2:
                        before = time.time()
                        await redis.client.flushall()
                        flushes.append((before, time.time()))
                    await redis.rewrite()
                ended = time.time()
            await shipped(shipper)
        choice = [at for at in range(int(begun) + 1, int(ended)) if not any(a < at + 1 and b > at for a, b in flushes)]
        end = time.monotonic() + SECONDS
        for at in random.choices(choice, k=count):
            since = max((b for a, b in flushes if b <= at), default=0.0)
            done, lists = await restored(settings, store, writers, Path(folder), at)
            assert done.exact
            for writer, found in zip(writers, lists, strict=True):
                wanted = {n for n, when in writer.answered.items() if when < at and writer.begun[n] > since}
                allowed = {n for n, when in writer.begun.items() if when < at + 1 and writer.answered[n] >= since}
                assert wanted <= set(found) <= allowed, (at, since)
            good += 1
            if time.monotonic() > end:
                break
    return f"{good} random seconds of {len(choice)} across 8 rewrites and {len(flushes)} FLUSHALLs: {good} exact"
