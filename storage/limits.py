"""Rate limits: how many requests, or bytes of uploads, a user or a network address may send in a time.

A limit of 60 a minute lets 60 requests pass at once, and then one more each second (GCRA, lua/take.lua). Redis decides,
so all processes together keep to the limit. No process gets requests in advance.

Requests that wait at the same time are decided by one call, which leaves with the next pipeline of reads:

    request ──► charge ──► batch of its partition ──take──► decision for each charge of the batch ──► request

Of several requests with the same charge in one batch, the first ones are allowed. A comment takes from its limit itself
where both have the same partition: see `storage.comments.add`.
"""

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from functools import lru_cache, partial

from storage import keys
from storage.db.client import BATCH, Redis
from storage.errors import Refusal
from storage.settings import Limit

CACHED = 10_000  # charges that a process remembers, in 4 MB
ADDRESS = "address"  # in a key, the class of reads without a token. So an address is never taken for a user

log = logging.getLogger("imagegram.limits")


class Charge:
    """What one request takes from one limit. Equal requests share one object."""

    __slots__ = ("name", "key", "partition", "limit", "window_ms", "cost", "blocked_until", "entry")

    def __init__(self, name: str, key: str, partition: int, limit: Limit, cost: int):
        self.name = name  # of the limit
        self.key = key
        self.partition = partition
        self.limit = limit
        self.window_ms = limit.window * 1000
        self.cost = cost  # units; below 0: to give back
        # Until this time (time.monotonic) Redis would certainly refuse. So this process refuses without Redis.
        self.blocked_until = 0.0
        self.entry: Entry | None = None  # of the batch that has not left yet


class Entry:
    """Requests with the same charge that are decided together, and the decision: the first `allowed` of them pass."""

    __slots__ = ("charge", "batch", "count", "allowed", "left", "again_ms", "headers")

    def __init__(self, charge: Charge, batch: "Batch | None" = None):
        self.charge = charge
        self.batch = batch  # None: a script decides that also does something else
        self.count = 0  # requests
        self.allowed: int | None = None  # None: not decided yet, or Redis did not decide
        self.left = 0  # units that are left of the limit
        self.again_ms = 0  # until another unit is there; if some were refused: until one of them may be repeated
        self.headers = ""  # for the API: what it says about the decision

    def decide(self, allowed: int, left: int, again_ms: int) -> None:
        self.allowed, self.left, self.again_ms = allowed, left, again_ms
        if allowed < self.count and self.charge.cost == 1:
            self.charge.blocked_until = time.monotonic() + again_ms / 1000


class Batch:
    """Entries of one partition that are decided by one call."""

    __slots__ = ("entries", "error", "waiting", "answered")

    def __init__(self):
        self.entries: list[Entry] = []
        self.error: Exception | None = None  # why there is no decision
        self.waiting: list[asyncio.Future] = []
        self.answered = False

    def decided(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future:
        """A future that ends when the batch is decided, or when it is known that it will not be."""
        future = loop.create_future()  # one for each caller: one that is cancelled must not disturb the others
        if self.answered:
            future.set_result(None)
        else:
            self.waiting.append(future)
        return future


# The place of a request: it is the n-th of this entry, counted from 1. A plain tuple, because creating a NamedTuple
# takes as long as everything else in `take`.
Ticket = tuple[Entry, int]


class Limiter:
    """Decides which requests are within their limits. There is one for each event loop."""

    def __init__(self, db: Redis, limits: Mapping[str, Limit], partitions: int):
        self._db = db
        self._limits = limits
        self._partitions = partitions
        self.loop = asyncio.get_running_loop()
        self._open: dict[int, Batch] = {}  # by partition: the batch that has not left yet
        self.charge = lru_cache(CACHED)(self._charge)

    def _charge(self, name: str, who: str, cost: int = 1, address: bool = False) -> Charge | None:
        """The charge of a request of `who` (a user, or an address) of the class `name`. None if it has no limit."""
        limit = self._limits.get(name)
        if limit is None:
            return None
        partition = keys.partition_of_user(who, self._partitions)
        return Charge(name, keys.rate(partition, ADDRESS if address else name, who), partition, limit, cost)

    def alone(self, charge: Charge) -> Entry:
        """An entry for one request, in no batch. If the charge is known to be blocked, it is already refused."""
        entry = Entry(charge)
        entry.count = 1
        if charge.blocked_until:
            rest = charge.blocked_until - time.monotonic()
            if rest > 0:
                entry.allowed, entry.again_ms = 0, math.ceil(rest * 1000)
            else:
                charge.blocked_until = 0.0
        return entry

    def take(self, charge: Charge) -> Ticket:
        """Enter a request into the next batch. If the charge is known to be blocked, the entry is already refused."""
        entry = charge.entry
        if entry is None:
            if charge.blocked_until and (refused := self.alone(charge)).allowed is not None:
                return refused, 1
            entry = self._enter(charge)
        entry.count = number = entry.count + 1
        return entry, number

    def _enter(self, charge: Charge) -> Entry:
        """A new entry in the batch that has not left yet."""
        partition = charge.partition
        batch = self._open.get(partition)
        if batch is None:
            batch = self._open[partition] = Batch()
            # In the next turn of the event loop, in which the request also asks for what it reads. Otherwise the call
            # could leave before that.
            collect, decided = partial(self._collect, partition, batch), partial(self._decided, partition, batch)
            self.loop.call_soon(self._db.call_late, "take", charge.key, collect, decided)
        entry = charge.entry = Entry(charge, batch)
        batch.entries.append(entry)
        if len(batch.entries) == BATCH:  # so that one call never takes Redis more than a few ms
            del self._open[partition]
        return entry

    def give_back(self, charge: Charge, units: int) -> None:
        """Give units back, without waiting for it. If Redis is away they are lost."""
        self.take(Charge(charge.name, charge.key, charge.partition, charge.limit, -units))

    def _close(self, partition: int, batch: Batch) -> None:
        """Later requests go into the next batch."""
        if self._open.get(partition) is batch:
            del self._open[partition]
        for entry in batch.entries:
            if entry.charge.entry is entry:
                entry.charge.entry = None

    def _collect(self, partition: int, batch: Batch) -> tuple[list[str], list]:
        """The keys and arguments of the script, when its pipeline leaves."""
        self._close(partition, batch)
        names, args = [], [self._db.clock]
        for entry in batch.entries:
            charge = entry.charge
            names.append(charge.key)
            args += (charge.limit.quota, charge.window_ms, charge.cost, entry.count)
        return names, args

    def _decided(self, partition: int, batch: Batch, reply: list[int] | None, error: Exception | None) -> None:
        batch.answered = True
        if error is None:
            numbers = iter(reply)
            for entry, *decision in zip(batch.entries, numbers, numbers, numbers, strict=True):
                entry.decide(*decision)
        else:
            self._close(partition, batch)  # the call may have failed before it left
            batch.error = error
            if not isinstance(error, Refusal):  # a bug, or a foreign key of another type
                log.error("the limits cannot be checked: %s", error)
        for future in batch.waiting:
            if not future.done():
                future.set_result(None)

    async def decide(self, charge: Charge) -> tuple[bool, Entry]:
        """Whether a request is allowed, and the decision. Raises Unreachable, or ResponseError, which is a bug."""
        entry, number = self.take(charge)
        if entry.allowed is None:
            await entry.batch.decided(self.loop)
            if entry.batch.error:
                raise entry.batch.error
        return number <= entry.allowed, entry
