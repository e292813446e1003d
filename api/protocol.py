"""What Sanic's HTTP/1.1 leaves open under connections that stall, trickle, break off, are refused, or smuggle.

Measured with Sanic 25.12: after an early refusal it reads the rest of the body, and first invites it with
`100 Continue`; a body that stalls holds its connection for ever; a header sent a byte a second is waited for as long
as it lasts; and shapes pass that a proxy in front may read as another request.
"""

import re
from time import monotonic, time

from sanic.exceptions import (
    BadRequest,
    RequestCancelled,
    RequestTimeout,
    SanicException,
    ServiceUnavailable,
)
from sanic.http import Http, Stage
from sanic.server import HttpProtocol

from api.answers import FastResponse, http_date
from api.headers import request_id

LINGER = 1.0  # seconds in which a refused client may read why it was refused
DISCARD = 64 * 1024  # bytes of its body that are still taken meanwhile, for clients that send all before they read
POLL = 2.0  # seconds between two looks at a connection's clock
HEADER = 10.0  # seconds in which a request's header must be complete

# Bytes of trailers after the last chunk. Nobody needs more than a checksum there, and they are dropped.
TRAILER_BYTES = 8192
TAKE_A_BODY = {"POST", "PATCH"}  # methods of which an address here reads the body

# RFC 9112, sections 3 and 5: one space between the parts, none before a colon, no folded lines, no control characters.
# The target is a path, or an http address (section 3.2.2), of which group 1 is what stands before the path. Group 2 is
# a transfer coding. The quantifiers are possessive: lines that match in two ways would be tried 2^n times.
NAME = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
FIELD = NAME + rb"++:[^\x00-\x08\x0a-\x1f]*+"
HEAD = re.compile(
    NAME + rb"++ (?:/|((?i:https?)://[0-9A-Za-z.:_~%!$&'()*+,;=\[\]-]++)(?=[/? ]))[!\"$-~]*+ HTTP/1\.[01]"
    rb"(?:\r\n(?>(?i:transfer-encoding):([ \t]*+(?i:chunked)[ \t]*+)|" + FIELD + rb"))*+"
)
TRAILERS = re.compile(rb"(?:" + FIELD + rb"\r\n)*+")
# What says where a body ends is read as bytes: Sanic's strings lose what Unicode takes for spaces or digits.
# RFC 9110, section 8.6: a length has ASCII digits and nothing else.
FRAMING = re.compile(rb"\r\n(?:content-length|transfer-encoding):([^\r]*)", re.IGNORECASE)
FRAMED = re.compile(rb"[ \t]*(?:[0-9]{1,18}|chunked)[ \t]*")
# RFC 9112, section 7.1. Group 1: the size of the last chunk.
CHUNK = re.compile(rb"\r\n(?:(0{1,16})|[0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]{0,64})?\r\n")
CHUNK_HEAD = 64  # bytes a chunk's size line may have, extensions and all
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class EncodedBody(SanicException):
    """A body with a Content-Encoding. To decode it would need a limit of its own against what grows a thousandfold."""

    status_code = 415


