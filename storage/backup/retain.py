"""Chooses which backups are kept, and removes the others.

| age | kept |
|---|---|
| up to `keep_seconds` (a day) | whole generations: every second can be restored |
| up to `keep_days` (30 days) | one base a day |
| older | nothing |

A generation that a trial (`verify`) has restored, and every newer one, is always kept whole. Without a successful trial
nothing is removed. So whatever is wrong with the newer generations, the last good one exists.
"""

import asyncio
import time
from collections.abc import Mapping

from storage.backup import chain, owners, verify
from storage.backup.aof import Damaged
from storage.objects import Below, NotFound, ObjectStore, Unavailable
from storage.settings import Settings

DAY = 86400  # seconds
# Seconds between two reads of the descriptions. Reading those of a month over S3 takes a second, in which the
# dispatcher hands out no image.
REFRESH = 60.0
# A base contains the state at the moment its rewrite began, but its `second` is the one of its last byte. For 10 GiB
# that is minutes later. An hour is more than any rewrite takes.
LONGEST_REWRITE_MS = 3_600_000


async def remove_old(store: ObjectStore, settings: Settings, current: int) -> int:
    """Remove from the backup store what is not kept. Returns the number of objects removed.

    `current` is the generation that is being written. This also removes what shippers that died left behind: objects of
    an older generation without a description.

    A description is removed before its chain, and a chain from its end. After a crash half way there is a chain that
    `restore` does not find, or a shorter one. The next call removes the rest.

    Raises Damaged, NotFound and Unavailable.
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
    # In ascending order descriptions come after the chains, and the later objects of a chain after the earlier ones.
    removed.reverse()
    for start in range(0, len(removed), 1000):
        await store.delete(removed[start : start + 1000])
    return len(removed)


def select_kept(
    described: Mapping[int, chain.Description], settings: Settings, good: int, now: float
) -> tuple[set[int], set[int]]:
    """Return the numbers of the generations that are kept whole, and of those whose base alone is kept.

    `good` is the newest generation that a trial has restored, 0 if there is none. `now` is in unix seconds.
    """
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


async def remove_old_records(store: ObjectStore, view: owners.View) -> None:
    """Remove the records of a node (owners.py) that are older than all of its generations.

    Raises Damaged, NotFound and Unavailable.
    """
    described = await chain.descriptions(Below(store, view.node))
    await owners.remove_old(store, view.node, min(description["second"] for description in described.values()))


async def remove_gone_nodes(store: ObjectStore, settings: Settings, known: set[str]) -> None:
    """Remove all of the nodes that are not `known`: they have left the Cluster, so no shipper of theirs does it.

    All is kept until it is older than any backup that is kept, and until a trial of the whole Cluster has succeeded
    after that. Raises Unavailable.
    """
    last = await verify.last_result(store)
    if not last or not last["ok"]:
        return
    reach = max(settings.keep_seconds, settings.keep_days * DAY)
    for node in set(await owners.nodes(store)) - known:
        # The records come last: after a crash half way the next call still finds the node.
        entries = [entry for below in (node, owners.PREFIX + node) async for entry in store.list(f"{below}/")]
        if all(entry.modified + reach < last["time"] for entry in entries):
            names = [entry.name for entry in entries]
            for start in range(0, len(names), 1000):
                await store.delete(names[start : start + 1000])


async def descriptions_of_all(store: ObjectStore) -> list[chain.Description]:
    """The descriptions of all generations in a store, of a single server and of all nodes.

    Raises Damaged, NotFound if a description is removed meanwhile, and Unavailable.
    """
    stores = [store, *(Below(store, node) for node in await owners.nodes(store))]
    found = await asyncio.gather(*map(chain.descriptions, stores))
    return [description for described in found for description in described.values()]


class KeptBackups:
    """Answers whether a kept backup, of any node of a Cluster, may still name an object that was deleted.

    It reads the descriptions from the backup store, at most once a minute. Ages alone would not be enough: while
    `verify` fails, backups are kept for longer than the settings say.
    """

    def __init__(self, backup: ObjectStore):
        self._backup = backup
        self._seconds: list[int] = []
        self._refreshed_at = -REFRESH

    async def may_name(self, moment: int) -> bool:
        """Whether a backup may contain the state at `moment` (ms since 1970) or before.

        Also returns True if the backup store cannot be read: then it may contain any state.
        """
        if time.monotonic() >= self._refreshed_at + REFRESH:
            try:
                self._seconds = [one["second"] for one in await descriptions_of_all(self._backup)]
            except (Unavailable, Damaged, NotFound):  # NotFound: a description was removed meanwhile
                self._seconds = [0]
            self._refreshed_at = time.monotonic()
        return any(second * 1000 - LONGEST_REWRITE_MS <= moment for second in self._seconds)
