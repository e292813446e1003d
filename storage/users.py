"""Finds everything that belongs to some users, in all partitions, for `export` and `erase`.

No index leads from a user to their comments. So this walks over all keys and all comments, a few at a time. Redis goes
on answering others meanwhile: no script reads more than COMMENTS comments, and after each batch of keys there is a
pause.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import NamedTuple

from redis.exceptions import ResponseError

from storage import comments, keys, sealing, uploads
from storage.check import Report, scan, well_formed_keys
from storage.db.client import Redis
from storage.errors import NoPost
from storage.posts import Inspected, inspect
from storage.progress import Progress
from storage.segments import Comment, Segments, Unreadable
from storage.settings import PAGE_BYTES
from storage.uploads import Upload

COMMENTS = 100  # comments that one script reads: 0.2 ms of Redis' time, or 2 ms if all are as long as allowed
TOGETHER = 16  # scripts in one pipeline: 3 ms of Redis' time, or 32 ms
PAUSE = 0.002  # seconds between two batches of keys

# Whether something belongs to one of the users: their name, and when it was created (ms since 1970; 0: not known).
Wanted = Callable[[str, int], bool]


class FoundComment(NamedTuple):
    post: str
    comment: Comment
    hidden: bool


class FoundUpload(NamedTuple):
    id: str
    upload: Upload  # in any state


class FoundName(NamedTuple):
    """A key, or a member of one, that exists only beside the others and contains the user's name."""

    key: str
    member: str | None  # None: the key itself contains it


Found = Inspected | FoundComment | FoundUpload | FoundName


async def walk(
    db: Redis, segments: Segments, wanted: Wanted, progress: Progress, unreadable: set[str]
) -> AsyncIterator[Found]:
    """Everything that is `wanted`. Something that is created, hidden or unhidden meanwhile may be missing.

    The same thing may come twice (Redis, "SCAN", "Scan guarantees"). What is malformed is skipped: `check` reports it.
    Posts with segments that are missing or damaged are added to `unreadable`, and their other comments come. Raises
    Unavailable where the store is away.
    """
    total, done, found = sum([await server.call("count_keys", []) for server in await db.primaries()]), 0, 0
    async for names in scan(db):
        known = well_formed_keys(names, Report())
        for start in range(0, len(known), TOGETHER):
            works = [_look(db, segments, key, wanted, unreadable) for key in known[start : start + TOGETHER]]
            for items, more in await asyncio.gather(*works):
                found += len(items)
                for item in items:
                    yield item
                async for item in more or _nothing():
                    found += 1
                    yield item
        done += len(names) // 2
        progress.show("keys", done, total, f"{found} found")
        await asyncio.sleep(PAUSE)


async def _nothing() -> AsyncIterator[Found]:
    return
    yield


async def _look(
    db: Redis, segments: Segments, key: str, wanted: Wanted, unreadable: set[str]
) -> tuple[list[Found], AsyncIterator[Found] | None]:
    """What a key has for `walk`, and the rest of it where that is long."""
    kind, partition, name = keys.parts(key)
    try:
        if kind in ("post", "hidden"):
            row = await inspect(db, name)
            found: list[Found] = [row] if wanted(row.fields.get("author", ""), keys.created_ms(name)) else []
            try:
                page = await comments.page(db, segments, name, COMMENTS, hidden=row.hidden)
            except ResponseError:  # its stream is malformed
                return found, None
            except Unreadable:
                return found, _readable(db, segments, name, wanted, unreadable)
            rest = _comments(db, segments, name, wanted, page.comments[-1].id, unreadable) if page.more else None
            return found + _choose(name, page.comments, wanted), rest
        if kind == "kept":
            rows = [row for row in (await comments.kept(db, name)).values() if not isinstance(row, str)]
            return [found._replace(hidden=True) for found in _choose(name, rows, wanted)], None
        if kind == "upload":
            upload = await uploads.inspect(db, name, names=False)
            if upload.owner and wanted(upload.owner, keys.created_ms(name)):
                return [FoundUpload(name, upload), *await _became(db, upload, wanted)], None
        if kind == "once" and wanted(name.rpartition(":")[0], 0):
            return [FoundName(key, None)], None
        if kind == "rate" and not name.startswith("address:") and wanted(name.partition(":")[2], 0):
            return [FoundName(key, None)], None
        if kind == "turns":
            members = [member async for batch in scan(db, key) for member in batch[::2] if wanted(member, 0)]
            return [FoundName(key, member) for member in members], None
    except (NoPost, ResponseError, ValueError, TypeError):
        pass  # it was deleted, hidden or unhidden meanwhile, or it is malformed
    return [], None


async def _became(db: Redis, upload: Upload, wanted: Wanted) -> list[Found]:
    """The post that an upload became. If that was during the walk, the walk may not meet the post's own key."""
    with suppress(NoPost):
        row = await inspect(db, upload.post or "")
        return [row] if wanted(row.fields.get("author", ""), keys.created_ms(row.id)) else []
    return []


async def _comments(
    db: Redis, segments: Segments, post: str, wanted: Wanted, before: str, unreadable: set[str]
) -> AsyncIterator[Found]:
    """The comments of a post that are older than `before`."""
    more = True
    while more:
        try:
            row = await inspect(db, post)
            page = await comments.page(db, segments, post, COMMENTS, before, row.hidden)
        except (NoPost, ResponseError):  # it was deleted meanwhile, or it is malformed
            return
        except Unreadable:
            async for found in _readable(db, segments, post, wanted, unreadable):
                yield found
            return
        for found in _choose(post, page.comments, wanted):
            yield found
        more = page.more
        before = page.comments[-1].id if page.comments else before
        await asyncio.sleep(0)


async def _readable(
    db: Redis, segments: Segments, post: str, wanted: Wanted, unreadable: set[str]
) -> AsyncIterator[Found]:
    """The comments of a post of which a segment is missing or damaged: those in Redis and in its other segments.

    Comments go from Redis to segments, so none is missed on its way.
    """
    before, more = "", True
    while more:
        try:
            row = await inspect(db, post)
            script_keys = [row.key(), *keys.post_and_lists(post)[1:4]]
            more, rows, *sealed = await db.call("comments_page", script_keys, before, COMMENTS, PAGE_BYTES)
        except (NoPost, ResponseError):
            return
        for found in _choose(post, [Comment(*row) for row in rows], wanted):
            yield found
        more = more and rows and not sealed
        before = rows[-1][0] if rows else before
    entries, erased = await sealing.read_segments(db, post)
    for name in (sealing.Entry.parse(entry).name for entry in entries):
        try:
            rows = [] if name == keys.NO_SEGMENT else await segments.read(post, name)
        except Unreadable:
            unreadable.add(post)
            continue
        for found in _choose(post, [row for row in rows if row.id not in erased], wanted):
            yield found


def _choose(post: str, rows: list[Comment], wanted: Wanted) -> list[Found]:
    return [FoundComment(post, row, False) for row in rows if wanted(row.author, keys.comment_ms(row.id))]
