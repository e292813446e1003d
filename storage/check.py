"""Checks the invariants of the data in a live Redis or in a restored folder, and repairs derived data.

Each flaw in a report begins with the number of its invariant:

| number | invariant |
|---|---|
| 1 | The feed contains exactly the ready posts. A post's score is the number of its comments. |
| 2 | `latest` holds the newest comments of the post. |
| 3 | Every post is ready, failed, or in `making` with its author in `turns`. |
| 3 | A ready post has its original. It has its JPEG, unless it is in `making`. |
| 3 | A hidden post is in no list, has no JPEG, and has its original if it was ready. |
| 3 | Each segment that a post names is stored, and has the comments that its entry says. |
| 5 | The chunks of an open upload have as many bytes as its offset says. |
| 7 | No segment that a post names is to be removed. |
| 0 | No invariant: for example, an open upload is in `due`, and its bytes are reserved in `uploads`. |
| 0 | The list of a user's posts (`leaves`, `leaf`) contains exactly the posts of this user. |

The check reads some hundred keys at a time. One script judges each post at one moment, so writes may go on meanwhile.
The check does not decode originals. It does not compare them with the uploaded bytes either: nothing remembers those.
"""

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson
from redis.exceptions import ResponseError

from storage import keys, sealing, segments, uploads
from storage.db.client import BATCH, Redis
from storage.errors import NoUpload
from storage.formats import LONGEST_MAGIC, sniff
from storage.objects import NotFound, ObjectStore
from storage.outbox import make_again
from storage.posts import Image, erase_image, has_image, hide
from storage.settings import DAY_MS, IMAGE_BYTES, LATEST_COMMENTS, LEAF_ENTRIES

EXACTLY = "surrogateescape"  # error handler that decodes any bytes so that encoding gives the same bytes (PEP 383)
# The answer of Redis' TYPE to each kind of key in docs/keys.md.
TYPES = {
    **dict.fromkeys(
        ("feed", "changes", "gone", "due", "making", "turns", "leaves", "leaf", "sealing", "retired"), "zset"
    ),
    **dict.fromkeys(("post", "hidden", "kept", "upload", "uploads"), "hash"),
    **dict.fromkeys(("latest", "chunks", "segments"), "list"),
    **dict.fromkeys(("once", "rate", "epoch", "restored", "quiet"), "string"),
    "comments": "stream",
    "erased": "set",
}
SEGMENTS_TOGETHER = 16  # segments of a post that are read at the same time. Each has about 256 KiB of text at most
MAX_LINES = 20  # flaws that a report describes; the others are only counted


@dataclass
class Report:
    """The result of a check. Posts that are created or deleted during the check may be counted or not."""

    posts: int = 0
    comments: int = 0
    hot_comments: int = 0  # of `comments`: they are in Redis, the others in segments in the store
    erased_comments: int = 0  # besides `comments`: they were deleted and are still in a segment
    uploads: int = 0
    flaws: int = 0  # that were not repaired
    repaired: int = 0
    lines: list[str] = field(default_factory=list)  # the first MAX_LINES flaws, repaired or not
    missing_posts: set[str] = field(default_factory=set)  # ids that some key names, but that have no post
    partitions: set[int] = field(default_factory=set)  # that have keys

    def add(self, subject: str, flaw: str, repaired: bool) -> None:
        """Count a flaw of `subject`: an id, a key or a member of a sorted set."""
        self.repaired += repaired
        self.flaws += not repaired
        if len(self.lines) < MAX_LINES:
            subject = subject.encode("utf-8", "backslashreplace").decode()
            self.lines.append(f"{subject}: {flaw}{' (repaired)' if repaired else ''}")

    def __str__(self) -> str:
        sealed = self.comments - self.hot_comments
        places = f"{self.hot_comments} in Redis, {sealed} in the store, {self.erased_comments} erased"
        counts = f"{self.posts} posts, {self.comments} comments ({places}), {self.uploads} open uploads"
        return f"{counts}: {self.flaws} flaws remain, {self.repaired} were repaired"


