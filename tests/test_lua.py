"""Every script checks everything before it writes: after a refusal or a wrong argument, nothing has changed."""

import subprocess
import sys
from typing import NamedTuple

import pytest
from conftest import NOBODY, ROOT, connect
from making import NO_SEGMENTS, make_post, make_processing, make_upload
from redis.exceptions import ResponseError
from state import contents, unchanged

from storage import (
    check,
    comments,
    errors,
    keys,
    outbox,
    posts,
    retry,
    sealing,
    uploads,
)
from storage.backup.retain import KeptBackups
from storage.db.client import SCRIPTS, Redis
from storage.keys import IdempotencyKey
from storage.settings import (
    CHUNKS,
    DAY_MS,
    FORM_BYTES,
    HOUR_MS,
    IMAGE_BYTES,
    LATEST_COMMENTS,
    LEAF_ENTRIES,
    MIB,
    OPEN_UPLOADS,
    RESERVED_BYTES,
)

NOW = 1_763_971_200_000
ONCE = IdempotencyKey("POST /v1/posts/x/comments a-key", "0123456789abcdef")
OTHER = ONCE._replace(digest="fedcba9876543210")


@pytest.fixture
async def db(server):
    db = connect(server)
    db.clock = NOW
    yield db
    await db.close()


async def refused(server, db, error: type[errors.Refusal], work):
    """Checks that `work` raises exactly this refusal, with a sentence, and changes nothing in Redis."""
    with unchanged(server.client), pytest.raises(error) as raised:
        await work
    assert raised.type is error and str(raised.value)


async def append(db, upload: str, offset: int, size: int, name: str) -> int:
    """Appends a chunk, as uploads.Appender does after the chunk is durable. Returns the new offset."""
    script_keys = [keys.upload(upload), keys.chunks(upload), keys.due(keys.partition_of_upload(upload))]
    args = (upload, offset, size, name, DAY_MS, IMAGE_BYTES, CHUNKS)
    return (await db.call("append_chunk", script_keys, db.clock, *args))[0]


async def leased(db, entry: str) -> outbox.DueEntry | outbox.ImageWork:
    """Leases what is due. Returns the lease of one upload or post."""
    work = await (outbox.lease(db, 0) if entry.startswith("u") else outbox.lease_images(db, 0, 10))
    return next(one for one in work if one.id == entry)


# Arguments


class Captured(Exception):
    """The call of a script that writes: its name, keys and arguments."""


class Recorder:
    """Takes the place of storage's client. It runs scripts that read, and raises the first call of one that writes."""

    def __init__(self, db: Redis):
        self.db, self.clock, self.cluster = db, db.clock, db.cluster

    async def call(self, name, *rest):
        if SCRIPTS[name].reads:
            return await self.db.call(name, *rest)
        raise Captured(name, *rest)


class Scene(NamedTuple):
    ready: str
    processing: str
    failed: str
    comment: str
    upload: str
    part: str  # a complete partial upload of alice
    leased: outbox.ImageWork
    due: outbox.DueEntry
    hidden: str  # post
    hidden_comment: str  # of `ready`
    finished: str  # upload of carol
    quiet: str  # a post that has not changed for a day, and is to be sealed
    sealed: str  # a post with a segment of one comment, which is erased


async def make_part(db, size: int = 10, owner: str = "alice") -> str:
    """Creates a complete partial upload of one chunk that has no bytes in the store. Returns its id."""
    part, _ = await uploads.create(db, owner, 1, size, partial=True)
    await append(db, part, 0, size, keys.chunk_name(0))
    return part


async def concatenate(
    db, *parts: str, owner: str = "alice", chunks: int = CHUNKS, upload: str | None = None
) -> tuple[str, int]:
    """Concatenates parts, as uploads.concatenate does after it has read the first bytes."""
    upload = upload or keys.new_upload_id(0)
    script_keys = [keys.upload(upload), keys.chunks(upload), keys.uploads(0, owner), keys.due(0)]
    prefixes = keys.upload_prefix(0), keys.chunks_prefix(0)
    args = (owner, " ".join(parts), "final;…", "", DAY_MS, IMAGE_BYTES, chunks, *prefixes, "-", DAY_MS)
    return await db.call("concat_uploads", script_keys, db.clock, upload, *args)


