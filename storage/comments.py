"""Comments of a post: added, read, listed, deleted."""

from typing import NamedTuple

from storage import keys
from storage.db.client import Redis
from storage.errors import NoComment
from storage.settings import DAY_MS, LATEST_COMMENTS, PAGE_BYTES


class Comment(NamedTuple):
    """A row as scripts return it."""

    id: str
    author: str
    text: str


class Page(NamedTuple):
    comments: list[Comment]
    more: bool


def _script_keys(post: str) -> list[str]:
    partition = keys.partition_of_post(post)
    return [
        keys.post(post),
        keys.comments(post),
        keys.latest(post),
        keys.feed(partition),
        keys.changes(partition),
        keys.gone(partition),
    ]


async def add(
    db: Redis, author: str, post: str, text: str, idempotency: keys.IdempotencyKey | None = None
) -> tuple[Comment, bool]:
    """Add a comment. Returns it, and whether its idempotency key was used before.

    Raises Reused, NoPost, NotReady, Failed.
    """
    script_keys = _script_keys(post)
    if idempotency:
        script_keys.append(keys.once(keys.partition_of_post(post), author, idempotency.scoped_key))
    digest = idempotency.digest if idempotency else "-"
    comment_id, repeated = await db.call(
        "add_comment", script_keys, db.clock, post, author, text, LATEST_COMMENTS, digest, DAY_MS
    )
    return Comment(comment_id, author, text), bool(repeated)


async def delete(db: Redis, author: str, post: str, comment: str) -> None:
    """Raises NoPost, NoComment, Forbidden."""
    keys.comment_ms(comment)
    await db.call("delete_comment", _script_keys(post), db.clock, post, comment, author, LATEST_COMMENTS)


async def read(db: Redis, post: str, comment: str) -> Comment:
    """Raises NoPost, NoComment."""
    keys.comment_ms(comment)
    # The page that begins just above the comment has it as its first row, if it is there.
    ms, _, sequence = comment.partition("-")
    above = f"{ms}-{int(sequence) + 1}"
    newest = await page(db, post, 1, above)
    if not newest.comments or newest.comments[0].id != comment:
        raise NoComment("no such comment")
    return newest.comments[0]


async def page(db: Redis, post: str, limit: int, before: str = "") -> Page:
    """The newest comments, or those older than the comment id `before`, which need not exist. Raises NoPost."""
    more, rows = await db.call(
        "comments_page", [keys.post(post), keys.comments(post)], before, limit, PAGE_BYTES
    )
    return Page([Comment(*row) for row in rows], bool(more))
