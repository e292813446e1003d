"""The files in `appendonlydir`, each held open from the moment it appears.

A rewrite unlinks what it replaced, and ten rewrites fit in a second; an open file outlives its unlinking. To be
told of changes (inotify) would not help to open what is gone already, so this looks often: a stat each time.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from storage.backup import aof


@dataclass
class Held:
    descriptor: int
    inode: int
    second: int  # unix second of its last change when it was opened: for a base, when it was complete


class Files:
    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: aof.Manifest | None = None
        self.follows: dict[str, str] = {}  # file -> the one Redis wrote next, where one manifest named both
        self.replaced = False  # a file has become another of the same name; whoever compared it resets this
        self._held: dict[str, Held] = {}
        self._stale: list[int] = []  # descriptors of replaced files; a thread may be reading one
        self._seen: tuple | None = None  # the manifest file as last looked at

    def __contains__(self, name: str | None) -> bool:
        return name in self._held

    def refresh(self) -> None:
        """Hold what the manifest names. Cheap enough for the event loop: at a rewrite, a read and two opens."""
        try:
            status = os.stat(self.folder / aof.MANIFEST)
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen == self._seen:
                return
            manifest = aof.parse((self.folder / aof.MANIFEST).read_text())
            if manifest is None:
                return
            for name in manifest.files:
                self._hold(name)
        except FileNotFoundError:
            return  # no Redis yet, or a newer manifest is there already, which the next look reads
        self._seen, self.manifest = seen, manifest
        self.follows.update(zip(manifest.files, manifest.files[1:], strict=False))

    def refresh_all(self) -> None:
        """Look at every file again, also for others of the same name. What followed what is forgotten."""
        self._seen = None
        self.follows.clear()
        self.refresh()

    def _hold(self, name: str) -> None:
        descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        before = self._held.get(name)
        if before and before.inode == status.st_ino:
            os.close(descriptor)
            return
        self._held[name] = Held(descriptor, status.st_ino, int(status.st_mtime))
        if before:
            self._stale.append(before.descriptor)
            self.replaced = True

    def base(self) -> tuple[str, int] | None:
        """Name and inode of the base that the manifest names."""
        return (self.manifest.base, self._held[self.manifest.base].inode) if self.manifest else None

    def second(self, name: str) -> int:
        return self._held[name].second

    def size(self, name: str) -> int:
        return os.fstat(self._held[name].descriptor).st_size

    def read(self, name: str, offset: int, length: int) -> bytes:
        return os.pread(self._held[name].descriptor, length, offset)

    def let_go(self, used: list[str]) -> None:
        """Close all but what the manifest names, the files `used`, and those that follow them.

        Nothing may be reading meanwhile.
        """
        needed = set(self.manifest.files if self.manifest else [])
        for name in used:
            needed.add(name)
            while name := self.follows.get(name):
                needed.add(name)
        for name in set(self._held) - needed:
            os.close(self._held.pop(name).descriptor)
        self.follows = {name: after for name, after in self.follows.items() if name in self._held}
        while self._stale:
            os.close(self._stale.pop())

    def close(self) -> None:
        self.manifest = None
        self.let_go([])
