"""What a scrape reads at its moment: work that waits, open uploads, Redis' memory, the free space of the store."""

import asyncio
import os
from collections.abc import Awaitable, Iterable
from contextlib import suppress
from typing import Any

from redis.exceptions import RedisError

from storage import keys
from storage.db.client import Redis
from storage.errors import Refusal
from storage.metrics import (
    AOF_OK,
    FORK,
    MEMORY,
    MEMORY_LIMIT,
    NODE_UP,
    OLDEST,
    OPEN_UPLOADS,
    OPERATIONS,
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
    """Work that waits, and open uploads, of all partitions that answer. Raises a Refusal if none does."""
    calls = (
        db.call(
            "read_work",
            [keys.due(partition), keys.turns(partition), keys.sealing(partition)],
            db.clock,
            LEASE_MS,
            DAY_MS,
            ENTRIES,
            USERS,
            keys.making_prefix(partition),
        )
        for partition in range(partitions)
    )
    rows = await _answers(calls)
    due, oldest_ms, users, oldest_image_ms, uploads, posts, oldest_post_ms = zip(*rows, strict=True)
    return [
        (WAITING, ("cleanup",), sum(due)),
        (OLDEST, ("cleanup",), max(oldest_ms) / 1000),
        (WAITING, ("images",), sum(users)),
        (OLDEST, ("images",), max(oldest_image_ms) / 1000),
        (WAITING, ("comments",), sum(posts)),
        (OLDEST, ("comments",), max(oldest_post_ms) / 1000),
        (OPEN_UPLOADS, (), sum(uploads)),
    ]


async def server(db: Redis) -> list[Reading]:
    """The memory, the file, the last fork and the commands of Redis, or of each primary of a Cluster that answers.

    Raises a Refusal if none answers or this user may not ask.
    """
    readings: list[Reading] = []
    for labels, info in await _answers(_info(node, "memory", "persistence", "stats") for node in await db.primaries()):
        wrote = info["aof_last_write_status"], info["aof_last_bgrewrite_status"]
        readings += [
            (MEMORY, labels, int(info["used_memory"])),
            (MEMORY_LIMIT, labels, int(info["maxmemory"]) or int(info["total_system_memory"])),
            (AOF_OK, labels, float(wrote == ("ok", "ok"))),
            (FORK, labels, int(info["latest_fork_usec"]) / 1e6),
            (OPERATIONS, labels, int(info["instantaneous_ops_per_sec"])),
        ]
    return readings


async def forks(db: Redis) -> list[tuple[str, float]]:
    """For Redis, or each primary of a Cluster that answers: its place, and the seconds for which its last fork stopped
    it. Empty if none answers or this user may not ask.
    """
    try:
        answers = await _answers(_info(node, "stats") for node in await db.primaries())
    except (Refusal, RedisError):
        return []
    return [("".join(labels), int(info["latest_fork_usec"]) / 1e6) for labels, info in answers]


async def _info(node: Redis, *sections: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """The labels of a server's gauges, and sections of its INFO."""
    return (node.place,) if node.place else (), await node.info(*sections)


async def primaries(db: Redis) -> list[Reading]:
    """Whether each primary of a Cluster answers. Raises a Refusal where most of them do not."""
    silent = await db.ping()
    return [(NODE_UP, (node.place,), float(node.place not in silent)) for node in await db.primaries() if node.place]


async def _answers(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """The results of all calls that are answered. Raises the error of one of them if none is."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    answers = [result for result in results if not isinstance(result, Exception)]
    if not answers:
        raise results[0]
    return answers


async def redis(db: Redis, partitions: int) -> list[Reading]:
    """All of the above. If Redis is away, only that it is away."""
    parts = await asyncio.gather(work(db, partitions), server(db), primaries(db), return_exceptions=True)
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
