"""Posts: create, read, list as a feed, delete; and their served images."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Iterable
from contextlib import suppress
from functools import lru_cache
from heapq import merge
from typing import NamedTuple

import orjson

from storage import keys, metrics, traces
from storage.db.client import Redis
from storage.errors import Unreachable
from storage.objects import NotFound, ObjectStore, Unavailable
from storage.settings import CHANGES_MS, DAY_MS, LEAF_ENTRIES, LEASE_MS, LOOKED_POSTS, PAGE_BYTES, PROCESSING

CACHED_PAGES = 128  # parsed pages of the feed: 1 MB, or 32 MB where all of them have PAGE_BYTES
CACHED_ROWS = 2048  # parsed rows of the feed: 3 MB, or 60 MB where all captions and comments are as long as allowed
# Rows that a node returns beyond its share of a feed page, and posts that it looks at in each partition beyond that
# partition's share. So few pages need a second round. More of them would cost more than these rounds.
MORE_ROWS = 3
CACHED_GROUPS = 256  # groups of partitions that are on one node
HINTED = 16  # partitions up to which a cursor has their ranks, of some 4 characters each
MAX_REPORTED = 1000  # skipped members that one process logs. That is enough to see what is wrong

NUMBER = re.compile("[1-9][0-9]{0,8}")  # of an image: one that has more digits could not be JSON

STATUSES = ("processing", "ready", "failed")

log = logging.getLogger("imagegram.posts")
_reported: set[str] = set()


class Image(NamedTuple):
    """What a ready post says of its JPEG.

    All of it is one field of the post's hash, `thumbhash`. A field more would take 5 % more of Redis' time for a page
    of the feed.
    """

    thumbhash: str  # base64
    # So many bytes from the beginning of the JPEG show the whole picture, each better than the one before. The last is
    # the JPEG's length. Empty: a version of this software that did not know the scans has made the JPEG.
    scans: tuple[int, ...] = ()
    version: int = 1  # of the JPEG's address: other bytes get another one

    @classmethod
    def parse(cls, field: str | None) -> "Image | None":
        """An image from a field that `field` wrote, or an older version, which had the thumbhash only.

        >>> Image.parse("1RcK 1 4712 13001 33721")
        Image(thumbhash='1RcK', scans=(4712, 13001, 33721), version=1)
        >>> Image.parse("1RcK")
        Image(thumbhash='1RcK', scans=(), version=1)
        """
        if field is None:
            return None
        thumbhash, _, rest = field.partition(" ")
        numbers = [int(word) for word in rest.split(" ") if NUMBER.fullmatch(word)]  # a foreign client wrote the others
        return cls(thumbhash, tuple(numbers[1:]), max([1, *numbers[:1]]))

    def field(self) -> str:
        """
        >>> Image("1RcK", (4712, 13001, 33721)).field()
        '1RcK 1 4712 13001 33721'
        """
        return " ".join(map(str, [self.thumbhash, self.version, *self.scans]))


class Post(NamedTuple):
    """A post as the scripts return it."""

    id: str
    comment_count: int
    author: str
    caption: str
    status: str  # processing, ready or failed
    image: Image | None  # only of a ready post
    code: str | None  # why its image could not be made, as one word; only of a failed post
    detail: str | None  # the same as a sentence
    latest: tuple[tuple[str, str, str], ...]  # id, author and text of the newest comments, newest first

    def seen(self) -> str:
        """The version of the post that this row shows, for `delete`. What readers see changes only together with it.

        >>> Post("01JD…-0", 1, "alice", "Hi", "ready", None, None, None, (("1795459390122-0", "bob", "Where?"),)).seen()
        'ready 1 1795459390122-0'
        """
        return f"{self.status} {self.comment_count} {self.latest[0][0] if self.latest else '-'}"


def post_from_row(row: list) -> Post:
    """A post from a row of user_page or changes_page, or of read_post for one that is not ready."""
    post, count, author, caption, status, image, code, detail, latest = row
    comments = tuple(tuple(orjson.loads(entry)) for entry in latest)
    return Post(post, count, author, caption, status, Image.parse(image), code, detail, comments)


def parse_line(row: str) -> Post:
    """A post from a row of feed_page or read_post: six lines, of which the last, the caption, may contain newlines."""
    post, count, author, image, latest, caption = row.split("\n", 5)
    try:
        comments = tuple([(comment, writer, text) for comment, writer, text in orjson.loads(latest)])
    except (ValueError, TypeError):  # a foreign client wrote it; `check --repair` repairs it
        comments = ()
    return Post(post, int(count), author, caption, "ready", Image.parse(image), None, None, comments)


post_from_line = lru_cache(CACHED_ROWS)(parse_line)  # the cache saves parsing a row again, never a call to Redis


class Inspected(NamedTuple):
    """All that Redis knows of a post, hidden or not. Times are in ms since 1970; None: the post does not have it."""

    id: str
    hidden: bool
    comment_count: int
    hot_count: int  # comments in Redis; the others are in segments in the store
    erased_count: int  # comments that were deleted and are still in a segment
    kept_count: int  # comments that were hidden, with those that were unhidden again
    score: int | None  # in the feed
    revision: int | None  # in the changes
    gone: int | None  # its revision among the deletions, where a post that was ready goes when it is hidden
    due: int | None  # when the outbox has work with it
    fields: dict[str, str]  # of its hash

    def has_image(self) -> bool:
        """Whether its JPEG is served, or is to be made."""
        return not self.hidden and self.fields.get("status") in ("ready", "processing")

    def hidden_at(self) -> int:
        """When it was hidden, in ms since 1970. 0: it is not hidden."""
        return int(self.fields.get("hidden_at", 0))

    def key(self) -> str:
        """The key of its hash."""
        return keys.hidden(self.id) if self.hidden else keys.post(self.id)


class FeedCursor(NamedTuple):
    """A position in the feed: after a post with this number of comments and this id.

    The post need not be there any more. Posts are in descending order of comment count, then of id.
    """

    comment_count: int
    id: str
    # In each partition the rank of the first post behind, as it was when the cursor was made. A hint: a wrong one costs
    # only time. Empty: unknown.
    ranks: tuple[int, ...] = ()


FIRST = ("", "", ())  # what a call for the first page has in place of a cursor


class Page(NamedTuple):
    posts: tuple[Post, ...]
    more: bool  # whether more posts follow
    # Timeline and newest revision of each partition when its rows were read, for `changes.issue`. Only of the first
    # page.
    seen: list[tuple[str, int]]
    ranks: tuple[int, ...]  # of the first post in each partition, for `ranks_behind`. Empty with over HINTED partitions


def ranks_behind(ranks: tuple[int, ...], posts: Iterable[Post]) -> tuple[int, ...]:
    """The ranks for a cursor behind `posts`, with which a page begins. `ranks` are those of the page."""
    if not ranks:
        return ()
    found = list(ranks)
    for post in posts:
        found[keys.partition_of_post(post.id)] += 1
    return tuple(found)


class UserPage(NamedTuple):
    posts: tuple[Post, ...]
    # The id of a post, behind which the next page begins. Empty: no more posts follow. A page may have no posts and
    # still be followed by others, because each call looks at LOOKED_POSTS in each partition at most.
    next: str


# What `create` has done: created a post; found the post of the same idempotency key; found the post of the same upload.
CREATED, REPLAYED, EXISTING = 0, 1, 2


async def create(
    db: Redis,
    author: str,
    upload: str,
    caption: str,
    idempotency: keys.IdempotencyKey | None = None,
    processing: int = PROCESSING,
) -> tuple[str, int]:
    """Create a post from a complete upload, in the upload's partition.

    Returns the post's id, and CREATED, REPLAYED (the idempotency key was used before) or EXISTING (the upload had
    become this post before).

    Raises Reused where the idempotency key was used for another request, NoUpload where the upload does not exist or is
    somebody else's, Expired, Incomplete where bytes are missing, Empty, and Busy where `processing` posts of the author
    are being processed.
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
        keys.leaves(partition),
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
        traces.traceparent(),
        keys.entry(author, post),
        keys.leaf_prefix(partition),
        LEAF_ENTRIES,
    )
    if outcome == CREATED:
        metrics.FINISHED.add()
    return created, outcome


