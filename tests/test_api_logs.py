"""The log of requests and images, in both forms. What a client sends can neither appear in it nor forge a line."""

import json
import logging
import os
import re
import subprocess
import sys

import pytest
from conftest import NOBODY, ROOT, SECRET, Furnished, Site, create_post, photograph, until, wait_until_processed
from wire import dial, exchange, head, hear, request, reset

from storage import keys, logs, settings

FIELDS = {"time", "level", "logger", "method", "route", "status", "ms", "received", "sent", "user", "id"}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z")  # RFC 3339


class Logged(Furnished):
    """A furnished site that writes its log into a file."""

    def start(self, *command, **given):
        with open(self.folder / "log", "ab") as log:
            return super().start(*command, stderr=log, **given)

    def text(self) -> str:
        return (self.folder / "log").read_text()

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.text().splitlines()]

    def line_of(self, request_id: str) -> dict:
        """The one line of a request."""
        until(lambda: f'"{request_id}"' in self.text(), what="a line of the request")
        (line,) = [line for line in self.lines() if line.get("id") == request_id]
        assert line.keys() - {"created"} == FIELDS
        assert TIME.fullmatch(line["time"]) and line["logger"] == "imagegram.request"
        return line

    def send(self, request: bytes) -> dict:
        """The line of a request that gets a Request-Id of the server's."""
        answer = exchange(self.port, request)
        line = self.line_of(answer.headers["request-id"])
        assert line["status"] == answer.status
        return line


@pytest.fixture(scope="module")
def sites(embedded, tmp_path_factory):
    """Two sites on one Redis, whose logs have different forms."""
    embedded.client.flushall()
    sites = {}
    for form in ("json", "text"):
        sites[form] = Logged(embedded.url, tmp_path_factory.mktemp("site"), log=form, processing=1000)
        sites[form].form = form
        sites[form].api()
        sites[form].furnish(embedded)
    yield sites
    for site in sites.values():
        site.close()


@pytest.fixture(params=["json", "text"])
def either(request, sites):
    return sites[request.param]


@pytest.fixture
def site(sites):
    return sites["json"]


def test_a_request_has_one_line(site):
    with site.client("bob") as bob:
        headers = {"Request-Id": "one-comment"}
        answer = bob.post(f"/v1/posts/{site.post}/comments", json={"text": "Hm"}, headers=headers)
        line = site.line_of("one-comment")
        assert (line["method"], line["route"]) == ("POST", "/v1/posts/{post}/comments")
        assert (line["status"], line["level"], line["user"]) == (201, "INFO", "bob")
        assert (line["received"], line["sent"]) == (len(answer.request.content), len(answer.content))
        assert line["created"] == answer.headers["location"]
        assert 0 < line["ms"] < 5000
        headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        bob.get("/v1/posts?limit=5", headers=headers)
        line = site.line_of("0af7651916cd43dd8448eb211c80319c")
        assert (line["method"], line["route"], line["status"], line["received"]) == ("GET", "/v1/posts", 200, 0)
        assert line["user"] is None, "this route checks no token"
        assert bob.head("/v1/posts", headers={"Request-Id": "head"}).status_code == 200
        assert site.line_of("head")["sent"] == 0


