"""PATCH of tus: it appends bytes at the offset. Every byte that arrives is stored, whatever happens afterwards."""

import asyncio
import fcntl
import json
import socket
import struct

import pytest
from conftest import connect, until
from state import contents, unchanged
from uploading import TUS, begin, count_chunks, joined, offset, patch_head, picture
from wire import dial, exchange, head, hear, reset
from wiretrace import chunked, play

from storage import uploads
from storage.settings import CHUNKS, DAY_MS

SIOCOUTQ = 0x5411  # ioctl(2): the bytes of a socket's send queue
PATCH = """
        > PATCH /v1/uploads/<upload>
        > Content-Type: application/offset+octet-stream"""
UNTOUCHED = """
        > HEAD /v1/uploads/<upload>
        < 200
        < Upload-Offset: 0
"""
TRACES = {
    "all bytes": f"""{PATCH}
        > Upload-Offset: 0
        > [picture]
        < 204
        < Upload-Offset: 100
        < Upload-Expires: *, * GMT
        < Tus-Resumable: 1.0.0
        < -Content-Length
        > HEAD /v1/uploads/<upload>
        < 200
        < Upload-Offset: 100
    """,
    "the first byte, which is not enough to know the format, then the rest": f"""{PATCH}
        > Upload-Offset: 0
        > [one]
        < 204
        < Upload-Offset: 1{PATCH}
        > Upload-Offset: 1
        > [others]
        < 204
        < Upload-Offset: 100
    """,
    "no bytes, at offset 0": f"""{PATCH}
        > Upload-Offset: 0
        > Content-Length: 0
        < 204
        < Upload-Offset: 0
    """,
    "no bytes, without a Content-Length": f"""{PATCH}
        > Upload-Offset: 0
        < 204
        < Upload-Offset: 0
    """,
    "no bytes, at the end of a finished upload (the client did not get the last answer)": f"""{PATCH}
        > Upload-Offset: 0
        > [picture]
        < 204{PATCH}
        > Upload-Offset: 100
        > Content-Length: 0
        < 204
        < Upload-Offset: 100
    """,
    "in chunked encoding": f"""{PATCH}
        > Upload-Offset: 0
        > Transfer-Encoding: chunked
        > [chunked]
        < 204
        < Upload-Offset: 100
    """,
    "by POST with an override, for networks that block PATCH": """
        > POST /v1/uploads/<upload>
        > X-HTTP-Method-Override: PATCH
        > Content-Type: application/offset+octet-stream
        > Upload-Offset: 0
        > [picture]
        < 204
        < Upload-Offset: 100
    """,
    "by POST without an override": """
        > POST /v1/uploads/<upload>
        > [picture]
        < 405
        < Allow: *PATCH*
    """ + UNTOUCHED,
    "at an offset that is ahead": f"""{PATCH}
        > Upload-Offset: 1
        > [one]
        < 409
        < code: offset
        < Tus-Resumable: 1.0.0
    """ + UNTOUCHED,
    "at an offset that is behind": f"""{PATCH}
        > Upload-Offset: 0
        > [picture]
        < 204{PATCH}
        > Upload-Offset: 0
        > [one]
        < 409
        < code: offset
        > HEAD /v1/uploads/<upload>
        < 200
        < Upload-Offset: 100
    """,
    "without an offset": f"""{PATCH}
        > [one]
        < 400
        < code: malformed
    """ + UNTOUCHED,
    "at a malformed offset": f"""{PATCH}
        > Upload-Offset: -0
        > [one]
        < 400
        < code: malformed
    """ + UNTOUCHED,
    "with another content type": """
        > PATCH /v1/uploads/<upload>
        > Upload-Offset: 0
        > Content-Type: application/octet-stream
        > [picture]
        < 415
        < code: type
        < Tus-Resumable: 1.0.0
    """ + UNTOUCHED,
    "without a content type": """
        > PATCH /v1/uploads/<upload>
        > Upload-Offset: 0
        > [picture]
        < 415
        < code: type
    """ + UNTOUCHED,
    "in another version of tus": f"""{PATCH}
        > Upload-Offset: 0
        > Tus-Resumable: 0.2.2
        > [picture]
        < 412
        < Tus-Version: 1.0.0
    """ + UNTOUCHED,
    "past the end": f"""{PATCH}
        > Upload-Offset: 0
        > [more]
        < 413
        < code: toolarge
    """ + UNTOUCHED,
    "past the end, in chunked encoding": f"""{PATCH}
        > Upload-Offset: 0
        > Transfer-Encoding: chunked
        > [chunked-more]
        < 413
        < code: toolarge
    """ + UNTOUCHED,
    "bytes of another format": f"""{PATCH}
        > Upload-Offset: 0
        > [text]
        < 415
        < code: format
    """ + UNTOUCHED,
    "bytes of another format, from the second byte on": f"""{PATCH}
        > Upload-Offset: 0
        > [one]
        < 204{PATCH}
        > Upload-Offset: 1
        > [text]
        < 415
        < code: format
        > HEAD /v1/uploads/<upload>
        < 200
        < Upload-Offset: 1
    """,
    "a malformed chunk: the bytes before it are stored": f"""{PATCH}
        > Upload-Offset: 0
        > Transfer-Encoding: chunked
        > [broken]
        < 400
        < Connection: close
        > HEAD /v1/uploads/<upload>
        < 200
        < Upload-Offset: 50
    """,
    "to an unknown upload": """
        > PATCH /v1/uploads/u00000000000000000000000000-0
        > Upload-Offset: 0
        > Content-Type: application/offset+octet-stream
        > [picture]
        < 404
        < code: noupload
        < Tus-Resumable: 1.0.0
    """,
}


