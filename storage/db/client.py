"""Calls Lua scripts on Redis: one connection for reads, one for writes, each shared by all who wait.

What waits at the same time leaves as one pipeline, and is fsynced together (group commit). There is no pool: with
pipelines a second connection only makes smaller batches. Reads have their own, so that no read queues behind a
write's fsync in the same pipeline.

Nothing is ever sent twice: redis-py repeats writes by itself, so its retries are off. A script that Redis does not
know did not run, and is sent again with its text.

Does not decide: that is done in Lua. Does not render: rows are returned as Redis gives them, as str, int and None.
"""

import asyncio
import hashlib
import math
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import hiredis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoScriptError,
    RedisError,
    ResponseError,
)

from storage.errors import Unknown, Unreachable, from_reply

DEADLINE = 0.9  # seconds after which whoever waits is told: the contract promises a 503 within one
ENOUGH = 8  # writes that are worth an fsync of their own while others' is under way: a tenth more comments a second
BATCH = 256  # commands in one pipeline; a few ms of Redis' time, which is what a batch makes the next one wait

# What Redis answers. redis-py takes two of its refusals for a lost connection: the command has not run.
REPLIED = (ResponseError, BusyLoadingError, AuthenticationError)
# Redis says no before it ran anything: memory is full, it cannot write its AOF, it loads, it is no primary, …
NOT_NOW = ("OOM", "MISCONF", "LOADING", "READONLY", "BUSY", "MASTERDOWN", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN")


class Script(NamedTuple):
    text: str
    sha: str  # SHA-1 of the text, as EVALSHA wants it
    reads: bool  # it writes nothing


def script(text: str) -> Script:
    sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    return Script(text, sha, "flags=no-writes" in text.split("\n", 1)[0])


def read_scripts(folder: Path) -> dict[str, Script]:
    """Every script by its name: its first line (`#!lua …`), the functions of shared.lua, and the rest of its text.

    The functions are a part of every script because Redis offers a script no other way to them: a script can neither
    read a file nor define a global.
    """
    shared = (folder / "shared.lua").read_text()
    scripts = {}
    for path in sorted(folder.glob("*.lua")):
        if path.name != "shared.lua":
            first, rest = path.read_text().split("\n", 1)
            scripts[path.stem] = script(f"{first}\n{shared}\n{rest}")
    return scripts


SCRIPTS = read_scripts(Path(__file__).parent.parent.with_name("lua"))


class Channel:
    """One connection. Those who ask while a pipeline is under way leave together in the next one.

    It leaves when the one before was answered, or when `enough` wait; two at most are under way. `lost` is the error
    of those whose command was sent and whose answer did not come.
    """

    def __init__(
        self, url: str, lost: type[Unknown] | type[Unreachable], enough: float = math.inf, undecodable: str = "replace"
    ):
        pool = redis.asyncio.ConnectionPool.from_url(
            url,
            decode_responses=True,
            encoding_errors=undecodable,
            protocol=2,
            socket_timeout=None,
            retry=Retry(NoBackoff(), 0),
        )
        # redis-py leaves make_connection and connect without types.
        self._connection: redis.asyncio.Connection = pool.make_connection()  # type: ignore[no-untyped-call]
        self._lost = lost
        self._enough = enough
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[tuple[bytes, asyncio.Future[Any]]] = []
        self._tasks: set[asyncio.Task[None]] = set()  # one for each pipeline under way
        self._sending = asyncio.Lock()
        self._reading = asyncio.Lock()

    def ask(self, *command: Any) -> asyncio.Future[Any]:
        """Awaits the reply to a command. Raises ResponseError, Unreachable, or what `lost` says."""
        # Packed here, so that what cannot be packed is its caller's fault and not that of all who leave together.
        # By hiredis: redis-py's own packer takes ten times as long.
        packed = hiredis.pack_command(command)
        if self._loop is None:  # asked for once: Python 3.11 makes a system call each time
            self._loop = asyncio.get_running_loop()
        answer = self._loop.create_future()
        self._waiting.append((packed, answer))
        if not self._tasks or (len(self._waiting) == self._enough and len(self._tasks) == 1):
            self._tasks.add(self._loop.create_task(self._run()))
        return answer

    async def close(self) -> None:
        await asyncio.gather(*self._tasks)
        await self._connection.disconnect()

    async def _run(self) -> None:
        try:
            while self._waiting and (len(self._tasks) == 1 or len(self._waiting) >= self._enough):
                await self._send()
        finally:
            self._tasks.discard(asyncio.current_task())

    async def _send(self) -> None:
        """Send what waits, and read its answers behind those of the pipeline before."""
        connection = self._connection
        batch = []
        sent = False
        try:
            async with asyncio.timeout(DEADLINE):
                async with self._sending:
                    batch = self._waiting[:BATCH]
                    self._waiting = self._waiting[BATCH:]
                    if not batch:  # it left with the pipeline before
                        return
                    if connection.is_connected and not self._reading.locked() and await connection.can_read():
                        await connection.disconnect(nowait=True)  # Redis closed it while nobody asked
                    if not connection.is_connected:
                        await connection.connect()  # type: ignore[no-untyped-call]
                    sent = True
                    await connection.send_packed_command([packed for packed, _ in batch], check_health=False)
                    await self._reading.acquire()
                try:
                    for _, answer in batch:
                        try:
                            _resolve(answer, await connection.read_response(disconnect_on_error=False))
                        except REPLIED as error:
                            _resolve(answer, error)
                finally:
                    self._reading.release()
        except (RedisError, OSError, TimeoutError) as error:
            # A late reply must not be taken for the next command's. Those who were not sent yet would wait for the
            # same server: they are told now, within the deadline.
            await connection.disconnect(nowait=True)
            for _, answer in batch:
                _resolve(answer, self._lost(f"Redis' answer was lost: {error}") if sent else _unreachable(error))
            for _, answer in self._waiting:
                _resolve(answer, _unreachable(error))
            self._waiting = []


def _resolve(answer: asyncio.Future[Any], result: Any) -> None:
    if answer.done():  # whoever asked has gone
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)


