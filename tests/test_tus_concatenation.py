"""Concatenation of tus: partial uploads, and the final upload that is made of them."""

import asyncio
import io
import os
import time

import pytest
from conftest import connect
from making import NO_SEGMENTS
from proxy import Proxy
from state import contents, files, unchanged
from uploading import BODY, begin, begin_finished, count_chunks, joined, offset, patch_head, picture
from wire import dial, exchange, head
from wiretrace import chunked, play

from storage import check, erasure, export, keys, originals, outbox, posts
from storage.progress import Progress
from storage.settings import CHUNKS, DAY_MS, HOUR_MS, IMAGE_BYTES, OPEN_UPLOADS, PARTS
from storage.sweep import sweep

pytestmark = pytest.mark.usefixtures("empty")

PARTIAL = "Upload-Concat: partial"
ROUNDS = 12  # of each race


def part(site, data: bytes, user: str = "alice") -> str:
    """Sends a whole partial upload, and returns its id."""
    return begin(site, len(data), user, PARTIAL, BODY, "[data]", data=data)


def final(*parts: str) -> str:
    return "final;" + " ".join(f"/v1/uploads/{one}" for one in parts)


def concatenate(site, *parts: str, more: str = "", user: str = "alice") -> str:
    """Makes one upload of parts, and returns its id."""
    trace = f"> POST /v1/uploads\n> Upload-Concat: {final(*parts)}\n{more}\n< 201\n< Location: /v1/uploads/<upload>"
    return play(site, trace, user)["upload"]


def request_final(site, *parts: str) -> bytes:
    concat = f"Upload-Concat: {final(*parts)}"
    return head("POST", "/v1/uploads", site.authorization(), "Tus-Resumable: 1.0.0", concat)


async def test_the_parts_become_one_complete_upload_without_a_copy(serving):
    image = picture(300_000)
    absolute = f"{serving.url}/v1/uploads/"
    cuts = [image[:3], b"", image[3:200_000], image[200_000:]]  # only all together have the first bytes of an image
    ids = [part(serving, cut) if cut else begin(serving, 0, "alice", PARTIAL) for cut in cuts]
    before = {name for name in files(serving.folder) if name.startswith("store/chunks/")}
    trace = f"""
        > POST /v1/uploads
        > Upload-Concat: final;{" ".join(absolute + one for one in ids)}
        > Upload-Metadata: filename cGhvdG8=
        < 201
        < Location: /v1/uploads/<upload>
        < Upload-Offset: 300000
        < Upload-Expires: *
        > HEAD /v1/uploads/<upload>
        < 200
        < Upload-Offset: 300000
        < Upload-Length: 300000
        < Upload-Concat: final;{" ".join(absolute + one for one in ids)}
        < Upload-Metadata: filename cGhvdG8=
    """
    upload = play(serving, trace)["upload"]
    assert await joined(serving, serving.server, upload) == image
    assert {name for name in files(serving.folder) if name.startswith("store/chunks/")} == before
    client = serving.server.client
    assert client.hgetall("uploads:{0}:alice") == {upload: "300000"}, "the reserved bytes have moved"
    assert client.zrange("due:{0}", 0, -1) == [upload]
    for one in ids:
        play(serving, f"> DELETE /v1/uploads/{one}\n< 404\n< code: noupload")
    created = f"> POST /v1/posts\n> Content-Type: application/json\n> [post]\n< 201\n> HEAD /v1/uploads/{upload}\n< 404"
    play(serving, created, post=b'{"upload": "%b"}' % upload.encode())
    assert client.hkeys(f"upload:{{0}}:{upload}") == ["owner", "length", "post"]


