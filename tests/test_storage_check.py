"""`check` finds what breaks an invariant, repairs what is derived, and lets be what is right."""

import asyncio
import json
import subprocess
import sys

import pytest
import redis
from conftest import ROOT, connect
from making import jpeg, make_processing
from state import contents, unchanged
from uploading import picture

from storage import check, comments, keys, outbox, posts, uploads
from storage.db.client import Redis
from storage.errors import Expired
from storage.settings import IMAGE_BYTES

NOW = 1_763_971_200_000


@pytest.fixture
async def db(server):
    db = connect(server)
    db.clock = NOW
    yield db
    await db.close()


async def show(db, store, author: str, said: int = 0, partitions: int = 1) -> str:
    """A ready post with all of its objects."""
    post = await make_processing(db, author, partitions)
    await store.put(keys.original(post), picture(100))
    await posts.put_image(store, post, jpeg())
    await outbox.publish(db, post, "thumbhash")
    for number in range(said):
        await comments.add(db, "bob", post, f"{number} / \\ \" é")
    return post


@pytest.fixture
async def data(db, store):
    """Posts of all kinds and an open upload; the ids of the ready ones, by how many comments they have."""
    made = {said: await show(db, store, f"author{said}", said, partitions=3) for said in (0, 1, 2, 5)}
    await make_processing(db, "waiting")
    doomed = await show(db, store, "alice", 3)
    await posts.delete(db, store, "alice", doomed)
    upload, _ = await uploads.create(db, "carol", 1, 2000)
    image = uploads.Appender(db, store, upload, 0, 2000)
    await image.write(picture(1500))
    await image.commit()
    return {**made, "upload": upload}


async def test_what_is_right_is_found_right_and_stays_as_it_is(db, store, data, server, tmp_path):
    with unchanged(server.client, tmp_path):
        found = await check.check(db, store, repair=True, deep=True)
    assert (found.lines, found.flaws, found.repaired) == ([], 0, 0)
    assert (found.posts, found.comments, found.uploads) == (5, 8, 1)


def feed(post: str) -> str:
    return keys.feed(keys.partition_of_post(post))


def changes(post: str) -> str:
    return keys.changes(keys.partition_of_post(post))


SPOILED = {
    "1 its score is 4, it has 5 comments": lambda client, post: client.zadd(feed(post), {post: 4}),
    "1 its score is missing, it has 5 comments": lambda client, post: client.zrem(feed(post), post),
    "2 its latest comments are not": lambda client, post: client.lpop(keys.latest(post)),
    "2 its latest": lambda client, post: client.lset(keys.latest(post), 1, json.dumps(["1-0", "eve", "hi"])),
    "0 it is missing among the changes": lambda client, post: client.zrem(changes(post), post),
}


@pytest.mark.parametrize("flaw", SPOILED)
async def test_what_is_derived_is_repaired_to_what_it_was(db, store, data, server, flaw):
    post = data[5]
    before = contents(server.client)
    SPOILED[flaw](server.client, post)
    spoiled = contents(server.client)
    found = await check.check(db, store)
    assert found.flaws == 1 and found.lines[0].startswith(f"{post}: {flaw}")
    assert contents(server.client) == spoiled
    found = await check.check(db, store, repair=True)
    assert (found.flaws, found.repaired) == (0, 1) and found.lines[0].endswith("(repaired)")
    after = contents(server.client)
    if "changes" in flaw:  # it has changed, as far as a client can tell
        before.pop(changes(post)), after.pop(changes(post))
    assert after == before
    assert (await check.check(db, store)).lines == []


async def test_a_processing_post_that_fell_out_of_the_outbox_gets_back_in(db, store, data, server):
    post = await make_processing(db, "forgotten")
    server.client.zrem(keys.making(0, "forgotten"), post)
    server.client.zrem(keys.turns(0), "forgotten")
    server.client.zadd(keys.feed(0), {post: 0})
    found = await check.check(db, store, repair=True)
    assert [line.split(": ")[1][0] for line in found.lines] == ["1", "3", "3"] and found.flaws == 0
    assert server.client.zscore(keys.making(0, "forgotten"), post) == NOW
    assert post in [image.id for image in await outbox.lease_images(db, 0, 10)]
    assert (await check.check(db, store)).lines == []


