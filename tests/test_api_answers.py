"""Answers with few bytes: ETags for each encoding, 304 without a body, compression by quality values, and ranges."""

import gzip
import json
import random
import re
import secrets
import time
import tracemalloc
from base64 import b64encode
from email.utils import parsedate_to_datetime

import brotli
import httpx
import pytest
from conftest import run_with_db
from making import NO_SEGMENTS, jpeg, make_post, make_processing
from wire import dial, exchange, head, hear

from api import rendering
from api.headers import matches_etag, preferred_coding, preferred_wait
from storage import comments, keys, outbox, posts

DECODE = {"br": brotli.decompress, "gzip": gzip.decompress, "": lambda body: body}  # by Content-Encoding
PROSE = """
We got up at four to see this, and it was worth every minute of lost sleep. The road was closed, so we walked the
last two kilometres along the river. My grandmother's kitchen, unchanged since 1974. Does anybody know which bird this
is? Third attempt at sourdough and finally it has risen! First snow of the year, and of course I forgot my gloves. The
light only stayed for a moment. Found in the attic, behind a box of letters. He refuses to come in, whatever the
weather. Sunday market: figs, goat cheese, and far too many plums. What a day! Where is that? I was there last summer,
it is beautiful. Congratulations to both of you. Looks delicious, may I have the recipe? So proud of you. This made my
day. Is the path open again? Great shot, which lens did you use? Miss you all. Wow. It has been raining here for a week
""".replace("\n", " ")


def sentences(chance: random.Random, most: int) -> str:
    """1 to `most` sentences, as a caption or a comment may have them."""
    return ". ".join(chance.sample([part.strip() for part in PROSE.split(". ")], chance.randint(1, most)))


@pytest.fixture(scope="module")
def pages(serving):
    """Addresses by name, on a site with 20 posts. Captions and comments are sentences, because they compress so."""
    chance = random.Random(20)

    async def fill(db):
        made = []
        for n in range(20):
            post = await make_processing(db, f"user{n * 37 % 101}", caption=sentences(chance, 3))
            await outbox.publish(db, post, b64encode(secrets.token_bytes(25)).decode())
            for _ in range(chance.randint(0, 6)):
                await comments.add(db, f"user{chance.randint(1, 999)}", post, sentences(chance, 2))
            made.append(post)
        await serving.open_store().put(f"images/{made[0]}.jpg", jpeg(600, 600))
        commented = (await posts.feed(db, 1, 1)).posts[0].id
        comment = (await comments.page(db, NO_SEGMENTS, commented, 1)).comments[0].id
        return made[0], commented, comment

    post, commented, comment = run_with_db(serving.server, fill)
    beginning = re.sub(r"\.\d+$", ".0", httpx.get(f"{serving.url}/v1/changes").json()["next"])
    return {
        "feed": "/v1/posts",
        "post": f"/v1/posts/{post}",
        "comments": f"/v1/posts/{commented}/comments",
        "changes": f"/v1/changes?since={beginning}",
        "image": f"/v1/images/{post}.jpg",
        "comment": f"/v1/posts/{commented}/comments/{comment}",
        "healthz": "/healthz",
        "readyz": "/readyz",
    }


def get(site, target: str, *headers: str, method: str = "GET"):
    return exchange(site.port, head(method, target, *headers))


JSON = ["feed", "post", "comments", "changes"]


@pytest.mark.parametrize("page", JSON)
def test_each_encoding_has_an_etag_of_its_own_and_the_same_content(serving, pages, page):
    answers = {encoding: get(serving, pages[page], f"Accept-Encoding: {encoding}") for encoding in DECODE}
    assert {answer.status for answer in answers.values()} == {200}
    assert {answer.headers.get("content-encoding", "") for answer in answers.values()} == set(DECODE)
    assert len({DECODE[encoding](answer.body) for encoding, answer in answers.items()}) == 1
    tags = {answer.headers["etag"] for answer in answers.values()}
    assert len(tags) == 3 and all(tag.startswith('"') for tag in tags), "strong ETags, one for each encoding"
    vary = "Accept-Encoding, Prefer" if page in ("post", "changes") else "Accept-Encoding"
    assert {answer.headers["vary"] for answer in answers.values()} == {vary}
    again = {encoding: get(serving, pages[page], f"Accept-Encoding: {encoding}") for encoding in DECODE}
    for encoding in DECODE:
        assert again[encoding].headers["etag"] == answers[encoding].headers["etag"]


