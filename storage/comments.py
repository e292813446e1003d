"""Comments of a post: add, read, list, hide, delete."""

from typing import NamedTuple

import orjson

from storage import keys
from storage.db.client import Redis
from storage.errors import NoComment
from storage.limits import Entry
from storage.posts import Inspected
from storage.segments import Comment
from storage.settings import DAY_MS, LATEST_COMMENTS, PAGE_BYTES


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
) -> tuple[Comment, bool]:
    """Add a comment to a ready post. Returns the comment, and whether its idempotency key was used before.

    `limit` is of the post's partition. Only a new comment that can be added takes from it, and decides it. If the limit
    does not allow it, no comment is added, and the one that is returned has no id.

    Raises Reused where the idempotency key was used for another request, NoPost, NotReady where the post is processing,
    and Failed where its image could not be made.
    """
    script_keys = keys.post_and_lists(post)
    args = [db.clock, post, author, text, LATEST_COMMENTS, idempotency.digest if idempotency else "-", DAY_MS]
    if idempotency:
        script_keys.append(keys.once(keys.partition_of_post(post), author, idempotency.scoped_key))
    if limit:
        script_keys.append(limit.charge.key)
        args += limit.charge.limit.quota, limit.charge.window_ms
    comment_id, repeated, *decision = await db.call("add_comment", script_keys, *args)
    if limit and decision:
        limit.decide(*decision)
    return Comment(comment_id, author, text), bool(repeated)


async def delete(db: Redis, author: str, post: str, comment: str) -> None:
    """Delete a comment of `author`. Raises NoPost, NoComment, and Forbidden where somebody else wrote it."""
    keys.comment_ms(comment)
    await db.call("delete_comment", keys.post_and_lists(post), db.clock, post, comment, author, LATEST_COMMENTS)


async def hide(db: Redis, post: Inspected, comment: str) -> bool:
    """Take a comment away from its post and keep a copy, for an operator. The post may be hidden.

    Returns whether it was shown before. Raises NoPost, NoComment.
    """
    keys.comment_ms(comment)
    return bool(await db.call("hide_comment", _all_keys(post), db.clock, post.id, comment, LATEST_COMMENTS))


async def unhide(db: Redis, post: Inspected, comment: str) -> str:
    """Add a hidden comment to its post again, as the newest one. Returns the id that it has now.

    The same call again returns the same id. Raises NoPost, NoComment.
    """
    keys.comment_ms(comment)
    return await db.call("unhide_comment", _all_keys(post), db.clock, post.id, comment, LATEST_COMMENTS)


async def kept(db: Redis, post: str) -> dict[str, Comment | str]:
    """The comments of a post that were hidden, by their ids. A comment that was unhidden has only its new id."""
    rows = await db.call("read_kept", [keys.kept(post)])
    found = zip(rows[::2], rows[1::2], strict=True)
    return {key: Comment(key, *orjson.loads(value)) if value.startswith("[") else value for key, value in found}


async def remove(db: Redis, post: Inspected, comment: Comment) -> None:
    """Delete a comment for an operator, hidden or not. The post may be hidden too. Raises NoPost, NoComment."""
    await db.call(
        "delete_comment", _all_keys(post), db.clock, post.id, comment.id, comment.author, LATEST_COMMENTS
    )


def _all_keys(post: Inspected) -> list[str]:
    """The keys of a post, hidden or not, of its lists, and of its hidden comments."""
    return [post.key(), *keys.post_and_lists(post.id)[1:], keys.kept(post.id)]


async def read(db: Redis, post: str, comment: str, hidden: bool = False) -> Comment:
    """One comment. `hidden` says that the post is hidden. Raises NoPost, NoComment."""
    keys.comment_ms(comment)
    # `page` returns the comments older than an id. This comment, if it exists, is the newest one before the next id.
    ms, _, sequence = comment.partition("-")
    above = f"{ms}-{int(sequence) + 1}"
    newest = await page(db, post, 1, above, hidden)
    if not newest.comments or newest.comments[0].id != comment:
        raise NoComment("no such comment")
    return newest.comments[0]


async def page(db: Redis, post: str, limit: int, before: str = "", hidden: bool = False) -> Page:
    """Up to `limit` comments, newest first: the newest of all, or those older than the comment id `before`.

    A comment with the id `before` need not exist. The page also ends when its texts have PAGE_BYTES. `hidden` says that
    the post is hidden: only an operator reads its comments then. Raises NoPost.
    """
    script_keys = [keys.hidden(post) if hidden else keys.post(post), keys.comments(post)]
    more, rows = await db.call("comments_page", script_keys, before, limit, PAGE_BYTES)
    return Page([Comment(*row) for row in rows], bool(more))
