"""Chunks are put in parallel. The offset passes them in their order, and never passes one that was not stored."""

import asyncio

import pytest
from state import unchanged
from uploading import picture

from storage import keys, uploads
from storage.errors import NoUpload, Offset
from storage.objects import Folder, Unavailable
from storage.settings import MIB


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
