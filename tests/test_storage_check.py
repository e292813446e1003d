"""`check` reports what breaks an invariant, repairs derived data, and changes nothing else."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, RedisServer, connect, run_with_db
from making import jpeg, make_processing, publish
from state import contents, unchanged
from uploading import picture

from storage import check, keys, outbox, posts, uploads
from storage.db import cluster
from storage.errors import Expired
from storage.settings import IMAGE_BYTES

NOW = 1_763_971_200_000  # ms since 1970


@pytest.fixture
def db(db):
    """storage's client, at a time that only the test changes."""
    db.clock = NOW
    return db


@pytest.fixture
async def data(db, store):
    """Posts of all kinds and an open upload. Returns the ids: of the ready posts by their number of comments.

    The posts with 5 and with 1 comments are in different partitions.
    """
    ready = {count: await publish(db, store, f"author{count}", count, partitions=3) for count in (0, 1, 2, 5)}
    await make_processing(db, "waiting")
    deleted = await publish(db, store, "alice", 3)
    await posts.delete(db, store, "alice", deleted)
    upload, _ = await uploads.create(db, "carol", 1, 2000)
    image = uploads.Appender(db, store, upload, 0, 2000)
    await image.write(picture(1500))
    await image.commit()
    return {**ready, "upload": upload}


async def test_a_check_of_sound_data_reports_nothing_and_changes_nothing(db, store, data, server, tmp_path):
    with unchanged(server.client, tmp_path):
        report = await check.check(db, store, repair=True, deep=True)
    assert (report.lines, report.flaws, report.repaired) == ([], 0, 0)
    assert (report.posts, report.comments, report.uploads) == (5, 8, 1)


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
async def test_derived_data_are_repaired_to_what_they_were(db, store, data, server, flaw):
    post = data[5]
    before = contents(server.client)
    SPOILED[flaw](server.client, post)
    with unchanged(server.client):
        report = await check.check(db, store)
    assert report.flaws == 1 and report.lines[0].startswith(f"{post}: {flaw}")
    report = await check.check(db, store, repair=True)
    assert (report.flaws, report.repaired) == (0, 1) and report.lines[0].endswith("(repaired)")
    after = contents(server.client)
    if "changes" in flaw:  # the repair is itself a change, with a new revision
        assert server.client.zscore(changes(post), post)
        before.pop(changes(post))
        after.pop(changes(post))
    assert after == before
    assert (await check.check(db, store)).lines == []


def entries(client) -> dict[str, list[str]]:
    """The members of each leaf, and of `leaves`."""
    return {key: client.zrange(key, 0, -1) for key in client.keys("lea*")}


async def test_old_data_without_lists_of_users_posts_gets_them_by_a_repair(db, store, server, monkeypatch):
    """Enough posts for several leaves, in all statuses. Another leaf size only changes how they are cut."""
    monkeypatch.setattr(check, "LEAF_ENTRIES", 4)
    made = [await make_processing(db, f"user{number % 5}", 2) for number in range(16)]
    await outbox.fail(db, made[0], 0, "damaged", "it is damaged")
    ready = await publish(db, store, "alice", partitions=2)
    listed = sorted(entry for key, leaf in entries(server.client).items() if key.startswith("leaf:") for entry in leaf)
    for key in entries(server.client):
        server.client.delete(key)
    report = await check.check(db, store)
    assert (report.flaws, report.repaired) == (17, 0)
    assert f"{ready}: 0 it is missing in the list of its author's posts" in report.lines
    report = await check.check(db, store, repair=True)
    assert (report.flaws, report.repaired) == (0, 17)
    after = entries(server.client)
    assert sorted(entry for key, leaf in after.items() if key.startswith("leaf:") for entry in leaf) == listed
    assert max(len(leaf) for key, leaf in after.items() if key.startswith("leaf:")) <= 4
    assert (await check.check(db, store)).lines == []
    page = await posts.of_user(db, 2, "user1", posts.STATUSES, 100)
    assert [row.id for row in page.posts] == sorted(made[1::5], reverse=True)