async def scene(db) -> Scene:
    """Puts entries of every kind into Redis, so that each script that writes has something to change."""
    ready, processing = await make_post(db, "alice"), await make_processing(db, "alice")
    comment, _ = await comments.add(db, "bob", ready, "first")
    upload = await make_upload(db, "alice")
    part = await make_part(db)
    image = await leased(db, processing)
    await make_processing(db, "alice")  # not leased
    due = (await outbox.lease(db, 0))[0]
    finished = await make_upload(db, "carol")
    await outbox.publish(db, (await posts.create(db, "carol", finished, ""))[0], "thumbhash")  # due and not leased
    hidden = await make_post(db, "dave")
    await posts.hide(db, hidden)
    hidden_comment, _ = await comments.add(db, "bob", ready, "second")
    await comments.hide(db, NO_SEGMENTS, await posts.inspect(db, ready), hidden_comment.id)
    failed = await make_processing(db, "alice")
    await outbox.fail(db, failed, 0, outbox.EXHAUSTED, "five attempts failed")
    quiet, sealed = await make_post(db, "alice"), await make_post(db, "alice")
    db.clock = NOW - DAY_MS
    for post in (quiet, sealed):
        await comments.add(db, "bob", post, "old", seal_at=1)
    db.clock = NOW
    await seal(db, sealed)
    _, tail, *_ = await db.call("read_sealing", *sealing_args(db, sealed))
    erased = tail.split()[0]
    script_keys = [*keys.post_and_lists(sealed), keys.sealing(0)]
    args = (sealed, erased, "bob", LATEST_COMMENTS, 0, tail, '["bob","old"]', tail, "[]")
    await db.call("delete_comment", script_keys, db.clock, *args)
    return Scene(
        ready,
        processing,
        failed,
        comment.id,
        upload,
        part,
        image,
        due,
        hidden,
        hidden_comment.id,
        finished,
        quiet,
        sealed,
    )


def sealing_args(db, post: str) -> tuple:
    """Keys and arguments of read_sealing."""
    named = [keys.comments(post), keys.segments(post), keys.erased(post), keys.changes(0), keys.epoch(0)]
    return named, db.clock, post, 20, -1000, 256, 1000, db.cluster  # the newest revision may be later than the clock


async def seal(db, post: str):
    """Seals a comment in a segment that is not in the store."""
    timeline, tail, (comment, *_), _ = await db.call("read_sealing", *sealing_args(db, post))
    script_keys = [keys.comments(post), keys.segments(post), keys.epoch(0)]
    await db.call("seal_comments", script_keys, timeline, tail, comment, comment, 1, "name", db.cluster)


async def compact(db, post: str):
    entries, erased = await sealing.read_segments(db, post)
    script_keys = [keys.segments(post), keys.erased(post), keys.retired(0), keys.changes(0), keys.gone(0)]
    await db.call("compact_segment", script_keys, db.clock, post, entries[0], "-", DAY_MS, *erased)


async def end_sealing(db, at: Scene):
    script_keys = [keys.sealing(0), keys.erased(at.sealed)]
    await db.call("end_sealing", script_keys, db.clock, at.sealed, NOW - DAY_MS, HOUR_MS)


class Empty:
    """An object store for functions that have no objects to delete before their first write."""

    async def delete(self, names):
        assert not list(names)


EMPTY = Empty()


async def drop(db, at: Scene):
    await uploads.discard(db, EMPTY, "alice", at.upload, remember_ms=DAY_MS)


async def settle(db, at: Scene):
    await outbox._end_lease(db, at.due, NOW + 5)


async def chunk(db, at: Scene):
    await append(db, at.upload, 10, 5, "10-name")


async def check_post(db, at: Scene):
    """Uses another `turns`, where the author is missing: so there is something to repair."""
    script_keys = [
        keys.post(at.processing),
        keys.comments(at.processing),
        keys.segments(at.processing),
        keys.erased(at.processing),
        keys.latest(at.processing),
        keys.feed(0),
        keys.changes(0),
        keys.gone(0),
        f"{keys.turns(0)}:other",
        keys.hidden(at.processing),
        keys.sealing(0),
    ]
    args = (at.processing, LATEST_COMMENTS, 1, keys.making_prefix(0), "", "")
    await db.call("check_post", script_keys, db.clock, *args)


