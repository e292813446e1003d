"""Keeps the files in `appendonlydir` open, each from the moment the manifest names it.

A rewrite deletes the files that it replaces, and ten rewrites can happen within a second. An open file can be read
after it was deleted. So the shipper polls the manifest with one stat(2) every few milliseconds. inotify(7) would report
the change, but it could not open a file that is deleted by then, so it would not make polling unnecessary.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from storage.backup import aof


@dataclass
class OpenFile:
    """A file that is open for reading."""

    descriptor: int
    inode: int
    second: int  # unix second of its last change before it was opened: for a base, when it was complete


class Files:
    """The open files of one `appendonlydir`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: aof.Manifest | None = None
        # From each file to the one that Redis wrote next. Only pairs that one manifest named together.
        self.successors: dict[str, str] = {}
        # A file was replaced by another file of the same name. The shipper resets this after it has compared the files.
        self.file_replaced = False
        self._files: dict[str, OpenFile] = {}
        self._replaced_descriptors: list[int] = []  # of replaced files; still open, because a thread may be reading
        self._manifest_status: tuple[int, int, int] | None = None  # inode, mtime (ns), size of the manifest last read

    def __contains__(self, name: str | None) -> bool:
        """Whether the file is open. A file that was deleted since may be."""
        return name in self._files

    def refresh(self) -> None:
        """Read the manifest if it has changed, and open the files that it names.

        Runs on the event loop. Without a change it costs one stat(2). After a rewrite it costs one read and two opens.
        """
        try:
            status = os.stat(self.folder / aof.MANIFEST)
            manifest_status = (status.st_ino, status.st_mtime_ns, status.st_size)
            if manifest_status == self._manifest_status:
                return
            manifest = aof.parse((self.folder / aof.MANIFEST).read_text())
            if manifest is None:
                return
            for name in manifest.files:
                self._open_file(name)
        except FileNotFoundError:
            return  # Redis has not started yet, or has replaced the manifest again, which the next call reads
        self._manifest_status = manifest_status
        self.manifest = manifest
        self.successors.update(zip(manifest.files, manifest.files[1:], strict=False))

    def refresh_all(self) -> None:
        """Read the manifest even if it has not changed, and open replaced files again. Clears `successors` first."""
        self._manifest_status = None
        self.successors.clear()
        self.refresh()

    def _open_file(self, name: str) -> None:
        descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        before = self._files.get(name)
        if before and before.inode == status.st_ino:
            os.close(descriptor)
            return
        self._files[name] = OpenFile(descriptor, status.st_ino, int(status.st_mtime))
        if before:
            self._replaced_descriptors.append(before.descriptor)
            self.file_replaced = True

    def base(self) -> tuple[str, int] | None:
        """Name and inode of the base that the manifest names, None without a manifest."""
        return (self.manifest.base, self._files[self.manifest.base].inode) if self.manifest else None

    def second(self, name: str) -> int:
        """Unix second of the last change of a file before it was opened. Raises KeyError if it is not open."""
        return self._files[name].second

    def size(self, name: str) -> int:
        """Bytes of a file now. Raises KeyError if it is not open."""
        return os.fstat(self._files[name].descriptor).st_size

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Read at most `length` bytes from byte `offset` on; fewer at the end. Raises KeyError if it is not open."""
        return os.pread(self._files[name].descriptor, length, offset)

    def close_unused(self, used: list[str]) -> None:
        """Close all files except those that the manifest names, those in `used`, and their successors.

        No thread may be reading a file meanwhile.
        """
        needed = set(self.manifest.files if self.manifest else [])
        for name in used:
            following: str | None = name
            while following:
                needed.add(following)
                following = self.successors.get(following)
        for name in set(self._files) - needed:
            os.close(self._files.pop(name).descriptor)
        self.successors = {name: after for name, after in self.successors.items() if name in self._files}
        while self._replaced_descriptors:
            os.close(self._replaced_descriptors.pop())

    def close(self) -> None:
        """Close all files."""
        self.manifest = None
        self.close_unused([])
