"""Whether a history of calls on the comments of one post is linearizable.

Linearizable: each call takes effect at one moment between its begin and its end, and each result follows from the
effects before it (Herlihy and Wing, "Linearizability", 1990). The search is that of Wing and Gong with a cache of the
states that it has visited (Lowe, "Testing for linearizability", 2017). Each post has a history of its own.

| kind | result | effect |
|---|---|---|
| add | the id of the new comment, greater than all before it | the comment is there |
| delete | the comment was there | it is no longer there |
| page | the ids of all comments | none |
| read | whether one comment is there | none |
| count | how many comments there are | none |

A write of which it is not known whether it happened may take effect at any moment after its begin, or never: its `end`
is infinite. The id of such a comment is known if somebody has read it, otherwise it is one that `unseen` returns.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

Id = tuple[int, int]
State = tuple[frozenset[Id], Id]  # the comments that are there, and the greatest id that a comment ever had
MOST = 1_000_000  # states that a search visits before it gives up. A history without faults needs one for each call


class Op(NamedTuple):
    begin: float  # seconds
    end: float  # infinite: it is not known whether it happened
    kind: str
    comment: Id = (0, 0)  # of add, delete and read
    result: Any = None


class Undecided(Exception):
    """The search has visited MOST states."""


def unseen(number: int) -> Id:
    """The id of a comment that no page has shown."""
    return 0, -1 - number


def step(state: State, op: Op) -> State | None:
    """The state after a call. None: the call cannot have this result in this state."""
    (there, greatest), comment = state, op.comment
    match op.kind:
        case "add":
            right = comment > greatest or comment < (0, 0)
            after = there | {comment}, max(greatest, comment)
        case "delete" | "lose add":
            right, after = comment in there, (there - {comment}, greatest)
        case "lose delete":
            right, after = (0, 0) < comment <= greatest and comment not in there, (there | {comment}, greatest)
        case "page":
            right, after = there == op.result, state
        case "read":
            right, after = (comment in there) == op.result, state
        case "count":
            right, after = len(there) == op.result, state
    return after if right else None


def linearizable(history: Iterable[Op]) -> bool:
    """Raises Undecided."""
    ops = sorted(history, key=lambda op: op.begin)
    needed = sum(1 << number for number, op in enumerate(ops) if op.end < math.inf)
    start = 0, (frozenset(), (0, 0))  # the calls that have taken effect, as bits, and the state after them
    waiting: list[tuple[int, State]] = [start]
    visited = {start}
    while waiting:
        done, state = waiting.pop()
        if done & needed == needed:
            return True
        following = []
        earliest = math.inf  # end of all calls that have not taken effect: the next effect is before it
        for number in range((~done & done + 1).bit_length() - 1, len(ops)):
            op = ops[number]
            if op.begin > earliest:
                break
            if not done >> number & 1:
                earliest = min(earliest, op.end)
                if (after := step(state, op)) is not None:
                    following.append((op.end, (done | 1 << number, after)))
        # The last one in `waiting` is tried first: what ends first, and what may never have happened at the very end.
        for _, entry in sorted(following, key=lambda one: -one[0]):
            if entry not in visited:
                visited.add(entry)
                waiting.append(entry)
        if len(visited) > MOST:
            raise Undecided
    return False


def with_losses(history: Iterable[Op], killed: float, answered: float) -> list[Op]:
    """The history in which a failover may take back writes that were not acknowledged, also if somebody has read them.

    Reads wait for no replicas, so they show a write before it is acknowledged. `killed` is when the primary was lost,
    `answered` when its successor answered. What is seen after that is not taken back.
    """
    ops = list(history)
    after = [op for op in ops if op.begin > answered]
    losses = []
    for op in ops:
        if op.end == math.inf and op.begin < answered:
            shows = op.kind == "add"
            survived = any(
                (other.kind == "page" and (op.comment in other.result) == shows)
                or (other.kind == "read" and other.comment == op.comment and other.result == shows)
                for other in after
            )
            if not survived:
                losses.append(Op(max(killed, op.begin), math.inf, f"lose {op.kind}", op.comment))
    return ops + losses
