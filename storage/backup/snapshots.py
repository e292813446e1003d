"""`imagegram-storage snapshots`: lists the generations in the backup store and the seconds that can be restored."""

import time
from dataclasses import dataclass

from storage.backup import chain, owners
from storage.backup.restore import format_utc
from storage.backup.state import State, TrialResult
from storage.backup.verify import describe_result, last_result
from storage.objects import Below, ObjectStore


@dataclass
class Snapshot:
    """One generation in the backup store."""

    generation: int
    server: str  # which server wrote it, for example "valkey 9.1.2"
    second: int  # unix second of the base
    until: int  # unix second at which the newest bytes were read from Redis' files
    size: int  # bytes of its chain in the store, compressed
    objects: int  # of its chain
    state: str  # "open", "closed", "gap" or "base": see the package's docstring


async def snapshots(store: ObjectStore) -> list[Snapshot]:
    """Read all generations that have a description, oldest first. Raises Damaged, NotFound and Unavailable."""
    described = await chain.descriptions(store)
    listed = []
    for number, description in described.items():
        sizes = [entry.size async for entry in store.list(f"{number:08}/")]
        loaded = await chain.load(store, number)
        end = loaded.end if loaded else None
        listed.append(
            Snapshot(
                number,
                f"{description['server']} {description['version']}",
                description["second"],
                int(end["time"]) if end else description["second"],
                sum(sizes),
                len(sizes),
                _state(end, is_newest=number == max(described)),
            )
        )
    return listed


def _state(end: chain.Header | None, is_newest: bool) -> str:
    """Return the state of a generation. `end` is the header of its last object, None if its chain has no object."""
    if end is None:
        return "gap"
    if "closed" in end:
        return "gap" if end["gap"] else "closed"
    if is_newest:
        return "open"
    return "base" if "next" in end else "gap"


def table(listed: list[Snapshot], state: State, result: TrialResult | None) -> str:
    """Return the text that `snapshots` prints.

    `state` is the state of the shipper on this machine (`state.read`). `result` is the result of the last trial, from
    the store (`verify.last_result`).
    """
    return "\n".join([*_rows(listed), *_notes(state, result)])


async def cluster_table(store: ObjectStore, state: State, result: TrialResult | None) -> str:
    """Return the text that `snapshots` prints for the store of a Cluster: a table for each node.

    Raises Damaged, NotFound and Unavailable.
    """
    lines = []
    for node, records in (await owners.read(store)).items():
        last, below = records[-1], Below(store, node)
        slots = len(owners.expand(last["slots"]))
        role = f"replica of {last['follows']}" if last["follows"] else f"primary of {slots} slots"
        trial = await last_result(below)
        lines.append(f"node {node}: {role} since {format_utc(last['seen'])}")
        lines += [*_rows(await snapshots(below)), _verified(trial), ""]
    return "\n".join([*lines, "the whole Cluster:", *_notes(state, result)])


def _rows(listed: list[Snapshot]) -> list[str]:
    lines = ["generation  base                  until                 objects       MiB  state   server"]
    for snapshot in listed:
        lines.append(
            f"{snapshot.generation:>10}  {format_utc(snapshot.second)}  {format_utc(snapshot.until)}"
            f"  {snapshot.objects:>7}  {snapshot.size / (1 << 20):>8.1f}  {snapshot.state:<6}  {snapshot.server}"
        )
    return lines


def _notes(state: State, result: TrialResult | None) -> list[str]:
    notes = [state["trouble"]] if state["trouble"] else []
    if state["lag"] is not None:
        notes.insert(0, f"{state['lag']:.1f} s behind")
    return [f"shipper here: {', '.join(notes) or 'has not caught up yet'}", _verified(result)]


def _verified(result: TrialResult | None) -> str:
    if not result:
        return "verified: never"
    age = (time.time() - result["time"]) / 3600
    return f"verified {format_utc(result['time'])}, {age:.0f} h ago: {describe_result(result)}"
