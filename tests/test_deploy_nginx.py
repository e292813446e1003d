"""The front of docker-compose: nginx of the same version runs the configuration from deploy/, before a real API."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
import yaml
from conftest import ROOT, running_site, until
from front import Front
from http3 import Http3
from making import jpeg
from state import unchanged
from uploading import BODY, begin, joined, offset, picture
from wire import FORM, Answer, dial, exchange, form, head, hear, request, reset

MB = 1_000_000


class Silent:
    """A site that accepts connections and answers nothing. After `socket.close()` it refuses connections."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.token = None


@pytest.fixture(scope="module")
def front(serving, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nginx")
    folder.chmod(0o755)
    front = Front(serving, folder)
    yield front
    front.close()


def patch(front, upload: str, at: int, length: int) -> bytes:
    alice = f"Authorization: Bearer {front.token('alice')}"
    tus = ("Tus-Resumable: 1.0.0", BODY, f"Upload-Offset: {at}", f"Content-Length: {length}")
    return head("PATCH", f"/v1/uploads/{upload}", alice, *tus)


@pytest.mark.parametrize("end", ["rst", "fin"])
async def test_an_upload_that_breaks_off_after_40_mb_keeps_38_mb_or_more(serving, front, end):
    image = picture(60 * MB)
    upload = await asyncio.to_thread(begin, front, len(image))
    line, began = dial(front.port), time.monotonic()
    line.sendall(patch(front, upload, 0, len(image)))
    for sent in range(0, 40 * MB, MB // 10):
        line.sendall(image[sent : sent + MB // 10])
        ahead = sent / (10 * MB) - (time.monotonic() - began)
        await asyncio.sleep(max(0.0, ahead))  # the client sends 10 MB/s
    if end == "rst":
        reset(line)
    else:
        line.close()
    stored = await asyncio.to_thread(offset, front, upload)
    assert stored >= 38 * MB, f"{stored / MB:.1f} MB"
    final = await asyncio.to_thread(until, lambda: unmoving_offset(front, upload))
    assert await joined(serving, serving.server, upload) == image[:final]

    def resume() -> bool:
        """As a client does: whatever a PATCH is answered, it asks for the offset and goes on there."""
        start = offset(front, upload)
        answer = exchange(front.port, patch(front, upload, start, len(image) - start) + image[start:])
        return answer.status == 204 and answer.headers["upload-offset"] == str(len(image))

    await asyncio.to_thread(until, resume, what="the rest of the upload")
    assert await joined(serving, serving.server, upload) == image


def unmoving_offset(front, upload: str) -> int:
    """The offset of an upload, or 0 while it still moves."""
    first = offset(front, upload)
    return first if offset(front, upload) == first else 0


def test_the_longest_metadata_of_an_upload_passes_both_ways(front):
    metadata = "caption " + "YWFh" * 1022
    assert len(metadata) == 4096
    tus = f"Authorization: Bearer {front.token('alice')}", "Tus-Resumable: 1.0.0"
    new = head("POST", "/v1/uploads", *tus, "Upload-Length: 10", f"Upload-Metadata: {metadata}", "Content-Length: 0")
    made = exchange(front.port, new)
    assert made.status == 201
    answer = exchange(front.port, head("HEAD", made.headers["location"], *tus))
    assert (answer.status, answer.headers["upload-metadata"]) == (200, metadata)


def test_a_form_passes_and_the_api_itself_refuses_one_that_is_too_large(front):
    alice = f"Authorization: Bearer {front.token('alice')}"
    body = form(("image", "a.jpg", jpeg()), ("caption", None, b"Hello"))
    sent = exchange(front.port, head("POST", "/v1/posts", alice, FORM, f"Content-Length: {len(body)}") + body)
    assert (sent.status, sent.json()["caption"]) == (201, "Hello")
    assert sent.headers["location"] == f"/v1/posts/{sent.json()['id']}", "relative, whatever the front's name"
    largest = 100 * 2**20 + 64 * 1024
    too_large = head("POST", "/v1/posts", alice, FORM, f"Content-Length: {largest + 1}")
    with unchanged(front.site.server.client), dial(front.port) as line:
        line.sendall(too_large)
        refused = hear(line)
    assert (refused.status, refused.json()["code"]) == (413, "toolarge")
    assert refused.json()["detail"] != "the request is too large", "nginx's own words"


def assert_problem(answer, status: int, code: str) -> None:
    """An answer that nginx gives by itself is a problem in the API's format."""
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.headers["cache-control"] == "no-store"
    assert len(answer.headers["request-id"]) == 32 and "date" in answer.headers
    problem = answer.json()
    assert set(problem) == {"type", "title", "status", "detail", "code"}
    assert (problem["status"], problem["code"], problem["type"]) == (status, code, f"/docs#{code}")


REFUSED = {
    "a request without a host": (b"GET /v1/posts HTTP/1.1\r\n\r\n", 400, "bad_request"),
    "a line that is no request": (b"no sense\r\n\r\n", 400, "bad_request"),
    "a method with an odd character": (b"G@T / HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad_request"),
    "a target without a path": (head("CONNECT", "x:443"), 405, "method"),
    "a path above the root": (head("GET", "/../x"), 400, "bad_request"),
    "a length and chunks": (head("POST", "/", "Content-Length: 5", "Transfer-Encoding: chunked"), 400, "bad_request"),
    "an unknown encoding": (head("POST", "/v1/posts", "Transfer-Encoding: gzip"), 400, "bad_request"),
    "an unknown version": (b"GET / HTTP/3.0\r\nHost: x\r\n\r\n", 400, "bad_request"),
    "a body that is too large": (head("POST", "/v1/posts", "Content-Length: 999999999"), 413, "toolarge"),
    "an address that is too long": (head("GET", "/" + "a" * 9000), 414, "toolarge"),
    "a header that is too large": (head("GET", "/v1/posts", "X: " + "a" * 9000), 413, "toolarge"),
    "a method that no address takes": (head("TRACE", "/v1/posts"), 405, "method"),
    "the address of the metrics": (head("GET", "/metrics"), 404, "nowhere"),
    "the address of the metrics, encoded": (head("GET", "/%6detrics?x"), 404, "nowhere"),
    "the address of the metrics, with a dot": (head("GET", "/v1/.././metrics"), 404, "nowhere"),
    "the address of nginx's own errors": (head("GET", "/problem"), 404, "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_nginx_refuses_by_itself_gets_a_problem(front, case):
    sent, status, code = REFUSED[case]
    with unchanged(front.site.server.client):
        answer = exchange(front.port, sent)
    assert_problem(answer, status, code)
    assert ("allow" in answer.headers) == (status == 405)
    assert "tus-resumable" not in answer.headers


def test_a_page_of_any_origin_can_read_what_nginx_refuses_by_itself(front):
    sent, status, _ = REFUSED["a header that is too large"]
    answer = exchange(front.port, sent.replace(b"\r\n", b"\r\nOrigin: https://app.example\r\n", 1))
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (status, "*")
    assert answer.headers["access-control-expose-headers"] == "Request-Id, Retry-After, Tus-Resumable"
    answer = exchange(front.port, sent)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_nginx_passes_on_what_the_api_answers_to_pages(embedded, tmp_path):
    """Each header comes once: browsers refuse an answer that has two permissions."""
    tmp_path.chmod(0o755)
    with running_site(embedded, tmp_path / "data", cors_origins="https://app.example") as site:
        front = Front(site, tmp_path)
        try:
            for origin, allowed in (("https://app.example", "https://app.example"), ("https://other.example", None)):
                sent = f"Origin: {origin}", "Access-Control-Request-Method: PATCH"
                for method, status in (("GET", 404), ("OPTIONS", 204 if allowed else 404)):
                    answer = exchange(front.port, head(method, "/nowhere", *sent))
                    assert answer.status == status
                    assert answer.headers.get("access-control-allow-origin") == allowed
                    assert answer.headers["vary"] == "Origin"
        finally:
            front.close()


def test_plain_http_on_the_tls_port_gets_a_problem(front):
    assert_problem(exchange(front.tls_port, head("GET", "/v1/posts")), 400, "bad_request")


def test_without_an_answer_of_the_api_nginx_says_that_the_outcome_is_unknown(tmp_path):
    tmp_path.chmod(0o755)
    silent = Silent()
    front = Front(silent, tmp_path, patience="1s")
    try:
        late = exchange(front.port, head("GET", "/v1/posts"))
        silent.socket.close()
        for answer, status in ((late, 504), (exchange(front.port, head("POST", "/v1/posts")), 502)):
            assert_problem(answer, status, "unknown")
            assert answer.headers["retry-after"] == "1"
        upload = exchange(front.port, head("HEAD", "/v1/uploads/x"))
        assert (upload.status, upload.body, upload.headers["tus-resumable"]) == (502, b"", "1.0.0")
    finally:
        front.close()


def test_a_flood_from_one_address_is_limited_but_not_its_open_uploads_and_no_other_address(front):
    """127.0.0.2 sends 3,600 requests: 2,000 pass at once, and 200 more each second."""
    upload = begin(front, 10)
    tus = (f"Authorization: Bearer {front.token('alice')}", "Tus-Resumable: 1.0.0", "Connection: close")
    flood = head("GET", "/healthz") * 900 + head("HEAD", f"/v1/uploads/{upload}", *tus)

    def send(_) -> bytes:
        with socket.create_connection(("127.0.0.1", front.port), 60, ("127.0.0.2", 0)) as line:
            line.sendall(flood)
            return b"".join(iter(lambda: line.recv(65536), b""))

    began = time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        streams = [stream.split(b"HTTP/1.1 ")[1:] for stream in threads.map(send, range(4))]
    took = time.monotonic() - began
    answers = [answer for stream in streams for answer in stream[:-1]]
    passed = [answer for answer in answers if answer.startswith(b"200 ")]
    limited = [answer for answer in answers if answer.startswith(b"429 ")]
    assert len(answers) == len(passed) + len(limited) == 3600
    assert 2000 <= len(passed) <= 2001 + 200 * (took + 1)
    assert limited, f"{took:.1f} s for 3,600 requests: nothing was limited"
    top, _, body = limited[-1].partition(b"\r\n\r\n")
    assert b"\r\nRetry-After: 1" in top and b"\r\nContent-Type: application/problem+json" in top
    assert json.loads(body)["code"] == "limited"
    assert [stream[-1][:3] for stream in streams] == [b"200"] * 4, "requests to an open upload pass"
    assert exchange(front.port, head("GET", "/healthz")).status == 200, "another address has its own count"


def test_nginx_keeps_its_connections_to_the_api_open(front):
    """Each nginx worker has its own connections. Twenty requests need one new connection a worker at most."""
    workers = psutil.Process(front.process.pid).children()
    before, used = api_connections(workers, front.site.port), set()
    for _ in range(20):
        assert exchange(front.port, head("GET", "/v1/posts")).status == 200
        used |= api_connections(workers, front.site.port)
    assert used, "no connection was open after a request"
    assert len(used - before) <= len(workers)


def api_connections(workers: list[psutil.Process], port: int) -> set[int]:
    """The local ports of the open connections that nginx has to the API."""
    connections = [connection for worker in workers for connection in worker.net_connections() if connection.raddr]
    return {connection.laddr.port for connection in connections if connection.raddr.port == port}


def test_a_request_that_is_smuggled_in_a_body_does_not_reach_the_api(front):
    """By its length the second request is a body; by its chunks (RFC 9112, section 6.3) it is a request of its own."""
    alice = f"Authorization: Bearer {front.token('alice')}"
    smuggled = head("POST", "/v1/uploads", alice, "Tus-Resumable: 1.0.0", "Upload-Length: 10")
    outer = request("POST", "/v1/posts", front.token("alice"), b"0\r\n\r\n" + smuggled)
    ambiguous = outer.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n", 1)
    with unchanged(front.site.server.client), dial(front.port) as line:
        line.sendall(ambiguous)
        assert_problem(hear(line), 400, "bad_request")
        assert line.recv(1) == b"", "nginx closes the connection"


def test_http_2_over_tls_uploads_a_file_and_reads_the_feed(front, tmp_path):
    if not shutil.which("curl"):
        pytest.fail("curl is needed: apt-get install curl")
    (tmp_path / "image").write_bytes(picture(3 * MB))
    url, alice = f"https://127.0.0.1:{front.tls_port}", f"Authorization: Bearer {front.token('alice')}"
    tus = ["-H", alice, "-H", "Tus-Resumable: 1.0.0"]
    report = ["-D", tmp_path / "headers", "-w", "%{http_version} %{http_code}", "-o", "/dev/null"]
    curl = ["curl", "-ksS", "--http2", *report]

    def run(*arguments) -> tuple[str, str]:
        """The HTTP version and status, and the headers of an answer."""
        output = subprocess.run([*curl, *arguments], check=True, capture_output=True, text=True).stdout
        return output, (tmp_path / "headers").read_text()

    version, headers = run(*tus, "-H", f"Upload-Length: {3 * MB}", "-X", "POST", f"{url}/v1/uploads")
    assert version == "2 201"
    upload = re.search(r"(?mi)^location: (\S+)", headers)[1]
    body = ["-H", BODY, "-H", "Upload-Offset: 0", "-X", "PATCH", "--data-binary", f"@{tmp_path / 'image'}"]
    version, headers = run(*tus, *body, url + upload)
    assert version == "2 204" and f"upload-offset: {3 * MB}" in headers.lower()
    version, headers = run("-H", "Accept-Encoding: br", f"{url}/v1/posts")
    assert version == "2 200"
    assert "etag" in headers.lower()


def http3(front, tickets: list | None = None) -> httpx.AsyncClient:
    url, alice = f"https://127.0.0.1:{front.tls_port}", {"Authorization": f"Bearer {front.token('alice')}"}
    return httpx.AsyncClient(transport=Http3(tickets), base_url=url, headers=alice)


async def test_http_3_uploads_a_file_and_reads_the_feed(serving, front):
    image, tus = picture(3 * MB), {"Tus-Resumable": "1.0.0"}
    async with http3(front) as client:
        length = {"Upload-Length": str(len(image))}
        upload = (await client.post("/v1/uploads", headers=tus | length)).headers["location"]
        body = {"Content-Type": "application/offset+octet-stream", "Upload-Offset": "0"}
        sent = await client.patch(upload, headers=tus | body, content=image)
        assert (sent.status_code, sent.headers["upload-offset"]) == (204, str(len(image)))
        feed = await client.get("/v1/posts")
        assert feed.status_code == 200 and "items" in feed.json()
        assert "alt-svc" not in feed.headers, "the client is there already"
    assert await joined(serving, serving.server, upload.removeprefix("/v1/uploads/")) == image


@pytest.mark.parametrize("version", ["--http2", "HTTP/3"])
async def test_a_body_that_is_too_large_is_a_problem_over_http_2_and_3_too(front, version):
    large = {"Content-Length": "999999999"}
    if version == "HTTP/3":
        async with http3(front) as client:
            answer = await client.post("/v1/posts", headers=large)
        refused = Answer(answer.status_code, dict(answer.headers), answer.content)
    else:
        sent = ["curl", "-ksSi", version, "-d", "x", "-H", "Content-Length: 999999999"]
        url = f"https://127.0.0.1:{front.tls_port}/v1/posts"
        refused = parsed(subprocess.run([*sent, url], check=True, capture_output=True).stdout)
    assert_problem(refused, 413, "toolarge")


def test_http_3_is_offered_over_tls_on_the_port_that_the_client_used(front):
    def offered(*curl: str) -> str:
        output = ["-D", "-", "-o", "/dev/null"]
        headers = subprocess.run(["curl", "-ksS", *output, *curl], check=True, capture_output=True, text=True).stdout
        return " ".join(re.findall(r"(?mi)^alt-svc: (.*?)\r?$", headers))

    url = f"https://127.0.0.1:{front.tls_port}/v1/posts"
    for version in ("--http1.1", "--http2"):
        assert offered(version, url) == f'h3=":{front.tls_port}"; ma=86400'
        assert offered(version, "-H", "Host: imagegram.example", url) == 'h3=":443"; ma=86400'
    assert offered(f"{front.url}/v1/posts") == ""


class Holding(threading.Thread):
    """A proxy for one TLS connection. It passes on the client's bytes up to the early data, and no more.

    So the server answers before the handshake has ended, as to somebody who repeats a recorded connection.
    """

    def __init__(self, port: int):
        super().__init__(daemon=True)
        self.socket, self.server = socket.create_server(("127.0.0.1", 0)), port

    def run(self) -> None:
        client = self.socket.accept()[0]
        with self.socket, client, dial(self.server) as server:
            sent, kind = client.makefile("rb"), 0
            while kind != 23:  # application data: the first such record is the early data (RFC 8446, section 5.1)
                record = sent.read(5)
                kind, length = record[0], int.from_bytes(record[3:])
                server.sendall(record + sent.read(length))
            while answer := server.recv(65536):
                client.sendall(answer)


def parsed(received: bytes) -> Answer:
    """An answer that a program has printed."""
    top, _, body = received.partition(b"\r\n\r\n")
    line, *headers = top.decode().split("\r\n")
    return Answer(int(line.split()[1]), dict(header.lower().split(": ", 1) for header in headers), body)


def early(front, folder, sent: bytes) -> Answer:
    """The answer to a request in the early data of a second connection (TLS 1.3, RFC 8446, section 2.3)."""
    openssl = ["openssl", "s_client", "-quiet", "-tls1_3", "-connect"]
    first = [*openssl, f"127.0.0.1:{front.tls_port}", "-sess_out", folder / "session"]
    subprocess.run(first, input=head("GET", "/healthz", "Connection: close"), check=True, capture_output=True)
    (folder / "early").write_bytes(sent)
    proxy = Holding(front.tls_port)
    proxy.start()
    again = [*openssl, f"127.0.0.1:{proxy.socket.getsockname()[1]}", "-sess_in", folder / "session"]
    again += ["-early_data", folder / "early"]
    return parsed(subprocess.run(again, input=b"", capture_output=True, timeout=20).stdout)


def test_early_data_may_read_but_not_write(front, tmp_path):
    close = f"Authorization: Bearer {front.token('alice')}", "Connection: close"
    assert early(front, tmp_path, head("GET", "/v1/posts", *close)).status == 200
    with unchanged(front.site.server.client):
        for method, path in (("POST", "/v1/posts/1/comments"), ("DELETE", "/v1/posts/1"), ("PATCH", "/v1/uploads/x")):
            assert_problem(early(front, tmp_path, head(method, path, *close)), 425, "early")


async def early_http3(front, method: str) -> int:
    """The status of a request in early data. The server may refuse early data: then of another request."""
    for _ in range(10):
        tickets = []
        async with http3(front, tickets) as client:
            assert (await client.get("/healthz")).status_code == 200
        async with http3(front, tickets) as client:
            status = (await client.request(method, "/nowhere")).status_code
            if client._transport.connection._quic.tls.early_data_accepted:
                return status
    raise AssertionError("the server refused early data ten times")


async def test_early_data_of_http_3_may_read_but_not_write(front):
    assert await early_http3(front, "GET") == 404
    assert await early_http3(front, "DELETE") == 425


def test_compose_runs_this_configuration_before_the_api():
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert "./deploy/nginx.conf:/etc/nginx/nginx.conf:ro" in services["front"]["volumes"]
    assert "ports" not in services["api"], "the API is reachable only through the front"
