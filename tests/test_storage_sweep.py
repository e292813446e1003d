"""A sweep removes the objects that nothing in Redis owns, and no others."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import NOBODY, ROOT, connect
from making import make_post, make_processing, make_upload, seal
from parts import s3_url
from state import unchanged

from storage import comments, keys, objects, posts, sealing, settings, uploads
from storage.backup import chain
from storage.backup.retain import KeptBackups
from storage.db.client import BATCH
from storage.objects import open_store
from storage.segments import Segments
from storage.sweep import DAY, SAFE_COUNT, Mistaken, Report, sweep

CHOSEN = settings.load({"IMAGEGRAM_KEEP_DAYS": "3"})
OLD = 1.1 * DAY  # seconds
OLDEST = 7.1 * DAY  # seconds. Then no backup can name an object any more: they reach back twice three and a half days


async def sweep_with(db, store, chosen: settings.Settings, remove: bool) -> Report:
    """Sweeps as the command does with these settings."""
    may_name = KeptBackups(open_store(chosen.backup_store_url)).may_name
    return await sweep(db, store, may_name, chosen.backup_reach_ms, remove)


async def put(store, tmp_path, name: str, age: float = OLD) -> str:
    """Stores an object of this age, in seconds."""
    await store.put(name, b"1234")
    then = time.time() - age
    os.utime(tmp_path / "store" / name, (then, then))
    return name


async def names(store) -> set[str]:
    return {entry.name async for entry in store.list()}


async def owned_objects(server, db, store, tmp_path) -> set[str]:
    """Stores objects of everything in Redis that may own one. Returns their names."""
    ready, also_ready, deleted, erased = [await make_post(db, "alice") for _ in range(4)]
    await posts.delete(db, store, "alice", deleted)
    await posts.delete(db, store, "alice", erased)
    server.client.zrem(keys.gone(0), deleted)  # only `due` still names it: its objects are not erased yet
    server.client.zrem(keys.due(0), erased)  # only `gone` still names it: its deletion is still among the changes
    opened = await make_upload(db, "bob")
    waiting = await make_processing(db, "bob")
    dropped = await make_upload(db, "bob")
    chunks = [keys.chunk(opened, name) for name in (await uploads.inspect(db, opened)).chunks]
    chunks += [keys.chunk(dropped, name) for name in (await uploads.inspect(db, dropped)).chunks]
    named = [keys.uploads(0, "bob"), keys.due(0)]
    named = [keys.upload(dropped), keys.chunks(dropped), *named]
    await db.call("drop_upload", named, db.clock, dropped, 60_000, "", keys.chunks_prefix(0))
    for post in (ready, also_ready, waiting, deleted, erased):
        chunks += [keys.original(post), keys.image(post)]
    for name in chunks:
        await put(store, tmp_path, name, OLDEST)
    return set(chunks)


async def test_objects_without_an_owner_are_removed_and_no_others(server, db, store, tmp_path):
    owned = await owned_objects(server, db, store, tmp_path)
    opened = await make_upload(db, "carol")
    orphans = [
        keys.chunk(opened, keys.chunk_name(0)),  # a process was killed before it wrote this name to Redis
        keys.chunk("u" + NOBODY, "0-a"),
        keys.image(NOBODY),
        keys.original(NOBODY),
    ]
    for name in orphans:
        await put(store, tmp_path, name, OLDEST)
    too_young_or_foreign = [
        await put(store, tmp_path, keys.image(keys.new_post_id(0)), 0.9 * DAY),
        await put(store, tmp_path, keys.original(keys.new_post_id(0)), 6.9 * DAY),
        await put(store, tmp_path, "originals/notes.txt", OLDEST),
        await put(store, tmp_path, "elsewhere/" + NOBODY, OLDEST),
    ]
    before = await names(store)
    with unchanged(server.client, tmp_path):
        found = await sweep_with(db, store, CHOSEN, remove=False)
    assert (found.orphans, found.size, found.waiting) == (4, 16, 1)
    assert found.seen == len(owned) + len(orphans) + 1
    assert set(found.names) == set(orphans)
    with unchanged(server.client):
        assert await sweep_with(db, store, CHOSEN, remove=True) == found
    assert await names(store) == before - set(orphans) == owned | set(too_young_or_foreign)
    assert (await sweep_with(db, store, CHOSEN, remove=True)).orphans == 0


async def test_originals_chunks_and_segments_that_a_backup_from_before_a_restore_may_name_stay(db, store, tmp_path):
    chosen = replace(CHOSEN, backup_store_url=(tmp_path / "backup").as_uri())
    backup = objects.open_store(chosen.backup_store_url)
    now = int(time.time())
    await backup.put(chain.description_name(1), chain.seal({"second": now - 20 * DAY}, b""))
    named = keys.original(NOBODY), keys.chunk("u" + NOBODY, "0-a"), keys.segment(NOBODY, keys.segment_name("5-0"))
    orphans = {await put(store, tmp_path, name, 12 * DAY) for name in named}
    image = await put(store, tmp_path, keys.image(NOBODY), 12 * DAY)
    db.clock = int((now - 10 * DAY) * 1000)
    await db.call("begin_epoch", [keys.epoch(0), keys.restored(0)], db.clock, "name")
    db.clock = now * 1000
    found = await sweep_with(db, store, chosen, remove=True)
    assert (found.orphans, found.waiting, found.names) == (1, 3, [image])
    await backup.delete([chain.description_name(1)])
    assert (await sweep_with(db, store, chosen, remove=True)).orphans == 3
    assert not orphans & await names(store)


@pytest.mark.parametrize("when", ["sealed", "compacted"])
async def test_the_segment_of_a_process_that_was_killed_before_its_script_is_removed(
    server, db, store, tmp_path, monkeypatch, when
):
    """Every other segment stays: of the post, replaced ones, and those of a deleted post."""
    monkeypatch.setattr(sealing, "SEGMENT_COMMENTS", 2)

    class Killed(Segments):
        async def put(self, *args):
            await super().put(*args)
            raise SystemExit

    async def make(count: int) -> str:
        post = await make_post(db, "alice")
        for number in range(count):
            await comments.add(db, "bob", post, f"{number}")
        return post

    async def erase(post: str, place: int) -> None:
        rows = (await comments.page(db, Segments(store), post, 20)).comments
        await comments.delete(db, Segments(store), "bob", post, rows[place].id)

    post, deleted = await make(4), await make(3)
    for each in (post, deleted):
        await seal(db, store, each)
    await erase(post, -1)
    await seal(db, store, post)
    await posts.delete(db, store, "alice", deleted)
    owned = await names(store)
    assert len(owned) == 5 and server.client.zcard(keys.retired(0)) == 2
    await (comments.add(db, "bob", post, "new") if when == "sealed" else erase(post, -2))
    with unchanged(server.client), pytest.raises(SystemExit):
        await sealing.step(db, Killed(store), post, 0, -1000, 1000)
    for name in [await put(store, tmp_path, f"comments/{NOBODY}/notes.txt"), *await names(store)]:
        os.utime(tmp_path / "store" / name, (time.time() - OLD,) * 2)
    (orphan,) = await names(store) - owned - {f"comments/{NOBODY}/notes.txt"}
    with unchanged(server.client):
        found = await sweep_with(db, store, CHOSEN, remove=True)
    assert (found.seen, found.orphans, found.names) == (6, 1, [orphan])
    assert await names(store) == owned | {f"comments/{NOBODY}/notes.txt"}


@pytest.fixture
async def real(embedded):
    """storage's client of the embedded server. fakeredis cannot run a batch of calls."""
    embedded.client.flushall()
    db = connect(embedded)
    yield db
    await db.close()