async def replayed(db: Redis, author: str, partitions: int, idempotency: keys.IdempotencyKey) -> Post | None:
    """The post that a form with this idempotency key created, or None. Raises NoPost where that post was deleted."""
    partition = keys.partition_of_user(author, partitions)
    post = await db.call("read_once", [keys.once(partition, author, idempotency.scoped_key)])
    return await read(db, post) if post else None


async def read(db: Redis, post: str) -> Post:
    """A post of any status. Raises NoPost."""
    row = await read_row(db, post)
    return parse_line(row) if isinstance(row, str) else post_from_row(row)


def read_row(db: Redis, post: str) -> Awaitable[str | list]:
    """A post of any status: for `parse_line` if it is ready, otherwise for `post_from_row`. Raises NoPost."""
    return db.call("read_post", keys.post_and_comments(post), post)


async def feed(db: Redis, partitions: int, limit: int, after: FeedCursor | None = None) -> Page:
    """A page of up to `limit` posts of the feed, after a cursor or from the start.

    Each node returns its share of the page and a few rows more, and they are merged here. Where the rows of a node do
    not suffice, it is asked again. The page also ends where its rows have PAGE_BYTES.
    """
    groups = await db.groups(partitions)
    try:
        return await _merged_feed(db, groups, limit, after)
    except Unreachable as error:
        if not error.moved:
            raise
        return await _merged_feed(db, [(partition,) for partition in range(partitions)], limit, after)


