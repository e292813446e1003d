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
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from aiofiles.base import wrap
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from storage import logs, watchdog
from storage.backup import aof, chain, retain, state, verify
from storage.backup.chain import Chain, ShippedFile
from storage.backup.watch import Files
from storage.db.server import lock_folder
from storage.objects import Exists, ObjectStore, Unavailable, open_store
from storage.settings import Settings, refused

log = logging.getLogger("imagegram.ship")
T = TypeVar("T")

MANIFEST_POLL = 0.02  # seconds between two looks at the manifest, a stat each; a rewrite waits for a cron, 100 ms
REWRITE_RETRY = 10  # seconds between two BGREWRITEAOF: one that fails (disk full) is not asked for each second
RESULT_REFRESH = 60.0  # seconds between two looks at the last trial's result: another machine may run trials, too
PUT_RETRY = 1  # seconds before an object is put again that the store did not take


class Stopped(Exception):
    """Another shipper writes this chain. Nothing was overwritten; this one must not go on."""


@dataclass(frozen=True)
class ServerInfo:
    """What INFO says of Redis that matters here."""

    run_id: str
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
        self.known_run_id = ""  # of the Redis whose files are known to be those of the chain
        self.chain: Chain | None = None  # the generation that restore would find
        self.missed_increment = False  # it misses an increment, so the newest data are only in the coming generation
        self.next_chain: Chain | None = None  # the next one, until its base is in the store
        self.unwanted_base: tuple[str, int] | None = None  # base that begins no generation: a newer one was wanted
        self.next_number = 1  # of the next generation
        self.rewrite_requested_at = -float(REWRITE_RETRY)  # when BGREWRITEAOF was sent last (monotonic)
        self.caught_up_at = 0.0  # unix time at which all that could be read was in the store
        self.trouble = ""
        self.last_trial: state.TrialResult | None = None
        self.trial_process: asyncio.subprocess.Process | None = None
        self.last_trial_read_at = -RESULT_REFRESH  # when the last result was read (monotonic)
        self.trial_started_at = 0.0  # unix time at which that was started: one that died is not started again at once

    async def run(self) -> None:
        """Ship until `stop` is set. Raises Stopped, Damaged (the store's own chain is not what was put)."""
        tasks = [asyncio.ensure_future(self._poll_manifest()), asyncio.ensure_future(self._ship_until_stopped())]
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
            if self.trial_process:
                with suppress(ProcessLookupError, TimeoutError):
                    self.trial_process.terminate()
                    await asyncio.wait_for(self.trial_process.wait(), 5)
            await self.redis.aclose()
            self.files.close()

    async def _poll_manifest(self) -> None:
        while True:
            self.files.refresh()
            await asyncio.sleep(MANIFEST_POLL)

    async def _ship_until_stopped(self) -> None:
        with watchdog.working("shipping"):
            await self._retry_until_stored(self._find_chain)
        while True:
            last, begun = self.stop.is_set(), time.monotonic()
            with watchdog.working("shipping"):
                more = await self._retry_until_stored(self._ship_once)
            if last:
                return
            if not more:
                with suppress(TimeoutError):
                    pause = begun + self.settings.ship_interval - time.monotonic()
                    await asyncio.wait_for(self.stop.wait(), max(0.0, pause))

    async def _retry_until_stored(self, step: Callable[[], Awaitable[T]]) -> T:
        """What a step returns, tried again until the store takes part in it or the shipper is to stop."""
        while True:
            try:
                result = await step()
            except Unavailable as error:
                self._report(f"store: {error}")
                if self.stop.is_set():
                    raise
                await asyncio.sleep(PUT_RETRY)
            else:
                self._report("")
                return result

    async def _find_chain(self) -> None:
        """Where the store's newest chain stands. It goes on if the files at hand are those that it copied."""
        self.next_number = await chain.unused_number(self.store)
        try:
            self.chain = await chain.load_newest(self.store)
        except aof.Damaged as error:
            log.error("%s: that generation is not gone on with", error)
        if self.chain is None or not self.chain.second:
            self._require_new_base("no chain to go on with")

    def _require_new_base(self, reason: str) -> None:
        log.warning("%s: asking Redis for a rewrite, which begins generation %d", reason, self.next_number)
        if self.chain:
            self.chain.diverged = True
        self.next_chain = None
        self.rewrite_requested_at = -float(REWRITE_RETRY)
        self.files.refresh_all()
        self.unwanted_base = self.files.base() or ("", 0)

    async def _ship_once(self) -> bool:
        """Ship all that is there; begin, carry on and finish a generation. True: there is more to do now."""
        begun = time.time()
        server = await self._server_info()
        self.files.refresh()
        manifest = self.files.manifest
        if server and manifest and (server.run_id != self.known_run_id or self.files.file_replaced):
            await self._compare_files(server)
        if server:
            await self._request_rewrite_if_due(server)
        if manifest is None or not self.known_run_id:
            return False
        if self.chain and not self.chain.diverged:
            copied = await self._ship_new_bytes(self.chain)
            self.missed_increment = manifest.files[-1] not in [file.name for file in self.chain.files]
            # A base that is on its way meanwhile does not matter: this chain has every second.
            if copied and not self.missed_increment:
                self.caught_up_at = begun
        base = self.files.base()
        ended = self.chain is None or self.chain.diverged or (base and self.chain.base != base[0])
        if base and ended and not self.next_chain and base != self.unwanted_base:
            self.next_chain = Chain(self.next_number, [ShippedFile(base[0])], second=self.files.second(base[0]))
            self.next_number += 1
            self.unwanted_base = None
        more = False
        if self.next_chain:
            until = time.monotonic() + self.settings.ship_interval
            if not await self._ship_new_bytes(self.next_chain, until):
                more = time.monotonic() >= until
            elif server:
                await self._switch_chains(self.next_chain, server)
                self.caught_up_at = begun
        chains = (self.chain, self.next_chain)
        self.files.close_unused([used.current.name for used in chains if used and not used.diverged])
        await self._run_due_trial()
        return more

    async def _server_info(self) -> ServerInfo | None:
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
        return ServerInfo(info["run_id"], family, info[f"{family}_version"], bool(rewriting))

    async def _compare_files(self, server: ServerInfo) -> None:
        """A Redis not seen before: are its files those of the chain?"""
        self.files.refresh_all()
        self.files.file_replaced = False
        self.known_run_id = server.run_id
        if self.next_chain:
            log.warning("Redis was started anew: generation %d is begun again", self.next_chain.generation)
            self.next_chain = None
        if self.chain and not self.chain.diverged and not await asyncio.to_thread(self._files_match, self.chain):
            self._require_new_base(f"the files are not those of generation {self.chain.generation}")

    def _files_match(self, known: Chain) -> bool:
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
            if left or digest.hexdigest() != (file.expected or file.hasher.hexdigest()):
                return False
            if file is not known.current and self.files.size(file.name) != file.length:
                return False
            file.hasher, file.expected = digest, ""
        return True

    async def _request_rewrite_if_due(self, server: ServerInfo) -> None:
        """BGREWRITEAOF, when a generation is wanted and none is on its way."""
        wanted = self.unwanted_base is not None and self.files.base() in (self.unwanted_base, None)
        manifest = self.files.manifest
        if self.chain and manifest and self.chain.base == manifest.base and not self.next_chain:
            wanted = wanted or time.time() - self.chain.second >= self.settings.snapshot_every
        if wanted and not server.rewriting and time.monotonic() - self.rewrite_requested_at >= REWRITE_RETRY:
            self.rewrite_requested_at = time.monotonic()
            with suppress(RedisError, OSError):
                await self.redis.bgrewriteaof()

    async def _ship_new_bytes(self, into: Chain, until: float = float("inf")) -> bool:
        """Append what can be read now. False: `until` (monotonic) came before the end, or another Redis."""
        while time.monotonic() < until:
            file = into.current
            # Asked before the read: once an increment has a successor, nothing more is written to it.
            following = self.files.successors.get(file.name)
            data = await wrap(self.files.read)(file.name, file.length, chain.SEGMENT)
            if data:
                server = await self._server_info()
                if (server and server.run_id != self.known_run_id) or self.files.file_replaced:
                    return False
                await self._append_object(into, data)
                if len(data) < chain.SEGMENT and following not in self.files:
                    return True  # what came meanwhile is for the next time: no tiny segments
            elif self.files.size(file.name) < file.length:
                self.known_run_id = ""
                return False
            elif following and following in self.files:
                await self._append_object(into, mark={"next": following})
                into.files.append(ShippedFile(following))
            else:
                return True
        return False

    async def _append_object(self, into: Chain, data: bytes = b"", mark: chain.Mark | None = None) -> None:
        """Create the chain's next object. Tries until the store has it: what comes after names its digest."""
        file = into.current
        if not into.diverged:
            into.read_at = time.time()
        after = file.hasher.copy()
        after.update(data)
        header: chain.Header = {
            "generation": into.generation,
            "file": file.name,
            "offset": file.length,
            "length": len(data),
            "prefix": file.expected or after.hexdigest(),  # the first: a mark on a chain that was not copied here
            "previous": into.previous,
            "time": into.read_at,
            **(mark or {}),
        }
        sealed = await wrap(chain.seal)(header, data)
        await self._create_object(chain.segment_name(into.generation, file.name, file.length), sealed)
        file.hasher, file.length, into.previous = after, file.length + len(data), sealed[-32:].hex()

    async def _create_object(self, name: str, data: bytes) -> None:
        """Raises Stopped if another writer made the object."""

        async def create() -> None:
            try:
                await self.store.create(name, data)
            except Exists:
                # It may be our own, if the answer to a create was lost: no two writers put the same `time`.
                if await self.store.get(name) != data:
                    raise Stopped(f"{name} was written by another shipper: this one stops") from None

        await self._retry_until_stored(create)

    async def _switch_chains(self, coming: Chain, server: ServerInfo) -> None:
        """The coming generation has all there is: close the chain before it, then describe it."""
        before = self.chain
        if before and not before.closed:
            if not before.diverged:
                await self._ship_new_bytes(before)
            known = {file.name for file in coming.files}
            gap = before.diverged or before.current.name not in known
            await self._append_object(before, mark={"closed": coming.generation, "gap": gap})
            before.closed = coming.generation
        base = coming.files[0]
        description: chain.Description = {
            "generation": coming.generation,
            "server": server.family,
            "version": server.version,
            "base": base.name,
            "length": base.length,
            "sha256": base.hasher.hexdigest(),
            "second": coming.second,
        }
        await self._create_object(chain.description_name(coming.generation), chain.seal(description))
        log.info("generation %d begins with %s, %d bytes", coming.generation, base.name, base.length)
        self.chain, self.next_chain, self.missed_increment = coming, None, False
        try:
            await retain.remove_old(self.store, self.settings, coming.generation)
        except Unavailable as error:
            log.warning("nothing old was removed this time: %s", error)

    # Telling

    def _report(self, trouble: str) -> None:
        """Log what changes, and keep the state that `/readyz` reads."""
        if trouble and trouble != self.trouble:
            log.warning("%s", trouble)
        elif self.trouble and not trouble:
            log.info("all is well again")
        self.trouble = trouble
        state.write(
            self.settings,
            {
                "caught": self.caught_up_at,
                "generation": self.chain.generation if self.chain else None,
                "trouble": trouble or self._explain_lag(),
                "verified": self.last_trial,
            },
        )

    def _explain_lag(self) -> str:
        """Why the lag grows although nothing fails: no chain is there that could grow. Empty if one is."""
        if self.chain and not self.chain.diverged and not self.missed_increment:
            return ""
        if not self.next_chain:
            return "a generation is to begin: waits for Redis to write its base"
        base = self.next_chain.files[0]
        done, whole = (length / (1 << 20) for length in (base.length, self.files.size(base.name)))
        return f"generation {self.next_chain.generation} begins: {done:.1f} of {whole:.1f} MiB of its base are shipped"

    async def _run_due_trial(self) -> None:
        """Start `verify` once a day, as a process of its own: it loads the whole data set a second time."""
        if self.trial_process and self.trial_process.returncode is not None:
            log.info("the restore on trial ended with %d", self.trial_process.returncode)
            self.trial_process, self.last_trial_read_at = None, -RESULT_REFRESH
        if time.monotonic() >= self.last_trial_read_at + RESULT_REFRESH:
            self.last_trial, self.last_trial_read_at = await verify.last_result(self.store), time.monotonic()
        if not self.settings.verify_every or self.trial_process or not self.chain or not self.chain.second:
            return
        last = self.last_trial["time"] if self.last_trial else self.chain.second
        if time.time() - max(last, self.trial_started_at) >= self.settings.verify_every:
            self.trial_started_at = time.time()
            self.trial_process = await asyncio.create_subprocess_exec(sys.executable, "-m", "storage", "verify")


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