async def test_what_is_nobodys_in_the_feed_goes_and_comments_without_a_post_stay(db, store, data, server):
    ghost = keys.new_post_id(0)
    server.client.zadd(keys.feed(0), {ghost: 3})
    server.client.zadd(keys.changes(0), {ghost: 3})
    server.client.xadd(keys.comments(ghost), {"author": "eve", "text": "boo"})
    found = await check.check(db, store, repair=True)
    assert found.flaws > 0 and found.repaired >= 2
    assert server.client.zscore(keys.feed(0), ghost) is None and server.client.xlen(keys.comments(ghost)) == 1
    left = await check.check(db, store)
    assert left.lines == [f"{ghost}: 0 it has comments and is not ready"]


async def test_what_others_wrote_beside_it_is_told_and_stays(db, store, data, server):
    names = [keys.post_prefix(0) + "rubbish", keys.upload_prefix(0) + "rubbish", keys.post_prefix(1) + data[0]]
    for name in names:
        server.client.hset(name, "a", "b")
    server.client.set("something:{else}", "a")
    with unchanged(server.client):
        found = await check.check(db, store, repair=True)
    assert sorted(found.lines) == sorted(f"{name}: 0 its name is malformed" for name in names)
    assert (found.flaws, found.posts) == (3, 5)


WRONG = {"string": ("set", "x"), "list": ("rpush", "x"), "hash": ("hset", "f", "x"), "zset": ("zadd", {"x": 1})}


def of_wrong_type(client, key: str) -> str:
    """Write a key anew with a type that it does not have; the type."""
    wrong = "list" if check.TYPES[key.split(":")[0]] == "string" else "string"
    command, *value = WRONG[wrong]
    client.delete(key)
    getattr(client, command)(key, *value)
    return wrong


@pytest.mark.parametrize("kind", check.TYPES)
async def test_a_key_of_a_wrong_type_is_told_and_the_rest_is_judged(db, store, data, server, kind):
    post, upload = data[5], data["upload"]
    partition = keys.partition_of_post(post)
    key = {
        **{name: f"{name}:{{{partition}}}" for name in ("feed", "changes", "gone", "due", "turns")},
        **{name: f"{name}:{{{partition}}}" for name in ("epoch", "restored")},
        **{name: f"{name}:{{{partition}}}:{post}" for name in ("post", "comments", "latest")},
        **{name: f"{name}:{{0}}:{upload}" for name in ("upload", "chunks")},
        "uploads": keys.uploads(0, "carol"),
        "making": keys.making(0, "waiting"),
        "once": keys.once(0, "carol", "a request"),
    }[kind]
    wrong = of_wrong_type(server.client, key)
    other = data[1]
    server.client.lpop(keys.latest(other))
    for repair in (False, True):
        found = await check.check(db, store, repair=repair)
        assert f"{key}: 0 its type is {wrong}, not {check.TYPES[kind]}" in found.lines
    if keys.partition_of_post(other) != partition:
        assert server.client.llen(keys.latest(other)) == 1, "others are repaired"
    assert (await check.fit_restored(db, store, 3)).flaws > 0
    assert server.client.type(key) in (wrong, "string")


async def test_a_member_without_its_post_or_with_a_malformed_one_is_removed_by_a_repair(db, store, data, server):
    client, listed = server.client, (keys.feed(0), keys.changes(0))
    malformed = [await show(db, store, "alice", 3) for _ in range(4)]
    client.hdel(keys.post(malformed[0]), "caption")
    client.hdel(keys.post(malformed[1]), "status")
    of_wrong_type(client, keys.post(malformed[2]))
    of_wrong_type(client, keys.latest(malformed[3]))
    odd = ["rubbish", keys.new_upload_id(0), keys.new_post_id(7)]
    for key in listed:
        client.zadd(key, dict.fromkeys(odd, 1))
    client.zadd(keys.due(0), {"rubbish": 1})
    found = await check.check(db, store)
    assert found.repaired == 0 and found.flaws > len(malformed)
    await check.check(db, store, repair=True)
    for key in listed:
        assert not {*malformed, *odd} & set(client.zrange(key, 0, -1))
    assert client.zscore(keys.due(0), "rubbish") is None
    left = await check.check(db, store, repair=True)
    assert left.repaired == 0 and left.flaws == 6  # what is missing, the types, and comments without a post
    assert f"{malformed[0]}: 0 its caption is missing" in left.lines
    assert client.xlen(keys.comments(malformed[0])) == 3


