"""Histories of calls on the comments of single posts, for the drill `history` of cluster.py."""

import asyncio
import math
import random
import time

from linearizable import Id, Op, Undecided, linearizable, unseen, with_losses
from making import NO_SEGMENTS

from storage import comments, posts
from storage.errors import NoComment, Unknown, Unreachable

PAGE = 1000  # comments; a post never has as many


class Recorder:
    """Calls of several clients on the comments of one post, as a history."""

    def __init__(self, post: str):
        self.post = post
        self.ops: list[Op] = []
        self.unknown: list[tuple[float, str]] = []  # begin and text of comments that may be there
        self.seen: dict[str, Id] = {}  # text -> id

    async def use(self, db, user: str, stopped: asyncio.Event) -> None:
        """Makes one call after the other."""
        own: list[str] = []
        number = 0
        while not stopped.is_set():
            kind = random.choices(("add", "delete", "page", "read", "count"), (5, 4, 4, 3, 4))[0]
            number += 1
            text, comment = f"{user}-{number}", random.choice(own) if own else ""
            if kind in ("delete", "read") and not comment:
                continue
            begin = time.monotonic()
            try:
                if kind == "add":
                    comment = (await comments.add(db, user, self.post, text))[0].id
                    own.append(comment)
                    self.ops.append(Op(begin, time.monotonic(), "add", number_of(comment)))
                elif kind == "delete":
                    own.remove(comment)
                    try:
                        await comments.delete(db, NO_SEGMENTS, user, self.post, comment)
                        self.ops.append(Op(begin, time.monotonic(), "delete", number_of(comment)))
                    except NoComment:
                        self.ops.append(Op(begin, time.monotonic(), "read", number_of(comment), False))
                elif kind == "page":
                    await self.read_page(db)
                elif kind == "read":
                    try:
                        there = bool(await comments.read(db, NO_SEGMENTS, self.post, comment))
                    except NoComment:
                        there = False
                    self.ops.append(Op(begin, time.monotonic(), "read", number_of(comment), there))
                else:
                    count = (await posts.read(db, self.post)).comment_count
                    self.ops.append(Op(begin, time.monotonic(), "count", result=count))
            except Unknown:
                if kind == "add":
                    self.unknown.append((begin, text))
                else:
                    self.ops.append(Op(begin, math.inf, "delete", number_of(comment)))
            except Unreachable:
                if kind == "delete":
                    own.append(comment)
                await asyncio.sleep(0.02)
            # Reads take a hundredth of the time of a write. Without a pause a history would have little else.
            await asyncio.sleep(random.random() / 50)

    async def read_page(self, db) -> None:
        begin = time.monotonic()
        page = await comments.page(db, NO_SEGMENTS, self.post, PAGE)
        assert not page.more
        found = {row.text: number_of(row.id) for row in page.comments}
        self.seen.update(found)
        self.ops.append(Op(begin, time.monotonic(), "page", result=frozenset(found.values())))

    def history(self) -> list[Op]:
        adds = [
            Op(begin, math.inf, "add", self.seen.get(text, unseen(number)))
            for number, (begin, text) in enumerate(self.unknown)
        ]
        return self.ops + adds


def number_of(comment: str) -> Id:
    ms, _, number = comment.partition("-")
    return int(ms), int(number)


def judge(ops: list[Op], hit: bool, killed: float, answered: float) -> str:
    """`hit`: the primary of the post was lost."""
    for verdict, tried in (
        ("linearizable", ops),
        ("linearizable but for reads of unacknowledged writes that were lost", with_losses(ops, killed, answered)),
    ):
        try:
            if linearizable(tried):
                return verdict
        except Undecided:
            if hit and tried is not ops:
                return "undecided"
        if not hit:
            break
    return "not linearizable"


def spoilt_is_wrong(ops: list[Op]) -> bool:
    """Whether the checker finds the loss of one acknowledged comment that is on the last page."""
    last = ops.index(max((op for op in ops if op.kind == "page"), key=lambda op: op.begin))
    added = {op.comment for op in ops if op.kind == "add" and op.end < math.inf}
    spoilt = list(ops)
    spoilt[last] = ops[last]._replace(result=ops[last].result - {max(added & ops[last].result)})
    return not linearizable(spoilt)
