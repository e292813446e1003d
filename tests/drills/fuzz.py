"""Sends random requests to all routes: `PYTHONPATH=tests python -m tests.drills.fuzz [REQUESTS [SEED]]`, `make fuzz`.

Most requests start as valid requests. The fuzzer then changes them in one or more places: method, URL, headers, body,
single bytes, or the way in which they are sent. The seed determines all of this. The URLs come from the application's
own table of routes, so the fuzzer also attacks a new route.

Asserts that

- the handlers were reached: there are answers for things read, created, not found and not allowed;
- no status is 5xx except 503 and 507, no answer takes more than 2 s, and every error is a problem (RFC 9457);
- the log has no traceback, all processes of the API are alive and their memory does not grow;
- `check` finds nothing wrong in the data.
"""

import asyncio
import http.client
import json
import random
import re
import socket
import sys
import tempfile
import time
from base64 import b64encode
from collections import Counter
from pathlib import Path

import psutil
from conftest import NOBODY, RedisServer, Site, application, connect, until
from making import jpeg, make_post, make_processing, png
from wire import Answer, form, hear, reset

from storage import check, comments, outbox
from storage.objects import open_store

SLOW = 2.0  # seconds that an answer may take
GROWTH = 16  # MiB that the API may grow by after the first quarter of the requests: its caches fill
REACHED = {200, 201, 204, 400, 401, 404, 422}  # statuses that show that the requests reach the handlers
USERS = [f"user{number}" for number in range(40)]  # many, because each may have few open uploads
TUS = {"Tus-Resumable": "1.0.0"}
WORDS = [
    "", "0", "1", "-1", "20", "100", "101", "1e3", "٣", " 7", "+7", "9" * 30, "null", "true", "%", "%00", "%ff", "..",
    "../../etc/passwd", "a/b", "a" * 5000, "é", "😀", "\x7f", "*", "{}", "'", '"', "<script>", "\\", "a,b", ";", "=",
]  # fmt: skip
TEXTS = [
    "Hello", "", " ", "a" * 2200, "a" * 2201, "😀" * 2200, "\x00", "a\x07b", "\x1b[31m", "\x7f", "\u200b", "\u2028",
    "\ufeff", "👩‍👩‍👧", "‮abc", "a\tb\nc", "a\r\nb", "\ud800", 7, None, True, [], {}, ["a"], {"a": "b"}, 1e400,
]  # fmt: skip
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get", "PROPFIND", "Ä", ""]
HEADERS = {
    "Accept-Encoding": ["br", "gzip, br;q=0.5", "*;q=0", "identity;q=0", ";;,", "br;q=9"],
    "If-None-Match": ["*", '"x"', 'W/"x", "y"', "x", ","],
    "If-Match": ["*", '"x"', "x"],
    "If-Range": ['"x"', "Tue, 24 Nov 2026 16:00:00 GMT"],
    "Range": ["bytes=0-10", "bytes=-5", "bytes=5-1", "bytes=0-,5-", "bytes=99999999999-", "bytes=a-b", "rows=1-2"],
    "Idempotency-Key": ["a", "b", "a" * 255, "a" * 256, "é", " "],
    "Content-Encoding": ["gzip", "identity", "br, gzip"],
    "Content-Length": ["0", "5", "-1", "1e3", "99999999999", "", "1, 1"],
    "Transfer-Encoding": ["chunked", "ChUnKeD", "gzip, chunked", "identity", " chunked"],
    "Expect": ["100-continue", "200-ok"],
    "Connection": ["close", "keep-alive", "upgrade"],
    "Upgrade": ["websocket", "h2c"],
    "Host": ["", "a b", "evil.example", "localhost:99999"],
    "Content-Type": [
        "application/json", "application/json; charset=utf-16", "multipart/form-data", "multipart/form-data; boundary=",
        "multipart/form-data; boundary=frontier", "multipart/form-data; boundary=\"a'\"", "text/plain", "a", "é",
        "application/offset+octet-stream",
    ],
    "Authorization": ["Bearer", "Bearer x", "Basic YTpi", "bearer é", "Bearer " + "a" * 7000, "Bearer a.b.c"],
    "X-HTTP-Method-Override": ["PATCH", "HEAD", "DELETE", "GET", "delete", "x"],
    "Upload-Length": ["0", "10", "104857600", "104857601", "-1", "x", "٣"],
    "Upload-Offset": ["0", "1", "-1", "99999999999999999999", "x"],
    "Upload-Metadata": ["filename YQ==", "a", "a YQ==,a YQ==", "a !!", ",", "é YQ==", "a " + "Y" * 5000],
    "Tus-Resumable": ["1.0.0", "0.2.2", "x"],
    "Upload-Concat": ["partial", "final;/v1/uploads/x"],
    "Prefer": ["wait=1", "wait=x"],
    "Traceparent": ["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "x"],
    "Request-Id": ["a", "é", "a" * 65],
    "X-Forwarded-For": ["127.0.0.1", "x"],
}  # fmt: skip


class Fuzzer:
    """Makes random requests and sends them to a site.

    `names` has the values for each parameter of a route, and cursors. Most of them name things that exist.
    """

    def __init__(self, site: Site, names: dict[str, list[str]], seed: int):
        self.site = site
        self.names = names
        self.chance = random.Random(seed)
        routes = application().router.routes
        self.routes = sorted({(method, f"/{route.path}") for route in routes for method in route.methods})
        self.tokens = {user: f"Bearer {site.token(user, exp=int(time.time()) + 3600)}" for user in USERS}
        odd = [b"", b"GIF89a", b"\xff\xd8\xff", b"BM" + bytes(50)]
        self.images = [jpeg(64, 48), png(40, 30), jpeg(64, 48)[:200], *odd]
        self.statuses: Counter[int] = Counter()
        self.slowest = 0.0

    def some(self, choices):
        return self.chance.choice(choices)

    def likely(self, share: float) -> bool:
        return self.chance.random() < share

    def target(self, template: str) -> str:
        """A URL of a route, with values for its parameters and a random query."""

        def value(parameter: re.Match) -> str:
            known = self.names.get(parameter[1], ())
            return self.some(known) if known and self.likely(0.8) else self.some(WORDS)

        path = re.sub(r"<(\w+)[^>]*>", value, template)
        if self.likely(0.05):
            odd = [path + "/", path.upper(), path[1:], "//" + path, path + "%2e", "*", "x:443", "?a", "http:///"]
            path = self.some(odd)
        names = ["limit", "cursor", "since", "status", "x"]
        query = [f"{self.some(names)}={self.some(WORDS)}" for _ in range(self.some([0, 0, 0, 1, 1, 2]))]
        query += [f"cursor={self.some(self.names['cursor'])}"] * self.likely(0.1)
        query += [f"since={self.some(self.names['since'])}"] * self.likely(0.1)
        return path + ("?" + "&".join(query) if query else "")

    def body(self, method: str, path: str) -> tuple[dict[str, str], bytes]:
        """Headers and a body, most of the time of the format that the route expects, with odd values in it."""
        if method in ("GET", "HEAD", "OPTIONS", "DELETE") and self.likely(0.9):
            return {}, b""
        data = self.some(self.images)
        kind = self.some(["json", "json", "form", "bytes"])
        if "uploads" in path:
            kind = self.some(["bytes", "bytes", "bytes", "json"])
        if kind == "form":
            fields = [("image", "a.jpg", data), ("caption", None, self.text().encode("utf-8", "surrogatepass"))]
            fields += [(self.some(["image", "caption", "x", ""]), None, b"a")] * self.likely(0.2)
            self.chance.shuffle(fields)
            headers = {"Content-Type": "multipart/form-data; boundary=frontier"}
            return headers, form(*fields[self.likely(0.1) :], end=self.likely(0.9))
        if kind == "bytes":
            offset = str(self.some([0, 0, 0, 1, 10]))
            length = str(self.some([len(data), len(data), 0, 10]))
            headers = {"Content-Type": "application/offset+octet-stream", "Upload-Offset": offset}
            return {**TUS, **headers, "Upload-Length": length}, data
        text, caption = (self.some(TEXTS) if self.likely(0.4) else "Hello" for _ in range(2))
        fields = {"text": text, "caption": caption, "upload": self.some(self.names["upload"])}
        chosen = {name: value for name, value in fields.items() if self.likely(0.8)}
        damaged = self.some(["", "[", "[" * 9000, "nul", '{"text": "\\ud83d"}', "7"])
        body = json.dumps(chosen) if self.likely(0.9) else damaged
        return {"Content-Type": "application/json"}, body.encode()

    def text(self) -> str:
        value = self.some(TEXTS)
        return value if isinstance(value, str) else repr(value)

    def request(self) -> tuple[bytes, bool]:
        """The bytes of a request, and whether it is still valid HTTP, so that the API must answer it."""
        method, template = self.some(self.routes)
        target = self.target(template)
        headers, body = self.body(method, template)
        headers = {"Host": "localhost", **headers}
        if self.likely(0.8):
            headers["Authorization"] = self.tokens[self.some(USERS)]
        if "uploads" in template:
            headers = {**TUS, **headers}
        if body or method in ("POST", "PATCH", "PUT"):
            headers["Content-Length"] = str(len(body))
        if self.likely(0.05):
            method = self.some(METHODS)
        valid = bool(re.fullmatch("[A-Z]+", method)) and target.isascii() and target.isprintable()
        if body and self.likely(0.15):
            del headers["Content-Length"]
            headers["Transfer-Encoding"] = self.some(["chunked", "ChUnKeD"])
            trailer = b"X-Sum: 7\r\n" * self.likely(0.3)
            body = b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailer)
        for _ in range(self.some([0, 0, 0, 1, 2])):
            name = self.some(list(HEADERS))
            headers[name] = self.some(HEADERS[name])
            valid = valid and name not in ("Content-Length", "Transfer-Encoding", "Host", "Expect")
        lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        data = "\r\n".join(lines).encode("utf-8", "surrogatepass") + body
        if self.likely(0.1):
            valid = False
            changed = bytearray(data)
            for _ in range(self.some([1, 1, 3, 10])):
                place = self.chance.randrange(len(changed))
                if self.likely(0.5):
                    changed.pop(place)
                else:
                    changed.insert(place, self.chance.randrange(256))
            data = bytes(changed)
        return data, valid

    def play(self) -> None:
        """Sends one request in one of several ways and checks the answer."""
        data, valid = self.request()
        how = self.some(["whole"] * 6 + ["pieces", "pieces", "cut", "reset"])
        with socket.create_connection(("127.0.0.1", self.site.port), timeout=20) as line:
            whole = valid and how != "cut"
            cut = self.chance.randrange(1, len(data)) if how in ("cut", "reset") else len(data)
            pieces = [data[:cut]]
            if how == "pieces":
                places = sorted(self.chance.randrange(len(data)) for _ in range(3))
                pieces = [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]
            began = time.monotonic()
            try:
                for piece in pieces:
                    line.sendall(piece)
                if how == "reset":
                    reset(line)
                    return
                # The server need not answer an incomplete request, or only with 100: it waits for the rest.
                line.settimeout(20 if whole else 0.1)
                answer = hear(line, data.split(b" ", 1)[0].decode("latin-1"))
            except (OSError, http.client.HTTPException) as error:
                # The server may refuse a request before it has read all of it, and then closes the connection.
                closed = isinstance(error, ConnectionError) and not isinstance(error, http.client.RemoteDisconnected)
                assert closed or not whole, (repr(error), how, data[:500])
                return
        took = time.monotonic() - began
        self.slowest = max(self.slowest, took)
        assert took < SLOW, (took, data[:500])
        self.inspect(data, answer)

    def inspect(self, data: bytes, answer: Answer) -> None:
        """Asserts what holds for every answer. Remembers the id of what was created."""
        self.statuses[answer.status] += 1
        assert answer.status < 500 or answer.status in (503, 507), (answer, data[:1000])
        if answer.status >= 400 and answer.body:
            assert answer.headers["content-type"] == "application/problem+json", (answer, data[:500])
            problem = answer.json()
            assert problem["status"] == answer.status and problem["code"] and problem["detail"], problem
        if answer.status == 201 and answer.body[:1] == b"{":
            created = answer.json()
            self.remember("comment" if "text" in created else "post", created["id"])
        elif answer.status == 201:
            self.remember("upload", answer.headers["location"].rpartition("/")[2])

    def remember(self, kind: str, name: str) -> None:
        """Adds an id to those that later requests name. Keeps 60 of each kind."""
        self.names[kind].append(name)
        if len(self.names[kind]) > 60:
            self.names[kind].pop(self.chance.randrange(60))


