"""What happens to a Redis Cluster of which nodes are lost, cut off and paused, and slots move, under 64 writers.

    PYTHONPATH=tests python -m tests.drills.cluster [NAME [SERVER]]

Each drill has a Cluster of its own, whose replicas follow their primaries through proxies: what a primary sends arrives
LAG later. A primary that is killed takes with it what is in its proxy. Writers add comments by the client of the API,
each one to one post, so a shard that is down does not hold up the writers of the others.

kill      Kills a primary together with what its replicas have not received, 20 times. Each write waits for a replica.
lossy     The same without waiting, 10 times. This is the control: here the drill must see losses.
cut       Stops a replica for 5 s, then cuts it off for 5 s: the writes go on with the other one. Then kills the primary
          in the moment in which a replica goes on that has missed much: the other one must take its place.
pause     Stops a primary for 5 s. When it goes on, it is a primary for some milliseconds. Clients that still believe so
          write to it then.
migrate   Moves slots to another primary and back all the time by MIGRATESLOTS. Then kills the target of a migration.
handover  Kills the target in the moment in which it has the slots. This shows a limit: MIGRATESLOTS does not wait until
          the replicas of the target have what it received. So here the drill may see losses.
small     One data primary, two replicas and two arbiters: kills the primary.
history   Calls of all kinds on single posts, across a failover: are they linearizable?

After each drill the posts are walked through: each acknowledged comment is there once, none is there that was refused,
and `check` finds no flaw.

| a write is | if | its comment |
|---|---|---|
| acknowledged | the client returned its id | must be there |
| unknown | the client raised Unknown | may be there |
| refused | the client raised Unreachable | must not be there |
"""

import asyncio
import math
import os
import random
import signal
import sys
import tempfile
import time
from bisect import bisect
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from clusters import ClusterNode, ClusterServer
from making import NO_SEGMENTS, publish
from redis.exceptions import RedisError

from storage import comments, keys, posts
from storage.check import check
from storage.db.cluster import connect, slot_of
from storage.errors import NoPost, Unknown, Unreachable
from storage.objects import open_store
from tests.drills import histories

PARTITIONS = 16
WRITERS = 64
LAG = 0.03  # seconds by which replication is delayed
PATIENCE = 60.0  # seconds for what a slow machine must do
AWAY = 5.0  # seconds for which a node is stopped or cut off
PAGE = 1000
# The first is as in storage/db/redis-cluster.conf; tests/clusters.py sets 0. Without the delay a killed node copies the
# data of its successor at once, not after five seconds in which other replicas may come.
OPTIONS = ("--min-replicas-to-write", "1", "--repl-diskless-sync-delay", "0")
OPS = 10_000  # calls in a history, at least


class Write(NamedTuple):
    post: str
    text: str  # different for each write
    begin: float  # s
    end: float
    outcome: str  # the id of the comment; `UNKNOWN`, or `UNREACHABLE`: it was refused

    @property
    def acknowledged(self) -> bool:
        return "-" in self.outcome


@dataclass
class Figures:
    """What a drill found. Times in seconds."""

    times: int = 0  # that something was done to a node
    counts: Counter = field(default_factory=Counter)  # acknowledged, unknown, refused
    kept_unknown: int = 0  # of the unknown writes, those that have happened
    lost: int = 0  # acknowledged
    wrong: int = 0  # comments that are there twice, that were refused, or that have another text
    flaws: int = 0
    gaps: list[float] = field(default_factory=list)  # without an answer, on the shard to which something was done
    others: list[float] = field(default_factory=list)  # the longest ones of the other shards meanwhile
    note: str = ""


class Shard:
    """A primary and its replicas, in any role."""

    def __init__(self, nodes: list[ClusterNode]):
        self.nodes = nodes

    def primary(self) -> ClusterNode | None:
        """The node that is a primary, or None while there is no such node that answers."""
        for node in self.nodes:
            try:
                if node.process.poll() is None and node.client.info("replication")["role"] == "master":
                    return node
            except RedisError:
                continue
        return None


    def whole(self) -> bool:
        """Whether there is a primary that all others follow."""
        primary = self.primary()
        info = primary.client.info("replication") if primary else {"connected_slaves": 0}
        states = [info[f"slave{number}"]["state"] for number in range(info["connected_slaves"])]
        return states.count("online") == len(self.nodes) - 1