def test_a_part_may_begin_with_any_bytes_and_is_sent_in_pieces_like_any_upload(serving):
    image = picture(100)
    first = part(serving, image[:40])
    trace = f"""
        > POST /v1/uploads
        > Upload-Length: 60
        > {PARTIAL}
        < 201
        < Location: /v1/uploads/<part>
        < Upload-Offset: 0
        > PATCH /v1/uploads/<part>
        > {BODY}
        > Upload-Offset: 0
        > [few]
        < 204
        > HEAD /v1/uploads/<part>
        < 200
        < Upload-Concat: partial
        < Upload-Offset: 2
        < Upload-Length: 60
        > PATCH /v1/uploads/<part>
        > {BODY}
        > Upload-Offset: 2
        > [rest]
        < 204
        < Upload-Offset: 60
    """
    second = play(serving, trace, few=image[40:42], rest=image[42:])["part"]
    assert offset(serving, concatenate(serving, first, second)) == 100


def test_the_list_of_open_uploads_says_what_each_one_is(serving):
    begin(serving, 7)
    concatenate(serving, part(serving, picture(50)), part(serving, b"more"))
    part(serving, b"later")
    listed = exchange(serving.port, head("GET", "/v1/uploads", serving.authorization())).json()["items"]
    assert [(item["concat"], item["length"]) for item in listed] == [("partial", 5), ("final", 54), (None, 7)]


