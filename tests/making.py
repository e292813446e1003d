"""Creates uploads, posts and images that tests start from, by the same calls that the API and the worker make."""

import asyncio
import io
import time

from PIL import BmpImagePlugin, Image, PngImagePlugin  # noqa: F401  the pipeline loads neither

from storage import comments, keys, outbox, posts, sealing, uploads
from storage.db.client import Redis
from storage.segments import Segments
from storage.settings import CHUNKS, DAY_MS

# For tests in which all comments are in Redis: there is no store, and to read a segment fails.
NO_SEGMENTS = Segments(None)


async def make_upload(db: Redis, owner: str, partitions: int = 1, size: int = 10) -> str:
    """Creates an upload of one chunk that has no bytes in the store, for tests that never read them. Returns its id."""
    upload, _ = await uploads.create(db, owner, partitions)
    named = [keys.upload(upload), keys.chunks(upload), keys.due(keys.partition_of_upload(upload))]
    await db.call("append_chunk", named, db.clock, upload, 0, size, keys.chunk_name(0), DAY_MS, size, CHUNKS)
    return upload


async def make_processing(db: Redis, author: str, partitions: int = 1, caption: str = "") -> str:
    """Creates a post that is processing. Returns its id, which is less than the id of a post that is made after it."""
    upload = await make_upload(db, author, partitions)
    post, _ = await posts.create(db, author, upload, caption)
    while keys.created_ms(post) >= time.time_ns() // 1_000_000:  # ids of one millisecond are in no order
        await asyncio.sleep(0)
    return post


async def make_post(db: Redis, author: str, partitions: int = 1, caption: str = "") -> str:
    """Creates a post that is ready and has no image in the store, for tests that never read it. Returns its id."""
    post = await make_processing(db, author, partitions, caption)
    await outbox.publish(db, post, "thumbhash")
    return post


async def publish(db, store, author: str, comment_count: int = 0, partitions: int = 1) -> str:
    """Creates a ready post with its original, its JPEG and comments by bob. Returns its id."""
    post = await make_processing(db, author, partitions)
    await store.put(keys.original(post), png())
    await posts.put_image(store, post, jpeg())
    await outbox.publish(db, post, "thumbhash")
    for number in range(comment_count):
        await comments.add(db, "bob", post, f"{number} / \\ \" é")
    return post


async def seal(db, store, post: str, hot: int = 0) -> None:
    """Moves all comments of a post to the store but the newest `hot`, and takes the deleted ones out of its segments.

    It is done at once, as if the post had not changed for long.
    """
    quiet_ms = DAY_MS if hot else -DAY_MS
    while await sealing.step(db, Segments(store), post, hot, quiet_ms, 31 * DAY_MS):
        pass


def jpeg(width: int = 640, height: int = 480, colour: str = "teal") -> bytes:
    return encode_image("JPEG", width, height, colour)


def png(width: int = 320, height: int = 200, colour: str = "tomato") -> bytes:
    return encode_image("PNG", width, height, colour)


def bmp(width: int = 200, height: int = 320, colour: str = "gold") -> bytes:
    return encode_image("BMP", width, height, colour)


def encode_image(file_format: str, width: int, height: int, colour: str) -> bytes:
    """An image of one colour, in any format that Pillow can write and whose plugin is loaded."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, file_format)
    return file.getvalue()
