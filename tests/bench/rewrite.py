"""Measures the slowest call while the append-only file is rewritten, at several sizes of the data.

Pages of the feed are read and comments are written at steady rates, by the client of Redis that the API uses. The time
of a call counts from the moment at which it was due. A call belongs to the part of the rewrite that it overlaps:

| part | what Redis does |
|---|---|
| start | runs BGREWRITEAOF: it opens a new increment, writes the manifest and forks |
| end | from the renaming of the new base to the last fsync of the manifest |
| between | answers, and copies each page of memory that it changes, while the child writes the base |

As in production the shipper's code has the files open, so that the disk frees those of the old generation only when it
closes them, which counts as between.

Each fsync and rename of the main thread is timed (rewrite.c): both wait for the journal of the file system. On a disk
whose fsync takes FSYNC, a call would take its time, less that of all fsyncs and renames during it, plus FSYNC for each.
"""

import asyncio
import os
import random
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, pairwise, product
from pathlib import Path
from statistics import median

import uvloop

from storage import comments, keys, posts
from storage.backup.watch import Files
from storage.db.client import script
from storage.db.cluster import connect
from storage.errors import Refusal
from storage.settings import LEAF_ENTRIES
from tests.bench import fill, growth
from tests.bench.capacity import GIB, table
from tests.bench.parts import Filling
from tests.conftest import ROOT, RedisServer, until

SIZES = (0.5, 1.0, 2.0, 4.0)  # GiB of used_memory
REWRITES = 3  # of each size
POSTS, COMMENTS = 10_000, 100_000  # that are written. The others are copies of them
PAGES_A_SECOND, COMMENTS_A_SECOND = 400, 100
MARGIN = 1.0  # seconds of calls before the rewrite and after it
LIMIT = 50  # ms within which calls must answer
FSYNC = 1.0  # ms of an fsync on the other disk: one with a cache that survives a loss of power
LATE = 0.005  # seconds after which a call is sent too late to be counted
URGENT = -10  # nice value of the process that sends calls, if it may: it needs little of a core, but that in time
PARTS = ("start", "between", "end")

# Copies posts with all that belongs to them, under ids that end in other letters: four times as quick as sending them.
# KEYS: the feed, the changes, the leaves. ARGV: prefix of a leaf's name, entries of a leaf, the new letters, the names
# of the keys of a post with `%` in the place of its id; then for each post its id, its entry's prefix and its comments.
COPY = script(
    f"#!lua\n{(ROOT / 'lua' / 'shared.lua').read_text()}\n"
    """
for at = 7, #ARGV, 3 do
  local id, entry, count = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local copy = id:sub(1, 26 - #ARGV[3]) .. ARGV[3] .. id:sub(27)
  if copy ~= id then
    for name = 4, 6 do
      redis.call('COPY', (ARGV[name]:gsub('%%', id)), (ARGV[name]:gsub('%%', copy)))
    end
    redis.call('ZADD', KEYS[1], count, copy)
    redis.call('ZADD', KEYS[2], redis.call('ZSCORE', KEYS[2], id), copy)
    add_entry(KEYS[3], ARGV[1], entry .. copy, tonumber(ARGV[2]))
  end
end
"""
)


class Server(Filling, RedisServer):
    """A Redis whose main thread writes down its fsyncs. It has all cores, so the child takes another one."""

    def start(self) -> None:
        self.timed = Path(self.folder.name, "timed")
        library = f"{self.folder.name}/rewrite.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, source], check=True)
        os.environ |= {"LD_PRELOAD": library, "TIMED": str(self.timed)}
        try:
            super().start()
        finally:
            del os.environ["LD_PRELOAD"], os.environ["TIMED"]

    def grow(self, rows: list[fill.Row], size: float, letters) -> None:
        """Copies posts until the server uses `size` GiB. `letters`: new ends for their ids."""
        places = [prefix(0) + "%" for prefix in (keys.post_prefix, keys.comments_prefix, keys.latest_prefix)]
        words = [word for row in rows for word in (row.id, keys.entry_prefix(row.author), len(row.comments))]
        names = keys.feed(0), keys.changes(0), keys.leaves(0)
        with self.filling():
            while self.client.info("memory")["used_memory"] < size * GIB:
                fixed = [keys.leaf_prefix(0), LEAF_ENTRIES, next(letters), *places]
                for start in range(0, len(words), 1500):
                    self.client.eval(COPY.text, 3, *names, *fixed, *words[start : start + 1500])