async def index_post(db, at: Scene):
    """Uses another `leaves`, where the post is missing: so there is something to repair."""
    script_keys = [keys.post(at.ready), f"{keys.leaves(0)}:other"]
    args = ("alice", keys.entry("alice", at.ready), f"{keys.leaf_prefix(0)}other:", LEAF_ENTRIES, 1)
    await db.call("index_post", script_keys, *args)


async def check_uploads(db, at: Scene):
    """Uses another `due`, where the upload is missing: so there is something to repair."""
    script_keys = [keys.uploads(0, "alice"), f"{keys.due(0)}:other"]
    await db.call("check_uploads", script_keys, db.clock, at.upload, keys.upload_prefix(0), IMAGE_BYTES, 1)


async def hide_comment(db, at: Scene):
    await comments.hide(db, NO_SEGMENTS, await posts.inspect(db, at.ready), at.comment)


async def unhide_comment(db, at: Scene):
    await comments.unhide(db, NO_SEGMENTS, await posts.inspect(db, at.ready), at.hidden_comment)


# For each script that writes, a call that writes with it.
WRITES = {
    "hide_post": lambda db, at: posts.hide(db, at.ready),
    "unhide_post": lambda db, at: posts.unhide(db, at.hidden),
    "hide_comment": hide_comment,
    "unhide_comment": unhide_comment,
    "forget_owner": lambda db, at: db.call("forget_owner", [keys.upload(at.finished)], "carol"),
    "drop_key": lambda db, at: db.call("drop_key", [keys.latest(at.ready)]),
    "add_comment": lambda db, at: comments.add(db, "bob", at.ready, "more", ONCE),
    "delete_comment": lambda db, at: comments.delete(db, NO_SEGMENTS, "bob", at.ready, at.comment),
    "delete_post": lambda db, at: posts.delete(db, EMPTY, "alice", at.processing),
    "create_upload": lambda db, at: uploads.create(db, "alice", 1, 1000, "filename YQ==", ONCE),
    "append_chunk": chunk,
    "concat_uploads": lambda db, at: concatenate(db, at.part),
    "create_post": lambda db, at: posts.create(db, "alice", at.upload, "caption", ONCE),
    "drop_upload": drop,
    "forget_chunks": lambda db, at: uploads.erase_chunks(db, EMPTY, at.upload, []),
    "lease_due": lambda db, at: outbox.lease(db, 0),
    "lease_images": lambda db, at: outbox.lease_images(db, 0, 10),
    "end_lease": settle,
    "start_image": lambda db, at: outbox.start_image(db, at.processing, at.leased.lease),
    "return_image": lambda db, at: outbox.return_image(db, at.processing, 0, 1),
    "retry_post": lambda db, at: retry._retry(db, at.failed),
    "publish_post": lambda db, at: outbox.publish(db, at.processing, "thumbhash"),
    "make_again": lambda db, at: check.make_again(db, at.ready),
    "check_post": check_post,
    "check_uploads": check_uploads,
    "index_post": index_post,
    "drop_member": lambda db, at: db.call("drop_member", [keys.feed(0)], at.ready),
    "begin_epoch": lambda db, at: db.call("begin_epoch", [keys.epoch(0), keys.restored(0)], db.clock, "name"),
    "find_quiet": lambda db, at: sealing.find_quiet(db, 0, -1000),
    "lease_entries": lambda db, at: sealing.lease(db, 0),
    "seal_comments": lambda db, at: seal(db, at.quiet),
    "compact_segment": lambda db, at: compact(db, at.sealed),
    "end_sealing": end_sealing,
    "fail_post": lambda db, at: outbox.fail(db, at.processing, 0, "damaged", "it is damaged"),
}


def test_every_script_that_writes_has_a_call_here():
    assert set(WRITES) == {name for name, script in SCRIPTS.items() if not script.reads}


