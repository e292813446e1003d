"""`imagegram-storage retry`: hands out posts again whose image could not be made for reasons that have passed.

For use after an outage or a fault of the workers. A post whose image itself is the reason stays failed.
"""

import asyncio

from storage import keys
from storage.check import Report, scan, well_formed_keys
from storage.db.client import Redis
from storage.outbox import EXHAUSTED


async def retry(db: Redis) -> int:
    """Puts every post that failed as `exhausted` back among its author's image work, with all its attempts.

    Returns their number. Raises Unreachable, Unknown.
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
