"""Moves old comments from Redis to segments in the store, and takes deleted comments out of them.

The zset `sealing` holds the posts with such work, by time. They come there in three ways:

| a post is added | by | due |
|---|---|---|
| it has many comments in Redis | add_comment | at once |
| it has not changed for some days | find_quiet | at once |
| a comment in a segment was deleted or hidden | delete_comment, hide_comment | after COMPACT_MS; many: at once |

A process leases a post, as in the outbox, and takes steps. Each step stores one segment and then calls one script,
which compares what this process has read with what is in Redis now:

| step | script | what happens |
|---|---|---|
| compact | compact_segment | a segment with erased comments is replaced by one without them |
| seal | seal_comments | the oldest comments leave the stream |

If the process dies between the two, the segment is an orphan, which `sweep` removes. If the script refuses, the segment
is removed at once. A segment that was replaced, and those of a deleted post, wait in `retired` until no kept backup
names them.
"""

from bisect import bisect_left
from collections.abc import Awaitable, Sequence
from typing import NamedTuple

from storage import keys, uploads
from storage.db.client import Redis
from storage.errors import Stale, Unknown, Unreachable
from storage.objects import ObjectStore
from storage.outbox import MayName, recheck_at
from storage.segments import Comment, Segments, Unreadable
from storage.settings import COMPACT_MS, HOUR_MS, LEASE_MS, SEGMENT_BYTES, SEGMENT_COMMENTS

LOOKED_POSTS = 500  # posts that one call of find_quiet looks at: 0.6 ms of Redis' time
LEASE_BATCH = 10  # entries that one call leases
NEVER_MS = 2**53  # no entry is due so much later


class Leased(NamedTuple):
    """A leased entry of `sealing` or `retired`."""

    partition: int
    id: str  # in `sealing` a post. In `retired` `<post>/<name>` of a segment, or `<post>/` for all segments of the post
    lease: int  # when the lease ends, in ms since 1970: the entry's score while it is leased


class Entry(NamedTuple):
    """An entry of `segments`.

    >>> Entry.parse("1795459382641-0 256 1795459300000.5f0c2a9be13d7786")
    Entry(last='1795459382641-0', through=256, name='1795459300000.5f0c2a9be13d7786')
    """

    last: str  # no comment in the segment has a greater id, and all comments of newer segments have
    through: int  # how many comments this and all older segments have
    name: str  # of the object, or keys.NO_SEGMENT where all comments were erased

    @classmethod
    def parse(cls, text: str) -> "Entry":
        last, through, name = text.split(" ")
        return cls(last, int(through), name)


async def find_quiet(db: Redis, partition: int, quiet_ms: int) -> bool:
    """Add posts that have not changed for `quiet_ms` to `sealing`. Returns whether there may be more of them.

    Raises Unreachable, Unknown.
    """
    script_keys = [keys.changes(partition), keys.sealing(partition), keys.quiet(partition)]
    args = (db.clock, quiet_ms, LOOKED_POSTS, keys.comments_prefix(partition))
    return await db.call("find_quiet", script_keys, *args) == LOOKED_POSTS


async def lease(db: Redis, partition: int) -> list[Leased]:
    """Lease posts whose comments are to be sealed or compacted, for LEASE_MS. Raises Unreachable, Unknown."""
    # No entry is due later than COMPACT_MS or the longest pause of an entry that fails.
    return await _lease(db, partition, keys.sealing(partition), 2 * HOUR_MS)


async def _lease(db: Redis, partition: int, key: str, longest_ms: int) -> list[Leased]:
    rows = await db.call("lease_entries", [key], db.clock, LEASE_MS, LEASE_BATCH, longest_ms)
    return [Leased(partition, *row) for row in rows]


async def step(
    db: Redis, segments: Segments, post: str, hot_comments: int, quiet_ms: int, backup_reach_ms: int
) -> bool:
    """Compact or seal one segment of a post. Returns whether there may be more to do.

    A post that has not changed for `quiet_ms` keeps no comments in Redis, any other at least `hot_comments`.

    Raises NoPost where `post` is not the id of a post, Unavailable, Full, Unreachable, Unknown. If a segment that is to
    be compacted is missing or damaged, raises Unreadable when nothing else of the post is left to do.
    """
    partition = keys.partition_of_post(post)
    named = [keys.comments(post), keys.segments(post), keys.erased(post)]
    timeline, tail, flat, erased = await db.call(
        "read_sealing",
        [*named, keys.changes(partition), keys.epoch(partition)],
        db.clock,
        post,
        hot_comments,
        quiet_ms,
        SEGMENT_COMMENTS,
        SEGMENT_BYTES,
        db.cluster,
    )
    unreadable = None
    if erased:
        try:
            if await _compact(db, segments, post, backup_reach_ms):
                return True
        except Unreadable as fault:
            unreadable = fault
    if not flat:
        if unreadable:
            raise unreadable
        return False
    rows = [Comment(*row) for row in zip(*[iter(flat)] * 3, strict=True)]
    name = keys.segment_name(rows[0].id)
    await segments.put(post, name, rows)
    args = (timeline, tail, rows[0].id, rows[-1].id, len(rows), name, db.cluster)
    await _decided(db, segments, post, name, db.call("seal_comments", [*named[:2], keys.epoch(partition)], *args))
    return True


