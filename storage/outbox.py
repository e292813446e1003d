"""The work that is still to be done: images to make, uploads to end, bytes to erase.

Redis holds this work in sorted sets (docs/keys.md). RQ's queue only carries hints: if it is lost, no work is lost.
A process leases an entry by moving its score to the end of the lease. If nobody ends the lease before that time, the
entry is due again. So a process may die at any point. In the worst case the work is done twice.

Due entries, in the zset `due` (`lease`, `erase`, `end_upload`):

| entry | due when | what happens |
|---|---|---|
| open upload | it expires | it is dropped as expired; due again after GRACE_MS |
| open upload | it took a chunk after it was leased | nothing; due again when it expires |
| dropped or expired upload | GRACE_MS have passed | its chunks are erased |
| part of a final upload | it was used after it was leased | nothing: its chunks are now those of the final upload |
| upload of a post that has its original | the post is ready, has failed or was deleted | its chunks are erased |
| upload of a post without original | the post is ready or has failed | nothing: its chunks are the only bytes |
| upload of a deleted post without original | no kept backup names the post | its chunks are erased |
| failed post | at once, until JOB_MS have passed | its JPEG is erased |
| hidden post | at once, until JOB_MS have passed | its JPEG is erased |
| post that was unhidden | at once | `lease` moves it to image work, because it has no JPEG |
| deleted post | at once, until JOB_MS have passed | its JPEG is erased |
| deleted post | no kept backup names it | its original is erased |

Afterwards the entry is removed, unless the table says when it is due again. The deletion of a failed post adds the
post's upload again.

Chunks of an upload from before a restore also wait until no kept backup can name them: see `recheck_at`.

Image work, in one zset `making` for each author (`lease_images`, `start_image`, `publish`, `fail`, `return_image`).
The zset `turns` says whose post is next, so that no author's posts delay another author's:

| state | `status` | `attempt` | score in `making` | next |
|---|---|---|---|---|
| waiting | processing | n | in the past | `lease_images` leases it and the queue gets a hint |
| leased | processing | n | LEASE_MS after it was leased | `start_image` begins an attempt |
| being made | processing | n + 1 | LEASE_MS × 2ⁿ after its start | `publish`, `fail` or `return_image` |
| ready | ready | none | none | |
| failed | failed | n | none | in `due` for JOB_MS; `imagegram-storage retry` makes it wait again |

A leased post waits again when the lease has ended. After ATTEMPTS attempts `start_image` fails the post. A post that is
ready and has no JPEG, as after a restore, goes through the same states with `status` ready, and is never failed.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple

from storage import keys, uploads
from storage.db.client import Redis
from storage.errors import NoPost, NoUpload
from storage.objects import NotFound, ObjectStore
from storage.posts import Image, Inspected, inspect
from storage.settings import DAY_MS, LEASE_MS

# Attempts at one image, after which its post fails. An attempt counts if the decoder or the worker died, by chance or
# because of this image.
ATTEMPTS = 5
EXHAUSTED = "exhausted"  # the `code` of a post whose attempts are used up
# A job may store a JPEG after its post was deleted or failed, and be killed before it can erase that JPEG. So the JPEG
# is erased every ERASE_EVERY_MS until no such job can be running any more.
ERASE_EVERY_MS = 30_000
# The longest time that a job can run. RQ ends a job after 60 s (workers.dispatcher.TIMEOUT). If that fails, RQ kills
# the job 60 s later. It checks every 5 s (workers.__main__.WAIT), or every 20 s while Redis does not answer.
JOB_MS = 150_000
LEASE_BATCH = 500  # due entries, or users with image work, that one script reads: about 1 ms of Redis' time


# Whether a kept backup can hold the state of this moment (ms since 1970), or of an earlier one. This is the only
# question to the backup. storage.backup.retain.KeptBackups.may_name answers it. It is passed in as a function, because
# this file must not import the backup.
MayName = Callable[[int], Awaitable[bool]]


class DueEntry(NamedTuple):
    """A leased entry of `due`."""

    partition: int
    id: str  # of an upload or a post, exactly as in `due`: it may be malformed
    lease: int  # when the lease ends, in ms since 1970: the entry's score while it is leased
    kind: str  # "upload" or "erase"
    ended: int  # of a post: when it was deleted (the revision) or failed, in ms since 1970; 0 where that is not known


class ImageWork(NamedTuple):
    """A leased post whose image is to be made."""

    id: str
    lease: int  # when the lease ends, in ms since 1970: the post's score in `making` while it is leased
    trace: str | None = None  # traceparent of the request that created it; None: there were no traces


async def lease(db: Redis, partition: int) -> list[DueEntry]:
    """Lease up to LEASE_BATCH uploads and erasures that are due in a partition, for LEASE_MS.

    The caller passes each entry to `end_upload` or `erase`, according to its `kind`, or to `postpone` if that fails.
    Raises Unreachable, Unknown.
    """
    rows = await db.call(
        "lease_due",
        [keys.due(partition), keys.gone(partition), keys.turns(partition)],
        db.clock,
        LEASE_MS,
        LEASE_BATCH,
        keys.post_prefix(partition),
        keys.making_prefix(partition),
    )
    return [DueEntry(partition, member, lease, kind, int(float(ended))) for member, lease, kind, ended in rows]


async def lease_images(db: Redis, partition: int, capacity: int) -> list[ImageWork]:
    """Lease up to `capacity` posts of a partition whose image is to be made, for LEASE_MS.

    The authors take turns: each turn leases one post, of the author who was served least recently. `capacity` is the
    number of hints that the queue has space for. Raises Unreachable, Unknown.
    """
    rows = await db.call(
        "lease_images",
        [keys.turns(partition)],
        db.clock,
        capacity,
        LEASE_MS,
        ATTEMPTS,
        LEASE_BATCH,
        keys.making_prefix(partition),
        keys.post_prefix(partition),
    )
    return [ImageWork(*row) for row in rows]


async def start_image(db: Redis, post: str, lease: int) -> tuple[int, str | None]:
    """Begin an attempt at a post's image, under the lease that the post was handed out with.

    Returns the number of the attempt, from 1 on, and the id of the post's upload, or None if the post was ready once.
    The number 0 means that all attempts were used: the post has now failed as `exhausted`.

    Raises NoPost where the post was deleted, and Stale where it was leased again or has failed.
    """
    attempt, upload = await db.call(
        "start_image",
        [keys.post(post), keys.due(keys.partition_of_post(post))],
        db.clock,
        post,
        lease,
        LEASE_MS,
        ATTEMPTS,
        keys.making_prefix(keys.partition_of_post(post)),
    )
    return attempt, upload


async def return_image(db: Redis, post: str, attempt: int, left: int) -> None:
    """Take back attempts: from now on `left` attempts count. It does nothing if `attempt` is not the current one.

    It is for attempts that failed because the store, a disk or Redis was unavailable, which is not the image's fault.
    """
    await db.call("return_image", [keys.post(post)], attempt, left)


async def publish(db: Redis, post: str, thumbhash: str, scans: tuple[int, ...] = (), version: int = 1) -> None:
    """Show a post whose original and JPEG are stored. For `thumbhash`, `scans` and `version` see posts.Image.

    Raises NoPost where the post was deleted, and Stale where it has failed. A post that is already shown only gets the
    three, because its JPEG was made again.
    """
    partition = keys.partition_of_post(post)
    await db.call(
        "publish_post",
        [
            keys.post(post),
            keys.comments(post),
            keys.feed(partition),
            keys.changes(partition),
            keys.gone(partition),
            keys.due(partition),
        ],
        db.clock,
        post,
        Image(thumbhash, scans, version).field(),
        keys.making_prefix(partition),
    )


async def fail(db: Redis, post: str, attempt: int, code: str, detail: str) -> None:
    """End a post whose image can never be made, with a `code` (one word) and a `detail` (a sentence for people).

    Raises NoPost where the post was deleted, and Stale where another attempt is the current one.
    """
    partition = keys.partition_of_post(post)
    script_keys = [keys.post(post), keys.due(partition)]
    await db.call("fail_post", script_keys, db.clock, post, attempt, code, detail, keys.making_prefix(partition))


async def make_again(db: Redis, post: str) -> int:
    """Put a post whose JPEG is missing back into its author's image work.

    Returns 1, or 0 if the post is already there, has failed or does not exist.
    """
    partition = keys.partition_of_post(post)
    script_keys = [keys.post(post), keys.turns(partition), keys.due(partition)]
    return await db.call("make_again", script_keys, db.clock, post, keys.making_prefix(partition))


async def erase(db: Redis, objects: ObjectStore, may_name: MayName, entry: DueEntry, backup_reach_ms: int) -> None:
    """Erase the JPEG of a post that was deleted, has failed or is hidden, and the original of a deleted post.

    The JPEG is erased at once, and again until no job can store it any more. The original is erased when no kept backup
    can name it any more. Raises NoPost where the entry is not the id of a post, Unavailable, Unreachable, Unknown.
    """
    keys.partition_of_post(entry.id)  # `_inspect` takes a malformed id for a deleted post
    row = await _inspect(db, entry.id)
    if row and row.has_image():  # it was unhidden after this lease began, and is due again since then
        return
    await objects.delete(keys.images(entry.id))
    row = await _inspect(db, entry.id)
    if row and row.has_image():  # it was unhidden during the deletion, so its new JPEG may be deleted too
        await make_again(db, entry.id)
        return
    now = entry.lease - LEASE_MS
    ended = max(entry.ended, row.hidden_at() if row else 0)
    if now < ended + JOB_MS:
        await _end_lease(db, entry, now + ERASE_EVERY_MS)
    elif row:  # it has failed or is hidden: keep the original until it is deleted
        await _end_lease(db, entry, "")
    else:
        # `gone` forgets a deletion after backup_reach_ms at the earliest. So an unknown deletion is at least as old.
        deleted = ended or now - backup_reach_ms
        needed_ms = max(deleted, await uploads.last_restore_ms(db, entry.partition))
        recheck_ms = await recheck_at(may_name, needed_ms, now, backup_reach_ms)
        if not recheck_ms:
            await objects.delete([keys.original(entry.id)])
        await _end_lease(db, entry, recheck_ms or "")


async def end_upload(db: Redis, objects: ObjectStore, may_name: MayName, entry: DueEntry, backup_reach_ms: int) -> None:
    """Drop an upload that expired, or erase the chunks of one that was dropped or became a post.

    In two cases the chunks wait for the backups, as an original does. In the first they are the only bytes of a deleted
    post. In the second the upload is older than the last restore: it may have become a post in the timeline that the
    restore left, and a backup of that timeline may be restored.

    Raises NoUpload where the entry is not the id of an upload, Unavailable, Unreachable, Unknown.
    """
    upload = await uploads.inspect(db, entry.id)
    if upload.final:  # the clock went back: it was leased as expired, and then used while it was not
        await _end_lease(db, entry, "")
        return
    now = entry.lease - LEASE_MS
    # Without an original, the chunks are the post's only bytes.
    only = upload.post and not await _has_original(objects, upload.post)
    if only and await _inspect(db, upload.post):
        await _end_lease(db, entry, "")  # keep the chunks as long as the post
    elif upload.post or not upload.expires:
        restored = await uploads.last_restore_ms(db, entry.partition)
        needed_ms = 0
        if only:
            needed_ms = max(now - backup_reach_ms, restored)
        elif uploads.stored_ms(entry.id, upload.chunks) <= restored:
            needed_ms = restored
        if recheck_ms := needed_ms and await recheck_at(may_name, needed_ms, now, backup_reach_ms):
            await _end_lease(db, entry, recheck_ms)
        else:
            await uploads.erase_chunks(db, objects, entry.id, upload.chunks)
    elif upload.expired:
        with suppress(NoUpload):  # this lease has run out, and another process ended the upload
            await uploads.discard(db, objects, upload.owner, entry.id, remember_ms=DAY_MS)
    else:
        await _end_lease(db, entry, upload.expires)


async def recheck_at(may_name: MayName, needed_ms: int, now: int, backup_reach_ms: int) -> int:
    """When to check again whether objects can be erased, in ms since 1970. 0: no kept backup names them.

    `needed_ms` is the last moment at which the objects were needed: the deletion, or the last restore if that is later.
    A restore leaves a timeline in which the objects may still be needed. Backups of that timeline may be younger than
    the deletion, but all of them began before the restore.

    The result is `needed_ms + backup_reach_ms` before that time. After it, backups may still exist, because backups are
    kept for longer while `verify` fails. Then the result is a day later.
    """
    if now < needed_ms + backup_reach_ms:
        return needed_ms + backup_reach_ms
    return now + DAY_MS if await may_name(needed_ms) else 0


async def _has_original(objects: ObjectStore, post: str) -> bool:
    """Whether a post's original is stored and not empty."""
    try:
        return bool(await objects.size(keys.original(post)))
    except NotFound:
        return False


async def _inspect(db: Redis, post: str) -> Inspected | None:
    """A post, hidden or not. None where it was deleted."""
    try:
        return await inspect(db, post)
    except NoPost:
        return None


async def postpone(db: Redis, entry: DueEntry, pause_ms: int) -> None:
    """Make an entry that could not be handled due again `pause_ms` after it was leased, not at the end of its lease."""
    await _end_lease(db, entry, entry.lease - LEASE_MS + pause_ms)


async def _end_lease(db: Redis, entry: DueEntry, recheck_ms: int | str) -> None:
    """End a lease. The entry is due again at `recheck_ms` (ms since 1970), or removed if that is an empty string."""
    await db.call("end_lease", [keys.due(entry.partition)], entry.id, entry.lease, recheck_ms)
