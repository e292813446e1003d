"""Object storage: a folder, or S3 and what speaks its protocol, behind the same few verbs.

What a verb has put is durable when it returns, and is seen whole or not at all. No locks and no cache:
whoever must be the only one uses `create`. Does not know which objects there are: names are made elsewhere.
"""

import errno
import os
import re
import secrets
import stat
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import obstore
from aiofiles.base import wrap
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from storage import watchdog
from storage.pagecache import at_hand
from storage.settings import Settings, refused, store_place

PIECE = 1024 * 1024  # bytes of a piece that is read or written at once: bounds the memory of a stream
PAUSE = timedelta(milliseconds=50)  # before S3 is asked again
TRIES = 100  # to make a folder whose parent a delete may prune each time; /proc has one and makes no folder in it
METADATA_SERVICE = "169.254.169.254"  # where S3's client asks for credentials that are in no variable
TMP = ".tmp-"  # begins with a dot, which no object's name may
LEFTOVER_SECONDS = 24 * 3600  # no put takes a day: a tmp file this old was left by a process that died

# Narrower than either store takes: the same to both, to a shell and in a URL, and never outside the folder.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


class NotFound(Exception):
    """There is no object of this name."""


class Exists(Exception):
    """`create` found the name taken: over S3 perhaps by our own first try, whose answer was lost."""


class Unavailable(Exception):
    """The store is out of reach or cannot do it: network, time, rights. The message says which."""


class Full(Unavailable):
    """The store's disk has no room, or less than is to be spared."""


@dataclass(frozen=True)
class Entry:
    name: str
    size: int  # bytes
    modified: float  # unix seconds


def open_store(url: str, spare: int = 0) -> "Folder | S3":
    """The store at `file:///absolute/path` or `s3://bucket/prefix` (the rest: the usual AWS_* variables).

    There is `room` in a folder while more than `spare` bytes of its disk are free.
    Raises ValueError for any other URL, OSError for a folder that is not there and cannot be made, and obstore's
    errors for AWS_* variables of no use.
    """
    scheme, bucket, path = store_place(url)
    return Folder(Path(path), spare) if scheme == "file" else S3(bucket, path)


def require_stores(settings: Settings, *names: str) -> None:
    """Open the stores of the variables STORE or BACKUP_STORE once, when a command starts that uses them.

    Raises SystemExit with the variable's name: later, an error would be taken for an outage.
    """
    urls = {"STORE": settings.store_url, "BACKUP_STORE": settings.backup_store_url}
    for name in names:
        url = urls[name]
        try:
            open_store(url)
            scheme, _, path = store_place(url)
            if scheme == "file" and not os.path.isdir(path):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
            if url.startswith(settings.data.as_uri() + "/"):  # as by default
                raise refused("DATA", str(settings.data), reason) from None
            raise refused(name, url, reason) from None
        except BaseError as error:
            raise refused(name, url, f"check the AWS_* variables: {_in_one_line(error)}") from None


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an object")
    return name


def _checked_prefix(prefix: str) -> str:
    if prefix and not prefix.endswith("/"):
        raise ValueError(f"{prefix!r} is no folder: wanted '' or a path that ends in '/'")
    return prefix and _checked(prefix[:-1]) + "/"