async def _merged_feed(db: Redis, groups: list[tuple[int, ...]], limit: int, after: FeedCursor | None) -> Page:
    """A page of the feed, from groups of partitions that are each on one node. Raises Unreachable."""
    if len(groups) == 1:  # without what several groups need, which takes 5 µs, and a task of `gather`, which takes 15
        reply = await _feed_page(db, groups[0], limit, after)
        report_skipped(reply, "feed", place=3)
        posts, more, _ = _merge(limit, ((reply[0], tuple(reply[1])),))
        return _page(posts, more, after, reply[2])
    share = -(-limit // len(groups)) + MORE_ROWS
    replies = await asyncio.gather(*(_feed_page(db, group, share, after) for group in groups))
    for reply in replies:
        report_skipped(reply, "feed", place=3)
    parts = [(reply[0], tuple(reply[1])) for reply in replies]
    full = [len(reply[1]) == share for reply in replies]  # the others end by their bytes, or have no more rows
    posts, more, short = _merge(limit, tuple(parts))
    while short is not None and full[short] and sum(len(row) for _, rows in parts for row in rows) < PAGE_BYTES:
        rows = parts[short][1]
        last = post_from_line(rows[-1])
        reply = await _feed_page(db, groups[short], share, FeedCursor(last.comment_count, last.id))
        report_skipped(reply, "feed", place=3)
        # A post whose comment was just deleted may come again.
        known = {row.partition("\n")[0] for row in rows}
        parts[short] = reply[0], rows + tuple(row for row in reply[1] if row.partition("\n")[0] not in known)
        full[short] = len(reply[1]) == share
        posts, more, short = _merge(limit, tuple(parts))
    width = 1 if after else 2  # values for each partition
    found = {}
    for group, reply in zip(groups, replies, strict=True):
        found |= {partition: reply[2][width * at : width * (at + 1)] for at, partition in enumerate(group)}
    return _page(posts, more, after, [value for partition in sorted(found) for value in found[partition]])


def _page(posts: tuple[Post, ...], more: bool, after: FeedCursor | None, state: list) -> Page:
    """`state` is what feed_page returns of all partitions, in their order."""
    if after:
        return Page(posts, more, [], tuple(state) if len(state) <= HINTED else ())
    seen = list(zip(state[::2], state[1::2], strict=True))
    return Page(posts, more, seen, (0,) * len(seen) if len(seen) <= HINTED else ())


async def of_user(
    db: Redis, partitions: int, user: str, statuses: Iterable[str], limit: int, after: str = ""
) -> UserPage:
    """Up to `limit` posts of a user in one of `statuses`, newest first, behind the post id `after`.

    The page also ends where its captions and comments have PAGE_BYTES.
    """
    calls = [_user_page(db, partition, user, statuses, limit, after) for partition in range(partitions)]
    replies = await asyncio.gather(*calls)
    for reply in replies:
        report_skipped(reply, "posts of a user", place=2)
    # A partition that has more rows is complete down to this post only. The page ends there: between this post and the
    # partition's next row, only the other partitions are known.
    through = max(reply[0] for reply in replies)
    rows = [post_from_row(row) for reply in replies for row in reply[1] if row[0] >= through]
    rows.sort(key=lambda row: row.id, reverse=True)
    return UserPage(tuple(rows[:limit]), rows[limit - 1].id if len(rows) > limit else through)


async def _user_page(db: Redis, partition: int, user: str, statuses: Iterable[str], limit: int, after: str) -> list:
    """The reply of user_page."""
    return await db.call(
        "user_page",
        [keys.leaves(partition)],
        user,
        keys.entry_prefix(user),
        after,
        f" {' '.join(statuses)} ",
        limit,
        PAGE_BYTES,
        LOOKED_POSTS,
        keys.leaf_prefix(partition),
        keys.post_prefix(partition),
        keys.latest_prefix(partition),
        keys.comments_prefix(partition),
        keys.segments_prefix(partition),
        keys.erased_prefix(partition),
    )


def report_skipped(reply: list, list_name: str, place: int = 4) -> None:
    """Log the members of a list that a script has skipped, each once. They are at `place` of the reply, if any."""
    if len(reply) > place:
        for member in reply[place]:
            if member not in _reported and len(_reported) < MAX_REPORTED:
                _reported.add(member)
                log.warning("%s: %r has no whole post and is skipped; run `imagegram-storage check`", list_name, member)


@lru_cache(CACHED_PAGES)
def _merge(
    limit: int, parts: tuple[tuple[int, tuple[str, ...]], ...]
) -> tuple[tuple[Post, ...], bool, int | None]:
    """The posts of a page from the rows of all parts, and whether more posts follow. The cache saves merging.

    Third, the part that has more rows, but none of them here, where the page would still have room. The page ends
    there: this part's next row may come before the next row of any other one.
    """
    pages = [(more, [post_from_line(row) for row in rows]) for more, rows in parts]
    ends = {rows[-1].id: part for part, (more, rows) in enumerate(pages) if more and rows}
    posts = []
    for post in merge(*(rows for _, rows in pages), key=lambda post: (post.comment_count, post.id), reverse=True):
        posts.append(post)
        if len(posts) == limit or post.id in ends:
            break
    more = any(more for more, _ in pages) or sum(len(rows) for _, rows in pages) > len(posts)
    return tuple(posts), more, ends.get(posts[-1].id) if posts and len(posts) < limit else None


def _feed_page(db: Redis, group: tuple[int, ...], limit: int, after: FeedCursor | None) -> Awaitable:
    share = limit + 1 if len(group) == 1 else min(limit, -(-limit // len(group)) + MORE_ROWS)
    count, post, ranks = after or FIRST
    # The number of partitions may have changed since the cursor was made.
    hints = " ".join([str(ranks[partition]) for partition in group]) if len(ranks) > group[-1] else ""
    names = feed_names(group)
    return db.call("feed_page", [keys.feed(group[0])], count, post, limit, PAGE_BYTES, share, db.cluster, hints, *names)


@lru_cache(CACHED_GROUPS)
def feed_names(group: tuple[int, ...]) -> list[str]:
    """The names of what feed_page reads of each partition."""
    names = []
    for partition in group:
        names += [keys.feed(partition), keys.changes(partition), keys.gone(partition), keys.epoch(partition)]
        names += [keys.post_prefix(partition), keys.latest_prefix(partition)]
    return names


async def inspect(db: Redis, post: str) -> Inspected:
    """All that Redis knows of a post, hidden or not, for an operator. Raises NoPost."""
    script_keys = _keys_with_hidden(post, *_comment_keys(post), keys.kept(post))
    hidden, comments, hot, erased, kept, *times, fields = await db.call("show_post", script_keys, post)
    numbers = [None if value is None else int(float(value)) for value in times]
    pairs = dict(zip(fields[::2], fields[1::2], strict=True))
    return Inspected(post, bool(hidden), comments, hot, erased, kept, *numbers, pairs)


async def hide(db: Redis, post: str) -> bool:
    """Hide a post in any status: for everybody it does not exist, until `unhide`. Nothing of it is lost.

    Returns whether it was shown before. The outbox erases its JPEG. Raises NoPost.
    """
    making = keys.making_prefix(keys.partition_of_post(post))
    return bool(await db.call("hide_post", _keys_with_hidden(post), db.clock, post, making))


async def unhide(db: Redis, post: str) -> bool:
    """Show a hidden post again, with its comments and its place in the feed. A worker makes its JPEG again.

    Returns whether it was hidden before. Raises NoPost.
    """
    return bool(await db.call("unhide_post", _keys_with_hidden(post, *_comment_keys(post)), db.clock, post))


def _keys_with_hidden(post: str, *others: str) -> list[str]:
    """The keys of a post, shown and hidden, then `others`, then the lists of its partition that may have it."""
    named, *_, feed, changes, gone = keys.post_and_lists(post)
    return [named, keys.hidden(post), *others, feed, changes, gone, keys.due(keys.partition_of_post(post))]


def _comment_keys(post: str) -> list[str]:
    return [keys.comments(post), keys.segments(post), keys.erased(post)]


async def delete(
    db: Redis,
    objects: ObjectStore,
    author: str,
    post: str,
    backup_reach_ms: int = DAY_MS,
    seen: str = "",
    hidden: bool = False,
) -> None:
    """Delete a post with its comments and its served image.

    With `seen` (see `Post.seen`) the post is deleted only if it has not changed since. `hidden` says that it is hidden:
    its author cannot delete it then, only an operator. The outbox erases the original once no kept backup can name it
    any more, `backup_reach_ms` from now at the earliest. It also erases the image if the store is unavailable now or
    this process dies.

    Raises NoPost, Forbidden where somebody else created it, and Precondition where the post has changed since `seen`.
    """
    partition = keys.partition_of_post(post)
    named, *lists = keys.post_and_lists(post)
    await db.call(
        "delete_post",
        [
            keys.hidden(post) if hidden else named,
            *lists,
            keys.sealing(partition),
            keys.due(partition),
            keys.making(partition, author),
            keys.kept(post),
            keys.leaves(partition),
            keys.retired(partition),
        ],
        db.clock,
        post,
        author,
        backup_reach_ms,
        max(CHANGES_MS, backup_reach_ms + DAY_MS),
        seen,
        keys.entry(author, post),
        keys.leaf_prefix(partition),
    )
    with suppress(Unavailable):  # the post is deleted in any case, and the outbox erases the image
        await erase_image(objects, post)


async def image(objects: ObjectStore, post: str, version: int = 1) -> bytes:
    """The served JPEG of a post. Raises NoPost for a malformed id, objects.NotFound where it has none, Unavailable."""
    keys.partition_of_post(post)
    return await objects.get(keys.image(post, version))


async def has_image(objects: ObjectStore, post: str, version: int = 1) -> bool:
    """Whether a post's served JPEG is stored and not empty. Raises Unavailable."""
    try:
        return bool(await objects.size(keys.image(post, version)))
    except NotFound:
        return False


async def next_version(db: Redis, post: str) -> int:
    """The version of the address that a JPEG gets which is made now. Raises NoPost.

    The same encoder makes the same bytes again. One that knew no scans made other bytes: they keep their address.
    """
    image = (await read(db, post)).image or Image("", (1,))
    return image.version if image.scans else keys.IMAGE_VERSIONS


async def put_image(objects: ObjectStore, post: str, jpeg: bytes, version: int = 1) -> None:
    """Store a post's served JPEG, or replace it. Raises Unavailable, Full."""
    await objects.put(keys.image(post, version), jpeg)


async def erase_image(objects: ObjectStore, post: str) -> None:
    """Erase a post's served JPEG under all its addresses. It may be missing already. Raises Unavailable."""
    await objects.delete(keys.images(post))
