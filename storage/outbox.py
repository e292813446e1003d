"""What is to be done: images to be made, uploads that expired, bytes to be erased.

Uploads and erasures are in the zset `due`. Image work is in one zset `making` for each author, and their turns are in
`turns`, so that no author's posts delay another's. These are the truth; a queue only carries hints. What is leased and
not settled comes back by itself, so a process may die at any point: at worst the work is done again.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple

from storage import keys, uploads
from storage.db.client import Redis
from storage.errors import NoPost, NoUpload
from storage.objects import NotFound, ObjectStore
from storage.posts import read as read_post
from storage.settings import DAY_MS, LEASE_MS

ATTEMPTS = 5  # that may end because the decoder or the worker died, by chance or because of this image
EXHAUSTED = "exhausted"  # the `code` of a post whose attempts are used up
# A job that was running when its post was deleted or failed may store a JPEG afterwards and be killed before it can
# erase it. So the JPEG is erased every ERASE_EVERY_MS until no such job can be running any more.
ERASE_EVERY_MS = 30_000
# The longest that a job can run: RQ ends it after 60 s (workers.dispatcher.TIMEOUT). Where that does not work, RQ kills
# it 60 s later, and looks every 5 s (workers.__main__.WAIT), or every 20 s where Redis says nothing.
JOB_MS = 150_000
LEASE_BATCH = 500  # due entries, or users with image work, looked at in one script: about 1 ms of Redis' time


# The one question to the backup: may a kept backup hold the state of this moment, or of an earlier one? ms since 1970
MayName = Callable[[int], Awaitable[bool]]


class DueEntry(NamedTuple):
    """A leased upload or erasure."""

    partition: int
    id: str  # as it stands in `due`; nothing has checked it
    lease: int  # the score it has under this lease, ms since 1970
    kind: str  # upload or erase
    ended: int  # when its post was deleted (the revision) or failed, ms since 1970; else 0


class ImageWork(NamedTuple):
    """A leased post, whose image is to be made."""

    id: str
    lease: int  # the score it has under this lease, ms since 1970


async def lease(db: Redis, partition: int) -> list[DueEntry]:
    """Lease the uploads and erasures that are due in a partition."""
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
    """Lease at most `capacity` posts of a partition whose image is to be made, one author after the other."""
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
    """Begin an attempt. Returns its number (0: all were used, the post is failed now) and the post's upload.

    Raises NoPost, Stale.
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
    """Take back the current attempt, or earlier ones too: only `left` attempts still count.

    For attempts that failed because the store, a disk or Redis was away, which is not the image's fault.
    """
    await db.call("return_image", [keys.post(post)], attempt, left)


async def publish(db: Redis, post: str, thumbhash: str) -> None:
    """Show a post whose original and image are stored. Raises NoPost, Stale."""
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
        thumbhash,
        keys.making_prefix(partition),
    )


async def fail(db: Redis, post: str, attempt: int, code: str, detail: str) -> None:
    """End a post whose image can never be made. Raises NoPost, Stale."""
    partition = keys.partition_of_post(post)
    script_keys = [keys.post(post), keys.due(partition)]
    await db.call("fail_post", script_keys, db.clock, post, attempt, code, detail, keys.making_prefix(partition))


async def erase(db: Redis, objects: ObjectStore, may_name: MayName, entry: DueEntry, backup_reach_ms: int) -> None:
    """Erase the image of a post that was deleted or has failed, and the original of a deleted one.

    The image is erased at once and until no job can store it again. The original is erased when no kept backup can
    name it any more. Raises NoPost for an entry that is no post id, Unavailable.
    """
    keys.partition_of_post(entry.id)
    await objects.delete([keys.image(entry.id)])
    now = entry.lease - LEASE_MS
    if now < entry.ended + JOB_MS:
        await _end_lease(db, entry, now + ERASE_EVERY_MS)
    elif await _post_exists(db, entry.id):  # it has failed: its bytes stay until its author deletes it
        await _end_lease(db, entry, "")
    else:
        deleted = entry.ended or now - backup_reach_ms  # at the latest, where the deletion is not told of any more
        needed_ms = max(deleted, await uploads.last_restore_ms(db, entry.partition))
        recheck_ms = await recheck_at(may_name, needed_ms, now, backup_reach_ms)
        if not recheck_ms:
            await objects.delete([keys.original(entry.id)])
        await _end_lease(db, entry, recheck_ms or "")


async def end_upload(db: Redis, objects: ObjectStore, may_name: MayName, entry: DueEntry, backup_reach_ms: int) -> None:
    """Erase the chunks of an upload that expired, was dropped, or whose post has its original or was deleted.

    They wait as an original does where they are a deleted post's only bytes, and where the upload is from before a
    restore: in the timeline that was left it may have become a post.
    """
    upload = await uploads.inspect(db, entry.id)
    now = entry.lease - LEASE_MS
    only = upload.post and not await _has_original(objects, upload.post)  # there is no original: these are its bytes
    if only and await _post_exists(db, upload.post):
        await _end_lease(db, entry, "")  # they go with the post
    elif upload.post or not upload.expires:
        restored = await uploads.last_restore_ms(db, entry.partition)
        needed_ms = 0
        if only:
            needed_ms = max(now - backup_reach_ms, restored)
        elif keys.created_ms(entry.id) <= restored:
            needed_ms = restored
        if recheck_ms := needed_ms and await recheck_at(may_name, needed_ms, now, backup_reach_ms):
            await _end_lease(db, entry, recheck_ms)
        else:
            await uploads.erase_chunks(db, objects, entry.id, upload.chunks)
    elif upload.expired:
        with suppress(NoUpload):  # our lease ran out, and another has ended it meanwhile
            await uploads.discard(db, objects, upload.owner, entry.id, remember_ms=DAY_MS)
    else:
        await _end_lease(db, entry, upload.expires)


async def recheck_at(may_name: MayName, needed_ms: int, now: int, backup_reach_ms: int) -> int:
    """When to look again at objects that were needed until a moment, in ms since 1970; 0: no kept backup names them.

    The moment is the later of the deletion and the last restore. A restore leaves a timeline in which the object may be
    needed still: its backups may be younger than the deletion, but all of them began before the restore.
    """
    if now < needed_ms + backup_reach_ms:
        return needed_ms + backup_reach_ms
    return now + DAY_MS if await may_name(needed_ms) else 0


async def _has_original(objects: ObjectStore, post: str) -> bool:
    try:
        return bool(await objects.size(keys.original(post)))
    except NotFound:
        return False


async def _post_exists(db: Redis, post: str) -> bool:
    try:
        return bool(await read_post(db, post))
    except NoPost:
        return False


async def postpone(db: Redis, entry: DueEntry, pause_ms: int) -> None:
    """Look at an entry that failed again after a pause instead of at the end of its lease."""
    await _end_lease(db, entry, entry.lease - LEASE_MS + pause_ms)


async def _end_lease(db: Redis, entry: DueEntry, recheck_ms: int | str) -> None:
    await db.call("end_lease", [keys.due(entry.partition)], entry.id, entry.lease, recheck_ms)