pytestmark = pytest.mark.usefixtures("empty")


@pytest.mark.parametrize("case", TRACES)
def test_a_patch_is_answered_as_in_the_trace(serving, case):
    image = picture(100)
    bodies = {
        "picture": image,
        "one": image[:1],
        "others": image[1:],
        "more": image + b"!",
        "chunked": chunked(image[:3], image[3:]),
        "chunked-more": chunked(image, b"!"),
        "text": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "broken": chunked(image[:50], end=b"0x10\r\n"),
    }
    known = {"upload": begin(serving, 100)}
    play(serving, TRACES[case], known=known, **bodies)
    chunks = serving.server.client.lrange(f"chunks:{{0}}:{known['upload']}", 0, -1)
    assert count_chunks(serving, known["upload"]) == len(chunks), "the store has no chunk that Redis does not name"


def test_only_the_owner_may_append_to_an_upload(serving):
    known = {"upload": begin(serving, 100)}
    with unchanged(serving.server.client, serving.folder):
        for user, status in (("bob", 404), (None, 401)):
            play(serving, f"{PATCH}\n> Upload-Offset: 0\n> [picture]\n< {status}", user, known, picture=picture(100))


def test_only_a_finished_upload_becomes_a_post_and_only_one_post(serving):
    known = {"upload": begin(serving, 100)}
    post = json.dumps({**known, "caption": "first"}).encode()
    trace = f"""
        > POST /v1/posts
        > Content-Type: application/json
        > [post]
        < 409
        < code: incomplete{PATCH}
        > Upload-Offset: 0
        > [picture]
        < 204
        > POST /v1/posts
        > Content-Type: application/json
        > [post]
        < 201
        < Location: /v1/posts/<post>
        > POST /v1/posts
        > Content-Type: application/json
        > [again]
        < 201
        < Location: /v1/posts/<post>
        > HEAD /v1/uploads/<upload>
        < 404
        < -Upload-Offset{PATCH}
        > Upload-Offset: 100
        > Content-Length: 0
        < 404
    """
    again = post.replace(b"first", b"second")
    known = play(serving, trace, known=known, picture=picture(100), post=post, again=again)
    play(serving, "> POST /v1/posts\n> Content-Type: application/json\n> [post]\n< 404", "bob", post=post)
    client = serving.server.client
    assert client.hget(f"post:{{0}}:{known['post']}", "caption") == "first"
    assert client.keys("post:*") == [f"post:{{0}}:{known['post']}"]
    assert client.hlen("uploads:{0}:alice") == 0, "the upload does not count for the quota any more"


