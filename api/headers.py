"""What a request's headers say: lists, entity tags, content codings, the request's id."""

import re
from functools import lru_cache
from random import getrandbits

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,64}")
# Version, trace id, parent id, flags; later versions add fields.
# https://www.w3.org/TR/trace-context/#traceparent-header
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
ETAG = re.compile(r'[ \t,]*(W/)?("[^"\x00-\x20\x7f]*")[ \t]*(?=,|$)')
# A preference with its value, and parameters, which are skipped (RFC 7240, section 2).
TOKEN, QUOTED = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++", r'"(?:[^"\\]|\\.)*+"'
PREFERENCE = re.compile(
    rf"[ \t,]*+({TOKEN})(?:[ \t]*+=[ \t]*+({TOKEN}|{QUOTED})?+)?+[ \t]*+(?:;(?:[^\",]|{QUOTED})*+)?+(?=,|$)"
)
SECONDS = re.compile(r'"?0*([1-9][0-9]*)"?')
MAX_WAIT = 25  # seconds. A connection without a byte is closed after 30, and by many proxies after 30 or 60
# Possessive quantifiers: without them, spaces that match in two ways are tried n² times.
CODING = re.compile(r"\s*+([a-z*-]++)\s*+(?:;\s*+q\s*+=\s*+([01](?:\.[0-9]{0,3}+)?+))?+\s*+", re.IGNORECASE)


def request_id(request) -> str:
    """The client's Request-Id, or the trace id of its `traceparent`, or a new id. It stays the same for a request."""
    if request._id is None:  # where Sanic keeps its own `request.id`, which accepts any text
        sent, parent = request.headers.get("request-id"), request.headers.get("traceparent")
        if sent and REQUEST_ID.fullmatch(sent):
            request._id = sent
        elif parent and (parts := TRACEPARENT.fullmatch(parent)):
            request._id = parts[1]
        else:
            request._id = f"{getrandbits(64):016x}"  # Python seeds its random generator again in each forked process
    return request._id


def list_header(request, name: str) -> str:
    """The value of a header that is a list, its lines joined (RFC 9110, section 5.3). Empty if it is missing."""
    lines = request.headers.getall(name, None)
    return ", ".join(lines) if lines else ""


def matches_etag(header: str, *etags: str, weak: bool = True) -> bool:
    """Whether If-None-Match or If-Match lists one of `etags`, which are strong, or is `*`, which matches any.

    `weak`: compare weakly, as If-None-Match does. If-Match compares strongly (RFC 9110, section 8.8.3.2). A malformed
    list matches nothing.
    """
    if header == "*":
        return True
    end = 0
    match = False
    while tag := ETAG.match(header, end):
        end = tag.end()
        match = match or (tag[2] in etags and (weak or not tag[1]))
    return match and not header[end:].strip(" \t,")


@lru_cache(1024)
def preferred_wait(prefer: str) -> int:
    """The seconds of `Prefer: wait=N` (RFC 7240, section 4.3), MAX_WAIT at most. 0: none, or the value is malformed.

    >>> preferred_wait("respond-async, wait=10"), preferred_wait("wait=100"), preferred_wait("wait=soon")
    (10, 25, 0)
    """
    end = 0
    while preference := PREFERENCE.match(prefer, end):
        end = preference.end()
        if preference[1].lower() == "wait":  # only the first one counts (section 2)
            seconds = SECONDS.fullmatch(preference[2] or "")
            return min(int(seconds[1][:3]), MAX_WAIT) if seconds else 0  # three digits are more than MAX_WAIT anyway
    return 0


@lru_cache(1024)  # browsers and libraries send a few dozen different values
def preferred_coding(accept_encoding: str) -> str:
    """The coding to answer in: `br`, `gzip`, or empty for none (RFC 9110, section 12.5.3).

    The coding with the client's highest quality value; `br` where both are equal.

    >>> preferred_coding("gzip;q=0.5, br")
    'br'
    """
    quality = {}
    for part in accept_encoding.split(","):
        if coding := CODING.fullmatch(part):
            quality[coding[1].lower()] = float(coding[2] or 1)
    others = quality.get("*", 0.0)
    best = max(("br", "gzip"), key=lambda name: quality.get(name, others))
    identity = quality.get("identity", others if "*" in quality else 0.0)
    value = quality.get(best, others)
    return best if value > 0 and value >= identity else ""
