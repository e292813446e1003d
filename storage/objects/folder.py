"""Object storage in a folder of this machine.

    a/b/photo.jpg       an object: its name is its path below the root
    a/b/.tmp-4f0c…      a draft: the bytes of a `put` or `create` that has not finished

`put` and `create` write a draft beside the object, sync it, and then give it its name: rename(2) replaces an object,
link(2) fails if there is one. A reader therefore sees the old bytes or the new ones, never a part.

| a process dies | left behind |
|---|---|
| before the draft has its name | a draft, which `list` does not show; `remove_leftovers` removes it after a day |
| after the draft has its name | the object; after `create` also the draft, a second name of the same file |
"""

import errno
import os
import secrets
import stat
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar, TypeVarTuple

from aiofiles.base import wrap

from storage import files, watchdog
from storage.objects.pagecache import read_if_cached
from storage.objects.store import (
    LEFTOVER_SECONDS,
    NAME,
    PIECE,
    Entry,
    Exists,
    Full,
    NotFound,
    Unavailable,
    require_name,
    require_prefix,
)

# How often to try to make a folder. Each time a concurrent delete may have removed the parent again. There is a limit
# because some folders, such as /proc, exist and still report that no folder can be made in them.
FOLDER_TRIES = 100
TMP = ".tmp-"  # a draft's name begins with a dot. No object's name may.

Arguments = TypeVarTuple("Arguments")
T = TypeVar("T")


class Folder:
    """An `ObjectStore` whose objects are files below a folder.

    Each verb makes one call in a thread, because moving to a thread costs more than most system calls. Only streams
    make one call for each piece. If the caller of a verb is cancelled, the thread goes on: the verb may still complete,
    and then it completes whole.
    """

    def __init__(self, root: Path, min_free: int = 0):
        """Open the store in the folder `root`, which is created if it does not exist.

        `min_free` is in bytes, see `check_free_space`. Raises OSError if the folder cannot be created.
        """
        self._root = root
        self._min_free = min_free
        _make_folder(root)

    async def put(self, name: str, data: bytes | list[bytes] | AsyncIterable[bytes]) -> None:
        """A stream goes to a draft in pieces of at least PIECE bytes (1 MiB), so its memory is bounded."""
        path = self._path(name)
        if isinstance(data, bytes):
            data = [data]
        if isinstance(data, list):
            return await _in_thread(_write_durably, self._root, path, None, data, os.rename)
        file = await _in_thread(_create_draft, path)
        buffer = bytearray()
        try:
            async for piece in data:
                buffer += piece
                if len(buffer) >= PIECE:
                    await _in_thread(file.write, buffer)
                    buffer = bytearray()
        except BaseException:
            await _in_thread(_close_draft, file)
            raise
        await _in_thread(_write_durably, self._root, path, file, [buffer], os.rename)

    async def create(self, name: str, data: bytes) -> None:
        await _in_thread(_write_durably, self._root, self._path(name), None, [data], os.link)

    async def get(self, name: str) -> bytes:
        """Read on the event loop if the page cache has the whole file, otherwise in a thread."""
        if data := read_if_cached(f"{self._root}/{require_name(name)}"):  # joining paths takes a tenth of the call
            return data
        return await _in_thread(Path.read_bytes, self._path(name), missing=NotFound)

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """Opening the file and reading the first piece are one call in a thread.

        The file stays open between pieces, so a replaced or deleted object is still read to its end.
        """
        piece, file = await _in_thread(_open_and_read, self._path(name), missing=NotFound)
        try:
            while piece:
                yield piece
                piece = await _in_thread(file.read, PIECE) if file else b""
        finally:
            if file:
                file.close()

    async def size(self, name: str) -> int:
        return await _in_thread(_file_size, self._path(name), missing=NotFound)

    async def delete(self, names: Iterable[str]) -> None:
        """Also removes the folders that become empty."""
        await _in_thread(_delete_files, self._root, [self._path(name) for name in names])

    async def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        """Makes one call in a thread for each folder."""
        stack: list[Entry | str] = [require_prefix(prefix)]  # objects, and folders to list; the next one is last
        while stack:
            item = stack.pop()
            if isinstance(item, Entry):
                yield item
            else:
                stack += reversed(await _in_thread(_list_folder, self._root, item))

    async def ping(self) -> None:
        await _in_thread(os.stat, f"{self._root}/")

    def check_free_space(self) -> None:
        with suppress(OSError):  # if the folder is gone, the put that follows reports it better
            disk = os.statvfs(self._root)
            if disk.f_bavail * disk.f_frsize < self._min_free:
                raise Full("the store's disk is almost full")

    async def remove_leftovers(self, older: float = LEFTOVER_SECONDS) -> int:
        """Remove drafts that are more than `older` seconds old: processes that died left them.

        Returns the number of drafts removed. Raises Unavailable.
        """
        return await _in_thread(_remove_leftovers, self._root, time.time() - older)

    def _path(self, name: str) -> Path:
        return self._root / require_name(name)