@pytest.mark.parametrize("name", WRITES)
async def test_a_call_with_a_wrong_argument_changes_nothing(server, db, name):
    """Wrong means: too few keys or arguments, one argument more, or no number where the script expects a number."""
    at = await scene(db)
    with pytest.raises(Captured) as captured:
        await WRITES[name](Recorder(db), at)
    sent, script_keys, *args = captured.value.args
    assert sent == name
    wrong = [args[:short] for short in range(len(args))] + [[*args, ""]]
    for place, value in enumerate(args):
        if type(value) is int and args[0] == NOW and place > 0:
            wrong += [[*args[:place], nonsense, *args[place + 1 :]] for nonsense in ("x", "1 2", "-")]
    before = contents(server.client)
    for bad in wrong:
        try:
            answer = await db.call(name, script_keys, *bad)
        except (ResponseError, errors.Refusal) as error:
            answer = error
        assert contents(server.client) == before, f"the call with {bad} returned {answer} and changed something"
    for few in range(sum(not key.startswith("once:") for key in script_keys)):
        with unchanged(server.client), pytest.raises(ResponseError):
            await db.call(name, script_keys[:few], *args)
    await db.call(name, script_keys, *args)
    assert contents(server.client) != before


async def test_an_upload_of_negative_length_and_an_empty_or_negative_chunk_are_refused(server, db):
    upload, _ = await uploads.create(db, "alice", 1, 100)
    await append(db, upload, 0, 40, "0-a")
    for work in (
        append(db, upload, 40, 0, "n"),
        append(db, upload, 40, -5, "n"),
        uploads.create(db, "alice", 1, -1),
    ):
        with unchanged(server.client), pytest.raises(ResponseError):
            await work


# A script by hand


def print_script(*names: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "storage", "script", *names], cwd=ROOT, capture_output=True, text=True)


def test_a_script_is_printed_as_it_is_sent():
    printed = print_script("read_post")
    assert (printed.returncode, printed.stdout) == (0, SCRIPTS["read_post"].text)


@pytest.mark.parametrize("names", [[], ["read"], ["shared"]])
def test_an_unknown_script_is_refused_with_the_names_of_all_scripts(names):
    printed = print_script(*names)
    assert (printed.returncode, printed.stdout) == (2, "")
    assert printed.stderr.endswith(f"NAME must be one of {', '.join(SCRIPTS)}\n")


# Posts


async def test_a_post_is_not_deleted_if_it_has_changed_since_the_client_read_it(server, db, store):
    post = await make_processing(db, "alice")
    seen = [(await posts.read(db, post)).seen()]
    await outbox.publish(db, post, "thumbhash")
    seen.append((await posts.read(db, post)).seen())
    first, _ = await comments.add(db, "bob", post, "first")
    seen.append((await posts.read(db, post)).seen())
    await comments.add(db, "bob", post, "second")
    seen.append((await posts.read(db, post)).seen())
    await comments.delete(db, NO_SEGMENTS, "bob", post, first.id)
    assert len(set(seen)) == 4
    for one in seen:
        await refused(server, db, errors.Precondition, posts.delete(db, store, "alice", post, seen=one))
        await refused(server, db, errors.Forbidden, posts.delete(db, store, "bob", post, seen=one))
    now = (await posts.read(db, post)).seen()
    assert now not in seen
    await posts.delete(db, store, "alice", post, seen=now)
    await refused(server, db, errors.NoPost, posts.delete(db, store, "alice", post, seen=now))


# Comments


async def test_only_a_ready_post_takes_comments(server, db, store):
    processing = await make_processing(db, "alice")
    failed = await make_processing(db, "alice")
    await outbox.fail(db, failed, 0, "damaged", "it is damaged")
    await refused(server, db, errors.NotReady, comments.add(db, "bob", processing, "a"))
    await refused(server, db, errors.Failed, comments.add(db, "bob", failed, "a"))
    await refused(server, db, errors.NoPost, comments.add(db, "bob", NOBODY, "a"))
    await refused(server, db, errors.NoPost, comments.add(db, "bob", "u" + NOBODY, "a"))
    deleted = await make_post(db, "alice")
    await posts.delete(db, store, "alice", deleted)
    await refused(server, db, errors.NoPost, comments.add(db, "bob", deleted, "a"))


