"""Comments of a post: add, read, list, hide, delete.

The newest comments of a post are in Redis, the older ones in segments in the store (segments.py). A script that needs
a segment returns its name, and this file reads it.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import orjson

from storage import keys
from storage.db.client import Redis
from storage.errors import NoComment, Unreachable
from storage.limits import Entry
from storage.posts import Inspected
from storage.segments import Comment, Segments
from storage.settings import COMPACT_MS, DAY_MS, HOT_COMMENTS, LATEST_COMMENTS, PAGE_BYTES, SEGMENT_COMMENTS

# How often a deletion is tried whose comment is in the store. Each time, a segment may have been added or replaced
# since it was read. That takes longer than the reading.
TRIES = 10


class Page(NamedTuple):
    comments: list[Comment]  # newest first
    more: bool  # whether older comments follow


async def add(
    db: Redis,
    author: str,
    post: str,
    text: str,
    idempotency: keys.IdempotencyKey | None = None,
    limit: Entry | None = None,
    seal_at: int = HOT_COMMENTS + SEGMENT_COMMENTS,
) -> tuple[Comment, bool]:
    """Add a comment to a ready post. Returns the comment, and whether its idempotency key was used before.

    `limit` is of the post's partition. Only a new comment that can be added takes from it, and decides it. If the limit
    does not allow it, no comment is added, and the one that is returned has no id. With `seal_at` comments in Redis the
    oldest ones are to go to the store; 0: never.

    Raises Reused where the idempotency key was used for another request, NoPost, NotReady where the post is processing,
    and Failed where its image could not be made.
    """
    script_keys = [*keys.post_and_lists(post), keys.sealing(keys.partition_of_post(post))]
    args = [db.clock, post, author, text, LATEST_COMMENTS, idempotency.digest if idempotency else "-", DAY_MS, seal_at]
    if idempotency:
        script_keys.append(keys.once(keys.partition_of_post(post), author, idempotency.scoped_key))
    if limit:
        script_keys.append(limit.charge.key)
        args += limit.charge.limit.quota, limit.charge.window_ms
    comment_id, repeated, *decision = await db.call("add_comment", script_keys, *args)
    if limit and decision:
        limit.decide(*decision)
    return Comment(comment_id, author, text), bool(repeated)


async def delete(db: Redis, segments: Segments, author: str, post: str, comment: str) -> None:
    """Delete a comment of `author`.

    Raises NoPost, NoComment, Forbidden where somebody else wrote it, and Unavailable where it is in the store, or where
    the store has what the feed is to show instead, and the store is away.
    """
    keys.comment_ms(comment)
    script_keys = [*keys.post_and_lists(post), keys.sealing(keys.partition_of_post(post))]
    await _remove(db, segments, "delete_comment", script_keys, post, comment, author)


async def hide(db: Redis, segments: Segments, post: Inspected, comment: str) -> bool:
    """Take a comment away from its post and keep a copy, for an operator. The post may be hidden.

    Returns whether it was shown before. Raises NoPost, NoComment, Unavailable.
    """
    keys.comment_ms(comment)
    return bool(await _remove(db, segments, "hide_comment", _all_keys(post), post.id, comment))


async def unhide(db: Redis, segments: Segments, post: Inspected, comment: str) -> str:
    """Add a hidden comment to its post again, as the newest one. Returns the id that it has now.

    The same call again returns the same id. Raises NoPost, NoComment, Unavailable.
    """
    keys.comment_ms(comment)
    script_keys = [post.key(), *keys.post_and_lists(post.id)[1:], keys.kept(post.id)]
    try:
        return await db.call("unhide_comment", script_keys, db.clock, post.id, comment, LATEST_COMMENTS)
    except NoComment:
        return (await read(db, segments, post.id, comment, post.hidden)).id  # in the store, and not hidden


async def kept(db: Redis, post: str) -> dict[str, Comment | str]:
    """The comments of a post that were hidden, by their ids. A comment that was unhidden has only its new id."""
    rows = await db.call("read_kept", [keys.kept(post)])
    found = zip(rows[::2], rows[1::2], strict=True)
    return {key: Comment(key, *orjson.loads(value)) if value.startswith("[") else value for key, value in found}


async def remove(db: Redis, segments: Segments, post: Inspected, comment: Comment) -> None:
    """Delete a comment for an operator, hidden or not. The post may be hidden too.

    Raises NoPost, NoComment, Unavailable.
    """
    await _remove(db, segments, "delete_comment", _all_keys(post), post.id, comment.id, comment.author)


def _all_keys(post: Inspected) -> list[str]:
    """The keys of a post, hidden or not, of its lists, and of its hidden comments."""
    sealing = keys.sealing(keys.partition_of_post(post.id))
    return [post.key(), *keys.post_and_lists(post.id)[1:], sealing, keys.kept(post.id)]


async def _remove(
    db: Redis, segments: Segments, script: str, script_keys: list[str], post: str, comment: str, *user: str
) -> int:
    """Call a script that removes a comment, until it needs nothing more from the store. Returns its last reply."""
    seen: tuple[str, ...] = ("", "", "", "")  # nothing of the store
    for _ in range(TRIES):
        args = (db.clock, post, comment, *user, LATEST_COMMENTS, COMPACT_MS, *seen)
        reply = await db.call(script, script_keys, *args)
        if isinstance(reply, int):
            return reply
        own, newest, erased = reply
        rows = await _read(segments, post, own) if own else []
        row = next((row[1:] for row in rows if row.id == comment), ())
        if own and not row:
            raise NoComment("no such comment")
        refill = orjson.dumps(await _refill(segments, post, newest, {*erased, comment}))
        seen = own, orjson.dumps(row).decode(), newest[0] if newest else "", refill.decode()
    raise Unreachable("the comments of this post were moved meanwhile; try again")


async def _refill(segments: Segments, post: str, entries: Sequence[str], gone: set[str]) -> list[tuple[str, ...]]:
    """The newest comments of segments, newest first, until LATEST_COMMENTS of them are not `gone`.

    Those that are gone have only their id. So the script notices if one of them is not: after a restore, for example.
    """
    found: list[tuple[str, ...]] = []
    missing = LATEST_COMMENTS
    for entry in entries:
        for row in reversed(await _read(segments, post, entry)):
            found.append((row.id,) if row.id in gone else tuple(row))
            missing -= row.id not in gone
            if not missing:
                return found
    return found


async def read(db: Redis, segments: Segments, post: str, comment: str, hidden: bool = False) -> Comment:
    """One comment. `hidden` says that the post is hidden. Raises NoPost, NoComment, Unavailable."""
    keys.comment_ms(comment)
    # `page` returns the comments older than an id. This comment, if it exists, is the newest one before the next id.
    ms, _, sequence = comment.partition("-")
    above = f"{ms}-{int(sequence) + 1}"
    newest = await page(db, segments, post, 1, above, hidden)
    if not newest.comments or newest.comments[0].id != comment:
        raise NoComment("no such comment")
    return newest.comments[0]


async def page(
    db: Redis, segments: Segments, post: str, limit: int, before: str = "", hidden: bool = False
) -> Page:
    """Up to `limit` comments, newest first: the newest of all, or those older than the comment id `before`.

    A comment with the id `before` need not exist. The page also ends when its texts have PAGE_BYTES. `hidden` says that
    the post is hidden: only an operator reads its comments then. Raises NoPost, and Unavailable where a part of the
    page is in the store, and the store is away.
    """
    script_keys = [keys.hidden(post) if hidden else keys.post(post), *keys.post_and_lists(post)[1:4]]
    more, rows, *sealed = await db.call("comments_page", script_keys, before, limit, PAGE_BYTES)
    found = [Comment(*row) for row in rows]
    if not sealed:
        return Page(found, bool(more))
    found += await _sealed(segments, post, *sealed, before, limit + 1 - len(found))
    size = 0
    for end, row in enumerate(found):
        if end == limit or size >= PAGE_BYTES:
            return Page(found[:end], True)
        size += len(row.author.encode()) + len(row.text.encode())
    return Page(found, False)


async def _sealed(
    segments: Segments, post: str, entries: Sequence[str], erased: Iterable[str], before: str, limit: int
) -> list[Comment]:
    """Up to `limit` comments from the segments of `entries`, newest first, older than the id `before` and not `erased`.

    The entries are newest first, as the script `comments_page` returns them: the first one may suffice. The others are
    read at the same time.
    """
    gone, found = set(erased), []
    for group in (entries[:1], entries[1:]):
        reads = [_read(segments, post, entry) for entry in group]
        # A task for the only one would take 30 µs.
        for rows in [await reads[0]] if len(reads) == 1 else await asyncio.gather(*reads):
            end = bisect_left(rows, keys.order(before), key=lambda row: keys.order(row.id)) if before else len(rows)
            newest = rows[max(0, end - limit - len(gone)) : end]  # only these are parsed
            found += [row for row in reversed(newest) if row.id not in gone]
        if len(found) >= limit:
            break
    return found[:limit]


async def _read(segments: Segments, post: str, entry: str) -> Sequence[Comment]:
    """The comments of a segment, oldest first, by its entry in `segments`."""
    name = entry.split(" ")[2]
    return [] if name == keys.NO_SEGMENT else await segments.read(post, name)
