"""POST of tus: creation, with and without the first bytes."""

import pytest
from uploading import begin, joined, offset, picture
from wiretrace import chunked, play

from storage.settings import IMAGE_BYTES, OPEN_UPLOADS

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
    """Twenty largest images are less: only the quota of bytes would stop at 2 GiB, so the script is asked."""
    serving.server.client.hset("uploads:{0}:alice", mapping={"u1": 2**31 - 100})
    play(serving, "> POST /v1/uploads\n> Upload-Length: 101\n< 429\n< code: quota")
    begin(serving, 100)


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
