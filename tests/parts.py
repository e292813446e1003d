"""Parts of the durability tests: a Redis on a data folder, a shipper, and writers that record each answer."""

import asyncio
import contextlib
import functools
import random
import secrets
import shutil
import subprocess
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

from moto.server import ThreadedMotoServer
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from storage.backup import state as shipper_state
from storage.backup.restore import restore, running
from storage.backup.ship import Shipper
from storage.db import server
from storage.objects import open_store
from storage.settings import Settings, load

PROGRAMS = {"valkey": "", "redis": shutil.which("redis-server") or "redis-server"}
DEADLINE = 20  # seconds until a condition must be true


async def until(condition, what: str, deadline: float = DEADLINE):
    """Waits for a condition, a function or a coroutine function, and returns its value. It is polled every 10 ms."""
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < end, f"never came true: {what}"
        await asyncio.sleep(0.01)


class RedisProcess:
    """A server on the folder `settings.data/redis`. A test may kill it and start it again."""

    def __init__(self, settings: Settings, *options: str):
        self.settings, self.options = settings, options
        self.folder = settings.data / "redis"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen | None = None
        self.client = Redis.from_url(settings.redis_url, retry=Retry(NoBackoff(), 0))

    async def start(self) -> "RedisProcess":
        with (self.settings.data / "redis.log").open("ab") as log:
            command = [*server.command(self.settings), "--logfile", "", *self.options]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        await until(self.answers, "Redis answers")
        return self

    async def answers(self) -> bool:
        try:
            return not (await self.client.info("persistence"))["loading"]
        except (RedisError, OSError):
            return False

    def kill(self) -> None:
        """As `kill -9`."""
        self.process.kill()
        self.process.wait()

    async def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()
        await self.client.aclose()

    async def rewrite(self) -> None:
        """Runs BGREWRITEAOF and waits until its base is there."""
        before = self.base()
        await until(self._begin_rewrite, "a rewrite has begun")
        await until(lambda: self.base() != before, "the rewrite has ended")

    async def _begin_rewrite(self) -> bool:
        try:
            await self.client.bgrewriteaof()
        except RedisError:  # another rewrite has not ended yet
            return False
        return True

    @property
    def aof(self) -> Path:
        return self.folder / "appendonlydir"

    def base(self) -> str:
        return next(path.name for path in sorted(self.aof.glob("*.base.*")))

    def increment(self) -> Path:
        return max(self.aof.glob("*.incr.aof"), key=lambda path: int(path.name.split(".")[-3]))


@contextlib.asynccontextmanager
async def shipping(settings: Settings, store=None):
    """Runs a shipper in this process. An error of the shipper is raised at the end of the block."""
    shipper = Shipper(settings, store or open_store(settings.backup_store_url))
    task = asyncio.ensure_future(shipper.run())
    shipper.task = task
    try:
        yield shipper
        shipper.stop.set()
        await asyncio.wait_for(task, DEADLINE)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def shipped(shipper: Shipper) -> None:
    """Waits until all that is in Redis' files now is in the store, in a generation that a restore can use."""
    now = time.time()

    def reported() -> bool:
        lag = shipper_state.read(shipper.settings)["lag"]
        return lag is not None and time.time() - lag > now

    def caught_up() -> bool:
        return bool(shipper.chain and shipper.chain.second and shipper.caught_up_at > now and reported())

    await until(lambda: shipper.task.done() or caught_up(), "the shipper caught up")
    if shipper.task.done():
        shipper.task.result()


class Writer:
    """Writes one number after the other. Records when each write was begun and when it was answered."""

    def __init__(self, settings: Settings, name: str = "w"):
        self.client = Redis.from_url(settings.redis_url, retry=Retry(NoBackoff(), 0))
        self.key = f"written:{name}"
        self.begun: dict[int, float] = {}
        self.answered: dict[int, float] = {}
        self.number = 0
        self.stopping = False

    async def write(self) -> None:
        """Writes the next number to two keys in one transaction, so that they never differ."""
        self.number += 1
        number = self.number
        self.begun[number] = time.time()
        pipeline = self.client.pipeline(transaction=True)
        pipeline.rpush(self.key, number)
        pipeline.set(f"{self.key}:last", number)
        await pipeline.execute()
        self.answered[number] = time.time()

    async def run(self, pause: float = 0.005) -> None:
        """Writes until `stopping` is set, because redis-py may swallow a cancellation. Errors of Redis are skipped."""
        while not self.stopping:
            try:
                await self.write()
            except (RedisError, OSError):
                await asyncio.sleep(pause)
            await asyncio.sleep(pause)

    async def read(self, client: Redis) -> list[int]:
        """The numbers in a Redis. Asserts that it has no half of a transaction."""
        pipeline = client.pipeline(transaction=True)  # both keys at one moment: the writer may go on
        pipeline.lrange(self.key, 0, -1)
        pipeline.get(f"{self.key}:last")
        numbers, last = await pipeline.execute()
        found = [int(number) for number in numbers]
        assert (int(last) if last else None) == (found[-1] if found else None), "half a transaction"
        return found


@contextlib.asynccontextmanager
async def writing(settings: Settings, count: int = 1, pause: float = 0.005):
    writers = [Writer(settings, str(number)) for number in range(count)]
    tasks = [asyncio.ensure_future(writer.run(pause)) for writer in writers]
    try:
        yield writers
    finally:
        for writer in writers:
            writer.stopping = True
        await asyncio.gather(*tasks)
        for writer in writers:
            await writer.client.aclose()


def make_settings(data: Path, program: str, backup: str, **changes) -> Settings:
    environ = {
        "IMAGEGRAM_DATA": str(data),
        "IMAGEGRAM_REDIS_SERVER": program,
        "IMAGEGRAM_BACKUP_STORE": backup,
    }
    return replace(load(environ), **{"verify_every": 0, "ship_interval": 0.2, **changes})


@contextlib.asynccontextmanager
async def redis_on(settings, *options):
    redis = await RedisProcess(settings, *options).start()
    try:
        yield redis
    finally:
        await redis.stop()


async def restored(settings, store, writers, tmp_path, at=None):
    """Restores into a new folder. Returns the result of the restore, and the numbers of each writer."""
    to = tmp_path / f"restored-{random.getrandbits(32)}"
    done = await restore(settings, store, to, at)
    async with running(settings, to) as client:
        return done, [await writer.read(client) for writer in writers]


@functools.cache
def s3_server() -> str:
    """The URL of an S3 server in this process, one for all tests. Its thread ends with the process."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    return "http://{}:{}".format(*server.get_host_and_port())


def s3_url(monkeypatch) -> str:
    """The URL of a prefix in a new bucket of that server. Sets the AWS variables."""
    variables = {"ENDPOINT_URL": s3_server(), "ALLOW_HTTP": "true", "REGION": "us-east-1"}
    for name, value in {**variables, "ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    bucket = f"b{secrets.token_hex(8)}"
    urllib.request.urlopen(urllib.request.Request(f"{s3_server()}/{bucket}", method="PUT"))
    return f"s3://{bucket}/some/prefix"
