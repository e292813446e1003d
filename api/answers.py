"""JSON answers that a client can revalidate: one body with a strong ETag for each content coding.

ETags, If-Match and If-None-Match: RFC 9110, sections 8.8.3, 13.1.1 and 13.1.2. Accept-Encoding: section 12.5.3.
"""

import asyncio
import zlib
from email.utils import formatdate
from functools import lru_cache
from hashlib import blake2b
from time import time

import brotli
import orjson
from sanic.helpers import STATUS_CODES
from sanic.http import Stage
from sanic.response import BaseHTTPResponse, HTTPResponse

from api.headers import list_header, matches_etag, preferred_coding, request_id
from api.waiting import Seen

VARY = {"Vary": "Accept-Encoding, Prefer"}  # of an answer that a client may wait for
READ = ("GET", "HEAD")  # the methods of a route that reads. Sanic leaves out the body of an answer to HEAD
MIN_COMPRESSED = 200  # bytes. Compressing a smaller body saves less than the header that announces it
BLOCKING = 64 * 1024  # bytes. Compressing a larger body takes over 1 ms, so a thread does it
LARGE = 16 * 1024  # bytes. Copying a larger body behind its header takes longer than sending two pieces
BROTLI_QUALITY = 5  # of 11. Higher ones save at most 3 % of the size and take three times as long


class FastResponse(BaseHTTPResponse):
    """A response with a body that is complete, and with headers that were encoded in advance, by `encode_head`.

    Sanic encodes each header of each response, and four of its methods send it. That takes half as long as all its
    other work. Here one method does both. `headers` is a plain dict for further headers: each name once, and values
    that cannot contain a line break.
    """

    __slots__ = ("_head",)

    def __init__(self, head: bytes, status: int = 200, body: bytes = b""):
        self.asgi = False
        self.content_type = None
        self.stream = None
        self._cookies = None
        self.headers = {}
        self.status = status
        self.body = body
        self._head = head

    async def send(self, data=None, end_stream=None):
        """Send all of it. Sanic calls this once, without data."""
        http, body = self.stream, self.body
        lines = f"Date: {http_date(int(time()))}\r\nRequest-Id: {request_id(http.request)}\r\n{http.limits}"
        for name, value in self.headers.items():
            lines += f"{name}: {value}\r\n"
        if self.status != 304:  # RFC 9110, section 8.6: it would have to be the length of the body that is not sent
            lines += f"Content-Length: {len(body)}\r\n"
        lines += "Connection: keep-alive\r\n\r\n" if http.keep_alive else "Connection: close\r\n\r\n"
        http.response_func, http.stage = None, Stage.IDLE
        head = self._head + lines.encode()
        if http.head_only:
            await http._send(head)
        elif len(body) < LARGE:
            await http._send(head + body)
        else:
            await http.protocol.send(head, body)


class ProblemResponse(HTTPResponse):
    """A problem (api/problems.py). `code` is its stable word."""

    __slots__ = ("code",)


@lru_cache(2)
def http_date(second: int) -> str:
    """An HTTP date (RFC 9110, section 5.6.7). `second` is in seconds since 1970."""
    return formatdate(second, usegmt=True)


def encode_head(status: int, headers: dict[str, str]) -> bytes:
    """The first lines of a response. Every value must be checked before: none may contain a line break."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    return b"HTTP/1.1 %d %b\r\n%b" % (status, STATUS_CODES[status], lines.encode())


class Answer:
    """A body, by default JSON, its headers, and its compressed forms, made when the first client wants them."""

    __slots__ = ("body", "awaited", "content_type", "digest", "_weak", "headers", "_compressed", "_heads")

    def __init__(
        self,
        body: bytes,
        headers: dict[str, str] | None = None,
        awaited: str | Seen | None = None,
        content_type: str = "application/json",
        meaning: bytes | None = None,
    ):
        """`meaning`: bodies with the same meaning have the same ETag, which is weak (RFC 9110, section 8.8.1)."""
        self.body = body
        self.awaited = awaited  # what a client that prefers to wait waits for: see `api.waiting`
        self.content_type = content_type
        self.headers = headers or {}
        self.digest = blake2b(body if meaning is None else meaning, digest_size=12).hexdigest()
        self._weak = "" if meaning is None else "W/"
        self._compressed: dict[str, bytes | asyncio.Task] = {}
        self._heads: dict[tuple[int, str], bytes] = {}

    async def respond(self, request) -> FastResponse:
        """200 in the coding the client prefers, or 304 if the client already has this body."""
        coding = preferred_coding(list_header(request, "accept-encoding")) if len(self.body) >= MIN_COMPRESSED else ""
        tag = f'"{self.digest}-{coding}"' if coding else f'"{self.digest}"'
        known = list_header(request, "if-none-match")
        if known and (known == tag or matches_etag(known, tag)):
            return FastResponse(self._head(304, coding, tag), 304)
        body = await self._compress(coding) if coding else self.body
        return FastResponse(self._head(200, coding, tag), 200, body)

    def matches(self, if_match: str) -> bool:
        """Whether an If-Match header lists this body in any coding. The comparison is strong: weak tags never match."""
        return matches_etag(if_match, f'"{self.digest}"', f'"{self.digest}-br"', f'"{self.digest}-gzip"', weak=False)

    def _head(self, status: int, coding: str, tag: str) -> bytes:
        head = self._heads.get((status, coding))
        if head is None:
            headers = {"Vary": "Accept-Encoding", "Cache-Control": "no-cache", **self.headers}
            headers["ETag"] = self._weak + tag
            if status == 200:
                headers["Content-Type"] = self.content_type
                if coding:
                    headers["Content-Encoding"] = coding
            head = self._heads[status, coding] = encode_head(status, headers)
        return head

    async def _compress(self, coding: str) -> bytes:
        if coding not in self._compressed:
            if len(self.body) > BLOCKING:
                task = asyncio.create_task(asyncio.to_thread(compress, coding, self.body))
                self._compressed[coding] = task
            else:
                self._compressed[coding] = compress(coding, self.body)
        compressed = self._compressed[coding]
        return compressed if isinstance(compressed, bytes) else await asyncio.shield(compressed)


def json_answer(body, headers: dict[str, str] | None = None, awaited: str | Seen | None = None) -> Answer:
    return Answer(orjson.dumps(body), headers, awaited)


def compress(coding: str, body: bytes) -> bytes:
    if coding == "br":
        return brotli.compress(body, mode=brotli.MODE_TEXT, quality=BROTLI_QUALITY)
    packer = zlib.compressobj(6, wbits=31)  # 31: with gzip's header and trailer
    return packer.compress(body) + packer.flush()
