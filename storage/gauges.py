"""What a scrape reads at its moment: work that waits, open uploads, Redis' memory, the free space of the store."""

import asyncio
import os
from contextlib import suppress

from redis.exceptions import RedisError

from storage import keys
from storage.db.client import Redis
from storage.errors import Refusal
from storage.metrics import (
    AOF_OK,
    MEMORY,
    MEMORY_LIMIT,
    OLDEST,
    OPEN_UPLOADS,
    REDIS_UP,
    STORE_FREE,
    STORE_SIZE,
    WAITING,
    Reading,
)
from storage.settings import DAY_MS, LEASE_MS, store_place

ENTRIES = 5000  # open uploads that are counted in a partition
USERS = 20  # users whose oldest image is looked up in a partition


async def work(db: Redis, partitions: int) -> list[Reading]:
    """Work that waits, and open uploads. Raises a Refusal if Redis is away."""
    rows = await asyncio.gather(
        *(
            db.call(
                "read_work",
                [keys.due(partition), keys.turns(partition)],
                db.clock,
                LEASE_MS,
                DAY_MS,
                ENTRIES,
                USERS,
                keys.making_prefix(partition),
            )
            for partition in range(partitions)
        )
    )
    due, oldest_ms, users, oldest_image_ms, uploads = zip(*rows, strict=True)
    return [
        (WAITING, ("cleanup",), sum(due)),
        (OLDEST, ("cleanup",), max(oldest_ms) / 1000),
        (WAITING, ("images",), sum(users)),
        (OLDEST, ("images",), max(oldest_image_ms) / 1000),
        (OPEN_UPLOADS, (), sum(uploads)),
    ]


async def server(db: Redis) -> list[Reading]:
    """Redis' memory and its append-only file. Raises a Refusal if Redis is away or this user may not ask."""
    info = await db.info("memory", "persistence")
    wrote = info["aof_last_write_status"], info["aof_last_bgrewrite_status"]
    return [
        (MEMORY, (), int(info["used_memory"])),
        (MEMORY_LIMIT, (), int(info["maxmemory"]) or int(info["total_system_memory"])),
        (AOF_OK, (), float(wrote == ("ok", "ok"))),
    ]


async def redis(db: Redis, partitions: int) -> list[Reading]:
    """All of the above. If Redis is away, only that it is away."""
    parts = await asyncio.gather(work(db, partitions), server(db), return_exceptions=True)
    readings: list[Reading] = []
    for part in parts:
        if isinstance(part, list):
            readings += part
        elif not isinstance(part, (Refusal, RedisError)):
            raise part
    return [(REDIS_UP, (), float(bool(readings))), *readings]


def store(url: str) -> list[Reading]:
    """Free bytes and size of the disk of a store, if it is a folder."""
    scheme, _, path = store_place(url)
    with suppress(OSError):
        if scheme == "file":
            disk = os.statvfs(path)
            return [
                (STORE_FREE, (), disk.f_bavail * disk.f_frsize),
                (STORE_SIZE, (), disk.f_blocks * disk.f_frsize),
            ]
    return []