def _unreachable(error: Exception) -> Unreachable:
    return Unreachable(f"Redis cannot be reached: {error or 'no answer'}")


class Redis:
    """The scripts of one Redis.

    `clock` is given to every script that wants to know the time; empty means Redis' own. `undecodable` says how bytes
    that are not UTF-8 are decoded, which only others write: an error handler of Python's `bytes.decode`.
    """

    def __init__(self, url: str, scripts: dict[str, Script] = SCRIPTS, undecodable: str = "replace"):
        self._scripts = scripts
        self._reads = Channel(url, lost=Unreachable, undecodable=undecodable)
        self._writes = Channel(url, lost=Unknown, enough=ENOUGH, undecodable=undecodable)
        self.clock: int | Literal[""] = ""

    async def call(self, name: str, keys: list[str], *args: Any) -> Any:
        """Run a script. Raises the Refusal it answers, Unreachable, or Unknown where a write's answer was lost."""
        called = self._scripts[name]
        channel = self._reads if called.reads else self._writes
        try:
            try:
                return await channel.ask("EVALSHA", called.sha, len(keys), *keys, *args)
            except NoScriptError:
                return await channel.ask("EVAL", called.text, len(keys), *keys, *args)
        except REPLIED as error:
            message = str(error)
            refusal = from_reply(message)
            if refusal is None and (type(error) is not ResponseError or message.startswith(NOT_NOW)):
                refusal = Unreachable(f"Redis refuses: {message}")
            if refusal is None:
                raise
            raise refusal from None

    async def ping(self) -> None:
        """Raises Unreachable where Redis does not answer."""
        try:
            await self._reads.ask("PING")
        except REPLIED as error:
            raise Unreachable(f"Redis refuses: {error}") from None

    async def close(self) -> None:
        await self._reads.close()
        await self._writes.close()


def now_ms(db: Redis) -> int:
    """Milliseconds since 1970 by this machine's clock, for what need not agree with Redis' to the second."""
    return db.clock or int(time.time() * 1000)
