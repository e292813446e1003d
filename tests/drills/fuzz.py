"""Random requests over all routes: `python -m tests.drills.fuzz [REQUESTS [SEED]]`, `make fuzz`.

Most requests begin as what a client may send and are then changed in one or more places: method, address, headers,
body, single bytes, or the connection. The seed decides all of them. The addresses come from the application's own
table of routes, so that a new route is attacked too.

Asserts: no status of 5xx but 503 and 507, no answer later than 2 s, every error a problem, no traceback in the log, the
API's memory flat, all its processes alive, and data without a flaw.
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

SLOW = 2.0  # seconds
GROWTH = 16  # MiB that the API may grow by between the first quarter of the requests and the last: its caches fill
USERS = [f"user{number}" for number in range(40)]  # each has a quota of uploads
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
    """Makes requests, and plays them against a site."""

    def __init__(self, site: Site, names: dict[str, list[str]], seed: int):
        self.site, self.names, self.chance = site, names, random.Random(seed)
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
        def filled(found: re.Match) -> str:
            name = found[1]
            known = self.names.get(name, ())
            return self.some(known) if known and self.likely(0.8) else self.some(WORDS)

        path = re.sub(r"<(\w+)[^>]*>", filled, template)
        if self.likely(0.05):
            path = self.some([path + "/", path.upper(), path[1:], "//" + path, path + "%2e", "*", "x:443", "?a", "http:///"])
        names = ["limit", "cursor", "since", "status", "x"]
        query = [f"{self.some(names)}={self.some(WORDS)}" for _ in range(self.some([0, 0, 0, 1, 1, 2]))]
        query += [f"cursor={self.some(self.names['cursor'])}"] * self.likely(0.1)
        query += [f"since={self.some(self.names['since'])}"] * self.likely(0.1)
        return path + ("?" + "&".join(query) if query else "")

    def body(self, method: str, path: str) -> tuple[dict[str, str], bytes]:
        """What the route wants, most of the time, with odd values in it."""
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
        told = {name: value for name, value in fields.items() if self.likely(0.8)}
        damaged = self.some(["", "[", "[" * 9000, "nul", '{"text": "\\ud83d"}', "7"])
        body = json.dumps(told) if self.likely(0.9) else damaged
        return {"Content-Type": "application/json"}, body.encode()

    def text(self) -> str:
        value = self.some(TEXTS)
        return value if isinstance(value, str) else repr(value)

    def request(self) -> tuple[bytes, bool]:
        """A request, and whether it is still one that HTTP allows, so that it must be answered."""
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
                self.some([changed.pop, lambda at, to=changed: to.insert(at, self.chance.randrange(256))])(place)
            data = bytes(changed)
        return data, valid

    def play(self) -> None:
        """Send one request, in one of several ways, and look at the answer."""
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
                # What is no whole request need not be answered, or only by 100: the server waits for the rest.
                line.settimeout(20 if whole else 0.1)
                answer = hear(line, data.split(b" ", 1)[0].decode("latin-1"))
            except (OSError, http.client.HTTPException) as error:
                # A request that is refused early is answered before all of it was sent, and then its connection ends.
                ended = isinstance(error, ConnectionError) and not isinstance(error, http.client.RemoteDisconnected)
                assert ended or not whole, (repr(error), how, data[:500])
                return
        took = time.monotonic() - began
        self.slowest = max(self.slowest, took)
        assert took < SLOW, (took, data[:500])
        self.look(data, answer)

    def look(self, data: bytes, answer: Answer) -> None:
        self.statuses[answer.status] += 1
        assert answer.status < 500 or answer.status in (503, 507), (answer, data[:1000])
        if answer.status >= 400 and answer.body:
            assert answer.headers["content-type"] == "application/problem+json", (answer, data[:500])
            problem = answer.json()
            assert problem["status"] == answer.status and problem["code"] and problem["detail"], problem
        if answer.status == 201 and answer.body[:1] == b"{":
            made = answer.json()
            self.remember("comment" if "text" in made else "post", made["id"])
        elif answer.status == 201:
            self.remember("upload", answer.headers["location"].rpartition("/")[2])

    def remember(self, kind: str, name: str) -> None:
        """The fuzzer goes on with what it has made."""
        self.names[kind].append(name)
        if len(self.names[kind]) > 60:
            self.names[kind].pop(self.chance.randrange(60))


async def furnish(server: RedisServer) -> dict[str, list[str]]:
    """What addresses name: things that exist, of several users, and some that do not."""
    db = connect(server)
    posts = [await make_post(db, user, caption="Hello") for user in USERS[:10]]
    posts += [await make_processing(db, user) for user in USERS[:5]]
    failed = await make_processing(db, USERS[0])
    await outbox.fail(db, failed, 0, "undecodable", "it is damaged")
    made = [(await comments.add(db, user, posts[0], "First!"))[0].id for user in USERS[:10]]
    await db.close()
    places = f"3:{posts[0]}", made[0], "x", f"-1:{NOBODY}", f"1:u{NOBODY}"
    return {
        "post": [*posts, failed, NOBODY],
        "name": [f"{posts[0]}.jpg", f"{posts[12]}.jpg", f"{NOBODY}.jpg", "x.jpg", ".jpg", "..jpg"],
        "comment": [*made, "1-0", "0-0", "99999999999999999-1"],
        "upload": ["u" + NOBODY],
        "user": [*USERS, "a b", "é"],
        "cursor": [b64encode(text.encode()).decode() for text in places],
        "since": ["", "490000,0.5", "490000", "1,0.1", "0.1", "490000,0." + "9" * 17, ",".join(["1"] + ["0.1"] * 9)],
    }


def resident(site: Site) -> float:
    """MiB of the API's processes."""
    parent = psutil.Process(site.processes[0].pid)
    return sum(process.memory_info().rss for process in (parent, *parent.children(recursive=True))) / 2**20


