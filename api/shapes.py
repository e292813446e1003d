"""The shapes of the contract: what a request may look like, and how rows become JSON."""

import re
from base64 import b64decode, urlsafe_b64encode
from datetime import UTC, datetime
from functools import lru_cache
from urllib.parse import parse_qs

import orjson

from api.answers import Answer, Shared, encoded_head
from api.problems import Problem
from storage import keys
from storage.comments import Comment
from storage.errors import TooLarge
from storage.posts import Place, Post
from storage.settings import PAGE_BYTES, TEXT_CHARACTERS
from storage.uploads import Open

JSON_BYTES = 64 * 1024  # a comment of 2,200 characters, each escaped as two \\uXXXX, and as much again
LIMIT = 20
MOST = 100
SIDE = 600  # pixels of the served image
PAGES = 128  # pages that are remembered: 1 MB, and 32 MB where all are as long as they may be
RENDERED = 16384  # posts whose JSON is remembered, which takes 24 MB, and up to 80 MB
USUAL = 500  # characters of caption and comments up to which it is
VISIBLE = re.compile(r"[\x21-\x7e]{1,255}")
# Control characters (general category Cc) but tab and newline, LF or CRLF. Browsers' forms send newlines as CRLF.
CONTROL = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")
# Anything that can be seen: neither white space nor, by Unicode 16.0, of the property Default_Ignorable_Code_Point
# (soft hyphen, zero-width characters, bidirectional controls, Hangul fillers, variation selectors, tags), nor one of
# the others that fonts show as nothing: U+13430 to 13440 and FFF9 to FFFB are formats (Cf, Mn), 2800 is Braille
# without a dot, 16FE4 a Khitan filler, 1D159 a note without a head. The other formats are signs that are seen.
SEEN = re.compile(
    "[^\\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U00013430-\U00013440\U00016fe4\U0001bca0-\U0001bca3\U0001d159"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
COUNT = re.compile(r"0|[1-9][0-9]{0,15}")  # as far as a double, which a zset's score is, counts exactly


def invalid(detail: str, **where: str) -> Problem:
    return Problem(422, "invalid", detail, where=where)


# Requests


def arguments(request) -> dict[str, str]:
    return _arguments(request.query_string)


@lru_cache(PAGES)  # parsing them takes as long as finding the route
def _arguments(query: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(query).items()}


def limit(request) -> int:
    text = arguments(request).get("limit", str(LIMIT))
    if not COUNT.fullmatch(text) or not 1 <= int(text) <= MOST:
        raise invalid(f"limit is a whole number from 1 to {MOST}", parameter="limit")
    return int(text)


def _opened(cursor: str) -> str:
    try:
        # Strictly: by default what is not in the alphabet is passed over, and nonsense would open as nothing.
        return b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True).decode("ascii")
    except ValueError:
        raise _no_cursor() from None


def _no_cursor() -> Problem:
    return invalid("this cursor was not given by this list", parameter="cursor")


def place(request) -> Place | None:
    """The place in the feed that the cursor names."""
    cursor = arguments(request).get("cursor")
    return _place(cursor) if cursor else None


@lru_cache(PAGES)
def _place(cursor: str) -> Place:
    count, _, post = _opened(cursor).partition(":")
    found = keys.ID.fullmatch(post)
    if not found or found[1] or not COUNT.fullmatch(count):
        raise _no_cursor()
    return Place(int(count), post)


def before(request) -> str:
    """The comment id that the cursor names; empty without one."""
    cursor = arguments(request).get("cursor")
    if not cursor:
        return ""
    comment = _opened(cursor)
    if not keys.COMMENT_ID.fullmatch(comment):
        raise _no_cursor()
    return comment


def once(request, body: bytes | None) -> keys.Once | None:
    """The Idempotency-Key, with a digest of the body unless that is not compared."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not VISIBLE.fullmatch(key):
        raise invalid("an Idempotency-Key has 1 to 255 visible ASCII characters", header="Idempotency-Key")
    return keys.Once(f"{request.method} {request.path} {key}", "-" if body is None else keys.digest(body))


def declared(request) -> int:
    """The body's length, as far as it is declared: a chunked one is counted as it comes."""
    return int(request.headers.get("content-length", 0))


async def receive(request) -> None:
    """Read a JSON body of a route that streams, which is one that looks at the token before it takes a body."""
    if declared(request) > JSON_BYTES:
        raise TooLarge(f"a JSON body may have up to {JSON_BYTES} bytes")
    while request.stream.request_body:
        request.body += await request.stream.read() or b""
        if len(request.body) > JSON_BYTES:
            raise TooLarge(f"a JSON body may have up to {JSON_BYTES} bytes")


