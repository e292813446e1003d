"""Chunks are put in parallel. The offset passes them in their order, and never passes one that was not stored."""

import asyncio

import pytest
from conftest import connect
from state import unchanged
from uploading import picture

from storage import keys, originals, posts, uploads
from storage.errors import NoUpload, Offset
from storage.objects import Folder, Unavailable
from storage.settings import IMAGE_BYTES, MIB


@pytest.fixture(autouse=True)
def growth(monkeypatch):
    """What this process knows of the store at its start: no chunk is larger than 1 MiB yet."""
    monkeypatch.setattr(uploads, "growth", uploads.Growth())
    return uploads.growth


class Reversed(Folder):
    """A store in which the first large chunk becomes durable only after the second. With `fault` its put fails."""

    def __init__(self, root, fault: bool = False):
        super().__init__(root)
        self.second, self.fault = asyncio.Event(), fault

    async def put(self, name, data):
        begins = int(name.split("/")[-1].split("-")[0])
        if begins == uploads.SMALL_CHUNK:
            await asyncio.wait_for(self.second.wait(), 10)
            if self.fault:
                raise Unavailable("the disk is full")
        await super().put(name, data)
        if begins > uploads.SMALL_CHUNK:
            self.second.set()


async def begin(db, objects, data: bytes) -> uploads.Appender:
    """Opens an upload of this data."""
    upload, _ = await uploads.create(db, "alice", 1, len(data))
    return uploads.Appender(db, objects, upload, 0, len(data))


async def feed(image: uploads.Appender, data: bytes) -> None:
    step = uploads.SMALL_CHUNK
    for begins in range(0, len(data), step):
        await image.write(data[begins : begins + step])
    await image.commit()


async def chunk_objects(objects: Folder, upload: str) -> list[str]:
    """The names of an upload's chunks in the store."""
    return [entry.name.split("/")[-1] async for entry in objects.list(f"chunks/{upload}/")]


async def test_chunks_that_become_durable_in_another_order_are_appended_in_theirs(db, tmp_path):
    objects, data = Reversed(tmp_path), picture(3 * MIB)
    image = await begin(db, objects, data)
    await feed(image, data)
    state = await uploads.inspect(db, image.upload)
    assert state.offset == image.offset == len(data)
    assert b"".join([await objects.get(keys.chunk(image.upload, name)) for name in state.chunks]) == data


async def test_chunks_behind_one_that_could_not_be_stored_are_removed(db, tmp_path):
    objects, data = Reversed(tmp_path, fault=True), picture(3 * MIB)
    image = await begin(db, objects, data)
    with pytest.raises(Unavailable):
        await feed(image, data)
    await image.abandon()
    state = await uploads.inspect(db, image.upload)
    assert state.offset == uploads.SMALL_CHUNK
    assert await chunk_objects(objects, image.upload) == state.chunks


async def test_the_loser_of_two_requests_that_append_at_one_offset_leaves_no_object(db, tmp_path):
    objects, data = Folder(tmp_path), picture(3 * MIB)
    first = await begin(db, objects, data)
    second = uploads.Appender(db, objects, first.upload, 0, len(data))
    results = await asyncio.gather(feed(first, data), feed(second, data), return_exceptions=True)
    assert {type(result) for result in results} == {type(None), Offset}
    await asyncio.gather(first.abandon(), second.abandon())
    state = await uploads.inspect(db, first.upload)
    assert sorted(await chunk_objects(objects, first.upload)) == sorted(state.chunks)
    whole = b"".join([await objects.get(keys.chunk(first.upload, name)) for name in state.chunks])
    assert whole == data[: state.offset]


async def test_a_request_that_resumes_an_upload_whose_bytes_were_deleted_meanwhile_is_refused(
    server, db, tmp_path
):
    """The request has read the offset. Then another request deletes the upload, and with it its first bytes."""
    objects = Folder(tmp_path)
    image = await begin(db, objects, picture(100))
    await image.write(picture(3))
    await image.commit()
    resumed = uploads.Appender(db, objects, image.upload, 3, 100)
    await objects.delete([keys.chunk(image.upload, name) for name in (await uploads.inspect(db, image.upload)).chunks])
    with unchanged(server.client, tmp_path), pytest.raises(NoUpload):
        await resumed.resume()


# Chunks that grow


@pytest.fixture
async def one_db(embedded):
    """One kind of Redis: these tests are about the store."""
    embedded.client.flushall()
    db = connect(embedded)
    yield db
    await db.close()


class Recorder(Folder):
    """A store that counts the bytes it is storing. A put takes `seconds`, and fails once `fault` bytes are stored."""

    def __init__(self, root, seconds: float = 0.0, fault: int = IMAGE_BYTES):
        super().__init__(root)
        self.seconds, self.fault, self.sizes, self.storing, self.most = seconds, fault, [], 0, 0

    async def put(self, name, data):
        size = sum(map(len, data))
        self.storing += size
        self.most = max(self.most, self.storing)
        await asyncio.sleep(self.seconds)
        try:
            if sum(self.sizes) > self.fault:
                raise Unavailable("the disk is full")
            await super().put(name, data)
        finally:
            self.storing -= size
        self.sizes.append(size)


