"""POST of tus: creation, with and without the first bytes."""

import contextlib
import time

import pytest
from conftest import until
from uploading import begin, joined, offset, picture
from wire import FORM, dial, exchange, form, head, hear
from wiretrace import chunked, play

from storage.settings import IMAGE_BYTES, OPEN_UPLOADS, RESERVED_BYTES

BODY = "> Content-Type: application/offset+octet-stream"
TRACES = {
    "an upload has a place, an offset and an end": """
        > POST /v1/uploads
        > Upload-Length: 100
        > Content-Length: 0
        < 201
        < Location: /v1/uploads/<upload>
        < Upload-Offset: 0
        < Upload-Expires: *, * GMT
        < Tus-Resumable: 1.0.0
    """,
    "the largest image is taken": f"""
        > POST /v1/uploads
        > Upload-Length: {IMAGE_BYTES}
        < 201
        < Location: /v1/uploads/<upload>
        > DELETE /v1/uploads/<upload>
        < 204
    """,
    "a larger one is not": f"""
        > POST /v1/uploads
        > Upload-Length: {IMAGE_BYTES + 1}
        < 413
        < code: toolarge
        < -Location
        < Tus-Resumable: 1.0.0
    """,
    "nothing is an upload that is finished": """
        > POST /v1/uploads
        > Upload-Length: 0
        < 201
        < Location: /v1/uploads/<upload>
        < Upload-Offset: 0
        > HEAD /v1/uploads/<upload>
        < 200
        < Upload-Offset: 0
        < Upload-Length: 0
    """,
    "without a length": """
        > POST /v1/uploads
        < 400
        < code: malformed
        < Tus-Resumable: 1.0.0
    """,
    "a length to be told later is not offered": """
        > POST /v1/uploads
        > Upload-Defer-Length: 1
        < 400
        < code: malformed
    """,
    "another version": """
        > POST /v1/uploads
        > Tus-Resumable: 0.2.2
        > Upload-Length: 100
        < 412
        < Tus-Version: 1.0.0
        < -Location
    """,
    "with the whole image": """
        > POST /v1/uploads
        > Upload-Length: 100
        > Content-Type: application/offset+octet-stream
        > [picture]
        < 201
        < Location: /v1/uploads/<upload>
        < Upload-Offset: 100
        > HEAD /v1/uploads/<upload>
        < 200
        < Upload-Offset: 100
    """,
    "with its beginning": """
        > POST /v1/uploads
        > Upload-Length: 100
        > Content-Type: application/offset+octet-stream
        > [first]
        < 201
        < Location: /v1/uploads/<upload>
        < Upload-Offset: 40
        < Upload-Expires: *
        > PATCH /v1/uploads/<upload>
        > Upload-Offset: 40
        > Content-Type: application/offset+octet-stream
        > [rest]
        < 204
        < Upload-Offset: 100
    """,
    "with its beginning in chunked encoding, after an invitation": """
        > POST /v1/uploads
        > Upload-Length: 100
        > Content-Type: application/offset+octet-stream
        > Transfer-Encoding: chunked
        > Expect: 100-continue
        > [chunked]
        < 201
        < Location: /v1/uploads/<upload>
        < Upload-Offset: 100
    """,
    "with more than its length": """
        > POST /v1/uploads
        > Upload-Length: 99
        > Content-Type: application/offset+octet-stream
        > [picture]
        < 413
        < code: toolarge
        < -Location
    """,
    "with more than its length, which shows only as it comes": """
        > POST /v1/uploads
        > Upload-Length: 99
        > Content-Type: application/offset+octet-stream
        > Transfer-Encoding: chunked
        > [chunked]
        < 413
        < Location: /v1/uploads/<upload>
        > HEAD /v1/uploads/<upload>
        < 200
        < Upload-Offset: 0
    """,
    "with what is no image: the client learns where, and what is wrong": """
        > POST /v1/uploads
        > Upload-Length: 100
        > Content-Type: application/offset+octet-stream
        > [text]
        < 415
        < code: format
        < Location: /v1/uploads/<upload>
        > HEAD /v1/uploads/<upload>
        < 200
        < Upload-Offset: 0
    """,
    "a body of another type is not taken for the image": """
        > POST /v1/uploads
        > Upload-Length: 100
        > Content-Type: text/plain
        > [picture]
        < 201
        < Location: /v1/uploads/<upload>
        < Upload-Offset: 0
    """,
}
LENGTHS = ["", "-1", "+1", "1.5", "1e3", "0x10", "ten", "01", "1_0", "9" * 17]
METADATA = {
    "a key alone": ("is_confidential", 201),
    "a key with an empty value": ("empty ", 201),
    "spaces after commas": ("a YQ==, b Yg==", 201),
    "ASCII signs in keys": ("a/b:c;d YQ==", 201),
    "an empty key": (",a YQ==", 400),
    "no Base64": ("a Y*", 400),
    "Base64 cut short": ("a YQ=", 400),
    "two values": ("a YQ== YQ==", 400),
    "a key twice": ("a YQ==,a Yg==", 400),
    "a key that is not ASCII": ("ä YQ==", 400),
    "too much of it": ("a " + "YQYQ" * 1025, 400),
}


