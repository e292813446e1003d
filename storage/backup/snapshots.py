"""`imagegram-storage snapshots`: the generations in the backup store, and which seconds can be had back."""

import time
from dataclasses import dataclass

from storage.backup import chain
from storage.backup.restore import clock
from storage.backup.state import State, TrialResult
from storage.backup.verify import describe_result
from storage.objects import ObjectStore


@dataclass
class Snapshot:
    generation: int
    server: str
    second: int  # unix seconds: of the base, and
    until: int  # of the last object, when its bytes were read
    size: int  # bytes in the store
    objects: int
    state: str  # "open", "closed", "gap" (closed, and the next does not join), "base" (increments removed)


async def snapshots(store: ObjectStore) -> list[Snapshot]:
    """All complete generations, oldest first. Raises Damaged, Unavailable."""
    described = await chain.descriptions(store)
    found = []
    for number, description in described.items():
        sizes = [entry.size async for entry in store.list(f"{number:08}/")]
        loaded = await chain.load(store, number)
        end = loaded.end if loaded else None
        found.append(
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
    return found


def _state(end: chain.Header | None, is_newest: bool) -> str:
    if end is None:
        return "gap"
    if "closed" in end:
        return "gap" if end["gap"] else "closed"
    if is_newest:
        return "open"
    return "base" if "next" in end else "gap"


def table(found: list[Snapshot], state: State, result: TrialResult | None) -> str:
    """For people. `state` is that of the shipper here (`state.read`), `result` the store's (`verify.last_result`)."""
    lines = ["generation  base                  until                 objects       MiB  state   server"]
    for snapshot in found:
        lines.append(
            f"{snapshot.generation:>10}  {clock(snapshot.second)}  {clock(snapshot.until)}  {snapshot.objects:>7}"
            f"  {snapshot.size / (1 << 20):>8.1f}  {snapshot.state:<6}  {snapshot.server}"
        )
    notes = [state["trouble"]] if state["trouble"] else []
    if state["lag"] is not None:
        notes.insert(0, f"{state['lag']:.1f} s behind")
    lines.append(f"shipper here: {', '.join(notes) or 'has not caught up yet'}")
    if result:
        age = (time.time() - result["time"]) / 3600
        lines.append(f"verified {clock(result['time'])}, {age:.0f} h ago: {describe_result(result)}")
    else:
        lines.append("verified: never")
    return "\n".join(lines)
