"""Finds objects that belong to no post and no upload (orphans), and removes them.

Orphans come from two causes. A process was killed after it had stored a chunk or a segment and before a script had
added it to the upload or the post. Or a restore left out the posts or segments that the objects belong to.

An operator runs the sweep by hand. It does not run by itself, because before Redis is restored every object looks like
an orphan. For the same reason a sweep removes nothing if most objects are orphans.

The JPEG of an address that a post does not have any more is an orphan too (workers/remaking.py).
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from storage import keys, uploads
from storage.db.client import BATCH, Redis, now_ms
from storage.objects import Entry, ObjectStore
from storage.outbox import MayName, recheck_at
from storage.posts import Image

DAY = 86400  # seconds. Younger objects are ignored. Work that stores an object and then names it takes minutes at most
SAFE_COUNT = 100  # orphans. Up to this number they may be removed even if most objects are orphans
MAX_NAMES = 5  # names in a report


class Mistaken(Exception):
    """Most objects are orphans, so this is probably the wrong Redis, or one that is not restored yet."""


@dataclass
class Report:
    """The result of a sweep."""

    seen: int = 0  # objects older than a day
    orphans: int = 0  # objects that belong to nothing and that no kept backup can name
    size: int = 0  # bytes of the orphans
    waiting: int = 0  # originals, chunks and segments that belong to nothing, but that a kept backup may name
    names: list[str] = field(default_factory=list)  # of the first MAX_NAMES orphans

    def __str__(self) -> str:
        text = f"nobody owns {self.orphans} of {self.seen} objects older than a day ({self.size} bytes)"
        text += f"; {self.waiting} more are kept, because a backup may name them"
        return f"{text}: {', '.join(self.names)}" if self.names else text


async def sweep(db: Redis, objects: ObjectStore, may_name: MayName, backup_reach_ms: int, remove: bool) -> Report:
    """Find the orphans among the objects that are older than a day. With `remove` also remove them.

    An original is not an orphan before it is twice `backup_reach_ms` old. A restore may leave its post out when the
    post is already as old as the oldest kept backup. The last backup that names the post is then kept for as long
    again, and that backup may be restored too.

    Originals, chunks and segments that are older than the last restore also wait until no kept backup began before that
    restore. Backups are kept for longer than set while `verify` fails.

    Raises Mistaken where most objects are orphans and `remove` was requested, Unreachable, Unavailable.
    """
    if remove:
        report = await sweep(db, objects, may_name, backup_reach_ms, remove=False)
        if report.orphans > max(SAFE_COUNT, report.seen // 2):
            raise Mistaken(f"{report}; nothing was removed: is this the right Redis, and restored?")
    await db.ping()  # so that a Redis that cannot be reached is noticed even if no object is old enough
    report = Report()
    restored: dict[int, int] = {}
    async for batch in _batches(objects, time.time() - DAY):
        report.seen += len(batch)
        stored: dict[str, list[str]] = {}
        for entry in batch:
            stored.setdefault(keys.owner(entry.name), []).append(entry.name)
        owned = set().union(*await asyncio.gather(*(_owned(db, owner, names) for owner, names in stored.items())))
        unowned = [entry for entry in batch if entry.name not in owned]
        orphans = [
            entry for entry in unowned if not await _backup_may_name(db, may_name, restored, entry, backup_reach_ms)
        ]
        report.waiting += len(unowned) - len(orphans)
        report.orphans += len(orphans)
        report.size += sum(entry.size for entry in orphans)
        report.names += [entry.name for entry in orphans][: MAX_NAMES - len(report.names)]
        if remove:
            await objects.delete([entry.name for entry in orphans])
    return report


async def _backup_may_name(
    db: Redis, may_name: MayName, restored: dict[int, int], entry: Entry, backup_reach_ms: int
) -> bool:
    """Whether a kept backup may name an object. `restored` caches each partition's last restore, in ms since 1970."""
    if entry.name.startswith(keys.IMAGES):  # a missing JPEG is made again from its original
        return False
    now = now_ms(db)
    modified = entry.modified * 1000
    if entry.name.startswith(keys.ORIGINALS) and modified >= now - 2 * backup_reach_ms:
        return True
    partition = keys.partition_of(keys.owner(entry.name))
    if partition not in restored:
        restored[partition] = await uploads.last_restore_ms(db, partition)
    last = restored[partition]
    return modified <= last and bool(await recheck_at(may_name, last, now, backup_reach_ms))


async def _batches(objects: ObjectStore, before: float) -> AsyncIterator[list[Entry]]:
    """Objects that were last written before a time in Unix seconds, up to BATCH at once.

    Objects whose names this software does not create are ignored.
    """
    batch = []
    for folder in keys.OBJECTS:
        async for entry in objects.list(folder):
            if entry.modified < before and _is_ours(entry.name):
                batch.append(entry)
            if len(batch) == BATCH:
                yield batch
                batch = []
    yield batch


def _is_ours(name: str) -> bool:
    """Whether this software may have created an object with this name, in the folders of OBJECTS."""
    parts = keys.ID.fullmatch(keys.owner(name))
    if not name.startswith(keys.SEGMENTS):
        return bool(parts)
    return bool(parts and not parts[1] and keys.SEGMENT_NAME.fullmatch(name.split("/", 2)[-1]))


async def _owned(db: Redis, owner: str, stored: list[str]) -> set[str]:
    """The names of the objects that belong to a post or an upload, given its id. Of its segments those in `stored`."""
    if keys.ID.fullmatch(owner)[1]:
        return {keys.chunk(owner, name) for name in (await uploads.inspect(db, owner)).chunks}
    partition = keys.partition_of_post(owner)
    lists = [keys.gone(partition), keys.due(partition), keys.segments(owner), keys.retired(partition)]
    names = [name.split("/")[2] for name in stored if name.startswith(keys.SEGMENTS)]
    known, field, *segments = await db.call("is_owned", [keys.post(owner), keys.hidden(owner), *lists], owner, *names)
    # A JPEG with a higher version was stored a moment ago, and its post will name it.
    image = Image.parse(field)
    images = {keys.original(owner), *keys.images(owner)[image.version - 1 if image else 0 :]} if known else set()
    return images.union(keys.segment(owner, name) for name in segments)
