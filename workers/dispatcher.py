"""Hands out what is due: image work as hints to RQ. Ends uploads and erases bytes itself.

The queue may lose everything: what was leased and not settled is leased again. Nothing is handed out beyond the
queue's room, so that no hint outlives its lease in a long queue.
"""

import asyncio
import logging
import time

import redis
from rq import Queue, Worker
from rq.serializers import JSONSerializer

from storage import objects, outbox, watchdog
from storage.backup.retain import KeptBackups
from storage.db.client import Redis
from storage.errors import Unknown, Unreachable
from storage.objects import ObjectStore
from storage.settings import Settings

QUEUE = "images"
JOB = "workers.jobs.make_image"
TIMEOUT = 60  # seconds of wall clock for one attempt
ROOM = 1  # jobs a worker that wait in the queue. The one under way has left it: RQ does not count that one
PAUSE = 0.1  # seconds between two looks: what a post may wait longer than it must
PAUSE_BUSY = 0.02  # seconds after image work was handed out: less than an image takes, so no worker waits for the next
PAUSES_AWAY = 1.0, 10.0  # seconds, the shortest and the longest, while a partition, the queue or the store is away
PAUSES_ENTRY = 60.0, 3600.0  # seconds, the same for one entry that fails by itself
AWAY = (Unreachable, Unknown, objects.Unavailable, redis.RedisError)

log = logging.getLogger("imagegram.dispatcher")


def queue(url: str) -> Queue:
    """RQ's queue. Jobs are JSON: with RQ's default, pickle, whoever can write to Redis could run code here."""
    connection = redis.Redis.from_url(url, socket_timeout=5)
    return Queue(QUEUE, connection=connection, serializer=JSONSerializer, default_timeout=TIMEOUT)


def room(hints: Queue, converters: int) -> int:
    """How many more jobs the queue may take.

    RQ's workers register once, and ours are there even if that is lost; a dead one's name stays in the register for up
    to ten minutes longer than its key.
    """
    names = Worker.all_keys(queue=hints)
    living = hints.connection.exists(*names) if names else 0
    return max(0, ROOM * max(converters, living) - len(hints))


def hint(hints: Queue, post: str, lease: int) -> None:
    """Results are not kept, and a failed job only for an hour's look: the outbox knows what is to be done."""
    hints.enqueue_call(JOB, args=(post, lease), result_ttl=0, failure_ttl=3600, timeout=TIMEOUT)


class Trouble:
    """What has failed: a partition, an entry, the queue. Logs the first failure of each, and when it is over."""

    def __init__(self):
        self._failures: dict[str, int] = {}
        self._again: dict[str, float] = {}  # when to try again, by time.monotonic()

    def failed(self, name: str, fault: Exception, shortest: float, longest: float) -> float:
        """The pause in seconds until the next try, twice as long after each failure in a row."""
        failures = self._failures.get(name, 0)
        if not failures:
            log.warning("%s fails, and is tried again with growing pauses: %r", name, fault)
        self._failures[name] = failures + 1
        pause = min(longest, shortest * 2.0 ** min(failures, 20))
        self._again[name] = time.monotonic() + pause
        return pause

    def over(self, name: str) -> None:
        if self._failures.pop(name, 0):
            del self._again[name]
            log.info("%s works again", name)

    def pauses(self, name: str) -> bool:
        return time.monotonic() < self._again.get(name, 0)


async def dispatch(db: Redis, chosen: Settings, hints: Queue) -> None:
    """Hands out image work, ends uploads and erases bytes, until cancelled.

    A failure delays only what failed: one entry, one partition, or the part that needs the store or the queue.
    """
    store = objects.open_store(chosen.store_url)
    kept = KeptBackups(objects.open_store(chosen.backup_store_url))
    async with asyncio.TaskGroup() as parts:
        parts.create_task(_hand_out(db, chosen, hints))
        for partition in range(chosen.partitions):
            parts.create_task(_clean_up(db, store, kept.may_name, partition, chosen.backup_reach_ms))


async def _hand_out(db: Redis, chosen: Settings, hints: Queue) -> None:
    """Keeps the queue filled with image work of all partitions, which take turns."""
    trouble, first = Trouble(), 0
    while True:
        pause = PAUSE
        with watchdog.working("handing out image work"):
            try:
                free = await asyncio.to_thread(room, hints, chosen.converters)
                # Each round begins behind the partition that was served last.
                for partition in [*range(first, chosen.partitions), *range(first)]:
                    watchdog.step()
                    name = f"image work of partition {partition}"
                    if not free or trouble.pauses(name):
                        continue
                    try:
                        images = await outbox.lease_images(db, partition, free)
                    except AWAY as fault:
                        trouble.failed(name, fault, *PAUSES_AWAY)
                        continue
                    trouble.over(name)
                    for image in images:
                        watchdog.step()
                        await asyncio.to_thread(hint, hints, image.id, image.lease)
                        free, first, pause = free - 1, partition + 1, PAUSE_BUSY
                trouble.over("the queue")
            except redis.RedisError as fault:
                pause = trouble.failed("the queue", fault, *PAUSES_AWAY)
        await asyncio.sleep(pause)


async def _clean_up(db: Redis, store: ObjectStore, may_name: outbox.MayName, partition: int, backup_reach_ms: int):
    """Ends the uploads of a partition that are due, and erases what is due to be erased."""
    trouble, name = Trouble(), f"cleaning up partition {partition}"
    ends = {"upload": outbox.end_upload, "erase": outbox.erase}
    while True:
        pause = PAUSE
        with watchdog.working(name):
            try:
                for due in await outbox.lease(db, partition):
                    watchdog.step()
                    try:
                        await ends[due.kind](db, store, may_name, due, backup_reach_ms)
                    except (Unreachable, Unknown):
                        raise
                    except Exception as fault:  # whatever one entry does, the others are not its fault
                        # Raises Unavailable if it is the store. Then the lease brings the entry back.
                        await store.ping()
                        later = trouble.failed(f"cleaning up {due.id!r}", fault, *PAUSES_ENTRY)
                        await outbox.postpone(db, due, int(later * 1000))
                    else:
                        trouble.over(f"cleaning up {due.id!r}")
                trouble.over(name)
            except AWAY as fault:
                pause = trouble.failed(name, fault, *PAUSES_AWAY)
        await asyncio.sleep(pause)
