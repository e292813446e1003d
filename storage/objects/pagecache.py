"""Reads a file on the event loop if the kernel has all of it in memory.

Moving a read to a thread costs several times as much as the read itself. This module does not read ahead and caches
nothing itself: it uses the page cache of the kernel.
"""

import os
from pathlib import Path

LARGEST = 1024 * 1024  # bytes copied at once on the event loop: this takes 0.1 ms
# One buffer for all calls, because the event loop has one thread. A new buffer for each call would cost 5 µs.
BUFFER = memoryview(bytearray(LARGEST))


def read_if_cached(path: str | Path) -> bytes | None:
    """Return the bytes of a file if all of them are in the page cache. Otherwise return None.

    Also returns None if the file does not exist, is not a regular file, is larger than LARGEST, or if its file system
    does not support RWF_NOWAIT (preadv(2)). With this flag the call never waits for a disk. Only opening the file may
    wait once, for its inode.
    """
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        size = os.fstat(file).st_size
        if size <= LARGEST and os.preadv(file, [BUFFER[:size]], 0, os.RWF_NOWAIT) == size:
            return bytes(BUFFER[:size])
    except OSError:  # EAGAIN: not in the cache. EOPNOTSUPP: the file system does not know the flag.
        pass
    finally:
        os.close(file)
    return None
