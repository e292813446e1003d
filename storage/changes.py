"""Posts that changed since a moment. Clients refresh a feed with them for a few bytes, and correct a walk of the feed.

A token says what a client has seen: when the token was issued, and the epoch and the newest revision of each partition.
A revision counts the changes of a partition (docs/keys.md). The epoch names the timeline of its data. A restore begins
a new one, and on a Redis Cluster so does a failover, which may take back what a client has seen. A token of another
timeline is refused.
"""

import asyncio
import re
from collections.abc import Iterable
from typing import NamedTuple

from storage import keys
from storage.db.client import Redis, now_ms
from storage.errors import Outdated
from storage.posts import Post, post_from_row, report_skipped
from storage.settings import CHANGES_MS, HOUR_MS, PAGE_BYTES

TOKEN = re.compile(r"[0-9]{1,8}(,[0-9A-Za-z]+\.[0-9]{1,16})+")


class Token(NamedTuple):
    """What a client has seen of all partitions.

    >>> str(Token(1795456800000, (("0", 1795459390122), ("9f3c21aa", 7))))
    '498738,0.1795459390122,9f3c21aa.7'

    The text is the number of the hour, then epoch and revision of each partition. `parse` reads it.
    """

    issued: int  # ms since 1970, rounded down to the hour. So a page that has not changed keeps its ETag
    seen: tuple[tuple[str, int], ...]  # epoch and revision of each partition

    def __str__(self) -> str:
        return ",".join([str(self.issued // HOUR_MS), *(f"{epoch}.{revision}" for epoch, revision in self.seen)])


class Changes(NamedTuple):
    posts: list[Post | str]  # a post as it is now, or the id of a post that was deleted
    more: bool  # whether more changes follow
    token: Token  # for the next request


def issue(db: Redis, seen: Iterable[tuple[str, int]]) -> Token:
    """A token for the epochs and revisions in `seen`, such as those of `posts.Page`."""
    return Token(now_ms(db) // HOUR_MS * HOUR_MS, tuple((epoch, int(revision)) for epoch, revision in seen))


def parse(text: str) -> Token:
    """The token that `str` made the text from.

    Raises Outdated for any other text: the client must walk the feed again, as with an outdated token.
    """
    # The pattern is strict. int() also accepts signs, spaces and other digits, and `since` accepts any epoch for an
    # empty one.
    if not TOKEN.fullmatch(text):
        raise Outdated("this token was not given by this server; walk the feed again")
    issued, *seen = text.split(",")
    pairs = (pair.split(".") for pair in seen)
    return Token(int(issued) * HOUR_MS, tuple((epoch, int(revision)) for epoch, revision in pairs))


async def since(db: Redis, partitions: int, limit: int, token: Token | None) -> Changes:
    """Up to `limit` posts that changed or were deleted since `token`. Without a token: no posts, and the current token.

    Changes are sorted by partition, because their order means nothing to a client. A partition that the token does not
    contain was added later, and is read from its beginning.

    Raises Outdated where the token is older than CHANGES_MS, has more partitions than `partitions`, or the data was
    restored, or on a Cluster served by another node, after it was issued.
    """
    known = list(token.seen) if token else []
    if token and (token.issued < now_ms(db) - CHANGES_MS or len(known) > partitions):
        raise Outdated("this token is older than 7 days; walk the feed again")
    known += [("", 0 if token else "")] * (partitions - len(known))
    replies = await asyncio.gather(
        *(_page(db, partition, limit, revision) for partition, (_, revision) in enumerate(known))
    )
    posts: list[Post | str] = []
    seen = []
    more = False
    for (epoch, revision), reply in zip(known, replies, strict=True):
        current, newest, rest, rows = reply[:4]
        report_skipped(reply, "changes")
        if epoch not in ("", current):
            raise Outdated("the data was restored since, or another node serves it; walk the feed again")
        if len(posts) + len(rows) > limit:
            seen.append((current, revision))
            more = True
        else:
            posts += [post_from_row(row) if len(row) > 1 else row[0] for row in rows]
            seen.append((current, newest))
            more = more or bool(rest)
    return Changes(posts, more, issue(db, seen))


class Poll(NamedTuple):
    epoch: str
    revision: int  # the newest one
    processed: list[str]  # the posts that are not processing, or do not exist


async def poll(db: Redis, partition: int, posts: list[str]) -> Poll:
    """What has happened in a partition, for those who wait: its newest change, and which of its `posts` were processed.

    Raises Unreachable.
    """
    prefix = keys.post_prefix(partition)
    script_keys = [keys.changes(partition), keys.gone(partition), keys.epoch(partition)]
    epoch, revision, *places = await db.call("poll", script_keys + [prefix + post for post in posts], db.cluster)
    return Poll(epoch, revision, [posts[place - 1] for place in places])


async def _page(db: Redis, partition: int, limit: int, revision: int | str) -> list:
    """The reply of changes_page. With an empty revision there are no changes, and the newest revision."""
    return await db.call(
        "changes_page",
        [keys.changes(partition), keys.gone(partition), keys.epoch(partition)],
        revision,
        limit,
        PAGE_BYTES,
        keys.post_prefix(partition),
        keys.latest_prefix(partition),
        keys.comments_prefix(partition),
        keys.segments_prefix(partition),
        keys.erased_prefix(partition),
        db.cluster,
    )
