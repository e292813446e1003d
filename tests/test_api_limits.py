"""Rate limits over HTTP: what counts where, what an answer says, and whom a request counts for."""

import asyncio
import re
import time

import pytest
from conftest import application, connect, running_site, start_server
from making import jpeg, make_post
from state import unchanged
from uploading import BODY
from wire import FORM, dial, exchange, form, head, hear, request

from api.limits import client_address
from api.protocol import TAKE_A_BODY
from storage import posts, settings

TUS = "Tus-Resumable: 1.0.0"
FREE = {"/healthz", "/readyz", "/docs", "/openapi.json", "/metrics"}
ONE_A_DAY = "read=1/d,comment=1/d,post=1/d,upload=1/d"


def serve(server, folder, limits: str, **more):
    server.client.flushall()
    return running_site(server, folder, limits=limits, processing=1000, **more)


@pytest.fixture(scope="module")
def strict(embedded, tmp_path_factory):
    """One request a day of each class. A proxy names the address, so that a test can have one of its own."""
    with serve(embedded, tmp_path_factory.mktemp("site"), ONE_A_DAY, proxies=1) as site:
        yield site


@pytest.fixture(scope="module")
def limited(embedded, tmp_path_factory):
    limits = "read=100/h,comment=60/m,post=3/m,upload_bytes=2G/d"
    with serve(embedded, tmp_path_factory.mktemp("site"), limits) as site:
        yield site


@pytest.fixture
def site(limited):
    limited.server.client.flushall()
    return limited


def routes() -> list[tuple[str, str]]:
    found = []
    for route in application().router.routes:
        path = re.sub(r"<(\w+)(:[^>]*)?>", "01JD4Q7ZK5W8Y3N6R2T9V0XABC-0", "/" + route.path)
        if "/images/" in path:
            path += ".jpg"
        if not any(path.startswith(free) for free in FREE):
            found += [(method, path) for method in route.methods]
    return found


def test_a_second_request_is_refused_on_every_route_but_health_docs_and_options(strict):
    assert len(routes()) > 15
    for method, path in routes():
        assert_second_refused(strict, method, path)


def assert_second_refused(strict, method: str, path: str) -> None:
    user = re.sub(r"\W", "", method + path)
    token = f"Authorization: Bearer {strict.token(user)}"
    headers = [token, TUS, "Content-Length: 5000"] if method in TAKE_A_BODY else [token, TUS]
    if method == "POST" and "/uploads/" in path:
        headers.append("X-HTTP-Method-Override: PATCH")
    statuses = []
    for _ in range(2):
        with dial(strict.port) as line:
            line.sendall(head(method, path, *headers) + (b"x" * 5000 if method in TAKE_A_BODY else b""))
            answer = hear(line, method)
            statuses.append(answer.status)
    assert statuses[0] != 429, (method, path)
    if method == "OPTIONS":
        assert statuses[1] == 204 and "ratelimit" not in answer.headers
        return
    assert statuses[1] == 429, (method, path)
    assert 86000 < int(answer.headers["retry-after"]) <= 86400
    assert re.fullmatch(r'"(read|comment|post|upload)";r=0;t=86[34]\d\d', answer.headers["ratelimit"])
    assert answer.headers["cache-control"] == "no-store"
    if method != "HEAD":
        assert answer.json()["code"] == "limited"


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_is_not_limited(strict, path):
    answers = [exchange(strict.port, head("GET", path, "X-Forwarded-For: 192.0.2.99")) for _ in range(3)]
    assert [answer.status for answer in answers] == [200] * 3
    assert not any("ratelimit" in answer.headers for answer in answers)


def test_a_refused_body_is_not_read_and_nothing_changes(strict):
    carol = strict.authorization("carol")
    for target, *headers in [
        ("/v1/posts", FORM, "Content-Length: 1000000"),
        ("/v1/posts/01JD4Q7ZK5W8Y3N6R2T9V0XABC-0/comments", "Content-Length: 30000", "Expect: 100-continue"),
        ("/v1/uploads", TUS, "Upload-Length: 100000", BODY, "Transfer-Encoding: chunked"),
    ]:
        exchange(strict.port, head("POST", target, carol))
        exchange(strict.port, head("POST", target, carol, TUS))
        with unchanged(strict.server.client, strict.folder), dial(strict.port) as line:
            line.sendall(head("POST", target, carol, *headers))
            answer = hear(line)
            assert answer.status == 429
            assert answer.headers.get("connection") == "close"


