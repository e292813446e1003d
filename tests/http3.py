"""HTTP/3 for httpx, which has only HTTP/1.1 and 2: one QUIC connection, by aioquic."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

import httpx
from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, StreamReset

INITIAL_RTT = 0.333  # seconds; RFC 9002, section 6.2.2. With aioquic's 0.1 it repeats the first packet on a slow line
# A client never waits for the server's window on these lines. The congestion control of what it sends is TCP's.
OPTIONS = {"alpn_protocols": H3_ALPN, "congestion_control_algorithm": "cubic", "initial_rtt": INITIAL_RTT}


class Connection(QuicConnectionProtocol):
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.http = H3Connection(self._quic)
        self.answers: dict[int, asyncio.Queue] = {}  # by stream: the parts of its answer; None is the end

    def quic_event_received(self, event) -> None:
        if isinstance(event, ConnectionTerminated):
            for answer in self.answers.values():
                answer.put_nowait(None)
        elif isinstance(event, StreamReset) and event.stream_id in self.answers:
            self.answers[event.stream_id].put_nowait(None)
        for came in self.http.handle_event(event):
            if isinstance(came, HeadersReceived | DataReceived) and came.stream_id in self.answers:
                self.answers[came.stream_id].put_nowait(came)

    async def next(self, stream: int):
        """What comes next of an answer. Raises httpx.ReadError if its stream or the connection has ended."""
        if (came := await self.answers[stream].get()) is None:
            raise httpx.ReadError("the connection has ended")
        return came


class Body(httpx.AsyncByteStream):
    def __init__(self, connection: Connection, stream: int, ended: bool):
        self.connection, self.stream, self.ended = connection, stream, ended

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while not self.ended:
            came = await self.connection.next(self.stream)
            self.ended = came.stream_ended
            if isinstance(came, DataReceived):
                yield came.data


class Http3(httpx.AsyncBaseTransport):
    """A transport of httpx.AsyncClient. It does not check the server's certificate.

    `tickets` are session tickets of earlier connections. With one of them the first request leaves as early data (RFC
    9001, section 4.6). New tickets are added.
    """

    def __init__(self, tickets: list | None = None):
        self.tickets = [] if tickets is None else tickets
        self.stack = contextlib.AsyncExitStack()
        self.connecting = asyncio.Lock()
        self.connection: Connection | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        async with self.connecting:
            if not self.connection:
                ticket = self.tickets.pop() if self.tickets else None
                options = QuicConfiguration(verify_mode=ssl.CERT_NONE, session_ticket=ticket, **OPTIONS)
                opened = connect(
                    request.url.host,
                    request.url.port,
                    configuration=options,
                    create_protocol=Connection,
                    session_ticket_handler=self.tickets.append,
                    wait_connected=not ticket,
                )
                self.connection = await self.stack.enter_async_context(opened)
        connection = self.connection
        stream = connection._quic.get_next_available_stream_id()
        connection.answers[stream] = asyncio.Queue()
        fields = [
            (b":method", request.method.encode()),
            (b":scheme", b"https"),
            (b":authority", request.url.netloc),
            (b":path", request.url.raw_path),
            *((name.lower(), value) for name, value in request.headers.raw if name.lower() not in OF_HTTP_1),
        ]
        connection.http.send_headers(stream, fields)
        async for piece in request.stream:
            connection.http.send_data(stream, piece, end_stream=False)
        connection.http.send_data(stream, b"", end_stream=True)
        connection.transmit()
        came = await connection.next(stream)
        headers = [(name, value) for name, value in came.headers if not name.startswith(b":")]
        status = int(dict(came.headers)[b":status"])
        return httpx.Response(status, headers=headers, stream=Body(connection, stream, came.stream_ended))

    async def aclose(self) -> None:
        await self.stack.aclose()


OF_HTTP_1 = {b"host", b"connection", b"transfer-encoding"}  # headers that HTTP/3 does not have (RFC 9114, section 4.2)