class Drill:
    """A Cluster with one ready post in each partition, writers that never stop, and a record of what they did."""

    def __init__(self, server: ClusterServer, folder: Path, shards: list[Shard], replicas: int):
        self.server, self.shards, self.replicas = server, shards, replicas
        self.store = open_store((folder / "store").as_uri())
        self.db = connect(server.url, replicas)
        self.plain = connect(server.url)  # for what is made before a drill: on a busy machine a replica may be late
        self.writes: list[Write] = []
        self.answers: dict[Shard, list[float]] = {shard: [] for shard in shards}  # when each acknowledgement came
        self.shard_of: dict[str, Shard] = {}  # post -> its shard at the begin
        self.posts: list[str] = []
        self.stopping = False
        self.figures = Figures()

    async def furnish(self) -> None:
        for shard in self.shards:
            await until_in_thread(lambda shard=shard: shard.whole(), "the replicas follow")
        for number in range(10_000):
            user = f"user{number}"
            if keys.partition_of_user(user, PARTITIONS) == len(self.posts):
                self.posts.append(await publish(self.plain, self.store, user, partitions=PARTITIONS))
            if len(self.posts) == PARTITIONS:
                break
        for number, post in enumerate(self.posts):
            self.shard_of[post] = self.shard_of_partition(number)

    async def write(self, number: int) -> None:
        post, count = self.posts[number % len(self.posts)], 0
        answers = self.answers[self.shard_of[post]]
        while not self.stopping:
            text, count, begin = f"{number}-{count}", count + 1, time.monotonic()
            try:
                outcome = (await comments.add(self.db, f"writer{number}", post, text))[0].id
                answers.append(time.monotonic())
            except (Unknown, Unreachable, NoPost) as error:  # NoPost: the post is lost
                outcome = error.word
                await asyncio.sleep(0.01)  # a refusal may come at once
            self.writes.append(Write(post, text, begin, time.monotonic(), outcome))

    def shard_of_partition(self, partition: int) -> Shard:
        return self.shards[partition % len(self.shards)]

    def answered_since(self, shard: Shard, moment: float) -> bool:
        return self.answers[shard][-1:] > [moment]

    async def whole(self, shard: Shard) -> ClusterNode:
        """Waits until a shard has a primary with all its replicas, which answers. Returns it."""
        await until_in_thread(shard.whole, "the shard is whole")
        primary = await asyncio.to_thread(shard.primary)
        moment = time.monotonic()
        await until_in_thread(lambda: self.answered_since(shard, moment), "the shard answers")
        return primary

    async def kill_primary(self, shard: Shard, meanwhile=None) -> float:
        """Loses a primary, waits until the shard answers again, and starts the node again. Returns when it was lost."""
        victim = await self.whole(shard)
        victim.proxy.lag = LAG
        await asyncio.sleep(0.3 + random.random() / 2)
        if meanwhile:
            await meanwhile(victim)
        begin = lose(victim)
        await self.recovered(shard, begin)
        await asyncio.to_thread(victim.start)
        return begin

    async def recovered(self, shard: Shard, begin: float) -> None:
        """Waits until a shard answers by a new primary."""
        await asyncio.sleep(0.1)  # for the answers that were under way
        moment = time.monotonic()
        await until_in_thread(lambda: self.answered_since(shard, moment), "the shard answers")
        await asyncio.sleep(0.2)  # for answers of the other shards
        self.measure(shard, begin)
        self.figures.times += 1

    def measure(self, shard: Shard, begin: float) -> None:
        """Records the longest times without an answer since `begin`, of the shard and of the others."""
        now = time.monotonic()
        for one in self.shards:
            answers = self.answers[one]
            times = [*answers[max(0, bisect(answers, begin) - 1) :], now]
            longest = max((later - earlier for earlier, later in pairwise(times)), default=math.inf)
            (self.figures.gaps if one is shard else self.figures.others).append(longest)

    async def judge(self) -> None:
        """Compares the posts with the record, and checks the data."""
        figures = self.figures
        for post in self.posts:
            there: dict[str, str] = {}  # text -> id
            before, more = "", True
            while more:
                try:
                    page = await comments.page(self.db, NO_SEGMENTS, post, PAGE, before)
                except NoPost:
                    break
                for row in page.comments:
                    figures.wrong += row.text in there
                    there[row.text] = row.id
                more, before = page.more, page.comments[-1].id if page.comments else ""
            for write in self.writes:
                if write.post == post:
                    kept = there.pop(write.text, None)
                    kind = "acknowledged" if write.acknowledged else write.outcome.lower()
                    figures.counts[kind] += 1
                    if write.acknowledged:
                        figures.lost += kept is None
                        figures.wrong += kept is not None and kept != write.outcome
                    elif kind == "unknown":
                        figures.kept_unknown += kept is not None
                    else:
                        figures.wrong += kept is not None
            figures.wrong += len(there)  # comments that nobody wrote
        report = await check(self.db, self.store)
        figures.flaws = report.flaws
        if report.flaws:
            print(*report.lines, sep="\n", file=sys.stderr)


