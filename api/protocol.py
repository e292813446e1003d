"""What Sanic's HTTP/1.1 leaves open under connections that stall, break off or are refused early.

Measured with Sanic 25.12: after an early refusal it reads the rest of the body, and first invites it with
`100 Continue`; a body that stalls holds its connection for ever.
"""

from sanic.server import HttpProtocol

LINGER = 1.0  # seconds in which a refused client may still send, and reads why it was refused


def refuse_body(request) -> None:
    """Answer now: neither invite nor drain what is left of a request's body, and close the connection afterwards.

    RFC 9110, section 9.3 and 10.1.1: a final status may be sent instead of 100, before the content was read.
    """
    stream = request.stream
    if stream and stream.request_body:
        stream.expecting_continue = False
        stream.keep_alive = False
        stream.request_body = None
        stream.protocol.refused = True


class Protocol(HttpProtocol):
    """Sanic's protocol, with the holes closed."""

    __slots__ = ("refused", "_lingering")

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.refused = self._lingering = False

    def check_timeouts(self):
        super().check_timeouts()
        if self._http and self._http.exception:
            # The request is over, but Sanic would drain its body for ever.
            self._http.keep_alive = False
            self.loop.call_later(LINGER, self.abort)

    def close(self, timeout: float | None = None):
        # Closing a socket with unread bytes resets it, and the client loses the answer that tells it why. So the
        # answer's end is sent first (RFC 9112, section 9.6), and what still arrives is thrown away for a while.
        if not self.refused or self._lingering or self.transport is None or self.transport.is_closing():
            return super().close(timeout)
        if self._callback_check_timeouts:
            self._callback_check_timeouts.cancel()
        self._lingering = True
        self.transport.write_eof()
        self.transport.resume_reading()
        self.loop.call_later(LINGER, self.abort)

    def data_received(self, data: bytes):
        if not self._lingering:
            super().data_received(data)