async def _compact(db: Redis, segments: Segments, post: str, backup_reach_ms: int) -> bool:
    """Compact the oldest segment of a post that has erased comments and can be read. Returns whether there was one.

    Raises Unreadable if there was none, because a segment is missing or damaged.
    """
    entries, erased = await read_segments(db, post)
    lasts = [keys.order(Entry.parse(entry).last) for entry in entries]
    places = {bisect_left(lasts, keys.order(comment)) for comment in erased}
    unreadable = None
    for entry in (entries[place] for place in sorted(places) if place < len(entries)):
        replaced = Entry.parse(entry).name
        try:
            rows = await segments.read(post, replaced) if replaced != keys.NO_SEGMENT else []
        except Unreadable as fault:
            unreadable = fault
            continue
        left = [row for row in rows if row.id not in erased]
        if len(left) == len(rows):
            continue
        name = keys.segment_name(left[0].id) if left else keys.NO_SEGMENT
        if left:
            await segments.put(post, name, left)
        gone = [row.id for row in rows if row.id in erased]
        partition = keys.partition_of_post(post)
        script_keys = [keys.segments(post), keys.erased(post), keys.retired(partition)]
        script_keys += [keys.changes(partition), keys.gone(partition)]
        args = (db.clock, post, entry, name, backup_reach_ms, *gone)
        await _decided(db, segments, post, name, db.call("compact_segment", script_keys, *args))
        return True
    if unreadable:
        raise unreadable
    return False


async def _decided(db: Redis, segments: Segments, post: str, name: str, call: Awaitable[int]) -> None:
    """Await the script that begins to name a segment. If it refuses, remove the segment, unless it is named after all.

    It may be: the same call may have been sent before, and its reply lost.
    """
    try:
        await call
    except Stale:
        entries, _ = await read_segments(db, post)
        if name not in (keys.NO_SEGMENT, *(Entry.parse(entry).name for entry in entries)):
            await segments.delete(post, name)


async def read_segments(db: Redis, post: str) -> tuple[list[str], set[str]]:
    """The entries of a post's segments, oldest first, and the ids of its erased comments."""
    entries, erased = await db.call("read_segments", [keys.segments(post), keys.erased(post)])
    return entries, set(erased)


async def end(db: Redis, entry: Leased) -> None:
    """End the lease of a post that is done. If it has comments that were erased meanwhile, it is due again later."""
    script_keys = [keys.sealing(entry.partition), keys.erased(entry.id)]
    await db.call("end_sealing", script_keys, db.clock, entry.id, entry.lease, COMPACT_MS)


async def postpone(db: Redis, entry: Leased, pause_ms: int) -> None:
    """Make a post due again `pause_ms` after it was leased."""
    again = entry.lease - LEASE_MS + pause_ms
    await db.call("end_lease", [keys.sealing(entry.partition)], entry.id, entry.lease, again)


async def remove_retired(
    db: Redis, objects: ObjectStore, may_name: MayName, partition: int, backup_reach_ms: int
) -> list[tuple[Leased, Exception]]:
    """Remove replaced segments, and those of deleted posts, that no kept backup names any more.

    Returns the entries that failed, with the error. They are due again when their lease ends. Raises Unavailable,
    Unreachable, Unknown.
    """
    failed: list[tuple[Leased, Exception]] = []
    for entry in await _lease(db, partition, keys.retired(partition), NEVER_MS):
        now = entry.lease - LEASE_MS
        needed_ms = max(now - backup_reach_ms, await uploads.last_restore_ms(db, partition))
        recheck_ms = await recheck_at(may_name, needed_ms, now, backup_reach_ms)
        try:
            if not recheck_ms:
                await objects.delete(await _retired_objects(db, objects, entry.id))
        except (Unreachable, Unknown):
            raise
        except Exception as fault:  # an entry may fail for any reason, and must not stop the others
            await objects.ping()  # raises Unavailable if the store is the reason
            failed.append((entry, fault))
        else:
            await db.call("end_lease", [keys.retired(partition)], entry.id, entry.lease, recheck_ms or "")
    return failed


async def _retired_objects(db: Redis, objects: ObjectStore, entry: str) -> Sequence[str]:
    """The objects that an entry of `retired` stands for. None that a segment of a post still names."""
    post, _, name = entry.partition("/")
    named = {keys.segment(post, Entry.parse(one).name) for one in (await read_segments(db, post))[0]}
    found = [keys.segment(post, name)] if name else [one.name async for one in objects.list(keys.segment(post, ""))]
    return [one for one in found if one not in named]
