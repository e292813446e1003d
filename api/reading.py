"""Reads what a request carries: parameters, cursors, the Idempotency-Key and JSON bodies.

Everything here refuses what breaks the contract. A Problem 422 says which part of the request is wrong.
"""

import re
from base64 import b64decode
from functools import lru_cache
from time import perf_counter
from urllib.parse import parse_qs

import orjson

from api.problems import Problem
from storage import keys
from storage.errors import TooLarge
from storage.posts import STATUSES, FeedCursor
from storage.settings import TEXT_CHARACTERS

JSON_BYTES = 64 * 1024  # a comment of 2,200 characters, each escaped as two \\uXXXX, and the same again
DEFAULT_LIMIT = 20  # entries of a page
MAX_LIMIT = 100
CACHED = 128  # query strings and cursors whose parsed form is kept
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
# Control characters (general category Cc) except tab and newline, as LF or CRLF. HTML forms send newlines as CRLF.
CONTROL = re.compile(r"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")
# A character that readers can see: not white space, and not Default_Ignorable_Code_Point in Unicode 16.0 (soft hyphen,
# zero-width characters, bidirectional controls, Hangul fillers, variation selectors, tags). Fonts also draw nothing for
# these: U+13430 to 13440 and FFF9 to FFFB (format characters, Cf and Mn), 2800 (Braille without a dot), 16FE4 (a Khitan
# filler), 1D159 (a note without a head). They are excluded too. The other format characters are visible signs.
VISIBLE = re.compile(
    "[^\\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u2800\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U00013430-\U00013440\U00016fe4\U0001bca0-\U0001bca3\U0001d159"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
COUNT = re.compile(r"0|[1-9][0-9]{0,15}")  # the whole numbers that a double, as a zset's score is one, counts exactly
# A cursor of the feed. `ranks` are hexadecimal, one for each partition. Cursors without them are valid, too.
FEED_PLACE = re.compile(
    rf"(?P<count>{COUNT.pattern}):(?P<post>(?!u){keys.ID.pattern})(:(?P<ranks>[0-9a-f]{{1,8}}(\.[0-9a-f]{{1,8}}){{0,15}}))?"
)


def invalid(detail: str, **where: str) -> Problem:
    """Problem 422. `where` names the part that is wrong, for example `pointer="#/text"` or `parameter="limit"`."""
    return Problem(422, "invalid", detail, where=where)


# Parameters and cursors


def parameters(request) -> dict[str, str]:
    """The query's parameters. Of a repeated one the first counts."""
    return _parameters(request.query_string)


@lru_cache(CACHED)  # parsing them takes as long as finding the route
def _parameters(query: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(query).items()}


def limit(request) -> int:
    """How many entries a page may have. Raises Problem 422."""
    text = parameters(request).get("limit")
    return _limit(text) if text is not None else DEFAULT_LIMIT


@lru_cache(CACHED)
def _limit(text: str) -> int:
    if not COUNT.fullmatch(text) or not 1 <= int(text) <= MAX_LIMIT:
        raise invalid(f"limit is a whole number from 1 to {MAX_LIMIT}", parameter="limit")
    return int(text)


def feed_cursor(request) -> FeedCursor | None:
    """The position in the feed behind which the page begins. None on the first page. Raises Problem 422."""
    cursor = parameters(request).get("cursor")
    return _feed_cursor(cursor) if cursor else None


@lru_cache(CACHED)
def _feed_cursor(cursor: str) -> FeedCursor:
    place = FEED_PLACE.fullmatch(_decode_cursor(cursor))
    if not place:
        raise _wrong_cursor()
    count, post, ranks = place.group("count", "post", "ranks")
    return FeedCursor(int(count), post, tuple([int(rank, 16) for rank in ranks.split(".")]) if ranks else ())


def comment_cursor(request) -> str:
    """The comment id before which the page begins. Empty on the first page. Raises Problem 422."""
    cursor = parameters(request).get("cursor")
    if not cursor:
        return ""
    comment = _decode_cursor(cursor)
    if not keys.COMMENT_ID.fullmatch(comment):
        raise _wrong_cursor()
    return comment


def post_cursor(request) -> str:
    """The post id behind which the page begins. Empty on the first page. Raises Problem 422."""
    cursor = parameters(request).get("cursor")
    if not cursor:
        return ""
    post = _decode_cursor(cursor)
    parts = keys.ID.fullmatch(post)
    if not parts or parts[1]:
        raise _wrong_cursor()
    return post


def status(request) -> str:
    """The status that the posts of a list must have. Empty: any. Raises Problem 422."""
    text = parameters(request).get("status", "")
    if text and text not in STATUSES:
        raise invalid(f"status is one of {', '.join(STATUSES)}", parameter="status")
    return text


def _decode_cursor(cursor: str) -> str:
    try:
        # Strict: by default the decoder skips characters outside the alphabet, so nonsense would decode to nothing.
        return b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True).decode("ascii")
    except ValueError:
        raise _wrong_cursor() from None


