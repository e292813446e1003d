"""What a request's headers say: lists, entity tags, content codings, the request's id."""

import re
from functools import lru_cache
from random import getrandbits

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,64}")
# https://www.w3.org/TR/trace-context/#traceparent-header: version, trace id, parent id, flags; later versions add more
TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
ETAG = re.compile(r'[ \t,]*(W/)?("[^"\x00-\x20\x7f]*")[ \t]*(?=,|$)')
CODING = re.compile(r"\s*([a-z*-]+)\s*(?:;\s*q\s*=\s*([01](?:\.[0-9]{0,3})?))?\s*", re.IGNORECASE)


def request_id(request) -> str:
    """The Request-Id that was sent, the trace id of a `traceparent`, or a new one."""
    sent = request.headers.get("request-id")
    if sent and REQUEST_ID.fullmatch(sent):
        return sent
    parent = request.headers.get("traceparent")
    if parent and (found := TRACEPARENT.fullmatch(parent)):
        return found[1]
    return f"{getrandbits(64):016x}"  # Python seeds its generator anew in each forked process


def list_header(request, name: str) -> str:
    """A header that is a list: its lines are one list (RFC 9110, section 5.3). Empty without one."""
    lines = request.headers.getall(name, None)
    return ", ".join(lines) if lines else ""


def matches_etag(listed: str, *tags: str, weak: bool = True) -> bool:
    """Whether a list of entity tags has one of `tags`, which are strong, or is `*`, which is any.

    If-None-Match is compared weak, If-Match is not (RFC 9110, section 8.8.3.2). A malformed list has none.
    """
    if listed == "*":
        return True
    end, has = 0, False
    while found := ETAG.match(listed, end):
        end = found.end()
        has = has or (found[2] in tags and (weak or not found[1]))
    return has and not listed[end:].strip(" \t,")


@lru_cache(1024)  # browsers and libraries send a few dozen different ones
def preferred_coding(accepted: str) -> str:
    """br, gzip, or empty for none: the client's highest quality value, br before gzip where they are equal."""
    quality = {}
    for part in accepted.split(","):
        if found := CODING.fullmatch(part):
            quality[found[1].lower()] = float(found[2] or 1)
    rest = quality.get("*", 0.0)
    coding = max(("br", "gzip"), key=lambda name: quality.get(name, rest))
    plain = quality.get("identity", rest if "*" in quality else 0.0)
    value = quality.get(coding, rest)
    return coding if value > 0 and value >= plain else ""
