"""`imagegram-worker remake`: old posts get a JPEG with scans under a new address, whatever is killed meanwhile."""

import asyncio
import os
import subprocess
import sys
import threading

import httpx
import pytest
from conftest import ROOT, connect, photograph, until
from drills.images import working
from making import jpeg, make_processing, png

from storage import check, keys, outbox, posts, settings, sweep
from storage.objects import Unavailable, open_store
from storage.settings import LEASE_MS
from workers import remaking, scans


@pytest.fixture
def server(embedded):
    embedded.client.flushall()
    return embedded


@pytest.fixture
async def db(server, tmp_path, monkeypatch):
    """storage's client. `settings.load` finds its Redis, and a store in the folder of the test."""
    monkeypatch.setenv("IMAGEGRAM_REDIS_URL", server.url)
    monkeypatch.setenv("IMAGEGRAM_DATA", str(tmp_path))
    db = connect(server)
    yield db
    await db.close()


@pytest.fixture
def store(tmp_path):
    return open_store((tmp_path / "store").as_uri())


async def make_old(db, store, original: bytes | None = None) -> str:
    """Creates a post of an older version, which stored no scans. Returns its id."""
    post = await make_processing(db, "alice")
    await store.put(keys.original(post), photograph() if original is None else original)
    await posts.put_image(store, post, jpeg())
    await outbox.publish(db, post, "thumbhash")
    return post


async def assert_sound(db, store) -> None:
    report = await check.check(db, store)
    assert not report.flaws, report.lines


async def test_an_old_post_gets_scans_and_a_new_address_and_the_old_one_keeps_its_bytes(server, db, store):
    old, new = await make_old(db, store), await make_old(db, store, png())
    await outbox.publish(db, new, "thumbhash", (10, len(jpeg())))
    before, revision = await posts.read(db, new), server.client.zscore(keys.changes(0), old)
    assert await remaking.remake(settings.load()) == (1, 0)
    image = (await posts.read(db, old)).image
    made = await posts.image(store, old, 2)
    assert image.version == 2 and image.scans == scans.looks(made) and made != jpeg()
    assert await posts.image(store, old) == jpeg(), "clients may have a part of it"
    assert await store.get(keys.original(old)) == photograph()
    assert server.client.zscore(keys.changes(0), old) > revision
    assert await posts.read(db, new) == before and not await posts.has_image(store, new, 2)
    await assert_sound(db, store)
    assert await remaking.remake(settings.load()) == (0, 0)


@pytest.mark.parametrize("fault", ["damaged", "missing"])
async def test_a_post_whose_original_cannot_be_converted_keeps_its_jpeg_and_does_not_stop_the_others(db, store, fault):
    bad, good = await make_old(db, store, jpeg()[:300]), await make_old(db, store)
    if fault == "missing":
        await store.delete([keys.original(bad)])
    assert await remaking.remake(settings.load()) == (1, 1)
    assert (await posts.read(db, bad)).image == posts.Image("thumbhash")
    assert (await posts.read(db, good)).image.version == 2
    assert await posts.image(store, bad) == jpeg() and not await posts.has_image(store, bad, 2)


async def test_posts_that_are_malformed_do_not_stop_the_others(server, db, store):
    """A foreign client wrote them."""
    wrong_type, not_json, good = [await make_old(db, store) for _ in range(3)]
    server.client.set(keys.latest(wrong_type), "x")
    server.client.hdel(keys.post(not_json), "caption")
    server.client.lpush(keys.latest(not_json), "x")
    assert await remaking.remake(settings.load()) == (1, 0)
    assert (await posts.read(db, good)).image.version == 2


@pytest.mark.parametrize("event", ["delete", "hide"])
async def test_a_post_that_goes_while_its_jpeg_is_made_leaves_none_behind(server, db, store, event, monkeypatch):
    post = await make_old(db, store)
    convert = remaking.sandbox.convert

    def convert_late(path, chosen):
        picture = convert(path, chosen)

        async def go():
            other = connect(server)
            await (posts.delete(other, store, "alice", post) if event == "delete" else posts.hide(other, post))
            await other.close()

        thread = threading.Thread(target=lambda: asyncio.run(go()))
        thread.start()
        thread.join()
        return picture

    monkeypatch.setattr(remaking.sandbox, "convert", convert_late)
    assert await remaking.remake(settings.load()) == (0, 0)
    assert [entry.name async for entry in store.list("images/")] == []