def lose(node: ClusterNode) -> float:
    """Kills a node together with what its replicas have not received. Returns when, on the monotonic clock."""
    moment = time.monotonic()
    node.process.kill()
    node.proxy.cut()
    node.proxy.lag = 0
    node.process.wait()
    return moment


async def until_in_thread(condition, what: str) -> None:
    """Like `until`, for a condition that blocks."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            if await asyncio.to_thread(condition):
                return
        except RedisError:
            pass
        assert time.monotonic() < end, f"still waiting for: {what}"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def writing(server: str, replicas: int = 1, primaries: int = 3, arbiters: int = 0, writers: int = WRITERS):
    """A drill whose writers run. At the end they stop, and the drill is judged."""
    nodes = ClusterServer(server, primaries, 2, *OPTIONS, arbiters=arbiters, proxied=True)
    own = nodes.nodes[:primaries] + nodes.nodes[primaries + arbiters :]
    shards = [Shard(own[number::primaries]) for number in range(primaries)]
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        drill = Drill(nodes, Path(folder), shards, replicas)
        try:
            await drill.furnish()
            tasks = [asyncio.create_task(drill.write(number)) for number in range(writers)]
            try:
                yield drill
            finally:
                drill.stopping = True
                await asyncio.gather(*tasks)
            await drill.judge()
        finally:
            await asyncio.gather(drill.db.close(), drill.plain.close())
            nodes.close()


async def kill(server: str, replicas: int = 1, rounds: int = 20) -> Figures:
    async with writing(server, replicas) as drill:
        for number in range(rounds):
            await drill.kill_primary(drill.shards[number % 3])
    return drill.figures


async def lossy(server: str) -> Figures:
    figures = await kill(server, replicas=0, rounds=10)
    assert figures.lost, "no write was lost, so this drill proves nothing about the barrier"
    figures.note = f"{figures.lost} lost: the control"
    return figures


async def cut(server: str) -> Figures:
    async with writing(server) as drill:
        shard = drill.shards[0]
        primary = await drill.whole(shard)
        replica = next(node for node in shard.nodes if node is not primary)
        begin = time.monotonic()
        replica.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(AWAY)
        replica.process.send_signal(signal.SIGCONT)
        drill.measure(shard, begin)
        primary = await drill.whole(shard)
        begin = time.monotonic()
        silence(primary)
        await asyncio.sleep(AWAY)
        primary.proxy.cut()
        drill.measure(shard, begin)
        drill.figures.times += 2
        stopped = max(drill.figures.gaps)
        for number in range(3):
            await drill.kill_primary(drill.shards[number], behind(drill.shards[number]))
    drill.figures.note = f"{stopped:.2f} s while only the replica was away"
    return drill.figures


def silence(primary: ClusterNode) -> None:
    """Lets nothing pass any more on one of the connections by which replicas follow a primary."""
    next(connection for connection in list(primary.proxy._connections) if connection.replica).cut("silence")


def behind(shard: Shard):
    """Lets a replica miss what a second and a half brings. It goes on when the primary is killed."""

    async def miss(primary: ClusterNode) -> None:
        replica = next(node for node in shard.nodes if node is not primary)
        replica.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(1.5)  # less than the time after which it would be taken for dead
        replica.process.send_signal(signal.SIGCONT)

    return miss


async def pause(server: str) -> Figures:
    late: Counter = Counter()
    async with writing(server) as drill:
        for number in range(3):
            shard = drill.shards[number]
            victim = await drill.whole(shard)
            victim.proxy.lag = LAG
            await asyncio.sleep(0.3 + random.random() / 2)
            believers = [connect(drill.server.url, 1) for _ in range(8)]
            mine = [post for post in drill.posts if drill.shard_of[post] is shard]
            for client in believers:
                await asyncio.gather(*(posts.read(client, post) for post in mine))
            begin = time.monotonic()
            victim.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(AWAY)
            # Their calls wait in the sockets of the old primary when it goes on.
            calls = [believe(drill, client, post, f"late {number}") for client in believers for post in mine]
            gathering = asyncio.gather(*calls)
            await asyncio.sleep(0.1)
            victim.process.send_signal(signal.SIGCONT)
            late.update(await gathering)
            victim.proxy.lag = 0
            await drill.recovered(shard, begin)
            await asyncio.gather(*(client.close() for client in believers))
    drill.figures.note = "to the old primary: " + ", ".join(f"{count} {word}" for word, count in sorted(late.items()))
    return drill.figures


async def believe(drill: Drill, client, post: str, text: str) -> str:
    """Writes by a client that does not know of the failover. Records the write and returns its outcome."""
    text = f"{text} {id(client)}"
    begin = time.monotonic()
    try:
        outcome = (await comments.add(client, "believer", post, text))[0].id
    except (Unknown, Unreachable) as error:
        outcome = error.word
    drill.writes.append(Write(post, text, begin, time.monotonic(), outcome))
    return "acknowledged" if "-" in outcome else outcome.lower()


async def migrate(server: str, seconds: float = 30, kills: int = 5) -> Figures:
    async with writing(server) as drill:
        first, second = drill.shards[:2]
        moved = [post for post in drill.posts if drill.shard_of[post] is first]
        slots = [slot_of(keys.post(post)) for post in moved]
        end, count, began = time.monotonic() + seconds, 0, time.monotonic()
        while time.monotonic() < end or count % 2:
            source, target = (first, second) if count % 2 == 0 else (second, first)
            assert await end_move(await begin_move(source, target, slots)) == "success"
            count += 1
        drill.measure(first, began)
        moving = max(drill.figures.gaps)
        outcomes: Counter = Counter()
        for _ in range(kills):
            source = first if await has(first, slots[0]) else second
            target = second if source is first else first
            victim = await drill.whole(target)
            victim.proxy.lag = LAG
            await drill.whole(source)
            giver = await begin_move(source, target, slots)
            await asyncio.sleep(random.random() * 0.5)
            begin = lose(victim)
            await drill.recovered(target, begin)
            await asyncio.to_thread(victim.start)
            outcomes[await end_move(giver)] += 1
    ends = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items()))
    moves = f"{count} moves of {len(slots)} partitions, no answer for {moving:.2f} s"
    drill.figures.note = f"{moves}; then, with the target killed: {ends}"
    return drill.figures


async def handover(server: str) -> Figures:
    async with writing(server) as drill:
        source, target = drill.shards[:2]
        await drill.whole(source)
        victim = await drill.whole(target)
        victim.proxy.lag = LAG
        await asyncio.sleep(2)  # for comments, which then move
        slots = [slot_of(keys.post(post)) for post in drill.posts if drill.shard_of[post] is source]
        assert await end_move(await begin_move(source, target, slots)) == "success"
        begin = lose(victim)
        await drill.recovered(target, begin)
    drill.figures.note = "MIGRATESLOTS waits for no replica of the target: a known limit"
    return drill.figures


async def has(shard: Shard, slot: int) -> bool:
    node = await asyncio.to_thread(shard.primary)
    ranges = await asyncio.to_thread(node.client.execute_command, "CLUSTER SLOTS")
    return any(first <= slot <= last and primary[1] == node.port for first, last, primary, *_ in ranges)


async def begin_move(source: Shard, target: Shard, slots: list[int]) -> ClusterNode:
    """Begins to move slots. Returns the node that gives them away."""
    giver, taker = await asyncio.to_thread(source.primary), await asyncio.to_thread(target.primary)
    ranges = [bound for slot in slots for bound in (slot, slot)]
    identity = await asyncio.to_thread(taker.client.cluster, "MYID")
    command = "CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", *ranges, "NODE", identity
    await asyncio.to_thread(giver.client.execute_command, *command)
    return giver


async def end_move(giver: ClusterNode) -> str:
    """Waits until slots have moved. Returns how that ended: `success` or `failed`."""
    found: list[str] = []

    def ended() -> bool:
        newest = giver.client.execute_command("CLUSTER", "GETSLOTMIGRATIONS")[0]
        found.append(newest["state"])
        return found[-1] in ("success", "failed")

    await until_in_thread(ended, "the slots have moved")
    return found[-1]


async def history(server: str, rounds: int = 3, clients: int = 6) -> Figures:
    """Does not use the writers of the other drills, except for one of each shard, which shows when it answers."""
    verdicts: Counter = Counter()
    sizes = []
    async with writing(server, writers=PARTITIONS) as drill:
        dbs = [connect(drill.server.url, 1) for _ in range(2)]
        for number in range(rounds):
            shard = drill.shards[number]
            made = [await publish(drill.plain, drill.store, f"author{n}", partitions=PARTITIONS) for n in range(12)]
            recorders = [histories.Recorder(post) for post in made]
            stopped = asyncio.Event()
            using = [
                asyncio.create_task(recorder.use(dbs[n % 2], f"client{n}", stopped))
                for recorder in recorders
                for n in range(clients)
            ]

            def count(recorders=recorders) -> int:
                return sum(len(recorder.ops) for recorder in recorders)

            await until_in_thread(lambda: count() > OPS * 0.4, "the first calls")
            killed = await drill.kill_primary(shard)
            answered = time.monotonic()
            await until_in_thread(lambda: count() > OPS, "the other calls")
            stopped.set()
            await asyncio.gather(*using)
            for recorder in recorders:
                await recorder.read_page(drill.db)
                hit = drill.shard_of_partition(keys.partition_of_post(recorder.post)) is shard
                verdicts[histories.judge(recorder.history(), hit, killed, answered)] += 1
            sizes.append(count())
            assert histories.spoilt_is_wrong(recorders[0].history())
        for db in dbs:
            await db.close()
    drill.figures.note = f"{sum(sizes)} calls in {rounds} histories of {min(sizes)} at least; posts: " + ", ".join(
        f"{count} {verdict}" for verdict, count in sorted(verdicts.items())
    )
    drill.figures.wrong += verdicts["not linearizable"] + verdicts["undecided"]
    return drill.figures


async def small(server: str) -> Figures:
    async with writing(server, primaries=1, arbiters=2) as drill:
        for _ in range(3):
            await drill.kill_primary(drill.shards[0])
    return drill.figures


DRILLS = {
    "kill": kill, "lossy": lossy, "cut": cut, "pause": pause, "migrate": migrate,
    "handover": handover, "small": small, "history": history,
}


def row(name: str, server: str, figures: Figures, seconds: float) -> str:
    counts = figures.counts
    unknown = f"{counts['unknown']} ({figures.kept_unknown} there)"
    gap, others = (f"{max(times):.2f}" if times else "" for times in (figures.gaps, figures.others))
    cells = [name, server, figures.times, counts["acknowledged"], figures.lost, figures.wrong, unknown]
    cells += [counts["unreachable"], gap, others, figures.flaws, figures.note, f"{seconds:.0f}"]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


HEADER = (
    "| drill | server | times | acknowledged | lost | wrong | unknown | refused | no answer for (s) | other shards (s)"
    " | flaws | | took (s) |"
)


async def run(name: str, server: str) -> None:
    begin = time.monotonic()
    figures = await DRILLS[name](server)
    print(row(name, server, figures, time.monotonic() - begin), flush=True)
    if name != "handover":
        assert not (figures.wrong or figures.flaws), f"{name}: wrong data"
        assert name == "lossy" or not figures.lost, f"{name}: {figures.lost} acknowledged writes lost"


def main(names: list[str], server: str = "valkey") -> None:
    rule = "|---" * (len(HEADER.split("|")) - 2) + "|"
    print(f"load before: {os.getloadavg()[0]:.1f}", HEADER, rule, sep="\n", flush=True)
    for name in names:
        asyncio.run(run(name, server))
    print(f"load after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main(sys.argv[1:2] or list(DRILLS), *sys.argv[2:3])