@pytest.mark.parametrize(
    "flaw",
    ["missing", "wrong score", "wrong author", "no post", "wrong leaf", "no entry", "no leaf", "unlisted", "no id"],
)
async def test_lists_of_users_posts_are_repaired_to_what_they_were(db, store, server, monkeypatch, flaw):
    monkeypatch.setattr(posts, "LEAF_ENTRIES", 4)
    made = [await make_processing(db, f"user{number % 5}") for number in range(20)]
    client, leaves = server.client, keys.leaves(0)
    before = contents(client)
    firsts = client.zrange(leaves, 0, -1)
    assert len(firsts) > 3 and firsts[0] == "0"
    leaf = keys.leaf(0, firsts[1])
    entry = client.zrange(leaf, 0, -1)[0]
    count = client.zcard(leaf)
    other = entry[:15] + ("0" if entry[15] != "0" else "1") + entry[16:]
    spoil = {
        "missing": lambda: client.zrem(leaf, entry),
        "wrong score": lambda: client.zadd(leaf, {entry: 5}),
        "wrong author": lambda: client.zadd(leaf, {other: 0}),
        "no post": lambda: client.zadd(keys.leaf(0, "0"), {"0" * 16 + " " + keys.new_post_id(0): 0}),
        "wrong leaf": lambda: client.zadd(keys.leaf(0, firsts[-1]), {entry: 0}),
        "no entry": lambda: client.zadd(keys.leaf(0, firsts[-1]), {"rubbish": 0}),
        "no leaf": lambda: client.delete(leaf),
        "unlisted": lambda: client.zadd(keys.leaf(0, keys.entry("eve", made[0])), {keys.entry("eve", made[0]): 0}),
        "no id": lambda: client.zadd(leaves, {"rubbish": 0}),
    }[flaw]
    spoil()
    with unchanged(client):
        report = await check.check(db, store)
    assert report.flaws == (count if flaw == "no leaf" else 1), report.lines
    report = await check.check(db, store, repair=True)
    assert report.flaws == 0
    assert contents(client) == before
    assert (await check.check(db, store)).lines == []


@pytest.mark.skipif(not Path("/usr/share/i18n/locales/cs_CZ").exists(), reason="Debian's package locales is missing")
def test_entries_are_put_into_their_leaf_whatever_the_locale_of_the_server_is(tmp_path, store, monkeypatch):
    """In Czech, CH comes after CZ."""
    subprocess.run(["localedef", "-i", "cs_CZ", "-f", "UTF-8", tmp_path / "cs_CZ.UTF-8"], check=True)
    monkeypatch.setenv("LOCPATH", str(tmp_path))
    monkeypatch.setenv("LC_ALL", "cs_CZ.UTF-8")
    monkeypatch.setattr(check, "LEAF_ENTRIES", 2)
    server = RedisServer("valkey")
    assert server.client.eval("return 'CH' < 'CZ'", 0) is None, "the locale applies"

    async def fill(db):
        for end in ("CA", "CZ", "CH"):
            post = f"01JD4Q7ZK5W8Y3N6R2T9V0XA{end}-0"
            server.client.hset(keys.post(post), mapping={"author": "alice", "status": "failed", "caption": ""})
            await check.check(db, store, repair=True)
        return await check.check(db, store)

    assert run_with_db(server, fill).lines == []
    server.close()


async def test_a_processing_post_that_is_missing_in_the_outbox_is_put_back(db, store, data, server):
    post = await make_processing(db, "forgotten")
    server.client.zrem(keys.making(0, "forgotten"), post)
    server.client.zrem(keys.turns(0), "forgotten")
    server.client.zadd(keys.feed(0), {post: 0})
    report = await check.check(db, store, repair=True)
    assert [line.split(": ")[1][0] for line in report.lines] == ["1", "3", "3"] and report.flaws == 0
    assert server.client.zscore(keys.making(0, "forgotten"), post) == NOW
    assert post in [image.id for image in await outbox.lease_images(db, 0, 10)]
    assert (await check.check(db, store)).lines == []


async def test_a_post_that_does_not_exist_leaves_the_feed_and_its_comments_stay(db, store, data, server):
    missing = keys.new_post_id(0)
    before = contents(server.client)
    server.client.zadd(keys.feed(0), {missing: 3})
    server.client.zadd(keys.changes(0), {missing: 3})
    server.client.xadd(keys.comments(missing), {"author": "eve", "text": "boo"})
    report = await check.check(db, store, repair=True)
    assert (report.flaws, report.repaired) == (1, 2)
    after = contents(server.client)
    assert len(after.pop(keys.comments(missing))[0][0]) == 1
    assert after == before
    remaining = await check.check(db, store)
    assert remaining.lines == [f"{missing}: 0 it has comments and is not ready"]


