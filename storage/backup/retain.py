"""Which backups are kept: every second of the last day, then one base a day for a month.

Nothing is removed before a generation was restored on trial (`verify`), and from then on nothing of that
generation or of a newer one: whatever is wrong with those, the last one known to be good is there.
"""

import time

from storage.backup import chain
from storage.objects import ObjectStore
from storage.settings import Settings

DAY = 86400


async def sweep(store: ObjectStore, settings: Settings, current: int) -> int:
    """Remove what is not kept; returns how many objects. Raises Damaged, Unavailable: next time goes on.

    `current` is the generation being written. Leftovers of writers that died (objects of an older number
    without a description) go too. A description is removed before its chain, and a chain from its end, so
    what a crash leaves is a chain that nobody finds, or a shorter one.
    """
    described = await chain.descriptions(store)
    last = await chain.verified(store)
    good = min(last["good"] if last and last.get("good") else 0, current)
    whole, bases = kept(described, settings, good, time.time())
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


def kept(described: dict[int, dict], settings: Settings, good: int, now: float) -> tuple[set[int], set[int]]:
    """Generations kept whole, and those of which the base is kept. `good` is the last verified, 0 if none."""
    numbers = sorted(described)
    whole, bases, days = set(), set(), set()
    for number, after in zip(numbers, [*numbers[1:], None], strict=True):
        ends = described[after]["second"] if after else now
        second = described[number]["second"]
        if number >= good or not good or ends >= now - settings.keep_seconds:
            whole.add(number)
        elif second >= now - settings.keep_days * DAY and second // DAY not in days:
            bases.add(number)
        days.add(second // DAY)
    return whole, bases
