"""Closes holes in Sanic's HTTP/1.1 protocol. Measured with Sanic 25.12:

| hole | here |
|---|---|
| After an early refusal Sanic reads the rest of the body, and first sends `100 Continue`. | It does neither. |
| A body that stalls holds its connection for ever. | It is closed after the idle time. |
| A header that arrives one byte a second is accepted, however long it takes. | It has 10 seconds. |
| Malformed requests pass that a proxy may split in another way (request smuggling). | They get 400. |
"""

import asyncio
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

from api import access, cors
from api.answers import READ, FastResponse, http_date
from api.headers import request_id
from api.metrics import count
from storage import traces

LINGER = 1.0  # seconds for which a refused client may read why it was refused
DISCARD = 64 * 1024  # bytes of its body that are read meanwhile, for clients that send everything before they read
POLL = 2.0  # seconds between two checks of a connection's timeouts
HEADER = 10.0  # seconds within which a request's header must be complete

# Bytes of trailers after the last chunk. They are dropped; clients send at most a checksum there.
TRAILER_BYTES = 8192
TAKE_A_BODY = {"POST", "PATCH"}  # methods whose body is read

# RFC 9112, sections 3 and 5: one space between the parts, none before a colon, no folded lines, no control characters.
# The target is a path, or an absolute URL (section 3.2.2); group 1 is the part of the URL before its path. Group 2 is a
# transfer coding. The quantifiers are possessive: without that, lines that match in two ways are tried 2^n times.
NAME = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
FIELD = NAME + rb"++:[^\x00-\x08\x0a-\x1f]*+"
HEAD = re.compile(
    NAME + rb"++ (?:/|((?i:https?)://[0-9A-Za-z.:_~%!$&'()*+,;=\[\]-]++)(?=[/? ]))[!\"$-~]*+ HTTP/1\.[01]"
    rb"(?:\r\n(?>(?i:transfer-encoding):([ \t]*+(?i:chunked)[ \t]*+)|" + FIELD + rb"))*+"
)
TRAILERS = re.compile(rb"(?:" + FIELD + rb"\r\n)*+")
# The headers that say where a body ends. They are read as bytes, because Python's string methods also accept other
# Unicode spaces and digits. RFC 9110, section 8.6: a length has only ASCII digits.
FRAMING = re.compile(rb"\r\n(?:content-length|transfer-encoding):([^\r]*)", re.IGNORECASE)
FRAMED = re.compile(rb"[ \t]*(?:[0-9]{1,18}|chunked)[ \t]*")
# RFC 9112, section 7.1. Group 1: the size of the last chunk.
CHUNK = re.compile(rb"\r\n(?:(0{1,16})|[0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]{0,64})?\r\n")
CHUNK_HEAD = 64  # bytes a chunk's size line may have, including extensions
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class EncodedBody(SanicException):
    """A body with a Content-Encoding. Decoding it would need its own limit: some bodies grow a thousandfold."""

    status_code = 415


