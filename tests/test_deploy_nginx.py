"""The front of docker-compose, as it stands in deploy/, run by Debian's nginx on loopback."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import yaml
from conftest import ROOT, free_port, until
from making import jpeg
from uploading import BODY, begin, joined, offset, picture
from wire import FORM, dial, exchange, form, head, hear, request, reset

MB = 1_000_000
DEPLOY = ROOT / "deploy"


class Front:
    def __init__(self, site, folder, patience: str = "40s"):
        """`patience`: how long nginx waits for the API's answer. A site that gives none makes it answer by itself."""
        self.site, self.port, self.tls_port = site, free_port(), free_port()
        self.url, self.token = f"http://127.0.0.1:{self.port}", site.token
        conf = (DEPLOY / "nginx.conf").read_text()
        for ours, here in {
            "server api:8000 resolve;": f"server 127.0.0.1:{site.port};",  # Debian's nginx does not know `resolve`
            "listen 8080;": f"listen 127.0.0.1:{self.port};",
            "proxy_read_timeout 40s;": f"proxy_read_timeout {patience};",
        }.items():
            assert conf.count(ours) == 1
            conf = conf.replace(ours, here)
        (folder / "nginx.conf").write_text(conf.replace("/tmp/", f"{folder}/"))
        (folder / "tls").mkdir()
        tls = (DEPLOY / "tls" / "tls.conf.example").read_text()
        tls = tls.replace("listen 8443 ssl;\nhttp2 on;", f"listen 127.0.0.1:{self.tls_port} ssl http2;")
        (folder / "tls" / "tls.conf").write_text(tls)
        key = ["-newkey", "rsa:2048", "-nodes", "-keyout", folder / "tls" / "key.pem"]
        certificate = ["-subj", "/CN=localhost", "-days", "2", "-out", folder / "tls" / "chain.pem"]
        subprocess.run(["openssl", "req", "-x509", *key, *certificate], check=True, capture_output=True)
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"  # where Debian has it, and not every PATH looks
        command = [nginx, "-p", folder, "-c", folder / "nginx.conf", "-e", "stderr", "-g", "daemon off;"]
        self.process = subprocess.Popen(command)
        until(lambda: exchange(self.port, head("GET", "/healthz")).status in (200, 504), what="nginx")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)


class Silent:
    """Where a site listens that answers nothing, and then nobody does."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port, self.token = self.socket.getsockname()[1], None


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
async def test_of_an_upload_killed_at_40_mb_at_least_38_are_kept(serving, front, end):
    image = picture(60 * MB)
    upload = await asyncio.to_thread(begin, front, len(image))
    line, began = dial(front.port), time.monotonic()
    line.sendall(patch(front, upload, 0, len(image)))
    for sent in range(0, 40 * MB, MB // 10):
        line.sendall(image[sent : sent + MB // 10])
        ahead = sent / (10 * MB) - (time.monotonic() - began)
        await asyncio.sleep(max(0.0, ahead))  # 10 MB/s, the client's own pace
    if end == "rst":
        reset(line)
    else:
        line.close()
    kept = await asyncio.to_thread(offset, front, upload)
    assert kept >= 38 * MB, f"{kept / MB:.1f} MB"
    settled = await asyncio.to_thread(until, lambda: still(front, upload))
    assert await joined(serving, serving.server, upload) == image[:settled]
    rest = image[settled:]
    answer = await asyncio.to_thread(exchange, front.port, patch(front, upload, settled, len(rest)) + rest)
    assert (answer.status, answer.headers["upload-offset"]) == (204, str(len(image)))
    assert await joined(serving, serving.server, upload) == image


def still(front, upload: str) -> int:
    first = offset(front, upload)
    return first if offset(front, upload) == first else 0


def test_a_form_passes_and_is_refused_as_by_the_api(front):
    alice = f"Authorization: Bearer {front.token('alice')}"
    body = form(("image", "a.jpg", jpeg()), ("caption", None, b"Hello"))
    sent = exchange(front.port, head("POST", "/v1/posts", alice, FORM, f"Content-Length: {len(body)}") + body)
    assert (sent.status, sent.json()["caption"]) == (201, "Hello")
    assert sent.headers["location"] == f"/v1/posts/{sent.json()['id']}", "relative, whatever the front is called"
    large = 100 * 2**20 + 64 * 1024
    asked = head("POST", "/v1/posts", alice, FORM, f"Content-Length: {large + 1}")
    with dial(front.port) as line:
        line.sendall(asked)
        refused = hear(line)
    assert (refused.status, refused.json()["code"]) == (413, "toolarge"), "the API's word, not nginx's"


def problem(answer, status: int, code: str) -> None:
    """What nginx answers by itself is a problem like the API's."""
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.headers["cache-control"] == "no-store"
    assert len(answer.headers["request-id"]) == 32 and "date" in answer.headers
    told = answer.json()
    assert set(told) == {"type", "title", "status", "detail", "code"}
    assert (told["status"], told["code"], told["type"]) == (status, code, f"/docs#{code}")