@pytest.mark.parametrize("field", ["offset", "expires", "length", "no owner", "no expires", "no offset"])
async def test_an_upload_with_a_malformed_field_is_told(db, store, data, server, field):
    key = keys.upload(data["upload"])
    if field.startswith("no "):
        server.client.hdel(key, field.removeprefix("no "))
    else:
        server.client.hset(key, field, "x")
    found = await check.check(db, store)
    assert found.flaws and all(line.startswith(data["upload"]) for line in found.lines)
    assert (await check.fit_restored(db, store, 1)).flaws


async def test_names_and_values_that_are_not_utf_8_are_told_and_removed_from_lists(real_server, store):
    client = real_server.client
    client.flushall()
    db = Redis(real_server.url, undecodable=check.EXACTLY)
    post = await show(db, store, "alice", 1)
    client.set(b"\xff\xfe", b"\xff")
    client.set(b"post:{0}:\xff", b"\xff")
    client.set("foreign", b"\xff")
    client.zadd(keys.feed(0), {b"\xff": 3})
    client.hset(keys.post(post), "caption", b"\xff")
    found = await check.check(db, store, repair=True)
    assert sorted(found.lines) == [
        "\\udcff: 0 it is not a valid member of feed (repaired)",
        "\\udcff\\udcfe: 0 its name is not UTF-8",
        "post:{0}:\\udcff: 0 its name is not UTF-8",
    ]
    assert client.zrange(keys.feed(0), 0, -1) == [post]
    assert (await check.fit_restored(db, store, 1)).flaws == 2
    await db.close()
    plain = connect(real_server)
    assert [row.caption for row in (await posts.feed(plain, 1, 10)).posts] == ["\ufffd"]
    await plain.close()


async def test_a_missing_jpeg_is_made_again_and_a_missing_original_is_told(db, store, data, server):
    without, poor = data[1], data[2]
    await posts.erase_image(store, without)
    await store.delete([keys.original(poor)])
    found = await check.check(db, store, repair=True)
    assert sorted(found.lines) == sorted(
        [f"{without}: 3 its JPEG is missing (repaired)", f"{poor}: 3 its original is missing"]
    )
    assert server.client.zscore(keys.making(keys.partition_of_post(without), "author1"), without) == NOW
    assert (await check.check(db, store)).flaws == 1  # what is due is on its way


@pytest.mark.parametrize("bytes", [b"\xff\xd8 cut short", b"<html>"])
async def test_only_a_deep_look_sees_what_an_object_holds(db, store, data, bytes):
    await posts.put_image(store, data[0], bytes)
    await store.put(keys.original(data[0]), b"<html>")
    assert (await check.check(db, store)).flaws == 0
    told = (await check.check(db, store, deep=True)).lines
    assert told == [f"{data[0]}: 3 its original is damaged", f"{data[0]}: 3 its JPEG is damaged"]


async def test_an_upload_without_its_chunks_is_told_and_dropped(db, store, data, server):
    upload = data["upload"]
    chunks = (await uploads.inspect(db, upload)).chunks
    await store.delete([keys.chunk(upload, name) for name in chunks])
    found = await check.check(db, store)
    assert found.lines == [f"{upload}: 5 its offset is 1500, its chunks have 0 bytes"] and found.flaws == 1
    await check.check(db, store, repair=True)
    with pytest.raises(Expired):
        await uploads.read(db, "carol", upload)
    assert server.client.hlen(keys.uploads(0, "carol")) == 0
    assert (await check.check(db, store)).lines == []


