"""The shape of a Redis Cluster: which nodes have which slots, and who replicates whom. Forms, checks and changes it.

| word | meaning |
|---|---|
| data primary | a primary whose slots hold partitions |
| shard | a data primary and its replicas |
| arbiter | a primary that holds nothing: its one slot belongs to no partition. It only votes for failovers |
| placement | which slots each primary gets |

A partition is a small number in a hash tag, so all its keys are in one slot. CRC16 spreads small numbers unevenly: of
16 partitions, three equal ranges of slots get 6, 6 and 4. So the slots of partitions are dealt out one by one.
"""

import asyncio
import logging
import re
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from redis.exceptions import BusyLoadingError

from storage.db.client import REPLIED
from storage.db.cluster import SLOTS, Cluster, Node, address, connect, slot_of
from storage.errors import Unreachable
from storage.settings import Settings

log = logging.getLogger("imagegram.redis")

# Partitions that are dealt out, so that a site can grow to as many without moving one. CRC16 spreads more well enough.
PLACED = 64
ARBITERS = 8  # the last slots, which are left for arbiters if there are any
POLL = 0.1  # seconds between two looks at what is awaited
FORM_SECONDS = 60.0  # for nodes to start, to learn of each other, and to copy the data of their primary
VOTERS = 3  # primaries. A replica is promoted by the majority of them, and the majority of two is two

Slots = Iterable[int]
Report = Callable[[str], None]
Moves = dict[tuple[str, str], list[int]]  # slots by the ids of the node that has them and of the node that gets them


class Refused(Exception):
    """The Cluster cannot be formed or changed as requested."""


@dataclass
class Member:
    """A node, as a node of the Cluster knows it: one line of `CLUSTER NODES`."""

    id: str  # 40 hexadecimal digits, kept over restarts
    host: str
    port: int
    flags: set[str]  # "master", "slave", "myself", "fail", "fail?", "handshake", "noaddr", …
    primary: str  # the id of the node that it replicates; "" of a primary
    slots: set[int] = field(default_factory=set)
    epoch: int = 0  # config epoch; a replica has that of its primary

    @property
    def place(self) -> str:
        return address(self.host, self.port)

    @property
    def lives(self) -> bool:
        return not self.flags & {"fail", "fail?", "handshake", "noaddr"}

    @property
    def is_primary(self) -> bool:
        return not self.primary

    @property
    def is_arbiter(self) -> bool:
        return bool(self.slots) and min(self.slots) >= SLOTS - ARBITERS

    @property
    def holds_data(self) -> bool:
        return bool(self.slots) and not self.is_arbiter


def parse(text: str) -> list[Member]:
    """The members in a reply to `CLUSTER NODES` (Redis documentation of this command, "Serialization format").

    >>> parse("07c3 10.0.0.1:7000@17000,host myself,master - 0 0 1 connected 0-2 9 [93-<-b2]")[0].slots
    {0, 1, 2, 9}
    """
    members = []
    for line in text.splitlines():
        name, place, flags, primary, _, _, epoch, _, *owned = line.split(" ")
        host, _, port = place.partition("@")[0].rpartition(":")
        member = Member(name, host, int(port), set(flags.split(",")), primary.strip("-"), epoch=int(epoch))
        for part in owned:
            if not part.startswith("["):  # a slot that is moving
                first, _, last = part.partition("-")
                member.slots.update(range(int(first), int(last or first) + 1))
        members.append(member)
    return members


def ranges(slots: Slots) -> list[tuple[int, int]]:
    """The ranges of slots, first and last included.

    >>> ranges([5, 0, 1, 2])
    [(0, 2), (5, 5)]
    """
    found: list[tuple[int, int]] = []
    for slot in sorted(slots):
        if found and found[-1][1] == slot - 1:
            found[-1] = found[-1][0], slot
        else:
            found.append((slot, slot))
    return found


def written(slots: Slots) -> str:
    """The ranges as text.

    >>> written([5, 0, 1, 2])
    '0-2 5'
    """
    return " ".join(f"{first}-{last}" if first < last else str(first) for first, last in ranges(slots))