class StrictHttp(Http):
    """Sanic's parser; what could mean another thing to a proxy is refused, and the connection closed.

    Bodies are decided here, for every method and address: a handler reads the body of a POST or PATCH after it has
    looked at the token. A body that nobody reads is neither invited nor awaited.
    """

    async def http1_request_header(self):
        # An idle timer would be reset by every byte: the header has its time as a whole.
        self.self.header_began = monotonic()
        buffer = self.recv_buffer
        while (end := buffer.find(b"\r\n\r\n")) == -1 and len(buffer) < self.HEADER_MAX_SIZE:
            await self._receive_more()
        if end != -1:
            head = HEAD.fullmatch(buffer, 0, end)
            if not head:
                raise BadRequest("the request's header is malformed")
            if head.lastindex:
                normalize(buffer, head)
        await super().http1_request_header()
        request = self.request
        hosts = len(request.headers.getall("host", ()))
        framing = FRAMING.findall(request.head) if self.request_body else ()
        if (
            hosts > 1
            or (hosts == 0 and request.version == "1.1")
            # RFC 9112, section 6.1: HTTP/1.0 has no chunks
            or (self.request_body == "chunked" and request.version == "1.0")
            or not all(map(FRAMED.fullmatch, framing))
        ):
            self.request_body = None
            raise BadRequest("the request's header is malformed")
        if self.request_body:
            if self.request_body is True and not self.request_bytes_left:  # Content-Length: 0
                self.request_body, self.expecting_continue = None, False
            elif request.method not in TAKE_A_BODY:
                self.refuse_body()
            elif any(
                coding.strip().lower() not in ("", "identity")
                for coding in request.headers.getall("content-encoding", ())
            ):
                # RFC 9110, section 15.5.16
                raise EncodedBody("the body has a Content-Encoding", headers={"Accept-Encoding": "identity"})

    def refuse_body(self) -> None:
        """Neither invite nor drain what is left of the body, and close the connection after the answer.

        RFC 9110, section 10.1.1: a final status may be sent instead of 100, before the content was read.
        """
        self.expecting_continue = self.keep_alive = False
        self.request_body = None
        self.protocol.refused = True

    async def error_response(self, exception: Exception) -> None:
        # The client went away while its answer was sent. Sanic would send another one, which nobody hears, and would
        # fail because the first has begun.
        if isinstance(exception, RequestCancelled) and self.response and self.protocol.transport.is_closing():
            self.keep_alive = False
            return
        await super().error_response(exception)

    def respond(self, response):
        if self.request_body:
            self.refuse_body()
        if self.protocol.app.ctx.stopping:
            self.keep_alive = False
        if not isinstance(response, FastResponse):  # which writes them itself
            response.headers["Date"] = http_date(int(time()))
            response.headers["Request-Id"] = request_id(self.request)
        return super().respond(response)

    async def read(self) -> bytes | None:
        if self.request_body == "chunked" and self.request_bytes_left == 0:
            if self.expecting_continue:
                self.expecting_continue = False
                await self._send(CONTINUE)
            buffer = self.recv_buffer
            while buffer.find(b"\r\n", 3) == -1 and len(buffer) <= CHUNK_HEAD:
                await self._receive_more()
            chunk = CHUNK.match(buffer)
            if not chunk or (chunk[1] and not await self._drop_trailers(chunk.end())):
                self.keep_alive = False
                raise BadRequest("the body's chunks are malformed")
        if self.request_bytes > self.request_max_size:
            self.expecting_continue = False  # what is too large is not invited
        return await super().read()

    async def _drop_trailers(self, start: int) -> bool:
        """Remove the trailers, which Sanic refuses, from the buffer. Whether they are fields, and not too long.

        `start` is where they begin. RFC 9112, section 7.1.2: a recipient may discard them.
        """
        buffer = self.recv_buffer
        while (end := buffer.find(b"\r\n\r\n", start - 2)) == -1 and len(buffer) - start <= TRAILER_BYTES:
            await self._receive_more()
        if not start - 2 <= end <= start + TRAILER_BYTES or not TRAILERS.fullmatch(buffer, start, end + 2):
            return False
        del buffer[start : end + 2]
        return True


def normalize(buffer: bytearray, head: re.Match) -> None:
    """Write a request's header as Sanic understands it: `chunked` in small letters, and a path as the target."""
    if head[2]:
        buffer[head.start(2) : head.end(2)] = head[2].strip().lower().rjust(len(head[2]))
    if head[1]:
        # RFC 9112, section 3.2.2: servers must accept an address, and section 3.2.1: an empty path is sent as "/"
        buffer[head.start(1) : head.end(1)] = b"" if buffer[head.end(1)] == ord("/") else b"/"


class Protocol(HttpProtocol):
    """Sanic's protocol, with the holes closed."""

    HTTP_CLASS = StrictHttp
    __slots__ = ("header_began", "refused", "_lingering", "_discarded")

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.refused = self._lingering = False
        self._discarded = 0
        self.header_began = 0.0  # when the current request's header began

    def check_timeouts(self):
        """Looks again and again whether the connection has had its time."""
        if not self._task:
            return
        now, stage = monotonic(), self._http.stage
        idle, over = now - self._time, None
        if stage is Stage.REQUEST:
            if now - self.header_began > HEADER - POLL:
                over = RequestTimeout("the header took too long")
        elif stage is Stage.IDLE:
            if idle > self.keep_alive_timeout:
                over = RequestTimeout("idle")
        elif idle > self.response_timeout:
            over = ServiceUnavailable("no byte arrived for too long")
        if over is None:
            self._callback_check_timeouts = self.loop.call_later(POLL, self.check_timeouts)
            return
        self._http.exception = over
        self._http.keep_alive = False
        self._task.cancel()
        # What came is being kept meanwhile; then the socket goes, whatever the client does.
        self.loop.call_later(LINGER, self.abort)

    def close(self, timeout: float | None = None):
        # Closing a socket with unread bytes resets it, and the client loses the answer that tells it why. So the
        # answer's end is sent first (RFC 9112, section 9.6), and the socket stays a while, for the most part unread:
        # what a client on a slow line sends in vain costs it more than us.
        if not self.refused or self._lingering or self.transport is None or self.transport.is_closing():
            return super().close(timeout)
        if self._callback_check_timeouts:
            self._callback_check_timeouts.cancel()
        self._lingering = True
        self.transport.write_eof()
        self.transport.resume_reading()
        self.loop.call_later(LINGER, self.abort)

    def connection_lost(self, exc):
        # What arrived together with the connection's end is read before its task is cancelled.
        self.loop.call_soon(super().connection_lost, exc)

    def data_received(self, data: bytes):
        if not self._lingering:
            return super().data_received(data)
        self._discarded += len(data)
        if self._discarded >= DISCARD:
            self.transport.pause_reading()