@pytest.mark.parametrize("flaw", ["not due", "not reserved", "too little reserved", "reserved for nothing"])
async def test_quota_and_expiry_of_uploads_are_repaired_to_what_they_were(db, store, data, server, flaw):
    upload, quota, due = data["upload"], keys.uploads(0, "carol"), keys.due(0)
    form, _ = await uploads.create(db, "carol", 1)
    before, gone = contents(server.client), upload
    if flaw == "not due":
        server.client.zrem(due, upload)
    elif flaw == "not reserved":
        server.client.delete(quota)
    elif flaw == "too little reserved":
        server.client.hset(quota, upload, 5)
    else:
        gone = keys.new_upload_id(0)
        server.client.hset(quota, gone, 2000)
    wanted = {
        "not due": {f"{upload}: 0 it is open and not due"},
        "not reserved": {f"{upload}: 0 reserved for it are none, not 2000"}
        | {f"{form}: 0 reserved for it are none, not form {IMAGE_BYTES}"},
        "too little reserved": {f"{upload}: 0 reserved for it are 5, not 2000"},
        "reserved for nothing": {f"{gone}: 0 bytes are reserved for it and it is not open"},
    }[flaw]
    found = await check.check(db, store)
    assert set(found.lines) == wanted and found.flaws == len(wanted)
    found = await check.check(db, store, repair=True)
    assert found.flaws == 0 and found.repaired == len(wanted)
    assert contents(server.client) == before
    assert (await check.check(db, store)).lines == []


async def test_a_restore_makes_old_data_fit_the_store_of_today(db, store, data, server):
    upload = data["upload"]
    chunks = (await uploads.inspect(db, upload)).chunks
    await store.delete([keys.chunk(upload, name) for name in chunks] + [keys.image(data[1])])
    kept = sorted([entry.name async for entry in store.list()])
    found = await check.fit_restored(db, store, 3)
    assert (found.lines, found.flaws, found.uploads) == ([], 0, 0)
    assert sorted([entry.name async for entry in store.list()]) == kept
    assert server.client.zscore(keys.making(keys.partition_of_post(data[1]), "author1"), data[1]) == NOW
    with pytest.raises(Expired):
        await uploads.read(db, "carol", upload)
    epochs = [server.client.get(keys.epoch(partition)) for partition in range(3)]
    assert len(epochs) == 3 and len(set(epochs)) == len(epochs) and all(epochs)


async def test_a_restore_of_data_from_before_there_were_turns_is_whole(db, store, data, server):
    """Posts whose image was to be made stood in `due`, also those that an undone timeline has shown."""
    again, shown = await make_processing(db, "old"), await make_processing(db, "old")
    await posts.put_image(store, shown, jpeg())
    await posts.erase_image(store, data[1])
    for post, author in ((again, "old"), (shown, "old"), (data[1], "author1")):
        partition = keys.partition_of_post(post)
        server.client.zadd(keys.due(partition), {post: NOW + 5000})
        server.client.delete(keys.making(partition, author), keys.turns(partition))
    server.client.zadd(keys.turns(0), {"waiting": NOW})
    found = await check.fit_restored(db, store, 3)
    assert (found.lines, found.flaws) == ([], 0)
    for partition in range(3):
        ids = server.client.zrange(keys.due(partition), 0, -1)
        assert not {again, shown, data[1]} & set(ids)
    work = [image.id for partition in range(3) for image in await outbox.lease_images(db, partition, 9)]
    assert {again, shown, data[1]} <= set(work)


async def test_while_others_write_nothing_right_is_told_wrong(db, store, data):
    stop = False

    async def busy(number: int):
        while not stop:
            post = await show(db, store, f"busy{number}", 3)
            await posts.delete(db, store, f"busy{number}", post)

    writers = [asyncio.create_task(busy(number)) for number in range(4)]
    for _ in range(5):
        found = await check.check(db, store, repair=True)
        assert found.lines == []
    stop = True
    await asyncio.gather(*writers)


def test_the_command_says_what_is_wrong_and_how_it_ended(site):
    def run(*options):
        command = [sys.executable, "-m", "storage", "check", *options]
        return subprocess.run(command, cwd=ROOT, env=site.environment, capture_output=True, text=True)

    ghost = keys.new_post_id(0)
    client = redis.Redis.from_url(site.environment["IMAGEGRAM_REDIS_URL"])
    client.zadd(keys.feed(0), {ghost: 3})
    asked = run()
    assert asked.returncode == 1 and f"{ghost}: 1 it is in the feed and not ready" in asked.stdout
    repaired = run("--repair")
    assert repaired.returncode == 0 and "1 were repaired" in repaired.stdout
    assert run().stdout.strip().endswith("0 flaws remain, 0 were repaired")