async def check(db: Redis, objects: ObjectStore, repair: bool = False, deep: bool = False) -> Report:
    """Check all keys, and that their objects exist. With `deep` it also reads every object.

    With `repair` it repairs derived data: scores in the feed, latest comments, memberships in sorted sets, lists of
    users' posts, reserved bytes. It puts a post without JPEG back into image work, and drops an upload whose chunks are
    missing. A malformed key is reported and otherwise ignored. To remove members whose bytes are not UTF-8, `db` must
    be opened with `undecodable=EXACTLY`.

    Raises Unreachable, Unavailable, and Unknown where the reply to a repair was lost.
    """
    report = Report()
    async for names in scan(db):
        work = []
        for name in well_formed_keys(names, report):
            kind, partition, rest = keys.parts(name)
            report.partitions.add(partition)
            if kind in ("post", "hidden", "comments", "segments", "erased", "latest", "kept"):
                judged = _check_post(db, objects, rest, report, repair, deep, count=kind in ("post", "hidden"))
                work.append(_isolate(rest, report, judged))
            elif kind == "upload":
                work.append(_isolate(rest, report, _check_upload(db, objects, rest, report, repair)))
            elif kind == "uploads":
                work.append(_isolate(name, report, _check_reservations(db, partition, rest, "", report, repair)))
            elif kind == "leaf":
                work.append(_isolate(name, report, _check_leaf(db, partition, rest, report, repair)))
            elif kind == "quiet":
                work.append(_isolate(name, report, _check_quiet(db, name, report, repair)))
            elif kind in ("feed", "changes", "gone", "due", "making", "leaves", "sealing", "retired"):
                work.append(_isolate(name, report, _check_members(db, objects, name, report, repair)))
        await asyncio.gather(*work)
    return report


def well_formed_keys(names: list[str], report: Report) -> list[str]:
    """The keys of this project that are well formed, from names and types as `scan` yields them.

    Malformed keys of this project are added to the report. Keys of others, such as RQ's, are ignored, unless their
    names are not UTF-8.
    """
    known = []
    for name, kind in zip(names[::2], names[1::2], strict=True):
        expected = TYPES.get(name.split(":")[0])
        if _undecodable(name):
            report.add(name, "0 its name is not UTF-8", False)
        elif expected and not keys.well_formed(name):
            report.add(name, "0 its name is malformed", False)
        elif expected and kind != expected:
            report.add(name, f"0 its type is {kind}, not {expected}", False)
        elif expected:
            known.append(name)
    return known


def _undecodable(text: str) -> bool:
    """Whether the bytes of the text were not UTF-8. They are U+FFFD now, or surrogates where EXACTLY decoded them."""
    return any(character == "\ufffd" or "\ud800" <= character <= "\udfff" for character in text)


async def _isolate(subject: str, report: Report, work: Coroutine) -> None:
    """Run one check. If it cannot judge its subject, report that and go on with the other checks."""
    try:
        await work
    except (ResponseError, ValueError):  # a command met a key of another type; a number or an object's name is invalid
        report.add(subject, "0 it cannot be judged: it, or a key of its partition, is malformed", False)


async def _check_members(db: Redis, objects: ObjectStore, name: str, report: Report, repair: bool) -> None:
    """Check that each member of a sorted set is an id of its partition, in `feed` and `changes` of a ready post."""
    kind, partition, _ = keys.parts(name)
    async for members in scan(db, name):
        ids = []
        for member in members[::2]:
            parts = keys.ID.fullmatch(member)
            if kind == "leaves":
                valid = keys.well_formed(keys.leaf(partition, member))
            elif kind == "retired":
                valid = await _check_retired(db, partition, member, report, repair)
            else:
                valid = parts and int(parts[3]) == partition and (kind == "due" or not parts[1])
            if valid:
                ids.append(member)
            else:
                report.add(member, f"0 it is not a valid member of {kind}", repair and await _drop(db, name, member))
        if kind in ("feed", "changes"):
            work = (_check_post(db, objects, post, report, repair, deep=False, count=False) for post in ids)
            await asyncio.gather(*(_isolate(post, report, one) for post, one in zip(ids, work, strict=True)))


