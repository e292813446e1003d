"""What the client remembers of a write until it is answered, so that the repeated command continues or repeats it.

A record is a file in XDG_STATE_HOME/imagegram, named by a digest of the site, the user and what is written. It holds
the Idempotency-Key. That of a file also holds the address of its unfinished upload, and the posts that the file became:
one for each caption. Two processes never have the same record at the same time.
"""

import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from api.client import settings

POST = "post "  # the field of a post is this and a digest of the caption
KEPT = 24 * 60 * 60  # seconds that a record is of use: servers remember Idempotency-Keys and uploads as long


class Record:
    """One write. `fields` are strings; `key` is always there."""

    def __init__(self, name: str):
        self.path = settings.records() / f"{name}.json"
        self.fields: dict[str, str] = {}
        with suppress(OSError, ValueError):
            if time.time() - self.path.stat().st_mtime < KEPT:
                self.fields = {str(name): str(value) for name, value in json.loads(self.path.read_text()).items()}
        if "key" not in self.fields:
            self.begin()

    def begin(self) -> None:
        """Forget the write, but not the posts that there are, and begin another one with a new key."""
        posts = {name: value for name, value in self.fields.items() if name.startswith(POST)}
        self.fields = posts | {"key": secrets.token_urlsafe(18)}
        self.save()

    def save(self, **fields: str) -> None:
        """Set fields. They are on disk when this returns. Raises settings.Unusable."""
        self.fields |= fields
        settings.write_private(self.path, self.fields)

    def forget(self) -> None:
        with suppress(OSError):
            self.path.unlink()


@contextmanager
def record(*parts: str) -> Iterator[Record]:
    """The record of the write that these parts name. Raises settings.Unusable, also if another process has it."""
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    folder = settings.records()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        locks = os.open(folder / "locks", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise settings.Unusable(f"{folder} cannot be written: {settings.reason(error)}") from None
    try:
        _lock(locks, int(name[:15], 16))
        for old in folder.glob("*.json*"):  # also drafts of processes that were killed
            with suppress(OSError):
                if time.time() - old.stat().st_mtime > KEPT:
                    old.unlink()
        yield Record(name)
    finally:
        os.close(locks)


def _lock(file: int, position: int) -> None:
    """Lock one byte of a file, so no lock files are left behind. The byte need not exist.

    The kernel releases it when the file is closed or the process ends, however it ends. Raises settings.Unusable.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, position)
    except OSError as error:
        busy = isinstance(error, BlockingIOError | PermissionError)  # POSIX allows both
        why = "another process does the same at this moment" if busy else settings.reason(error)
        raise settings.Unusable(why) from None