async def furnish(server: RedisServer) -> dict[str, list[str]]:
    """Creates posts and comments of several users. Returns values for the parameters of routes, by parameter.

    Some of the values name nothing that exists.
    """
    db = connect(server)
    posts = [await make_post(db, user, caption="Hello") for user in USERS[:10]]
    posts += [await make_processing(db, user) for user in USERS[:5]]
    failed = await make_processing(db, USERS[0])
    await outbox.fail(db, failed, 0, "undecodable", "it is damaged")
    comment_ids = [(await comments.add(db, user, posts[0], "First!"))[0].id for user in USERS[:10]]
    await db.close()
    cursors = [f"3:{posts[0]}", comment_ids[0], "x", f"-1:{NOBODY}", f"1:u{NOBODY}"]
    return {
        "post": [*posts, failed, NOBODY],
        "name": [f"{posts[0]}.jpg", f"{posts[12]}.jpg", f"{NOBODY}.jpg", "x.jpg", ".jpg", "..jpg"],
        "comment": [*comment_ids, "1-0", "0-0", "99999999999999999-1"],
        "upload": ["u" + NOBODY],
        "user": [*USERS, "a b", "é"],
        "cursor": [b64encode(text.encode()).decode() for text in cursors],
        "since": ["", "490000,0.5", "490000", "1,0.1", "0.1", "490000,0." + "9" * 17, ",".join(["1"] + ["0.1"] * 9)],
    }