MALFORMED = {
    "another word": "whole",
    "no part": "final;",
    "no address": "final;x",
    "an address of a post": "final;/v1/posts/u00000000000000000000000000-0",
    "a query": "final;/v1/uploads/u00000000000000000000000000-0?a=b",
    "more than 16 parts": final(*["u00000000000000000000000000-0"] * (PARTS + 1)),
    "a letter beyond ASCII": "final;https://\xe4/v1/uploads/u00000000000000000000000000-0",
    "a very long address": "final;https://" + "x" * 2048 + "/v1/uploads/u00000000000000000000000000-0",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_header_is_refused(serving, case):
    with unchanged(serving.server.client, serving.folder):
        play(serving, f"> POST /v1/uploads\n> Upload-Concat: {MALFORMED[case]}\n< 400\n< code: malformed")


def test_parts_that_cannot_be_used_are_refused_and_nothing_changes(serving):
    client = serving.server.client
    whole, foreign = begin_finished(serving), part(serving, picture(50), "bob")
    good, rest, text = part(serving, picture(50)), part(serving, b"rest"), part(serving, b"no image")
    growing = begin(serving, 100, "alice", PARTIAL, BODY, "[data]", data=b"data")
    unbegun, expired, wide = begin(serving, 9, "alice", PARTIAL), part(serving, picture(50)), part(serving, b"wide")
    used = part(serving, picture(20))
    joined_before = concatenate(serving, used)
    client.hset(f"upload:{{0}}:{expired}", "expires", 1)
    cases = [
        ((good, foreign), 404, "noupload"),
        ((foreign,), 404, "noupload"),
        ((good, "u00000000000000000000000000-0"), 404, "noupload"),
        ((good, "u00000000000000000000000000-1"), 404, "noupload"),
        ((good, "nonsense"), 404, "noupload"),
        ((good, used), 404, "noupload"),
        ((used, used), 404, "noupload"),
        ((good, rest, good), 404, "noupload"),
        ((good, whole), 409, "concat"),
        ((good, joined_before), 409, "concat"),
        ((good, growing), 409, "incomplete"),
        ((unbegun, good), 409, "incomplete"),
        ((good, expired), 410, "expired"),
        ((expired, good), 410, "expired"),
        ((text, good), 415, "format"),
        ((rest,), 415, "format"),
    ]
    for parts, status, code in cases:
        with unchanged(client, serving.folder):
            refusal = f"< {status}\n< code: {code}\n< -Location"
            play(serving, f"> POST /v1/uploads\n> Upload-Concat: {final(*parts)}\n{refusal}")
    for more in ("> Upload-Length: 54", "> Upload-Metadata: a b c"):
        with unchanged(client, serving.folder):
            play(serving, f"> POST /v1/uploads\n> Upload-Concat: {final(good, rest)}\n{more}\n< 400\n< code: malformed")
    with unchanged(client, serving.folder):
        trace = f"> POST /v1/uploads\n> Upload-Concat: {final(good)}\n> {BODY}\n> [more]\n< 413\n< code: toolarge"
        play(serving, trace, more=b"more")
    client.hset(f"upload:{{0}}:{wide}", mapping={"offset": IMAGE_BYTES - 49, "length": IMAGE_BYTES - 49})
    with unchanged(client, serving.folder):
        play(serving, f"> POST /v1/uploads\n> Upload-Concat: {final(good, wide)}\n< 413\n< code: toolarge")
    client.rpush(f"chunks:{{0}}:{rest}", *("0-x" for _ in range(CHUNKS - 1)))
    with unchanged(client, serving.folder):
        trace = f"> POST /v1/uploads\n> Upload-Concat: {final(good, rest)}"
        play(serving, f"{trace}\n< 429\n< code: chunks\n< -Retry-After")


def test_a_final_upload_takes_no_bytes_and_a_part_becomes_no_post(serving):
    upload, alone = concatenate(serving, part(serving, picture(50))), part(serving, picture(50))
    with unchanged(serving.server.client, serving.folder):
        for at, more in ((50, "x"), (0, "x")):
            trace = f"> PATCH /v1/uploads/{upload}\n> {BODY}\n> Upload-Offset: {at}\n> [more]\n< 403\n< code: forbidden"
            play(serving, trace, more=more.encode())
        play(serving, f"> PATCH /v1/uploads/{upload}\n< 403\n< code: forbidden")
        trace = "> POST /v1/posts\n> Content-Type: application/json\n> [post]\n< 409\n< code: concat"
        play(serving, trace, post=b'{"upload": "%b"}' % alone.encode())
    trace = f"""
        > POST /v1/uploads
        > {BODY}
        > Transfer-Encoding: chunked
        > Upload-Concat: {final(alone)}
        > [more]
        < 201
        < Upload-Offset: 50
    """
    play(serving, trace, more=chunked(b"x"))


def test_a_repeated_request_answers_the_same_upload_if_it_has_an_idempotency_key(serving):
    parts = [part(serving, picture(50)), part(serving, b"more")]
    once = "> Idempotency-Key: k"
    upload = concatenate(serving, *parts, more=once)
    with unchanged(serving.server.client, serving.folder):
        trace = f"> POST /v1/uploads\n> Upload-Concat: {final(*parts)}"
        found = play(serving, f"{trace}\n{once}\n< 201\n< Idempotent-Replayed: true\n< Location: /v1/uploads/<upload>")
        assert found["upload"] == upload
        play(serving, f"> POST /v1/uploads\n> Upload-Concat: {final(parts[1])}\n{once}\n< 422\n< code: reused")
    play(serving, f"> DELETE /v1/uploads/{upload}\n< 204")
    other = part(serving, picture(50))
    with unchanged(serving.server.client, serving.folder):
        play(serving, f"{trace}\n{once}\n< 201\n< Location: /v1/uploads/{upload}\n< -Upload-Offset")
        play(serving, f"> POST /v1/uploads\n> Upload-Concat: {final(other)}\n{once}\n< 422\n< code: reused")
    play(serving, "> POST /v1/uploads\n> Upload-Length: 9\n> Idempotency-Key: p\n< 201")
    with unchanged(serving.server.client, serving.folder):
        trace = f"> POST /v1/uploads\n> Upload-Length: 9\n> {PARTIAL}\n> Idempotency-Key: p"
        play(serving, f"{trace}\n< 422\n< code: reused")


def test_after_a_lost_answer_the_same_parts_give_the_same_upload_without_a_key(serving):
    """The connection breaks after the final upload was made, before its answer. The client has no Idempotency-Key."""
    parts = [part(serving, picture(50)), part(serving, b"more")]
    with Proxy(serving.port) as line, dial(line.port) as broken:
        line.lose(how="rst")
        broken.sendall(request_final(serving, *parts))
        assert line.lost.wait(10)
    (upload,) = serving.server.client.hkeys("uploads:{0}:alice")
    concat = f"> POST /v1/uploads\n> Upload-Concat: {final(*parts)}"
    again = f"{concat}\n< 201\n< Location: /v1/uploads/{upload}\n< Idempotent-Replayed: true"
    with unchanged(serving.server.client, serving.folder):
        for one, size in zip(parts, (50, 4), strict=True):
            trace = f"> HEAD /v1/uploads/{one}\n< 200\n< Upload-Concat: partial\n< Upload-Expires: *"
            play(serving, f"{trace}\n< Upload-Offset: {size}\n< Upload-Length: {size}\n< -Upload-Metadata")
            trace = f"> PATCH /v1/uploads/{one}\n> {BODY}\n> Upload-Offset: {size}\n> [more]\n< 404"
            play(serving, trace, more=b"x")
            play(serving, f"> HEAD /v1/uploads/{one}\n< 404", "bob")
        play(serving, f"{again}\n< Upload-Offset: 54")
        play(serving, f"> POST /v1/uploads\n> Upload-Concat: {final(*parts)}\n< 404\n< code: noupload", "bob")
        for others in (parts[::-1], parts[:1], [*parts, parts[0]]):
            play(serving, f"> POST /v1/uploads\n> Upload-Concat: {final(*others)}\n< 404\n< code: noupload")
    post = b'{"upload": "%b"}' % upload.encode()
    play(serving, "> POST /v1/posts\n> Content-Type: application/json\n> [post]\n< 201", post=post)
    with unchanged(serving.server.client, serving.folder):
        play(serving, f"{again}\n< -Upload-Offset\n> HEAD /v1/uploads/{parts[0]}\n< 404\n< -Upload-Offset")


def test_parts_of_a_final_upload_that_was_deleted_are_unknown(serving):
    parts = [part(serving, picture(50)), part(serving, b"more")]
    play(serving, f"> DELETE /v1/uploads/{concatenate(serving, *parts)}\n< 204")
    with unchanged(serving.server.client, serving.folder):
        play(serving, f"> POST /v1/uploads\n> Upload-Concat: {final(*parts)}\n< 404\n< code: noupload")
        play(serving, f"> HEAD /v1/uploads/{parts[0]}\n< 404")


def test_a_final_upload_fits_into_a_quota_that_its_parts_fill(serving):
    parts = [part(serving, picture(10)) for _ in range(PARTS)]
    for _ in range(OPEN_UPLOADS - PARTS):
        begin(serving, 1)
    with unchanged(serving.server.client, serving.folder):
        play(serving, f"> POST /v1/uploads\n> Upload-Length: 1\n> {PARTIAL}\n< 429\n< code: quota")
    assert offset(serving, concatenate(serving, *parts)) == 10 * PARTS
    begin(serving, 1, "alice", PARTIAL)


def test_a_deleted_final_upload_leaves_nothing(serving):
    parts = [part(serving, picture(50)), part(serving, b"more")]
    upload = concatenate(serving, *parts)
    play(serving, f"> DELETE /v1/uploads/{upload}\n< 204\n> HEAD /v1/uploads/{upload}\n< 404")
    assert contents(serving.server.client) == {}
    assert [count_chunks(serving, one) for one in parts] == [0, 0]


# Races, with requests that are sent at the same time


async def race(site, *requests: bytes) -> list[bytes]:
    """Sends requests on connections of their own, all at once. Returns the whole answers."""
    together = asyncio.Barrier(len(requests))

    async def send(data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(data[:-2])
        await together.wait()
        writer.write(data[-2:])
        answer = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        return answer

    return await asyncio.gather(*map(send, requests))


def status(answer: bytes) -> int:
    return int(answer[9:12])


async def test_of_two_final_uploads_with_a_part_in_common_one_succeeds(serving):
    client = serving.server.client
    for _ in range(ROUNDS):
        client.flushall()
        one, shared, other = [await asyncio.to_thread(part, serving, picture(50)) for _ in range(3)]
        answers = await race(serving, request_final(serving, one, shared), request_final(serving, other, shared))
        assert sorted(map(status, answers)) == [201, 404]
        won, lost = (one, other) if status(answers[0]) == 201 else (other, one)
        (upload,) = set(client.hkeys("uploads:{0}:alice")) - {lost}
        assert client.hgetall("uploads:{0}:alice") == {lost: "50", upload: "100"}
        assert client.lrange(f"chunks:{{0}}:{upload}", 0, -1) == [won, shared]


async def test_two_final_uploads_of_the_same_parts_at_once_are_one(serving):
    for _ in range(ROUNDS):
        serving.server.client.flushall()
        parts = [await asyncio.to_thread(part, serving, picture(50)) for _ in range(2)]
        one, other = await race(serving, *[request_final(serving, *parts)] * 2)
        (upload,) = serving.server.client.hkeys("uploads:{0}:alice")
        for answer in (one, other):
            assert status(answer) == 201 and f"/v1/uploads/{upload}\r\n".encode() in answer
        assert sorted(b"Idempotent-Replayed" in answer for answer in (one, other)) == [False, True]


async def test_a_part_is_either_deleted_or_used(serving):
    outcomes = set()
    for wins in range(2 * ROUNDS):
        serving.server.client.flushall()
        first, second = [await asyncio.to_thread(part, serving, picture(50)) for _ in range(2)]
        deletion = head("DELETE", f"/v1/uploads/{second}", serving.authorization(), "Tus-Resumable: 1.0.0")
        requests = [request_final(serving, first, second), deletion]
        answers = await race(serving, *(requests[::-1] if wins % 2 else requests))
        joining, deleting = answers[::-1] if wins % 2 else answers
        outcomes.add((status(joining), status(deleting)))
        assert outcomes <= {(201, 404), (404, 204)}
        assert count_chunks(serving, second) == (status(joining) == 201)
        assert count_chunks(serving, first) == 1


async def test_a_part_that_still_grows_is_refused_and_loses_nothing(serving):
    data, outcomes = picture(60_000), set()
    for turn in range(ROUNDS):
        serving.server.client.flushall()
        growing = await asyncio.to_thread(begin, serving, len(data), "alice", PARTIAL, BODY, "[few]", few=data[:5])
        patch = patch_head(serving, growing, 5, f"Content-Length: {len(data) - 5}") + data[5:]
        requests = [patch, request_final(serving, growing)]
        answers = await race(serving, *requests[:: 1 if turn % 2 else -1])
        patching, joining = map(status, answers[:: 1 if turn % 2 else -1])
        outcomes.add(joining)
        assert patching == 204 and outcomes <= {201, 409}
        (upload,) = serving.server.client.hkeys("uploads:{0}:alice")
        assert (upload == growing) == (joining == 409)
        assert await joined(serving, serving.server, upload) == data


# What happens to the chunks afterwards


class Never:
    """No kept backup names anything."""

    async def __call__(self, at: int) -> bool:
        return False


@pytest.fixture
async def db(serving):
    db = connect(serving.server)
    yield db
    await db.close()


async def end(db, objects, clock: int, reach_ms: int = HOUR_MS, may_name=None) -> None:
    """Does all that is due at a time, as a dispatcher does."""
    db.clock = clock
    for entry in await outbox.lease(db, 0):
        await outbox.end_upload(db, objects, may_name or Never(), entry, reach_ms)


async def test_the_original_is_joined_from_the_parts_and_then_their_chunks_are_erased(serving, db, tmp_path):
    image, objects = picture(1000), serving.open_store()
    parts = [await asyncio.to_thread(part, serving, cut) for cut in (image[:300], image[300:])]
    upload = await asyncio.to_thread(concatenate, serving, *parts)
    post, _ = await posts.create(db, "alice", upload, "")
    with (tmp_path / "copy").open("w+b") as copy:
        await originals.store(db, objects, post, upload, copy)
    assert await objects.get(keys.original(post)) == image == (tmp_path / "copy").read_bytes()
    await outbox.publish(db, post, "thumbhash")
    await end(db, objects, keys.created_ms(upload) + HOUR_MS)
    assert [count_chunks(serving, one) for one in parts] == [0, 0]
    found = serving.server.client.keys("upload:*") + serving.server.client.keys("chunks:*")
    assert found == [f"upload:{{0}}:{upload}"], "the post is found by its upload for a day"


async def test_an_expired_final_upload_is_erased_with_its_parts(serving, db):
    parts = [await asyncio.to_thread(part, serving, cut) for cut in (picture(50), b"more")]
    upload = await asyncio.to_thread(concatenate, serving, *parts)
    await end(db, serving.open_store(), keys.created_ms(upload) + DAY_MS + HOUR_MS)
    assert set(contents(serving.server.client)) == {f"upload:{{0}}:{upload}"}
    assert [count_chunks(serving, one) for one in parts] == [0, 0]


async def test_a_part_that_was_leased_as_expired_and_then_used_keeps_its_chunks(serving, db):
    """The clock may go back when another machine's Redis takes over."""
    upload = await asyncio.to_thread(part, serving, picture(50))
    db.clock = keys.created_ms(upload) + DAY_MS + HOUR_MS
    (entry,) = await outbox.lease(db, 0)
    final_upload = await asyncio.to_thread(concatenate, serving, upload)
    await outbox.end_upload(db, serving.open_store(), Never(), entry, HOUR_MS)
    assert offset(serving, final_upload) == 50 and count_chunks(serving, upload) == 1
    assert serving.server.client.zrange("due:{0}", 0, -1) == [final_upload]


async def test_chunks_from_before_a_restore_wait_although_the_final_upload_is_younger(serving, db):
    objects, client = serving.open_store(), serving.server.client
    older = await asyncio.to_thread(part, serving, picture(50))
    upload = await asyncio.to_thread(concatenate, serving, older)
    client.set(keys.restored(0), keys.created_ms(older))
    assert keys.created_ms(older) < keys.created_ms(upload)
    await asyncio.to_thread(play, serving, f"> DELETE /v1/uploads/{upload}\n< 204")
    reach_ms = 7 * DAY_MS
    await end(db, objects, keys.created_ms(upload) + DAY_MS, reach_ms)
    assert count_chunks(serving, older) == 1
    await end(db, objects, keys.created_ms(upload) + 2 * reach_ms, reach_ms)
    assert count_chunks(serving, older) == 0 and set(contents(client)) == {keys.restored(0)}


async def test_check_sweep_and_export_find_the_chunks_of_parts(serving, db, tmp_path):
    image, objects = picture(1000), serving.open_store()
    parts = [await asyncio.to_thread(part, serving, cut) for cut in (image[:300], image[300:])]
    upload = await asyncio.to_thread(concatenate, serving, *parts)
    for one in parts:
        (name,) = serving.server.client.lrange(keys.chunks(one), 0, -1)
        os.utime(serving.folder / "store" / keys.chunk(one, name), (time.time() - 9 * 86400,) * 2)
    report = await check.check(db, objects)
    assert (report.lines, report.uploads) == ([], 1)
    await sweep(db, objects, Never(), HOUR_MS, remove=True)
    assert [count_chunks(serving, one) for one in parts] == [1, 1]
    post, _ = await posts.create(db, "alice", upload, "")
    row = {"id": post, "upload": upload}
    assert b"".join([piece async for piece in export._original(db, objects, row)]) == image


async def test_a_check_drops_a_final_upload_that_lacks_a_chunk_of_a_part(serving, db):
    parts = [await asyncio.to_thread(part, serving, cut) for cut in (picture(50), b"more")]
    upload = await asyncio.to_thread(concatenate, serving, *parts)
    (name,) = serving.server.client.lrange(keys.chunks(parts[1]), 0, -1)
    await serving.open_store().delete([keys.chunk(parts[1], name)])
    report = await check.check(db, serving.open_store(), repair=True)
    assert report.lines == [f"{upload}: 5 its offset is 54, its chunks have 50 bytes (repaired)"]
    play(serving, f"> HEAD /v1/uploads/{upload}\n< 410")


async def test_an_erasure_of_the_user_removes_parts_and_final_uploads(serving, db):
    open_part, used = [await asyncio.to_thread(part, serving, picture(50)) for _ in range(2)]
    await asyncio.to_thread(concatenate, serving, used)
    progress = Progress(io.StringIO())
    counts = await erasure.erase(db, serving.open_store(), NO_SEGMENTS, "alice", HOUR_MS, progress, remove=True)
    assert counts["open uploads"] == 2
    assert contents(serving.server.client) == {}
    assert [count_chunks(serving, one) for one in (open_part, used)] == [0, 0]