class StrictHttp(Http):
    """Sanic's parser, but it refuses a request that a proxy could read in another way, and closes the connection.

    It also decides about bodies, for every method and address: the handler of a POST or PATCH reads the body after it
    has checked the token. A body that no handler reads is neither invited by `100 Continue` nor read.
    """

    # limits: the lines of RateLimit and RateLimit-Policy, empty if the request counts against no limit.
    # reader: the charge of a read from this connection's address (api/limits.py), None if there was no such read yet.
    __slots__ = ("limits", "reader")

    def __init__(self, protocol):
        super().__init__(protocol)
        self.limits, self.reader = "", None

    async def http1_request_header(self):
        self.limits = ""
        # Every byte would reset an idle timer. So the time of the whole header is limited.
        self.protocol.header_began = monotonic()
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
        if traces.tracer:
            request.ctx.span = traces.begin(request.headers.get("traceparent", ""))
        hosts = len(request.headers.getall("host", ()))
        framing = FRAMING.findall(request.head) if self.request_body else ()
        if (
            hosts > 1
            or (hosts == 0 and request.version == "1.1")
            # RFC 9112, section 6.1: HTTP/1.0 has no chunks
            or (self.request_body == "chunked" and request.version == "1.0")
            or (framing and not all(map(FRAMED.fullmatch, framing)))
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

    async def http1(self):
        try:
            await super().http1()
        finally:
            if self.request and not self.response:
                count(self, None)

    def refuse_body(self) -> None:
        """Neither invite nor read the rest of the body, and close the connection after the answer.

        RFC 9110, section 10.1.1: a server may send a final status instead of 100, before it has read the content.
        """
        self.expecting_continue = self.keep_alive = False
        self.request_body = None
        self.protocol.refused = True

    async def error_response(self, exception: Exception) -> None:
        # The client went away while its answer was sent. Sanic would send a second answer. That fails, because the
        # first has begun.
        if isinstance(exception, RequestCancelled) and self.response and self.protocol.transport.is_closing():
            self.keep_alive = False
            return
        await super().error_response(exception)

    def respond(self, response):
        if self.response is None:
            count(self, response)
        if self.request_body:
            self.refuse_body()
        ctx = self.protocol.app.ctx
        if ctx.stopping:
            self.keep_alive = False
        if ctx.cors:
            cors.mark(self.request, response, ctx.cors)
        if not isinstance(response, FastResponse):  # it writes them itself
            response.headers["Date"] = http_date(int(time()))
            response.headers["Request-Id"] = request_id(self.request)
            if self.limits:
                for line in self.limits.splitlines():
                    response.headers.add(*line.split(": "))
        if ctx.log_requests:
            access.log(self, response)
        if traces.tracer:
            access.end_span(self.request, response)
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
            self.expecting_continue = False  # a body that is too large gets no 100 Continue
        return await super().read()

    async def _drop_trailers(self, start: int) -> bool:
        """Remove the trailers from the buffer, because Sanic refuses them. False if they are malformed or too long.

        `start` is the position in the buffer where they begin. RFC 9112, section 7.1.2: a recipient may discard them.
        """
        buffer = self.recv_buffer
        while (end := buffer.find(b"\r\n\r\n", start - 2)) == -1 and len(buffer) - start <= TRAILER_BYTES:
            await self._receive_more()
        if not start - 2 <= end <= start + TRAILER_BYTES or not TRAILERS.fullmatch(buffer, start, end + 2):
            return False
        del buffer[start : end + 2]
        return True


def normalize(buffer: bytearray, head: re.Match) -> None:
    """Rewrite a request's header for Sanic: `chunked` in lower case, and a path as the target."""
    if head[2]:
        buffer[head.start(2) : head.end(2)] = head[2].strip().lower().rjust(len(head[2]))
    if head[1]:
        # RFC 9112, section 3.2.2: servers must accept an absolute URL. Section 3.2.1: an empty path is sent as "/".
        buffer[head.start(1) : head.end(1)] = b"" if buffer[head.end(1)] == ord("/") else b"/"


class Protocol(HttpProtocol):
    """Sanic's protocol with our parser and timeouts."""

    HTTP_CLASS = StrictHttp
    __slots__ = ("header_began", "refused", "_awaited", "_lingering", "_discarded")

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.request_handler = self.handle
        self._awaited: asyncio.Future | None = None  # what `receive_more` waits for
        self.refused = self._lingering = False
        self._discarded = 0
        self.header_began = 0.0  # time.monotonic() when the current request's header began

    async def handle(self, request):
        """Do what Sanic's `handle_request` does. For most reads, leave out what they do not need, which takes 3 µs.

        The only request middleware is for OPTIONS. No handler is a plain function, or sends its answer itself.
        """
        app = self.app
        if request.method not in READ:
            return await app.handle_request(request)
        try:
            request.route, handler, request._match_info = app.router.get(request.path, request.method, None)
            if request.route.extra.response_middleware:
                return await app.handle_request(request)
            response = await handler(request, **request._match_info)
            request.stream.respond(response)
            request.responded = True
            await response.send(end_stream=True)
        except Exception as error:
            await app.handle_exception(request, error, run_middleware=False)

    # Sanic waits with asyncio.Event, whose `wait` takes 2 µs: in Python 3.11 it makes a system call.

    async def send(self, *data: bytes):
        if not self._can_write.is_set():
            await self._can_write.wait()
        if self.transport.is_closing():
            raise RequestCancelled
        if len(data) == 1:
            self.transport.write(data[0])
        else:
            self.transport.writelines(data)
        self._time = monotonic()

    async def receive_more(self):
        self.transport.resume_reading()
        self._awaited = self.loop.create_future()
        await self._awaited

    def check_timeouts(self):
        """Check every POLL seconds whether the connection has exceeded one of its timeouts."""
        if not self._task:
            return
        now, stage = monotonic(), self._http.stage
        idle, timeout = now - self._time, None
        if stage is Stage.REQUEST:
            if now - self.header_began > HEADER - POLL:
                timeout = RequestTimeout("the header took too long")
        elif stage is Stage.IDLE:
            if idle > self.keep_alive_timeout:
                timeout = RequestTimeout("idle")
        elif idle > self.response_timeout:
            timeout = ServiceUnavailable("no byte arrived for too long")
        if timeout is None:
            self._callback_check_timeouts = self.loop.call_later(POLL, self.check_timeouts)
            return
        self._http.exception = timeout
        self._http.keep_alive = False
        self._task.cancel()
        # The cancelled task commits what was received. Then the socket is closed, whatever the client does.
        self.loop.call_later(LINGER, self.abort)

    def close(self, timeout: float | None = None):
        # Closing a socket that has unread bytes resets it, and the client loses the answer that explains the refusal.
        # So our side is closed first (RFC 9112, section 9.6), and the socket stays open for LINGER seconds. At most
        # DISCARD bytes are read from it: a client on a slow line should stop sending.
        if not self.refused or self._lingering or self.transport is None or self.transport.is_closing():
            return super().close(timeout)
        if self._callback_check_timeouts:
            self._callback_check_timeouts.cancel()
        self._lingering = True
        self.transport.write_eof()
        self.transport.resume_reading()
        self.loop.call_later(LINGER, self.abort)

    def connection_lost(self, exc):
        # Bytes that arrived together with the end of the connection are read before the task is cancelled.
        self.loop.call_soon(super().connection_lost, exc)

    def data_received(self, data: bytes):
        if self._lingering:
            self._discarded += len(data)
            if self._discarded >= DISCARD:
                self.transport.pause_reading()
            return
        self._time = monotonic()
        self.recv_buffer += data
        if len(self.recv_buffer) >= self.app.config.REQUEST_BUFFER_SIZE:
            self.transport.pause_reading()
        if self._awaited and not self._awaited.done():
            self._awaited.set_result(None)
