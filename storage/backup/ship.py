"""`imagegram-storage ship`: copies Redis' append-only files into the backup store as they grow.

The package's docstring explains base, increment, segment, chain, mark and generation. Two tasks run:

- One polls the manifest every 20 ms and opens each file as soon as the manifest names it (watch.py). A rewrite deletes
  the old files, but an open file can still be read.
- The other runs once per interval (`ship_interval`, 1 s). It reads what Redis has appended since, and puts it into the
  store.

The shipper sends only INFO and BGREWRITEAOF to Redis, and CLUSTER NODES to a node of a Cluster (IMAGEGRAM_REDIS_NODE).
The chain of a node is below its id in the store. Beside it the shipper records which slots the node has (owners.py).

    _ship_once:  INFO ─► same Redis as before? ─► rewrite due? ─► append to the chain ─► append to the next chain
                              │ no                                                            │ complete
                              ▼                                                               ▼
                         compare files                                            close the old chain, describe the new

Why a chain is always a true copy:

- While a Redis process lives, it only appends to an increment. The shipper reads new bytes first, then asks Redis for
  its run id, and only then puts the bytes. If the run id is the one whose files were compared, the bytes are right.
- A restarted Redis may have cut a torn tail off its file, and an operator may have put an older copy in place. So when
  the run id changes, a file has another inode, or a file is shorter than what was shipped, the shipper hashes the files
  again, as far as they were shipped. If they differ, the chain has diverged: nothing is added to it but its close mark.
  The shipper requests a rewrite, and the new base begins the next generation.
- One increment follows another only if one manifest named both. Rewrites can follow each other so fast that a manifest
  comes and goes between two polls. The records of that time are in the newer base, so the next generation loses
  nothing. Only the seconds within that time cannot be chosen in a restore. The close mark says so with `gap`.
- The next base is shipped while the old chain still grows. Once the base and its increments are shipped up to now, the
  old chain is closed with the number of the new generation, and then the new generation is described. From then on
  `restore` finds it.
"""

import asyncio
import hashlib
import logging
import re
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

from storage import logs, metrics, watchdog
from storage.backup import aof, chain, owners, retain, state, verify
from storage.backup.chain import Chain, ShippedFile
from storage.backup.watch import Files
from storage.db.cluster import address, node_url
from storage.db.server import lock_folder
from storage.objects import Below, Exists, ObjectStore, Unavailable, open_store
from storage.settings import Settings, refused, secret_values

log = logging.getLogger("imagegram.ship")
T = TypeVar("T")

# Seconds between two polls of the manifest. A poll is one stat(2). Redis begins a requested rewrite up to 100 ms later.
MANIFEST_POLL = 0.02
REWRITE_RETRY = 10  # seconds between two BGREWRITEAOF. One that fails (disk full) is not repeated every second.
RESULT_REFRESH = 60.0  # seconds between two reads of the last trial's result. Another machine may run trials, too.
LOOK_AND_PUT = 1  # second between a look at the node and the time in the next object, at most
PUT_RETRY = 1  # seconds until the next try, after the store was unavailable


class Stopped(Exception):
    """Another shipper writes the same chain, or the server is not the node that it was.

    Nothing was overwritten, but this shipper must not go on.
    """


@dataclass(frozen=True)
class ServerInfo:
    """What the shipper needs of the reply to INFO."""

    run_id: str  # random, new at each start of the server
    family: str  # "valkey" or "redis"
    version: str  # for example "9.1.2"
    rewriting: bool  # a rewrite is running or scheduled
    view: owners.View | None  # None: it is no node of a Cluster


