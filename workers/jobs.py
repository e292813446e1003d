"""The job that RQ runs in a fork of its own: one attempt at one post's image.

The job may run twice, at the same time or again: the outbox decides which attempt counts, and both make the same bytes.
A failure that is not the image's fault uses up no attempt. The lease then brings the post back.
"""

import asyncio
import logging
import tempfile
from base64 import b64encode
from collections.abc import Awaitable, Callable
from pathlib import Path

from storage import originals, outbox, posts, settings
from storage.db.client import Redis
from storage.errors import NoPost, Stale, Unknown, Unreachable
from storage.objects import NotFound, ObjectStore, Unavailable, open_store
from storage.settings import Settings
from workers.errors import Unusable
from workers.pipeline import Picture
from workers.sandbox import convert

log = logging.getLogger("imagegram.worker")

AGAIN = 1.0  # seconds between two calls of a Redis that is away
# Failures that are not the image's: of the store, of this machine's disk, of Redis, or of time while one of them was
# waited for (RQ's timeout arrives as a cancellation there).
PASSING = (Unavailable, Unreachable, Unknown, OSError, asyncio.CancelledError)


def make_image(post: str, lease: int) -> None:
    """Store a post's original, make its JPEG, show it. `lease` is the one the work was handed out under."""
    asyncio.run(_attempt(post, lease))


async def _attempt(post: str, lease: int) -> None:
    chosen = settings.load()
    db, objects = Redis(chosen.redis_url), open_store(chosen.store_url)
    try:
        attempt, upload = await outbox.start_image(db, post, lease)
        if attempt:
            await _make(chosen, db, objects, post, attempt, upload)
    except (NoPost, Stale) as refusal:
        log.info("image of %s: left, %s", post, refusal)
    finally:
        await db.close()


async def _make(chosen: Settings, db: Redis, objects: ObjectStore, post: str, attempt: int, upload: str | None) -> None:
    """One attempt, which is taken back if it fails for a reason that passes."""
    try:
        if attempt > 1 and await posts.has_image(objects, post):
            # An earlier attempt made the picture, and only showing it failed.
            await outbox.return_image(db, post, attempt, 1)
            attempt = 1
        picture = await _picture(chosen, db, objects, post, attempt, upload)
        if picture:
            await _show(db, objects, post, picture)
    except ChildProcessError:  # the decoder died, maybe of this image. It is an OSError, too
        raise
    except PASSING as fault:
        await _until_heard(outbox.return_image, db, post, attempt, attempt - 1)
        log.warning("image of %s: waits, %r", post, fault)


async def _until_heard(call: Callable[..., Awaitable[None]], *given) -> None:
    """Repeats a call that may be made twice until Redis answers it; RQ's timeout ends this at the latest."""
    while True:
        try:
            return await call(*given)
        except (Unreachable, Unknown):
            await asyncio.sleep(AGAIN)


async def _picture(
    chosen: Settings, db: Redis, objects: ObjectStore, post: str, attempt: int, upload: str | None
) -> Picture | None:
    """Store the original and make its picture; None where the post has failed for good."""
    with tempfile.TemporaryDirectory(prefix="imagegram-") as folder:
        path = Path(folder, "original")
        try:
            with path.open("wb") as copy:
                await originals.keep(db, objects, post, upload, copy)
        except NotFound:
            await objects.ping()  # raises Unavailable where it is the store that is not there
            raise
        try:
            return convert(path, chosen)
        except Unusable as fault:
            log.info("image of %s: failed, %s%s", post, fault, f" ({fault.cause})" if fault.cause else "")
            await _until_heard(outbox.fail, db, post, attempt, fault.code, fault.detail)
            return None


async def _show(db: Redis, objects: ObjectStore, post: str, picture: Picture) -> None:
    await posts.put_image(objects, post, picture.jpeg)
    try:
        await _until_heard(outbox.publish, db, post, b64encode(picture.thumbhash).decode())
    except (NoPost, Stale):
        await posts.erase_image(objects, post)
        raise
