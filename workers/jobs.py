"""The job that RQ runs in a fork of its own: one attempt at one post's image.

| state | set by | `status`, `attempt` of the post | score in `making` | then |
|---|---|---|---|---|
| leased | dispatcher: `outbox.lease_images` | processing, n | now + LEASE_MS | a hint in RQ's queue |
| started | job: `outbox.start_image` | processing, n + 1 | now + LEASE_MS x 2^n | one of the next four states |
| published | job: `outbox.publish` | ready, none | removed | the upload's chunks are erased |
| failed | job: `outbox.fail` | failed, n + 1 | removed | a late JPEG is erased |
| returned | job: `outbox.return_image` | processing, n | unchanged | leased again at that time |
| died | nothing: job or decoder was killed | processing, n + 1 | unchanged | leased again at that time |
| exhausted | `outbox.start_image`, if n is ATTEMPTS | failed, n | removed | a late JPEG is erased |

The score is a time, in ms since 1970. It is the end of the lease and also names the lease. If no job starts until then,
the post is leased again.

A post that a restore brought back without its JPEG passes through the same states. Its status is ready from the
beginning, so it is never failed, and its attempts are not limited.

A job may run twice, one run after the other or both at once. The outbox decides which attempt counts, and both create
the same bytes. A failure that is not the image's fault returns the attempt, so that it does not count.
"""

import asyncio
import logging
import tempfile
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable
from pathlib import Path

from storage import keys, logs, metrics, originals, outbox, posts, settings, traces
from storage.db.client import Redis
from storage.db.cluster import connect
from storage.errors import NoPost, Stale, Unknown, Unreachable
from storage.objects import NotFound, ObjectStore, Unavailable, open_store
from storage.settings import Settings
from workers.errors import Unusable
from workers.pipeline import Picture
from workers.sandbox import convert

log = logging.getLogger("imagegram.worker")

# What the log and the metrics say of a job. EXHAUSTED is the fifth outcome. DIED: by an error that the log has, too
READY, FAILED, RETURNED, SKIPPED, DIED = "ready", "failed", "returned", "skipped", "died"
for _outcome in (READY, FAILED, RETURNED, SKIPPED, DIED, outbox.EXHAUSTED):
    metrics.IMAGES.series(_outcome)  # from the beginning, so that the first one is an increase, too
RETRY_PAUSE = 1.0  # seconds between two calls of a Redis that is unreachable
# Failures that are not the image's fault: of the store, of this machine's disk, of Redis, or a timeout while the job
# waited for one of them (RQ's timeout arrives there as a cancellation).
NOT_THE_IMAGE = (Unavailable, Unreachable, Unknown, OSError, asyncio.CancelledError)


def make_image(post: str, lease: int) -> None:
    """Stores a post's original, creates its JPEG and publishes the post. RQ calls it with the arguments of a hint.

    `post`: its id. `lease`: the lease it was handed out under, ms since 1970.

    Raises ChildProcessError where the decoder died, and NotFound where neither the original nor all chunks are stored;
    both use up the attempt. Raises Unreachable or Unknown where Redis does not answer at the start. Other failures that
    are not the image's are logged, and the attempt is returned.
    """
    asyncio.run(_attempt(post, lease))


async def _attempt(post: str, lease: int) -> None:
    chosen = settings.load()
    db, objects = connect(chosen.redis_url, chosen.replicas), open_store(chosen.store_url)
    began, attempt, outcome = time.monotonic(), 0, DIED
    try:
        attempt, upload = await outbox.start_image(db, post, lease)
        outcome = await _run(chosen, db, objects, post, attempt, upload) if attempt else outbox.EXHAUSTED
    except (NoPost, Stale) as refusal:
        outcome = SKIPPED
        log.info("image of %s: skipped, %s", post, refusal)
    finally:
        await db.close()
        metrics.IMAGES.series(outcome).add()
        traces.tell_outcome(outcome)
        if chosen.log == "json":
            ms = round((time.monotonic() - began) * 1000)
            line = {"post": post, "attempt": attempt, "outcome": outcome, "ms": ms}
            logs.write({"level": "INFO", "logger": "imagegram.job", **line})


async def _run(chosen: Settings, db: Redis, objects: ObjectStore, post: str, attempt: int, upload: str | None) -> str:
    """Runs an attempt that has started, and returns its outcome: READY, FAILED or RETURNED.

    The attempt is returned where it fails for a reason that is not the image's.
    """
    try:
        version = 1 if upload else await posts.next_version(db, post)
        if attempt > 1 and await posts.has_image(objects, post, version):
            # An earlier attempt stored the picture, and only publishing failed. So no earlier attempt counts.
            await outbox.return_image(db, post, attempt, 1)
            attempt = 1
        picture = await _create_picture(chosen, db, objects, post, attempt, upload)
        if not picture:
            return FAILED
        await _publish(db, objects, post, picture, version)
        if upload:  # otherwise a restore has brought the post back without its JPEG
            metrics.READY_AFTER.observe(time.time() - keys.created_ms(post) / 1000)
        return READY
    except ChildProcessError:  # the decoder died, maybe of this image. It is a subclass of OSError
        raise
    except NOT_THE_IMAGE as fault:
        await _retry_until_answered(outbox.return_image, db, post, attempt, attempt - 1)
        log.warning("image of %s: attempt returned, %r", post, fault)
        return RETURNED


async def _retry_until_answered(call: Callable[..., Awaitable[None]], *arguments) -> None:
    """Repeats a call of Redis until it is answered. The call must be safe to repeat. RQ's timeout ends this at last."""
    while True:
        try:
            return await call(*arguments)
        except (Unreachable, Unknown):
            await asyncio.sleep(RETRY_PAUSE)


async def _create_picture(
    chosen: Settings, db: Redis, objects: ObjectStore, post: str, attempt: int, upload: str | None
) -> Picture | None:
    """Stores the original and creates its picture. Returns None where the image is at fault: the post is failed then.

    `upload`: id of the post's upload; None where its original is stored already and its upload is gone.
    """
    with tempfile.TemporaryDirectory(prefix="imagegram-") as folder:
        path = Path(folder, "original")
        try:
            with path.open("wb") as copy:
                await originals.store(db, objects, post, upload, copy)
        except NotFound:
            await objects.ping()  # raises Unavailable where the whole store is missing, not only this object
            raise
        try:
            return convert(path, chosen)
        except Unusable as fault:
            log.info("image of %s: failed, %s%s", post, fault, f" ({fault.cause})" if fault.cause else "")
            await _retry_until_answered(outbox.fail, db, post, attempt, fault.code, fault.detail)
            return None


async def _publish(db: Redis, objects: ObjectStore, post: str, picture: Picture, version: int) -> None:
    """Stores the JPEG, then publishes the post. Erases the JPEG where the post is deleted or failed meanwhile."""
    await posts.put_image(objects, post, picture.jpeg, version)
    try:
        thumbhash = b64encode(picture.thumbhash).decode()
        await _retry_until_answered(outbox.publish, db, post, thumbhash, picture.scans, version)
    except (NoPost, Stale):
        await posts.erase_image(objects, post)
        raise