def partition_slot(partition: int) -> int:
    """The slot of all keys of a partition."""
    return slot_of(f"{{{partition}}}")


def placement(primaries: int, arbiters: int = 0, partitions: int = PLACED) -> list[list[int]]:
    """The slots of each data primary, then of each arbiter.

    Data primary k gets the slots of the partitions k, k + primaries, …, and an equal range of the other slots.
    """
    found: list[list[int]] = [[] for _ in range(primaries)]
    taken: dict[int, int] = {}
    for partition in range(partitions):
        taken.setdefault(partition_slot(partition), partition % primaries)
    for slot in range(SLOTS - arbiters):
        found[taken.get(slot, slot * primaries // SLOTS)].append(slot)
    return found + [[slot] for slot in range(SLOTS - arbiters, SLOTS)]


def partitions_in(slots: set[int], partitions: int) -> list[int]:
    """Those of the partitions 0 to `partitions` - 1 whose keys are in these slots."""
    return [partition for partition in range(partitions) if partition_slot(partition) in slots]


async def read(cluster: Cluster) -> list[Member]:
    """All nodes, as the first one knows them that answers and knows who has slots.

    A node that has lost its data knows only itself until `form` has run. Raises Unreachable if no node answers.
    """
    found: list[Member] = []
    failure = ""
    for node in cluster.nodes():
        try:
            members = await _members(node)
        except (*REPLIED, Unreachable) as error:
            failure = f"{node.place}: {error}"
            continue
        for member in members:
            member.host = member.host or node.host  # a node that has met no other does not know its own address
        if any(member.slots for member in members):
            return members
        found = found or members
    if not found:
        raise Unreachable(f"no node of the cluster can be reached; {failure}")
    return found


async def _members(node: Node) -> list[Member]:
    return parse(await node.ask("CLUSTER", "NODES"))


async def _own(node: Node) -> Member:
    """The node itself. Raises one of REPLIED, and Unreachable."""
    return next(member for member in await _members(node) if "myself" in member.flags)


async def _tell(node: Node, *command: str | int) -> None:
    """Give a node a command. Raises Refused if it replies with an error, and Unreachable."""
    try:
        await node.ask(*command)
    except REPLIED as error:
        raise Refused(f"{node.place} refuses {command[0]} {command[1]}: {error}") from None


def problems(members: list[Member], partitions: int, replicas: int) -> list[str]:
    """What is wrong with the shape, one sentence each.

    `partitions` and `replicas` are the settings IMAGEGRAM_PARTITIONS and IMAGEGRAM_REPLICAS.
    """
    found = [f"node {member.place} does not answer" for member in members if not member.lives]
    voters = [member for member in members if member.is_primary and member.slots]
    if len(voters) < VOTERS:
        found.append(
            f"{len(voters)} primaries with slots: no replica is promoted when one is lost. {VOTERS} are needed;"
            " an arbiter counts"
        )
    if missing := set(range(SLOTS)).difference(*(member.slots for member in members)):
        lost = partitions_in(missing, partitions)
        found.append(f"{len(missing)} slots belong to no node, with the partitions {lost}")
    several_machines = len({member.host for member in members}) > 1
    for member in voters:
        copies = [other for other in members if other.primary == member.id and other.lives]
        if member.is_arbiter:
            if wrong := partitions_in(member.slots, partitions):
                found.append(f"arbiter {member.place} has the slots of the partitions {wrong}")
        elif not copies:
            found.append(f"{member.place} has no replica: if it is lost, so are its data since the last backup")
        elif replicas and len(copies) <= replicas:
            found.append(
                f"{member.place} has {len(copies)} replicas: with IMAGEGRAM_REPLICAS={replicas} it needs"
                f" {replicas + 1}, so that writes go on when one is lost"
            )
        if several_machines and any(copy.host == member.host for copy in copies):
            found.append(f"{member.place} has a replica on its own machine")
    return found


async def warn(settings: Settings) -> None:
    """Log what is wrong with the shape of the Cluster, when a process starts.

    Says nothing if no node answers: the process waits for Redis then, and says so itself.
    """
    db = connect(settings.redis_url)
    if isinstance(db, Cluster):
        with suppress(Unreachable):
            for problem in problems(await read(db), settings.partitions, settings.replicas):
                log.warning("%s", problem)
    await db.close()


def table(members: list[Member], partitions: int) -> str:
    """The text that `cluster show` prints: a line a node, replicas below their primary."""
    lines = ["node                   role      partitions  slots"]
    primaries = sorted((member for member in members if member.is_primary), key=lambda member: member.place)
    for primary in primaries:
        for member in [primary, *(other for other in members if other.primary == primary.id)]:
            role = "replica" if member.primary else "arbiter" if member.is_arbiter else "primary"
            count = str(len(partitions_in(member.slots, partitions))) if member.holds_data else ""
            slots = "does not answer" if not member.lives else f"{len(member.slots)} slots" if member.is_primary else ""
            lines.append(f"{'  ' * bool(member.primary) + member.place:<21}  {role:<8}  {count:>10}  {slots}".rstrip())
    return "\n".join(lines)


def moves(members: list[Member], partitions: int, without: str = "") -> Moves:
    """What must move so that each data primary holds as many partitions as the others, give or take one.

    Balances the partitions in use (`partitions`), and all that are dealt out, so that those added later are balanced
    too. `without`: the `host:port` of a primary that shall hold none; it gives away all its slots. New primaries, which
    have no slots yet, count. Raises Refused if there is nobody to give to.
    """
    primaries = [member for member in members if member.is_primary and member.lives and not member.is_arbiter]
    takers = [member for member in primaries if member.place != without]
    if without and len(takers) == len(primaries):
        raise Refused(f"{without} is no data primary")
    if not takers:
        raise Refused("there is no primary that could take the slots")
    found: Moves = defaultdict(list)
    owned = {member.id: set(member.slots) for member in primaries}
    dealt = {partition_slot(partition) for partition in range(max(PLACED, partitions))}

    def move(slot: int, source: str, target: str) -> None:
        owned[source].remove(slot)
        owned[target].add(slot)
        found[source, target].append(slot)

    for member in primaries:
        if member.place == without:
            others = sorted(owned[member.id] - dealt)
            for number, slot in enumerate(others):  # a range for each, because a command with 8,000 slots is long
                move(slot, member.id, takers[number * len(takers) // len(others)].id)
            for slot in dealt & owned[member.id]:
                move(slot, member.id, min(takers, key=lambda taker: len(owned[taker.id] & dealt)).id)
    used = {partition_slot(partition) for partition in range(partitions)}
    for among in (used, dealt - used):  # the second round leaves the first one's balance as it is
        while True:
            counts = sorted((len(owned[taker.id] & among), taker.id) for taker in takers)
            (fewest, target), (most, source) = counts[0], counts[-1]
            if most - fewest < 2:
                break
            move(min(owned[source] & among), source, target)
    return _shortened(found)


def _shortened(found: Moves) -> Moves:
    """Each slot moves once, from where it is to where it shall be, however many steps led there."""
    first: dict[int, str] = {}
    last: dict[int, str] = {}
    for (source, target), slots in found.items():
        for slot in slots:
            first.setdefault(slot, source)
            last[slot] = target
    short: Moves = defaultdict(list)
    for slot, source in sorted(first.items()):
        if source != last[slot]:
            short[source, last[slot]].append(slot)
    return short


def command(target: str, slots: Slots) -> list[str]:
    """The command that moves slots to the node with the id `target`, for the node that has them (Valkey 9)."""
    pairs = [str(end) for pair in ranges(slots) for end in pair]
    return ["CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", *pairs, "NODE", target]


async def move(cluster: Cluster, members: list[Member], planned: Moves, partitions: int, report: Report) -> None:
    """Move slots, each partition that is in use by itself. Returns when all are where they shall be.

    The source deletes a slot when the target has it, whether the target's replicas have it or not. A target that is
    lost in this moment takes the slot with it. So the next slot moves when the replicas have received the last one.

    Raises Refused if a server cannot move slots atomically (Redis, Valkey before 9) or gives up, and Unreachable.
    """
    places = {member.id: member.place for member in members}
    alone = {partition_slot(partition) for partition in range(partitions)}
    for (source, target), slots in planned.items():
        node = cluster.node(places[source])
        parts = [[slot] for slot in slots if slot in alone] + [[slot for slot in slots if slot not in alone]]
        for part in filter(None, parts):
            began = time.monotonic()
            try:
                await node.ask(*command(target, part))
                while (state := await _migration(node, target)) not in ("success", ""):
                    if state in ("failed", "canceled"):
                        raise Refused(f"{places[source]} could not move its slots to {places[target]}: {state}")
                    await asyncio.sleep(POLL)
                # A source that was restarted meanwhile knows of no migration.
                owners = {member.id for member in await _members(node) if part[0] in member.slots}
            except REPLIED as error:
                raise Refused(f"{places[source]} does not move slots: {error}") from None
            if owners != {target}:
                raise Refused(f"{places[source]} has not moved its slots: run the same command again")
            await _replicated(cluster.node(places[target]))
            taken = time.monotonic() - began
            report(f"{places[source]} -> {places[target]}: {written(part)} ({taken:.1f} s)")


async def _replicated(node: Node) -> None:
    """Wait until all connected replicas of a node have received what it has now. Raises Refused if it takes long."""
    wanted = int((await node.info("replication"))["master_repl_offset"])

    async def received() -> bool:
        about = await node.info("replication")
        copies = [value for name, value in about.items() if re.fullmatch("slave[0-9]+", name) and "online" in value]
        return all(int(value.partition("offset=")[2].partition(",")[0]) >= wanted for value in copies)

    await _until(received, f"the replicas of {node.place} have received the slots")


async def _migration(node: Node, target: str) -> str:
    """The state of the newest migration from this node to `target`; "" if there is none."""
    for job in await node.ask("CLUSTER", "GETSLOTMIGRATIONS"):  # newest first
        about: dict[str, Any] = dict(zip(job[::2], job[1::2], strict=True))
        if about["target_node"] == target and about["operation"] == "EXPORT":
            return str(about["state"])
    return ""


async def form(cluster: Cluster, primaries: int, arbiters: int, report: Report = print) -> None:
    """Make a Cluster of the nodes in the URL. Does only what is missing, so it can be repeated at any time.

    1. Slots that no node has go to the data primaries and to the arbiters. The first nodes without slots become the
       primaries that are missing, the last ones the arbiters.
    2. All nodes learn the present addresses of all.
    3. The other nodes without slots become replicas, on other machines than their primary if there are any.

    Slots that a node has stay with it, also if that node does not answer. Only an arbiter is replaced, by an empty node
    among the last `arbiters` of the URL: it held nothing, and as a replica the node could not vote. `primaries` and
    `arbiters` are the numbers that the Cluster shall have. Returns when all nodes agree and all replicas have the data.

    Raises Refused if there are too few nodes, or a node does not answer and the owner of some slots is not known, or it
    takes too long. Raises Unreachable if no node answers.
    """
    nodes = await _answering(cluster, report)
    views = {node: await _members(node) for node in nodes}
    own = {node: next(member for member in view if "myself" in member.flags) for node, view in views.items()}
    has_slots = {slot for view in views.values() for member in view for slot in member.slots}
    if len(has_slots) < SLOTS and len(nodes) < len(cluster.nodes()):
        # It may have them, and data: a node that was restored is not known to the others yet, and may still be loading.
        # When it learned that another node has its slots, it would delete their keys.
        raise Refused("some slots belong to no node that is known: they are given away only when all nodes answer")
    empty = [node for node in nodes if own[node].is_primary and not own[node].slots]
    data = [node for node in nodes if own[node].holds_data]
    known = {member.id: member for view in views.values() for member in view if member.is_primary and member.slots}
    answering = {member.id for member in own.values()}
    lost = [member for member in known.values() if member.is_arbiter and member.id not in answering]
    spare = [node for node in cluster.nodes()[len(cluster.nodes()) - arbiters :] if node in empty]
    for member, node in zip(lost, spare, strict=False):
        for other in nodes:
            if any(member.id == one.id for one in views[other]):
                await _tell(other, "CLUSTER", "FORGET", member.id)
        report(f"{node.place}: in place of an arbiter that is lost")
        has_slots -= known.pop(member.id).slots
    new = max(0, primaries - sum(member.holds_data for member in known.values()))
    new_arbiters = max(0, arbiters - sum(member.is_arbiter for member in known.values()))
    if len(empty) < new + new_arbiters:
        raise Refused(f"{new + new_arbiters} more primaries are needed, and {len(empty)} nodes are free for that")
    data += empty[:new]
    chosen = data + empty[len(empty) - new_arbiters :]
    replicas = empty[new : len(empty) - new_arbiters]
    shares = placement(len(data), arbiters)[: len(data)] if data else []
    shares += [[slot] for slot in range(SLOTS - arbiters, SLOTS) if slot not in has_slots][:new_arbiters]
    if len(shares) < len(chosen):
        raise Refused(f"data primaries have the last {arbiters} slots, which arbiters need")
    # Slots are given before the nodes meet: two nodes never claim the same slot.
    for number, (node, share) in enumerate(zip(chosen, shares, strict=True)):
        if given := set(share) - has_slots:
            await _tell(node, "CLUSTER", "ADDSLOTSRANGE", *(end for pair in ranges(given) for end in pair))
            report(f"{node.place}: {len(given)} slots")
        if len(views[node]) == 1 and given and not own[node].epoch:
            await _tell(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
    await _meet(nodes)
    for node in replicas:
        if (await _own(node)).is_primary:  # otherwise another `form`, which runs at the same time, was faster
            view = await _members(nodes[0])
            primary = _needs_replica(view, own[node].id, [own[one].id for one in data])
            await _tell(node, "CLUSTER", "REPLICATE", primary.id)
            report(f"{node.place}: a replica of {primary.place}")
        await _until(lambda: _knows_role(nodes[0], own[node].id), f"{node.place} replicates")  # noqa: B023
    await _until(lambda: _all(nodes, _complete), "all nodes agree and all replicas have the data")


async def bring_home(cluster: Cluster, primaries: int, report: Report = print) -> None:
    """Make the first `primaries` nodes of the URL primaries again. A Cluster that was formed has them there.

    After failovers, several primaries may be on one machine, or one beside an arbiter. If that machine is lost, most of
    the primaries are, and no replica is promoted. By CLUSTER FAILOVER a replica takes over without losing a write.

    Raises Refused if it takes too long, and Unreachable.
    """
    homes = cluster.nodes()[:primaries]
    own = {}
    for node in homes:
        with suppress(*REPLIED, Unreachable):
            own[node] = await _own(node)
    ids = {member.id for member in own.values()}
    for node, member in own.items():
        # A replica of another of them stays: the two would take turns.
        if member.primary and member.primary not in ids:
            await _tell(node, "CLUSTER", "FAILOVER")
            await _until(lambda: _succeeded(node, member.primary), f"{node.place} is a primary")  # noqa: B023
            report(f"{node.place}: a primary again")


async def _succeeded(node: Node, primary: str) -> bool:
    """Whether a node is the primary now, and knows that the one before and its other replicas follow."""
    members = [member for member in await _members(node) if member.lives]
    return not any(member.primary == primary or (member.id == primary and member.is_primary) for member in members)


async def _answering(cluster: Cluster, report: Report) -> list[Node]:
    """The nodes that answer. Waits for the others for FORM_SECONDS, unless the owners of all slots are known.

    Does not wait for a node that refuses: its server is no node of a Cluster, or this user may not ask.
    """
    deadline = time.monotonic() + FORM_SECONDS
    waits = False
    while True:
        answering, away = [], False
        slots: set[int] = set()
        failures: list[str] = []
        for node in cluster.nodes():
            try:
                slots.update(*(member.slots for member in await _members(node)))
                answering.append(node)
            except (*REPLIED, Unreachable) as error:
                failures.append(f"{node.place}: {error}")
                away = away or isinstance(error, (Unreachable, BusyLoadingError))
        if not away or len(slots) == SLOTS or time.monotonic() > deadline:
            break
        if not waits:
            report(f"waits for {len(failures)} nodes; {failures[0]}")
            waits = True
        await asyncio.sleep(POLL)
    for failure in failures:
        report(failure)
    if not answering:
        raise Unreachable("no node of the cluster can be reached")
    return answering


async def _meet(nodes: list[Node]) -> None:
    """Let the first node meet those that it does not know at their present address. Wait until each knows each."""
    ids = {node: await node.ask("CLUSTER", "MYID") for node in nodes}
    known = {(member.id, member.host, member.port) for member in await _members(nodes[0]) if member.lives}
    loop = asyncio.get_running_loop()
    for node in nodes[1:]:
        # The command takes an address only, no name.
        found = await loop.getaddrinfo(node.host, node.port, type=socket.SOCK_STREAM)
        host = str(found[0][4][0])
        if (ids[node], host, node.port) not in known:
            await _tell(nodes[0], "CLUSTER", "MEET", host, node.port)

    async def knows_all(node: Node) -> bool:
        members = await _members(node)
        # A handshake with a node that is known at another address is a member of its own until it ends.
        handshakes = any("handshake" in member.flags for member in members)
        return not handshakes and set(ids.values()) <= {member.id for member in members if member.lives}

    await _until(lambda: _all(nodes, knows_all), "all nodes know each other")


def _needs_replica(view: list[Member], replica: str, data: list[str]) -> Member:
    """The data primary with the fewest replicas. Among equals one that has no copy on the new replica's machine.

    Among equals of these the first one in the URL: so the order of the nodes there chooses the shards, where addresses
    do not tell machines apart (deploy/k8s/overlays/cluster). `data`: the ids of data primaries, in the order of the
    URL. They may not have slots yet.
    """
    host = next(member.host for member in view if member.id == replica)
    shards = [member for member in view if member.lives and (member.holds_data or member.id in data)]
    if not shards:
        raise Refused("no data primary answers")
    copies = Counter(member.primary for member in view if member.lives)
    on_machine = {member.primary or member.id for member in view if member.lives and member.host == host}
    shards.sort(key=lambda member: data.index(member.id) if member.id in data else len(data))
    return min(shards, key=lambda member: (copies[member.id], member.id in on_machine))


async def _knows_role(node: Node, replica: str) -> bool:
    return any(member.id == replica and member.primary for member in await _members(node))


async def _complete(node: Node) -> bool:
    """Whether the node sees a working cluster, and has its primary's data if it is a replica."""
    state = await node.ask("CLUSTER", "INFO")
    replication = await node.ask("INFO", "replication")
    return "cluster_state:ok" in state and ("role:master" in replication or "master_link_status:up" in replication)


async def _all(nodes: list[Node], holds: Callable[[Node], Awaitable[bool]]) -> bool:
    return all(await asyncio.gather(*map(holds, nodes)))


async def _until(holds: Callable[[], Awaitable[bool]], what: str) -> None:
    """Wait until something holds. Raises Refused if that takes more than FORM_SECONDS."""
    deadline = time.monotonic() + FORM_SECONDS
    while True:
        try:
            if await holds():
                return
        except (*REPLIED, Unreachable):
            pass
        if time.monotonic() > deadline:
            raise Refused(f"it takes too long until {what}: run the same command again")
        await asyncio.sleep(POLL)