@pytest.mark.parametrize("encoding", DECODE)
@pytest.mark.parametrize("page", JSON)
def test_a_page_that_the_client_has_is_answered_by_304_without_a_body(serving, pages, page, encoding):
    """The next request on the connection gets its answer, so there was no body behind the 304."""
    first = get(serving, pages[page], f"Accept-Encoding: {encoding}")
    with dial(serving.port) as line:
        for known in (first.headers["etag"], f'"other", {first.headers["etag"]}', "W/" + first.headers["etag"], "*"):
            line.sendall(head("GET", pages[page], f"Accept-Encoding: {encoding}", f"If-None-Match: {known}"))
            answer = hear(line)
            assert (answer.status, answer.body) == (304, b"")
            for name in ("etag", "vary", "cache-control", "link"):
                assert answer.headers.get(name) == first.headers.get(name)
            assert "content-length" not in answer.headers and "content-encoding" not in answer.headers
        line.sendall(head("GET", "/healthz"))
        assert hear(line).status == 200


def stable_headers(answer) -> dict[str, str]:
    """The headers, without those that differ from one answer to the next."""
    return {name: value for name, value in answer.headers.items() if name not in ("date", "request-id")}


@pytest.mark.parametrize("page", [*JSON, "image", "comment", "healthz", "readyz"])
def test_head_gets_the_headers_of_get_and_no_body(serving, pages, page):
    """The next request on the connection gets its answer, so there was no body."""
    with dial(serving.port) as line:
        for encoding in ("br", "gzip", "identity"):
            accepted = f"Accept-Encoding: {encoding}"
            got = get(serving, pages[page], accepted)
            assert got.status == 200 and int(got.headers["content-length"]) == len(got.body) > 0
            tag = got.headers.get("etag")
            for headers in ([accepted], [accepted, f"If-None-Match: {tag}"]):
                got = get(serving, pages[page], *headers)
                line.sendall(head("HEAD", pages[page], *headers))
                answer = hear(line, "HEAD")
                assert (answer.status, answer.body) == (got.status, b"")
                assert stable_headers(answer) == stable_headers(got)


def test_head_of_an_error_gets_the_headers_of_the_problem(serving, pages):
    with dial(serving.port) as line:
        for target, status in ((pages["post"] + "0", 404), ("/v1/posts?limit=0", 422), ("/nowhere", 404)):
            got = get(serving, target)
            line.sendall(head("HEAD", target))
            answer = hear(line, "HEAD")
            assert (answer.status, answer.body) == (got.status, b"") and got.status == status
            assert stable_headers(answer) == stable_headers(got)