async def test_the_owner_of_any_number_of_segments_is_found(real, embedded):
    post = keys.new_post_id(0)
    embedded.client.rpush(keys.segments(post), "5-0 1 named")
    script_keys = [keys.post(post), keys.hidden(post), keys.gone(0), keys.due(0), keys.segments(post), keys.retired(0)]
    stored = [*map(str, range(10_000)), "named"]
    assert await real.call("is_owned", script_keys, post, *stored) == [0, None, "named"]


async def test_a_sweep_with_an_empty_redis_removes_nothing(real, embedded, store, tmp_path):
    count = SAFE_COUNT + 1
    for number in range(count):
        post = keys.new_post_id(number % 3)
        await put(store, tmp_path, keys.segment(post, keys.segment_name("5-0")) if number % 2 else keys.image(post))
    with unchanged(embedded.client, tmp_path), pytest.raises(Mistaken, match=f"{count} of {count} objects "):
        await sweep_with(real, store, CHOSEN, remove=True)


async def test_a_sweep_of_more_than_one_batch_finds_the_owners_of_all_objects(real, store, tmp_path):
    owners = [await make_post(real, "alice") for _ in range(BATCH + 50)]
    for post in owners:
        await put(store, tmp_path, keys.image(post))
    await put(store, tmp_path, keys.image(NOBODY))
    assert (await sweep_with(real, store, CHOSEN, remove=True)).orphans == 1
    assert await names(store) == {keys.image(post) for post in owners}


async def test_a_bucket_is_swept_too(real, monkeypatch):
    """The age of an object in S3 cannot be set. So the sweep sees a later clock."""
    store = objects.open_store(s3_url(monkeypatch))
    post = await make_post(real, "alice")
    for name in (keys.image(post), keys.image(NOBODY), keys.chunk("u" + NOBODY, "0-a")):
        await store.put(name, b"1234")
    assert (await sweep_with(real, store, CHOSEN, remove=True)).seen == 0
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + OLD)
    assert (await sweep_with(real, store, CHOSEN, remove=True)).orphans == 2
    assert await names(store) == {keys.image(post)}


async def test_the_command_prints_and_removes_what_nobody_owns(embedded, tmp_path):
    embedded.client.flushall()
    store = objects.open_store((tmp_path / "store").as_uri())
    name = await put(store, tmp_path, keys.image(NOBODY))
    redis = {"IMAGEGRAM_REDIS_URL": embedded.url, "IMAGEGRAM_QUEUE_URL": embedded.queue.url}
    environment = {"IMAGEGRAM_DATA": str(tmp_path), **redis}

    def run(*options: str, **changed: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "storage", "sweep", *options]
        return subprocess.run(command, cwd=ROOT, env={**environment, **changed}, capture_output=True, text=True)

    counts = "nobody owns 1 of 1 objects older than a day (4 bytes); 0 more are kept, because a backup may name them"
    assert run("--dry-run").stdout == f"found: {counts}: {name}\n"
    assert await names(store) == {name}
    assert run().stdout == f"removed: {counts}: {name}\n"
    assert await names(store) == set()
    await put(store, tmp_path, name)
    unreachable = run(IMAGEGRAM_REDIS_URL="unix:///nowhere.sock")
    assert unreachable.returncode == 1 and unreachable.stderr.startswith("unreachable: ")
    assert await names(store) == {name}