async def test_only_its_author_deletes_a_comment_and_only_once(server, db):
    post = await make_post(db, "alice")
    comment = (await comments.add(db, "bob", post, "a"))[0].id
    await refused(server, db, errors.Forbidden, comments.delete(db, NO_SEGMENTS, "alice", post, comment))
    await refused(server, db, errors.NoComment, comments.delete(db, NO_SEGMENTS, "bob", post, "1-0"))
    await refused(server, db, errors.NoPost, comments.delete(db, NO_SEGMENTS, "bob", NOBODY, comment))
    await comments.delete(db, NO_SEGMENTS, "bob", post, comment)
    await refused(server, db, errors.NoComment, comments.delete(db, NO_SEGMENTS, "bob", post, comment))
    await refused(server, db, errors.NoComment, comments.read(db, NO_SEGMENTS, post, comment))


async def test_comments_keep_their_order_in_one_millisecond_and_if_the_clock_goes_back(server, db):
    post = await make_post(db, "alice")
    added = []
    for clock in (NOW, NOW, NOW - 5000, NOW, NOW + 1, NOW - 1):
        db.clock = clock
        added.append((await comments.add(db, "bob", post, str(len(added))))[0].id)
    await comments.delete(db, NO_SEGMENTS, "bob", post, added[-1])
    db.clock = NOW
    added[-1:] = [(await comments.add(db, "bob", post, "after a deletion"))[0].id]
    assert len(set(added)) == len(added)
    assert [comment.id for comment in (await comments.page(db, NO_SEGMENTS, post, 100)).comments] == added[::-1]
    for comment in added:
        await comments.delete(db, NO_SEGMENTS, "bob", post, comment)
    db.clock = NOW - 9000
    assert (await comments.add(db, "bob", post, "the stream was empty"))[0].id not in added


async def test_what_does_not_exist_cannot_be_read(server, db):
    await refused(server, db, errors.NoPost, posts.read(db, NOBODY))
    await refused(server, db, errors.NoPost, comments.page(db, NO_SEGMENTS, NOBODY, 1))
    await refused(server, db, errors.NoPost, comments.read(db, NO_SEGMENTS, NOBODY, "1-0"))
    await refused(server, db, errors.NoUpload, uploads.read(db, "alice", "u" + NOBODY))
    assert not (await posts.feed(db, 3, 10)).posts


async def test_an_idempotency_key_has_one_effect_for_a_day_even_if_its_comment_was_deleted(server, db):
    post = await make_post(db, "alice")
    first, repeated = await comments.add(db, "bob", post, "a", ONCE)
    assert not repeated
    with unchanged(server.client):
        assert await comments.add(db, "bob", post, "a", ONCE) == (first, True)
    await refused(server, db, errors.Reused, comments.add(db, "bob", post, "b", OTHER))
    assert not (await comments.add(db, "carol", post, "a", ONCE))[1]
    await comments.delete(db, NO_SEGMENTS, "bob", post, first.id)
    with unchanged(server.client):
        assert (await comments.add(db, "bob", post, "a", ONCE))[0].id == first.id
    once = keys.once(0, "bob", ONCE.scoped_key)
    assert DAY_MS - 60_000 < server.client.pttl(once) <= DAY_MS

    upload, repeated = await uploads.create(db, "alice", 1, 10, "", ONCE)
    assert not repeated
    with unchanged(server.client):
        assert await uploads.create(db, "alice", 1, 10, "", ONCE) == (upload, True)
    await refused(server, db, errors.Reused, uploads.create(db, "alice", 1, 11, "", OTHER))
    await append(db, upload, 0, 10, "0-a")
    made, how = await posts.create(db, "alice", upload, "", IdempotencyKey("POST /v1/posts k", "-"))
    assert how == posts.CREATED
    with unchanged(server.client):
        assert await posts.create(db, "alice", upload, "", IdempotencyKey("POST /v1/posts k", "-")) == (
            made,
            posts.REPLAYED,
        )
        assert await posts.create(db, "alice", upload, "another caption") == (made, posts.EXISTING)
    await refused(
        server, db, errors.Reused, posts.create(db, "alice", upload, "", IdempotencyKey("POST /v1/posts k", "x"))
    )


async def test_a_refused_request_does_not_use_up_its_idempotency_key(server, db):
    post = await make_processing(db, "alice")
    await refused(server, db, errors.NotReady, comments.add(db, "bob", post, "a", ONCE))
    await outbox.publish(db, post, "thumbhash")
    assert not (await comments.add(db, "bob", post, "a", ONCE))[1]


# Uploads