REQUESTS = {
    "a page": (b"GET /v1/posts HTTP/1.1\r\nHost: x\r\n{more}\r\n", 200),
    "a page that the client has": (b"GET /v1/posts HTTP/1.1\r\nHost: x\r\nIf-None-Match: *\r\n{more}\r\n", 304),
    "a page's head": (b"HEAD /v1/posts HTTP/1.1\r\nHost: x\r\n{more}\r\n", 200),
    "health": (b"GET /healthz HTTP/1.1\r\nHost: x\r\n{more}\r\n", 200),
    "tus' options": (b"OPTIONS /v1/uploads HTTP/1.1\r\nHost: x\r\n{more}\r\n", 204),
    "an address of nothing": (b"GET /nowhere HTTP/1.1\r\nHost: x\r\n{more}\r\n", 404),
    "no token": (b"POST /v1/posts HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n{more}\r\n", 401),
    "no such method": (b"BREW /v1/posts HTTP/1.1\r\nHost: x\r\n{more}\r\n", 405),
    "an unknown expectation": (b"POST /v1/posts HTTP/1.1\r\nHost:x\r\nExpect:x\r\nContent-Length: 5\r\n\r\n12345", 417),
    "no host": (b"GET /v1/posts HTTP/1.1\r\n{more}\r\n", 400),
    "nonsense": (b"no sense\r\n\r\n", 400),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_every_answer_has_a_date_and_a_request_id(serving, case):
    sent, status = REQUESTS[case]
    before = int(time.time())
    first, second = (exchange(serving.port, sent.replace(b"{more}", b"")) for _ in range(2))
    for answer in (first, second):
        assert answer.status == status
        assert answer.headers["date"].endswith(" GMT")
        assert before <= parsedate_to_datetime(answer.headers["date"]).timestamp() <= time.time()
        assert re.fullmatch(r"[\x21-\x7e]{1,64}", answer.headers["request-id"])
    assert first.headers["request-id"] != second.headers["request-id"]
    if b"{more}" in sent:
        answer = exchange(serving.port, sent.replace(b"{more}", b"Request-Id: mine/7\r\n"))
        assert answer.headers["request-id"] == "mine/7"


def test_answers_to_writes_and_images_have_a_date_and_a_request_id(serving, pages):
    with serving.client("alice") as alice:
        target = pages["comments"]
        made = alice.post(target, json={"text": "a"}, headers={"Request-Id": "one"})
        gone = alice.delete(made.headers["Location"], headers={"Request-Id": "two"})
        sent = alice.post("/v1/posts", files={"image": jpeg()}, headers={"Request-Id": "three"})
        image = alice.get(pages["image"], headers={"Request-Id": "four"})
        part = alice.get(pages["image"], headers={"Request-Id": "five", "Range": "bytes=0-9"})
    answers = (made, gone, sent, image, part)
    assert [answer.status_code for answer in answers] == [201, 204, 201, 200, 206]
    assert [answer.headers["request-id"] for answer in answers] == ["one", "two", "three", "four", "five"]
    assert all("date" in answer.headers for answer in answers)


PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE = PARENT.split("-")[1]
IDS = {  # headers of the request, and the id of the answer; None: a new one
    "an id": (["Request-Id: " + "x" * 64], "x" * 64),
    "an id and a trace": (["Request-Id: x", f"traceparent: {PARENT}"], "x"),
    "a trace": ([f"Traceparent: {PARENT}"], TRACE),
    "a trace of a later version": ([f"traceparent: cc{PARENT[2:]}-more"], TRACE),
    "an id that is too long, and a trace": (["Request-Id: " + "x" * 65, f"traceparent: {PARENT}"], TRACE),
    "an id that is too long": (["Request-Id: " + "x" * 65], None),
    "an empty id": (["Request-Id:"], None),
    "an id with a space": (["Request-Id: a b"], None),
    "an id that is not ASCII": (["Request-Id: \xe9"], None),
    "a trace of no version": ([f"traceparent: ff{PARENT[2:]}"], None),
    "a trace of zeros": ([f"traceparent: {PARENT.replace(TRACE, '0' * 32)}"], None),
    "a trace in capitals": ([f"traceparent: {PARENT.upper()}"], None),
    "a trace that is cut off": ([f"traceparent: {PARENT[:-1]}"], None),
}


@pytest.mark.parametrize("page", ["feed", "nowhere"])
@pytest.mark.parametrize("case", IDS)
def test_the_request_id_of_an_answer_is_that_of_the_request_or_of_its_trace_or_a_new_one(serving, pages, page, case):
    headers, expected = IDS[case]
    given = get(serving, pages.get(page, "/nowhere"), *headers).headers["request-id"]
    assert given == expected if expected else re.fullmatch("[0-9a-f]{16}", given)


LISTS = {  # If-None-Match, where {tag} is what stands between the quotes of the ETag; the status
    '"{tag}"': 304,
    'W/"{tag}"': 304,
    '"other", "{tag}"': 304,
    '"other","{tag}"': 304,
    ', "a,b" ,\t, W/"{tag}" ,': 304,
    "*": 304,
    '"other"': 200,
    "{tag}": 200,
    '"x{tag}"': 200,
    '"{tag}x"': 200,
    "\"'{tag}'\"": 200,
    '"other {tag}"': 200,
    'w/"{tag}"': 200,
    'W/ "{tag}"': 200,
    '"{tag}': 200,
    '"{tag}" nonsense': 200,
    'nonsense "{tag}"': 200,
    '"other" "{tag}"': 200,
    '"{tag}", *': 200,
    ",": 200,
    "": 200,
}


@pytest.mark.parametrize("page", ["feed", "image"])
@pytest.mark.parametrize("listed", LISTS)
def test_if_none_match_is_a_list_of_whole_etags(serving, pages, page, listed):
    tag = get(serving, pages[page]).headers["etag"].strip('"')
    answer = get(serving, pages[page], "If-None-Match: " + listed.format(tag=tag))
    assert answer.status == LISTS[listed]


@pytest.mark.parametrize("page", ["feed", "image"])
def test_several_lines_of_a_header_are_one_list(serving, pages, page):
    tag = get(serving, pages[page]).headers["etag"]
    for lines in (('"a"', tag), (tag, '"a"'), ('"a", "b"', '"c"', f"W/{tag}")):
        assert get(serving, pages[page], *(f"If-None-Match: {line}" for line in lines)).status == 304
    assert get(serving, pages[page], 'If-None-Match: "a"', 'If-None-Match: "b"').status == 200


@pytest.mark.parametrize("lines", [("gzip;q=0.5", "br"), ("identity;q=0.1", "deflate, br")])
def test_several_lines_of_accept_encoding_are_one_list(serving, pages, lines):
    answer = get(serving, pages["feed"], *(f"Accept-Encoding: {line}" for line in lines))
    assert answer.headers["content-encoding"] == "br"


@pytest.mark.parametrize("page", JSON)
def test_the_etag_of_one_encoding_does_not_match_another(serving, pages, page):
    tag = get(serving, pages[page], "Accept-Encoding: br").headers["etag"]
    for encoding in ("gzip", "identity"):
        answer = get(serving, pages[page], f"Accept-Encoding: {encoding}", f"If-None-Match: {tag}")
        assert answer.status == 200 and answer.body
    assert get(serving, pages[page], 'If-None-Match: "other"').status == 200


ACCEPTED = {  # Accept-Encoding, and the Content-Encoding of the answer
    "br": "br",
    "gzip": "gzip",
    "gzip, br": "br",
    "gzip, deflate, br, zstd": "br",
    "gzip;q=1.0, br;q=0.5": "gzip",
    "br;q=0.5, gzip;q=0.4": "br",
    "br;q=0, gzip": "gzip",
    "br;q=0": "",
    "br;q=0.000, gzip;q=0.001": "gzip",
    "*": "br",
    "*;q=0": "",
    "br;q=0, *": "gzip",
    "gzip;q=0, br;q=0, *;q=0.5": "",
    "identity": "",
    "identity, br;q=0.5": "",
    "identity;q=0.5, gzip;q=0.8": "gzip",
    "BR": "br",
    "  br ; q=1 ,gzip ; q=0.2": "br",
    "deflate": "",
    "": "",
    "nonsense;;;,": "",
}


@pytest.mark.parametrize("accepted", ACCEPTED)
def test_the_encoding_is_the_one_that_the_client_prefers(serving, pages, accepted):
    answer = get(serving, pages["feed"], f"Accept-Encoding: {accepted}")
    assert answer.headers.get("content-encoding", "") == ACCEPTED[accepted]
    assert json.loads(DECODE[ACCEPTED[accepted]](answer.body))["items"]


def test_no_header_of_8_kb_takes_long_to_read():
    spaces = " " * 8000
    for value in (f"a{spaces}x", f"a;{spaces}x", f"a;q={spaces}x", f'"a"{spaces}x', f'a="{spaces}', "a," * 4000):
        began = time.thread_time()
        preferred_coding(value), preferred_wait(value), matches_etag(value, '"b"')
        assert time.thread_time() - began < 0.02, value[:5]


def test_brotli_makes_a_feed_page_of_20_posts_a_quarter_of_its_size_at_most(serving, pages, capsys):
    plain = get(serving, pages["feed"])
    assert len(plain.json()["items"]) == 20
    sizes = {name: len(get(serving, pages["feed"], f"Accept-Encoding: {name}").body) for name in ("br", "gzip")}
    whole = len(plain.body)
    with capsys.disabled():
        shares = ", ".join(f"{name} {size} ({size / whole:.1%})" for name, size in sizes.items())
        print(f"\na feed page of 20 posts: {whole} bytes; {shares}")
    assert sizes["br"] <= 0.25 * whole


def test_a_small_answer_is_not_compressed(serving, pages):
    answer = get(serving, "/v1/changes", "Accept-Encoding: br")
    assert "content-encoding" not in answer.headers and answer.headers["vary"].startswith("Accept-Encoding")


def test_a_page_of_more_than_64_kib_is_compressed_too(serving, pages):
    async def fill(db):
        post = await make_post(db, "alice")
        for _ in range(60):
            await comments.add(db, "alice", post, secrets.token_hex(1000))
        return post

    target = f"/v1/posts/{run_with_db(serving.server, fill)}/comments?limit=60"
    plain = get(serving, target)
    assert len(plain.body) > 100_000
    for encoding in ("br", "gzip"):
        answer = get(serving, target, f"Accept-Encoding: {encoding}")
        assert answer.headers["content-encoding"] == encoding and len(answer.body) < len(plain.body)
        assert DECODE[encoding](answer.body) == plain.body


RANGES = {  # Range; the status, and begin and end of the body in the image
    "bytes=0-99": (206, 0, 100),
    "bytes=0-0": (206, 0, 1),
    "bytes=100-": (206, 100, None),
    "bytes=-10": (206, -10, None),
    "bytes=-99999999": (206, 0, None),
    "bytes=10-99999999": (206, 10, None),
    "bytes=99999999-": (416, 0, 0),
    "bytes=-0": (416, 0, 0),
    "bytes=5-4": (200, 0, None),
    "bytes=0-1,3-4": (200, 0, None),
    "bytes=-": (200, 0, None),
    "bytes=a-b": (200, 0, None),
    "lines=0-1": (200, 0, None),
}


@pytest.mark.parametrize("asked", RANGES)
def test_a_range_of_an_image_is_answered_with_its_bytes(serving, pages, asked):
    whole = get(serving, pages["image"])
    assert (whole.status, whole.headers["accept-ranges"]) == (200, "bytes")
    status, start, stop = RANGES[asked]
    answer = get(serving, pages["image"], f"Range: {asked}")
    assert answer.status == status
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{len(whole.body)}"
        return
    assert answer.body == whole.body[start:stop]
    assert answer.headers["etag"] == whole.headers["etag"]
    if status == 206:
        first = start if start >= 0 else len(whole.body) + start
        last = first + len(answer.body) - 1
        assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(whole.body)}"


