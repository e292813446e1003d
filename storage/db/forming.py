"""Forms a Redis Cluster, completes it, and moves partitions between its nodes. The words are those of topology.py."""

import asyncio
import re
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from redis.exceptions import BusyLoadingError

from storage.db.client import REPLIED
from storage.db.cluster import SLOTS, Cluster, Node
from storage.db.topology import (
    Member,
    Moves,
    Refused,
    command,
    itself,
    members_of,
    partition_slot,
    placement,
    ranges,
    written,
)
from storage.errors import Unreachable

POLL = 0.1  # seconds between two looks at what is awaited
FORM_SECONDS = 60.0  # for nodes to start, to learn of each other, and to copy the data of their primary

Report = Callable[[str], None]


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
                owners = {member.id for member in await members_of(node) if part[0] in member.slots}
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
    views = {node: await members_of(node) for node in nodes}
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
            await _give(node, given, own[node], number + 1)
            report(f"{node.place}: {len(given)} slots")
    await _meet(nodes)
    for node in replicas:
        await _replicate(node, own[node].id, nodes[0], [own[one].id for one in data], report)
    await _until(lambda: _all(nodes, _complete), "all nodes agree and all replicas have the data")


async def _give(node: Node, slots: set[int], member: Member, epoch: int) -> None:
    """Give a node slots, and a config epoch if it has none: no other node may have the same."""
    await _tell(node, "CLUSTER", "ADDSLOTSRANGE", *(end for pair in ranges(slots) for end in pair))
    if not member.epoch and len(await members_of(node)) == 1:
        await _tell(node, "CLUSTER", "SET-CONFIG-EPOCH", epoch)


async def _replicate(node: Node, name: str, first: Node, data: list[str], report: Report) -> None:
    """Make a node with the id `name` a replica, as the node `first` sees the others. `data`: as in `_needs_replica`."""
    if (await itself(node)).is_primary:  # otherwise another `form`, which runs at the same time, was faster
        primary = _needs_replica(await members_of(first), name, data)
        await _tell(node, "CLUSTER", "REPLICATE", primary.id)
        report(f"{node.place}: a replica of {primary.place}")
    await _until(lambda: _knows_role(first, name), f"{node.place} replicates")


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
            own[node] = await itself(node)
    ids = {member.id for member in own.values()}
    for node, member in own.items():
        # A replica of another of them stays: the two would take turns.
        if member.primary and member.primary not in ids:
            await _tell(node, "CLUSTER", "FAILOVER")
            await _until(lambda: _succeeded(node, member.primary), f"{node.place} is a primary")  # noqa: B023
            report(f"{node.place}: a primary again")


async def _succeeded(node: Node, primary: str) -> bool:
    """Whether a node is the primary now, and knows that the one before and its other replicas follow."""
    members = [member for member in await members_of(node) if member.lives]
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
                slots.update(*(member.slots for member in await members_of(node)))
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
    known = {(member.id, member.host, member.port) for member in await members_of(nodes[0]) if member.lives}
    loop = asyncio.get_running_loop()
    for node in nodes[1:]:
        # The command takes an address only, no name.
        found = await loop.getaddrinfo(node.host, node.port, type=socket.SOCK_STREAM)
        host = str(found[0][4][0])
        if (ids[node], host, node.port) not in known:
            await _tell(nodes[0], "CLUSTER", "MEET", host, node.port)

    async def knows_all(node: Node) -> bool:
        members = await members_of(node)
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
    return any(member.id == replica and member.primary for member in await members_of(node))


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


async def _tell(node: Node, *command: str | int) -> None:
    """Give a node a command. Raises Refused if it replies with an error, and Unreachable."""
    try:
        await node.ask(*command)
    except REPLIED as error:
        raise Refused(f"{node.place} refuses {command[0]} {command[1]}: {error}") from None
