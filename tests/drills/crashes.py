"""What dies: the Redis process, the power, the machine. And a restore to a chosen second of the past.

kill      Kills Redis with `kill -9` under 64 writers. No answered write may be lost, doubled or half there.
power     Cuts the append-only file back to its last fsync at a random moment, as a power cut may leave it.
          strace of the server gives the moment and the length: it records each fsync of the increment and the writes
          before it. A recorder is not a file system that drops pages. It proves the order of write, fsync and answer.
          It does not prove that the disk keeps what it has synced.
everysec  The same with `appendfsync everysec`. This is the control: here the drill must see losses, and a lost write
          must be newer than all writes of the same writer that survived.
machine   Kills Redis and the shipper under writes, deletes Redis' folder and restores it from the backup store.
          Only writes that were answered after the moment up to which the shipper had shipped may be lost.
seconds   Restores random seconds across rewrites and FLUSHALLs.
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
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT
from parts import PROGRAMS, RedisProcess, Writer, make_settings, redis_on, restored, shipped, shipping, until, writing

from storage.backup import state as shipper_state
from storage.backup.restore import restore, running
from storage.objects import open_store
from storage.settings import Settings

SECONDS = 75  # after this time a drill begins no further round


def settings_in(folder: str, server: str, **changes) -> Settings:
    """Settings of a Redis and a backup store in a folder. Ships once a second unless `changes` says otherwise."""
    data = Path(folder, "data")
    return make_settings(data, PROGRAMS[server], (Path(folder) / "backup").as_uri(), ship_interval=1, **changes)


def start_shipper(settings: Settings) -> subprocess.Popen:
    """Starts `imagegram-storage ship` as a process of its own, so that it can be killed."""
    environment = {
        **os.environ,
        "IMAGEGRAM_DATA": str(settings.data),
        "IMAGEGRAM_REDIS_SERVER": settings.redis_server,
        "IMAGEGRAM_BACKUP_STORE": settings.backup_store_url,
        "IMAGEGRAM_VERIFY_EVERY": "0",
    }
    command = [sys.executable, "-m", "storage", "ship"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)


def has_new_answers(writers: list[Writer]) -> Callable[[], bool]:
    """Returns a condition that holds once every writer has had another answer."""
    before = [len(writer.answered) for writer in writers]
    return lambda: all(len(writer.answered) > count for writer, count in zip(writers, before, strict=True))


async def kill(server: str, rounds: int = 50) -> str:
    lost = kills = 0
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        settings = settings_in(folder, server)
        end = time.monotonic() + SECONDS
        async with redis_on(settings) as redis, writing(settings, 64, 0) as writers:
            while kills < rounds and time.monotonic() < end:
                await until(has_new_answers(writers), "an answer to every writer")
                await asyncio.sleep(random.random() / 10)
                redis.kill()
                await redis.start()
                for writer in writers:
                    answered = set(writer.answered)
                    numbers = await writer.read(redis.client)
                    lost += len(answered - set(numbers)) + len(numbers) - len(set(numbers))
                kills += 1
            answers = sum(len(writer.answered) for writer in writers)
    assert not lost, f"{lost} of {answers} answered writes lost or double"
    return f"kill -9 of Redis, 64 writers, {kills} times: {answers} answered writes, {lost} lost or double"


async def power(server: str, rounds: int = 20, policy: str = "always") -> str:
    lost = answers = 0
    oldest = 0.0  # seconds before the cut at which the oldest lost write was answered
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="ig-") as folder:
            settings = settings_in(folder, server)
            redis = await RedisProcess(settings, "--appendfsync", policy).start()
            trace = Path(folder, "trace")
            calls = "trace=write,fdatasync,fsync"
            tracer = subprocess.Popen(
                ["strace", "-f", "-y", "-s", "64", "-e", calls, "-o", trace, "-p", str(redis.process.pid)],
                stderr=subprocess.DEVNULL,
            )
            await until(trace.exists, "the file of strace exists")
            start = redis.increment().stat().st_size
            await redis.client.set("traced", "1")
            recorded = re.compile(rf"{re.escape(redis.increment().name)}>.*SET")
            await until(
                lambda trace=trace, recorded=recorded: recorded.search(trace.read_text(errors="replace")),
                "strace records",
            )
            async with writing(settings, 16, 0) as writers:
                await until(has_new_answers(writers), "an answer to every writer")
                await asyncio.sleep(random.random() * 1.5)
                answered = [dict(writer.answered) for writer in writers]  # up to the cut
                cut = time.time()
                redis.kill()
                for writer in writers:
                    writer.stopping = True
            tracer.wait()
            os.truncate(redis.increment(), synced_length(trace, redis.increment(), start))
            await redis.start()
            for writer, before in zip(writers, answered, strict=True):
                survived = set(await writer.read(redis.client))
                missing = before.keys() - survived
                assert min(missing, default=1 << 32) > max(survived, default=0), "an older write is lost, a newer not"
                lost += len(missing)
                answers += len(before)
                oldest = max([oldest, *(cut - before[number] for number in missing)])
            await redis.stop()
    if policy == "always":
        assert not lost, f"{lost} of {answers} answered writes lost"
    else:
        assert lost, "no write was lost: the cut was not effective, so this drill proves nothing about `always`"
    age = f", the oldest {oldest:.1f} s before the cut" if lost else ""
    return f"power cut, appendfsync {policy}, {rounds} times: {answers} answered writes, {lost} lost{age}"


def synced_length(trace: Path, increment: Path, start: int) -> int:
    """The length in bytes that the increment had at its last fsync, as strace recorded it.

    `start` is its length when strace was attached. Asserts that the record is complete: only the write in which the
    server was killed may be missing.
    """
    size = synced = start
    syncing: dict[str, int] = {}  # thread: size of the file when its fsync began
    in_write: set[str] = set()  # threads whose write to the file has begun and not returned
    for line in trace.read_text(errors="replace").splitlines():
        thread = line.split()[0]
        count = re.search(r"= (\d+)$", line)
        if f"{increment.name}>" in line and "write(" in line:
            size += int(count[1]) if count else 0
            if not count:  # `<unfinished ...>`, or `= ?` if the server was killed during the write
                in_write.add(thread)
        elif "<... write resumed>" in line and thread in in_write:
            in_write.discard(thread)
            size += int(count[1]) if count else 0
        elif f"{increment.name}>" in line and re.search(r"f(data)?sync\(", line):
            if line.endswith("= 0"):
                synced = size
            else:
                syncing[thread] = size
        elif re.search(r"<... f(data)?sync resumed>", line) and line.endswith("= 0") and thread in syncing:
            synced = max(synced, syncing.pop(thread))
    unrecorded = increment.stat().st_size - size
    assert unrecorded == 0 or in_write, (size, unrecorded)
    return synced


async def machine(server: str, rounds: int = 20) -> str:
    losses: list[float] = []  # seconds before the loss of the machine at which the oldest lost write was answered
    durations: list[float] = []  # seconds of the restores
    end = time.monotonic() + SECONDS
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="ig-") as folder:
            settings = settings_in(folder, server)
            store = open_store(settings.backup_store_url)
            redis = await RedisProcess(settings).start()
            shipper = start_shipper(settings)
            async with writing(settings, 4, 0.02) as writers:  # about 200 writes a second
                await until(
                    lambda settings=settings: shipper_state.read(settings)["lag"] is not None,
                    "the shipper has caught up for the first time",
                )
                await asyncio.sleep(1 + random.random() * 2)
                dead = time.time()
                redis.kill()
                shipper.kill()
                shipper.wait()
                for writer in writers:
                    writer.stopping = True
            await redis.stop()
            shipped_up_to = time.time() - shipper_state.read(settings)["lag"]
            shutil.rmtree(settings.data / "redis")
            begun = time.monotonic()
            to = Path(folder, "restored")
            await restore(settings, store, to, report=lambda text: None)
            durations.append(time.monotonic() - begun)
            async with running(settings, to) as client:
                lost = []
                for writer in writers:
                    numbers = set(await writer.read(client))
                    lost += [when for n, when in writer.answered.items() if n not in numbers and when < dead]
            early = [when for when in lost if when < shipped_up_to]
            assert not early, f"{len(early)} writes lost that the shipper reported as shipped"
            losses.append(dead - min(lost) if lost else 0.0)
        if time.monotonic() > end:
            break
    losses.sort()
    return (
        f"machine loss under writes, {len(losses)} times: of the last seconds lost p50 {losses[len(losses) // 2]:.2f},"
        f" max {losses[-1]:.2f}; restored in {max(durations):.2f} s at most"
    )


async def seconds(server: str, count: int = 50) -> str:
    exact = 0
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        settings = settings_in(folder, server)
        store = open_store(settings.backup_store_url)
        async with redis_on(settings) as redis, shipping(settings, store) as shipper:
            async with writing(settings, 4, 0.01) as writers:
                await shipped(shipper)
                begun = time.time()
                flushes: list[tuple[float, float]] = []  # unix time before and after each FLUSHALL
                for number in range(8):
                    await asyncio.sleep(3 + random.random() * 3)
                    if number % 3 == 2:
                        before = time.time()
                        await redis.client.flushall()
                        flushes.append((before, time.time()))
                    await redis.rewrite()
                ended = time.time()
            await shipped(shipper)
        # A second in which a FLUSHALL ran has no single expected content.
        choice = [at for at in range(int(begun) + 1, int(ended)) if not any(a < at + 1 and b > at for a, b in flushes)]
        end = time.monotonic() + SECONDS
        for at in random.choices(choice, k=count):
            flushed = max((b for a, b in flushes if b <= at), default=0.0)
            done, lists = await restored(settings, store, writers, Path(folder), at)
            assert done.exact
            for writer, numbers in zip(writers, lists, strict=True):
                required = {n for n, when in writer.answered.items() if when < at and writer.begun[n] > flushed}
                allowed = {n for n, when in writer.begun.items() if when < at + 1 and writer.answered[n] >= flushed}
                assert required <= set(numbers) <= allowed, (at, flushed)
            exact += 1
            if time.monotonic() > end:
                break
    return f"{exact} random seconds of {len(choice)} across 8 rewrites and {len(flushes)} FLUSHALLs: {exact} exact"
