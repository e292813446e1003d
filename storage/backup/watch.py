"""The files in `appendonlydir`, each held open from the moment it appears.

A rewrite unlinks what it replaced, and ten rewrites fit in a second; an open file outlives its unlinking. To be
told of changes (inotify) would not help to open what is gone already, so this looks often: a stat each time.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from storage.backup import aof


@dataclass
class OpenFile:
    descriptor: int
    inode: int
    second: int  # unix second of its last change when it was opened: for a base, when it was complete


class Files:
    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: aof.Manifest | None = None
        self.successors: dict[str, str] = {}  # file -> the one Redis wrote next, where one manifest named both
        self.file_replaced = False  # a file has become another of the same name; whoever compared it resets this
        self._files: dict[str, OpenFile] = {}
        self._replaced_descriptors: list[int] = []  # descriptors of replaced files; a thread may be reading one
        self._manifest_status: tuple[int, int, int] | None = None  # the manifest file as last looked at

    def __contains__(self, name: str | None) -> bool:
        return name in self._files

    def refresh(self) -> None:
        """Hold what the manifest names. Cheap enough for the event loop: at a rewrite, a read and two opens."""
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
            return  # no Redis yet, or a newer manifest is there already, which the next look reads
        self._manifest_status, self.manifest = manifest_status, manifest
        self.successors.update(zip(manifest.files, manifest.files[1:], strict=False))

    def refresh_all(self) -> None:
        """Look at every file again, also for others of the same name. What followed what is forgotten."""
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
        """Name and inode of the base that the manifest names."""
        return (self.manifest.base, self._files[self.manifest.base].inode) if self.manifest else None

    def second(self, name: str) -> int:
        return self._files[name].second

    def size(self, name: str) -> int:
        return os.fstat(self._files[name].descriptor).st_size

    def read(self, name: str, offset: int, length: int) -> bytes:
        return os.pread(self._files[name].descriptor, length, offset)

    def close_unused(self, used: list[str]) -> None:
        """Close all but what the manifest names, the files `used`, and those that follow them.

        Nothing may be reading meanwhile.
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
        self.manifest = None
        self.close_unused([])
