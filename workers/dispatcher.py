"""Does what is due: gives image work to RQ's workers as hints, ends uploads and erases bytes itself.

    outbox (Redis) ──lease──► dispatcher ──hint: post and lease──► RQ's queue ──► converter ──► jobs.make_image
                                  └──► ends uploads, erases bytes

A hint says only that a post may be started. RQ's queue may lose all of its hints: work whose lease ends without a
result is leased again. The queue never holds more hints than `queue_capacity`. In a longer queue, leases would end
before a converter takes their hints. The states of an attempt are in jobs.py.
"""

import asyncio
import logging
import time

import redis
from rq import Queue, Worker
from rq.serializers import JSONSerializer

from storage import objects, outbox, sealing, watchdog
from storage.backup.retain import KeptBackups
from storage.db.client import Redis
from storage.errors import Unknown, Unreachable
from storage.objects import ObjectStore
from storage.segments import Segments
from storage.settings import DAY_MS, Settings

QUEUE = "images"
JOB = "workers.jobs.make_image"
TIMEOUT = 60  # seconds of wall clock for one attempt
HINTS_PER_WORKER = 1  # hints that wait in the queue for each RQ worker. RQ does not count the job that is running
PAUSE = 0.1  # seconds between two polls of the outbox; a post may wait so much longer than needed
PAUSE_BUSY = 0.02  # the same after image work was handed out: less than an image takes, so no worker waits for a hint
# Seconds between two polls for comments to seal, and after each segment. A segment takes 0.4 ms of Redis' time, so this
# bounds it to 2 %, and the CPU that compressing takes to half a core. A compaction takes 6 ms if the post has 4,000
# newer segments.
PAUSE_SEALING, PAUSE_SEGMENT = 1.0, 0.03
NEVER = 2**53  # more comments than a post has, and more ms than pass
STEPS = 64  # segments of one post, after which the next post is served
PAUSES_AWAY = 1.0, 10.0  # seconds, shortest and longest, while a partition, the queue or the store is unreachable
PAUSES_OTHERS = 1.0, 60.0  # the same while a process of another version may be running
PAUSES_ENTRY = 60.0, 3600.0  # seconds, shortest and longest, for a single entry that fails
AWAY = (Unreachable, Unknown, objects.Unavailable, redis.RedisError)

log = logging.getLogger("imagegram.dispatcher")


def queue(url: str) -> Queue:
    """Returns RQ's queue at a Redis URL.

    Jobs are JSON. RQ's default is pickle, which would let anybody who can write to Redis run code here.
    """
    connection = redis.Redis.from_url(url, socket_timeout=5)
    return Queue(QUEUE, connection=connection, serializer=JSONSerializer, default_timeout=TIMEOUT)


def queue_capacity(hints: Queue, converters: int) -> int:
    """Returns how many more hints the queue may take. `converters`: RQ workers of this dispatcher's own process.

    RQ workers register only at their start. Those of this process count even if their registration was lost. The name
    of a worker that died stays in the register for up to ten minutes longer than the worker's key, so keys are counted.
    Raises redis.RedisError.
    """
    names = Worker.all_keys(queue=hints)
    living = hints.connection.exists(*names) if names else 0
    return max(0, HINTS_PER_WORKER * max(converters, living) - len(hints))


def hint(hints: Queue, post: str, lease: int, trace: str | None = None) -> None:
    """Puts a hint into the queue: a post's id, and the lease it was handed out under (ms since 1970).

    `trace` is the traceparent of the request that created the post, or None.

    RQ stores no result, and a failed job only for an hour, for inspection: the outbox knows what is to be done.
    Raises redis.RedisError.
    """
    meta = {"trace": trace, "post": post} if trace else None
    hints.enqueue_call(JOB, args=(post, lease), result_ttl=0, failure_ttl=3600, timeout=TIMEOUT, meta=meta)


