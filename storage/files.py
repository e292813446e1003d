"""Makes files and folders durable."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk: fsync(2).

    A file needs it for its bytes. A folder needs it for the names in it: after a file is created, renamed or removed,
    a power cut may undo that until the folder is synced. Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