async def _drop(db: Redis, zset: str, member: str) -> bool:
    return bool(await db.call("drop_member", [zset], member.encode("utf-8", EXACTLY)))


async def _check_retired(db: Redis, partition: int, member: str, report: Report, repair: bool) -> bool:
    """Check that no post names the segments that a member of `retired` stands for. Returns whether it is well-formed.

    A segment that is removed, and its post, never come back. So two reads at different times are enough. The segment
    may be missing: after a restore the member is there again.
    """
    post, slash, name = member.partition("/")
    if not slash or (name and not keys.SEGMENT_NAME.fullmatch(name)):
        return False
    if not keys.well_formed(keys.segments(post)) or keys.partition_of_post(post) != partition:
        return False
    entries, _ = await sealing.read_segments(db, post)
    if any(not name or entry.endswith(f" {name}") for entry in entries):
        dropped = repair and await _drop(db, keys.retired(partition), member)
        report.add(member, "7 it is to be removed, and its post names it", dropped)
    return True


async def _check_quiet(db: Redis, name: str, report: Report, repair: bool) -> None:
    """Check that a revision is stored. Without it, find_quiet looks at all posts again."""
    try:
        valid = await db.call("read_restored", [name]) >= 0
    except (ResponseError, TypeError):
        valid = False
    if not valid:
        report.add(name, "0 it is no revision", repair and bool(await db.call("drop_key", [name])))


async def _check_leaf(db: Redis, partition: int, first: str, report: Report, repair: bool) -> None:
    """Check that each entry of a leaf is of a post of its author, and belongs in this leaf."""
    name = keys.leaf(partition, first)
    skip = len(keys.entry_prefix(""))
    flawed = []
    for start in itertools.count(0, BATCH):
        args = (start, BATCH, skip, keys.post_prefix(partition), keys.hidden_prefix(partition))
        page = await db.call("leaf_page", [keys.leaves(partition), name], *args)
        for entry, author, place in zip(page[::3], page[1::3], page[2::3], strict=True):
            if place != first:
                flawed.append((entry, "it is in a wrong leaf"))
            elif not author or entry != keys.entry(author, entry[skip:]):
                flawed.append((entry, "it names no post of this author"))
        if len(page) < 3 * BATCH:
            break
    for entry, flaw in flawed:
        report.add(entry, f"0 {flaw}", repair and await _drop(db, name, entry))


async def _check_listed(db: Redis, post: str, status: str, author: str, report: Report, repair: bool) -> None:
    """Check that a post is in the list of its author's posts. A hidden one is, too, but no page shows it."""
    partition = keys.partition_of_post(post)
    own_key = keys.hidden(post) if status.startswith("hidden ") else keys.post(post)
    script_keys = [own_key, keys.leaves(partition)]
    args = (author, keys.entry(author, post), keys.leaf_prefix(partition), LEAF_ENTRIES, int(repair))
    if await db.call("index_post", script_keys, *args):
        report.add(post, "0 it is missing in the list of its author's posts", repair)


async def scan(db: Redis, *zset: str) -> AsyncIterator[list[str]]:
    """All keys of the server, each followed by its type: [key, type, key, type, …], some hundred at a time.

    With the key of a sorted set, its members, each followed by its score. Keys that exist from the beginning to the end
    are yielded at least once (Redis, "SCAN", "Scan guarantees").
    """
    for server in [db] if zset else await db.primaries():
        cursor, began = "0", False
        while cursor != "0" or not began:
            cursor, names = await server.call("scan", [*zset], cursor, BATCH)
            began = True
            yield names


