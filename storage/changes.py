"""What has changed since a moment: the way to refresh a feed for a few bytes, and to make a walk exact.

A token is the moment it was issued, and for each partition its epoch and the newest revision seen. A restore gives
the data a new epoch: a token of the timeline that was lost is then refused.
"""

import asyncio
import re
from typing import NamedTuple

from storage import keys
from storage.db.client import Redis, now_ms
from storage.errors import Outdated
from storage.posts import Post, post_from_row, report_skipped
from storage.settings import CHANGES_MS, HOUR_MS, PAGE_BYTES

TOKEN = re.compile(r"[0-9]{1,8}(,[0-9A-Za-z]+\.[0-9]{1,16})+")


class Token(NamedTuple):
    issued: int  # ms since 1970, a whole hour: a page that did not change keeps its ETag
    seen: tuple[tuple[str, int], ...]  # epoch and revision of each partition

    def __str__(self) -> str:
        return ",".join([str(self.issued // HOUR_MS), *(f"{epoch}.{revision}" for epoch, revision in self.seen)])


class Changes(NamedTuple):
    posts: list[Post | str]  # a post as it is now, or the id of a deleted one
    more: bool
    token: Token


def issue(db: Redis, seen) -> Token:
    return Token(now_ms(db) // HOUR_MS * HOUR_MS, tuple((epoch, int(revision)) for epoch, revision in seen))


def parse(text: str) -> Token:
    """Raises Outdated where it is no token of ours: then only another walk helps, too."""
    # Strictly: int() would take signs, spaces and other digits, and an epoch of nothing would pass for any.
    if not TOKEN.fullmatch(text):
        raise Outdated("this token was not given by this server; walk the feed again")
    issued, *seen = text.split(",")
    pairs = (pair.split(".") for pair in seen)
    return Token(int(issued) * HOUR_MS, tuple((epoch, int(revision)) for epoch, revision in pairs))


async def since(db: Redis, partitions: int, limit: int, token: Token | None) -> Changes:
    """Up to `limit` posts that changed or were deleted after `token`; without one, none and the current token.

    Partitions are told one after the other: the order of changes means nothing to a client. A partition that is
    newer than the token is told from its beginning. Raises Outdated.
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
            raise Outdated("the data was restored since; walk the feed again")
        if len(posts) + len(rows) > limit:
            seen.append((current, revision))
            more = True
        else:
            posts += [post_from_row(row) if len(row) > 1 else row[0] for row in rows]
            seen.append((current, newest))
            more = more or bool(rest)
    return Changes(posts, more, issue(db, seen))


async def _page(db: Redis, partition: int, limit: int, revision: int | str):
    return await db.call(
        "changes_page",
        [keys.changes(partition), keys.gone(partition), keys.epoch(partition)],
        revision,
        limit,
        PAGE_BYTES,
        keys.post_prefix(partition),
        keys.latest_prefix(partition),
        keys.comments_prefix(partition),
    )
