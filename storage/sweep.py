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
from storage.objects import S3, Entry, Folder
from storage.scripts import BATCH, Redis
from storage.settings import Settings

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
    waiting: int = 0  # originals that are nobody's, but a backup may name them
    names: list[str] = field(default_factory=list)  # the first ones lost

    def __str__(self) -> str:
        told = f"{self.lost} objects of {self.seen} are nobody's, {self.size} bytes; {self.waiting} originals wait"
        return f"{told}: {', '.join(self.names)}" if self.names else told


async def sweep(db: Redis, objects: Folder | S3, settings: Settings, remove: bool) -> Found:
    """Look at every object older than a day, and if wanted remove those that are nobody's.

    An original waits: a restore may go back to before a restore, to a second when it had its post. What that undid was
    as old as a backup may be, and its last backup gets as old again. Raises Mistaken, Unreachable, Unavailable.
    """
    if remove:
        found = await sweep(db, objects, settings, remove=False)
        if found.lost > max(FEW, found.seen // 2):
            raise Mistaken(f"{found}; nothing was removed: is this the right Redis, and restored?")
    needed = time.time() - 2 * settings.named_ms / 1000
    found = Found()
    async for batch in _batches(objects, time.time() - DAY):
        found.seen += len(batch)
        ids = {keys.owner(entry.name) for entry in batch}
        owned = set().union(*await asyncio.gather(*(_owned(db, id) for id in ids)))
        lost = [entry for entry in batch if entry.name not in owned]
        gone = [entry for entry in lost if entry.modified < needed or not entry.name.startswith(keys.ORIGINALS)]
        found.waiting += len(lost) - len(gone)
        found.lost += len(gone)
        found.size += sum(entry.size for entry in gone)
        found.names += [entry.name for entry in gone][: SHOWN - len(found.names)]
        if remove:
            await objects.delete([entry.name for entry in gone])
    return found


async def _batches(objects: Folder | S3, before: float) -> AsyncIterator[list[Entry]]:
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
        return {keys.chunk(id, name) for name in (await uploads.look(db, id)).chunks}
    partition = keys.partition_of_post(id)
    known = await db.call("is_owned", [keys.post(id), keys.gone(partition), keys.due(partition)], id)
    return {keys.original(id), keys.image(id)} if known else set()