async def test_the_jpeg_of_an_old_address_is_swept_a_day_after_it_was_replaced(server, db, store, tmp_path):
    post = await make_old(db, store)
    names = keys.images(post)
    paths = [tmp_path / "store" / name for name in names]

    async def removed(*days: float) -> int:
        for path, old in zip(paths, days, strict=False):
            stamp = path.stat().st_mtime - old * sweep.DAY
            os.utime(path, (stamp, stamp))
        return (await sweep.sweep(db, store, never, 31 * 86_400_000, remove=True)).orphans

    assert await removed(9) == 0
    assert await remaking.remake(settings.load()) == (1, 0)
    assert await removed(0.9, 0.9) == 0, "it was stored again when it was replaced"
    assert await removed(1, 1) == 1
    assert [path.exists() for path in paths] == [False, True]
    await assert_sound(db, store)


async def never(_ms: int) -> bool:
    return False


async def test_no_jpeg_is_made_again_while_a_user_waits_for_an_image(server, db, store):
    old, waiting = await make_old(db, store), await make_processing(db, "bob")
    server.client.zincrby(keys.making(0, "bob"), -LEASE_MS, waiting)  # it has waited for long
    running = asyncio.create_task(remaking.remake(settings.load()))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(running), 5 * remaking.PAUSE)
    assert not await posts.has_image(store, old, 2)
    await outbox.publish(db, waiting, "thumbhash", (1420,))
    assert await running == (1, 0)


async def test_a_store_that_disappears_ends_the_command(server, db, store, tmp_path):
    old, waiting = await make_old(db, store), await make_processing(db, "bob")
    server.client.zincrby(keys.making(0, "bob"), -LEASE_MS, waiting)
    running = asyncio.create_task(remaking.remake(settings.load()))
    await asyncio.wait([running], timeout=3 * remaking.PAUSE)  # it has opened the store, and waits for bob
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    await outbox.publish(db, waiting, "thumbhash", (1420,))
    with pytest.raises(Unavailable):
        await running
    assert (await posts.read(db, old)).image == posts.Image("thumbhash")


def test_kills_lose_nothing_and_the_same_command_continues():
    with working() as site:
        store = open_store((site.folder / "store").as_uri())

        def run(work):
            async def call():
                client = connect(site.server)
                result = await work(client, store)
                await client.close()
                return result

            return asyncio.run(call())

        async def create(client, store) -> list[str]:
            return [await make_old(client, store) for _ in range(6)]

        async def versions(client, _store) -> list[int]:
            return [(await posts.read(client, post)).image.version for post in made]

        made = run(create)
        command = [sys.executable, "-m", "workers", "remake"]
        for enough in (1, 3):
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ | site.environment, stderr=-1)
            try:
                until(lambda enough=enough: run(versions).count(2) >= enough, what="a JPEG that was made again")
                if enough == 3:
                    site.server.kill()
                    assert b"the same command again continues" in process.communicate(timeout=60)[1]
                    site.server.start()
            finally:
                process.kill()
                process.communicate()
            run(assert_sound)
        ended = subprocess.run(command, cwd=ROOT, env=os.environ | site.environment, check=True, stdout=-1)
        assert b"0 posts keep their old one" in ended.stdout
        assert run(versions) == [2] * 6
        run(assert_sound)


def test_an_old_address_serves_the_old_bytes_and_later_leads_to_the_new_ones(serving):
    """`serving` has an API and no worker."""

    async def prepare(step: str) -> str:
        client, store = connect(serving.server), serving.open_store()
        post = serving.post if step != "create" else await make_old(client, store)
        if step == "remake":
            await posts.put_image(store, post, photograph(), 2)
            await outbox.publish(client, post, "thumbhash", (100, len(photograph())), 2)
        if step == "sweep":
            await store.delete([keys.image(post)])
        await client.close()
        return post

    serving.post = asyncio.run(prepare("create"))
    with httpx.Client(base_url=serving.url) as client:

        def address() -> str:
            return client.get(f"/v1/posts/{serving.post}").json()["image"]["url"]

        old = address()
        first = client.get(old, headers={"Range": "bytes=0-99"})
        asyncio.run(prepare("remake"))
        new = address()
        assert new == old.replace(".jpg", ".2.jpg")
        resume = {"Range": "bytes=100-", "If-Range": first.headers["ETag"]}
        rest = client.get(old, headers=resume)
        assert first.content + rest.content == jpeg() and rest.status_code == 206
        assert client.get(new).content == photograph()
        assert client.get(new).headers["ETag"] not in (first.headers["ETag"], None)
        asyncio.run(prepare("sweep"))
        moved = client.get(old, headers=resume)
        assert (moved.status_code, moved.headers["Location"]) == (307, new)
        assert moved.headers["Cache-Control"] == "no-cache"
        assert moved.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
        whole = client.get(old, headers=resume, follow_redirects=True)
        assert (whole.status_code, whole.content) == (200, photograph()), "not the end of another file"
        for wrong in (".1", ".02", ".3", ".2.2", "."):
            refused = client.get(old.replace(".jpg", f"{wrong}.jpg"))
            assert (refused.status_code, refused.json()["detail"]) == (404, "no such post")
