"""`imagegram-storage ship`: copies Redis' append-only files into the backup store as they grow.

Two tasks. One looks at the manifest every few milliseconds and holds each file open from the moment it appears,
because a rewrite unlinks the old ones and an open file outlives that. The other goes once an interval through what is
there and not yet shipped. All it sends to Redis is INFO and BGREWRITEAOF.

What makes a chain true:

- Redis only appends to an increment while it lives. Each stretch is read first, and then Redis is asked whether it is
  still the one whose files were compared; only then is the stretch put.
- When it is another (a restart may cut a torn tail), or a file has another inode or is shorter than what was shipped,
  the files are hashed again as far as they were shipped. If they differ, nothing is added to that chain any more: a
  rewrite is forced and its base begins the next generation.
- One increment follows another only if one manifest named both. Rewrites can follow so closely that one came and went
  between two looks. Its records are then in the newer base, so the next generation loses nothing; what is lost is
  only the choice of a second within it, and the close mark of the chain says so (`gap`).
- A base is copied beside the growing chain. When base and increments are in the store up to the present, the old
  chain is closed with the number of the new, and then the new one is described: from then on `restore` finds it.
"""

import asyncio
import hashlib
import logging
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

from aiofiles.base import wrap
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from storage import logs, watchdog
from storage.backup import aof, chain, retain, state, verify
from storage.backup.chain import Chain, Copied
from storage.backup.watch import Files
from storage.db.server import lock_folder
from storage.objects import Exists, ObjectStore, Unavailable, open_store
from storage.settings import Settings, refused

log = logging.getLogger("imagegram.ship")

LOOK = 0.02  # seconds between two looks at the manifest, a stat each; a rewrite waits for a cron, 100 ms
ASK_AGAIN = 10  # seconds between two BGREWRITEAOF: one that fails (disk full) is not asked for each second
LOOK_AGAIN = 60.0  # seconds between two looks at the last trial's result: another machine may run trials, too
PUT_AGAIN = 1  # seconds before an object is put again that the store did not take


class Stopped(Exception):
    """Another shipper writes this chain. Nothing was overwritten; this one must not go on."""


@dataclass(frozen=True)
class Server:
    """What INFO says of Redis that matters here."""

    run: str
    family: str
    version: str
    rewriting: bool


