"""Rate limits: how many requests, or bytes of uploads, a user or a network address may send in a time.

A limit of 60 a minute lets 60 requests pass at once, and then one more each second (GCRA, lua/take.lua). Redis decides,
so all processes together keep to the limit. No process gets requests in advance.

Requests that wait at the same time are decided by one call, which leaves with the next pipeline of reads:

    request ──► charge ──► batch of its partition ──take──► verdict for each charge of the batch ──► request

Of several requests with the same charge in one batch, the first ones are allowed.
"""

import asyncio
import logging
import math
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

    __slots__ = ("name", "key", "partition", "limit", "window_ms", "cost", "blocked_until")

    def __init__(self, name: str, key: str, partition: int, limit: Limit, cost: int):
        self.name = name  # of the limit
        self.key = key
        self.partition = partition
        self.limit = limit
        self.window_ms = limit.window * 1000
        self.cost = cost  # units; below 0: to give back
        # Until this time of the event loop Redis would certainly refuse. So this process refuses without Redis.
        self.blocked_until = 0.0


class Verdict:
    """The decision about all requests of a batch with the same charge."""

    __slots__ = ("allowed", "left", "again_ms", "headers")

    def __init__(self, allowed: int, left: int, again_ms: int):
        self.allowed = allowed  # how many of the requests, which are the first ones
        self.left = left  # units that are left of the limit
        self.again_ms = again_ms  # until another unit is there; if some were refused: until one of them may be repeated
        self.headers: tuple[str, str] | None = None  # for the API: what it says about the verdict


class Batch:
    """Charges that are decided together. It is decided when `verdicts` or `error` is set."""

    __slots__ = ("counts", "verdicts", "error", "waiting")

    def __init__(self):
        self.counts: dict[Charge, int] = {}  # how many requests there are of each charge
        self.verdicts: dict[Charge, Verdict] | None = None
        self.error: Exception | None = None  # why there are no verdicts
        self.waiting: list[asyncio.Future] = []

    def decided(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future:
        """A future that ends when the batch is decided."""
        future = loop.create_future()  # one for each caller: a caller that is cancelled must not disturb the others
        if self.verdicts is None and self.error is None:
            self.waiting.append(future)
        else:
            future.set_result(None)
        return future


# The place of a request: it is the n-th with this charge in this batch, counted from 1. A plain tuple, because creating
# a NamedTuple takes as long as everything else in `take`.
Ticket = tuple[Batch, Charge, int]


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

    def take(self, charge: Charge) -> Ticket | Verdict:
        """Enter a request into the next batch. A Verdict, which refuses, if the charge is known to be blocked."""
        if charge.blocked_until:
            rest = charge.blocked_until - self.loop.time()
            if rest > 0:
                return Verdict(0, 0, math.ceil(rest * 1000))
            charge.blocked_until = 0.0
        batch = self._open.get(charge.partition)
        if batch is None:
            batch = self._open[charge.partition] = Batch()
            whose = charge.partition, batch
            self._db.call_late("take", partial(self._collect, *whose), partial(self._decided, *whose))
        counts = batch.counts
        number = counts[charge] = counts.get(charge, 0) + 1
        if len(counts) == BATCH:  # so that one call never takes Redis more than a few ms
            del self._open[charge.partition]
        return batch, charge, number

    def give_back(self, charge: Charge, units: int) -> None:
        """Give units back, without waiting for it. If Redis is away they are lost."""
        self.take(Charge(charge.name, charge.key, charge.partition, charge.limit, -units))

    def _close(self, partition: int, batch: Batch) -> None:
        if self._open.get(partition) is batch:
            del self._open[partition]

    def _collect(self, partition: int, batch: Batch) -> tuple[list[str], list]:
        """The keys and arguments of the script, when its pipeline leaves. Later requests go into the next batch."""
        self._close(partition, batch)
        names, args = [], [self._db.clock]
        for charge, count in batch.counts.items():
            names.append(charge.key)
            args += (charge.limit.quota, charge.window_ms, charge.cost, count)
        return names, args

    def _decided(self, partition: int, batch: Batch, reply: list[int] | None, error: Exception | None) -> None:
        if error is None:
            verdicts, place = {}, 0
            for charge, count in batch.counts.items():
                verdict = verdicts[charge] = Verdict(*reply[place : place + 3])
                if verdict.allowed < count and charge.cost == 1:
                    charge.blocked_until = self.loop.time() + verdict.again_ms / 1000
                place += 3
            batch.verdicts = verdicts
        else:
            self._close(partition, batch)  # the call may have failed before it left
            batch.error = error
            if not isinstance(error, Refusal):  # a bug, or a foreign key of another type
                log.error("the limits cannot be checked: %s", error)
        for future in batch.waiting:
            if not future.done():
                future.set_result(None)

    async def decide(self, charge: Charge) -> tuple[bool, Verdict]:
        """Whether a request is allowed, and the verdict. Raises Unreachable, or ResponseError, which is a bug."""
        ticket = self.take(charge)
        if isinstance(ticket, Verdict):
            return False, ticket
        batch, _, number = ticket
        await batch.decided(self.loop)
        if batch.verdicts is None:
            raise batch.error
        verdict = batch.verdicts[charge]
        return number <= verdict.allowed, verdict