class Judged(NamedTuple):
    """What check_post found."""

    status: str | None  # None: no such post. Of a hidden post for example "hidden ready"
    author: str  # empty: no such post, or it has none
    comments: int
    hot: int  # of the comments: they are in Redis
    erased: int  # comments that were deleted and are still in a segment
    segments: int
    waits: bool  # whether its image is to be made
    image: Image | None
    flaws: list[str]


async def _call_check_post(db: Redis, post: str, repair: bool, stored: tuple[str, str] = ("", "")) -> Judged:
    """Call the script. `stored` is what `_newest_stored` has read."""
    partition = keys.partition_of_post(post)
    script_keys = [*keys.post_and_lists(post), keys.turns(partition), keys.hidden(post), keys.sealing(partition)]
    args = (post, LATEST_COMMENTS, int(repair), keys.making_prefix(partition), *stored)
    reply = await db.call("check_post", script_keys, db.clock, *args)
    return Judged(*reply[:6], bool(reply[6]), Image.parse(reply[7] or None), reply[8:])


async def _check_post(
    db: Redis, objects: ObjectStore, post: str, report: Report, repair: bool, deep: bool, count: bool
) -> None:
    """Check a post under one of its names: its own key, its comments, a member of the feed, and so on.

    `count` is true for its own key. The check of that key reports the post's flaws, so each is reported once. If that
    key is missing, the first check of another name reports it.
    """
    judged = await _call_check_post(db, post, repair=False)
    status, author, waits, flaws = judged.status, judged.author, judged.waits, judged.flaws
    if count:
        report.posts += 1
        report.comments += judged.comments
        report.hot_comments += judged.hot
        report.erased_comments += judged.erased
        if author:
            await _check_listed(db, post, status or "", author, report, repair)
    elif status:
        return
    if not status:
        if post in report.missing_posts:
            return
        report.missing_posts.add(post)
    stored = ("", "")
    if judged.segments and (deep or (flaws and repair)):
        stored = await _newest_stored(db, objects, post)
        flaws = (await _call_check_post(db, post, False, stored)).flaws
    if flaws and repair:
        flaws = (await _call_check_post(db, post, True, stored)).flaws
        remaining = (await _call_check_post(db, post, False, stored)).flaws
    else:
        remaining = flaws
    for flaw in flaws:
        report.add(post, flaw, flaw not in remaining)
    hidden, versions = bool(status and status.startswith("hidden ")), range(1, keys.IMAGE_VERSIONS + 1)
    if hidden and any([await has_image(objects, post, version) for version in versions]):
        if repair:
            await erase_image(objects, post)
        report.add(post, "3 it is hidden and its JPEG is stored", repair)
    if status not in ("ready", "hidden ready"):
        return
    if judged.segments:
        await _check_segments(db, objects, post, report, deep)
    image = judged.image or Image("")
    for name, role in ((keys.original(post), "original"), (keys.image(post, image.version), "JPEG")):
        if role == "JPEG" and (waits or status != "ready"):
            continue
        length = image.scans[-1] if role == "JPEG" and image.scans else None
        fault = await _object_flaw(objects, name, role, deep, length)
        if not fault or (await _call_check_post(db, post, repair=False)).status != status:  # it was deleted meanwhile
            continue
        queued = role == "JPEG" and repair and await make_again(db, post)
        report.add(post, f"3 its {role} {fault}", bool(queued))


async def _newest_stored(db: Redis, objects: ObjectStore, post: str) -> tuple[str, str]:
    """The newest entry in a post's `segments`, and as JSON the newest comments in its segments, newest first.

    Both are empty where a segment that has them is missing or damaged.
    """
    entries, erased = await sealing.read_segments(db, post)
    found: list[segments.Comment] = []
    for entry in reversed(entries):
        if len(found) >= LATEST_COMMENTS:
            break
        try:
            name = sealing.Entry.parse(entry).name
            if name != keys.NO_SEGMENT:
                rows = segments.decode(post, await objects.get(keys.segment(post, name)))
                found += [row for row in reversed(rows) if row.id not in erased]
        except (NotFound, ValueError):  # Damaged is a ValueError, too
            return "", ""
    return entries[-1] if entries else "", orjson.dumps([tuple(row) for row in found[:LATEST_COMMENTS]]).decode()