REFUSED = {
    "no host": (b"GET /v1/posts HTTP/1.1\r\n\r\n", 400, "bad_request"),
    "no request": (b"no sense\r\n\r\n", 400, "bad_request"),
    "no method": (b"G@T / HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad_request"),
    "no path": (head("CONNECT", "x:443"), 400, "bad_request"),
    "a path above the root": (head("GET", "/../x"), 400, "bad_request"),
    "a length and chunks": (head("POST", "/", "Content-Length: 5", "Transfer-Encoding: chunked"), 400, "bad_request"),
    "an unknown encoding": (head("POST", "/v1/posts", "Transfer-Encoding: gzip"), 400, "bad_request"),
    "an unknown version": (b"GET / HTTP/3.0\r\nHost: x\r\n\r\n", 400, "bad_request"),
    "a body that is too large": (head("POST", "/v1/posts", "Content-Length: 999999999"), 413, "toolarge"),
    "an address that is too long": (head("GET", "/" + "a" * 9000), 414, "toolarge"),
    "a header that is too large": (head("GET", "/v1/posts", "X: " + "a" * 9000), 413, "toolarge"),
    "a method of none": (head("TRACE", "/v1/posts"), 405, "method"),
    "the address of nginx' own errors": (head("GET", "/problem"), 404, "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nginx_refuses_by_itself_is_a_problem(front, case):
    asked, status, code = REFUSED[case]
    answer = exchange(front.port, asked)
    problem(answer, status, code)
    assert ("allow" in answer.headers) == (status == 405)
    assert "tus-resumable" not in answer.headers


def test_plain_http_on_the_port_of_tls_is_a_problem(front):
    problem(exchange(front.tls_port, head("GET", "/v1/posts")), 400, "bad_request")


def test_an_api_that_gives_no_answer_is_a_problem_and_its_answer_unknown(tmp_path):
    tmp_path.chmod(0o755)
    silent = Silent()
    front = Front(silent, tmp_path, patience="1s")
    try:
        late = exchange(front.port, head("GET", "/v1/posts"))
        silent.socket.close()
        for answer, status in ((late, 504), (exchange(front.port, head("POST", "/v1/posts")), 502)):
            problem(answer, status, "unknown")
            assert answer.headers["retry-after"] == "1"
        looked = exchange(front.port, head("HEAD", "/v1/uploads/x"))
        assert (looked.status, looked.body, looked.headers["tus-resumable"]) == (502, b"", "1.0.0")
    finally:
        front.close()


def test_a_flood_from_one_address_is_limited_and_open_uploads_and_others_are_not(front):
    """From 127.0.0.2: 2,000 requests at once and 200 a second are let through."""
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
    assert 2000 <= len(passed) <= 2001 + 200 * (took + 1) and limited
    top, _, body = limited[-1].partition(b"\r\n\r\n")
    assert b"\r\nRetry-After: 1" in top and b"\r\nContent-Type: application/problem+json" in top
    assert json.loads(body)["code"] == "limited"
    assert [stream[-1][:3] for stream in streams] == [b"200"] * 4, "what belongs to an open upload passes"
    assert exchange(front.port, head("GET", "/healthz")).status == 200, "another address has its own count"


def test_the_connection_to_the_api_is_kept(front):
    before = connections(front)
    for _ in range(20):
        assert exchange(front.port, head("GET", "/v1/posts")).status == 200
    assert connections(front) - before <= 2


def connections(front) -> int:
    """Connections that nginx has to the API."""
    workers = psutil.Process(front.process.pid).children()
    made = [one for worker in workers for one in worker.net_connections() if one.raddr]
    return sum(one.raddr.port == front.site.port for one in made)


def test_smuggling_shapes_do_not_pass(front):
    asked = request("POST", "/v1/posts", front.token("alice"), b"{}")
    shaped = asked.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n", 1)
    with dial(front.port) as line:
        line.sendall(shaped)
        assert hear(line).status == 400


def test_http_2_over_tls(front, tmp_path):
    if not shutil.which("curl"):
        pytest.fail("curl is needed: apt-get install curl")
    (tmp_path / "image").write_bytes(picture(3 * MB))
    url, alice = f"https://127.0.0.1:{front.tls_port}", f"Authorization: Bearer {front.token('alice')}"
    tus = ["-H", alice, "-H", "Tus-Resumable: 1.0.0"]
    shown = ["-D", tmp_path / "headers", "-w", "%{http_version} %{http_code}", "-o", "/dev/null"]
    curl = ["curl", "-ksS", "--http2", *shown]

    def run(*more) -> tuple[str, str]:
        said = subprocess.run([*curl, *more], check=True, capture_output=True, text=True).stdout
        return said, (tmp_path / "headers").read_text()

    said, headers = run(*tus, "-H", f"Upload-Length: {3 * MB}", "-X", "POST", f"{url}/v1/uploads")
    assert said == "2 201"
    upload = re.search(r"(?mi)^location: (\S+)", headers)[1]
    body = ["-H", BODY, "-H", "Upload-Offset: 0", "-X", "PATCH", "--data-binary", f"@{tmp_path / 'image'}"]
    said, headers = run(*tus, *body, url + upload)
    assert said == "2 204" and f"upload-offset: {3 * MB}" in headers.lower()
    said, headers = run("-H", "Accept-Encoding: br", f"{url}/v1/posts")
    assert said == "2 200"
    assert "etag" in headers.lower()


def test_the_front_of_compose_is_this_one():
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert "./deploy/nginx.conf:/etc/nginx/nginx.conf:ro" in services["front"]["volumes"]
    assert "ports" not in services["api"], "nobody goes round the front"
