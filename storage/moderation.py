"""`imagegram-storage show`, `hide`, `unhide` and `delete`: one post or comment, for an operator.

An id is the one of a post, or of a comment as `POST/COMMENT`. Every command may be repeated.
"""

from bisect import bisect_left

from storage import comments, keys, posts, sealing
from storage.comments import Comment
from storage.db.client import Redis
from storage.errors import NoComment
from storage.objects import NotFound, ObjectStore, Unavailable
from storage.outbox import make_again
from storage.posts import Inspected, inspect
from storage.segments import Segments
from storage.times import format_ms

SHOWN_SEGMENTS = 20  # of a post, the newest


async def show(db: Redis, objects: ObjectStore, segments: Segments, post: str, comment: str = "") -> dict[str, object]:
    """All that is known of a post or of one of its comments, hidden or not. Raises NoPost, NoComment, Unavailable."""
    row = await inspect(db, post)
    if comment:
        return await _show_comment(db, segments, row, comment)
    kept = await comments.kept(db, post)
    known = dict(row.fields)
    image = posts.Image.parse(known.get("thumbhash")) or posts.Image("")
    entries, erased = await sealing.read_segments(db, post)
    names = [row.key(), keys.comments(post), keys.latest(post), *([keys.kept(post)] if kept else [])]
    names += [*([keys.segments(post)] if entries else []), *([keys.erased(post)] if erased else [])]
    return {
        "post": post,
        "status": known.pop("status", None),
        "hidden_at": format_ms(int(known.pop("hidden_at"))) if row.hidden else None,
        "author": known.pop("author", None),
        "created_at": format_ms(keys.created_ms(post)),
        "caption": known.pop("caption", None),
        "comment_count": row.comment_count,
        "comments_in_redis": row.hot_count,
        "comments_in_store": row.comment_count - row.hot_count,
        "erased_comments": row.erased_count,
        "segments": len(entries),
        "newest_segments": _newest_segments(post, entries),
        "hidden_comments": [key for key, value in kept.items() if not isinstance(value, str)],
        "score_in_feed": row.score,
        "last_change": row.revision,
        "original": await _object(objects, keys.original(post)),
        "image": await _object(objects, keys.image(post, image.version)),
        "other_fields": known,
        "keys": names,
    }


def _newest_segments(post: str, entries: list[str]) -> list[dict[str, object]]:
    """The newest segments and how many comments each has, with the erased ones. The newest is first."""
    parsed = [sealing.Entry("", 0, keys.NO_SEGMENT), *map(sealing.Entry.parse, entries)]
    return [
        {"comments": entry.through - older.through, "object": _segment(post, entry)}
        for older, entry in zip(parsed[-2::-1], parsed[:0:-1], strict=True)
    ][:SHOWN_SEGMENTS]


def _segment(post: str, entry: sealing.Entry) -> str | None:
    return None if entry.name == keys.NO_SEGMENT else keys.segment(post, entry.name)


async def _object(objects: ObjectStore, name: str) -> dict[str, object]:
    try:
        return {"object": name, "bytes": await objects.size(name)}
    except NotFound:
        return {"object": name, "bytes": None}


async def _show_comment(db: Redis, segments: Segments, row: Inspected, comment: str) -> dict[str, object]:
    found, hidden = await _find(db, segments, row, comment)
    entries, _ = await sealing.read_segments(db, row.id)
    parsed = [sealing.Entry.parse(entry) for entry in entries]
    place = bisect_left(parsed, keys.order(comment), key=lambda entry: keys.order(entry.last))
    sealed = not hidden and place < len(parsed)
    return {
        "post": row.id,
        "comment": found.id,
        "hidden": hidden,
        "author": found.author,
        "created_at": format_ms(keys.comment_ms(found.id)),
        "text": found.text,
        "object": _segment(row.id, parsed[place]) if sealed else None,
        "keys": [keys.kept(row.id) if hidden else (keys.segments if sealed else keys.comments)(row.id)],
    }


async def _find(db: Redis, segments: Segments, row: Inspected, comment: str) -> tuple[Comment, bool]:
    """A comment, and whether it is hidden. Raises NoComment."""
    try:
        return await comments.read(db, segments, row.id, comment, row.hidden), False
    except NoComment:
        kept = (await comments.kept(db, row.id)).get(comment)
        if isinstance(kept, str):
            raise NoComment(f"this comment was shown again as {kept}") from None
        if not kept:
            raise
        return kept, True


async def hide(db: Redis, objects: ObjectStore, segments: Segments, post: str, comment: str = "") -> str:
    """Hide a post or a comment. Returns a sentence for the operator. Raises NoPost, NoComment, Unavailable."""
    if comment:
        changed = await comments.hide(db, segments, await inspect(db, post), comment)
        return "the comment is hidden" if changed else "the comment was hidden before"
    changed = await posts.hide(db, post)
    try:
        await posts.erase_image(objects, post)
    except Unavailable as error:
        raise Unavailable(f"the post is hidden, but its picture is served until a worker erases it: {error}") from error
    await make_again(db, post)  # unless somebody has shown it again meanwhile, this does nothing
    return "the post is hidden" if changed else "the post was hidden before"


async def unhide(db: Redis, segments: Segments, post: str, comment: str = "") -> str:
    """Show a hidden post or comment again. Returns a sentence for the operator. Raises NoPost, NoComment."""
    if comment:
        return f"the comment is shown as {post}/{await comments.unhide(db, segments, await inspect(db, post), comment)}"
    changed = await posts.unhide(db, post)
    return "the post is shown again; a worker makes its picture" if changed else "the post was not hidden"


async def delete(
    db: Redis, objects: ObjectStore, segments: Segments, post: str, comment: str, backup_reach_ms: int
) -> str:
    """Delete a post in any status or a comment, as its author would. Returns a sentence for the operator.

    Raises NoPost, NoComment.
    """
    row = await inspect(db, post)
    if comment:
        found, _ = await _find(db, segments, row, comment)
        await comments.remove(db, segments, row, found)
        return "the comment is deleted"
    await delete_post(db, objects, row, backup_reach_ms)
    return "the post is deleted; its original is erased when no backup names it any more"


async def delete_post(db: Redis, objects: ObjectStore, row: Inspected, backup_reach_ms: int) -> None:
    """Delete a post in any status, hidden or not. Raises NoPost."""
    author = row.fields.get("author", "")
    await posts.delete(db, objects, author, row.id, backup_reach_ms, hidden=row.hidden)


def render(known: dict[str, object]) -> str:
    """What `show` returns as lines for people. Characters that a terminal might obey are escaped."""
    lines = []
    for name, value in known.items():
        pairs = value.items() if isinstance(value, dict) else [("", value)]
        if isinstance(value, list) and value and isinstance(value[0], dict):  # a line for each
            pairs = [("", list(item.values())) for item in value]
        for inner, part in pairs:
            items = part if isinstance(part, list) else [part]
            text = " ".join("-" if item is None else printable(str(item)) for item in items) or "-"
            lines.append(f"{f'{name}.{inner}' if inner else name:<22}  {text}")
    return "\n".join(lines)


def printable(text: str) -> str:
    """The text with all that cannot be printed as an escape sequence of Python.

    >>> printable("a" + chr(27) + "[2J")
    'a\\\\x1b[2J'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
