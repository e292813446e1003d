"""Proves the invariants on a live Redis or a restored folder, and makes what is derived true again.

    1  a ready post's score in the feed is the number of its comments, and nothing else is in the feed
    2  its latest comments are the newest of its stream
    3  every post is ready, failed, or in `making` and its author in `turns`; a ready one has its original, and its JPEG
       unless it is in `making`
    5  an upload's offset is within its chunks; it is due, and its bytes are reserved (0: no invariant names that)

Streams: some keys at a time, each post judged by one script at one moment, so that writes may go on meanwhile.
Neither reads what an original shows, nor compares it with what was uploaded: there is nothing to compare it with.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field

from redis.exceptions import ResponseError

from storage import keys, uploads
from storage.db.client import BATCH, Redis
from storage.errors import NoUpload
from storage.formats import LONGEST_MAGIC, sniff
from storage.objects import NotFound, ObjectStore
from storage.settings import DAY_MS, IMAGE_BYTES, LATEST_COMMENTS

EXACTLY = "surrogateescape"  # decodes what is not UTF-8 so that it can be sent back byte for byte
# What Redis says of each key of docs/keys.md
TYPES = {
    **dict.fromkeys(("feed", "changes", "gone", "due", "making", "turns"), "zset"),
    **dict.fromkeys(("post", "upload", "uploads"), "hash"),
    **dict.fromkeys(("latest", "chunks"), "list"),
    **dict.fromkeys(("once", "epoch", "restored"), "string"),
    "comments": "stream",
}
MAX_LINES = 20  # flaws told of by name


@dataclass
class Report:
    """What is there. Posts that come or go meanwhile may be counted or not."""

    posts: int = 0
    comments: int = 0
    uploads: int = 0
    flaws: int = 0  # that remain
    repaired: int = 0
    lines: list[str] = field(default_factory=list)  # the first flaws, repaired or not
    missing_posts: set[str] = field(default_factory=set)  # ids that are named and have no post
    partitions: set[int] = field(default_factory=set)

    def add(self, subject: str, flaw: str, repaired: bool) -> None:
        self.repaired += repaired
        self.flaws += not repaired
        if len(self.lines) < MAX_LINES:
            subject = subject.encode("utf-8", "backslashreplace").decode()
            self.lines.append(f"{subject}: {flaw}{' (repaired)' if repaired else ''}")

    def __str__(self) -> str:
        counts = f"{self.posts} posts, {self.comments} comments, {self.uploads} open uploads"
        return f"{counts}: {self.flaws} flaws remain, {self.repaired} were repaired"


async def check(db: Redis, objects: ObjectStore, repair: bool = False, deep: bool = False) -> Report:
    """Look at everything; `deep` also reads every object. Raises Unreachable, Unavailable.

    A malformed key is reported and left out. To repair members whose bytes are not UTF-8, `db` needs
    `undecodable=EXACTLY`.
    """
    report = Report()
    async for names in scan(db):
        work = []
        for name in well_formed_keys(names, report):
            kind, partition, rest = keys.parts(name)
            report.partitions.add(partition)
            if kind in ("post", "comments", "latest"):
                judged = _check_post(db, objects, rest, report, repair, deep, count=kind == "post")
                work.append(_isolate(rest, report, judged))
            elif kind == "upload":
                work.append(_isolate(rest, report, _check_upload(db, objects, rest, report, repair)))
            elif kind == "uploads":
                work.append(_isolate(name, report, _check_reservations(db, partition, rest, "", report, repair)))
            elif kind in ("feed", "changes", "gone", "due", "making"):
                work.append(_isolate(name, report, _check_members(db, objects, name, report, repair)))
        await asyncio.gather(*work)
    return report


def well_formed_keys(names: list[str], report: Report) -> list[str]:
    """Of names and types as `scan` yields them: the keys that are ours and well formed. Tells of malformed ones.

    Other keys are left alone, unless their names are not UTF-8.
    """
    known = []
    for name, kind in zip(names[::2], names[1::2], strict=True):
        expected = TYPES.get(name.split(":")[0])
        if _undecodable(name):
            report.add(name, "0 its name is not UTF-8", False)
        elif expected and not keys.well_formed(name):
            report.add(name, "0 no key has such a name", False)
        elif expected and kind != expected:
            report.add(name, f"0 its type is {kind}, not {expected}", False)
        elif expected:
            known.append(name)
    return known


def _undecodable(text: str) -> bool:
    return any(character == "\ufffd" or "\ud800" <= character <= "\udfff" for character in text)


async def _isolate(subject: str, report: Report, work: Coroutine) -> None:
    """Reports what cannot be judged, because it or a key beside it is malformed, and goes on."""
    try:
        await work
    except (ResponseError, ValueError):  # a command on a wrong type; a number or an object's name that is none
        report.add(subject, "0 it cannot be judged: it, or a key of its partition, is malformed", False)


async def _check_members(db: Redis, objects: ObjectStore, name: str, report: Report, repair: bool) -> None:
    """The members of a zset: each must be an id of its partition, and in `feed` and `changes` a ready post's."""
    kind, partition, _ = keys.parts(name)
    async for members in scan(db, name):
        ids = []
        for member in members[::2]:
            parts = keys.ID.fullmatch(member)
            if parts and int(parts[3]) == partition and (kind == "due" or not parts[1]):
                ids.append(member)
            else:
                removed = bool(repair and await db.call("drop_member", [name], member.encode("utf-8", EXACTLY)))
                report.add(member, f"0 no id in {kind} is like this", removed)
        if kind in ("feed", "changes"):
            work = (_check_post(db, objects, post, report, repair, deep=False, count=False) for post in ids)
            await asyncio.gather(*(_isolate(post, report, one) for post, one in zip(ids, work, strict=True)))