@dataclass
class Span:
    """A call, an fsync or a part of a rewrite, in unix time."""

    begin: float
    end: float
    name: str = ""

    @property
    def ms(self) -> float:
        return (self.end - self.begin) * 1000

    def overlaps(self, other: "Span") -> bool:
        return self.begin < other.end and other.begin < self.end


@dataclass
class Rewrite:
    """What was measured in one rewrite, in ms. Each dict has a value for each of PARTS."""

    fork: float
    slowest: dict[str, float]  # call
    fsyncs: dict[str, float]  # and renames during the slowest call, which wait for the disk too
    elsewhere: dict[str, float]  # the slowest call on the other disk
    seconds: float


async def send(rate: float, call: Callable[[], Awaitable], calls: list[Span], late: list[Span]) -> None:
    """Sends calls at a steady rate until it is cancelled. None waits for the one before.

    `late` gets the times in which this process had no core for LATE.
    """
    due = time.time()

    async def one(due: float) -> None:
        with suppress(Refusal):  # after the client's deadline of 0.9 s. Its time counts
            await call()
        calls.append(Span(due, time.time()))

    async with asyncio.TaskGroup() as tasks:
        while True:
            await asyncio.sleep(due - time.time())
            if (now := time.time()) - due > LATE:
                late.append(Span(due, now))
            tasks.create_task(one(due))
            due += 1 / rate


async def drive(server: Server, ids: list[str]) -> tuple[list[Span], Span]:
    """Rewrites the file once under calls. Returns the calls and the start of the rewrite.

    Leaves out the calls during which this process itself had no core.
    """
    db = connect(server.url)
    calls, late = [], []

    def page() -> Awaitable:
        return posts.feed(db, 1, growth.PAGE)

    def comment() -> Awaitable:
        return comments.add(db, "user-00001", random.choice(ids), fill.TEXT)

    streams = (PAGES_A_SECOND, page), (COMMENTS_A_SECOND, comment)
    senders = [asyncio.create_task(send(*stream, calls, late)) for stream in streams]
    await asyncio.sleep(MARGIN)
    files = Files(Path(server.folder.name, "appendonlydir"))
    files.refresh()
    start = Span(time.time(), 0)
    await asyncio.to_thread(server.client.bgrewriteaof)
    start.end = time.time()
    await asyncio.to_thread(until, server.rewrite_done, 120, "the rewrite")
    await asyncio.sleep(MARGIN / 2)
    await asyncio.to_thread(files.close)
    await asyncio.sleep(MARGIN)
    for sender in senders:
        sender.cancel()
    for ended in await asyncio.gather(*senders, return_exceptions=True):
        assert isinstance(ended, asyncio.CancelledError), ended
    await db.close()
    return [call for call in calls if not any(call.overlaps(each) for each in late)], start


