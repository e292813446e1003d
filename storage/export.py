"""`imagegram-storage export`: all that a user has posted, as one zip file.

| in the zip | holds |
|---|---|
| `user.json` | whose data this is, when it was read, how much it is, and which posts have no original any more |
| | `posts_with_unreadable_comments`: a segment of these is missing or damaged, so comments may be missing here |
| `posts.jsonl` | the user's posts in any status, one JSON object a line; `original` names the file |
| `comments.jsonl` | the user's comments on any post |
| `uploads.jsonl` | the user's open uploads, without their bytes |
| `originals/` | the images of the posts as they were uploaded, byte for byte |

The export collects parts in a folder beside the zip. If it is broken off, the same command continues with them:

| part | state | after a break |
|---|---|---|
| `rows.draft/` | the walk over all keys is running | begins again |
| `rows/` | the walk is complete | stays |
| `originals/<post>` | this original is complete | stays |
| `originals/<post>.draft` | it is being fetched | is fetched again |
| `archive.zip` | all parts are there and are being packed | is packed again |

The zip gets its name, as a second name of `archive.zip`, when it is complete. Then the folder is removed. If that is
broken off, the same command removes the rest. Bytes are copied in pieces. Memory grows only with the number of posts
and comments: less than 1 kB each.
"""

import asyncio
import errno
import fcntl
import functools
import os
import shutil
import stat
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import orjson

from storage import files, keys, uploads
from storage.db.client import Redis
from storage.formats import LONGEST_MAGIC, sniff
from storage.objects import NotFound, ObjectStore
from storage.posts import Inspected
from storage.progress import Progress
from storage.segments import Segments
from storage.times import format_ms
from storage.users import FoundComment, FoundUpload, walk

ROWS = ("posts", "comments", "uploads")
PRIVATE = 0o700  # the rights of the folder of parts: only the operator reads somebody's data
SYNC_BYTES = 64 * 1024 * 1024  # written bytes after which a file is synced, so that one sync at the end is short


class Busy(Exception):
    """The folder of parts is in use: by another export, for another user, or by somebody else on this machine."""


async def export(
    db: Redis, objects: ObjectStore, segments: Segments, user: str, target: Path, progress: Progress
) -> dict[str, object]:
    """Write all that a user has into the zip `target`. Returns what is in its `user.json`.

    Raises Busy, FileExistsError where `target` exists, OSError of this machine's disk, Unreachable, Unavailable.
    """
    parts = target.absolute().with_name(target.name + ".parts")
    packed = parts / "archive.zip"
    if target.exists() and not (packed.exists() and packed.samefile(target)):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    with _locked(parts, user):
        if not target.exists():
            if not (parts / "rows").exists():
                await _collect(db, segments, user, parts, progress)
            missing = await _fetch(db, objects, parts, progress)
            about = orjson.loads((parts / "rows" / "user.json").read_bytes())
            about["posts_without_original"] = missing
            stopped = threading.Event()
            try:
                await asyncio.to_thread(_pack, parts, about, target.absolute(), progress, stopped)
            finally:
                stopped.set()  # a cancellation does not reach the thread
    for name in ("rows", "originals"):  # `archive.zip` goes last: it shows that the zip is complete
        shutil.rmtree(parts / name, ignore_errors=True)
    shutil.rmtree(parts)  # after the lock is closed: on NFS an open file keeps its folder from being removed
    with zipfile.ZipFile(target) as archive:
        return orjson.loads(archive.read("user.json"))


@contextmanager
def _locked(parts: Path, user: str) -> Iterator[None]:
    """The folder of parts, for this process and this user only.

    In a folder for all, such as /tmp, somebody else may have created it before, to read the parts or to lead the files
    that are written elsewhere by symbolic links.
    """
    parts.mkdir(mode=PRIVATE, exist_ok=True)
    found = parts.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise Busy(f"{parts} is not a folder that only you can use: remove it, or choose another file")
    with (parts / "user").open("a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another export works in {parts}") from None
        lock.seek(0)
        owner = lock.read()
        if owner not in (b"", user.encode()):
            raise Busy(f"{parts} belongs to the export of another user: remove it, or choose another file")
        if not owner:
            lock.write(user.encode())
            lock.flush()
        yield


async def _collect(db: Redis, segments: Segments, user: str, parts: Path, progress: Progress) -> None:
    """Walk over all keys and write the user's rows. The walk may meet a row twice, and writes it once."""
    draft = parts / "rows.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    began = int(time.time() * 1000)
    counts = dict.fromkeys(ROWS, 0)
    written: set[str] = set()
    unreadable: set[str] = set()
    with ExitStack() as stack:
        rows = {name: stack.enter_context((draft / f"{name}.jsonl").open("xb")) for name in ROWS}

        def write(name: str, row_id: str, row: dict[str, object]) -> None:
            if row_id not in written:
                written.add(row_id)
                counts[name] += 1
                rows[name].write(orjson.dumps(row) + b"\n")

        async for found in walk(db, segments, lambda author, _: author == user, progress, unreadable):
            if isinstance(found, Inspected):
                write("posts", found.id, _post(found))
            elif isinstance(found, FoundComment):
                write("comments", f"{found.post}/{found.comment.id}", _comment(found))
            elif isinstance(found, FoundUpload) and found.upload.expires and not found.upload.expired:
                write("uploads", found.id, _upload(found))
    about = {"user": user, "read_at": [format_ms(began), format_ms(int(time.time() * 1000))], **counts}
    about["posts_with_unreadable_comments"] = sorted(unreadable)
    (draft / "user.json").write_bytes(orjson.dumps(about))
    for path in [*draft.iterdir(), draft]:
        files.sync(path)
    draft.rename(parts / "rows")
    files.sync(parts)


