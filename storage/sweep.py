"""Finds objects that nobody owns, and removes them.

A process that is killed between putting a chunk and naming it leaves one, and a restore leaves the objects of all
posts that the restored data does not know.

Run by hand, not by itself: to a Redis that is not restored yet every object is nobody's. A sweep that finds most
objects to be so refuses, too.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from storage import keys, uploads
from storage.db.client import BATCH, Redis, now_ms
from storage.objects import Entry, ObjectStore
from storage.outbox import MayName, recheck_at

DAY = 86400  # seconds. Work that puts an object and then names it takes minutes at most
FEW = 100  # so many objects may be removed however few there are besides
SHOWN = 5  # names in a report


class Mistaken(Exception):
    """Most objects are nobody's."""


@dataclass
class Found:
    seen: int = 0  # objects older than a day
    lost: int = 0  # of them nobody's, and no backup needs them
    size: int = 0  # bytes of those
    waiting: int = 0  # originals and chunks that are nobody's, but a backup may name them
    names: list[str] = field(default_factory=list)  # the first ones lost

    def __str__(self) -> str:
        told = f"nobody owns {self.lost} of {self.seen} objects older than a day ({self.size} bytes)"
        told += f"; {self.waiting} more are kept, because a backup may name them"
        return f"{told}: {', '.join(self.names)}" if self.names else told


async def sweep(db: Redis, objects: ObjectStore, may_name: MayName, backup_reach_ms: int, remove: bool) -> Found:
    """Look at every object older than a day, and if wanted remove those that are nobody's.

    An original waits as long as a restore may go back to a second in which it had its post: the post may be as old as a
    backup when a restore leaves it out, and the last backup that names it becomes as old again. Originals and chunks
    from before the last restore also wait for every kept backup that began before it: `verify` may have failed, and
    then they are kept for longer than set. Raises Mistaken, Unreachable, Unavailable.
    """
    if remove:
        found = await sweep(db, objects, may_name, backup_reach_ms, remove=False)
        if found.lost > max(FEW, found.seen // 2):
            raise Mistaken(f"{found}; nothing was removed: is this the right Redis, and restored?")
    await db.ping()  # also where no object is old enough to ask about
    found, restored = Found(), {}
    async for batch in _batches(objects, time.time() - DAY):
        found.seen += len(batch)
        ids = {keys.owner(entry.name) for entry in batch}
        owned = set().union(*await asyncio.gather(*(_owned(db, id) for id in ids)))
        lost = [entry for entry in batch if entry.name not in owned]
        gone = [entry for entry in lost if not await _named(db, may_name, restored, entry, backup_reach_ms)]
        found.waiting += len(lost) - len(gone)
        found.lost += len(gone)
        found.size += sum(entry.size for entry in gone)
        found.names += [entry.name for entry in gone][: SHOWN - len(found.names)]
        if remove:
            await objects.delete([entry.name for entry in gone])
    return found


async def _named(db: Redis, may_name: MayName, restored: dict[int, int], entry: Entry, backup_reach_ms: int) -> bool:
    """Whether a kept backup may name an object. `restored` remembers each partition's last restore."""
    if entry.name.startswith(keys.IMAGES):  # made again from its original
        return False
    now, modified = now_ms(db), entry.modified * 1000
    if entry.name.startswith(keys.ORIGINALS) and modified >= now - 2 * backup_reach_ms:
        return True
    partition = keys.partition_of(keys.owner(entry.name))
    if partition not in restored:
        restored[partition] = await uploads.last_restore_ms(db, partition)
    last = restored[partition]
    return modified <= last and bool(await recheck_at(may_name, last, now, backup_reach_ms))


async def _batches(objects: ObjectStore, before: float) -> AsyncIterator[list[Entry]]:
    """Objects last written before then, as many as one pipeline asks for. Names storage does not make are let be."""
    batch = []
    for folder in keys.OBJECTS:
        async for entry in objects.list(folder):
            if entry.modified < before and keys.ID.fullmatch(keys.owner(entry.name)):
                batch.append(entry)
            if len(batch) == BATCH:
                yield batch
                batch = []
    yield batch


async def _owned(db: Redis, id: str) -> set[str]:
    """The objects that a post or an upload may have."""
    if keys.ID.fullmatch(id)[1]:
        return {keys.chunk(id, name) for name in (await uploads.inspect(db, id)).chunks}
    partition = keys.partition_of_post(id)
    known = await db.call("is_owned", [keys.post(id), keys.gone(partition), keys.due(partition)], id)
    return {keys.original(id), keys.image(id)} if known else set()
