"""Connections that smuggle requests, stall, trickle or are refused: each gets its answer, and none harms others."""

import asyncio
import contextlib
import socket
import time

import psutil
import pytest
from conftest import Site, run_with_db, until
from making import make_post
from state import unchanged
from uploading import BODY, TUS, begin, offset, picture
from wire import FORM, Line, dial, exchange, head, hear, reset
from wiretrace import chunked

SECOND = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
CHUNKED = ("Content-Type: application/json", "Transfer-Encoding: chunked")
TEXT = b'{"text": "smuggled"}'

# Requests that add a comment, each malformed in one way. A second request follows on the same connection. A server that
# reads the malformed one differently than a proxy in front of it would take part of it for a request (smuggling).
MALFORMED = {
    "a space before a colon": (["Transfer-Encoding : chunked"], chunked(TEXT)),
    "a tab before a colon": (["Content-Length\t: 20"], TEXT),
    "a length and chunks": ([*CHUNKED, "Content-Length: 20"], chunked(TEXT)),
    "chunks and a length": (["Content-Length: 20", *CHUNKED], chunked(TEXT)),
    "two lengths": (["Content-Length: 20", "Content-Length: 4"], TEXT),
    "the same length twice": (["Content-Length: 20", "Content-Length: 20"], TEXT),
    "two lengths in one": (["Content-Length: 20, 20"], TEXT),
    "a length with a sign": (["Content-Length: +20"], TEXT),
    "a negative length": (["Content-Length: -20"], TEXT),
    "a hexadecimal length": (["Content-Length: 0x14"], TEXT),
    "a length with an underscore": (["Content-Length: 2_0"], TEXT),
    "an empty length": (["Content-Length:"], TEXT),
    "a length in Arabic digits": (["Content-Length: \u0662\u0660"], TEXT),
    "a length in superscript": (["Content-Length: 2\u2070"], TEXT),
    "a length of 30 digits": (["Content-Length: " + "9" * 30], TEXT),
    "another encoding after chunks": (["Transfer-Encoding: chunked, gzip"], chunked(TEXT)),
    "another encoding before chunks": (["Transfer-Encoding: gzip, chunked"], chunked(TEXT)),
    "chunks twice": (["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], chunked(TEXT)),
    "the encoding identity": (["Transfer-Encoding: identity"], TEXT),
    "chunks with a vertical tab": (["Transfer-Encoding: \x0bchunked"], chunked(TEXT)),
    "chunks with a space of Unicode": (["Transfer-Encoding: \u00a0chunked"], chunked(TEXT)),
    "a length with a space of Unicode": (["Content-Length: \u00a020"], TEXT),
    "a folded line": (["Content-Length: 20", "X-One: a", " b"], TEXT),
    "a folded first line": ([" Transfer-Encoding: chunked"], TEXT),
    "a line without a colon": (["Content-Length 20"], TEXT),
    "a line without a name": ([": 20"], TEXT),
    "a bare line feed": (["X-One: a\nTransfer-Encoding: chunked"], chunked(TEXT)),
    "a bare carriage return": (["X-One: a\rTransfer-Encoding: chunked"], chunked(TEXT)),
    "a NUL": (["X-One: a\x00b"], TEXT),
    "a second host": (["Host: other"], TEXT),
    "a chunk's size in 0x": (CHUNKED, b"0x14\r\n" + TEXT + b"\r\n0\r\n\r\n"),
    "a chunk's size with a sign": (CHUNKED, b"+14\r\n" + TEXT + b"\r\n0\r\n\r\n"),
    "a negative chunk": (CHUNKED, b"-14\r\n" + TEXT + b"\r\n0\r\n\r\n"),
    "a chunk's size with an underscore": (CHUNKED, b"1_4\r\n" + TEXT + b"\r\n0\r\n\r\n"),
    "a chunk's size after a space": (CHUNKED, b" 14\r\n" + TEXT + b"\r\n0\r\n\r\n"),
    "a chunk without a size": (CHUNKED, b";a=b\r\n" + TEXT + b"\r\n0\r\n\r\n"),
    "a chunk of nonsense": (CHUNKED, b"zz\r\n" + TEXT + b"\r\n0\r\n\r\n"),
    "a chunk longer than its size": (CHUNKED, b"14\r\n" + TEXT + b"XX0\r\n\r\n"),
    "a chunk ended by a line feed": (CHUNKED, b"14\r\n" + TEXT + b"\n0\r\n\r\n"),
    "a size ended by a line feed": (CHUNKED, b"14\n" + TEXT + b"\r\n0\r\n\r\n"),
    "a size line without end": (CHUNKED, b"14;" + b"a" * 200),
    "a trailer that is no field": (CHUNKED, chunked(TEXT, end=b"0\r\nX-One\r\n\r\n")),
    "a trailer with a space before its colon": (CHUNKED, chunked(TEXT, end=b"0\r\nX-One : a\r\n\r\n")),
    "a trailer with a bare line feed": (CHUNKED, chunked(TEXT, end=b"0\r\nX-One: a\n\r\n\r\n")),
    "trailers of 10,000 bytes": (CHUNKED, chunked(TEXT, end=b"0\r\n" + b"X: 45678\r\n" * 1000 + b"\r\n")),
    "trailers without end": (CHUNKED, chunked(TEXT, end=b"0\r\n" + b"X: 45678\r\n" * 1000)),
    "no empty line at the end": (CHUNKED, chunked(TEXT, end=b"0\r\nGET")),
}
BAD_LINES = {
    "no host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two spaces": b"GET  /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no version": b"GET /healthz\r\nHost: localhost\r\n\r\n",
    "another version": b"GET /healthz HTTP/1.2\r\nHost: localhost\r\n\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a target that is not ASCII": "GET /h\u00e9 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
    "a control character in the target": b"GET /heal\x01thz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "chunks in HTTP/1.0": b"POST /healthz HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a method with a bracket": b"G(T /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}
TARGETS = [
    *("x:443", "?x", "x", "*", "http:///", "http:///healthz", "http://", "http:/healthz", "http://a@b/healthz"),
    *("ftp://localhost/healthz", "localhost/healthz", "/healthz#x", "http://localhost/healthz#x", "\\healthz"),
]
for method in ("GET", "POST", "CONNECT", "OPTIONS"):
    BAD_LINES |= {f"{method} {target}": head(method, target) for target in TARGETS}


@pytest.fixture(scope="module")
def post(serving):
    return run_with_db(serving.server, lambda db: make_post(db, "alice"))


def read_all(line: socket.socket) -> bytes:
    """All bytes that the server sends until it closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := line.recv(65536):
            data += piece
    return data


def statuses(site, data: bytes) -> list[bytes]:
    """Sends `data`, and returns the status of each answer that comes before the server closes the connection."""
    with dial(site.port) as line:
        line.settimeout(10)
        line.sendall(data)
        return [part[:3] for part in read_all(line).split(b"HTTP/1.1 ") if part]


@pytest.mark.parametrize("case", MALFORMED)
def test_an_ambiguous_request_is_refused_and_the_connection_is_closed(serving, post, case):
    headers, body = MALFORMED[case]
    headers = [header.encode().decode("latin-1") for header in headers]
    asked = head("POST", f"/v1/posts/{post}/comments", serving.authorization(), *headers)
    with unchanged(serving.server.client, serving.folder):
        assert statuses(serving, asked + body + SECOND) == [b"400"]


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_malformed_request_line_is_refused_and_the_connection_is_closed(serving, case):
    with unchanged(serving.server.client, serving.folder):
        assert statuses(serving, BAD_LINES[case] + SECOND) == [b"400"]


def test_a_request_in_chunks_is_accepted_and_the_connection_stays_open(serving, post):
    asked = head("POST", f"/v1/posts/{post}/comments", serving.authorization(), *CHUNKED)
    body = b'5;a="b"\r\n{"tex\r\n0F\r\n' + b't": "two parts"}'[:15] + b"\r\n1\r\n}\r\n0\r\n\r\n"
    assert statuses(serving, asked + body + LAST) == [b"201", b"200"]


def test_of_a_whole_url_as_target_the_path_counts(serving):
    for target in ("http://localhost/healthz", "HTTPS://[::1]:8443/healthz?a=b", "http://user-s.example:80/healthz"):
        answer = exchange(serving.port, head("GET", target))
        assert (answer.status, answer.headers["connection"]) == (200, "keep-alive")
    assert exchange(serving.port, head("GET", "http://localhost?a=b")).json()["code"] == "nowhere"
    pages = [exchange(serving.port, head("GET", f"{host}/v1/posts?limit=1")) for host in ("", "http://localhost")]
    assert pages[0].headers["etag"] == pages[1].headers["etag"]


@pytest.mark.parametrize(
    ("header", "end"),
    [
        ("Transfer-Encoding: ChUnKeD", b"0\r\n\r\n"),
        ("transfer-encoding:CHUNKED \t", b"0\r\n\r\n"),
        ("Transfer-Encoding: chunked", b"0\r\nX-One: a\r\n\r\n"),
        ("Transfer-Encoding: chunked", b'00;a="b"\r\nX-One: a\r\nContent-Length: 5\r\nX-Two:\r\n\r\n'),
        ("Transfer-Encoding: chunked", b"0\r\n" + b"X: 45678\r\n" * 700 + b"\r\n"),
    ],
)
def test_chunked_in_any_case_and_trailers_are_accepted_and_the_connection_stays_open(serving, post, header, end):
    token = serving.authorization()
    asked = head("POST", f"/v1/posts/{post}/comments", token, header) + chunked(b'{"text": "in chunks"}', end=end)
    assert statuses(serving, asked + LAST) == [b"201", b"200"]
    with dial(serving.port) as line:  # byte by byte
        for byte in asked:
            line.sendall(bytes([byte]))
        assert hear(line).status == 201


BODILESS = [
    ("GET", "/v1/posts", b"200"),
    ("GET", "/nowhere", b"404"),
    ("OPTIONS", "/v1/uploads", b"204"),
    ("OPTIONS", "/v1/posts", b"405"),
    ("HEAD", "/v1/uploads/x", b"401"),
    ("DELETE", "/v1/posts/x", b"401"),
    ("DELETE", "/v1/posts/x/comments/1-0", b"401"),
    ("DELETE", "/v1/uploads/x", b"401"),
    ("PUT", "/v1/posts", b"405"),
    ("BREW", "/v1/posts", b"405"),
]


@pytest.mark.parametrize(("method", "target", "status"), BODILESS)
def test_a_body_of_a_method_without_one_is_ignored_and_the_connection_is_closed(serving, method, target, status):
    for body, *headers in [
        (SECOND, f"Content-Length: {len(SECOND)}"),
        (chunked(SECOND), "Transfer-Encoding: chunked"),
        (b"", "Content-Length: 1000000", "Expect: 100-continue"),
        (b"gz", "Content-Length: 2", "Content-Encoding: gzip"),
    ]:
        assert statuses(serving, head(method, target, TUS, *headers) + body) == [status]
    empty = head(method, target, TUS, "Content-Length: 0", "Expect: 100-continue")
    assert statuses(serving, empty + LAST) == [status, b"200"]


async def test_a_trickling_body_that_no_method_needs_does_not_keep_its_connection_open(serving):
    """100 connections with DELETE, and 10 with each other method, all at the same time.

    They must be closed as soon as a POST that is refused before its body.
    """
    alice = serving.authorization()
    upload = await asyncio.to_thread(begin, serving, 100)
    override = head("POST", f"/v1/uploads/{upload}", alice, TUS, "X-HTTP-Method-Override: DELETE", "Content-Length: 99")
    crowd = [Bad("401", head("POST", "/v1/posts", FORM, "Content-Length: 1000"), b"x", 0.3) for _ in range(10)]
    crowd += [Bad("401", head("DELETE", "/v1/posts/x", "Content-Length: 1000"), b"x", 0.3) for _ in range(100)]
    crowd += [Bad("204", override, b"x", 0.3)]
    for method, target, status in BODILESS:
        asked = head(method, target, TUS, "Transfer-Encoding: chunked")
        crowd += [Bad(status.decode(), asked, b"1\r\nx\r\n", 0.3) for _ in range(10)]
    await asyncio.gather(*(bad.run(serving.port, 10) for bad in crowd))
    assert all(bad.lasted is not None for bad in crowd), [bad.beginning for bad in crowd if bad.lasted is None][:1]
    posts, others = ([bad.lasted for bad in part] for part in (crowd[:10], crowd[10:]))
    assert max(others) < max(posts) + 1
    for bad in crowd:
        assert bad.answer.startswith(f"HTTP/1.1 {bad.name}".encode()), (bad.beginning, bad.answer)


def test_a_delete_happens_without_waiting_for_its_body(serving):
    upload = begin(serving, 100)
    asked = head("DELETE", f"/v1/uploads/{upload}", serving.authorization(), TUS)
    assert statuses(serving, asked.replace(b"\r\n\r\n", b"\r\nContent-Length: 99\r\n\r\n")) == [b"204"]
    assert not serving.server.client.exists(f"upload:{{0}}:{upload}")


def test_malformed_requests_write_nothing_to_the_log(embedded, tmp_path):
    """Sends each malformed request of this file, and each one with a body that the API does not read, once."""
    site = Site(embedded.url, tmp_path / "data")
    with (tmp_path / "log").open("w+") as log:
        try:
            site.api(stderr=log)
            token = site.authorization()
            for headers, body in MALFORMED.values():
                headers = [header.encode().decode("latin-1") for header in headers]
                statuses(site, head("POST", "/v1/posts/x/comments", token, *headers) + body + SECOND)
            for line in BAD_LINES.values():
                statuses(site, line)
            for method, target, _ in BODILESS:
                statuses(site, head(method, target, TUS, "Content-Length: 9") + b"{}")
                statuses(site, head(method, target, TUS, "Transfer-Encoding: chunked") + chunked(TEXT))
            encoded = head("POST", "/v1/posts", token, FORM, "Content-Encoding: gzip", "Content-Length: 9")
            assert statuses(site, encoded) == [b"415"]
            form = head("POST", "/v1/posts", token, FORM, "Content-Length: 9") + b"--f"
            for beginning in (b"GET / HT", form, encoded):
                with dial(site.port) as line:
                    line.sendall(beginning)
                    reset(line)
        finally:
            site.close()
        log.seek(0)
        start, *rest = log.read().splitlines()
        assert start.startswith("INFO imagegram.api: http://") and not rest


def refused_by_their_head(site) -> dict[str, tuple[bytes, bytes]]:
    """Heads of requests that are refused without their body, each with its status."""
    alice, big = site.authorization(), "Content-Length: 104857600"
    upload = f"/v1/uploads/{begin(site, 100)}"
    return {
        "a form without a token": (head("POST", "/v1/posts", FORM, big), b"401"),
        "a form that is too large": (head("POST", "/v1/posts", alice, FORM, "Content-Length: 999999999"), b"413"),
        "a post of another type": (head("POST", "/v1/posts", alice, "Content-Type: a/b", big), b"415"),
        "a comment that is too large": (head("POST", "/v1/posts/x/comments", alice, big), b"413"),
        "an upload without a token": (head("POST", "/v1/uploads", TUS, "Upload-Length: 9", BODY, big), b"401"),
        "an upload past its length": (head("POST", "/v1/uploads", alice, TUS, "Upload-Length: 9", BODY, big), b"413"),
        "a PATCH at another offset": (head("PATCH", upload, alice, TUS, BODY, "Upload-Offset: 9", big), b"409"),
        "a PATCH past the end": (head("PATCH", upload, alice, TUS, BODY, "Upload-Offset: 0", big), b"413"),
        "a PATCH of no upload": (head("PATCH", "/v1/uploads/u0", alice, TUS, BODY, "Upload-Offset: 0", big), b"404"),
        "an address of nothing": (head("POST", "/nowhere", big), b"404"),
        "a method that is not allowed": (head("PUT", "/v1/posts", big), b"405"),
    }


@pytest.mark.parametrize("expect", [False, True])
def test_the_body_of_a_request_that_is_refused_by_its_head_is_neither_invited_nor_awaited(serving, expect):
    for name, (start, status) in refused_by_their_head(serving).items():
        if expect:
            start = start.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
        began = time.monotonic()
        with unchanged(serving.server.client, serving.folder), dial(serving.port) as line:
            line.sendall(start)
            answer = read_all(line)
        assert answer.startswith(b"HTTP/1.1 " + status), (name, answer)
        assert answer.count(b"HTTP/1.1 ") == 1 and b"\r\nconnection: close\r\n" in answer.lower(), (name, answer)
        assert time.monotonic() - began < 5, name


def test_an_unknown_expectation_is_refused(serving):
    sent = head("POST", "/v1/posts", "Expect: 200-ok", "Content-Length: 5") + b"12345"
    assert statuses(serving, sent) == [b"417"]


class Bad:
    """A connection that misbehaves. It sends a beginning, then a piece every `every` seconds until it is closed.

    `lasted` becomes the seconds until the server closed it; None if it was still open at the end.
    """

    def __init__(self, name: str, beginning: bytes, piece: bytes = b"", every: float = 1.0):
        self.name, self.beginning, self.piece, self.every = name, beginning, piece, every
        self.answer, self.lasted = b"", None

    async def run(self, port: int, give_up: float) -> "Bad":
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.monotonic()
        sending = asyncio.create_task(self.send(writer))
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(give_up):
                while data := await reader.read(4096):
                    self.answer += data
                self.lasted = time.monotonic() - began
        if self.lasted is None and reader.exception():
            self.lasted = time.monotonic() - began
        sending.cancel()
        writer.transport.abort()
        return self

    async def send(self, writer) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(self.beginning)
            while self.piece:
                await asyncio.sleep(self.every)
                writer.write(self.piece)
                await writer.drain()


def open_files(site) -> int:
    parent = psutil.Process(site.processes[0].pid)
    return sum(process.num_fds() for process in parent.children())


async def healthy(site, seconds: float, times: list[float]) -> None:
    """Sends good requests, one after the other, and adds to `times` how long each took, in seconds."""
    end = time.monotonic() + seconds
    async with Line(site.port) as line:
        while time.monotonic() < end:
            began = time.monotonic()
            assert (await line.ask("GET", "/v1/posts")).status == 200
            times.append(time.monotonic() - began)
            await asyncio.sleep(0.02)


def crowd(site, post: str, count: int) -> dict[str, list[Bad]]:
    """Bad connections by their kind: `count` with a slow header, and a quarter as many of each other kind."""
    alice = site.authorization()
    comment = head("POST", f"/v1/posts/{post}/comments", alice, "Content-Type: application/json", "Content-Length: 99")
    form = head("POST", "/v1/posts", alice, FORM, "Content-Length: 1000000")
    unwanted = head("POST", "/v1/posts", FORM, "Content-Length: 1000000")
    few = count // 4
    return {
        "header": [Bad("header", b"GET /healthz HTTP/1.1\r\n", b"x") for _ in range(count)],
        "stalled": [Bad("stalled", comment + b"{") for _ in range(few)],
        "trickling": [Bad("trickling", form + b"--frontier\r\n", b"X", 5.0) for _ in range(few)],
        "refused": [Bad("refused", unwanted, b"x" * 1000, 0.5) for _ in range(few)],
    }


@pytest.mark.timeout(90)
async def test_a_crowd_of_bad_connections_harms_no_good_one_and_is_closed_in_time(serving, post):
    """With the real limits: 10 s for the header, 30 s without a byte of the body, no limit for a slow body."""
    client = serving.server.client
    upload = await asyncio.to_thread(begin, serving, 1000)
    alice = serving.authorization()
    tus = (alice, TUS, BODY, "Upload-Offset: 0")
    stalled = Bad("upload", head("PATCH", f"/v1/uploads/{upload}", *tus, "Content-Length: 1000") + picture(700))
    slow_upload = await asyncio.to_thread(begin, serving, 36)
    # One byte a second, for longer than any limit. It must not be cut, because it progresses.
    slow = Bad("slow", head("PATCH", f"/v1/uploads/{slow_upload}", *tus, "Content-Length: 36") + b"B", b"M", 1.0)
    uploads = set(client.hgetall("uploads:{0}:alice"))
    before, times = open_files(serving), []
    crowded = crowd(serving, post, 200)
    runs = [bad.run(serving.port, 39) for bads in crowded.values() for bad in bads]
    runs += [stalled.run(serving.port, 39), slow.run(serving.port, 39), healthy(serving, 36, times)]
    await asyncio.gather(*runs)

    for bad in crowded["header"]:
        assert bad.lasted is not None and 7 < bad.lasted < 15, bad.lasted
        assert bad.answer.startswith(b"HTTP/1.1 408")
    for bad in (*crowded["stalled"], stalled):
        assert bad.lasted is not None and 28 < bad.lasted < 35, bad.lasted
        assert bad.answer.startswith(b"HTTP/1.1 503") and b"stalled" in bad.answer
    for bad in crowded["refused"]:
        assert bad.lasted is not None and bad.lasted < 5
        assert bad.answer.startswith(b"HTTP/1.1 401")
    for bad in crowded["trickling"]:
        assert (bad.lasted, bad.answer) == (None, b""), "a form that progresses is not cut"
    assert slow.answer.startswith(b"HTTP/1.1 204") and slow.lasted is None
    assert await asyncio.to_thread(offset, serving, slow_upload) == 36
    assert await asyncio.to_thread(offset, serving, upload) == 700
    assert max(times) < 2, "good requests are answered all the time"
    await asyncio.to_thread(until, lambda: open_files(serving) <= before + 2, 10, "the close of all sockets")
    await asyncio.to_thread(until, lambda: set(client.hkeys("uploads:{0}:alice")) == uploads, 10, "no more forms")


def test_the_answer_to_a_malformed_header_is_a_problem_too(serving):
    with dial(serving.port) as line:
        line.sendall(b"GET /healthz HTTP/1.1\r\nHost : x\r\n\r\n")
        answer = hear(line)
    assert (answer.status, answer.headers["content-type"]) == (400, "application/problem+json")
    assert (answer.json()["status"], answer.json()["title"]) == (400, "Bad Request")
