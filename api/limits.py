"""Which limit does a request count against, and what do its answers say about it?

`RateLimit` and `RateLimit-Policy`: draft-ietf-httpapi-ratelimit-headers-10, sections 3 and 4.
"""

import ipaddress
from contextlib import asynccontextmanager
from functools import lru_cache

from api import reading, tokens
from api.headers import list_header
from api.problems import Problem
from storage import metrics
from storage.errors import Unknown, Unreachable
from storage.limits import Charge, Entry, Ticket
from storage.uploads import run_to_completion

CACHED = 10_000  # addresses and header values, in a few MB each
# The end of X-Forwarded-For that is read. Each proxy adds an address of up to 45 characters. What is before was sent by
# the client, and may be long.
FORWARDED_CHARACTERS = 512

# A user's writes, and all reads


async def admit(request, name: str) -> str:
    """The user who sends the request, once the limit of the class `name` allows it.

    Raises Problem 401, Problem 429, Unreachable.
    """
    user, limiter = await tokens.user(request), request.app.ctx.limiter
    if limiter and (charge := limiter.charge(name, user)):
        await take(request, charge)
    return user


async def take(request, charge: Charge) -> None:
    """Take from a limit by a call of its own. Raises Problem 429, Unreachable.

    A `read` is also allowed if Redis does not decide. On a Cluster a write is, too: maybe only the shard of this user's
    limits is away, and the shard that is written to works.
    """
    try:
        allowed, entry = await request.app.ctx.limiter.decide(charge)
    except Unreachable:
        if charge.name != "read" and not request.app.ctx.db.cluster:
            raise
    else:
        settle(request.stream, entry, allowed)


async def begin_write(request, name: str) -> tuple[str, Entry | None]:
    """Like `admit`, but only what this process knows is checked. A script that writes takes from the entry.

    The entry is None if there is no limit. `end_write` has the decision.
    """
    user, limiter = await tokens.user(request), request.app.ctx.limiter
    charge = limiter and limiter.charge(name, user)
    if not charge:
        return user, None
    entry = limiter.alone(charge)
    if entry.allowed is not None:
        settle(request.stream, entry, False)
    return user, entry


async def end_write(request, entry: Entry | None, error: Exception | None = None) -> None:
    """Count a request, also if it was refused by `error` before a script took from its limit.

    Raises Problem 429, which comes before the error, and Unreachable.
    """
    if not entry or isinstance(error, (Unreachable, Unknown)):
        return
    if entry.allowed is None:
        await take(request, entry.charge)
    else:
        settle(request.stream, entry, entry.allowed > 0)


def begin_read(request) -> Ticket | None:
    """Count a read that needs no token, for its user or else for its network address. `end_read` has the decision.

    Between the two the handler reads, so the limit costs no time of its own. Raises Problem 429 if it is known now.
    """
    ctx, stream = request.app.ctx, request.stream
    if "authorization" in request.headers and (user := tokens.known(request)):
        charge = ctx.limiter.charge("read", user)
    elif ctx.settings.proxies:
        forwarded = list_header(request, "x-forwarded-for")[-FORWARDED_CHARACTERS:]
        address = client_address(request.conn_info.client_ip, forwarded, ctx.settings.proxies)
        charge = ctx.limiter.charge("read", address, 1, True)
    else:
        charge = stream.reader  # a connection has one address
        if charge is None:
            address = client_address(request.conn_info.client_ip, "", 0)
            charge = stream.reader = ctx.limiter.charge("read", address, 1, True)
    if charge is None:
        return None
    ticket = ctx.limiter.take(charge)
    if ticket[0].allowed is not None:
        settle(stream, ticket[0], False)
    return ticket


async def end_read(request, ticket: Ticket) -> None:
    """Raises Problem 429 if the read is over its limit. It is allowed if Redis did not decide."""
    entry, number = ticket
    await entry.batch.decided(request.app.ctx.limiter.loop)
    if entry.allowed is not None:
        settle(request.stream, entry, number <= entry.allowed)


