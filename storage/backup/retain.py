"""Which backups are kept: every second of the last day, then one base a day for a month.

Nothing is removed before a generation was restored on trial (`verify`), and from then on nothing of that
generation or of a newer one: whatever is wrong with those, the last one known to be good is there.
"""

import time
from collections.abc import Mapping

from storage.backup import chain, verify
from storage.backup.aof import Damaged
from storage.objects import NotFound, ObjectStore, Unavailable
from storage.settings import Settings

DAY = 86400
REFRESH = 60.0  # seconds. Over S3 the descriptions of a month take a second, in which no image is handed out
# A base holds the state in which its rewrite began; its `second` is that of its last byte, for 10 GiB minutes later.
LONGEST_REWRITE_MS = 3_600_000


async def remove_old(store: ObjectStore, settings: Settings, current: int) -> int:
    """Remove what is not kept; returns how many objects. Raises Damaged, Unavailable: next time goes on.

    `current` is the generation being written. Leftovers of writers that died (objects of an older number
    without a description) go too. A description is removed before its chain, and a chain from its end, so
    what a crash leaves is a chain that nobody finds, or a shorter one.
    """
    described = await chain.descriptions(store)
    last = await verify.last_result(store)
    good = min(last["good"] if last and last.get("good") else 0, current)
    whole, bases = select_kept(described, settings, good, time.time())
    removed = []
    async for entry in store.list():
        head, *rest = entry.name.split("/")
        if head == "generations":
            number = int(rest[0])
            if number not in whole | bases:
                removed.append(entry.name)
        elif rest and head.isdecimal():
            number = int(head)
            base = number in bases and rest[0] == described[number]["base"]
            if number < current and number not in whole and not base:
                removed.append(entry.name)
    # Descriptions sort after the segments, and a chain's later objects after its earlier ones
    removed.reverse()
    for start in range(0, len(removed), 1000):
        await store.delete(removed[start : start + 1000])
    return len(removed)


def select_kept(
    described: Mapping[int, chain.Description], settings: Settings, good: int, now: float
) -> tuple[set[int], set[int]]:
    """Generations kept whole, and those of which the base is kept. `good` is the last verified, 0 if none."""
    numbers = sorted(described)
    whole: set[int] = set()
    bases: set[int] = set()
    days: set[int] = set()
    for number, after in zip(numbers, [*numbers[1:], None], strict=True):
        ends = described[after]["second"] if after else now
        second = described[number]["second"]
        if number >= good or not good or ends >= now - settings.keep_seconds:
            whole.add(number)
        elif second >= now - settings.keep_days * DAY and second // DAY not in days:
            bases.add(number)
        days.add(second // DAY)
    return whole, bases


class KeptBackups:
    """The moments that kept backups hold, as the backup store said within a minute.

    They are kept for longer than set where `verify` fails. A backup store that cannot say may have any moment.
    """

    def __init__(self, backup: ObjectStore):
        self._backup = backup
        self._seconds: list[int] = []
        self._refreshed_at = -REFRESH

    async def may_name(self, moment: int) -> bool:
        """Whether a backup holds the state of a moment or an earlier one, ms since 1970."""
        if time.monotonic() >= self._refreshed_at + REFRESH:
            try:
                self._seconds = [one["second"] for one in (await chain.descriptions(self._backup)).values()]
            except (Unavailable, Damaged, NotFound):  # the last: it was removed while we asked
                self._seconds = [0]
            self._refreshed_at = time.monotonic()
        return any(second * 1000 - LONGEST_REWRITE_MS <= moment for second in self._seconds)