async def scan(db: Redis, *zset: str) -> AsyncIterator[list[str]]:
    """All keys of the server, each followed by its type, some hundred at a time; with `zset` its members and scores."""
    cursor = "0"
    while True:
        cursor, names = await db.call("scan", [*zset], cursor, BATCH)
        yield names
        if cursor == "0":
            return


async def _call_check_post(db: Redis, post: str, repair: bool) -> tuple[str | None, int, bool, list[str]]:
    partition = keys.partition_of_post(post)
    script_keys = [
        keys.post(post),
        keys.comments(post),
        keys.latest(post),
        keys.feed(partition),
        keys.changes(partition),
        keys.gone(partition),
        keys.turns(partition),
    ]
    args = (post, LATEST_COMMENTS, int(repair), keys.making_prefix(partition))
    status, comments, waits, *flaws = await db.call("check_post", script_keys, db.clock, *args)
    return status, comments, bool(waits), flaws


async def _check_post(
    db: Redis, objects: ObjectStore, post: str, report: Report, repair: bool, deep: bool, count: bool
) -> None:
    """One post. It is looked at under each name that it has; what the names share is told of once, under its own."""
    status, comments, waits, flaws = await _call_check_post(db, post, repair=False)
    if count:
        report.posts += 1
        report.comments += comments
    elif status:
        return
    if not status:
        if post in report.missing_posts:
            return
        report.missing_posts.add(post)
    if flaws and repair:
        flaws = (await _call_check_post(db, post, repair=True))[3]
        remaining = (await _call_check_post(db, post, repair=False))[3]
    else:
        remaining = flaws
    for flaw in flaws:
        report.add(post, flaw, flaw not in remaining)
    if status != "ready":
        return
    for name, role in ((keys.original(post), "original"), (keys.image(post), "JPEG")):
        if role == "JPEG" and waits:
            continue
        fault = await _object_flaw(objects, name, role, deep)
        if not fault or (await _call_check_post(db, post, repair=False))[0] != "ready":  # it was deleted meanwhile
            continue
        queued = role == "JPEG" and repair and await make_again(db, post)
        report.add(post, f"3 its {role} {fault}", bool(queued))


