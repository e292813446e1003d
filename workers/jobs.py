"""The job that RQ runs in a fork of its own: one attempt at one post's image.

Right when run twice, at the same time or again: the outbox decides which attempt counts, and both make the same bytes.
An error that may pass is left to RQ's log; the lease brings the post back.
"""

import asyncio
import tempfile
from base64 import b64encode
from pathlib import Path

from storage import originals, outbox, posts, settings
from storage.errors import NoPost, Stale
from storage.objects import S3, Folder, open_store
from storage.scripts import Redis
from storage.settings import Settings
from workers.pipeline import Picture, Unusable
from workers.sandbox import convert


def make_image(post: str, lease: int) -> None:
    """Store a post's original, make its JPEG, show it. `lease` is the one the work was handed out under."""
    asyncio.run(_attempt(post, lease))


async def _attempt(post: str, lease: int) -> None:
    chosen = settings.load()
    db, objects = Redis(chosen.redis_url), open_store(chosen.store_url)
    try:
        attempt, upload = await outbox.start_image(db, post, lease)
        if attempt:
            picture = await _picture(chosen, db, objects, post, attempt, upload)
            if picture:
                await _show(db, objects, post, picture)
    except (NoPost, Stale) as refusal:
        print(f"image of {post}: left, {refusal}", flush=True)
    finally:
        await db.close()


async def _picture(
    chosen: Settings, db: Redis, objects: Folder | S3, post: str, attempt: int, upload: str | None
) -> Picture | None:
    """Store the original and make its picture; None where the post has failed for good."""
    with tempfile.TemporaryDirectory(prefix="imagegram-") as folder:
        path = Path(folder, "original")
        with path.open("wb") as copy:
            await originals.keep(db, objects, post, upload, copy)
        try:
            return convert(path, chosen)
        except Unusable as fault:
            await outbox.fail(db, post, attempt, fault.code, fault.detail)
            return None


async def _show(db: Redis, objects: Folder | S3, post: str, picture: Picture) -> None:
    await posts.put_image(objects, post, picture.jpeg)
    try:
        await outbox.publish(db, post, b64encode(picture.thumbhash).decode())
    except (NoPost, Stale):
        await posts.erase_image(objects, post)
        raise