class Failures:
    """What fails at the moment: a partition, an entry, the queue. Logs the first failure of each and its recovery."""

    def __init__(self):
        self._counts: dict[str, int] = {}  # failures in a row, by name
        self._retry_at: dict[str, float] = {}  # in seconds of time.monotonic()

    def add(self, name: str, fault: Exception, shortest: float, longest: float) -> float:
        """Returns the seconds to wait before the next try. They double with each failure in a row."""
        count = self._counts.get(name, 0)
        if not count:
            log.warning("%s fails. It is retried with growing pauses. %r", name, fault)
        self._counts[name] = count + 1
        pause = min(longest, shortest * 2.0 ** min(count, 20))
        self._retry_at[name] = time.monotonic() + pause
        return pause

    def clear(self, name: str) -> None:
        """Notes a success."""
        if self._counts.pop(name, 0):
            del self._retry_at[name]
            log.info("%s works again", name)

    def must_wait(self, name: str) -> bool:
        """Whether the pause after the last failure is not over yet."""
        return time.monotonic() < self._retry_at.get(name, 0)


async def dispatch(db: Redis, chosen: Settings, hints: Queue) -> None:
    """Hands out image work, ends uploads, erases bytes and seals comments, until it is cancelled.

    A failure delays only what failed: one entry, one partition, or the part that needs the store or the queue.
    """
    store = objects.open_store(chosen.store_url)
    kept = KeptBackups(objects.open_store(chosen.backup_store_url))
    # The partitions that do not answer, as their clean-up finds: these run at once, but image work goes from one
    # partition to the next. There each of them would delay the others by the time that a call takes to fail.
    silent: set[int] = set()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_hand_out(db, chosen, hints, silent))
        tasks.create_task(_seal(db, chosen, Segments(store, memory=0), silent))
        for partition in range(chosen.partitions):
            tasks.create_task(_clean_up(db, store, kept.may_name, partition, chosen.backup_reach_ms, silent))


async def _hand_out(db: Redis, chosen: Settings, hints: Queue, silent: set[int]) -> None:
    """Keeps the queue filled with image work of all partitions that are not `silent`. They take turns."""
    failures, first = Failures(), 0
    while True:
        pause = PAUSE
        with watchdog.working("handing out image work"):
            try:
                capacity = await asyncio.to_thread(queue_capacity, hints, chosen.converters)
                # Each round begins after the partition that was served last.
                for partition in [*range(first, chosen.partitions), *range(first)]:
                    watchdog.step()
                    name = f"image work of partition {partition}"
                    if not capacity or partition in silent or failures.must_wait(name):
                        continue
                    try:
                        images = await outbox.lease_images(db, partition, capacity)
                    except AWAY as fault:
                        failures.add(name, fault, *PAUSES_AWAY)
                        continue
                    failures.clear(name)
                    for image in images:
                        watchdog.step()
                        await asyncio.to_thread(hint, hints, *image)
                        capacity, first, pause = capacity - 1, partition + 1, PAUSE_BUSY
                failures.clear("the queue")
            except redis.RedisError as fault:
                pause = failures.add("the queue", fault, *PAUSES_AWAY)
        await asyncio.sleep(pause)


