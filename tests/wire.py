"""HTTP over bare sockets: requests that no HTTP client would send, and requests as fast as a test can send them."""

import asyncio
import http.client
import json
import select
import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

from conformance import SITES, check

REMEMBERED = 20_000  # bytes of a request, more than the longest request line


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case; several lines of one name are joined by commas
    body: bytes

    def json(self):
        return json.loads(self.body)


def head(method: str, target: str, *headers: str) -> bytes:
    """A request's line and headers, up to and with the empty line. `headers` are whole header lines."""
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode("latin-1")


def request(method: str, target: str, token: str | None = None, body: bytes | None = None) -> bytes:
    """A whole request. Its body is sent as JSON."""
    headers = [f"Authorization: Bearer {token}"] if token else []
    if body is not None:
        headers += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return head(method, target, *headers) + (body or b"")


def form(*parts: tuple[str, str | None, bytes], boundary: str = "frontier", end: bool = True) -> bytes:
    """A multipart/form-data body, by default with its last boundary. A part is (field, file name or None, bytes)."""
    body = b""
    for field, name, data in parts:
        file = f'; filename="{name}"\r\nContent-Type: application/octet-stream' if name else ""
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"{file}\r\n\r\n'.encode()
        body += data + b"\r\n"
    return body + (f"--{boundary}--\r\n".encode() if end else b"")


FORM = "Content-Type: multipart/form-data; boundary=frontier"


class Dialled(socket.socket):
    """A connection that remembers what was sent since the last answer, so that the next answer can be checked.

    Of several requests that are sent at once only the first one's answer is checked.
    """

    port = 0
    sent = b""

    def send(self, data, *flags):
        count = super().send(data, *flags)
        self._remember(data[:count])
        return count

    def sendall(self, data, *flags):
        super().sendall(data, *flags)
        self._remember(data)

    def _remember(self, data) -> None:
        if b"\r\n" not in self.sent:
            self.sent += bytes(data[:REMEMBERED])


def dial(port: int) -> Dialled:
    line = Dialled(socket.AF_INET, socket.SOCK_STREAM)
    line.settimeout(30)
    line.connect(("127.0.0.1", port))
    line.port = port
    return line


def hear(line: socket.socket, method: str = "GET") -> Answer:
    """Reads the answer to a request that was sent. It skips a 100 Continue."""
    response = http.client.HTTPResponse(line, method=method)
    response.begin()
    headers = {name.lower(): response.getheader(name) for name, _ in response.getheaders()}
    answer = Answer(response.status, headers, response.read())
    if isinstance(line, Dialled):
        check_answer(line.port, line.sent, answer)
        line.sent = b""
    return answer


def check_answer(port: int, sent: bytes, answer: Answer) -> None:
    """Compares an answer with the description of the API, if it comes from a site."""
    if port in SITES and sent:
        method, _, target = sent.partition(b"\r\n")[0].decode("latin-1").partition(" ")
        check(method, target.rpartition(" ")[0], *answer[:1], answer.headers.items(), answer.body)


def exchange(port: int, data: bytes) -> Answer:
    """Sends a whole request on a new connection, and returns the answer."""
    with dial(port) as line:
        line.sendall(data)
        return hear(line, data[: data.index(b" ")].decode())


def pour(port: int, pieces: Iterable[bytes]) -> tuple[Answer, int]:
    """Sends until an answer comes, as a client does that reads while it sends. Returns (answer, bytes sent)."""
    sent = 0
    with dial(port) as line:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                readable, writable, _ = select.select([line], [line], [], 30)
                if readable or not writable:
                    return hear(line), sent
                count = line.send(view)
                sent, view = sent + count, view[count:]
        return hear(line), sent


def reset(line: socket.socket) -> None:
    """Closes with an RST, as when a network fails. A plain close sends a FIN."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.close()


class Line:
    """A keep-alive connection for asyncio. It sends one request after the other, some thousands a second."""

    def __init__(self, port: int, token: str | None = None):
        self._port = port
        self._headers = [f"Authorization: Bearer {token}"] if token else []
        self._reader = self._writer = None

    async def __aenter__(self):
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *error):
        self._writer.close()

    async def ask(self, method: str, target: str, body: object = None) -> Answer:
        headers, data = list(self._headers), b""
        if body is not None:
            data = json.dumps(body).encode()
            headers += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        sent = head(method, target, *headers) + data
        self._writer.write(sent)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = (line.partition(": ") for line in lines[1:-2])
        answered = {name.lower(): value for name, _, value in fields}
        content = await self._reader.readexactly(int(answered.get("content-length", 0)))
        answer = Answer(int(lines[0].split()[1]), answered, content)
        check_answer(self._port, sent, answer)
        return answer
