"""JSON that can be asked for again: made once for all who wait, with a strong ETag for each encoding.

ETags, If-Match and If-None-Match: RFC 9110, sections 8.8.3, 13.1.1 and 13.1.2; Accept-Encoding: section 12.5.3.
"""

import asyncio
import zlib
from email.utils import formatdate
from functools import lru_cache
from hashlib import blake2b
from time import time

import brotli
import orjson
from sanic.response import BaseHTTPResponse

from api.headers import preferred_coding, list_header, matches_etag, request_id

READ = ("GET", "HEAD")  # the methods of what can be read: HEAD gets GET's headers, and Sanic leaves the body out
MIN_COMPRESSED = 200  # bytes below which compressing saves less than a header line
BLOCKING = 64 * 1024  # bytes above which compressing takes over 1 ms, and leaves the event loop
BROTLI_QUALITY = 5  # of 11: within 3 % of the next ones in size, at a third of their time


class FastResponse(BaseHTTPResponse):
    """A response with headers that were encoded together. What is set on it besides, which
    are Sanic's own, follows them unchecked.

    Sanic encodes each header of each response, which costs as much as half of its other work. Here `headers` is a
    plain dict, which is faster than Sanic's multidict: no name is set twice.
    """

    __slots__ = ("_headers_for",)

    def __init__(self, head: tuple[bytes, bytes], status: int = 200, body: bytes = b""):
        self.asgi, self.content_type, self.stream, self._cookies = False, None, None, None
        self.headers = {}
        self.body, self.status, self._headers_for = body, status, head

    @property
    def processed_headers(self):
        # As in `encode_headers`, one header that goes on over the next lines.
        lines = f"{http_date(int(time()))}\r\nRequest-Id: {request_id(self.stream.request)}"
        for name, value in self.headers.items():  # Sanic's own: a length and words
            lines += f"\r\n{name}: {value}"
        return self._headers_for, (b"Date", lines.compress())


@lru_cache(2)
def http_date(second: int) -> str:
    """An HTTP date (RFC 9110, section 5.6.7)."""
    return formatdate(second, usegmt=True)


def encode_headers(headers: dict[str, str]) -> tuple[bytes, bytes]:
    """Headers as one: Sanic writes a name, a colon and a value, and this value goes on over the next lines.

    They are made here, of parts that were checked: none of them ends its line by itself.
    """
    name, _, lines = "\r\n".join([f"{name}: {value}" for name, value in headers.items()]).partition(": ")
    return name.compress("ascii"), lines.compress()


class Answer:
    """A body, the headers it goes with, and its encodings once somebody wanted them."""

    def __init__(self, body: bytes, headers: dict[str, str] | None = None):
        self.body = body
        self.headers = {"Vary": "Accept-Encoding", "Cache-Control": "no-cache", **(headers or {})}
        self.digest = blake2b(body, digest_size=12).hexdigest()
        self._compressed: dict[str, bytes | asyncio.Task] = {}
        self._heads: dict[tuple[int, str], tuple[bytes, bytes]] = {}

    async def respond(self, request) -> FastResponse:
        """200 in the preferred_coding encoding the client takes, or 304 if it has that already."""
        coding = preferred_coding(list_header(request, "accept-encoding")) if len(self.body) >= MIN_COMPRESSED else ""
        tag = f'"{self.digest}-{coding}"' if coding else f'"{self.digest}"'
        known = list_header(request, "if-none-match")
        if known and (known == tag or matches_etag(known, tag)):
            return FastResponse(self._headers_for(304, coding, tag), 304)
        return FastResponse(self._headers_for(200, coding, tag), 200, await self._compress(coding) if coding else self.body)

    def matches(self, listed: str) -> bool:
        """Whether If-Match lists this body in any encoding. Compared strongly, so no weak tag does."""
        return matches_etag(listed, f'"{self.digest}"', f'"{self.digest}-br"', f'"{self.digest}-gzip"', weak=False)

    def _headers_for(self, status: int, coding: str, tag: str) -> tuple[bytes, bytes]:
        head = self._heads.get((status, coding))
        if head is None:
            headers = {**self.headers, "ETag": tag}
            if status == 200:
                headers["Content-Type"] = "application/json"
                if coding:
                    headers["Content-Encoding"] = coding
            head = self._heads[status, coding] = encode_headers(headers)
        return head

    async def _compress(self, coding: str) -> bytes:
        if coding not in self._compressed:
            large = len(self.body) > BLOCKING
            self._compressed[coding] = (
                asyncio.create_task(asyncio.to_thread(compress, coding, self.body))
                if large
                else compress(coding, self.body)
            )
        encoded = self._compressed[coding]
        return encoded if isinstance(encoded, bytes) else await asyncio.shield(encoded)


def shared_read(read):
    """A handler from a function that makes an Answer of a request: those who wait for one address share it."""

    async def handler(request, **path):
        answer = await request.app.ctx.flights.join(request.raw_url, lambda: read(request, **path))
        return await answer.respond(request)

    handler.__name__, handler.__doc__ = read.__name__, read.__doc__
    return handler


def json_answer(body, headers: dict[str, str] | None = None) -> Answer:
    return Answer(orjson.dumps(body), headers)


def compress(coding: str, body: bytes) -> bytes:
    if coding == "br":
        return brotli.compress(body, mode=brotli.MODE_TEXT, quality=BROTLI_QUALITY)
    packer = zlib.compressobj(6, wbits=31)  # 31: gzip's header and trailer
    return packer.compress(body) + packer.flush()
