"""Renders storage's rows as the contract's JSON: posts, comments, uploads and pages of lists."""

from base64 import urlsafe_b64encode
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache

import orjson

from api.answers import VARY, Answer, FastResponse, encode_head
from storage import keys
from storage.comments import Comment
from storage.posts import Post, parse_line, ranks_behind
from storage.settings import PAGE_BYTES
from storage.uploads import OpenUpload

CREATED = encode_head(201, {"Content-Type": "application/json"})
SIDE = 600  # pixels of the served image
# Caches of rendered JSON. They save rendering, never a call to Redis: the same rows always give the same bytes.
CACHED_PAGES = 128  # 1 MB, and 32 MB if all are as long as a page may be
CACHED_ITEMS = 2048  # posts in lists: 3 MB, and at most 10 MB
CACHED_CHARACTERS = 500  # of caption and comments. A longer post is not cached, which bounds the memory
CACHED_POSTS = 12_288  # answers with one post: 20 MB, 50 MB with all compressed forms, and at most 150 MB
CACHED_LINE = 800  # characters of its row


def created(body: dict, location: str, replayed: bool = False) -> FastResponse:
    """201. A repeated request gets the same answer with `Idempotent-Replayed: true`."""
    response = FastResponse(CREATED, 201, orjson.dumps(body))
    response.headers["Location"] = location  # not encoded, so that api.access can read it
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return response


def timestamp(ms: int) -> str:
    """A time in ms since 1970 as RFC 3339, in UTC with milliseconds.

    >>> timestamp(1_732_000_000_123)
    '2024-11-19T07:06:40.123Z'
    """
    seconds, rest = divmod(ms, 1000)
    return f"{_second(seconds)}.{rest:03}Z"


@lru_cache(1024)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()[:-6]


def comment(row: Comment) -> dict:
    return {"id": row.id, "author": row.author, "text": row.text, "created_at": timestamp(keys.comment_ms(row.id))}


def post(row: Post) -> dict:
    body = {
        "id": row.id,
        "author": row.author,
        "caption": row.caption,
        "created_at": timestamp(keys.created_ms(row.id)),
        "status": row.status,
        "image": None,
        "comment_count": row.comment_count,
        "latest_comments": [comment(Comment(*entry)) for entry in row.latest],
    }
    if row.image:
        body["image"] = {
            "url": f"/v1/{keys.image(row.id, row.image.version)}",
            "width": SIDE,
            "height": SIDE,
            "thumbhash": row.image.thumbhash,
        }
        if row.image.scans:
            body["image"] |= {"bytes": row.image.scans[-1], "scans": row.image.scans}
    if row.status == "failed":
        body["error"] = {"code": row.code, "detail": row.detail}
    return body


def new_post(post_id: str, author: str, caption: str) -> dict:
    """A post as it was when it was created. A repeated request gets the same."""
    return post(Post(post_id, 0, author, caption, "processing", None, None, None, ()))


def upload(row: OpenUpload) -> dict:
    return {
        "id": row.id,
        "offset": row.offset,
        "length": row.length,
        "metadata": row.metadata,
        "created_at": timestamp(keys.created_ms(row.id)),
        "expires_at": timestamp(row.expires),
        "concat": row.concat.partition(";")[0] or None,
    }


def post_json(row: Post) -> bytes:
    """A post as JSON, from the cache if it is there."""
    if len(row.caption) + sum([len(text) for _, _, text in row.latest]) > CACHED_CHARACTERS:
        return orjson.dumps(post(row))
    return _cached_post_json(row)


@lru_cache(CACHED_ITEMS)
def _cached_post_json(row: Post) -> bytes:
    return _trimmed(orjson.dumps(post(row)))


def _trimmed(json: bytes) -> bytes:
    """The same bytes, for a cache. What orjson returns takes as much memory as it wrote into, several KiB."""
    return b"%b" % json


def ready_post(row: str) -> Answer:
    """The answer with a ready post, from its row of read_post. From the cache if it is there, with ETag and headers."""
    return _cached_ready_post(row) if len(row) <= CACHED_LINE else Answer(orjson.dumps(post(parse_line(row))), VARY)


@lru_cache(CACHED_POSTS)
def _cached_ready_post(row: str) -> Answer:
    return Answer(_trimmed(orjson.dumps(post(parse_line(row)))), VARY)


def comment_json(row: Comment) -> bytes:
    return orjson.dumps(comment(row))


@lru_cache(CACHED_PAGES)
def page(
    path: str,
    limit: int,
    rows: tuple,
    more: bool,
    encode: Callable[..., bytes],
    cursor: str,
    links: tuple[str, ...] = (),
    query: str = "",
    end: str = "",
    ranks: tuple[int, ...] = (),
) -> Answer:
    """A page of a list: as many rows as fit into PAGE_BYTES, and the cursor behind the last of them.

    `more`: storage has rows behind these. `encode` renders a row. `cursor` is a template for `str.format` with `row`,
    the last row of the page. `links` are Link headers that go with the one to the next page. `query` has the other
    parameters of the list, each with a `&` behind it. `end` is the position of the next page if all rows fit, also if
    there are none; empty: `more` decides. `ranks` are those of a page of the feed; its cursor gets the ones behind it.
    The cached Answer keeps its ETag and its compressed forms.
    """
    items, size = [], 0
    for row in rows:
        if size >= PAGE_BYTES:
            break
        items.append(encode(row))
        size += len(items[-1]) + 1
    listed, next_cursor, position, hint = b",".join(items), None, end, ""
    if items and (len(items) < len(rows) or (more and not end)):
        position = cursor.format(row=rows[len(items) - 1])
        if ranks:
            hint = ":" + ".".join([f"{rank:x}" for rank in ranks_behind(ranks, rows[: len(items)])])
    if position:
        next_cursor = urlsafe_b64encode((position + hint).encode()).decode().rstrip("=")
        links = (f'<{path}?{query}limit={limit}&cursor={next_cursor}>; rel="next"', *links)
    body = b'{"items":[%b],"next":%b}' % (listed, orjson.dumps(next_cursor))
    # A hint changes when posts before the page move, and a client's copy stays as good as it was.
    meaning = listed + position.encode() if hint else None
    return Answer(body, {"Link": ", ".join(links)} if links else None, meaning=meaning)