REFUSED = {
    "no route": (head("GET", "/v2/secret?q=1"), "GET", None, 404),
    "a method that the address does not take": (head("PATCH", "/v1/posts"), "PATCH", None, 405),
    "a method that does not exist": (head("SECRET", "/v1/posts"), None, None, 405),
    "no token": (head("DELETE", f"/v1/posts/{NOBODY}"), "DELETE", "/v1/posts/{post}", 401),
    "a malformed header": (b"GET /v1/posts HTTP/1.1\r\nHost : a\r\n\r\n", None, None, 400),
    "no HTTP": (b"secret \r\n\r\n", None, None, 400),
    "a header that is too long": (head("GET", "/v1/posts", "a: " + "b" * 20_000), None, None, 413),
    "a body that nobody reads": (head("GET", "/v1/posts", "Content-Length: 5"), "GET", "/v1/posts", 200),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_is_refused_has_a_line_too(site, name):
    sent, method, route, status = REFUSED[name]
    line = site.send(sent)
    assert (line["method"], line["route"], line["status"], line["user"]) == (method, route, status, None)


def test_an_upload_that_breaks_off_has_a_line_with_the_bytes_that_arrived(site):
    with site.client("alice") as alice:
        headers = {"Tus-Resumable": "1.0.0", "Upload-Length": "100000"}
        upload = alice.post("/v1/uploads", headers=headers).headers["location"]
    sent = [site.authorization(), "Tus-Resumable: 1.0.0", "Upload-Offset: 0", "Request-Id: broken"]
    with dial(site.port) as line:
        body = ["Content-Type: application/offset+octet-stream", "Content-Length: 100000"]
        line.sendall(head("PATCH", upload, *sent, *body) + photograph()[:5000])
        reset(line)
    line = site.line_of("broken")
    assert (line["route"], line["user"], line["received"]) == ("/v1/uploads/{upload}", "alice", 5000)


def test_a_fault_of_the_server_is_logged_with_its_traceback_and_the_id_of_the_request(either):
    post = f"{NOBODY[:-2]}-0"
    either.server.client.set(keys.post(post), "no hash")
    answer = exchange(either.port, request("GET", f"/v1/posts/{post}"))
    assert answer.status == 500
    identity = answer.headers["request-id"]
    until(lambda: "WRONGTYPE" in either.text(), what="the fault")
    assert f"{identity} GET /v1/posts/{{post}}" in either.text()
    if either.form == "json":
        (fault,) = [line for line in either.lines() if "WRONGTYPE" in line.get("exception", "")]
        assert fault["message"].startswith(identity) and fault["level"] == "ERROR"
        assert fault["exception"].startswith("Traceback") and either.line_of(identity)["level"] == "ERROR"


def test_nothing_that_a_client_sends_is_in_the_log_and_no_line_is_forged(either):
    """Each word below is sent where a client may write it, with line ends where HTTP lets them through."""
    forged = '\\r\\n{"level":"ERROR","logger":"imagegram.request","user":"mallory"}'
    token = either.token("alice")
    sent = {
        "token": token.rpartition(".")[2],
        "bad token": "eyJhbGciOiJub25lIn0.secrettoken.",
        "key": "secret-key-of-a-comment",
        "text": "secret-text",
        "caption": "secret-caption",
        "query": "secret-query",
        "path": "secret-path",
        "header": "secret-header",
        "method": "SECRETMETHOD",
    }
    user = f"Authorization: Bearer {token}"
    before = len(either.text())
    body = json.dumps({"text": f"{sent['text']}\r\n{forged}"}).encode()
    comment = [user, f"Idempotency-Key: {sent['key']}", f"Content-Length: {len(body)}"]
    comment.append("Content-Type: application/json")
    asked = [
        head("POST", f"/v1/posts/{either.post}/comments", *comment) + body,
        head("POST", "/v1/posts", f"Authorization: Bearer {sent['bad token']}", "Content-Length: 0"),
        head("GET", f"/v1/posts?{sent['query']}={forged}%0d%0a".replace(" ", "")),
        head("GET", f"/{sent['path']}/%0d%0a{forged}"),
        head("GET", "/v1/posts", f"Request-Id: {sent['header']}\r\n folded: {forged}"),
        head("GET", "/v1/posts", f"Request-Id: {sent['header']} {forged}", f"User-Agent: {sent['header']}"),
        head("GET", "/v1/posts", f"traceparent: {sent['header']}", f"If-None-Match: {sent['header']}\x1b[2J"),
        head(sent["method"], "/v1/posts"),
        request("POST", "/v1/posts", token, json.dumps({"upload": sent["path"], "caption": sent["caption"]}).encode()),
        request("POST", "/v1/posts", token, f'{{"caption": "{sent["caption"]}'.encode()),
        b"GET \xff\x00" + sent["path"].encode() + b"\r\n\r\n",
    ]
    for one in asked:
        exchange(either.port, one)
    exchange(either.port, head("GET", "/v1/posts", "Request-Id: the-last"))
    if either.form == "json":
        either.line_of("the-last")
        assert len(either.text()[before:].splitlines()) == len(asked) + 1
        assert all(line["user"] in (None, "alice", "bob") for line in either.lines() if "user" in line)
    for name, word in sent.items():
        assert word not in either.text(), name
    assert "mallory" not in either.text() and SECRET not in either.text()


def test_a_request_leaves_no_line_in_the_form_text(sites):
    exchange(sites["text"].port, head("GET", "/v1/posts", "Request-Id: quiet"))
    assert "quiet" not in sites["text"].text() and "imagegram.request" not in sites["text"].text()


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_message_can_neither_forge_a_line_nor_show_a_secret(form):
    formatter = (logs.Json if form == "json" else logs.Text)(["AKIA123", "pass"])
    try:
        raise ValueError("bad\nERROR imagegram.api: forged\x1b[2J\udcff AKIA123")
    except ValueError:
        fault = sys.exc_info()
    record = logging.LogRecord("a.b", logging.WARNING, "", 0, "x\ny\x85\u202e pass %s", ("é" * 9000,), fault)
    text = formatter.format(record)
    assert "AKIA123" not in text and "pass" not in text
    first, *others = text.split("\n")
    assert all(line.startswith("  ") for line in others)
    assert text.replace("\n", "").isprintable() and text.encode()
    assert len(text) < 15_000
    if form == "json":
        assert not others and json.loads(first)["message"].startswith("x\ny\x85\u202e [secret] é")
    else:
        assert first == "WARNING a.b: x" and "  ValueError: bad" in others


def test_the_secrets_of_the_environment_are_known():
    environ = {
        "IMAGEGRAM_JWT_SECRET": SECRET,
        "IMAGEGRAM_REDIS_URL": "redis://api:p%40ss@host",
        "IMAGEGRAM_QUEUE_URL": "unix:///socket",
        "AWS_ACCESS_KEY_ID": "AKIA123",
        "AWS_SECRET_ACCESS_KEY": "key",
    }
    assert settings.secret_values(environ) == [SECRET, "AKIA123", "p%40ss", "p@ss", "key"]


def test_an_image_has_a_line_and_all_lines_of_api_worker_and_shipper_are_json(embedded, tmp_path):
    embedded.client.flushall()
    site = Logged(embedded.url, tmp_path, log="json")
    parts = []
    try:
        site.api()
        parts += [site.start("workers"), site.shipper(embedded)]
        with site.client("alice") as alice:
            post = wait_until_processed(alice, create_post(alice, photograph()))
            bad = wait_until_processed(alice, create_post(alice, b"\xff\xd8\xff" + b"no image" * 9))
        jobs = until(lambda: [row for row in site.lines() if row["logger"] == "imagegram.job"][1:], what="both jobs")
        jobs = {row["post"]: row for row in site.lines() if row["logger"] == "imagegram.job"}
        assert (jobs[post["id"]]["outcome"], jobs[post["id"]]["attempt"]) == ("ready", 1)
        assert jobs[bad["id"]]["outcome"] == "failed" and 0 <= jobs[bad["id"]]["ms"] < 60_000
        created = {row.get("created") for row in site.lines()}
        assert {f"/v1/posts/{post['id']}", f"/v1/posts/{bad['id']}"} <= created
    finally:
        site.close()
    loggers = {row["logger"] for row in site.lines()}
    assert {"imagegram.api", "imagegram.worker", "imagegram.ship", "imagegram.request", "imagegram.job"} <= loggers


def test_a_log_that_nobody_reads_disturbs_no_request(embedded, tmp_path):
    site = Site(embedded.url, tmp_path, log="json")
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen([sys.executable, "-m", "api"], cwd=ROOT, env=site.environment, stderr=writing)
        site.processes.append(process)
        os.close(writing)
        os.close(reading)
        until(lambda: exchange(site.port, head("GET", "/readyz")).status == 200, what="the API")
        with dial(site.port) as line:
            for _ in range(3):
                line.sendall(head("GET", "/v1/posts"))
                assert hear(line).status == 200
    finally:
        site.close()