async def send(db, objects, data: bytes, pause: float = 0.0) -> uploads.Appender:
    """Uploads in pieces of 64 KiB, with a pause in each MiB."""
    image = await begin(db, objects, data)
    try:
        for begins in range(0, len(data), uploads.SMALL_CHUNK):
            await image.write(data[begins : begins + uploads.SMALL_CHUNK])
            if pause and begins % MIB == MIB // 2:
                await asyncio.sleep(pause)
        await image.commit()
    except Unavailable:
        await image.abandon()
        raise
    return image


async def test_chunks_of_a_fast_connection_double_up_to_8_mib(one_db, tmp_path, monkeypatch, growth):
    monkeypatch.setattr(uploads, "QUICK_SECONDS", 10)  # this machine may be busy
    monkeypatch.setattr(uploads, "PUT_SECONDS", 10)
    objects = Recorder(tmp_path)
    await send(one_db, objects, picture(5 * MIB))
    assert MIB <= max(objects.sizes) <= 2 * MIB, "nothing is known of the store yet"
    await send(one_db, objects, picture(40 * MIB))
    assert max(objects.sizes) == uploads.LARGE_CHUNK == 8 * MIB
    objects.sizes, data = [], picture(3 * MIB)
    image = await send(one_db, objects, data)
    assert sorted(objects.sizes) == [uploads.SMALL_CHUNK, 3 * MIB - uploads.SMALL_CHUNK]
    state = await uploads.inspect(one_db, image.upload)
    assert b"".join([await objects.get(keys.chunk(image.upload, name)) for name in state.chunks]) == data
    assert growth.free == uploads.GROWN_BYTES


async def test_chunks_stay_small_where_the_connection_needs_longer_than_50_ms_for_1_mib(one_db, tmp_path, growth):
    growth.learn(uploads.LARGE_CHUNK, 0)
    objects = Recorder(tmp_path)
    await send(one_db, objects, picture(3 * MIB), pause=2 * uploads.QUICK_SECONDS)
    assert max(objects.sizes) == MIB


async def test_chunks_do_not_grow_beyond_what_the_store_takes_quickly(one_db, tmp_path, monkeypatch, growth):
    monkeypatch.setattr(uploads, "QUICK_SECONDS", 10)
    monkeypatch.setattr(uploads, "PUT_SECONDS", 0.01)
    growth.learn(uploads.LARGE_CHUNK, 0)
    objects = Recorder(tmp_path, seconds=0.02)
    await send(one_db, objects, picture(40 * MIB))
    assert max(objects.sizes) == uploads.LARGE_CHUNK, "until the first put was slow"
    assert max(objects.sizes[5:]) == MIB
    objects.sizes, objects.seconds, objects.fault = [], 0.0, -1
    growth.learn(uploads.LARGE_CHUNK, 0)
    with pytest.raises(Unavailable):
        await send(one_db, objects, picture(4 * MIB))
    assert growth.largest == uploads.CHUNK


async def test_the_memory_by_which_all_chunks_may_grow_is_shared_and_given_back(one_db, tmp_path, monkeypatch, growth):
    monkeypatch.setattr(uploads, "QUICK_SECONDS", 10)
    growth.learn(uploads.LARGE_CHUNK, 0)
    objects = Recorder(tmp_path, seconds=0.05, fault=48 * MIB)
    monkeypatch.setattr(growth, "learn", lambda *_: None)
    sending = [send(one_db, objects, picture(12 * MIB)) for _ in range(8)]
    outcomes = await asyncio.gather(*sending, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {uploads.Appender, Unavailable}
    assert uploads.LARGE_CHUNK < objects.most <= uploads.GROWN_BYTES + 8 * uploads.PARALLEL_PUTS * uploads.CHUNK
    await asyncio.sleep(0)
    assert growth.free == uploads.GROWN_BYTES


class Stream(Folder):
    """A store that records the sizes of the pieces that a stream has."""

    def __init__(self, root):
        super().__init__(root)
        self.pieces = []

    async def put(self, name, data):
        async def recorded():
            async for piece in data:
                self.pieces.append(len(piece))
                yield piece

        await super().put(name, data if isinstance(data, list) else recorded())


async def test_a_worker_joins_large_chunks_in_pieces_of_1_mib(one_db, tmp_path, monkeypatch, growth):
    """So its memory does not depend on the size of the chunks."""
    monkeypatch.setattr(uploads, "QUICK_SECONDS", 10)
    growth.learn(uploads.LARGE_CHUNK, 0)
    objects, data = Stream(tmp_path), picture(9 * MIB)
    image = await send(one_db, objects, data)
    assert len(await chunk_objects(objects, image.upload)) == 3
    post, _ = await posts.create(one_db, "alice", image.upload, "")
    with (tmp_path / "copy").open("w+b") as copy:
        await originals.store(one_db, objects, post, image.upload, copy)
    assert await objects.get(keys.original(post)) == data == (tmp_path / "copy").read_bytes()
    assert max(objects.pieces) == MIB
