"""Calls Lua scripts on Redis, over one connection for reads and one for writes. All callers of a process share them.

Commands that wait at the same time leave as one pipeline, and Redis fsyncs them together (group commit). There is no
connection pool: with pipelines, a second connection only makes the batches smaller. Reads have their own connection,
because replies come in order: behind a write in the same pipeline a read would wait for the write's fsync.

A write is never sent twice. redis-py repeats writes by itself, so its retries are off. Only a script that Redis does
not know is sent again, with its text: such a script did not run.

This file makes no decisions: the scripts do. It returns rows as Redis gives them, as str, int and None.
"""

import asyncio
import hashlib
import math
import re
import time
from collections.abc import Callable
from contextlib import suppress
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
from storage.metrics import PIPELINES, ROUND_TRIPS

DEADLINE = 0.9  # seconds after which a call fails, so that the API can answer 503 within its promise of one second
# When this number of writes waits, they are sent although another pipeline is still in progress. They are worth an
# fsync of their own: a tenth more comments a second.
ENOUGH = 8
WAIT_MS = 500  # within which replicas must have received a pipeline: the time of a slow fsync, and less than DEADLINE
BATCH = 256  # commands in one pipeline: a few ms of Redis' time, for which the next pipeline has to wait

# Error replies of Redis. To redis-py the last two are connection errors, but the command has not run.
REPLIED = (ResponseError, BusyLoadingError, AuthenticationError)
# Error replies of a Redis that has run nothing: its memory is full, it cannot write its AOF, it is loading, it is not a
# primary, …
NOT_NOW = ("OOM", "MISCONF", "LOADING", "READONLY", "BUSY", "MASTERDOWN", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN")


# The name of each connection, as CLIENT LIST shows it. The number is that of the data's format. Processes of another
# format, or from before connections had names, must not write beside this one.
CLIENT_NAME = "imagegram-2"
NAMING: bytes = hiredis.pack_command(("CLIENT", "SETNAME", CLIENT_NAME))  # type: ignore[arg-type]
# The last command of a connection that may belong to such a process. RQ's connections send others.
SCRIPT_CALLS = ("evalsha", "eval", "wait")

Collect = Callable[[], tuple[list[str], list[Any]]]  # returns the keys and the arguments of a call
Done = Callable[[Any, Exception | None], None]  # gets the reply, or else the error


class Script(NamedTuple):
    text: str
    sha: str  # SHA-1 of the text in hexadecimal, the argument of EVALSHA
    reads: bool  # it writes nothing that must be durable, so its reply waits for no fsync


def script(text: str) -> Script:
    sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
    volatile = "redis.REPL_NONE" in text and "redis.REPL_ALL" not in text
    return Script(text, sha, volatile or "flags=no-writes" in text.split("\n", 1)[0])


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
    """One connection. Commands that arrive while a pipeline is in progress leave together in the next pipeline.

    The next pipeline leaves when the one before was answered, or when `enough` commands wait. At most two pipelines are
    in progress. `lost` is the error of a command that was sent and whose reply was lost: Unknown for writes, because
    they may have happened, Unreachable for reads. `undecodable` is the error handler for replies that are not UTF-8.

    With `replicas` the replies of a pipeline count only when so many replicas have received it. Otherwise they are
    Unknown: a failover may take the writes back.
    """

    def __init__(
        self,
        url: str,
        lost: type[Unknown] | type[Unreachable],
        enough: float = math.inf,
        undecodable: str = "replace",
        replicas: int = 0,
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
        channel = "reads" if lost is Unreachable else "writes"
        self._sizes, self._times = PIPELINES.series(channel), ROUND_TRIPS.series(channel)
        self._enough = enough
        self._replicas = replicas
        self._barrier: bytes = hiredis.pack_command(("WAIT", str(replicas), str(WAIT_MS)))  # type: ignore[arg-type]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[tuple[bytes | Callable[[], bytes], Any]] = []
        self._tasks: set[asyncio.Task[None]] = set()  # one for each pipeline in progress
        self._sending = asyncio.Lock()
        self._reading = asyncio.Lock()

    def ask(self, *command: Any) -> asyncio.Future[Any]:
        """A future with the reply to a command. It raises one of REPLIED, Unreachable, or `lost`."""
        # Pack here, so that only this caller gets the error if the command cannot be packed. In `_send`, all callers
        # of the pipeline would get it. hiredis packs: redis-py's own packer takes ten times as long.
        answer: asyncio.Future[Any] = self.ask_packed(hiredis.pack_command(command))
        return answer

    def ask_packed(self, packed: bytes | Callable[[], bytes], answer: Any = None) -> Any:
        """Like `ask`, for a packed command, or for a function that is called for it when its pipeline leaves.

        `answer`: what is resolved with the reply, instead of a new future.
        """
        if self._loop is None:  # only once: Python 3.11 makes a system call each time
            self._loop = asyncio.get_running_loop()
        answer = answer or self._loop.create_future()
        self._waiting.append((packed, answer))
        if not self._tasks or (len(self._waiting) == self._enough and len(self._tasks) == 1):
            self._tasks.add(self._loop.create_task(self._run()))
        return answer

    async def close(self) -> None:
        """Wait for all replies, then disconnect."""
        await asyncio.gather(*self._tasks)
        await self._connection.disconnect()

    async def _run(self) -> None:
        try:
            while self._waiting and (len(self._tasks) == 1 or len(self._waiting) >= self._enough):
                if all(callable(packed) for packed, _ in self._waiting):
                    # Only limits wait. A request asks for its limit first and then, in a task of its own, for what it
                    # reads. The turn of the event loop ends before they leave, so they leave together.
                    await asyncio.sleep(0)
                await self._send()
        finally:
            self._tasks.discard(asyncio.current_task())

    async def _send(self) -> None:
        """Send the waiting commands as one pipeline, and read their replies after those of the pipeline before."""
        connection = self._connection
        batch = []
        new = sent = False
        try:
            async with asyncio.timeout(DEADLINE):
                async with self._sending:
                    batch = self._waiting[:BATCH]
                    self._waiting = self._waiting[BATCH:]
                    if not batch:  # the commands left with the pipeline before
                        return
                    if connection.is_connected and not self._reading.locked() and await connection.can_read():
                        await connection.disconnect(nowait=True)  # Redis closed it while it was idle
                    if not connection.is_connected:
                        await connection.connect()  # type: ignore[no-untyped-call]
                        new = True
                    commands = [packed if isinstance(packed, bytes) else packed() for packed, _ in batch]
                    if new:
                        commands.insert(0, NAMING)
                    if self._replicas:
                        commands.append(self._barrier)
                    sent = True
                    sent_at = time.perf_counter()
                    await connection.send_packed_command(commands, check_health=False)
                    await self._reading.acquire()
                try:
                    # The connection's own read_response makes three more calls for each reply, for timeouts that are
                    # not used here. They took a twentieth of the time of reading a post.
                    parser = connection._parser
                    replies = []
                    if new:
                        with suppress(ResponseError):  # this user may not name its connection
                            await parser.read_response()  # type: ignore[attr-defined]
                    for _, answer in batch:
                        try:
                            reply = await parser.read_response()  # type: ignore[attr-defined]
                        except REPLIED as error:
                            reply = error
                        if self._replicas:
                            replies.append(reply)
                        else:
                            _resolve(answer, reply)
                    if self._replicas:
                        copies = await parser.read_response()  # type: ignore[attr-defined]
                        if isinstance(copies, int):
                            enough, lacking = copies >= self._replicas, f"only {copies} replicas have it"
                        else:  # an error, because the node has become a replica
                            enough, lacking = False, f"nobody knows which replicas have it ({copies})"
                        too_few = Unknown(f"{lacking}, of {self._replicas}")
                        for (_, answer), reply in zip(batch, replies, strict=True):
                            _resolve(answer, reply if enough or isinstance(reply, Exception) else too_few)
                finally:
                    self._reading.release()
            self._sizes.observe(len(batch))
            self._times.observe(time.perf_counter() - sent_at)
        except (RedisError, OSError, TimeoutError) as error:
            # Disconnect, so that a late reply is not taken for the reply to the next command. Commands that were not
            # sent yet would wait for the same server. They fail now, within their deadline.
            await connection.disconnect(nowait=True)
            for _, answer in batch:
                _resolve(answer, self._lost(f"Redis' answer was lost: {error}") if sent else _unreachable(error))
            for _, answer in self._waiting:
                _resolve(answer, _unreachable(error))
            self._waiting = []


def _resolve(answer: Any, result: Any) -> None:
    """Resolve a future, or a LateCall, with a result, or with an error if the result is one."""
    if answer.done():  # its caller was cancelled
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)


def _unreachable(error: Exception) -> Unreachable:
    return Unreachable(f"Redis cannot be reached: {error or 'no answer'}")


def meaning(error: Exception) -> Exception:
    """What an error reply to a script means: a Refusal, or the error itself, which is a bug or malformed data."""
    message = str(error)
    refusal = from_reply(message)
    if refusal is None and (type(error) is not ResponseError or message.startswith(NOT_NOW)):
        refusal = Unreachable(f"Redis refuses: {message}")
    return refusal or error


class LateCall:
    """A call of a script that is complete only when its pipeline leaves. See `Redis.call_late`.

    For its channel it is the future of the reply: it has the three methods that `_resolve` needs. A future would call
    back in a later turn of the event loop, and half of the time of such a call would be spent on that.
    """

    __slots__ = ("channel", "called", "collect", "on_reply", "meaning", "sent", "ended")

    def __init__(
        self,
        channel: Channel,
        called: Script,
        collect: Collect,
        on_reply: Done,
        meaning: Callable[[Exception], Exception],
    ):
        self.channel = channel
        self.called = called
        self.collect = collect
        self.on_reply = on_reply
        self.meaning = meaning
        self.sent: tuple[Any, ...] = ()
        self.ended = False

    def pack(self) -> bytes:
        keys, args = self.collect()
        self.sent = (len(keys), *keys, *args)
        packed: bytes = hiredis.pack_command(("EVALSHA", self.called.sha, *self.sent))
        return packed

    def done(self) -> bool:
        return self.ended

    def set_result(self, reply: Any) -> None:
        self.ended = True
        self.on_reply(reply, None)

    def set_exception(self, error: Exception) -> None:
        self.ended = True
        if type(error) is NoScriptError:
            again = LateCall(self.channel, self.called, self.collect, self.on_reply, self.meaning)
            self.channel.ask_packed(hiredis.pack_command(("EVAL", self.called.text, *self.sent)), again)
        else:
            self.on_reply(None, self.meaning(error) if isinstance(error, REPLIED) else error)


class Redis:
    """Calls the scripts in lua/ on one Redis.

    `url` is a URL of redis-py. `clock` is passed to every script that needs the time, in ms since 1970: an empty string
    means Redis' own clock, and tests set a number. `undecodable` is an error handler of Python's `bytes.decode`, for
    replies that are not UTF-8. Only foreign clients write such bytes. With `replicas`, a write counts only when so many
    replicas have received it, see `Channel`.
    """

    meaning = staticmethod(meaning)
    place = ""  # of a node of a Cluster: `host:port`
    cluster: Literal["", "1"] = ""  # what scripts get that must know whether they run on a Cluster

    def __init__(
        self, url: str, scripts: dict[str, Script] = SCRIPTS, undecodable: str = "replace", replicas: int = 0
    ):
        self._scripts = scripts
        self._reads = Channel(url, lost=Unreachable, undecodable=undecodable)
        self._writes = Channel(url, lost=Unknown, enough=ENOUGH, undecodable=undecodable, replicas=replicas)
        self.clock: int | Literal[""] = ""

    async def call(self, name: str, keys: list[str], *args: Any) -> Any:
        """Run a script and return its reply: str, int, None, or a list of these.

        Raises the Refusal that the script replies with, Unreachable where nothing happened, and Unknown where the reply
        to a write was lost. Raises ResponseError for any other error of a script, which is a bug or malformed data.
        """
        called = self._scripts[name]
        channel = self._reads if called.reads else self._writes
        try:
            try:
                return await channel.ask("EVALSHA", called.sha, len(keys), *keys, *args)
            except NoScriptError:
                return await channel.ask("EVAL", called.text, len(keys), *keys, *args)
        except REPLIED as error:
            raise self.meaning(error) from None

    def call_late(self, name: str, key: str, collect: Collect, done: Done) -> None:
        """Like `call`, but `collect` is called for the keys and the arguments when the pipeline leaves.

        `key` is one of the keys, or another one of their partition: a Cluster needs it now. `done` gets the reply, or
        the error that `call` would raise. There is no task, because several thousand of these calls may be made in a
        second. None of the functions may raise.
        """
        called = self._scripts[name]
        late = LateCall(self._reads if called.reads else self._writes, called, collect, done, self.meaning)
        late.channel.ask_packed(late.pack, late)

    async def ping(self) -> list[str]:
        """Raises Unreachable where Redis does not answer within DEADLINE. Returns [], see `Cluster.ping`."""
        try:
            await self._reads.ask("PING")
            return []
        except REPLIED as error:
            raise Unreachable(f"Redis refuses: {error}") from None

    async def info(self, *sections: str) -> dict[str, str]:
        """Redis' reply to INFO, by name. Raises Unreachable where Redis does not answer, or refuses it to this user."""
        try:
            reply = await self._reads.ask("INFO", *sections)
        except REPLIED as error:
            raise Unreachable(f"Redis refuses: {error}") from None
        return dict(line.split(":", 1) for line in reply.splitlines() if ":" in line)

    async def others(self) -> list[str]:
        """The addresses of clients that may be processes of another version: they call scripts and have another name.

        Raises Unreachable where Redis does not answer, or refuses CLIENT LIST to this user.
        """
        try:
            reply = await self._reads.ask("CLIENT", "LIST", "TYPE", "NORMAL")
        except REPLIED as error:
            raise Unreachable(f"Redis refuses: {error}") from None
        # The address of a socket may contain spaces, so not every word is a field.
        clients = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in reply.splitlines()]
        # An API that nobody uses yet only pings, for /readyz. `redis-cli ping` does not stay for a second.
        return [
            one["addr"]
            for one in clients
            if one["name"] != CLIENT_NAME
            and (one["cmd"] in SCRIPT_CALLS or (one["cmd"] == "ping" and one["age"] != "0"))
        ]

    async def primaries(self) -> list["Redis"]:
        """The servers that hold the data, for a walk over all keys."""
        return [self]

    async def groups(self, partitions: int) -> list[tuple[int, ...]]:
        """The partitions 0 to `partitions` - 1, those of each server together."""
        return [tuple(range(partitions))]

    async def close(self) -> None:
        await self._reads.close()
        await self._writes.close()


def now_ms(db: Redis) -> int:
    """ms since 1970 by this machine's clock, or `db.clock` in tests. It may differ from Redis' clock by seconds."""
    return db.clock or int(time.time() * 1000)