def test_answers_that_pass_and_errors_say_what_is_left(site):
    with site.client("alice") as alice:
        feed = alice.get("/v1/posts")
        assert feed.headers["RateLimit"] == '"read";r=99;t=36'
        assert feed.headers["RateLimit-Policy"] == '"read";q=100;w=3600'
        again = alice.get("/v1/posts", headers={"If-None-Match": feed.headers["ETag"]})
        assert (again.status_code, again.headers["RateLimit"]) == (304, '"read";r=98;t=36')
        missing = alice.get("/v1/posts/none")
        assert (missing.status_code, missing.headers["RateLimit"]) == (404, '"read";r=97;t=36')
        missing = alice.post("/v1/posts/none/comments", json={"text": "Hi"})
        assert (missing.status_code, missing.headers["RateLimit"]) == (404, '"comment";r=59;t=1')
        created = alice.post("/v1/posts", files={"image": jpeg(64, 48)})
        assert created.status_code == 201
        post, size = created.headers["RateLimit"].split(", ")
        assert post == '"post";r=2;t=20'
        assert re.fullmatch(r'"upload_bytes";r=214748\d{4};t=1', size)
        policy = '"post";q=3;w=60, "upload_bytes";q=2147483648;qu="content-bytes";w=86400'
        assert created.headers["RateLimit-Policy"] == policy
    with site.client() as anybody:
        assert anybody.get("/v1/posts").headers["RateLimit"] == '"read";r=99;t=36', "an address, not alice"
        wrong = {"Authorization": "Bearer nonsense"}
        assert anybody.get("/v1/posts", headers=wrong).headers["RateLimit"] == '"read";r=98;t=36'
        wrong = {"X-Forwarded-For": "192.0.2.1"}
        assert anybody.get("/v1/posts", headers=wrong).headers["RateLimit"] == '"read";r=97;t=36'


def test_without_limits_no_answer_mentions_them_and_redis_is_not_asked(serving):
    with serving.client("alice") as alice:
        for answer in (alice.get("/v1/posts"), alice.post("/v1/posts", files={"image": jpeg(64, 48)})):
            assert answer.is_success and "RateLimit" not in answer.headers
        assert not serving.server.client.keys("rate:*:alice")


def test_a_repeated_request_counts_and_its_answer_is_the_first(site):
    with site.client("bob") as bob:
        key = {"Idempotency-Key": "a-key"}
        first, again, third, refused = (
            bob.post("/v1/posts", files={"image": jpeg(64, 48)}, headers=key) for _ in range(4)
        )
        assert [answer.status_code for answer in (first, again, third, refused)] == [201, 201, 201, 429]
        assert first.json() == again.json() == third.json()
        assert third.headers["RateLimit"].startswith('"post";r=0;t=') and 0 < int(refused.headers["Retry-After"]) <= 20


@pytest.mark.parametrize("partitions", [1, 16])
def test_comments_count_once_whatever_becomes_of_them(embedded, tmp_path, partitions):
    """With one partition the script that adds a comment takes from the limit, with several usually one before it."""
    with serve(embedded, tmp_path, "comment=7/d", partitions=partitions) as site:

        async def publish() -> list[str]:
            db = connect(embedded)
            made = [await make_post(db, f"user{number}", partitions) for number in range(3)]
            await db.close()
            return made

        found = asyncio.run(publish())
        with site.client("bob") as bob:
            once = {"Idempotency-Key": "a-key"}

            def add(post: str, text: str = "Hi", **given) -> tuple[int, str]:
                answer = bob.post(f"/v1/posts/{post}/comments", json={"text": text}, **given)
                return answer.status_code, re.sub(r";t=\d+", "", answer.headers["RateLimit"])

            answers = [add(post, headers=once) for post in found]
            assert answers == [(201, f'"comment";r={left}') for left in (6, 5, 4)]
            assert add(found[0], headers=once) == (201, '"comment";r=3'), "repeated"
            assert add(found[0], " ") == (422, '"comment";r=2')
            assert add("none") == (404, '"comment";r=1')
            assert add(found[1]) == (201, '"comment";r=0')
            with unchanged(embedded.client):
                assert [add(post) for post in found] == [(429, '"comment";r=0')] * 3
            assert len(bob.get(f"/v1/posts/{found[1]}/comments").json()["items"]) == 2


def create(client, length: int) -> str:
    headers = {"Tus-Resumable": "1.0.0", "Upload-Length": str(length)}
    return client.post("/v1/uploads", headers=headers).raise_for_status().headers["Location"]