class Shipper:
    """Ships one Redis to one store.

    `run` returns after `stop` is set. Before, it ships once more what Redis has written until then.

    | `chain` | `next_chain` | state |
    |---|---|---|
    | None | None | the first start: waiting for Redis to write a base |
    | None | set | the first base is being shipped; nothing can be restored yet |
    | grows | None | normal |
    | grows | set | a rewrite has written a new base, which is shipped beside the chain; the lag does not grow |
    | grows, `missed_increment` | None or set | the chain cannot get the newest records; the lag grows |
    | diverged | None | the files are not those shipped: waiting for a new base; the lag grows |
    | diverged | set | the new base is being shipped; the lag grows |
    """

    def __init__(self, settings: Settings, store: ObjectStore):
        self.settings = settings
        self.top = store
        self.store = store  # of the chain. That of a node of a Cluster is below its id, from `_find_node` on
        self.view: owners.View | None = None  # the last one; None: no node of a Cluster, or not asked yet
        self.record: owners.Record | None = None  # the newest one in the store
        self.looked_at = 0.0  # unix time at which the node was as in `record`
        self.files = Files(settings.data / "redis" / "appendonlydir")
        never = Retry(NoBackoff(), 0)
        url = settings.redis_url
        if settings.redis_node and "+cluster:" in url:
            url = node_url(url, address(*settings.redis_node))
        self.redis = Redis.from_url(url, retry=never, socket_timeout=5, socket_connect_timeout=2)
        self.stop = asyncio.Event()
        self.known_run_id = ""  # of the Redis whose files were compared with the chain; "": none yet
        self.chain: Chain | None = None  # the generation that `restore` would find
        # The chain has no way to the increment that Redis writes now, so the newest records go only to the next chain.
        self.missed_increment = False
        self.next_chain: Chain | None = None  # the next generation, until it has caught up and replaces `chain`
        # Name and inode of a base that must not begin a generation, because a newer base was requested. ("", 0) if
        # there was no base yet.
        self.unwanted_base: tuple[str, int] | None = None
        self.next_number = 1  # of the next generation
        self.rewrite_requested_at = -float(REWRITE_RETRY)  # monotonic time of the last BGREWRITEAOF
        self.caught_up_at = 0.0  # unix time at which everything readable was in the store
        self.trouble = ""  # why the store does not answer, "" if it does
        self.last_trial: state.TrialResult | None = None
        self.trial_process: asyncio.subprocess.Process | None = None
        self.last_trial_read_at = -RESULT_REFRESH  # monotonic time
        # Unix time. It counts also if the trial died without a result: the next one must not start at once.
        self.trial_started_at = 0.0
        # The same of the trial of the whole Cluster, which the shipper of the first primary starts.
        self.last_whole_trial: state.TrialResult | None = None
        self.whole_trial_started_at = 0.0

    async def run(self) -> None:
        """Ship until `stop` is set.

        Raises Stopped if another shipper writes the same chain or the node has a new id, Damaged if the store does not
        return what was put, and Unavailable if the store does not answer after `stop` was set.
        """
        tasks = [asyncio.ensure_future(self._poll_manifest()), asyncio.ensure_future(self._ship_until_stopped())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            # redis-py may swallow a cancellation. So also set `stop`, and wait for the tasks for at most 5 s.
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
            if self.settings.redis_node and not await self._retry_until_stored(self._find_node):
                return
            await self._retry_until_stored(self._find_chain)
        while True:
            last = self.stop.is_set()
            started = time.monotonic()
            with watchdog.working("shipping"):
                more = await self._retry_until_stored(self._ship_once)
            if last:
                return
            if not more:
                with suppress(TimeoutError):
                    pause = started + self.settings.ship_interval - time.monotonic()
                    await asyncio.wait_for(self.stop.wait(), max(0.0, pause))

    async def _retry_until_stored(self, step: Callable[[], Awaitable[T]]) -> T:
        """Run `step` again and again until the store is available. Returns what `step` returns.

        Raises Unavailable if the store is not available and `stop` is set.
        """
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

    async def _find_node(self) -> bool:
        """Wait for the node's id, below which its chain is in the store. Returns False if `stop` was set meanwhile."""
        while not (server := await self._server_info()):
            if self.stop.is_set():
                return False
            await asyncio.sleep(MANIFEST_POLL)
        assert server.view
        self.record = await owners.newest(self.top, server.view.node)
        self.store = Below(self.top, server.view.node)
        self.view = server.view
        return True

    async def _find_chain(self) -> None:
        """Load the newest chain from the store. Whether it fits the files here is compared later."""
        self.next_number = await chain.unused_number(self.store)
        try:
            self.chain = await chain.load_newest(self.store)
        except aof.Damaged as error:
            log.error("%s: this generation cannot be continued", error)
        if self.chain is None or not self.chain.second:
            self._require_new_base("there is no chain to continue")

    def _require_new_base(self, reason: str) -> None:
        """End the current chain. The next generation begins with a base that is newer than the current one."""
        log.warning("%s: asking Redis for a rewrite, which begins generation %d", reason, self.next_number)
        if self.chain:
            self.chain.diverged = True
        self.next_chain = None
        self.rewrite_requested_at = -float(REWRITE_RETRY)
        self.files.refresh_all()
        self.unwanted_base = self.files.base() or ("", 0)

    async def _ship_once(self) -> bool:
        """Ship what Redis has written. Begin, continue or complete the next generation.

        Returns True if a base is on its way and more of it can be shipped at once.
        """
        started_at = time.time()
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
            # A next chain whose base is still on its way does not matter here: this chain has every second.
            if copied and not self.missed_increment:
                self.caught_up_at = started_at
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
                self.caught_up_at = started_at
        chains = (self.chain, self.next_chain)
        self.files.close_unused([used.current.name for used in chains if used and not used.diverged])
        await self._run_due_trial()
        return more

    async def _server_info(self) -> ServerInfo | None:
        """Ask Redis. Returns None if it does not answer or is still loading: then it may yet cut a torn file."""
        asked_at = time.time()
        try:
            pipeline = self.redis.pipeline(transaction=False)
            pipeline.info("server", "persistence")
            if self.settings.redis_node:
                pipeline.execute_command("CLUSTER", "NODES")
            info, *nodes = await pipeline.execute()
        except (RedisError, OSError) as error:
            if "cluster support disabled" in str(error):
                raise Stopped("IMAGEGRAM_REDIS_NODE: the server there is no node of a Cluster") from None
            return None
        finally:
            watchdog.step()
        if info["loading"]:
            return None
        view = owners.view(nodes[0].decode()) if nodes else None
        if view and self.view:
            await self._record_change(view, asked_at)
        family = info.get("server_name", "redis")
        rewriting = info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"]
        return ServerInfo(info["run_id"], family, info[f"{family}_version"], bool(rewriting), view)

    async def _record_change(self, view: owners.View, asked_at: float) -> None:
        """Create a record if the node's role, config epoch or slots are not those of the newest record."""
        assert self.view
        if view.node != self.view.node:
            raise Stopped(f"node {self.view.node} has a new id, {view.node}: this shipper stops")
        now = time.time()
        before = self.record
        state_now = (view.follows, view.epoch, view.slots)
        if not before or (before["follows"], before["epoch"], before["slots"]) != state_now:
            looked_at = now
            if before:
                # At the start: the last shipper looked shortly before it put the newest bytes of the chain.
                last = self.looked_at or (self.chain.read_at - LOOK_AND_PUT if self.chain else 0)
                looked_at = max(before["seen"], last)
            record: owners.Record = {
                "looked": looked_at,
                "seen": now,
                "follows": view.follows,
                "epoch": view.epoch,
                "slots": view.slots,
            }
            await self._create_object(self.top, owners.name(view.node, record), owners.encode(record))
            self.record = record
        self.view = view
        self.looked_at = asked_at

    async def _compare_files(self, server: ServerInfo) -> None:
        """Compare the files of a Redis that was (re)started with what was shipped."""
        self.files.refresh_all()
        self.files.file_replaced = False
        self.known_run_id = server.run_id
        if self.next_chain:
            number = self.next_chain.generation
            log.warning("Redis was restarted: generation %d is dropped, it was not complete", number)
            self.next_chain = None
        if self.chain and not self.chain.diverged and not await asyncio.to_thread(self._files_match, self.chain):
            self._require_new_base(f"the files are not those of generation {self.chain.generation}")

    def _files_match(self, known: Chain) -> bool:
        """Hash the files as far as they were shipped. Runs in a thread: this reads the whole append-only file.

        Returns whether the manifest begins with the files of the chain, each file has the digest shipped, and each file
        but the last is as long as shipped.
        """
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
            file.hasher = digest
            file.expected = ""
        return True

    async def _request_rewrite_if_due(self, server: ServerInfo) -> None:
        """Send BGREWRITEAOF if a new base was required or the current base is older than `snapshot_every`."""
        required = self.unwanted_base is not None and self.files.base() in (self.unwanted_base, None)
        manifest = self.files.manifest
        if self.chain and manifest and self.chain.base == manifest.base and not self.next_chain:
            required = required or time.time() - self.chain.second >= self.settings.snapshot_every
        if required and not server.rewriting and time.monotonic() - self.rewrite_requested_at >= REWRITE_RETRY:
            self.rewrite_requested_at = time.monotonic()
            with suppress(RedisError, OSError):
                await self.redis.bgrewriteaof()

    async def _ship_new_bytes(self, into: Chain, until: float = float("inf")) -> bool:
        """Append to a chain everything that can be read now.

        Returns False if it did not come to the end: `until` (monotonic time) has passed, Redis was restarted, or a file
        was replaced or is shorter than what was shipped.
        """
        while time.monotonic() < until:
            file = into.current
            # Looked up before the read: once an increment has a successor, Redis writes nothing more to it, so a read
            # that comes later and returns nothing has reached its end.
            following = self.files.successors.get(file.name)
            data = await wrap(self.files.read)(file.name, file.length, chain.SEGMENT)
            if data:
                server = await self._server_info()
                if (server and server.run_id != self.known_run_id) or self.files.file_replaced:
                    return False
                await self._append_object(into, data)
                if len(data) < chain.SEGMENT and following not in self.files:
                    return True  # leave what was written meanwhile to the next time, or segments would be tiny
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
        """Create the next object of a chain: a segment with `data`, or a mark.

        Returns only after the store has the object, because the next object names its digest.
        """
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
            # `expected` is set for a mark on a chain that was loaded from the store and does not match the files here.
            "prefix": file.expected or after.hexdigest(),
            "previous": into.previous,
            "time": into.read_at,
            **(mark or {}),
        }
        sealed = await wrap(chain.seal)(header, data)
        await self._create_object(self.store, chain.segment_name(into.generation, file.name, file.length), sealed)
        file.hasher = after
        file.length += len(data)
        into.previous = sealed[-32:].hex()

    async def _create_object(self, store: ObjectStore, name: str, data: bytes) -> None:
        """Create an object. Raises Stopped if another shipper has created it."""

        async def create() -> None:
            try:
                await store.create(name, data)
            except Exists:
                # An earlier try may have created it, and its answer was lost. Two shippers never put the same bytes,
                # because each object contains the time.
                if await store.get(name) != data:
                    raise Stopped(f"{name} was written by another shipper: this one stops") from None

        await self._retry_until_stored(create)
        metrics.SHIPPED_OBJECTS.add()
        metrics.SHIPPED_BYTES.add(len(data))

    async def _switch_chains(self, next_chain: Chain, server: ServerInfo) -> None:
        """Close the old chain, then describe the next generation, which has everything that Redis has written.

        The order matters: the description makes `restore` use the next generation, so it comes last.
        """
        old = self.chain
        if old and not old.closed:
            if not old.diverged:
                await self._ship_new_bytes(old)
            names = {file.name for file in next_chain.files}
            gap = old.diverged or old.current.name not in names
            await self._append_object(old, mark={"closed": next_chain.generation, "gap": gap})
            old.closed = next_chain.generation
        base = next_chain.files[0]
        description: chain.Description = {
            "generation": next_chain.generation,
            "server": server.family,
            "version": server.version,
            "base": base.name,
            "length": base.length,
            "sha256": base.hasher.hexdigest(),
            "second": next_chain.second,
        }
        await self._create_object(self.store, chain.description_name(next_chain.generation), chain.seal(description))
        log.info("generation %d begins with %s, %d bytes", next_chain.generation, base.name, base.length)
        self.chain = next_chain
        self.next_chain = None
        self.missed_increment = False
        try:
            await retain.remove_old(self.store, self.settings, next_chain.generation)
            if self.view:
                await retain.remove_old_records(self.top, self.view)
            if self.view and self.view.is_first:
                await retain.remove_gone_nodes(self.top, self.settings, self.view.known)
        except Unavailable as error:
            log.warning("old backups were not removed this time: %s", error)

    # What the shipper reports

    def _report(self, trouble: str) -> None:
        """Log a change of `trouble`, and write the state that `/readyz` and `snapshots` show."""
        # An error of S3 says how long it took, so its numbers differ each time.
        if trouble and re.sub("[0-9.]", "", trouble) != re.sub("[0-9.]", "", self.trouble):
            log.warning("%s", trouble)
        elif self.trouble and not trouble:
            log.info("the store is available again")
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
        """Say why the lag grows although the store is available: no chain can grow. "" if one can."""
        if self.chain and not self.chain.diverged and not self.missed_increment:
            return ""
        if not self.next_chain:
            return "a new generation is needed: waiting for Redis to write its base"
        base = self.next_chain.files[0]
        done, whole = (length / (1 << 20) for length in (base.length, self.files.size(base.name)))
        return f"generation {self.next_chain.generation} begins: {done:.1f} of {whole:.1f} MiB of its base are shipped"

    async def _run_due_trial(self) -> None:
        """Start `imagegram-storage verify` if a trial is due (`verify_every`, by default once a day).

        It is a process of its own, because it holds all data in memory a second time. For a node of a Cluster it tries
        the chain of this node. The first primary's shipper also starts one that tries the whole Cluster.
        """
        if self.trial_process and self.trial_process.returncode is not None:
            log.info("the trial restore ended with status %d", self.trial_process.returncode)
            self.trial_process = None
            self.last_trial_read_at = -RESULT_REFRESH
        if time.monotonic() >= self.last_trial_read_at + RESULT_REFRESH:
            self.last_trial = await verify.last_result(self.store)
            self.last_whole_trial = await verify.last_result(self.top)
            self.last_trial_read_at = time.monotonic()
        if not self.settings.verify_every or self.trial_process or not self.chain or not self.chain.second:
            return
        due = time.time() - self.settings.verify_every
        arguments = None
        if max(self.last_trial["time"] if self.last_trial else self.chain.second, self.trial_started_at) <= due:
            self.trial_started_at = time.time()
            arguments = ["--node", self.view.node] if self.view else []
        elif self.view and self.view.is_first:
            whole = self.last_whole_trial
            if max(whole["time"] if whole else self.chain.second, self.whole_trial_started_at) <= due:
                self.whole_trial_started_at = time.time()
                arguments = []
        if arguments is not None:
            command = [sys.executable, "-m", "storage", "verify", *arguments]
            self.trial_process = await asyncio.create_subprocess_exec(*command)


