"""Requests that wait until something changes, instead of asking again and again.

One loop a process asks Redis for all of them, every PAUSE seconds while at least one waits. A request waits for one of
two subjects: a post that is processing, by its id, or changes, by what the client's token has seen. Equal subjects are
asked for once.
"""

import asyncio
from collections.abc import Iterable
from contextvars import Context

from storage import changes, keys
from storage.db.client import Redis
from storage.metrics import WAITING_REQUESTS

PAUSE = 0.1  # seconds between two questions. Those who wait hear of a change after half of it, on average
BATCH = 500  # posts in one call of the script, which keeps it below 0.5 ms

Seen = tuple[tuple[str, int], ...]  # epoch and revision of each partition, as in changes.Token


class Waiting:
    """The requests of this process that wait. `stop` ends all waits, and later ones end at once."""

    def __init__(self, db: Redis, partitions: int):
        self._db, self._partitions = db, partitions
        self._posts: dict[int, dict[str, set[asyncio.Future]]] = {}  # partition → post → who waits for it
        self._changes: dict[Seen, set[asyncio.Future]] = {}
        self._asking: asyncio.Task | None = None
        self._stopped = False

    def __len__(self) -> int:
        """How many requests wait."""
        tables = (self._changes, *self._posts.values())
        return sum(len(futures) for table in tables for futures in table.values())

    async def wait(self, subject: str | Seen, seconds: float) -> None:
        """Wait until the post is no longer processing, or until something has changed; `seconds` at most.

        Returns in both cases: the caller reads again. Raises Unreachable where Redis does not answer meanwhile.
        """
        if self._stopped:
            return
        table = self._changes
        if isinstance(subject, str):
            table = self._posts.setdefault(keys.partition_of_post(subject), {})
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        table.setdefault(subject, set()).add(future)
        timer = loop.call_later(seconds, _resolve, future)  # asyncio.timeout and asyncio.wait take 1 kB more each
        WAITING_REQUESTS.add(1)
        if self._asking is None:
            # Without this request's context: what is asked for all is no part of its trace.
            self._asking = asyncio.create_task(self._ask_while_somebody_waits(), context=Context())
        try:
            await future
        finally:  # also if the client went away, which cancels this task
            timer.cancel()
            WAITING_REQUESTS.add(-1)
            futures = table[subject]
            futures.discard(future)
            if not futures:
                del table[subject]

    def stop(self) -> None:
        """Answer all who wait with what is true now."""
        self._stopped = True
        if self._asking:
            self._asking.cancel()
        for table in (self._changes, *self._posts.values()):
            _wake(table, table)

    async def _ask_while_somebody_waits(self) -> None:
        try:
            while len(self):
                await asyncio.sleep(PAUSE)
                await self._ask()
        finally:
            self._asking = None

    async def _ask(self) -> None:
        """Ask for all subjects, and wake those who wait for a subject that has changed, or that cannot be read."""
        asked = [
            (partition, posts[start : start + BATCH])
            for partition, posts in ((partition, list(table)) for partition, table in self._posts.items())
            for start in range(0, len(posts), BATCH)
        ]
        if self._changes:
            with_posts = {partition for partition, _ in asked}
            asked += [(partition, []) for partition in range(self._partitions) if partition not in with_posts]
        calls = (changes.poll(self._db, partition, posts) for partition, posts in asked)
        replies = await asyncio.gather(*calls, return_exceptions=True)
        newest: dict[int, tuple[str, int]] = {}
        broken: Exception | None = None
        for (partition, posts), reply in zip(asked, replies, strict=True):
            if isinstance(reply, Exception):
                broken = reply
                _wake(self._posts.get(partition, {}), posts, reply)
            else:
                newest[partition] = reply.epoch, reply.revision
                _wake(self._posts.get(partition, {}), reply.processed)
        if broken:
            _wake(self._changes, self._changes, broken)
        else:
            _wake(self._changes, [seen for seen in self._changes if _has_changed(seen, newest)])


def _has_changed(seen: Seen, newest: dict[int, tuple[str, int]]) -> bool:
    """Whether a partition has another epoch or a newer revision than `seen`. A partition that was added later counts
    from its beginning.
    """
    known = dict(enumerate(seen))
    for partition, (epoch, revision) in newest.items():
        known_epoch, known_revision = known.get(partition, (epoch, 0))
        if epoch != known_epoch or revision > known_revision:
            return True
    return False


def _wake(table: dict, subjects: Iterable, error: Exception | None = None) -> None:
    for subject in subjects:
        for future in table.get(subject, ()):
            _resolve(future, error)


def _resolve(future: asyncio.Future, error: Exception | None = None) -> None:
    if future.done():
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(None)