async def _object_flaw(objects: ObjectStore, name: str, role: str, deep: bool) -> str:
    """What is wrong with an object; empty if nothing is."""
    try:
        if not deep:
            return "" if await objects.size(name) else "is empty"
        head = b""
        end = b""
        async for piece in objects.read(name):
            head = head or piece[:LONGEST_MAGIC]
            end = (end + piece)[-2:]
    except NotFound:
        return "is missing"
    whole = bool(sniff(head)) if role == "original" else head[:2] == b"\xff\xd8" and end == b"\xff\xd9"
    return "" if whole else "is damaged"


async def make_again(db: Redis, post: str) -> int:
    """Put a post whose JPEG is missing back among its author's image work.

    Returns 1, or 0 if its image is not to be made or is there already.
    """
    partition = keys.partition_of_post(post)
    script_keys = [keys.post(post), keys.turns(partition), keys.due(partition)]
    return await db.call("make_again", script_keys, db.clock, post, keys.making_prefix(partition))


async def _check_upload(db: Redis, objects: ObjectStore, upload: str, report: Report, repair: bool) -> None:
    before = await uploads.inspect(db, upload)
    if before.post or (before.owner and before.expired):
        return
    if not (before.owner and before.expires):
        if before.owner or before.offset or before.expires:  # else it went a moment ago
            report.add(upload, f"0 its {'expiry' if before.owner else 'owner'} is missing", False)
        return
    report.uploads += 1
    await _check_reservations(db, keys.partition_of_upload(upload), before.owner, upload, report, repair)
    sizes = await asyncio.gather(
        *(objects.size(keys.chunk(upload, name)) for name in before.chunks), return_exceptions=True
    )
    for size in sizes:
        if isinstance(size, Exception) and not isinstance(size, (NotFound, ValueError)):  # no name of an object
            raise size
    stored = sum(size for size in sizes if isinstance(size, int))
    if stored == before.offset or (await uploads.inspect(db, upload))[:6] != before[:6]:  # it went on meanwhile
        return
    dropped = False
    if repair:
        with suppress(NoUpload):  # its hash has no offset, or it ended a moment ago
            await uploads.drop(db, before.owner, upload, remember_ms=DAY_MS)
            dropped = True
    report.add(upload, f"5 its offset is {before.offset}, its chunks have {stored} bytes", dropped)


async def _check_reservations(db: Redis, partition: int, user: str, upload: str, report: Report, repair: bool) -> None:
    """One upload of a user, or without one whatever their quota says."""
    script_keys = [keys.uploads(partition, user), keys.due(partition)]
    prefix = keys.upload_prefix(partition)
    flaws = await db.call("check_uploads", script_keys, db.clock, upload, prefix, IMAGE_BYTES, int(repair))
    for flawed, flaw in zip(flaws[::2], flaws[1::2], strict=True):
        report.add(flawed, flaw, repair)


async def fit_restored(db: Redis, objects: ObjectStore, partitions: int) -> Report:
    """Make restored data fit the store as it is now, then check it.

    The images of posts without JPEG are made again, uploads without their chunks are dropped, and each partition has a
    new epoch. What a repair of derived data would hide counts: a backup that needs one is not what was written.
    """
    async for names in scan(db):
        fitting = [_isolate(name, Report(), _fit_key(db, objects, name)) for name in well_formed_keys(names, Report())]
        await asyncio.gather(*fitting)
    report = await check(db, objects)
    for partition in report.partitions.union(range(partitions)):  # an empty one had a timeline, too
        script_keys = [keys.epoch(partition), keys.restored(partition)]
        await db.call("begin_epoch", script_keys, db.clock, secrets.token_hex(4))
    return report


async def _fit_key(db: Redis, objects: ObjectStore, name: str) -> None:
    kind, _, rest = keys.parts(name)
    if kind == "due":  # posts stood there before `making` existed
        async for members in scan(db, name):
            waiting = [member for member in members[::2] if (parts := keys.ID.fullmatch(member)) and not parts[1]]
            await asyncio.gather(*(make_again(db, post) for post in waiting))
    elif kind == "upload":
        await _check_upload(db, objects, rest, Report(), repair=True)
    elif kind == "post" and await _object_flaw(objects, keys.image(rest), "JPEG", deep=False):
        await make_again(db, rest)