class Folder:
    """Objects as files below a folder.

    A verb is one hop to a thread, because the hop costs more than most of the calls in it; only streams take
    one for each piece. A verb whose caller is cancelled may still complete, whole.
    """

    def __init__(self, root: Path, spare: int = 0):
        self._root, self._spare = root, spare
        _make_folder(root)

    async def put(self, name: str, data: bytes | AsyncIterable[bytes]) -> None:
        """Make or replace the object. Raises Unavailable, and what `data` raises: then nothing changed."""
        path = self._path(name)
        if isinstance(data, bytes):
            return await _hop(_finish, self._root, path, None, data, os.rename)
        file = await _hop(_open_tmp, path)
        held = bytearray()
        try:
            async for piece in data:
                held += piece
                if len(held) >= PIECE:
                    await _hop(file.write, held)
                    held = bytearray()
        except BaseException:
            await _hop(_discard, file)
            raise
        await _hop(_finish, self._root, path, file, held, os.rename)

    async def create(self, name: str, data: bytes) -> None:
        """Make the object. Raises Exists if the name is taken (never replaces), Unavailable."""
        await _hop(_finish, self._root, self._path(name), None, data, os.link)

    async def get(self, name: str) -> bytes:
        """The object's bytes. Raises NotFound, Unavailable."""
        path = self._path(name)
        return at_hand(path) or await _hop(Path.read_bytes, path, missing=NotFound)

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """The object in pieces of at most 1 MiB. Raises NotFound before the first, Unavailable."""
        piece, file = await _hop(_open_and_read, self._path(name), missing=NotFound)
        try:
            while piece:
                yield piece
                piece = await _hop(file.read, PIECE) if file else b""
        finally:
            if file:
                file.close()

    async def size(self, name: str) -> int:
        """Bytes of the object. Raises NotFound, Unavailable."""
        return await _hop(_size, self._path(name), missing=NotFound)

    async def delete(self, names: Iterable[str]) -> None:
        """Remove the objects; one that is missing is as good as removed. Raises Unavailable."""
        await _hop(_delete, self._root, [self._path(name) for name in names])

    async def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        """Objects below a folder ("" or a path ending in "/"), ascending by name. Raises Unavailable.

        One hop a folder. What is put or deleted meanwhile may show or not.
        """
        waiting = [_checked_prefix(prefix)]
        while waiting:
            below = waiting.pop()
            if isinstance(below, Entry):
                yield below
            else:
                waiting += reversed(await _hop(_scan, self._root, below))

    async def answers(self) -> None:
        """Raises Unavailable where the store is not there."""
        await _hop(os.stat, f"{self._root}/")

    def room(self) -> None:
        """Raises Full where the disk has less free than is to be spared: 2 µs, it waits for no disk."""
        with suppress(OSError):  # of a folder that is gone, the put says more
            disk = os.statvfs(self._root)
            if disk.f_bavail * disk.f_frsize < self._spare:
                raise Full("the store's disk is almost full")

    async def sweep(self, older: float = LEFTOVER_SECONDS) -> int:
        """Remove what puts that died half way left `older` seconds ago: how many. Raises Unavailable."""
        return await _hop(_sweep, self._root, time.time() - older)

    def _path(self, name: str) -> Path:
        return self._root / _checked(name)


async def _hop(function, *arguments, missing=Unavailable):
    try:
        return await wrap(function)(*arguments)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise missing(str(error)) from error
    except FileExistsError as error:
        raise Exists(str(error)) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, RLIMIT_FSIZE
        raise (Full(f"the store has no room: {error.strerror}") if full else Unavailable(str(error))) from error
    finally:
        watchdog.step()


def _open_tmp(path: Path):
    """A new file in the folder of `path`, which is made; what is in it keeps the folder from being pruned."""
    while True:
        try:
            return open(path.parent / f"{TMP}{secrets.token_hex(8)}", "xb")
        except FileNotFoundError:
            _make_folder(path.parent)  # and a delete may prune it again before we are in: then once more


def _finish(root: Path, path: Path, file, last: bytes, name_it) -> None:
    """Write the last bytes, then what makes a put durable, in this order: bytes, name, folder, folders above.

    Folders that were there before are synced too. Another put may have made them a moment ago without having
    come to its own fsync; syncing a clean folder costs 0.04 ms beside 0.8 ms for 1 MiB.
    """
    file = file or _open_tmp(path)
    try:
        file.write(last)
        file.flush()
        os.fsync(file.fileno())
        name_it(file.name, path)  # os.rename replaces; os.link raises FileExistsError
        folder = path
        while folder != root:
            folder = folder.parent
            _sync_folder(folder)
    finally:
        _discard(file)


def _discard(file) -> None:
    """Close a tmp file, and remove it unless it became the object."""
    with suppress(OSError):  # flushing to a full disk: the fault that counts was raised by the write
        file.close()
    with suppress(FileNotFoundError):
        os.unlink(file.name)


def _make_folder(path: Path) -> None:
    """Make a folder and those above it; each new one is synced in its parent."""
    for _ in range(TRIES):
        try:
            path.mkdir()
        except FileExistsError:
            return
        except FileNotFoundError:
            _make_folder(path.parent)
        else:
            _sync_folder(path.parent)
            return
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _open_and_read(path: Path):
    """The first piece, and the open file if there may be more: an image is read in one hop."""
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        piece = file.read(PIECE)
        if len(piece) < PIECE:
            return piece, None
        stack.pop_all()
        return piece, file


def _size(path: Path) -> int:
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f"{path} is a folder")
    return found.st_size


def _delete(root: Path, paths: list[Path]) -> None:
    """Unlink, sync, then prune: rmdir refuses a folder that a put has begun to use."""
    folders = set()
    for path in paths:
        try:
            path.unlink()
            folders.add(path.parent)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            os.stat(f"{root}/")  # raises where the whole store is not there: then nothing counts as removed
    for folder in folders:
        with suppress(FileNotFoundError):  # pruned by another delete, which our unlinks came before
            _sync_folder(folder)
        with suppress(OSError):
            while folder != root:
                folder.rmdir()
                folder = folder.parent