async def test_keys_with_malformed_names_are_reported_and_stay(db, store, data, server):
    """Keys with names of another program are not even reported."""
    names = [keys.post_prefix(0) + "rubbish", keys.upload_prefix(0) + "rubbish", keys.post_prefix(1) + data[0]]
    for name in names:
        server.client.hset(name, "a", "b")
    server.client.set("something:{else}", "a")
    with unchanged(server.client):
        report = await check.check(db, store, repair=True)
    assert sorted(report.lines) == sorted(f"{name}: 0 its name is malformed" for name in names)
    assert (report.flaws, report.posts) == (3, 5)


def write_wrong_type(client, key: str) -> str:
    """Replaces a key by one of another type. Returns that type."""
    client.delete(key)
    if check.TYPES[key.split(":")[0]] == "string":
        client.rpush(key, "x")
        return "list"
    client.set(key, "x")
    return "string"


@pytest.mark.parametrize("kind", check.TYPES)
async def test_a_key_of_a_wrong_type_is_reported_and_other_partitions_are_repaired(db, store, data, server, kind):
    post, upload = data[5], data["upload"]
    partition = keys.partition_of_post(post)
    key = {
        **{name: f"{name}:{{{partition}}}" for name in ("feed", "changes", "gone", "due", "turns", "leaves")},
        **{name: f"{name}:{{{partition}}}" for name in ("epoch", "restored", "sealing", "quiet", "retired")},
        **{name: f"{name}:{{{partition}}}:{post}" for name in ("post", "hidden", "comments", "latest", "kept")},
        **{name: f"{name}:{{{partition}}}:{post}" for name in ("segments", "erased")},
        **{name: f"{name}:{{0}}:{upload}" for name in ("upload", "chunks")},
        "uploads": keys.uploads(0, "carol"),
        "making": keys.making(0, "waiting"),
        "once": keys.once(0, "carol", "a request"),
        "rate": keys.rate(0, "comment", "carol"),
        "leaf": keys.leaf(partition, "0"),
    }[kind]
    wrong = write_wrong_type(server.client, key)
    other = data[1]
    assert keys.partition_of_post(other) != partition
    server.client.lpop(keys.latest(other))
    for repair in (False, True):
        report = await check.check(db, store, repair=repair)
        assert f"{key}: 0 its type is {wrong}, not {check.TYPES[kind]}" in report.lines
    assert server.client.llen(keys.latest(other)) == 1, "the other partition was repaired"
    assert (await check.fit_restored(db, store, range(3))).flaws > 0
    rewritten = kind in ("epoch", "restored")  # a restore writes both anew
    assert server.client.type(key) == ("string" if rewritten else wrong)


async def test_a_repair_removes_members_whose_post_is_missing_or_malformed(db, store, data, server):
    client, zsets = server.client, (keys.feed(0), keys.changes(0))
    malformed = [await publish(db, store, "alice", 3) for _ in range(4)]
    no_caption, no_status, no_hash, no_list = malformed
    client.hdel(keys.post(no_caption), "caption")
    client.hdel(keys.post(no_status), "status")
    write_wrong_type(client, keys.post(no_hash))
    write_wrong_type(client, keys.latest(no_list))
    foreign = ["rubbish", keys.new_upload_id(0), keys.new_post_id(7)]
    for key in zsets:
        client.zadd(key, dict.fromkeys(foreign, 1))
    client.zadd(keys.due(0), {"rubbish": 1})
    report = await check.check(db, store)
    assert report.repaired == 0 and report.flaws > len(malformed)
    await check.check(db, store, repair=True)
    for key in zsets:
        assert not {*malformed, *foreign} & set(client.zrange(key, 0, -1))
    assert client.zscore(keys.due(0), "rubbish") is None
    with unchanged(client):
        remaining = await check.check(db, store, repair=True)
    assert sorted(remaining.lines) == sorted(
        [
            f"{no_caption}: 0 its caption is missing",
            f"{no_status}: 0 its status is missing",
            f"{no_status}: 0 it has comments and is not ready",
            f"{keys.post(no_hash)}: 0 its type is string, not hash",
            f"{no_hash}: 0 it has comments and is not ready",
            f"{keys.latest(no_list)}: 0 its type is string, not list",
        ]
    )
    assert client.xlen(keys.comments(no_caption)) == 3