class Shipper:
    """Ships one Redis to one store. `run` returns when `stop` is set, after a last look."""

    def __init__(self, settings: Settings, store: ObjectStore):
        self.settings = settings
        self.store = store
        self.files = Files(settings.data / "redis" / "appendonlydir")
        never = Retry(NoBackoff(), 0)
        self.redis = Redis.from_url(settings.redis_url, retry=never, socket_timeout=5, socket_connect_timeout=2)
        self.stop = asyncio.Event()
        self.run_id = ""  # of the Redis whose files are known to be those of the chain
        self.chain: Chain | None = None  # the generation that restore would find
        self.gap = False  # it misses an increment, so the newest data are only in the coming generation
        self.coming: Chain | None = None  # the next one, until its base is in the store
        self.refused: tuple[str, int] | None = None  # base that begins no generation: a newer one was wanted
        self.number = 1  # of the next generation
        self.asked = -float(ASK_AGAIN)  # when BGREWRITEAOF was sent last (monotonic)
        self.caught = 0.0  # unix time at which all that could be read was in the store
        self.trouble = ""
        self.verified: dict | None = None
        self.verifying: asyncio.subprocess.Process | None = None
        self.looked = -LOOK_AGAIN  # when the last result was read (monotonic)
        self.tried = 0.0  # unix time at which that was started: one that died is not started again at once

    async def run(self) -> None:
        """Ship until `stop` is set. Raises Stopped, Damaged (the store's own chain is not what was put)."""
        tasks = [asyncio.ensure_future(self._watch()), asyncio.ensure_future(self._work())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            # redis-py may swallow a cancellation: the work is also told to stop, and waited for 5 s at most
            self.stop.set()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=5)
            if self.verifying:
                with suppress(ProcessLookupError, TimeoutError):
                    self.verifying.terminate()
                    await asyncio.wait_for(self.verifying.wait(), 5)
            await self.redis.aclose()
            self.files.close()

    async def _watch(self) -> None:
        while True:
            self.files.refresh()
            await asyncio.sleep(LOOK)

    async def _work(self) -> None:
        with watchdog.working("shipping"):
            await self._patiently(self._find)
        while True:
            last, begun = self.stop.is_set(), time.monotonic()
            with watchdog.working("shipping"):
                more = await self._patiently(self._once)
            if last:
                return
            if not more:
                with suppress(TimeoutError):
                    pause = begun + self.settings.ship_interval - time.monotonic()
                    await asyncio.wait_for(self.stop.wait(), max(0.0, pause))

    async def _patiently(self, step):
        """What a step returns, tried again until the store takes part in it or the shipper is to stop."""
        while True:
            try:
                result = await step()
            except Unavailable as error:
                self._tell(f"store: {error}")
                if self.stop.is_set():
                    raise
                await asyncio.sleep(PUT_AGAIN)
            else:
                self._tell("")
                return result

    async def _find(self) -> None:
        """Where the store's newest chain stands. It goes on if the files at hand are those that it copied."""
        self.number = await chain.unused(self.store)
        try:
            self.chain = await chain.newest(self.store)
        except aof.Damaged as error:
            log.error("%s: that generation is not gone on with", error)
        if self.chain is None or not self.chain.second:
            self._begin_anew("no chain to go on with")

    def _begin_anew(self, reason: str) -> None:
        log.warning("%s: asking Redis for a rewrite, which begins generation %d", reason, self.number)
        if self.chain:
            self.chain.broken = True
        self.coming = None
        self.asked = -float(ASK_AGAIN)
        self.files.refresh_all()
        self.refused = self.files.base() or ("", 0)

    async def _once(self) -> bool:
        """Ship all that is there; begin, carry on and finish a generation. True: there is more to do now."""
        begun = time.time()
        server = await self._server()
        self.files.refresh()
        manifest = self.files.manifest
        if server and manifest and (server.run != self.run_id or self.files.replaced):
            await self._compare(server)
        if server:
            await self._ask_for_rewrite(server)
        if manifest is None or not self.run_id:
            return False
        if self.chain and not self.chain.broken:
            copied = await self._copy(self.chain)
            self.gap = manifest.files[-1] not in [file.name for file in self.chain.files]
            # A base that is on its way meanwhile does not matter: this chain has every second.
            if copied and not self.gap:
                self.caught = begun
        base = self.files.base()
        ended = self.chain is None or self.chain.broken or self.chain.base != base[0]
        if ended and not self.coming and base != self.refused:
            self.coming = Chain(self.number, [Copied(base[0])], second=self.files.second(base[0]))
            self.number += 1
            self.refused = None
        more = False
        if self.coming:
            until = time.monotonic() + self.settings.ship_interval
            if not await self._copy(self.coming, until):
                more = time.monotonic() >= until
            elif server:
                await self._switch(server)
                self.caught = begun
        chains = (self.chain, self.coming)
        self.files.let_go([used.copying.name for used in chains if used and not used.broken])
        await self._verify()
        return more

    async def _server(self) -> Server | None:
        """None while Redis is away or still loading (it may cut the file it loads)."""
        try:
            info = await self.redis.info("server", "persistence")
        except (RedisError, OSError):
            return None
        finally:
            watchdog.step()
        if info["loading"]:
            return None
        family = info.get("server_name", "redis")
        rewriting = info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"]
        return Server(info["run_id"], family, info[f"{family}_version"], bool(rewriting))

    async def _compare(self, server: Server) -> None:
        """A Redis not seen before: are its files those of the chain?"""
        self.files.refresh_all()
        self.files.replaced = False
        self.run_id = server.run
        if self.coming:
            log.warning("Redis was started anew: generation %d is begun again", self.coming.generation)
            self.coming = None
        if self.chain and not self.chain.broken and not await asyncio.to_thread(self._same, self.chain):
            self._begin_anew(f"the files are not those of generation {self.chain.generation}")

    def _same(self, known: Chain) -> bool:
        names = [file.name for file in known.files]
        if self.files.manifest is None or self.files.manifest.files[: len(names)] != names:
            return False
        for file in known.files:
            digest = hashlib.sha256()
            left = file.length
            while left and (data := self.files.read(file.name, file.length - left, min(left, 1 << 20))):
                digest.update(data)
                left -= len(data)
                watchdog.step()
            if left or digest.hexdigest() != (file.digest or file.hash.hexdigest()):
                return False
            if file is not known.copying and self.files.size(file.name) != file.length:
                return False
            file.hash, file.digest = digest, ""
        return True

    async def _ask_for_rewrite(self, server: Server) -> None:
        """BGREWRITEAOF, when a generation is wanted and none is on its way."""
        wanted = self.refused is not None and self.files.base() in (self.refused, None)
        manifest = self.files.manifest
        if self.chain and manifest and self.chain.base == manifest.base and not self.coming:
            wanted = wanted or time.time() - self.chain.second >= self.settings.snapshot_every
        if wanted and not server.rewriting and time.monotonic() - self.asked >= ASK_AGAIN:
            self.asked = time.monotonic()
            with suppress(RedisError, OSError):
                await self.redis.bgrewriteaof()

    async def _copy(self, into: Chain, until: float = float("inf")) -> bool:
        """Append what can be read now. False: `until` (monotonic) came before the end, or another Redis."""
        while time.monotonic() < until:
            file = into.copying
            # Asked before the read: once an increment has a successor, nothing more is written to it.
            following = self.files.follows.get(file.name)
            data = await wrap(self.files.read)(file.name, file.length, chain.SEGMENT)
            if data:
                server = await self._server()
                if (server and server.run != self.run_id) or self.files.replaced:
                    return False
                await self._append(into, data)
                if len(data) < chain.SEGMENT and following not in self.files:
                    return True  # what came meanwhile is for the next time: no tiny segments
            elif self.files.size(file.name) < file.length:
                self.run_id = ""
                return False
            elif following in self.files:
                await self._append(into, next=following)
                into.files.append(Copied(following))
            else:
                return True
        return False

    async def _append(self, into: Chain, data: bytes = b"", **mark) -> None:
        """Create the chain's next object. Tries until the store has it: what comes after names its digest."""
        file = into.copying
        if not into.broken:
            into.until = time.time()
        after = file.hash.copy()
        after.update(data)
        header = {
            "generation": into.generation,
            "file": file.name,
            "offset": file.length,
            "length": len(data),
            "prefix": file.digest or after.hexdigest(),  # the first: a mark on a chain that was not copied here
            "previous": into.previous,
            "time": into.until,
            **mark,
        }
        sealed = await wrap(chain.seal)(header, data)
        await self._create(chain.segment_name(into.generation, file.name, file.length), sealed)
        file.hash, file.length, into.previous = after, file.length + len(data), sealed[-32:].hex()

    async def _create(self, name: str, data: bytes) -> None:
        """Raises Stopped if another writer made the object."""

        async def create():
            try:
                await self.store.create(name, data)
            except Exists:
                # It may be our own, if the answer to a create was lost: no two writers put the same `time`.
                if await self.store.get(name) != data:
                    raise Stopped(f"{name} was written by another shipper: this one stops") from None

        await self._patiently(create)

    async def _switch(self, server: Server) -> None:
        """The coming generation has all there is: close the chain before it, then describe it."""
        coming, before = self.coming, self.chain
        if before and not before.closed:
            if not before.broken:
                await self._copy(before)
            known = {file.name for file in coming.files}
            gap = before.broken or before.copying.name not in known
            await self._append(before, closed=coming.generation, gap=gap)
            before.closed = coming.generation
        base = coming.files[0]
        description = {
            "generation": coming.generation,
            "server": server.family,
            "version": server.version,
            "base": base.name,
            "length": base.length,
            "sha256": base.hash.hexdigest(),
            "second": coming.second,
        }
        await self._create(chain.description_name(coming.generation), chain.seal(description))
        log.info("generation %d begins with %s, %d bytes", coming.generation, base.name, base.length)
        self.chain, self.coming, self.gap = coming, None, False
        try:
            await retain.sweep(self.store, self.settings, coming.generation)
        except Unavailable as error:
            log.warning("nothing old was removed this time: %s", error)

    # Telling

    def _tell(self, trouble: str) -> None:
        """Log what changes, and keep the state that `/readyz` reads."""
        if trouble and trouble != self.trouble:
            log.warning("%s", trouble)
        elif self.trouble and not trouble:
            log.info("all is well again")
        self.trouble = trouble
        state.write(
            self.settings,
            {
                "caught": self.caught,
                "generation": self.chain.generation if self.chain else None,
                "trouble": trouble or self._beginning(),
                "verified": self.verified,
            },
        )

    def _beginning(self) -> str:
        """Why the lag grows although nothing fails: no chain is there that could grow. Empty if one is."""
        if self.chain and not self.chain.broken and not self.gap:
            return ""
        if not self.coming:
            return "a generation is to begin: waits for Redis to write its base"
        base = self.coming.files[0]
        done, whole = (length / (1 << 20) for length in (base.length, self.files.size(base.name)))
        return f"generation {self.coming.generation} begins: {done:.1f} of {whole:.1f} MiB of its base are shipped"

    async def _verify(self) -> None:
        """Start `verify` once a day, as a process of its own: it loads the whole data set a second time."""
        if self.verifying and self.verifying.returncode is not None:
            log.info("the restore on trial ended with %d", self.verifying.returncode)
            self.verifying, self.looked = None, -LOOK_AGAIN
        if time.monotonic() >= self.looked + LOOK_AGAIN:
            self.verified, self.looked = await verify.last_result(self.store), time.monotonic()
        if not self.settings.verify_every or self.verifying or not self.chain or not self.chain.second:
            return
        last = self.verified["time"] if self.verified else self.chain.second
        if time.time() - max(last, self.tried) >= self.settings.verify_every:
            self.tried = time.time()
            self.verifying = await asyncio.create_subprocess_exec(sys.executable, "-m", "storage", "verify")


def main(settings: Settings) -> None:
    """Ship until SIGTERM or SIGINT. Exits with 3 if another shipper writes the same chain."""
    logs.configure()
    try:
        lock_folder(settings.data)  # a second one would take the chain of the first, which would then end
    except OSError as error:
        raise refused("DATA", str(settings.data), f"{error.filename}: {error.strerror}") from None

    async def ship() -> None:
        shipper = Shipper(settings, open_store(settings.backup_store_url))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, shipper.stop.set)
        watchdog.start(settings.watchdog)
        watchdog.watch_loop(asyncio.get_running_loop())
        await shipper.run()

    try:
        asyncio.run(ship())
    except Stopped as error:
        log.error("%s", error)
        sys.exit(3)
    except Unavailable as error:
        sys.exit(f"stopped with the store behind: {error}")
    except OSError as error:
        raise refused("DATA", str(settings.data), f"{error.filename}: {error.strerror}") from None
