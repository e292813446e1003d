"""The shape of a Redis Cluster: which nodes have which slots, who replicates whom, and what is wrong with that.

| word | meaning |
|---|---|
| data primary | a primary whose slots hold partitions |
| shard | a data primary and its replicas |
| arbiter | a primary that holds nothing: its one slot belongs to no partition. It only votes for failovers |
| placement | which slots each primary gets |

A partition is a small number in a hash tag, so all its keys are in one slot. CRC16 spreads small numbers unevenly: of
16 partitions, three equal ranges of slots get 6, 6 and 4. So the slots of partitions are dealt out one by one.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from storage.db.client import REPLIED
from storage.db.cluster import SLOTS, Cluster, Node, address, connect, slot_of
from storage.errors import Unreachable
from storage.settings import Settings

log = logging.getLogger("imagegram.redis")

# Partitions that are dealt out, so that a site can grow to as many without moving one. CRC16 spreads more well enough.
PLACED = 64
ARBITERS = 8  # the last slots, which are left for arbiters if there are any
VOTERS = 3  # primaries. A replica is promoted by the majority of them, and the majority of two is two

Slots = Iterable[int]
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
            members = await members_of(node)
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


async def members_of(node: Node) -> list[Member]:
    """All nodes, as this one knows them. Raises one of REPLIED, and Unreachable."""
    return parse(await node.ask("CLUSTER", "NODES"))


async def itself(node: Node) -> Member:
    """The node itself. Raises one of REPLIED, and Unreachable."""
    return next(member for member in await members_of(node) if "myself" in member.flags)


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