def api_processes(site: Site) -> list[psutil.Process]:
    """The API's parent process and all processes that it has started."""
    parent = psutil.Process(site.processes[0].pid)
    return [parent, *parent.children(recursive=True)]


def resident(site: Site) -> float:
    """Resident memory of the API's processes, MiB."""
    return sum(process.memory_info().rss for process in api_processes(site)) / 2**20


async def flaws(site: Site, server: RedisServer) -> list[str]:
    """What `check` reports, except missing images: `furnish` puts none."""
    db, store = connect(server), open_store((site.folder / "store").as_uri())
    report = await check.check(db, store)
    await db.close()
    missing = ("its original is missing", "its JPEG is missing")
    return [line for line in report.lines if not any(text in line for text in missing)]


def fuzz(requests: int = 10_000, seed: int = 1) -> str:
    """Sends `requests` random requests. Returns the figures as a sentence."""
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        server = RedisServer("valkey")
        site = Site(server.url, Path(folder))
        log = Path(folder, "log")
        try:
            with log.open("wb") as out:
                site.api(stderr=out, stdout=out)
            fuzzer = Fuzzer(site, asyncio.run(furnish(server)), seed)
            early, processes = 0.0, set(api_processes(site))
            began = time.monotonic()
            for number in range(requests):
                if number == requests // 4:
                    early = resident(site)
                fuzzer.play()
            took = time.monotonic() - began
            late = resident(site)
            assert set(api_processes(site)) == processes, "a process of the API died"
            until(lambda: site.client().get("/readyz").status_code == 200, what="an answer")
            logged = log.read_text(errors="replace")
            assert "Traceback" not in logged and "ERROR" not in logged, logged[-3000:]
            assert late < early + GROWTH, (early, late)
            assert fuzzer.statuses.keys() >= REACHED, fuzzer.statuses
            assert asyncio.run(flaws(site, server)) == []
        finally:
            site.close()
            server.close()
    statuses = ", ".join(f"{status}: {count}" for status, count in sorted(fuzzer.statuses.items()))
    return (
        f"{requests} requests of seed {seed} in {took:.0f} s: {statuses};"
        f" the slowest took {fuzzer.slowest * 1000:.0f} ms;"
        f" the API had {early:.0f} MiB after a quarter of them and {late:.0f} MiB at the end"
    )


if __name__ == "__main__":
    print(fuzz(*map(int, sys.argv[1:])))