@pytest.fixture(autouse=True)
def empty(serving):
    serving.server.client.flushall()


@pytest.mark.parametrize("case", TRACES)
def test_post(serving, case):
    image = picture(100)
    bodies = {"picture": image, "first": image[:40], "rest": image[40:], "chunked": chunked(image[:1], image[1:])}
    play(serving, TRACES[case], **bodies, text=b"<svg>" + image[5:])


@pytest.mark.parametrize("length", LENGTHS)
def test_a_length_that_is_none_is_refused(serving, length):
    play(serving, f"> POST /v1/uploads\n> Upload-Length: {length}\n< 400\n< code: malformed\n< -Location")
    assert serving.server.client.keys() == []


@pytest.mark.parametrize("case", METADATA)
def test_metadata(serving, case):
    text, status = METADATA[case]
    known = play(serving, f"> POST /v1/uploads\n> Upload-Length: 1\n> Upload-Metadata: {text}\n< {status}")
    assert known == {}
    assert bool(serving.server.client.keys()) == (status == 201)


def test_creating_needs_a_token(serving):
    play(serving, "> POST /v1/uploads\n> Upload-Length: 1\n< 401\n< Tus-Resumable: 1.0.0", user=None)
    assert serving.server.client.keys() == []


async def test_what_came_with_the_creation_is_what_is_kept(serving):
    image = picture(3 * 2**20 + 5)
    known = play(
        serving,
        f"""
        > POST /v1/uploads
        > Upload-Length: {len(image)}
        > Content-Type: application/offset+octet-stream
        > [image]
        < 201
        < Location: /v1/uploads/<upload>
        < Upload-Offset: {len(image)}
        """,
        image=image,
    )
    assert await joined(serving, serving.server, known["upload"]) == image


def test_a_user_has_twenty_open_uploads_and_no_more(serving):
    opened = [begin(serving, 100) for _ in range(OPEN_UPLOADS)]
    before = serving.server.client.hgetall("uploads:{0}:alice")
    assert sorted(before) == sorted(opened)
    refused = "> POST /v1/uploads\n> Upload-Length: 100\n< 429\n< code: quota\n< Retry-After: *\n< Tus-Resumable: 1.0.0"
    play(serving, refused)
    assert serving.server.client.hgetall("uploads:{0}:alice") == before
    begin(serving, 100, "bob")
    play(serving, "> DELETE /v1/uploads/<upload>\n< 204", known={"upload": opened[0]})
    begin(serving, 100)
    play(serving, refused)


def test_a_user_has_two_gibibytes_reserved_and_no_more(serving):
    """Twenty largest images are less: only a larger one would meet the quota of bytes."""
    client, upload = serving.server.client, begin(serving, 100)
    client.hset("uploads:{0}:alice", mapping={upload: 2**31 - 100})
    play(serving, "> POST /v1/uploads\n> Upload-Length: 101\n< 429\n< code: quota\n< Retry-After: *")
    begin(serving, 100)