async def _clean_up(
    db: Redis, store: ObjectStore, may_name: outbox.MayName, partition: int, backup_reach_ms: int, silent: set[int]
) -> None:
    """Ends the uploads of a partition that are due, and erases the bytes that are due. Keeps it in `silent`, or not."""
    failures, name = Failures(), f"cleaning up partition {partition}"
    finish = {"upload": outbox.end_upload, "erase": outbox.erase}
    while True:
        pause = PAUSE
        with watchdog.working(name):
            try:
                leased = await outbox.lease(db, partition)
                silent.discard(partition)
                for due in leased:
                    watchdog.step()
                    try:
                        await finish[due.kind](db, store, may_name, due, backup_reach_ms)
                    except (Unreachable, Unknown):
                        raise
                    except Exception as fault:  # an entry may fail for any reason, and must not stop the others
                        # Raises Unavailable if the store is the reason. The entry is leased again when its lease ends.
                        await store.ping()
                        entry_pause = failures.add(f"cleaning up {due.id!r}", fault, *PAUSES_ENTRY)
                        await outbox.postpone(db, due, int(entry_pause * 1000))
                    else:
                        failures.clear(f"cleaning up {due.id!r}")
                for entry, fault in await sealing.remove_retired(db, store, may_name, partition, backup_reach_ms):
                    failures.add(f"removing the old comments {entry.id!r}", fault, *PAUSES_ENTRY)
                failures.clear(name)
            except AWAY as fault:
                if isinstance(fault, (Unreachable, Unknown)):
                    silent.add(partition)
                pause = failures.add(name, fault, *PAUSES_AWAY)
        await asyncio.sleep(pause)


async def _seal(db: Redis, chosen: Settings, segments: Segments, silent: set[int]) -> None:
    """Moves old comments of all partitions that are not `silent` to the store, and takes deleted ones out of it."""
    failures = Failures()
    while True:
        pause = PAUSE_SEALING
        with watchdog.working("sealing comments"):
            alone = await _is_alone(db, failures)
            for partition in range(chosen.partitions) if alone else ():
                watchdog.step()
                name = f"sealing comments of partition {partition}"
                if partition in silent or failures.must_wait(name):
                    continue
                try:
                    more = chosen.quiet_days and await sealing.find_quiet(db, partition, chosen.quiet_days * DAY_MS)
                    leased = await sealing.lease(db, partition)
                    for due in leased:
                        await _seal_post(db, chosen, segments, due, failures)
                    if more or len(leased) == sealing.LEASE_BATCH:
                        pause = PAUSE_SEGMENT
                    failures.clear(name)
                except AWAY as fault:
                    failures.add(name, fault, *PAUSES_AWAY)
        await asyncio.sleep(pause)


async def _is_alone(db: Redis, failures: Failures) -> bool:
    """Whether no process of another version calls scripts: an older one does not know of comments in the store."""
    name = "looking for processes of other versions"
    if failures.must_wait(name):
        return False
    try:
        away = await db.ping()  # nobody writes there, and the other shards of the Cluster need not wait
        servers = [server for server in await db.primaries() if server.place not in away]
        others = [address for server in servers for address in await server.others()]
        if not others:
            failures.clear(name)
            return True
        fault: Exception = RuntimeError(f"no comments are sealed while others call scripts: {', '.join(others[:5])}")
    except (Unreachable, redis.RedisError) as error:
        fault = error
    failures.add(name, fault, *PAUSES_OTHERS)
    return False


async def _seal_post(
    db: Redis, chosen: Settings, segments: Segments, due: sealing.Leased, failures: Failures
) -> None:
    """Seals and compacts one post. A failure of the post itself postpones it. Raises what Redis and the store raise."""
    name = f"sealing comments of {due.id!r}"
    # Without quiet days nothing is sealed. Deleted comments still leave their segments.
    limits = (chosen.hot_comments, chosen.quiet_days * DAY_MS) if chosen.quiet_days else (NEVER, NEVER)
    try:
        for _ in range(STEPS):
            watchdog.step()
            if not await sealing.step(db, segments, due.id, *limits, chosen.backup_reach_ms):
                await sealing.end(db, due)
                break
            await asyncio.sleep(PAUSE_SEGMENT)
        else:
            await sealing.postpone(db, due, 0)
        failures.clear(name)
    except (Unreachable, Unknown):
        raise
    except Exception as fault:  # a post may fail for any reason, and must not stop the others
        await segments.ping()  # raises Unavailable if the store is the reason
        await sealing.postpone(db, due, int(failures.add(name, fault, *PAUSES_ENTRY) * 1000))