async def flaws(site: Site, server: RedisServer) -> list[str]:
    """What `check` finds, but for the images of the furniture, which nobody has put."""
    db, store = connect(server), open_store((site.folder / "store").as_uri())
    found = await check.check(db, store)
    await db.close()
    return [flaw for flaw in found.lines if "its original is missing" not in flaw and "its JPEG is missing" not in flaw]


def fuzz(requests: int = 10_000, seed: int = 1) -> str:
    """Play so many requests. The figures, as a sentence."""
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        server = RedisServer("valkey")
        site = Site(server.url, Path(folder))
        log = Path(folder, "log")
        try:
            with log.open("wb") as out:
                site.api(stderr=out, stdout=out)
            fuzzer = Fuzzer(site, asyncio.run(furnish(server)), seed)
            began, early = time.monotonic(), 0.0
            for number in range(requests):
                if number == requests // 4:
                    early = resident(site)
                fuzzer.play()
            took, late = time.monotonic() - began, resident(site)
            assert site.processes[0].poll() is None
            until(lambda: site.client().get("/readyz").status_code == 200, what="an answer")
            said = log.read_text(errors="replace")
            assert "Traceback" not in said and "ERROR" not in said, said[-3000:]
            assert "died" not in said
            assert late < early + GROWTH, (early, late)
            assert asyncio.run(flaws(site, server)) == []
        finally:
            site.close()
            server.close()
    told = ", ".join(f"{status}: {count}" for status, count in sorted(fuzzer.statuses.items()))
    return (
        f"{requests} requests of seed {seed} in {took:.0f} s: {told}; the slowest took {fuzzer.slowest * 1000:.0f} ms;"
        f" the API had {early:.0f} MiB after a quarter of them and {late:.0f} MiB at the end"
    )


if __name__ == "__main__":
    print(fuzz(*map(int, sys.argv[1:])))
