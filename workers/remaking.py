"""`imagegram-worker remake`: makes the JPEGs of older versions again, while the site goes on.

It takes the ready posts without `image.scans`, one after the other. The steps of a post, in this order:

| step | if the command is killed after it |
|---|---|
| create the picture from the original, in the sandbox | nothing has changed |
| store the old JPEG once more | it is dated now, and the sweep leaves it for a day |
| store the new JPEG under its own name | no post names it. The next run replaces it |
| publish: the post names the new JPEG | the post is done. The next run leaves it out |

So nothing is lost, and the same command continues. Several may run at once, and waste time only. Users do not wait:
one picture is made at a time, at the lowest priority, and none while a user waits for an image.

A post whose original is missing or cannot be converted keeps its JPEG. The old JPEG stays under its address, because
clients may have a part of it, or a page that names it. `imagegram-storage sweep` removes it.
"""

import asyncio
import logging
import os
import sys
import tempfile
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from redis.exceptions import ResponseError

from storage import gauges, keys, originals, outbox, posts
from storage.check import Report, scan, well_formed_keys
from storage.db.client import Redis
from storage.db.cluster import connect
from storage.errors import NoPost, Refusal
from storage.metrics import OLDEST
from storage.objects import NotFound, ObjectStore, Unavailable, open_store
from storage.progress import Progress
from storage.settings import Settings
from workers import sandbox
from workers.errors import Unusable

PAUSE = 0.2  # seconds between two looks whether users still wait for an image
NICE = 19  # the lowest priority. Converters have 10

log = logging.getLogger("imagegram.worker")


def main(chosen: Settings) -> None:
    """Makes all old JPEGs again and prints how many. Raises SystemExit where Redis or the store does not answer."""
    os.nice(NICE)  # before the fork server of decoders is started, which inherits it
    try:
        made, kept = asyncio.run(remake(chosen))
    except (Refusal, Unavailable, OSError) as error:  # OSError: the folder for temporary files is full
        sys.exit(f"{type(error).__name__.lower()}: {error}; the same command again continues")
    except KeyboardInterrupt:
        sys.exit("stopped before the command was complete; the same command again continues")
    finally:
        sandbox.stop()
    print(f"{made} JPEGs were made again; {kept} posts keep their old one, see the log")


async def remake(chosen: Settings) -> tuple[int, int]:
    """Returns how many JPEGs were made again, and how many posts keep their old one. Raises Refusal, Unavailable."""
    db, objects = connect(chosen.redis_url, chosen.replicas), open_store(chosen.store_url)
    made = kept = 0
    try:
        total = len([post async for post in old_posts(db)])
        with Progress() as progress:
            async for post in old_posts(db):
                await wait_for_users(db, chosen.partitions)
                try:
                    made += await remake_one(chosen, db, objects, post)
                except (Unusable, ChildProcessError, NotFound) as fault:
                    if isinstance(fault, NotFound):
                        await objects.ping()  # raises Unavailable where the whole store is missing
                    kept += 1
                    log.warning("%s keeps its old JPEG: %s", post, fault)
                progress.show("JPEGs", made + kept, total)
    finally:
        await db.close()
    return made, kept


async def old_posts(db: Redis) -> AsyncIterator[str]:
    """Yields the ids of ready posts whose JPEG an older version has made. Some may be yielded twice."""
    async for names in scan(db):
        found = [keys.parts(name) for name in well_formed_keys(names, Report())]
        for post in [rest for kind, _, rest in found if kind == "post"]:
            if await is_old(db, post):
                yield post


async def is_old(db: Redis, post: str) -> bool:
    """Whether an older version has made the post's JPEG. False where the post is not ready, or cannot be read."""
    try:
        image = (await posts.read(db, post)).image
    except (NoPost, ResponseError, ValueError):  # malformed: `imagegram-storage check` reports it
        return False
    return image is not None and not image.scans


async def wait_for_users(db: Redis, partitions: int) -> None:
    """Returns once no user waits for an image."""
    # The age of the oldest image that waits, not the number of users: a user stays there for a while without images.
    while (OLDEST, ("images",), 0) not in await gauges.work(db, partitions):
        await asyncio.sleep(PAUSE)


async def remake_one(chosen: Settings, db: Redis, objects: ObjectStore, post: str) -> bool:
    """Makes one JPEG again. Returns False where the post is not old any more, or was deleted or hidden meanwhile.

    Raises NotFound where the original is missing, Unusable and ChildProcessError where it cannot be converted, and
    Unavailable, Full, Unreachable and Unknown.
    """
    if not await is_old(db, post):
        return False
    with tempfile.TemporaryDirectory(prefix="imagegram-") as folder:
        path = Path(folder, "original")
        with path.open("wb") as copy:
            await originals.store(db, objects, post, None, copy)
        picture = sandbox.convert(path, chosen)
    with suppress(NotFound):  # then there is nothing to leave
        await posts.put_image(objects, post, await posts.image(objects, post))
    await posts.put_image(objects, post, picture.jpeg, keys.IMAGE_VERSIONS)
    thumbhash = b64encode(picture.thumbhash).decode()
    try:
        await outbox.publish(db, post, thumbhash, picture.scans, keys.IMAGE_VERSIONS)
    except NoPost:
        await posts.erase_image(objects, post)
        return False
    return True
