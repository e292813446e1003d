"""PATCH of tus: bytes at an offset, of which every one that arrived counts."""

import asyncio
import json
import socket

import pytest
from conftest import connect, until
from state import contents, files, unchanged
from uploading import BODY, begin, count_chunks, joined, offset, picture
from wire import dial, exchange, head, hear, reset
from wiretrace import chunked, play

from storage import uploads
from storage.settings import CHUNKS, DAY_MS

PATCH = """
        > PATCH /v1/uploads/<upload>
        > Content-Type: application/offset+octet-stream"""
UNTOUCHED = """
        > HEAD /v1/uploads/<upload>
        < 200
        < Upload-Offset: 0
"""
TRACES = {
    "all of it": f"""{PATCH}
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
    "the first byte, which tells no format, then the rest": f"""{PATCH}
        > Upload-Offset: 0
        > [one]
        < 204
        < Upload-Offset: 1{PATCH}
        > Upload-Offset: 1
        > [others]
        < 204
        < Upload-Offset: 100
    """,
    "nothing, at the beginning": f"""{PATCH}
        > Upload-Offset: 0
        > Content-Length: 0
        < 204
        < Upload-Offset: 0
    """,
    "nothing, without saying so": f"""{PATCH}
        > Upload-Offset: 0
        < 204
        < Upload-Offset: 0
    """,
    "nothing, at the end of a finished upload: our last answer was lost": f"""{PATCH}
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
    "by POST, for networks that know no PATCH": """
        > POST /v1/uploads/<upload>
        > X-HTTP-Method-Override: PATCH
        > Content-Type: application/offset+octet-stream
        > Upload-Offset: 0
        > [picture]
        < 204
        < Upload-Offset: 100
    """,
    "POST that overrides nothing": """
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
    "at an offset that is none": f"""{PATCH}
        > Upload-Offset: -0
        > [one]
        < 400
        < code: malformed
    """ + UNTOUCHED,
    "as another type": """
        > PATCH /v1/uploads/<upload>
        > Upload-Offset: 0
        > Content-Type: application/octet-stream
        > [picture]
        < 415
        < code: type
        < Tus-Resumable: 1.0.0
    """ + UNTOUCHED,
    "as no type": """
        > PATCH /v1/uploads/<upload>
        > Upload-Offset: 0
        > [picture]
        < 415
        < code: type
    """ + UNTOUCHED,
    "in another version": f"""{PATCH}
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
    "past the end, which shows only as it comes": f"""{PATCH}
        > Upload-Offset: 0
        > Transfer-Encoding: chunked
        > [chunked-more]
        < 413
        < code: toolarge
    """ + UNTOUCHED,
    "what is no image of ours": f"""{PATCH}
        > Upload-Offset: 0
        > [text]
        < 415
        < code: format
    """ + UNTOUCHED,
    "what turns out to be none with its second byte": f"""{PATCH}
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
    "chunks that break: what came before them is kept": f"""{PATCH}
        > Upload-Offset: 0
        > Transfer-Encoding: chunked
        > [broken]
        < 400
        < Connection: close
        > HEAD /v1/uploads/<upload>
        < 200
        < Upload-Offset: 50
    """,
    "to an upload that is not there": """
        > PATCH /v1/uploads/u00000000000000000000000000-0
        > Upload-Offset: 0
        > Content-Type: application/offset+octet-stream
        > [picture]
        < 404
        < code: noupload
        < Tus-Resumable: 1.0.0
    """,
}


@pytest.fixture(autouse=True)
def empty(serving):
    serving.server.client.flushall()


@pytest.mark.parametrize("case", TRACES)
def test_patch(serving, case):
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
    assert count_chunks(serving, known["upload"]) == len(chunks), "no bytes that are nobody's"


def test_only_its_owner_may(serving):
    known = {"upload": begin(serving, 100)}
    before = contents(serving.server.client), files(serving.folder)
    for user, status in (("bob", 404), (None, 401)):
        play(serving, f"{PATCH}\n> Upload-Offset: 0\n> [picture]\n< {status}", user, known, picture=picture(100))
    assert (contents(serving.server.client), files(serving.folder)) == before


def test_a_post_is_made_of_a_finished_upload_once(serving):
    known = {"upload": begin(serving, 100)}
    unfinished = '{{"upload": "{upload}", "caption": "first"}}'.format(**known).encode()
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
    again = unfinished.replace(b"first", b"second")
    known = play(serving, trace, known=known, picture=picture(100), post=unfinished, again=again)
    play(serving, "> POST /v1/posts\n> Content-Type: application/json\n> [post]\n< 404", "bob", post=unfinished)
    client = serving.server.client
    assert client.hget(f"post:{{0}}:{known['post']}", "caption") == "first"
    assert client.keys("post:*") == [f"post:{{0}}:{known['post']}"]
    assert client.hlen("uploads:{0}:alice") == 0, "it counts for the quota no longer"


def patch(site, upload: str, at: int, *headers: str) -> bytes:
    token = site.authorization()
    return head(
        "PATCH", f"/v1/uploads/{upload}", token, "Tus-Resumable: 1.0.0", BODY, f"Upload-Offset: {at}", *headers
    )


@pytest.mark.parametrize("size", [1, 1000, 70_000, 200_000, 1_500_000])
@pytest.mark.parametrize("end", ["fin", "rst"])
async def test_every_byte_that_arrived_before_the_connection_broke_counts(serving, size, end):
    image = picture(2_000_000)
    upload = await asyncio.to_thread(begin, serving, len(image))
    line = dial(serving.port)
    line.sendall(patch(serving, upload, 0, f"Content-Length: {len(image)}") + image[:size])
    until(lambda: unread(line) == 0, what="the server's kernel to have all of it")
    reset(line) if end == "rst" else line.close()
    await asyncio.to_thread(until, lambda: offset(serving, upload) == size)
    assert await joined(serving, serving.server, upload) == image[:size]


def unread(line: socket.socket) -> int:
    """Bytes that were sent and not yet acknowledged by the other end's kernel."""
    import fcntl
    import struct

    return struct.unpack("i", fcntl.ioctl(line, 0x5411, b"    "))[0]  # SIOCOUTQ


async def test_of_a_chunked_body_that_breaks_off_every_whole_byte_counts(serving):
    image = picture(3000)
    upload = await asyncio.to_thread(begin, serving, len(image))
    line = dial(serving.port)
    line.sendall(patch(serving, upload, 0, "Transfer-Encoding: chunked"))
    line.sendall(chunked(image[:1000], end=b"7d0\r\n" + image[1000:1500]))
    line.shutdown(socket.SHUT_WR)
    await asyncio.to_thread(until, lambda: offset(serving, upload) == 1500)
    assert await joined(serving, serving.server, upload) == image[:1500]
    line.close()


async def test_an_upload_goes_on_while_its_old_connection_hangs(serving):
    """No locks: the new one is taken at the offset that is durable, the old one finds the offset moved."""
    image = picture(300_000)
    upload = await asyncio.to_thread(begin, serving, len(image))
    with dial(serving.port) as old:
        old.sendall(patch(serving, upload, 0, f"Content-Length: {len(image)}") + image[:100_000])
        await asyncio.to_thread(until, lambda: offset(serving, upload) > 0)
        at = offset(serving, upload)
        rest = image[at:]
        known = {"upload": upload}
        went = await asyncio.to_thread(
            play, serving, f"{PATCH}\n> Upload-Offset: {at}\n> [rest]\n< 204", "alice", known, rest=rest
        )
        assert went["upload"] == upload
        old.sendall(image[100_000:])
        assert hear(old).status == 409
    assert await joined(serving, serving.server, upload) == image


def test_a_broken_upload_is_ended_by_delete_while_its_connection_hangs(serving):
    upload = begin(serving, 1000)
    with dial(serving.port) as old:
        old.sendall(patch(serving, upload, 0, "Content-Length: 1000") + picture(500))
        play(serving, "> DELETE /v1/uploads/<upload>\n< 204", known={"upload": upload})
        old.sendall(bytes(500))
        assert hear(old).status == 404
    assert count_chunks(serving, upload) == 0


async def test_a_trickle_makes_few_objects(serving, store, monkeypatch):
    """1 KiB a second for two minutes, with the second made short. Nothing of it is lost."""
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


def in_chunks(site, count: int) -> str:
    """An upload that came in so many chunks of 10 bytes, a while ago; the chunks are only named."""
    upload, client = begin(site, 20 * CHUNKS), site.server.client
    client.rpush(f"chunks:{{0}}:{upload}", *(f"{at}-{at:016x}" for at in range(0, 10 * count, 10)))
    lately = client.time()[0] * 1000 + DAY_MS - 60_000
    client.hset(f"upload:{{0}}:{upload}", mapping={"offset": 10 * count, "expires": lately})
    return upload


def test_past_ten_thousand_chunks_a_patch_is_refused_and_leaves_no_object(serving):
    known = {"upload": in_chunks(serving, CHUNKS)}
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
def test_an_upload_whose_first_bytes_came_one_by_one_is_told_to_be_no_image_at_the_next(serving, first):
    upload, image = begin(serving, 100), picture(100)
    for at in range(first):
        one = patch(serving, upload, at, "Content-Length: 1") + image[at : at + 1]
        assert exchange(serving.port, one).status == 204
    wrong = patch(serving, upload, first, "Content-Length: 3") + b"<x>"
    assert exchange(serving.port, wrong).json()["code"] == "format"
    right = patch(serving, upload, first, f"Content-Length: {100 - first}") + image[first:]
    assert exchange(serving.port, right).status == 204


def test_head_and_patch_cost_redis_the_same_for_one_chunk_and_for_ten_thousand(serving):
    """Counted by Redis. The 10,000 names alone would be 300 kB and a millisecond for each request."""
    client, asked, cost = serving.server.client, 20, {}
    head_ = ["Tus-Resumable: 1.0.0", serving.authorization()]
    for count in (1, CHUNKS - asked - 1):
        upload = in_chunks(serving, count)
        client.config_resetstat()
        for _ in range(asked):
            assert exchange(serving.port, head("HEAD", f"/v1/uploads/{upload}", *head_)).status == 200
        for at in range(10 * count, 10 * count + asked):
            assert exchange(serving.port, patch(serving, upload, at, "Content-Length: 1") + b"a").status == 204
        stats = client.info("commandstats")
        assert "cmdstat_lrange" not in stats
        cost[count] = stats["cmdstat_evalsha"]["usec"], client.info("stats")["total_net_output_bytes"]
    (few, few_bytes), (many, many_bytes) = cost.values()
    assert many < 3 * few
    assert many_bytes < 1.5 * few_bytes


def test_what_a_post_of_an_upload_answers_is_a_post(serving):
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
