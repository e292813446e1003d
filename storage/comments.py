"""Comments of a post: add, read, list, delete."""

from typing import NamedTuple

from storage import keys
from storage.db.client import Redis
from storage.errors import NoComment
from storage.settings import DAY_MS, LATEST_COMMENTS, PAGE_BYTES


class Comment(NamedTuple):
    """A comment as the scripts return it."""

    id: str  # `<ms since 1970>-<number>`, the id of its stream entry
    author: str
    text: str


class Page(NamedTuple):
    comments: list[Comment]  # newest first
    more: bool  # whether older comments follow


async def add(
    db: Redis, author: str, post: str, text: str, idempotency: keys.IdempotencyKey | None = None
) -> tuple[Comment, bool]:
    """Add a comment to a ready post. Returns the comment, and whether its idempotency key was used before.

    Raises Reused where the idempotency key was used for another request, NoPost, NotReady where the post is processing,
    and Failed where its image could not be made.
    """
    script_keys = keys.post_and_lists(post)
    if idempotency:
        script_keys.append(keys.once(keys.partition_of_post(post), author, idempotency.scoped_key))
    digest = idempotency.digest if idempotency else "-"
    comment_id, repeated = await db.call(
        "add_comment", script_keys, db.clock, post, author, text, LATEST_COMMENTS, digest, DAY_MS
    )
    return Comment(comment_id, author, text), bool(repeated)


async def delete(db: Redis, author: str, post: str, comment: str) -> None:
    """Delete a comment of `author`. Raises NoPost, NoComment, and Forbidden where somebody else wrote it."""
    keys.comment_ms(comment)
    await db.call("delete_comment", keys.post_and_lists(post), db.clock, post, comment, author, LATEST_COMMENTS)


async def read(db: Redis, post: str, comment: str) -> Comment:
    """One comment. Raises NoPost, NoComment."""
    keys.comment_ms(comment)
    # `page` returns the comments older than an id. This comment, if it exists, is the newest one before the next id.
    ms, _, sequence = comment.partition("-")
    above = f"{ms}-{int(sequence) + 1}"
    newest = await page(db, post, 1, above)
    if not newest.comments or newest.comments[0].id != comment:
        raise NoComment("no such comment")
    return newest.comments[0]


async def page(db: Redis, post: str, limit: int, before: str = "") -> Page:
    """Up to `limit` comments, newest first: the newest of all, or those older than the comment id `before`.

    A comment with the id `before` need not exist. The page also ends when its texts have PAGE_BYTES. Raises NoPost.
    """
    more, rows = await db.call(
        "comments_page", [keys.post(post), keys.comments(post)], before, limit, PAGE_BYTES
    )
    return Page([Comment(*row) for row in rows], bool(more))
