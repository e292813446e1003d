"""Hands out what is due: image work as hints to RQ, erasing at once.

The queue may lose everything: what was leased and not settled is leased again. Nothing is handed out beyond the
queue's room, so that no hint outlives its lease in a long queue.
"""

import asyncio
import logging

import redis
from rq import Queue, Worker
from rq.serializers import JSONSerializer

from storage import objects, outbox
from storage.errors import Unknown, Unreachable
from storage.scripts import Redis
from storage.settings import Settings

QUEUE = "images"
JOB = "workers.jobs.make_image"
TIMEOUT = 60  # seconds of wall clock for one attempt
ROOM = 1  # jobs a worker that wait in the queue. The one under way has left it: RQ does not count that one
PAUSE = 0.1  # seconds between two looks: what a post may wait longer than it must
PAUSE_BUSY = 0.02  # seconds after image work was handed out: less than an image takes, so no worker waits for the next
PAUSE_AWAY = 1.0  # seconds, while Redis or the store is away

log = logging.getLogger("dispatcher")


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


async def dispatch(db: Redis, chosen: Settings, hints: Queue) -> None:
    """Hand out what is due, until cancelled."""
    store, kept = objects.open_store(chosen.store_url), outbox.Kept(objects.open_store(chosen.backup_store_url))
    away, first = None, 0
    while True:
        handed_out = False
        try:
            for partition in range(chosen.partitions):
                for due in await outbox.lease(db, partition):
                    match due.kind:
                        case "upload":
                            await outbox.end_upload(db, store, kept, due, chosen.named_ms)
                        case "erase":
                            await outbox.erase(db, store, kept, due, chosen.named_ms)
            free = await asyncio.to_thread(room, hints, chosen.converters)
            # Partitions take turns too: each round begins behind the one that was served last.
            for partition in [*range(first, chosen.partitions), *range(first)] if free else []:
                for image in await outbox.lease_images(db, partition, free):
                    await asyncio.to_thread(hint, hints, image.id, image.lease)
                    free, first, handed_out = free - 1, partition + 1, True
                if not free:
                    break
            away = None
        except (Unreachable, Unknown, objects.Unavailable, redis.RedisError) as error:
            if away is None:  # said once, not ten times a second
                log.warning("waits: %s", error)
            away = error
        await asyncio.sleep(PAUSE_AWAY if away else PAUSE_BUSY if handed_out else PAUSE)