def test_who_has_too_many_open_uploads_is_told_when_the_next_one_expires(serving):
    """At that second the next one is taken, also if no worker is there to erase the one that expired."""
    client, opened = serving.server.client, [begin(serving, 100) for _ in range(OPEN_UPLOADS)]
    ask = "> POST /v1/uploads\n> Upload-Length: 100\n"
    hour = int(play(serving, f"{ask}< 429\n< code: quota\n< Retry-After: <seconds>")["seconds"])
    assert 3500 < hour <= 3600
    client.hset(f"upload:{{0}}:{opened[7]}", "expires", client.time()[0] * 1000 + 3000)
    told = int(play(serving, f"{ask}< 429\n< Retry-After: <seconds>")["seconds"])
    asked = time.monotonic()
    assert 2 <= told <= 3
    until(lambda: time.monotonic() >= asked + told, what="the second that was told")
    begin(serving, 100)
    play(serving, f"{ask}< 429\n< Retry-After: *")


FORMS = 25


def forms(site, stack: contextlib.ExitStack, count: int, *headers: str) -> list:
    """Forms of alice's that are under way, one part of their image sent; their connections."""
    known, lines = site.server.client.hlen("uploads:{0}:alice"), []
    for _ in range(count):
        lines.append(stack.enter_context(dial(site.port)))
        lines[-1].sendall(head("POST", "/v1/posts", site.authorization(), FORM, *headers))
    until(lambda: site.server.client.hlen("uploads:{0}:alice") == known + count, what="the forms")
    return lines


def test_forms_under_way_keep_nobody_out(serving):
    """Twenty-five slow forms of 3 MB, whose length is told: they are not counted among the uploads, and end well."""
    body = form(("image", "a.bmp", b"BM" + bytes(3_000_000)))
    with contextlib.ExitStack() as stack:
        lines = forms(serving, stack, FORMS, f"Content-Length: {len(body)}")
        for _ in range(OPEN_UPLOADS):
            begin(serving, 100)
        play(serving, "> POST /v1/uploads\n> Upload-Length: 100\n< 429\n< code: quota")
        lines[0].sendall(body)
        assert hear(lines[0]).status == 201


def test_forms_that_do_not_tell_their_length_reserve_two_gibibytes_at_most_and_no_upload_waits_for_them(serving):
    most = RESERVED_BYTES // IMAGE_BYTES
    body = form(("image", "a.bmp", b"BM" + bytes(1000)))
    with contextlib.ExitStack() as stack:
        lines = forms(serving, stack, most, "Transfer-Encoding: chunked")
        refused = exchange(serving.port, form_request(serving, body, "Transfer-Encoding: chunked"))
        assert (refused.status, refused.json()["code"]) == (429, "quota")
        assert 3500 < int(refused.headers["retry-after"]) <= 3600
        assert exchange(serving.port, form_request(serving, body, f"Content-Length: {len(body)}")).status == 201
        begin(serving, IMAGE_BYTES)
        lines[0].sendall(chunked(body))
        assert hear(lines[0]).status == 201
        again = form_request(serving, chunked(body), "Transfer-Encoding: chunked")
        assert exchange(serving.port, again).status == 201


def form_request(site, body: bytes, *headers: str) -> bytes:
    return head("POST", "/v1/posts", site.authorization(), FORM, *headers) + body


def test_an_upload_made_again_with_its_key_says_where_it_is_now(serving):
    made = """
        > POST /v1/uploads
        > Idempotency-Key: one
        > Upload-Length: 100
        < 201
        < Location: /v1/uploads/<upload>
        < Upload-Offset: 0
        < -Idempotent-Replayed
        > PATCH /v1/uploads/<upload>
        > Upload-Offset: 0
        > Content-Type: application/offset+octet-stream
        > [first]
        < 204
        > POST /v1/uploads
        > Idempotency-Key: one
        > Upload-Length: 100
        < 201
        < Location: /v1/uploads/<upload>
        < Upload-Offset: 40
        < Idempotent-Replayed: true
        > POST /v1/uploads
        > Idempotency-Key: one
        > Upload-Length: 99
        < 422
        < code: reused
    """
    known = play(serving, made, first=picture(40))
    assert offset(serving, known["upload"]) == 40