@asynccontextmanager
async def paid_body(request, user: str, most: int):
    """Count the bytes of the request's body before it is read. Those that did not come are given back at the end.

    A body without Content-Length counts as `most` bytes until then. Raises Problem 429, Unreachable.
    """
    limiter, stream = request.app.ctx.limiter, request.stream
    units = (reading.content_length(request) or most) if stream.request_body else 0
    charge = limiter and units and limiter._charge("upload_bytes", user, units)
    if not charge:
        yield
        return
    # If the client breaks off now, its bytes are already in the receive buffer and must still be committed.
    await run_to_completion(take(request, charge))
    try:
        yield
    finally:
        missing = units - (stream.request_bytes - stream.request_bytes_left)
        if missing > 0:
            limiter.give_back(charge, missing)


# What the answers say


def settle(stream, entry: Entry, allowed: bool) -> None:
    """Put the limit into the headers of the answer. Raises Problem 429 if the request is not allowed.

    Requests of one entry get the same headers: they say what is left after the last of them.
    """
    if not entry.headers:
        entry.headers = header_lines(entry)
    stream.limits += entry.headers  # several lines of one name are one list
    if not allowed:
        name, (quota, window) = entry.charge.name, entry.charge.limit
        metrics.LIMITED.series(name).add()
        unit = "bytes" if name == "upload_bytes" else "requests"
        detail = f"the limit of `{name}` is used up: {quota} {unit} in {window} s"
        raise Problem(429, "limited", detail, {"Retry-After": str(max(1, -(-entry.again_ms // 1000)))})


def header_lines(entry: Entry) -> str:
    """The headers RateLimit and RateLimit-Policy.

    >>> from storage.limits import Charge
    >>> from storage.settings import Limit
    >>> entry = Entry(Charge("comment", "", 0, Limit(quota=60, window=60), 1))
    >>> entry.decide(1, 59, 1000)
    >>> header_lines(entry).splitlines()
    ['RateLimit: "comment";r=59;t=1', 'RateLimit-Policy: "comment";q=60;w=60']
    """
    name, (quota, window) = entry.charge.name, entry.charge.limit
    unit = ';qu="content-bytes"' if name == "upload_bytes" else ""
    return (
        f'RateLimit: "{name}";r={entry.left};t={-(-entry.again_ms // 1000)}\r\n'
        f'RateLimit-Policy: "{name}";q={quota}{unit};w={window}\r\n'
    )


# Network addresses


@lru_cache(CACHED)
def client_address(peer: str, forwarded: str, proxies) -> str:
    """Whom a request counts for: the client's IPv4 address, or the first 64 bits of its IPv6 address.

    `peer` is the address of the connection, `forwarded` the value of X-Forwarded-For. Each proxy appends the address of
    its own peer there, so only the entries of trusted proxies are true (see `Settings.proxies`). `Forwarded` and
    X-Real-IP are not read: a proxy that does not know them passes on what the client has sent.

    >>> client_address("10.0.0.2", "198.51.100.9, 203.0.113.7", 1)
    '203.0.113.7'
    >>> client_address("2001:db8:1:2:3::4", "", 0)
    '2001:db8:1:2::'
    """
    address, entries = _parse(peer), [entry.strip(" \t") for entry in forwarded.split(",")]
    if isinstance(proxies, int):
        if 0 < proxies <= len(entries):
            address = _parse(entries[-proxies]) or address
    else:
        while entries and address and any(address in network for network in proxies):
            named = _parse(entries.pop())
            if not named:
                break
            address = named
    if address and address.version == 6:
        # A provider gives a customer at least a /64, with 2^64 addresses (RFC 6177).
        address = ipaddress.IPv6Address(int(address) >> 64 << 64)
    return str(address or peer)


def _parse(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address in an entry, which may have a port: `192.0.2.7:4711`, `[2001:db8::1]:4711`. None if it is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