def test_a_range_with_if_range_is_sent_only_if_the_image_is_the_same(serving, pages):
    whole = get(serving, pages["image"])
    part = ("Range: bytes=10-", f"If-Range: {whole.headers['etag']}")
    assert get(serving, pages["image"], *part).status == 206
    assert get(serving, pages["image"], "Range: bytes=10-", 'If-Range: "other"').status == 200
    assert get(serving, pages["image"], "Range: bytes=10-", "If-Range: W/" + whole.headers["etag"]).status == 200


def test_an_image_is_immutable_and_head_and_304_have_its_headers(serving, pages):
    whole = get(serving, pages["image"], "Accept-Encoding: br, gzip")
    assert whole.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert (whole.headers["content-type"], whole.headers["x-content-type-options"]) == ("image/jpeg", "nosniff")
    assert "content-encoding" not in whole.headers
    answer = get(serving, pages["image"], method="HEAD")
    assert (answer.status, answer.body) == (200, b"")
    for name in ("content-length", "etag", "cache-control", "content-type", "accept-ranges"):
        assert answer.headers[name] == whole.headers[name]
    for method in ("GET", "HEAD"):
        known = get(serving, pages["image"], f"If-None-Match: {whole.headers['etag']}", method=method)
        assert (known.status, known.body, known.headers["etag"]) == (304, b"", whole.headers["etag"])
    both = get(serving, pages["image"], f"If-None-Match: {whole.headers['etag']}", "Range: bytes=0-1")
    assert both.status == 304