def fields(request) -> dict:
    """The JSON object in the body."""
    try:
        body = orjson.loads(request.body)
    except orjson.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise Problem(400, "malformed", f"the body is not JSON: it is wrong at {where}") from None
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object", pointer="#")
    return body


def string(value, name: str, **where: str) -> str:
    """A member `name` that must be a string. `where` is its place, by default in a JSON body. Raises Problem 422."""
    where = where or {"pointer": f"#/{name}"}
    if not isinstance(value, str):
        raise invalid(f"{name} must be a string", **where)
    if len(value) > TEXT_CHARACTERS:
        raise invalid(f"{name} may have up to {TEXT_CHARACTERS} characters", **where)
    return value


def text(value, name: str, **where: str) -> str:
    """A text that people wrote, unchanged. Raises Problem 422, also for control characters."""
    string(value, name, **where)
    # isprintable() is true of most texts, and takes a fifth of the search's time.
    if not value.isprintable() and (found := CONTROL.search(value)):
        detail = (
            f"{name} has the control character U+{ord(found[0]):04X} at position {found.start()};"
            " only tab and newline are taken"
        )
        raise Problem(422, "control", detail, where=where or {"pointer": f"#/{name}"})
    return value


# Answers


def created(body: dict, location: str, replayed: bool = False) -> Shared:
    """201; of a request that was sent again, the same answer (draft-ietf-httpapi-idempotency-key-header)."""
    headers = {"Content-Type": "application/json", "Location": location}
    if replayed:
        headers["Idempotent-Replayed"] = "true"
    return Shared(encoded_head(headers), 201, orjson.dumps(body))


def time(ms: int) -> str:
    """RFC 3339, in UTC with milliseconds."""
    seconds, rest = divmod(ms, 1000)
    return f"{_second(seconds)}.{rest:03}Z"


@lru_cache(1024)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()[:-6]


def comment(row: Comment) -> dict:
    return {"id": row.id, "author": row.author, "text": row.text, "created_at": time(keys.comment_ms(row.id))}


def post(row: Post) -> dict:
    shown = {
        "id": row.id,
        "author": row.author,
        "caption": row.caption,
        "created_at": time(keys.created_ms(row.id)),
        "status": row.status,
        "image": None,
        "comment_count": row.comment_count,
        "latest_comments": [comment(Comment(*entry)) for entry in row.latest],
    }
    if row.status == "ready":
        shown["image"] = {
            "url": f"/v1/images/{row.id}.jpg",
            "width": SIDE,
            "height": SIDE,
            "thumbhash": row.thumbhash,
        }
    if row.status == "failed":
        shown["error"] = {"code": row.code, "detail": row.detail}
    return shown


def new_post(post_id: str, author: str, caption: str) -> dict:
    """A post as it was made, which is also what a repeated request is told."""
    return post(Post(post_id, 0, author, caption, "processing", None, None, None, ()))


def upload(row: Open) -> dict:
    return {
        "id": row.id,
        "offset": row.offset,
        "length": row.length,
        "metadata": row.metadata,
        "created_at": time(keys.created_ms(row.id)),
        "expires_at": time(row.expires),
    }


def encoded_post(row: Post) -> bytes:
    """A post in JSON. The same row is the same JSON: remembering it saves rendering, and never a look into Redis."""
    if len(row.caption) + sum([len(text) for _, _, text in row.latest]) > USUAL:
        return orjson.dumps(post(row))
    return _rendered(row)


@lru_cache(RENDERED)
def _rendered(row: Post) -> bytes:
    return orjson.dumps(post(row))


def encoded_comment(row: Comment) -> bytes:
    return orjson.dumps(comment(row))


@lru_cache(PAGES)
def page(
    path: str, limit: int, rows: tuple, more: bool, encode, place: str, links: tuple[str, ...] = ()
) -> Answer:
    """A page of a list: as many rows as fit, and the place behind the last of them.

    `place` is a template that the last row fills in. The same rows are the same page, with its ETag and what was
    compressed of it: this saves making it again, and never a look into Redis.
    """
    items, size = [], 0
    for row in rows:
        if size >= PAGE_BYTES:
            break
        items.append(encode(row))
        size += len(items[-1]) + 1
    following = None
    if items and (more or len(items) < len(rows)):
        last = place.format(row=rows[len(items) - 1])
        following = urlsafe_b64encode(last.encode()).decode().rstrip("=")
        links = (f'<{path}?limit={limit}&cursor={following}>; rel="next"', *links)
    body = b'{"items":[%b],"next":%b}' % (b",".join(items), orjson.dumps(following))
    return Answer(body, {"Link": ", ".join(links)} if links else None)