def _post(row: Inspected) -> dict[str, object]:
    known = row.fields
    post = {
        "id": row.id,
        "created_at": format_ms(keys.created_ms(row.id)),
        "caption": known.get("caption"),
        "status": known.get("status"),
        "hidden_at": format_ms(row.hidden_at()) if row.hidden else None,
        "comment_count": row.comment_count,
        "upload": known.get("upload"),
    }
    if "code" in known:
        post["error"] = {"code": known["code"], "detail": known.get("detail")}
    return post


def _comment(found: FoundComment) -> dict[str, object]:
    return {
        "post": found.post,
        "id": found.comment.id,
        "created_at": format_ms(keys.comment_ms(found.comment.id)),
        "text": found.comment.text,
        "hidden": found.hidden,
    }


def _upload(found: FoundUpload) -> dict[str, object]:
    return {
        "id": found.id,
        "created_at": format_ms(keys.created_ms(found.id)),
        "expires_at": format_ms(found.upload.expires),
        "offset": found.upload.offset,
        "length": found.upload.length,
        "metadata": found.upload.metadata,
        "concat": found.upload.concat or None,
    }


def _posts(parts: Path) -> Iterator[dict]:
    with (parts / "rows" / "posts.jsonl").open("rb") as file:
        for line in file:
            yield orjson.loads(line)


async def _fetch(db: Redis, objects: ObjectStore, parts: Path, progress: Progress) -> list[str]:
    """Fetch the originals that are not there yet. Returns the posts that have none: they were deleted meanwhile."""
    folder = parts / "originals"
    folder.mkdir(exist_ok=True)
    about = orjson.loads((parts / "rows" / "user.json").read_bytes())
    missing = []
    size = 0
    for number, post in enumerate(_posts(parts)):
        path = folder / post["id"]
        if path.exists():
            continue
        report = functools.partial(_report, progress, number, about["posts"], size)
        try:
            try:
                size += await _copy(_original(db, objects, post), path, report)
            except NotFound:  # maybe a worker has joined the chunks meanwhile, and erased them
                size += await _copy(_original(db, objects, post), path, report)
        except NotFound:
            await objects.ping()  # raises Unavailable where the whole store is missing, not only this object
            missing.append(post["id"])
    _report(progress, about["posts"], about["posts"], size, 0)
    files.sync(folder)
    return missing


def _report(progress: Progress, done: int, total: int, before: int, now: int) -> None:
    progress.show("originals", done, total, f"{(before + now) / 2**20:.0f} MiB")


async def _copy(pieces: AsyncIterator[bytes], path: Path, report: Callable[[int], None]) -> int:
    """Write pieces to a file that gets its name when it is complete and durable. Returns its number of bytes."""
    draft = path.with_name(f"{path.name}.draft")
    size, synced = 0, 0
    with draft.open("wb") as file:
        async for piece in pieces:
            await asyncio.to_thread(file.write, piece)
            size += len(piece)
            if size >= synced + SYNC_BYTES:
                await asyncio.to_thread(os.fsync, file.fileno())
                synced = size
            report(size)
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    draft.rename(path)
    return size


async def _original(db: Redis, objects: ObjectStore, post: dict) -> AsyncIterator[bytes]:
    """The bytes of a post's original, or of its upload's chunks if they were not joined yet. Raises NotFound."""
    try:
        async for piece in objects.read(keys.original(post["id"])):
            yield piece
    except NotFound:
        chunks = (await uploads.inspect(db, post["upload"])).chunks if post["upload"] else []
        if not chunks:
            raise
        for name in chunks:
            async for piece in objects.read(keys.chunk(post["upload"], name)):
                yield piece


def _pack(
    parts: Path, about: dict[str, object], target: Path, progress: Progress, stopped: threading.Event
) -> None:
    """Pack the parts into a zip, give it its name and make it durable. Ends early, without a zip, once `stopped`."""
    draft = parts / "archive.zip"
    draft.unlink(missing_ok=True)
    with zipfile.ZipFile(draft, "x", zipfile.ZIP_DEFLATED) as archive, (parts / "posts.jsonl").open("wb") as posts:
        for number, post in enumerate(_posts(parts)):
            if stopped.is_set():
                return
            progress.show("packed", number, int(about["posts"]))
            path = parts / "originals" / post["id"]
            del post["upload"]
            post["original"] = None
            if path.exists():
                post["original"] = f"{keys.original(post['id'])}.{_extension(path)}"
                archive.write(path, post["original"], zipfile.ZIP_STORED)  # an image does not get smaller
            posts.write(orjson.dumps(post) + b"\n")
        posts.close()
        archive.write(parts / "posts.jsonl", "posts.jsonl")
        for name in ("comments", "uploads"):
            archive.write(parts / "rows" / f"{name}.jsonl", f"{name}.jsonl")
        archive.writestr("user.json", orjson.dumps(about, option=orjson.OPT_INDENT_2))
    progress.show("packed", int(about["posts"]), int(about["posts"]))
    os.chmod(draft, 0o600)
    files.sync(draft)
    if stopped.is_set():
        return
    os.link(draft, target)  # not a rename: a file that somebody has put there meanwhile must stay
    files.sync(target.parent)


def _extension(path: Path) -> str:
    with path.open("rb") as file:
        return {"PNG": "png", "JPEG": "jpg", "BMP": "bmp"}.get(sniff(file.read(LONGEST_MAGIC)) or "", "bin")