async def _check_segments(db: Redis, objects: ObjectStore, post: str, report: Report, deep: bool) -> None:
    """Check the segments of a post and its erased comments. With `deep` also read each segment.

    They may be replaced meanwhile. So a flaw counts only if the same entry is still there afterwards.
    """
    entries, erased = await sealing.read_segments(db, post)
    parsed = [sealing.Entry("0-0", 0, keys.NO_SEGMENT)]
    for entry in entries:
        try:
            parsed.append(sealing.Entry.parse(entry))
        except ValueError:
            report.add(post, f"3 an entry of its segments is malformed: {entry}", False)
            return
    missing = set(erased)  # the erased comments that are in no segment
    flaws: list[tuple[str, str]] = []  # what is flawed, an entry or an erased comment, and its flaw
    for start in range(0, len(entries), SEGMENTS_TOGETHER):
        pairs = list(itertools.pairwise(parsed[start : start + SEGMENTS_TOGETHER + 1]))
        found = await asyncio.gather(*(_segment_flaw(objects, post, *pair, missing, deep) for pair in pairs))
        flaws += [
            (entry, f"3 its segment {pair[1].name} {flaw}")
            for entry, pair, flaw in zip(entries[start:], pairs, found, strict=False)
            if flaw
        ]
    if not deep:
        missing = {comment for comment in erased if keys.order(comment) > keys.order(parsed[-1].last)}
    flaws += [(comment, f"3 its erased comment {comment} is in no segment") for comment in sorted(missing)]
    if flaws:
        entries, erased = await sealing.read_segments(db, post)
        for flawed, flaw in flaws:
            if flawed in entries or flawed in erased:
                report.add(post, flaw, False)


async def _segment_flaw(
    objects: ObjectStore, post: str, before: sealing.Entry, entry: sealing.Entry, missing: set[str], deep: bool
) -> str:
    """What is wrong with a segment. Empty: nothing. `before` is the entry of the next older one.

    With `deep` it reads the segment, and takes its comments out of `missing`.
    """
    count = entry.through - before.through
    if keys.order(entry.last) <= keys.order(before.last) or (count < 1) != (entry.name == keys.NO_SEGMENT) or count < 0:
        return "is not in order with the older ones"
    if entry.name == keys.NO_SEGMENT:
        return ""
    try:
        if not deep:
            return "" if await objects.size(keys.segment(post, entry.name)) else "is empty"
        rows = segments.decode(post, await objects.get(keys.segment(post, entry.name)))
    except NotFound:
        return "is missing"
    except segments.Damaged as error:
        return f"is damaged: {error}"
    missing.difference_update(row.id for row in rows)
    if len(rows) != count:
        return f"has {len(rows)} comments, not {count}"
    inside = keys.order(before.last) < keys.order(rows[0].id) and keys.order(rows[-1].id) <= keys.order(entry.last)
    return "" if inside else "has comments of another segment"


async def _object_flaw(objects: ObjectStore, name: str, role: str, deep: bool, length: int | None = None) -> str:
    """What is wrong with an object, whose `role` is "original" or "JPEG". Empty: nothing.

    `length`: how many bytes it must have; None: that is not known.
    """
    try:
        stored = await objects.size(name)
        if not stored:
            return "is empty"
        if stored != (length or stored):
            return f"has {stored} bytes, not {length}"
        if not deep:
            return ""
        head = b""
        end = b""
        async for piece in objects.read(name):
            head = head or piece[:LONGEST_MAGIC]
            end = (end + piece)[-2:]
    except NotFound:
        return "is missing"
    whole = bool(sniff(head)) if role == "original" else head[:2] == b"\xff\xd8" and end == b"\xff\xd9"
    return "" if whole else "is damaged"