@pytest.mark.parametrize("size", [1, 1000, 70_000, 200_000, 1_500_000])
@pytest.mark.parametrize("end", ["fin", "rst"])
async def test_every_byte_that_arrived_before_the_connection_broke_is_stored(serving, size, end):
    image = picture(2_000_000)
    upload = await asyncio.to_thread(begin, serving, len(image))
    line = dial(serving.port)
    line.sendall(patch_head(serving, upload, 0, f"Content-Length: {len(image)}") + image[:size])
    until(lambda: unacknowledged(line) == 0, what="the acknowledgement of all bytes")
    reset(line) if end == "rst" else line.close()
    await asyncio.to_thread(until, lambda: offset(serving, upload) == size)
    assert await joined(serving, serving.server, upload) == image[:size]


def unacknowledged(line: socket.socket) -> int:
    """The number of bytes that were sent and that the kernel of the other side has not acknowledged."""
    return struct.unpack("i", fcntl.ioctl(line, SIOCOUTQ, b"    "))[0]


async def test_every_byte_of_a_chunked_body_that_breaks_off_inside_a_chunk_is_stored(serving):
    image = picture(3000)
    upload = await asyncio.to_thread(begin, serving, len(image))
    line = dial(serving.port)
    line.sendall(patch_head(serving, upload, 0, "Transfer-Encoding: chunked"))
    line.sendall(chunked(image[:1000], end=b"7d0\r\n" + image[1000:1500]))
    line.shutdown(socket.SHUT_WR)
    await asyncio.to_thread(until, lambda: offset(serving, upload) == 1500)
    assert await joined(serving, serving.server, upload) == image[:1500]
    line.close()


async def test_an_upload_continues_on_a_new_connection_while_the_old_one_hangs(serving):
    """There is no lock. The new PATCH succeeds at the durable offset. Then the old one is at a wrong offset."""
    image = picture(300_000)
    upload = await asyncio.to_thread(begin, serving, len(image))
    with dial(serving.port) as old:
        old.sendall(patch_head(serving, upload, 0, f"Content-Length: {len(image)}") + image[:100_000])
        await asyncio.to_thread(until, lambda: offset(serving, upload) > 0)
        at = offset(serving, upload)
        rest = image[at:]
        known = {"upload": upload}
        trace = f"{PATCH}\n> Upload-Offset: {at}\n> [rest]\n< 204"
        await asyncio.to_thread(play, serving, trace, "alice", known, rest=rest)
        old.sendall(image[100_000:])
        assert hear(old).status == 409
    assert await joined(serving, serving.server, upload) == image


def test_an_upload_can_be_deleted_while_a_patch_is_under_way(serving):
    upload, image = begin(serving, 300_000), picture(300_000)
    with dial(serving.port) as old:
        old.sendall(patch_head(serving, upload, 0, "Content-Length: 300000") + image[:100_000])
        until(lambda: count_chunks(serving, upload) > 0, what="the first chunk")
        play(serving, "> DELETE /v1/uploads/<upload>\n< 204", known={"upload": upload})
        old.sendall(image[100_000:])
        assert hear(old).status == 404
    assert count_chunks(serving, upload) == 0
    assert contents(serving.server.client) == {}


async def test_a_slow_upload_makes_few_chunk_objects(serving, store, monkeypatch):
    """1 KiB a second for two minutes, where a second is made 2 ms. No byte is lost."""
    monkeypatch.setattr(uploads, "SLOW_SECONDS", 0.002)
    db = connect(serving.server)
    image = picture(120 * 1024)
    upload, _ = await uploads.create(db, "alice", 1, len(image))
    appender = uploads.Appender(db, store, upload, 0, len(image))
    for at in range(0, len(image), 1024):
        await appender.write(image[at : at + 1024])
        await asyncio.sleep(0.002)
    await appender.commit()
    chunks = (await uploads.inspect(db, upload)).chunks
    await db.close()
    assert appender.offset == len(image)
    assert len(chunks) <= 4
    assert b"".join([await store.get(f"chunks/{upload}/{name}") for name in chunks]) == image