@pytest.mark.parametrize("field", ["offset", "expires", "length", "no owner", "no expires", "no offset"])
async def test_an_upload_with_a_malformed_field_is_reported_and_stays(db, store, data, server, field):
    key = keys.upload(data["upload"])
    if field.startswith("no "):
        server.client.hdel(key, field.removeprefix("no "))
    else:
        server.client.hset(key, field, "x")
    with unchanged(server.client):
        report = await check.check(db, store)
    assert report.flaws and all(line.startswith(data["upload"]) for line in report.lines)
    assert (await check.fit_restored(db, store, range(1))).flaws


async def test_names_and_members_that_are_not_utf_8_are_reported_and_a_repair_removes_the_members(
    real_server, store
):
    client = real_server.client
    client.flushall()
    db = cluster.connect(real_server.url, undecodable=check.EXACTLY)
    post = await publish(db, store, "alice", 1)
    client.set(b"\xff\xfe", b"\xff")
    client.set(b"post:{0}:\xff", b"\xff")
    client.set("foreign", b"\xff")
    client.zadd(keys.feed(0), {b"\xff": 3})
    client.hset(keys.post(post), "caption", b"\xff")
    report = await check.check(db, store, repair=True)
    assert sorted(report.lines) == [
        "\\udcff: 0 it is not a valid member of feed (repaired)",
        "\\udcff\\udcfe: 0 its name is not UTF-8",
        "post:{0}:\\udcff: 0 its name is not UTF-8",
    ]
    assert client.zrange(keys.feed(0), 0, -1) == [post]
    assert (await check.fit_restored(db, store, range(1))).flaws == 2
    await db.close()
    plain = connect(real_server)
    assert [row.caption for row in (await posts.feed(plain, 1, 10)).posts] == ["\ufffd"]
    await plain.close()


async def test_a_missing_jpeg_is_made_again_and_a_missing_original_is_reported(db, store, data, server):
    without_jpeg, without_original = data[1], data[2]
    await posts.erase_image(store, without_jpeg)
    await store.delete([keys.original(without_original)])
    report = await check.check(db, store, repair=True)
    assert sorted(report.lines) == sorted(
        [f"{without_jpeg}: 3 its JPEG is missing (repaired)", f"{without_original}: 3 its original is missing"]
    )
    partition = keys.partition_of_post(without_jpeg)
    assert server.client.zscore(keys.making(partition, "author1"), without_jpeg) == NOW
    assert (await check.check(db, store)).flaws == 1, "a JPEG that is to be made is no flaw"


@pytest.mark.parametrize("damaged", [b"\xff\xd8 cut short", b"<html>"])
async def test_only_a_deep_check_reads_the_objects(db, store, data, damaged):
    await posts.put_image(store, data[0], damaged)
    await store.put(keys.original(data[0]), b"<html>")
    assert (await check.check(db, store)).flaws == 0
    lines = (await check.check(db, store, deep=True)).lines
    assert lines == [f"{data[0]}: 3 its original is damaged", f"{data[0]}: 3 its JPEG is damaged"]


async def test_an_upload_whose_chunks_are_missing_is_reported_and_a_repair_drops_it(db, store, data, server):
    upload = data["upload"]
    chunks = (await uploads.inspect(db, upload)).chunks
    await store.delete([keys.chunk(upload, name) for name in chunks])
    with unchanged(server.client):
        report = await check.check(db, store)
    assert report.lines == [f"{upload}: 5 its offset is 1500, its chunks have 0 bytes"] and report.flaws == 1
    await check.check(db, store, repair=True)
    with pytest.raises(Expired):
        await uploads.read(db, "carol", upload)
    assert server.client.hlen(keys.uploads(0, "carol")) == 0
    assert (await check.check(db, store)).lines == []