def main(settings: Settings) -> None:
    """Ship until SIGTERM or SIGINT.

    Raises SystemExit: with status 3 for Stopped, otherwise with a message.
    """
    logs.configure(settings.log, secret_values())
    if "+cluster:" in settings.redis_url and not settings.redis_node:
        raise SystemExit("IMAGEGRAM_REDIS_NODE: a shipper ships one node of a Cluster: which one?")
    try:
        # A second shipper of the same folder would continue the chain of the first one, which would have to stop.
        lock_folder(settings.data)
    except OSError as error:
        raise refused("DATA", str(settings.data), f"{error.filename}: {error.strerror}") from None

    async def ship() -> None:
        shipper = Shipper(settings, open_store(settings.backup_store_url))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, shipper.stop.set)
        watchdog.start(settings.watchdog)
        watchdog.watch_loop(asyncio.get_running_loop())
        metrics.serve("ship", settings.ship_metrics, lambda: state.gauges(settings))
        await shipper.run()

    try:
        asyncio.run(ship())
    except Stopped as error:
        log.error("%s", error)
        sys.exit(3)
    except Unavailable as error:
        sys.exit(f"stopped before everything was shipped: {error}")
    except OSError as error:
        raise refused("DATA", str(settings.data), f"{error.filename}: {error.strerror}") from None
