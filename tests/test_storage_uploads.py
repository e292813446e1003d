"""Chunks are put side by side; the offset moves over them in their order, and over none that was refused."""

import asyncio

import pytest
from uploading import picture

from storage import keys, uploads
from storage.errors import NoUpload, Offset
from storage.objects import Folder, Unavailable
from storage.settings import MIB


class Reversed(Folder):
    """The first large chunk is durable only after the second."""

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


async def appender(db, objects, data: bytes) -> uploads.Appender:
    upload, _ = await uploads.create(db, "alice", 1, len(data))
    return uploads.Appender(db, objects, upload, 0, len(data))


async def feed(image: uploads.Appender, data: bytes) -> None:
    step = uploads.SMALL_CHUNK
    for begins in range(0, len(data), step):
        await image.write(data[begins : begins + step])
    await image.commit()


async def kept(objects: Folder, upload: str) -> list[str]:
    return [entry.name.split("/")[-1] async for entry in objects.list(f"chunks/{upload}/")]


async def test_a_chunk_that_is_durable_before_the_one_in_front_of_it_waits_for_that(db, tmp_path):
    objects, data = Reversed(tmp_path), picture(3 * MIB)
    image = await appender(db, objects, data)
    await feed(image, data)
    found = await uploads.inspect(db, image.upload)
    assert found.offset == image.offset == len(data)
    assert b"".join([await objects.get(keys.chunk(image.upload, name)) for name in found.chunks]) == data


async def test_what_follows_a_chunk_that_could_not_be_put_is_taken_back(db, tmp_path):
    objects, data = Reversed(tmp_path, fault=True), picture(3 * MIB)
    image = await appender(db, objects, data)
    with pytest.raises(Unavailable):
        await feed(image, data)
    await image.abandon()
    found = await uploads.inspect(db, image.upload)
    assert found.offset == uploads.SMALL_CHUNK
    assert await kept(objects, image.upload) == found.chunks


async def test_of_two_that_append_at_one_offset_the_loser_leaves_no_object(db, tmp_path):
    objects, data = Folder(tmp_path), picture(3 * MIB)
    first = await appender(db, objects, data)
    second = uploads.Appender(db, objects, first.upload, 0, len(data))
    results = await asyncio.gather(feed(first, data), feed(second, data), return_exceptions=True)
    assert sorted(map(type, results), key=str) == [type(None), Offset] or set(map(type, results)) == {Offset}
    await asyncio.gather(first.abandon(), second.abandon())
    found = await uploads.inspect(db, first.upload)
    assert sorted(await kept(objects, first.upload)) == sorted(found.chunks)


async def test_an_upload_that_is_deleted_while_a_request_resumes_it_is_gone(db, tmp_path):
    """The request has read the offset; then another deletes the upload, and with it the first bytes."""
    objects = Folder(tmp_path)
    image = await appender(db, objects, picture(100))
    await image.write(picture(3))
    await image.commit()
    resumed = uploads.Appender(db, objects, image.upload, 3, 100)
    await objects.delete([keys.chunk(image.upload, name) for name in (await uploads.inspect(db, image.upload)).chunks])
    with pytest.raises(NoUpload):
        await resumed.resume()
