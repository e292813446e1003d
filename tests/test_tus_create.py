"""POST of tus: it creates an upload, with or without its first bytes."""

import contextlib
import time

import pytest
from conftest import until
from state import contents, files, unchanged
from uploading import begin, joined, offset, picture
from wire import FORM, dial, exchange, form, head, hear
from wiretrace import chunked, play

from storage.settings import IMAGE_BYTES, OPEN_UPLOADS, RESERVED_BYTES

BODY = "> Content-Type: application/offset+octet-stream"
TRACES = {
    "the answer has the address, the offset and the time of expiry": """
        > POST /v1/uploads
        > Upload-Length: 100
        > Content-Length: 0
        < 201
        < Location: /v1/uploads/<upload>
        < Upload-Offset: 0
        < Upload-Expires: *, * GMT
        < Tus-Resumable: 1.0.0
    """,
    "an upload of the largest size is accepted": f"""
        > POST /v1/uploads
        > Upload-Length: {IMAGE_BYTES}
        < 201
        < Location: /v1/uploads/<upload>
        > DELETE /v1/uploads/<upload>
        < 204
    """,
    "a larger one is refused": f"""
        > POST /v1/uploads
        > Upload-Length: {IMAGE_BYTES + 1}
        < 413
        < code: toolarge
        < -Location
        < Tus-Resumable: 1.0.0
    """,
    "an upload of 0 bytes is finished": """
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
    "a length that is given later is not supported": """
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
    "with its first bytes": """
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
    "with all bytes in chunked encoding, after a 100 Continue": """
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
    "with more than its length, in chunked encoding: the upload is created": """
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
    "with bytes that are no image: the upload is created, and the answer has its address": """
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
    "with a body of another type, which is ignored": """
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
METADATA = {  # Upload-Metadata, and the status
    "a key alone": ("is_confidential", 201),
    "a key with an empty value": ("empty ", 201),
    "spaces after commas": ("a YQ==, b Yg==", 201),
    "punctuation in keys": ("a/b:c;d YQ==", 201),
    "an empty key": (",a YQ==", 400),
    "a value that is no Base64": ("a Y*", 400),
    "Base64 without its padding": ("a YQ=", 400),
    "two values": ("a YQ== YQ==", 400),
    "a key twice": ("a YQ==,a Yg==", 400),
    "a key that is not ASCII": ("ä YQ==", 400),
    "more than 4 KiB": ("a " + "YQYQ" * 1025, 400),
}


pytestmark = pytest.mark.usefixtures("empty")


@pytest.mark.parametrize("case", TRACES)
def test_a_creation_is_answered_as_in_the_trace(serving, case):
    image = picture(100)
    bodies = {"picture": image, "first": image[:40], "rest": image[40:], "chunked": chunked(image[:1], image[1:])}
    before = files(serving.folder)
    known = play(serving, TRACES[case], **bodies, text=b"<svg>" + image[5:])
    if "upload" not in known:
        assert (contents(serving.server.client), files(serving.folder)) == ({}, before), "a refusal leaves nothing"


@pytest.mark.parametrize("length", LENGTHS)
def test_a_malformed_length_is_refused(serving, length):
    play(serving, f"> POST /v1/uploads\n> Upload-Length: {length}\n< 400\n< code: malformed\n< -Location")
    assert contents(serving.server.client) == {}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_is_accepted_if_it_is_well_formed(serving, case):
    text, status = METADATA[case]
    play(serving, f"> POST /v1/uploads\n> Upload-Length: 1\n> Upload-Metadata: {text}\n< {status}")
    assert bool(contents(serving.server.client)) == (status == 201)


def test_creating_an_upload_needs_a_token(serving):
    play(serving, "> POST /v1/uploads\n> Upload-Length: 1\n< 401\n< Tus-Resumable: 1.0.0", user=None)
    assert contents(serving.server.client) == {}


async def test_the_bytes_that_came_with_the_creation_are_stored(serving):
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


def test_a_user_may_have_twenty_open_uploads_at_most(serving):
    uploads = [begin(serving, 100) for _ in range(OPEN_UPLOADS)]
    assert sorted(serving.server.client.hkeys("uploads:{0}:alice")) == sorted(uploads)
    refused = "> POST /v1/uploads\n> Upload-Length: 100\n< 429\n< code: quota\n< Retry-After: *\n< Tus-Resumable: 1.0.0"
    with unchanged(serving.server.client, serving.folder):
        play(serving, refused)
    begin(serving, 100, "bob")
    play(serving, "> DELETE /v1/uploads/<upload>\n< 204", known={"upload": uploads[0]})
    begin(serving, 100)
    play(serving, refused)


def test_a_user_may_reserve_two_gibibytes_at_most(serving):
    """Twenty uploads of the largest size reserve less than that. So the test writes a larger one into Redis."""
    client, upload = serving.server.client, begin(serving, 100)
    client.hset("uploads:{0}:alice", mapping={upload: 2**31 - 100})
    with unchanged(client, serving.folder):
        play(serving, "> POST /v1/uploads\n> Upload-Length: 101\n< 429\n< code: quota\n< Retry-After: *")
    begin(serving, 100)


def test_with_too_many_open_uploads_retry_after_is_the_time_until_the_next_one_expires(serving):
    """After that time another upload is accepted, even if no worker has removed the expired one."""
    client, uploads = serving.server.client, [begin(serving, 100) for _ in range(OPEN_UPLOADS)]
    create = "> POST /v1/uploads\n> Upload-Length: 100\n"
    hour = int(play(serving, f"{create}< 429\n< code: quota\n< Retry-After: <seconds>")["seconds"])
    assert 3500 < hour <= 3600
    client.hset(f"upload:{{0}}:{uploads[7]}", "expires", client.time()[0] * 1000 + 3000)
    wait = int(play(serving, f"{create}< 429\n< Retry-After: <seconds>")["seconds"])
    refused = time.monotonic()
    assert 1 <= wait <= 3
    until(lambda: time.monotonic() >= refused + wait, what="the time of Retry-After")
    begin(serving, 100)
    play(serving, f"{create}< 429\n< Retry-After: *")


FORMS = 25  # more than the open uploads that a user may have


def forms(site, stack: contextlib.ExitStack, count: int, *headers: str) -> list:
    """Begins `count` forms of alice's by sending their heads, and returns their connections."""
    before, lines = site.server.client.hlen("uploads:{0}:alice"), []
    for _ in range(count):
        lines.append(stack.enter_context(dial(site.port)))
        lines[-1].sendall(head("POST", "/v1/posts", site.authorization(), FORM, *headers))
    until(lambda: site.server.client.hlen("uploads:{0}:alice") == before + count, what="the uploads of the forms")
    return lines


def test_forms_with_a_content_length_do_not_count_as_open_uploads(serving):
    """Beside 25 slow forms of 3 MB there may be 20 open uploads, and the forms can be finished."""
    body = form(("image", "a.bmp", b"BM" + bytes(3_000_000)))
    with contextlib.ExitStack() as stack:
        lines = forms(serving, stack, FORMS, f"Content-Length: {len(body)}")
        for _ in range(OPEN_UPLOADS):
            begin(serving, 100)
        play(serving, "> POST /v1/uploads\n> Upload-Length: 100\n< 429\n< code: quota")
        lines[0].sendall(body)
        assert hear(lines[0]).status == 201


def test_forms_without_a_content_length_may_reserve_two_gibibytes_beside_those_of_the_uploads(serving):
    most = RESERVED_BYTES // IMAGE_BYTES
    body = form(("image", "a.bmp", b"BM" + bytes(1000)))
    with contextlib.ExitStack() as stack:
        lines = forms(serving, stack, most, "Transfer-Encoding: chunked")
        with unchanged(serving.server.client, serving.folder):
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


def test_a_repeated_creation_has_the_present_offset_of_the_upload(serving):
    trace = """
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
    known = play(serving, trace, first=picture(40))
    assert offset(serving, known["upload"]) == 40