def _scan(root: Path, prefix: str) -> list[Entry | str]:
    """What is in one folder, objects as Entry and folders as prefix, in the order of all names below it."""
    found: list[Entry | str] = []
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(root / prefix) as entries:
        for entry in entries:
            name = prefix + entry.name
            if not NAME.fullmatch(name):
                continue  # a tmp file, or none of ours
            with suppress(FileNotFoundError):
                if entry.is_dir():
                    found.append(name + "/")
                else:
                    status = entry.stat()
                    found.append(Entry(name, status.st_size, status.st_mtime))
    # "a/" sorts after "a-b", as its objects do in S3
    return sorted(found, key=lambda item: item if isinstance(item, str) else item.name)


def _sweep(root: Path, before: float) -> int:
    removed = 0
    for folder, _, files in os.walk(root):
        for name in files:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                if name.startswith(TMP) and path.stat().st_mtime < before:
                    path.unlink()
                    removed += 1
    return removed


class S3:
    """Objects in a bucket, by obstore.

    A store that does not answer is given up after 5 s: a person waits. Streams are put in parts; those of a process
    that died stay hidden in the bucket: give it a lifecycle rule (AbortIncompleteMultipartUpload).
    """

    def __init__(self, bucket: str, prefix: str = ""):
        self._store = obstore.store.S3Store(
            bucket,
            prefix=prefix or None,
            # As config, because client_options would put AWS_ALLOW_HTTP out of force. A whole request may take long
            # (a big object over a slow line), silence within it may not.
            config={"connect_timeout": "2s", "read_timeout": "5s", "timeout": "60s"},
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=5), "backoff": {"init_backoff": PAUSE}},
        )

    async def put(self, name: str, data: bytes | AsyncIterable[bytes]) -> None:
        """Make or replace the object. Raises Unavailable, and what `data` raises: then nothing changed."""
        whole = isinstance(data, bytes)
        with _s3_errors():
            # One part at a time: the memory of one, not of twelve.
            await obstore.put_async(self._store, _checked(name), data, use_multipart=not whole, max_concurrency=1)

    async def create(self, name: str, data: bytes) -> None:
        """Make the object. Raises Exists if the name is taken (never replaces), Unavailable."""
        with _s3_errors():
            await obstore.put_async(self._store, _checked(name), data, mode="create", use_multipart=False)

    async def get(self, name: str) -> bytes:
        """The object's bytes. Raises NotFound, Unavailable."""
        with _s3_errors(missing=NotFound):
            found = await obstore.get_async(self._store, _checked(name))
            return bytes(await found.bytes_async())

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """The object in pieces of at most 1 MiB. Raises NotFound before the first, Unavailable."""
        with _s3_errors(missing=NotFound):
            found = await obstore.get_async(self._store, _checked(name))
            stream = found.stream(min_chunk_size=PIECE // 4)
        while True:
            with _s3_errors():
                piece = await anext(stream, None)
            if piece is None:
                return
            for start in range(0, len(piece), PIECE):
                yield bytes(memoryview(piece)[start : start + PIECE])

    async def size(self, name: str) -> int:
        """Bytes of the object. Raises NotFound, Unavailable."""
        with _s3_errors(missing=NotFound):
            return (await obstore.head_async(self._store, _checked(name)))["size"]

    async def delete(self, names: Iterable[str]) -> None:
        """Remove the objects; one that is missing is as good as removed. Raises Unavailable."""
        with _s3_errors():
            await obstore.delete_async(self._store, [_checked(name) for name in names])

    async def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        """Objects below a folder ("" or a path ending in "/"), ascending by name. Raises Unavailable."""
        stream = obstore.list(self._store, _checked_prefix(prefix) or None, chunk_size=1000)
        while True:
            with _s3_errors():
                page = await anext(stream, None)
            if page is None:
                return
            for meta in page:
                yield Entry(meta["path"], meta["size"], meta["last_modified"].timestamp())

    async def answers(self) -> None:
        """As a folder's. HEAD would say the same of a bucket that is gone as of an object."""
        async for _ in self.list("none/"):
            return

    def room(self) -> None:
        """A bucket does not fill up."""

    async def sweep(self, older: float = LEFTOVER_SECONDS) -> int:
        """0: nothing but the bucket's lifecycle rule sees what puts left that died half way."""
        return 0


@contextmanager
def _s3_errors(missing=Unavailable) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise missing(_in_one_line(error)) from error
    except (AlreadyExistsError, PreconditionError) as error:
        raise Exists(str(error)) from error
    except (BaseError, OSError) as error:
        reason = _in_one_line(error)
        if METADATA_SERVICE in reason:
            reason = "no AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are set, and this machine provides none"
        raise Unavailable(reason) from error
    finally:
        watchdog.step()


def _in_one_line(error: Exception) -> str:
    """What obstore says, with the code in S3's answer. After an empty line it dumps its structures."""
    return " ".join(str(error).split("\n\n")[0].split())