def test_bytes_that_did_not_arrive_are_given_back_and_others_are_counted(embedded, tmp_path):
    """Two uploads of 60 MiB do not fit into the limit at the same time. Of the first one 400 kB arrive.

    The limit drains by 1.2 kB a second.
    """
    size, data = 60 << 20, jpeg(64, 48) + bytes(400_000)
    with serve(embedded, tmp_path, "upload_bytes=101M/d") as site, site.client("alice") as alice:
        first, second = create(alice, size), create(alice, size)

        def begin(upload: str, offset: int = 0) -> bytes:
            headers = [site.authorization(), TUS, BODY, f"Upload-Offset: {offset}", f"Content-Length: {size - offset}"]
            return head("PATCH", upload, *headers)

        def used() -> float:
            return float((embedded.client.get("rate:{0}:upload_bytes:alice") or "0").split()[0])

        def wait_until(condition) -> None:
            deadline = time.monotonic() + 20
            while not condition():
                assert time.monotonic() < deadline
                time.sleep(0.01)

        with dial(site.port) as line:
            line.sendall(begin(first) + data)
            wait_until(lambda: used() > size - 2**20)
            with dial(site.port) as other:
                other.sendall(begin(second))
                refused = hear(other)
            assert (refused.status, refused.json()["code"]) == (429, "limited")
            assert int(refused.headers["retry-after"]) > 3600
        wait_until(lambda: used() < 2**20)
        assert 200_000 < used() <= len(data)
        offsets = [
            int(alice.head(upload, headers={"Tus-Resumable": "1.0.0"}).headers["Upload-Offset"])
            for upload in (first, second)
        ]
        assert offsets == [len(data), 0]
        body = form(("image", "a.jpg", data))
        chunked = head("POST", "/v1/posts", site.authorization(), FORM, "Transfer-Encoding: chunked")
        answer = exchange(site.port, chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        assert answer.status == 201
        wait_until(lambda: used() < 2**20)
        assert 600_000 < used() <= len(data) + len(body)


def test_reads_pass_without_redis_and_writes_get_the_same_503_as_ever(tmp_path):
    server = start_server("valkey")
    try:
        with serve(server, tmp_path, "read=100/m,comment=100/m") as site:

            async def publish():
                db = connect(server)
                post = await make_post(db, "alice")
                await db.close()
                return post

            post = asyncio.run(publish())
            asyncio.run(posts.put_image(site.open_store(), post, jpeg(600, 600)))
            server.kill()
            with site.client("alice") as alice:
                for answer in (alice.get("/v1/posts"), alice.post(f"/v1/posts/{post}/comments", json={"text": "Hi"})):
                    assert (answer.status_code, answer.json()["code"]) == (503, "unreachable")
                assert alice.get(f"/v1/images/{post}.jpg").status_code == 200
            server.start()
            with site.client("alice") as alice:
                assert alice.get("/v1/posts").headers["RateLimit"].startswith('"read";r=99')
    finally:
        server.close()


def test_a_trusted_proxy_names_the_address_and_a_client_cannot_choose_it(embedded, tmp_path):
    with serve(embedded, tmp_path, "read=2/d", proxies="127.0.0.0/8,10.0.0.0/8") as site:

        def left(forwarded: str) -> str:
            answer = exchange(site.port, head("GET", "/v1/posts", f"X-Forwarded-For: {forwarded}"))
            return f"{answer.status} {answer.headers['ratelimit'].split(';')[1]}"

        assert [left("192.0.2.1"), left("198.51.100.1, 192.0.2.1"), left("8.8.8.8, 192.0.2.1, 10.0.0.9")] == [
            "200 r=1",
            "200 r=0",
            "429 r=0",
        ]
        assert left("2001:db8:0:1::1") == "200 r=1"
        assert left("2001:db8:0:1:ffff::2") == "200 r=0"
        assert left("2001:db8:0:2::1") == "200 r=1"


@pytest.mark.parametrize(
    ("peer", "forwarded", "proxies", "expected"),
    [
        ("192.0.2.1", "198.51.100.1", "0", "192.0.2.1"),
        ("192.0.2.1", "", "2", "192.0.2.1"),
        ("192.0.2.1", "198.51.100.1", "2", "192.0.2.1"),
        ("192.0.2.1", "203.0.113.5, 198.51.100.1, 10.0.0.1", "2", "198.51.100.1"),
        ("192.0.2.1", "198.51.100.1:4711", "1", "198.51.100.1"),
        ("192.0.2.1", "[2001:db8:1:2::3]:4711", "1", "2001:db8:1:2::"),
        ("192.0.2.1", "unknown", "1", "192.0.2.1"),
        ("192.0.2.1", ",,,", "1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "", "0", "192.0.2.1"),
        ("fe80::1%eth0", "", "0", "fe80::"),
        ("192.0.2.1", "198.51.100.1", "10.0.0.0/8", "192.0.2.1"),
        ("10.0.0.1", "198.51.100.1, nonsense, 10.0.0.2", "10.0.0.0/8", "10.0.0.2"),
        ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.0/8", "10.0.0.3"),
        ("::1", "2001:db8::1", "::1,127.0.0.1", "2001:db8::"),
    ],
)
def test_the_address_of_a_client(peer, forwarded, proxies, expected):
    assert client_address(peer, forwarded, settings.load({"IMAGEGRAM_PROXIES": proxies}).proxies) == expected


def test_addresses_and_users_never_share_a_limit(site):
    for token in (None, site.token("127.0.0.1"), site.token("address:127.0.0.1")):
        answer = exchange(site.port, request("GET", "/v1/posts", token))
        assert answer.headers["ratelimit"] == '"read";r=99;t=36'
