"""Posts: made of uploads, read, listed, deleted."""

import asyncio
import logging
from collections.abc import Awaitable
from contextlib import suppress
from functools import lru_cache
from heapq import merge
from typing import NamedTuple

import orjson

from storage import keys
from storage.db.client import Redis
from storage.objects import NotFound, ObjectStore, Unavailable
from storage.settings import CHANGES_MS, DAY_MS, LEASE_MS, PAGE_BYTES, PROCESSING

CACHED_PAGES = 128  # pages that are remembered: 1 MB, and 32 MB where all are as long as they may be
MAX_REPORTED = 1000  # skipped members that are logged by one process: enough to see what is wrong
CACHED_ROWS = 2048  # rows: 3 MB, and 60 MB where all texts are as long as they may be


log = logging.getLogger("imagegram.posts")
_reported: set[str] = set()


class Post(NamedTuple):
    """A row as scripts return it. `latest` holds the newest comments' id, author and text, newest first."""

    id: str
    comment_count: int
    author: str
    caption: str
    status: str  # processing, ready or failed
    thumbhash: str | None  # base64
    code: str | None  # why it failed
    detail: str | None
    latest: tuple[tuple[str, str, str], ...]

    def seen(self) -> str:
        """What tells this row from the post's others, for `delete`: what readers see changes only with it."""
        return f"{self.status} {self.comment_count} {self.latest[0][0] if self.latest else '-'}"


def post_from_row(row: list) -> Post:
    return Post(*row[:-1], tuple(tuple(orjson.loads(entry)) for entry in row[-1]))


@lru_cache(CACHED_ROWS)
def post_from_line(row: str) -> Post:
    """A row of the feed. The same row is the same post: this saves taking it apart, and never a look into Redis."""
    post, count, author, thumbhash, latest, caption = row.split("\n", 5)
    try:
        comments = tuple([(comment, writer, text) for comment, writer, text in orjson.loads(latest)])
    except (ValueError, TypeError):  # written by others; `check --repair` writes it again
        comments = ()
    return Post(post, int(count), author, caption, "ready", thumbhash, None, None, comments)


class FeedCursor(NamedTuple):
    """A place in the feed's order: behind a post of this id with so many comments, wherever that post is now."""

    comment_count: int
    id: str


class Page(NamedTuple):
    posts: tuple[Post, ...]
    more: bool
    seen: list[tuple[str, int]]  # first page: epoch and newest revision of each partition, when its rows were read


CREATED, REPLAYED, EXISTING = 0, 1, 2


async def create(
    db: Redis,
    author: str,
    upload: str,
    caption: str,
    idempotency: keys.IdempotencyKey | None = None,
    processing: int = PROCESSING,
) -> tuple[str, int]:
    """Make a post of a finished upload; it lives where the upload does.

    Returns its id and CREATED, REPLAYED if its idempotency key was used before, EXISTING if the upload had become
    this post. Raises Reused, NoUpload, Expired, Incomplete, Empty, and Busy where `processing` posts of the author are
    being processed.
    """
    partition = keys.partition_of_upload(upload)
    post = keys.new_post_id(partition)
    script_keys = [
        keys.upload(upload),
        keys.post(post),
        keys.uploads(partition, author),
        keys.due(partition),
        keys.making(partition, author),
        keys.turns(partition),
    ]
    if idempotency:
        script_keys.append(keys.once(partition, author, idempotency.scoped_key))
    created, outcome = await db.call(
        "create_post",
        script_keys,
        db.clock,
        upload,
        post,
        author,
        caption,
        idempotency.digest if idempotency else "-",
        DAY_MS,
        processing,
        LEASE_MS,
        keys.post_prefix(partition),
    )
    return created, outcome


async def replayed(db: Redis, author: str, partitions: int, idempotency: keys.IdempotencyKey) -> Post | None:
    """The post that a form with this idempotency key made, if it did. Raises NoPost where it was deleted."""
    partition = keys.partition_of_user(author, partitions)
    post = await db.call("read_once", [keys.once(partition, author, idempotency.scoped_key)])
    return await read(db, post) if post else None


async def read(db: Redis, post: str) -> Post:
    """Raises NoPost."""
    return post_from_row(await db.call("read_post", [keys.post(post), keys.comments(post), keys.latest(post)], post))