async def _check_upload(db: Redis, objects: ObjectStore, upload: str, report: Report, repair: bool) -> None:
    """Check an upload that is open. A repair drops an upload whose chunks are incomplete: nobody can continue it."""
    before = await uploads.inspect(db, upload)
    if before.post or (before.owner and before.expired):
        return
    if not (before.owner and before.expires):
        if before.owner or before.offset or before.expires:  # otherwise it ended a moment ago
            report.add(upload, f"0 its {'expiry' if before.owner else 'owner'} is missing", False)
        return
    report.uploads += 1
    await _check_reservations(db, keys.partition_of_upload(upload), before.owner, upload, report, repair)
    sizes = await asyncio.gather(
        *(objects.size(keys.chunk(upload, name)) for name in before.chunks), return_exceptions=True
    )
    for size in sizes:
        if isinstance(size, Exception) and not isinstance(size, (NotFound, ValueError)):  # ValueError: not a valid name
            raise size
    stored = sum(size for size in sizes if isinstance(size, int))
    if stored == before.offset or (await uploads.inspect(db, upload))[:6] != before[:6]:  # it changed meanwhile
        return
    dropped = False
    if repair:
        with suppress(NoUpload):  # its hash has no `offset`, or it ended a moment ago
            await uploads.drop(db, before.owner, upload, remember_ms=DAY_MS)
            dropped = True
    report.add(upload, f"5 its offset is {before.offset}, its chunks have {stored} bytes", dropped)


async def _check_reservations(db: Redis, partition: int, user: str, upload: str, report: Report, repair: bool) -> None:
    """Check what is reserved for one upload of a user. Without an upload: everything that is reserved for the user."""
    script_keys = [keys.uploads(partition, user), keys.due(partition)]
    prefix = keys.upload_prefix(partition)
    flaws = await db.call("check_uploads", script_keys, db.clock, upload, prefix, IMAGE_BYTES, int(repair))
    for flawed, flaw in zip(flaws[::2], flaws[1::2], strict=True):
        report.add(flawed, flaw, repair)


async def fit_restored(db: Redis, objects: ObjectStore, partitions: Iterable[int]) -> Report:
    """Adapt restored data to the objects that are in the store now, then check the data.

    Posts without JPEG get image work, the JPEGs of hidden posts are due to be erased, uploads with incomplete chunks
    are dropped, and each of `partitions`, and each other partition that has keys, gets a new epoch.
    Derived data is not repaired, because a repair would hide flaws: a backup with flaws is not the data that was
    written.
    """
    async for names in scan(db):
        fitting = [_isolate(name, Report(), _fit_key(db, objects, name)) for name in well_formed_keys(names, Report())]
        await asyncio.gather(*fitting)
    report = await check(db, objects)
    for partition in report.partitions.union(partitions):  # an empty partition also had a timeline
        script_keys = [keys.epoch(partition), keys.restored(partition)]
        await db.call("begin_epoch", script_keys, db.clock, secrets.token_hex(4))
    return report


async def _fit_key(db: Redis, objects: ObjectStore, name: str) -> None:
    kind, _, rest = keys.parts(name)
    if kind == "due":  # data of an older version: image work was in `due` before `making` existed
        async for members in scan(db, name):
            waiting = [member for member in members[::2] if (parts := keys.ID.fullmatch(member)) and not parts[1]]
            await asyncio.gather(*(make_again(db, post) for post in waiting))
    elif kind == "upload":
        await _check_upload(db, objects, rest, Report(), repair=True)
    elif kind == "hidden":  # it may have been unhidden in the timeline that is left, and have its JPEG
        await hide(db, rest)
    elif kind == "post":
        image = (await _call_check_post(db, rest, repair=False)).image or Image("")
        if await _object_flaw(objects, keys.image(rest, image.version), "JPEG", deep=False):
            await make_again(db, rest)