async def _in_thread(
    function: Callable[[*Arguments], T], *arguments: *Arguments, missing: type[Exception] = Unavailable
) -> T:
    """Run a function in a thread and translate its OSError.

    | the function raises | this raises |
    |---|---|
    | FileNotFoundError, NotADirectoryError, IsADirectoryError | `missing` |
    | FileExistsError | Exists |
    | OSError with ENOSPC (disk), EDQUOT (quota) or EFBIG (RLIMIT_FSIZE) | Full |
    | any other OSError | Unavailable |
    """
    try:
        return await wrap(function)(*arguments)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise missing(str(error)) from error
    except FileExistsError as error:
        raise Exists(str(error)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Full(f"the store is full: {error.strerror}") from error
        raise Unavailable(str(error)) from error
    finally:
        watchdog.step()


def _create_draft(path: Path) -> BinaryIO:
    """Create a draft in the folder of `path`, and the folder if it does not exist.

    While the draft is in the folder, a concurrent delete cannot remove the folder.
    """
    while True:
        try:
            return open(path.parent / f"{TMP}{secrets.token_hex(8)}", "xb")
        except FileNotFoundError:
            _make_folder(path.parent)  # a delete may remove it again before the draft is in it: then try again


def _write_durably(
    root: Path,
    path: Path,
    file: BinaryIO | None,
    last: Iterable[bytes | bytearray],
    publish: Callable[[str, Path], None],
) -> None:
    """Write the last bytes of an object and make it durable.

    `file` is its draft, None if nothing was written yet. `publish` gives the draft its name: os.rename replaces an
    object, os.link raises FileExistsError if there is one.

    The order is: sync the bytes, give the name, sync the folder, sync the folders above it up to the root. Folders that
    existed before are synced too: another put may have made them a moment ago and not have synced them yet. To sync a
    folder without changes costs 0.04 ms. To write and sync 1 MiB costs 0.8 ms.
    """
    file = file or _create_draft(path)
    try:
        file.writelines(last)
        file.flush()
        os.fsync(file.fileno())
        publish(file.name, path)
        folder = path
        while folder != root:
            folder = folder.parent
            files.sync(folder)
    finally:
        _close_draft(file)


def _close_draft(file: BinaryIO) -> None:
    """Close a draft and remove it, unless it was renamed and is the object now."""
    with suppress(OSError):  # closing flushes, which fails on a full disk. The write before has raised that error.
        file.close()
    with suppress(FileNotFoundError):
        os.unlink(file.name)


def _make_folder(path: Path) -> None:
    """Make a folder and the folders above it. Syncs the parent of each new folder."""
    for _ in range(FOLDER_TRIES):
        try:
            path.mkdir()
        except FileExistsError:
            return
        except FileNotFoundError:
            _make_folder(path.parent)
        else:
            files.sync(path.parent)
            return
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _open_and_read(path: Path) -> tuple[bytes, BinaryIO | None]:
    """Return the first piece of a file, and the open file if more pieces may follow.

    An image of the size that is served fits into one piece, so it is read in one call.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        piece = file.read(PIECE)
        if len(piece) < PIECE:
            return piece, None
        stack.pop_all()
        return piece, file


def _file_size(path: Path) -> int:
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"{path} is a folder")
    return status.st_size


def _delete_files(root: Path, paths: list[Path]) -> None:
    """Remove files, sync their folders, then remove the folders that are empty.

    rmdir(2) fails for a folder in which a put has created its draft, so no put loses its folder.
    """
    folders = set()
    for path in paths:
        try:
            path.unlink()
            folders.add(path.parent)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            os.stat(f"{root}/")  # raises if the whole store is missing: then no object counts as deleted
    for folder in folders:
        with suppress(FileNotFoundError):  # another delete removed the folder, after the files above were removed
            files.sync(folder)
        with suppress(OSError):
            while folder != root:
                folder.rmdir()
                folder = folder.parent


def _list_folder(root: Path, prefix: str) -> list[Entry | str]:
    """List one folder: an Entry for each object, a prefix that ends in "/" for each folder.

    The order is the one of the full names of the objects. A missing folder is empty.
    """
    items: list[Entry | str] = []
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(root / prefix) as entries:
        for entry in entries:
            name = prefix + entry.name
            if not NAME.fullmatch(name):
                continue  # a draft, or a file that this store did not create
            with suppress(FileNotFoundError):
                if entry.is_dir():
                    items.append(name + "/")
                else:
                    status = entry.stat()
                    items.append(Entry(name, status.st_size, status.st_mtime))
    # A folder sorts with its "/", as its objects do: "a/" comes after "a-b".
    return sorted(items, key=lambda item: item if isinstance(item, str) else item.name)


def _remove_leftovers(root: Path, before: float) -> int:
    removed = 0
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                if name.startswith(TMP) and path.stat().st_mtime < before:
                    path.unlink()
                    removed += 1
    return removed