async def test_a_chunk_is_appended_only_at_the_current_offset(server, db):
    upload, _ = await uploads.create(db, "alice", 1, 100)
    assert await append(db, upload, 0, 40, "0-a") == 40
    with unchanged(server.client):
        assert await append(db, upload, 0, 40, "0-a") == 40  # called again
    await refused(server, db, errors.Offset, append(db, upload, 0, 40, "0-b"))
    await refused(server, db, errors.Offset, append(db, upload, 41, 10, "41-a"))
    await refused(server, db, errors.TooLarge, append(db, upload, 40, 61, "40-a"))
    assert await append(db, upload, 40, 60, "40-b") == 100
    await refused(server, db, errors.TooLarge, append(db, upload, 100, 1, "100-a"))
    await refused(server, db, errors.NoUpload, append(db, "u" + NOBODY, 0, 1, "0-a"))
    assert (await uploads.inspect(db, upload)).chunks == ["0-a", "40-b"]
    await posts.create(db, "alice", upload, "")
    await refused(server, db, errors.NoUpload, append(db, upload, 100, 1, "100-a"))
    await refused(server, db, errors.NoUpload, uploads.read(db, "alice", upload))


async def test_an_upload_has_ten_thousand_chunks_at_most(server, db):
    upload, _ = await uploads.create(db, "alice", 1, 2 * CHUNKS)
    server.client.rpush(keys.chunks(upload), *(f"{at}-a" for at in range(CHUNKS - 1)))
    server.client.hset(keys.upload(upload), "offset", CHUNKS - 1)
    assert await append(db, upload, CHUNKS - 1, 1, "last") == CHUNKS
    with unchanged(server.client):
        assert await append(db, upload, CHUNKS - 1, 1, "last") == CHUNKS  # called again
    await refused(server, db, errors.Chunks, append(db, upload, CHUNKS, 1, "more"))


async def test_only_its_owner_can_read_or_use_an_upload(server, db):
    upload = await make_upload(db, "alice")
    await refused(server, db, errors.NoUpload, uploads.read(db, "bob", upload))
    await refused(server, db, errors.NoUpload, posts.create(db, "bob", upload, ""))
    await refused(server, db, errors.NoUpload, posts.create(db, "alice", "u" + NOBODY, ""))
    await refused(server, db, errors.NoUpload, posts.create(db, "alice", NOBODY, ""))


async def test_an_incomplete_or_empty_upload_does_not_become_a_post(server, db):
    upload, _ = await uploads.create(db, "alice", 1, 100)
    await refused(server, db, errors.Incomplete, posts.create(db, "alice", upload, ""))
    await append(db, upload, 0, 99, "0-a")
    await refused(server, db, errors.Incomplete, posts.create(db, "alice", upload, ""))
    empty, _ = await uploads.create(db, "alice", 1, 0)
    await refused(server, db, errors.Empty, posts.create(db, "alice", empty, ""))
    form, _ = await uploads.create(db, "alice", 1)
    await refused(server, db, errors.Empty, posts.create(db, "alice", form, ""))
    await append(db, upload, 99, 1, "99-a")
    assert (await posts.create(db, "alice", upload, ""))[1] == posts.CREATED


async def test_a_user_has_a_quota_of_open_uploads_and_of_bytes(server, db, store):
    await refused(server, db, errors.TooLarge, uploads.create(db, "alice", 1, IMAGE_BYTES + 1))
    small = [(await uploads.create(db, "alice", 1, 1))[0] for _ in range(OPEN_UPLOADS)]
    await refused(server, db, errors.Quota, uploads.create(db, "alice", 1, 1))
    await uploads.discard(db, store, "alice", small.pop())
    await uploads.create(db, "bob", 1, 1)
    await uploads.create(db, "alice", 1, 1)
    server.client.hset(keys.uploads(0, "alice"), small[0], RESERVED_BYTES - OPEN_UPLOADS + 1)
    await uploads.discard(db, store, "alice", small.pop())
    await refused(server, db, errors.Quota, uploads.create(db, "alice", 1, 2))
    await uploads.create(db, "alice", 1, 1)


