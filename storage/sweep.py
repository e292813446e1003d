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
SAFE_COUNT = 100  # so many objects may be removed however few there are besides
MAX_NAMES = 5  # names in a report


class Mistaken(Exception):
    """Most objects are nobody's."""


@dataclass
class Report:
    seen: int = 0  # objects older than a day
    orphans: int = 0  # of them nobody's, and no backup needs them
    size: int = 0  # bytes of those
    waiting: int = 0  # originals and chunks that are nobody's, but a backup may name them
    names: list[str] = field(default_factory=list)  # the first ones lost

    def __str__(self) -> str:
        text = f"nobody owns {self.orphans} of {self.seen} objects older than a day ({self.size} bytes)"
        text += f"; {self.waiting} more are kept, because a backup may name them"
        return f"{text}: {', '.join(self.names)}" if self.names else text


async def sweep(db: Redis, objects: ObjectStore, may_name: MayName, backup_reach_ms: int, remove: bool) -> Report:
    """Look at every object older than a day, and if wanted remove those that are nobody's.

    An original waits as long as a restore may go back to a second in which it had its post: the post may be as old as a
    backup when a restore leaves it out, and the last backup that names it becomes as old again. Originals and chunks
    from before the last restore also wait for every kept backup that began before it: `verify` may have failed, and
    then they are kept for longer than set. Raises Mistaken, Unreachable, Unavailable.
    """
    if remove:
        report = await sweep(db, objects, may_name, backup_reach_ms, remove=False)
        if report.orphans > max(SAFE_COUNT, report.seen // 2):
            raise Mistaken(f"{report}; nothing was removed: is this the right Redis, and restored?")
    await db.ping()  # also where no object is old enough to ask about
    report = Report()
    restored: dict[int, int] = {}
    async for batch in _batches(objects, time.time() - DAY):
        report.seen += len(batch)
        owners = {keys.owner(entry.name) for entry in batch}
        owned = set().union(*await asyncio.gather(*(_owned(db, owner) for owner in owners)))
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
    """Whether a kept backup may name an object. `restored` remembers each partition's last restore."""
    if entry.name.startswith(keys.IMAGES):  # made again from its original
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


async def _owned(db: Redis, owner: str) -> set[str]:
    """The objects that a post or an upload may have."""
    if keys.ID.fullmatch(owner)[1]:
        return {keys.chunk(owner, name) for name in (await uploads.inspect(db, owner)).chunks}
    partition = keys.partition_of_post(owner)
    known = await db.call("is_owned", [keys.post(owner), keys.gone(partition), keys.due(partition)], owner)
    return {keys.original(owner), keys.image(owner)} if known else set()