async def feed(db: Redis, partitions: int, limit: int, after: FeedCursor | None = None) -> Page:
    """A page of the feed, behind a place in its order.

    Each partition answers as many whole rows as the page may need, read at one moment, and they are merged here.
    """
    calls = [_feed_page(db, partition, limit, after) for partition in range(partitions)]
    # Of one partition without `gather`, whose task costs 15 µs: a tenth of a page.
    replies = await asyncio.gather(*calls) if partitions > 1 else [await calls[0]]
    posts, more = _merge(limit, tuple([(reply[2], tuple(reply[3])) for reply in replies]))
    for reply in replies:
        report_skipped(reply, "feed")
    return Page(posts, more, [(reply[0], reply[1]) for reply in replies])


def report_skipped(reply: list, list_name: str) -> None:
    """Log, once each, the members of a list that a script has skipped: the fifth item of its reply."""
    if len(reply) > 4:
        for member in reply[4]:
            if member not in _reported and len(_reported) < MAX_REPORTED:
                _reported.add(member)
                log.warning("%s: %r has no whole post and is skipped; run `imagegram-storage check`", list_name, member)


@lru_cache(CACHED_PAGES)
def _merge(limit: int, replies: tuple[tuple[int, tuple[str, ...]], ...]) -> tuple[tuple[Post, ...], bool]:
    """The page that the partitions' rows make, and whether there is more. The same rows are the same page."""
    pages = [(more, [post_from_line(row) for row in rows]) for more, rows in replies]
    # Where a partition's rows end and it has more, the page ends too: others' next rows may come behind its own.
    ends = {rows[-1].id for more, rows in pages if more}
    posts = []
    for post in merge(*(rows for _, rows in pages), key=lambda post: (post.comment_count, post.id), reverse=True):
        posts.append(post)
        if len(posts) == limit or post.id in ends:
            break
    return tuple(posts), any(more for more, _ in pages) or sum(len(rows) for _, rows in pages) > len(posts)


def _feed_page(db: Redis, partition: int, limit: int, after: FeedCursor | None) -> Awaitable:
    return db.call(
        "feed_page",
        [keys.feed(partition), keys.changes(partition), keys.gone(partition), keys.epoch(partition)],
        *(after or ("", "")),
        limit,
        PAGE_BYTES,
        keys.post_prefix(partition),
        keys.latest_prefix(partition),
    )


async def delete(
    db: Redis, objects: ObjectStore, author: str, post: str, backup_reach_ms: int = DAY_MS, seen: str = ""
) -> None:
    """Delete a post with its comments, and the image that was served; with `seen` only if it is still that Post.

    The outbox erases the original when no backup can name it any more, at the earliest `backup_reach_ms` from now.
    It also erases the image if the store is unavailable now or this process dies.

    Raises NoPost, Forbidden, Precondition.
    """
    partition = keys.partition_of_post(post)
    await db.call(
        "delete_post",
        [
            keys.post(post),
            keys.comments(post),
            keys.latest(post),
            keys.feed(partition),
            keys.changes(partition),
            keys.gone(partition),
            keys.due(partition),
            keys.making(partition, author),
        ],
        db.clock,
        post,
        author,
        backup_reach_ms,
        max(CHANGES_MS, backup_reach_ms + DAY_MS),
        seen,
    )
    with suppress(Unavailable):  # the post is deleted all the same
        await erase_image(objects, post)


async def image(objects: ObjectStore, post: str) -> bytes:
    """The served JPEG. Raises NoPost, or objects.NotFound where there is none (yet)."""
    keys.partition_of_post(post)
    return await objects.get(keys.image(post))


async def has_image(objects: ObjectStore, post: str) -> bool:
    """Whether the served JPEG is stored. Raises Unavailable."""
    try:
        return bool(await objects.size(keys.image(post)))
    except NotFound:
        return False


async def put_image(objects: ObjectStore, post: str, jpeg: bytes) -> None:
    """Store the served JPEG; the same bytes may be put again."""
    await objects.put(keys.image(post), jpeg)


async def erase_image(objects: ObjectStore, post: str) -> None:
    """Nothing is served of this post any more. It may be gone already."""
    await objects.delete([keys.image(post)])