def test_a_page_of_the_feed_keeps_its_tag_when_posts_before_it_move(serving, pages):
    """Then only the ranks in the cursor of the next page are others."""
    second = serving.url + "/v1/posts?limit=2&cursor=" + httpx.get(f"{serving.url}/v1/posts?limit=2").json()["next"]
    before = httpx.get(second)

    async def overtake(db):
        post = await make_post(db, "alice")
        for _ in range(20):
            await comments.add(db, "bob", post, "Up")

    run_with_db(serving.server, overtake)
    after = httpx.get(second)
    assert after.json()["items"] == before.json()["items"]
    assert after.json()["next"] != before.json()["next"]
    assert after.headers["etag"] == before.headers["etag"]
    assert httpx.get(second, headers={"If-None-Match": before.headers["etag"]}).status_code == 304
    longer = httpx.get(second.replace("limit=2", "limit=3"), headers={"If-None-Match": before.headers["etag"]})
    assert longer.status_code == 200


@pytest.mark.parametrize("number", ["9" * 20, "9" * 5000, "٣", "0"], ids=lambda number: number[:5])
def test_a_number_that_a_foreign_client_wrote_into_a_post_spoils_no_answer(serving, number):
    async def write(db):
        post = await make_processing(db, "alice")
        await outbox.publish(db, post, "hash")
        serving.server.client.hset(keys.post(post), "thumbhash", f"hash 1 {number}")
        return post

    post = run_with_db(serving.server, write)
    for target in (f"/v1/posts/{post}", "/v1/posts", "/v1/changes", "/v1/users/alice/posts"):
        assert get(serving, target).status == 200
    assert json.loads(get(serving, f"/v1/posts/{post}").body)["image"]["thumbhash"] == "hash"


def test_a_cached_post_takes_little_more_memory_than_its_bytes():
    texts = [f'["179545939012{n}-0","bob","{"Where is that? " * 2}"]' for n in range(3)]
    row = "\n3\nalice\nhash 1 6913 15650 50791\n[" + ",".join(texts) + "]\nHello"
    tracemalloc.start()
    try:
        for number in range(200):
            rendering.ready_post(f"{number:026}-0{row}")
        each = tracemalloc.get_traced_memory()[0] / 200
    finally:
        tracemalloc.stop()
    assert each < 2500