def _wrong_cursor() -> Problem:
    return invalid("this cursor is not from this list", parameter="cursor")


# Headers and bodies


def idempotency_key(request, body: bytes | None) -> keys.IdempotencyKey | None:
    """The Idempotency-Key with a digest of the body. `body` None: the body is not compared. Raises Problem 422.

    draft-ietf-httpapi-idempotency-key-header, section 2.
    """
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not IDEMPOTENCY_KEY.fullmatch(key):
        raise invalid("an Idempotency-Key has 1 to 255 visible ASCII characters", header="Idempotency-Key")
    return keys.IdempotencyKey(f"{request.method} {request.path} {key}", "-" if body is None else keys.digest(body))


def content_length(request) -> int:
    """The declared length of the body in bytes. 0 for a chunked body, whose bytes are counted as they arrive."""
    return int(request.headers.get("content-length", 0))


async def receive_json(request) -> None:
    """Read a JSON body into `request.body`. Raises TooLarge.

    For a route that streams: it checks the token before it reads the body.
    """
    if content_length(request) > JSON_BYTES:
        raise TooLarge(f"a JSON body may have up to {JSON_BYTES} bytes")
    while request.stream.request_body:
        request.body += await request.stream.read() or b""
        if len(request.body) > JSON_BYTES:
            raise TooLarge(f"a JSON body may have up to {JSON_BYTES} bytes")
    request.stream.perft0 = perf_counter()  # for api/metrics.py: the body came as fast as the client's line


def fields(request) -> dict:
    """The members of the JSON object in the body. Raises Problem 400 or 422."""
    try:
        body = orjson.loads(request.body)
    except orjson.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise Problem(400, "malformed", f"the body is not JSON: it is wrong at {position}") from None
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object", pointer="#")
    return body


def string(value, name: str, **where: str) -> str:
    """The value of the member `name`, which must be a string. Raises Problem 422.

    `where` names its place in the request. Without it the place is the member `name` of a JSON body.
    """
    where = where or {"pointer": f"#/{name}"}
    if not isinstance(value, str):
        raise invalid(f"{name} must be a string", **where)
    if len(value) > TEXT_CHARACTERS:
        raise invalid(f"{name} may have up to {TEXT_CHARACTERS} characters", **where)
    return value


def text(value, name: str, **where: str) -> str:
    """A text that a person wrote, unchanged. Raises Problem 422, also for control characters."""
    string(value, name, **where)
    # isprintable() is true for most texts and takes a fifth of the time of the search.
    if not value.isprintable() and (character := CONTROL.search(value)):
        detail = (
            f"{name} has the control character U+{ord(character[0]):04X} at position {character.start()};"
            " only tab and newline are allowed"
        )
        raise Problem(422, "control", detail, where=where or {"pointer": f"#/{name}"})
    return value