def begin_with_chunks(site, count: int) -> str:
    """Creates an upload that has `count` chunks of 10 bytes. Only Redis has the names; the store has no bytes."""
    upload, client = begin(site, 20 * CHUNKS), site.server.client
    client.rpush(f"chunks:{{0}}:{upload}", *(f"{at}-{at:016x}" for at in range(0, 10 * count, 10)))
    lately = client.time()[0] * 1000 + DAY_MS - 60_000
    client.hset(f"upload:{{0}}:{upload}", mapping={"offset": 10 * count, "expires": lately})
    return upload


def test_with_ten_thousand_chunks_a_patch_is_refused_and_leaves_no_object(serving):
    known = {"upload": begin_with_chunks(serving, CHUNKS)}
    with unchanged(serving.server.client, serving.folder):
        play(
            serving,
            f"""{PATCH}
            > Upload-Offset: {10 * CHUNKS}
            > [one]
            < 429
            < code: chunks
            < Tus-Resumable: 1.0.0
            > HEAD /v1/uploads/<upload>
            < 200
            < Upload-Offset: {10 * CHUNKS}
            """,
            known=known,
            one=b"1",
        )


@pytest.mark.parametrize("first", [1, 7])
def test_the_format_is_checked_when_the_first_bytes_came_one_by_one(serving, first):
    upload, image = begin(serving, 100), picture(100)
    for at in range(first):
        one = patch_head(serving, upload, at, "Content-Length: 1") + image[at : at + 1]
        assert exchange(serving.port, one).status == 204
    other_format = patch_head(serving, upload, first, "Content-Length: 3") + b"<x>"
    assert exchange(serving.port, other_format).json()["code"] == "format"
    rest = patch_head(serving, upload, first, f"Content-Length: {100 - first}") + image[first:]
    assert exchange(serving.port, rest).status == 204


def test_head_and_patch_cost_redis_the_same_for_one_chunk_and_for_ten_thousand(serving):
    """Redis counts its own time and bytes. The 10,000 names alone would be 300 kB and 1 ms for each request.

    The time is that of the quickest of several rounds, because another process may take the processor in the others.
    """
    client, rounds, cost = serving.server.client, 20, {}
    headers = [TUS, serving.authorization()]
    for count in (1, CHUNKS - rounds - 1):
        upload, times, output = begin_with_chunks(serving, count), [], 0
        for at in range(10 * count, 10 * count + rounds):
            client.config_resetstat()
            assert exchange(serving.port, head("HEAD", f"/v1/uploads/{upload}", *headers)).status == 200
            assert exchange(serving.port, patch_head(serving, upload, at, "Content-Length: 1") + b"a").status == 204
            output += client.info("stats")["total_net_output_bytes"]
            stats = client.info("commandstats")
            assert "cmdstat_lrange" not in stats
            times.append(stats["cmdstat_evalsha"]["usec"])
        cost[count] = min(times), output
    (few_time, few_bytes), (many_time, many_bytes) = cost.values()
    assert many_time < 3 * few_time
    assert many_bytes < 1.5 * few_bytes


def test_the_answers_to_a_post_of_an_upload_have_no_header_of_tus(serving):
    known = {"upload": begin(serving, 100)}
    post = json.dumps(known).encode()
    play(serving, f"{PATCH}\n> Upload-Offset: 0\n> [picture]\n< 204", known=known, picture=picture(100))
    play(
        serving,
        """
        > POST /v1/posts
        > Content-Type: application/json
        > Idempotency-Key: k
        > [post]
        < 201
        < -Tus-Resumable
        < -Idempotent-Replayed
        > POST /v1/posts
        > Content-Type: application/json
        > Idempotency-Key: k
        > [post]
        < 201
        < Idempotent-Replayed: true
        """,
        post=post,
    )