@pytest.mark.parametrize("flaw", ["not due", "not reserved", "too little reserved", "reserved for nothing"])
async def test_reservations_and_expiry_of_uploads_are_repaired_to_what_they_were(db, store, data, server, flaw):
    upload, reserved, due = data["upload"], keys.uploads(0, "carol"), keys.due(0)
    form, _ = await uploads.create(db, "carol", 1)
    before, missing = contents(server.client), keys.new_upload_id(0)
    if flaw == "not due":
        server.client.zrem(due, upload)
    elif flaw == "not reserved":
        server.client.delete(reserved)
    elif flaw == "too little reserved":
        server.client.hset(reserved, upload, 5)
    else:
        server.client.hset(reserved, missing, 2000)
    expected = {
        "not due": {f"{upload}: 0 it is open and not due"},
        "not reserved": {f"{upload}: 0 reserved for it are none, not 2000"}
        | {f"{form}: 0 reserved for it are none, not form {IMAGE_BYTES}"},
        "too little reserved": {f"{upload}: 0 reserved for it are 5, not 2000"},
        "reserved for nothing": {f"{missing}: 0 bytes are reserved for it and it is not open"},
    }[flaw]
    with unchanged(server.client):
        report = await check.check(db, store)
    assert set(report.lines) == expected and report.flaws == len(expected)
    report = await check.check(db, store, repair=True)
    assert report.flaws == 0 and report.repaired == len(expected)
    assert contents(server.client) == before
    assert (await check.check(db, store)).lines == []


async def test_restored_data_are_made_to_fit_the_objects_that_exist_now(db, store, data, server):
    upload = data["upload"]
    chunks = (await uploads.inspect(db, upload)).chunks
    await store.delete([keys.chunk(upload, name) for name in chunks] + [keys.image(data[1])])
    before = [entry.name async for entry in store.list()]
    report = await check.fit_restored(db, store, range(3))
    assert (report.lines, report.flaws, report.uploads) == ([], 0, 0)
    assert [entry.name async for entry in store.list()] == before
    assert server.client.zscore(keys.making(keys.partition_of_post(data[1]), "author1"), data[1]) == NOW
    with pytest.raises(Expired):
        await uploads.read(db, "carol", upload)
    epochs = [server.client.get(keys.epoch(partition)) for partition in range(3)]
    assert len(epochs) == 3 and len(set(epochs)) == len(epochs) and all(epochs)


async def test_restored_data_of_an_older_version_get_their_image_work_into_turns(db, store, data, server):
    """Older versions had posts whose image is to be made in `due`. One of them has a JPEG, of an undone timeline."""
    without_jpeg, with_jpeg = await make_processing(db, "old"), await make_processing(db, "old")
    await posts.put_image(store, with_jpeg, jpeg())
    await posts.erase_image(store, data[1])
    for post, author in ((without_jpeg, "old"), (with_jpeg, "old"), (data[1], "author1")):
        partition = keys.partition_of_post(post)
        server.client.zadd(keys.due(partition), {post: NOW + 5000})
        server.client.delete(keys.making(partition, author), keys.turns(partition))
    server.client.zadd(keys.turns(0), {"waiting": NOW})
    report = await check.fit_restored(db, store, range(3))
    assert (report.lines, report.flaws) == ([], 0)
    for partition in range(3):
        ids = server.client.zrange(keys.due(partition), 0, -1)
        assert not {without_jpeg, with_jpeg, data[1]} & set(ids)
    work = [image.id for partition in range(3) for image in await outbox.lease_images(db, partition, 9)]
    assert {without_jpeg, with_jpeg, data[1]} <= set(work)


async def test_no_flaw_is_reported_while_others_write(db, store, data):
    stop, written = False, 0

    async def write(number: int) -> None:
        nonlocal written
        while not stop:
            post = await publish(db, store, f"busy{number}", 3)
            await posts.delete(db, store, f"busy{number}", post)
            written += 1

    writers = [asyncio.create_task(write(number)) for number in range(4)]
    checks = 0
    while checks < 5 or written < 5:
        report = await check.check(db, store, repair=True)
        assert report.lines == []
        checks += 1
    stop = True
    await asyncio.gather(*writers)


def test_the_command_prints_the_flaws_and_exits_with_1_until_they_are_repaired(site):
    def run(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "storage", "check", *options]
        return subprocess.run(command, cwd=ROOT, env=site.environment, capture_output=True, text=True)

    missing = keys.new_post_id(0)
    site.server.client.zadd(keys.feed(0), {missing: 3})
    with unchanged(site.server.client):
        checked = run()
    assert checked.returncode == 1 and f"{missing}: 1 it is in the feed and not ready" in checked.stdout
    repaired = run("--repair")
    assert repaired.returncode == 0 and "1 were repaired" in repaired.stdout
    assert run().stdout.strip().endswith("0 flaws remain, 0 were repaired")
