"""`imagegram-storage erase`: removes all that a user has posted, and remembers that it was removed.

| of the user | what happens |
|---|---|
| posts, in any status and hidden too | deleted, with all comments on them |
| comments on any post, hidden too | deleted |
| open uploads | ended; their chunks are erased |
| uploads that ended, Idempotency-Keys, rate limits, the place in the turn | the user's name is removed |

Each step is one script. So a break leaves no half of one, and the same command continues: what is gone is not found
again.

A backup from before the erasure still has the user, and a restore brings the user back. So each erasure is recorded in
the object store, which a restore does not change, before the first step, and again after the last: a backup from
between has a part of the user. `erase --again` repeats the recorded erasures. A record has a digest of the name, not
the name. It is removed when no kept backup can bring the user back.
"""

from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

import orjson

from storage import comments, keys, moderation, uploads
from storage.db.client import Redis, now_ms
from storage.errors import NoComment, NoPost, NoUpload
from storage.objects import NotFound, ObjectStore
from storage.outbox import MayName, recheck_at
from storage.posts import Inspected, inspect
from storage.progress import Progress
from storage.segments import Segments, Unreadable
from storage.users import Found, FoundComment, FoundUpload, Wanted, walk

NAMES = "other keys with the name"
COUNTED = ("posts", "comments", "open uploads", NAMES)


class Counts(Counter[str]):
    """How much of each of COUNTED was found, and removed."""

    def __init__(self):
        super().__init__(dict.fromkeys(COUNTED, 0))
        self.unreadable: set[str] = set()  # posts of which some comments could not be read or deleted


class Erasure(NamedTuple):
    """A record of an erasure in the object store."""

    digest: str  # of the user's name
    at: int  # ms since 1970, when it ended; when it began, if it was broken off
    last: int  # when the last of the user's data was removed: later than `at` if a restore had brought them back


@lru_cache(65536)
def _digest(user: str) -> str:
    return keys.digest(user.encode("utf-8", "surrogateescape"), 16)


async def erase(
    db: Redis,
    objects: ObjectStore,
    segments: Segments,
    user: str,
    backup_reach_ms: int,
    progress: Progress,
    remove: bool,
) -> Counts:
    """Find all that a user has. With `remove` also record the erasure, and remove it. Returns how much it was.

    What is in a segment that is missing or damaged stays, and its post is in the result's `unreadable`.

    Raises Unreachable, Unknown, Unavailable; the same call again continues.
    """

    async def record() -> None:
        await _record(objects, Erasure(_digest(user), now_ms(db), now_ms(db)))

    def wanted(name: str, _: int) -> bool:
        return name == user

    if remove:
        await record()
    return await _erase(db, objects, segments, wanted, backup_reach_ms, progress, record if remove else None)


async def erase_again(
    db: Redis, objects: ObjectStore, segments: Segments, backup_reach_ms: int, progress: Progress, remove: bool
) -> tuple[int, Counts]:
    """Like `erase`, for all users on record. For after a restore. Returns how many users are on record, too.

    What was created after a user's erasure stays: the name may belong to somebody new.
    """
    recorded = await records(objects)
    erased = {record.digest: record.at for record in recorded}

    def wanted(name: str, created: int) -> bool:
        return 0 < created <= erased.get(_digest(name), 0)

    async def record() -> None:
        for one in recorded:
            await _record(objects, one._replace(last=now_ms(db)))

    counts = await _erase(db, objects, segments, wanted, backup_reach_ms, progress, record if remove else None)
    return len(erased), counts


async def _erase(
    db: Redis,
    objects: ObjectStore,
    segments: Segments,
    wanted: Wanted,
    backup_reach_ms: int,
    progress: Progress,
    record: Callable[[], Awaitable[None]] | None,
) -> Counts:
    """Count what is `wanted`. With `record` also remove it: `record` is called before the first thing and after all."""
    counts = Counts()
    seen: set[object] = set()  # the walk may meet the same thing twice
    async for found in walk(db, segments, wanted, progress, counts.unreadable):
        kind, name = _kind(found)
        if name in seen:
            continue
        seen.add(name)
        counts[kind] += 1
        if record:
            if counts.total() == 1:
                await record()
            try:
                await _remove(db, objects, segments, found, backup_reach_ms)
            except Unreadable:  # of a comment: its segment, or the one that `latest` needs
                counts.unreadable.add(found.post)
                counts[kind] -= 1
    if record and counts.total():
        await record()
    return counts


def _kind(found: Found) -> tuple[str, object]:
    """Which of COUNTED it is, and what distinguishes it."""
    if isinstance(found, Inspected):
        return "posts", found.id
    if isinstance(found, FoundComment):
        return "comments", (found.post, found.comment.id)
    if isinstance(found, FoundUpload):
        return "open uploads" if found.upload.expires and not found.upload.post else NAMES, found.id
    return NAMES, found


async def _remove(
    db: Redis, objects: ObjectStore, segments: Segments, found: Found, backup_reach_ms: int
) -> None:
    """Remove one thing. It may be gone by now, or be hidden or unhidden since it was found."""
    if isinstance(found, (Inspected, FoundComment)):
        post = found.id if isinstance(found, Inspected) else found.post
        for _ in range(2):  # an operator may hide or unhide the post between the two calls
            try:
                row = await inspect(db, post)
                if isinstance(found, Inspected):
                    await moderation.delete_post(db, objects, row, backup_reach_ms)
                else:
                    await comments.remove(db, segments, row, found.comment)
                return
            except (NoPost, NoComment):
                continue
    elif isinstance(found, FoundUpload):
        if found.upload.expires and not found.upload.post:
            try:
                await uploads.discard(db, objects, found.upload.owner, found.id)
                return
            except NoUpload:  # it became a post meanwhile
                with suppress(NoPost):
                    row = await inspect(db, (await uploads.inspect(db, found.id, names=False)).post or "")
                    await _remove(db, objects, segments, row, backup_reach_ms)
        await db.call("forget_owner", [keys.upload(found.id)], found.upload.owner)
    elif found.member is None:
        await db.call("drop_key", [found.key])
    else:
        await db.call("drop_member", [found.key], found.member)


async def _record(objects: ObjectStore, erasure: Erasure) -> None:
    await objects.put(keys.erasure(erasure.digest), orjson.dumps({"at": erasure.at, "last": erasure.last}))


async def records(objects: ObjectStore) -> list[Erasure]:
    """All recorded erasures. Raises Unavailable."""
    found = []
    async for entry in objects.list(keys.ERASURES):
        try:
            times = orjson.loads(await objects.get(entry.name))
        except NotFound:  # another command removed it meanwhile
            continue
        found.append(Erasure(entry.name.removeprefix(keys.ERASURES), times["at"], times["last"]))
    return found


async def forget_old(
    db: Redis, objects: ObjectStore, partitions: int, may_name: MayName, backup_reach_ms: int
) -> int:
    """Remove the records of erasures that no kept backup can undo any more. Returns how many there were.

    A timeline that a restore has left may have brought the user back until that restore. So a record also waits for the
    backups of that time, as an original does.
    """
    restored = max([await uploads.last_restore_ms(db, partition) for partition in range(partitions)])
    old = [
        keys.erasure(record.digest)
        for record in await records(objects)
        if not await recheck_at(may_name, max(record.last, restored), now_ms(db), backup_reach_ms)
    ]
    await objects.delete(old)
    return len(old)
