"""`imagegram-storage retry`: gives failed posts new attempts at their image.

It is for the time after an outage or a fault of the workers, which may have used up the attempts of good images. It
takes only posts that failed as `exhausted`. A post that failed because of the image itself stays failed.
"""

import asyncio

from storage import keys
from storage.check import Report, scan, well_formed_keys
from storage.db.client import Redis
from storage.outbox import EXHAUSTED


async def retry(db: Redis) -> int:
    """Put every post that failed as `exhausted` back into its author's image work, with all attempts.

    Returns the number of such posts. Raises Unreachable, and Unknown where the reply to a write was lost.
    """
    count = 0
    async for names in scan(db):
        posts = [keys.parts(name)[2] for name in well_formed_keys(names, Report()) if keys.parts(name)[0] == "post"]
        count += sum(await asyncio.gather(*(_retry(db, post) for post in posts)))
    return count


async def _retry(db: Redis, post: str) -> int:
    partition = keys.partition_of_post(post)
    script_keys = [keys.post(post), keys.turns(partition)]
    return await db.call("retry_post", script_keys, db.clock, post, EXHAUSTED, keys.making_prefix(partition))