async def test_forms_have_a_separate_quota_and_reserve_the_most_that_they_may_bring(server, db, store):
    for _ in range(RESERVED_BYTES // IMAGE_BYTES):
        form, _ = await uploads.create(db, "carol", 1)
    assert server.client.hget(keys.uploads(0, "carol"), form) == f"form {IMAGE_BYTES}"
    await refused(server, db, errors.Quota, uploads.create(db, "carol", 1))
    await uploads.create(db, "carol", 1, form_bytes=1)
    for _ in range(OPEN_UPLOADS):
        await uploads.create(db, "carol", 1, IMAGE_BYTES)
    await refused(server, db, errors.Quota, uploads.create(db, "carol", 1, 1))
    await uploads.discard(db, store, "carol", form)
    await uploads.create(db, "carol", 1, form_bytes=IMAGE_BYTES - FORM_BYTES)
    await refused(server, db, errors.Quota, uploads.create(db, "carol", 1, form_bytes=IMAGE_BYTES))
    for _ in range(RESERVED_BYTES // FORM_BYTES):
        await uploads.create(db, "dave", 1, form_bytes=1)
    await refused(server, db, errors.Quota, uploads.create(db, "dave", 1, form_bytes=1))


async def test_an_expired_upload_does_not_count_in_the_quota_and_the_refusal_says_when_the_next_one_expires(server, db):
    """Here no worker erases expired uploads."""

    async def refused_for() -> int:
        with unchanged(server.client), pytest.raises(errors.Quota) as raised:
            await uploads.create(db, "alice", 1, 10)
        assert str(raised.value).startswith("you have")
        return raised.value.again

    await uploads.create(db, "alice", 1)  # a form, which would expire first
    db.clock += 5000
    for _ in range(2):
        await uploads.create(db, "alice", 1, 10)
        db.clock += 2000
    for _ in range(OPEN_UPLOADS - 2):
        await append(db, (await uploads.create(db, "alice", 1, 10))[0], 0, 1, "0-a")
    assert await refused_for() == 3600 - 4
    db.clock += (3600 - 5) * 1000 + 999
    assert await refused_for() == 1
    db.clock += 1
    await uploads.create(db, "alice", 1, 10)
    assert await refused_for() == 2


async def test_an_upload_without_a_byte_and_a_form_that_stopped_expire_after_an_hour(server, db, store):
    """A form stops if the process that received it dies. No client can send the rest."""
    begun, _ = await uploads.create(db, "alice", 1, 100)
    await uploads.create(db, "alice", 1, 100)
    form, _ = await uploads.create(db, "alice", 1)
    image = uploads.Appender(db, store, form)
    for _ in range(3):  # the hour begins with the last chunk
        db.clock += HOUR_MS - 1
        assert (await uploads.inspect(db, form)).expired is False
        await image.write(b"BM" + bytes(100))
        await image.commit()
    await uploads.create(db, "alice", 1, 100)
    assert {due.id for due in await outbox.lease(db, 0)} >= {begun}
    db.clock += HOUR_MS
    for due in await outbox.lease(db, 0):
        await outbox.end_upload(db, store, KeptBackups(store).may_name, due, DAY_MS)
    await refused(server, db, errors.Expired, uploads.read(db, "alice", form))
    assert [entry.name async for entry in store.list("")] == []


async def test_a_finished_upload_no_longer_counts_in_the_quota(server, db):
    for _ in range(OPEN_UPLOADS + 2):
        await make_processing(db, "alice")
    assert not server.client.exists(keys.uploads(0, "alice"))


async def test_parts_become_one_upload_whose_chunks_are_forgotten_together(server, db):
    parts = [await make_part(db, size) for size in (10, 20)]
    foreign, whole = await make_part(db, owner="bob"), await make_upload(db, "alice")
    names = [f"{part}/{server.client.lindex(keys.chunks(part), 0)}" for part in parts]
    for others, error in (([foreign], errors.NoUpload), ([parts[0]], errors.NoUpload), ([whole], errors.Concat)):
        await refused(server, db, error, concatenate(db, *parts, *others))
    await refused(server, db, errors.Chunks, concatenate(db, *parts, chunks=1))
    await refused(server, db, errors.Concat, posts.create(db, "alice", parts[0], ""))
    upload, _ = await concatenate(db, *parts)
    with unchanged(server.client):
        assert await concatenate(db, *parts, upload=upload) == [upload, 0], "the same call again"
        assert await concatenate(db, *parts) == [upload, 1], "the same request again"
    for other in (parts[::-1], parts[:1]):
        await refused(server, db, errors.NoUpload, concatenate(db, *other))
    await refused(server, db, errors.NoUpload, concatenate(db, *parts, owner="bob"))
    await refused(server, db, errors.NoUpload, append(db, parts[0], 10, 1, "10-x"))
    await refused(server, db, errors.TooLarge, append(db, upload, 30, 1, "30-x"))
    row = await uploads.inspect(db, upload)
    assert (row.offset, row.length, row.expires, row.chunks) == (30, 30, NOW + DAY_MS, names)
    assert server.client.hgetall(keys.uploads(0, "alice"))[upload] == "30"
    assert await uploads.drop(db, "alice", upload) == names
    assert (await uploads.inspect(db, upload)).chunks == names, "until the objects are erased"
    await uploads.erase_chunks(db, EMPTY, upload, [])
    assert not [key for key in contents(server.client) if any(one in key for one in (upload, *parts))]


async def test_an_upload_expires_a_day_after_its_last_byte_and_is_reported_as_expired_for_a_day(server, db, store):
    upload, _ = await uploads.create(db, "alice", 1, 100)
    image = uploads.Appender(db, store, upload, 0, 100)
    await image.write(b"BM" + bytes(48))
    await image.commit()
    db.clock += DAY_MS - 1
    assert await outbox.lease(db, 0) == []
    await image.write(bytes(10))
    await image.commit()
    db.clock += DAY_MS - 1
    assert await outbox.lease(db, 0) == []
    assert (await uploads.read(db, "alice", upload)).offset == 60
    db.clock += 1
    await refused(server, db, errors.Expired, uploads.read(db, "alice", upload))
    await refused(server, db, errors.Expired, append(db, upload, 60, 1, "60-a"))
    await refused(server, db, errors.Expired, posts.create(db, "alice", upload, ""))
    due = await leased(db, upload)
    assert due.kind == "upload"
    assert [entry.name async for entry in store.list("")]
    await outbox.end_upload(db, store, KeptBackups(store).may_name, due, DAY_MS)
    assert [entry.name async for entry in store.list("")] == []
    await refused(server, db, errors.Expired, uploads.read(db, "alice", upload))
    await refused(server, db, errors.NoUpload, append(db, upload, 60, 1, "60-a"))
    assert 0 < server.client.pttl(keys.upload(upload)) <= DAY_MS
    assert list(contents(server.client)) == [keys.upload(upload)]
    with unchanged(server.client):
        assert await outbox.lease(db, 0) == []


async def test_a_dropped_upload_leaves_nothing(server, db, store):
    upload, _ = await uploads.create(db, "alice", 1)
    image = uploads.Appender(db, store, upload)
    await image.write(b"BM" + bytes(3 * MIB))
    await image.commit()
    await uploads.discard(db, store, "alice", upload)
    assert contents(server.client) == {}
    assert [entry.name async for entry in store.list("")] == []
    await refused(server, db, errors.NoUpload, uploads.discard(db, store, "alice", upload))
    await refused(server, db, errors.NoUpload, uploads.read(db, "alice", upload))


async def test_the_outbox_erases_a_dropped_upload_if_the_process_that_dropped_it_died(server, db, store):
    upload, _ = await uploads.create(db, "alice", 1)
    image = uploads.Appender(db, store, upload)
    await image.write(b"BM" + bytes(100))
    await image.commit()
    with pytest.raises(ConnectionError):
        await uploads.discard(db, Unreachable(), "alice", upload)
    assert await outbox.lease(db, 0) == []
    db.clock += uploads.GRACE_MS
    await outbox.end_upload(db, store, KeptBackups(store).may_name, await leased(db, upload), DAY_MS)
    assert contents(server.client) == {}
    assert [entry.name async for entry in store.list("")] == []


class Unreachable:
    """An object store that cannot be reached."""

    async def delete(self, names):
        raise ConnectionError


async def test_an_upload_that_became_a_post_cannot_be_dropped(server, db):
    post = await make_processing(db, "alice")
    upload = server.client.hget(keys.post(post), "upload")
    await refused(server, db, errors.NoUpload, uploads.discard(db, EMPTY, "alice", upload))