def rewrite(server: Server, ids: list[str]) -> Rewrite | None:
    """Rewrites the file once. Returns None if this process had no core when the slowest calls were due."""
    os.truncate(server.timed, 0)
    os.setpriority(os.PRIO_PROCESS, 0, URGENT if os.geteuid() == 0 else 0)  # of this thread alone
    try:
        calls, start = uvloop.run(drive(server, ids))
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    lines = [line.split() for line in server.timed.read_text().splitlines()]
    timed = [Span(float(begin), float(end), " ".join([name, *path])) for name, begin, end, *path in lines]
    renames = [each for each in timed if each.name.startswith("rename") and each.begin > start.end]
    base = next(each for each in renames if "temp-rewriteaof" in each.name)
    # The manifest is written twice: with the new base, and when the old files are deleted. Its folder is fsynced last.
    last = next(each for each in timed if each.begin > renames[-1].end)
    end = Span(base.begin, last.end)

    def waits(call: Span) -> list[float]:
        """ms of a call in each fsync and rename."""
        return [(min(call.end, each.end) - max(call.begin, each.begin)) * 1000 for each in timed if each.overlaps(call)]

    def elsewhere(call: Span) -> float:
        return call.ms + sum(FSYNC - ms for ms in waits(call))

    found: dict[str, list[Span]] = {name: [] for name in PARTS}
    for call in calls:
        found["start" if call.overlaps(start) else "end" if call.overlaps(end) else "between"].append(call)
    fork = server.client.info("stats")["latest_fork_usec"] / 1000
    if not all(found.values()):
        return None
    slowest = {name: max(found[name], key=lambda call: call.ms) for name in PARTS}
    if slowest["start"].ms < fork:
        return None
    return Rewrite(
        fork,
        {name: slowest[name].ms for name in PARTS},
        {name: sum(waits(slowest[name])) for name in PARTS},
        {name: max(map(elsewhere, found[name])) for name in PARTS},
        end.end - start.begin,
    )


def largest(slowest: dict[float, float]) -> str:
    """The largest size of the data at which the slowest call takes LIMIT: between two sizes on a line.

    >>> largest({1: 30, 2: 70, 4: 150}), largest({1: 60, 2: 70}), largest({1: 30, 2: 40})
    ('1.5 GiB', 'less than 1 GiB', 'more than 2 GiB')
    """
    sizes = list(slowest)
    if slowest[sizes[0]] > LIMIT:
        return f"less than {sizes[0]:g} GiB"
    for one, other in pairwise(sizes):
        if slowest[other] > LIMIT:
            share = (LIMIT - slowest[one]) / (slowest[other] - slowest[one])
            return f"{one + share * (other - one):.1f} GiB"
    return f"more than {sizes[-1]:g} GiB"


def measure(kind: str, sizes: tuple[float, ...] = SIZES) -> str:
    """The table: medians of the rewrites at each size."""
    rows, here, elsewhere = [], {}, {}
    data = list(fill.rows(fill.counts(POSTS, COMMENTS)))
    letters = map("".join, product(keys.ALPHABET, repeat=2))
    server = Server(kind)
    try:
        with server.filling():
            fill.send(server, fill.commands(data, int(time.time() * 1000)))
        for size in sizes:
            server.grow(data, size, letters)
            attempts = (rewrite(server, [row.id for row in data]) for _ in range(2 * REWRITES))
            rewrites = list(islice(filter(None, attempts), REWRITES))

            def middle(value: Callable[[Rewrite], float], rewrites: list[Rewrite] = rewrites) -> float:
                return median(map(value, rewrites))

            cells = [f"{size:g} GiB", f"{middle(lambda one: one.fork):.0f}"]
            for part in PARTS:
                slowest = middle(lambda one, part=part: one.slowest[part])
                fsyncs = middle(lambda one, part=part: one.fsyncs[part])
                cells.append(f"{slowest:.0f} ({fsyncs:.0f})")
            here[size] = middle(lambda one: max(one.slowest.values()))
            elsewhere[size] = middle(lambda one: max(one.elsewhere.values()))
            others = [middle(lambda one, part=part: one.elsewhere[part]) for part in PARTS]
            rows.append([*cells, *(f"{ms:.0f}" for ms in others), f"{middle(lambda one: one.seconds):.0f} s"])
    finally:
        server.close()
    rows.append([f"**largest within {LIMIT} ms**", "", largest(here), "", "", largest(elsewhere), "", "", ""])
    columns = ["data", *(f"{name}, ms" for name in ("fork", *PARTS))]
    return table([*columns, *(f"{part}, fsync {FSYNC:g} ms" for part in PARTS), "rewrite"], rows)
