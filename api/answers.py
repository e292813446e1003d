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
from sanic.response import BaseHTTPResponse, HTTPResponse

from api.headers import list_header, matches_etag, preferred_coding, request_id
from api.waiting import Seen

VARY = {"Vary": "Accept-Encoding, Prefer"}  # of an answer that a client may wait for
READ = ("GET", "HEAD")  # the methods of a route that reads. Sanic leaves out the body of an answer to HEAD
MIN_COMPRESSED = 200  # bytes. Compressing a smaller body saves less than the header that announces it
BLOCKING = 64 * 1024  # bytes. Compressing a larger body takes over 1 ms, so a thread does it
BROTLI_QUALITY = 5  # of 11. Higher ones save at most 3 % of the size and take three times as long


class FastResponse(BaseHTTPResponse):
    """A response whose headers were encoded in advance, by `encode_headers`.

    Sanic encodes each header of each response. That takes half as long as all its other work. Here `headers` is a plain
    dict, which is faster than Sanic's multidict: it only gets headers of `rendering.created` and headers that Sanic
    itself sets, each name once.
    """

    __slots__ = ("_encoded_headers",)

    def __init__(self, encoded_headers: tuple[bytes, bytes], status: int = 200, body: bytes = b""):
        self.asgi = False
        self.content_type = None
        self.stream = None
        self._cookies = None
        self.headers = {}
        self.status = status
        self.body = body
        self._encoded_headers = encoded_headers

    @property
    def processed_headers(self):
        # One header whose value continues on the next lines, as in `encode_headers`.
        lines = f"{http_date(int(time()))}\r\nRequest-Id: {request_id(self.stream.request)}"
        limits = self.stream.limits
        if limits:
            lines += f"\r\nRateLimit: {limits[0]}\r\nRateLimit-Policy: {limits[1]}"
        for name, value in self.headers.items():
            lines += f"\r\n{name}: {value}"
        return self._encoded_headers, (b"Date", lines.encode())


class ProblemResponse(HTTPResponse):
    """A problem (api/problems.py). `code` is its stable word."""

    __slots__ = ("code",)


@lru_cache(2)
def http_date(second: int) -> str:
    """An HTTP date (RFC 9110, section 5.6.7). `second` is in seconds since 1970."""
    return formatdate(second, usegmt=True)


def encode_headers(headers: dict[str, str]) -> tuple[bytes, bytes]:
    """All headers as the name and the value of one.

    Sanic writes a name, a colon and a value. This value contains the line breaks and the other headers. All its parts
    were checked before, so none of them can end its line and add a header.
    """
    name, _, lines = "\r\n".join([f"{name}: {value}" for name, value in headers.items()]).partition(": ")
    return name.encode("ascii"), lines.encode()


class Answer:
    """A body, by default JSON, its headers, and its compressed forms, made when the first client wants them."""

    def __init__(
        self,
        body: bytes,
        headers: dict[str, str] | None = None,
        awaited: str | Seen | None = None,
        content_type: str = "application/json",
    ):
        self.body = body
        self.awaited = awaited  # what a client that prefers to wait waits for: see `api.waiting`
        self.content_type = content_type
        self.headers = {"Vary": "Accept-Encoding", "Cache-Control": "no-cache", **(headers or {})}
        self.digest = blake2b(body, digest_size=12).hexdigest()
        self._compressed: dict[str, bytes | asyncio.Task] = {}
        self._encoded_headers: dict[tuple[int, str], tuple[bytes, bytes]] = {}

    async def respond(self, request) -> FastResponse:
        """200 in the coding the client prefers, or 304 if the client already has this body."""
        coding = preferred_coding(list_header(request, "accept-encoding")) if len(self.body) >= MIN_COMPRESSED else ""
        etag = f'"{self.digest}-{coding}"' if coding else f'"{self.digest}"'
        known = list_header(request, "if-none-match")
        if known and (known == etag or matches_etag(known, etag)):
            return FastResponse(self._headers_for(304, coding, etag), 304)
        body = await self._compress(coding) if coding else self.body
        return FastResponse(self._headers_for(200, coding, etag), 200, body)

    def matches(self, if_match: str) -> bool:
        """Whether an If-Match header lists this body in any coding. The comparison is strong: weak tags never match."""
        return matches_etag(if_match, f'"{self.digest}"', f'"{self.digest}-br"', f'"{self.digest}-gzip"', weak=False)

    def _headers_for(self, status: int, coding: str, etag: str) -> tuple[bytes, bytes]:
        encoded = self._encoded_headers.get((status, coding))
        if encoded is None:
            headers = {**self.headers, "ETag": etag}
            if status == 200:
                headers["Content-Type"] = self.content_type
                if coding:
                    headers["Content-Encoding"] = coding
            encoded = self._encoded_headers[status, coding] = encode_headers(headers)
        return encoded

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
