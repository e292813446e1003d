"""The checker of histories finds the faults for which it is there. `make drill-cluster` uses it."""

import math
import random

import pytest
from linearizable import Op, linearizable, unseen, with_losses

A, B = (5, 0), (5, 1)
UNKNOWN = math.inf


def page(begin: float, end: float, *ids) -> Op:
    return Op(begin, end, "page", result=frozenset(ids))


RIGHT = {
    "one after the other": [
        Op(0, 1, "add", A), page(2, 3, A), Op(3, 4, "read", A, True), Op(4, 5, "delete", A), Op(5, 6, "read", A, False),
        Op(6, 7, "count", result=0), page(8, 9),
    ],
    "a page during an add shows it or not": [Op(0, 5, "add", A), page(1, 2), page(3, 4, A)],
    "the ids tell the order of adds": [Op(0, 5, "add", B), Op(0, 5, "add", A), page(1, 2, A), page(6, 7, A, B)],
    "an unknown add happens late": [Op(0, UNKNOWN, "add", A), page(1, 2), page(3, 4), page(5, 6, A)],
    "an unknown add never happens": [Op(0, UNKNOWN, "add", unseen(0)), page(1, 2), Op(3, 4, "count", result=0)],
    "an unknown delete happens late": [Op(0, 1, "add", A), Op(2, UNKNOWN, "delete", A), page(3, 4, A), page(5, 6)],
}  # fmt: skip
WRONG = {
    "an acknowledged add is lost": [Op(0, 1, "add", A), page(2, 3)],
    "an acknowledged add is seen, then lost": [Op(0, 1, "add", A), page(2, 3, A), page(4, 5)],
    "an acknowledged delete is lost": [Op(0, 1, "add", A), Op(2, 3, "delete", A), page(4, 5, A)],
    "a read goes back": [Op(0, 9, "add", A), page(1, 2, A), page(3, 4)],
    "a comment was deleted before it was there": [Op(0, 1, "delete", A), Op(2, 3, "add", A)],
    "a comment is read before its add begins": [page(0, 1, A), Op(2, 3, "add", A)],
    "a later add has a smaller id": [Op(0, 1, "add", B), Op(2, 3, "add", A)],
    "a count is too high": [Op(0, 1, "add", A), Op(2, 3, "count", result=2)],
    "an unknown add vanishes": [Op(0, UNKNOWN, "add", A), page(1, 2, A), page(3, 4)],
    "a page shows a comment that nobody added": [Op(0, 9, "add", A), Op(0, 9, "delete", A), page(1, 2, B)],
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_history_is_linearizable(name):
    assert linearizable(RIGHT[name])


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_history_is_not(name):
    assert not linearizable(WRONG[name])


def test_a_failover_may_take_back_only_what_was_not_acknowledged_and_only_then():
    read_and_lost = [Op(0, UNKNOWN, "add", A), page(1, 2, A), page(5, 6)]
    assert not linearizable(read_and_lost)
    assert linearizable(with_losses(read_and_lost, 3, 4))
    assert linearizable(with_losses([Op(0, UNKNOWN, "add", unseen(0)), Op(1, 2, "count", result=1), page(5, 6)], 3, 4))
    deleted = [Op(0, 1, "add", A), Op(2, UNKNOWN, "delete", A), page(3, 4), page(8, 9, A)]
    assert linearizable(with_losses(deleted, 5, 7)) and not linearizable(deleted)
    acknowledged = [Op(0, 1, "add", A), page(1, 2, A), page(5, 6)]
    assert not linearizable(with_losses(acknowledged, 3, 4))
    lost_later = [*read_and_lost, page(4.1, 4.2, A)]
    assert not linearizable(with_losses(lost_later, 3, 4))


def simulate(chance: random.Random, count: int, unknown: float) -> list[Op]:
    """A history of 8 clients whose calls take effect at a random moment. A share of the writes is never answered."""
    moments = sorted((chance.uniform(0, count), client) for client in range(8) for _ in range(count // 8))
    last, ops, there, number = dict.fromkeys(range(8), -1.0), [], [], 0
    for at, client in moments:
        begin, end = chance.uniform(max(last[client], at - 9), at), at + chance.random() * 9
        kind = chance.choice(["add", "add", "delete", "page", "read", "count"])
        comment, result = (chance.choice(there) if there else (1, 0)), None
        if kind == "add":
            number += 1
            comment = (number, 0)
            there.append(comment)
        elif kind == "delete" and comment in there:
            there.remove(comment)
        elif kind == "page":
            result = frozenset(there)
        elif kind == "count":
            result = len(there)
        else:
            kind, result = "read", comment in there
        if kind in ("add", "delete") and chance.random() < unknown:
            end = UNKNOWN
        last[client] = at  # the next call begins after this one took effect, and perhaps before its end
        ops.append(Op(begin, end, kind, comment, result))
    return [*ops, page(count + 20, count + 21, *there)]


@pytest.mark.parametrize("seed", range(3))
def test_of_long_histories_the_right_ones_are_found_right_and_spoilt_ones_wrong(seed):
    chance = random.Random(seed)
    assert linearizable(simulate(chance, 200, unknown=0.02))
    ops = simulate(chance, 200, unknown=0)
    assert linearizable(ops)
    number = chance.choice([number for number, op in enumerate(ops) if op.kind == "page" and op.result])
    result = ops[number].result
    ops[number] = ops[number]._replace(result=result - {chance.choice(sorted(result))} | {(10**6, 0)})
    assert not linearizable(ops)
