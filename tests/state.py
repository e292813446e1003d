"""Reads all that Redis and folders contain, so that a test can compare it before and after."""

import contextlib
import os
from pathlib import Path

READERS = {
    "string": lambda client, key: client.get(key),
    "list": lambda client, key: client.lrange(key, 0, -1),
    "hash": lambda client, key: client.hgetall(key),
    "set": lambda client, key: client.smembers(key),
    "zset": lambda client, key: client.zrange(key, 0, -1, withscores=True),
    "stream": lambda client, key: (client.xrange(key), client.xinfo_stream(key)["last-generated-id"]),
}


def contents(client) -> dict[str, object]:
    """Every key with its value, and whether it expires."""
    found = {}
    for key in client.keys("*"):
        kind = client.type(key)
        if kind != "none":  # the key expired or was deleted a moment ago
            found[key] = READERS[kind](client, key), client.pttl(key) >= 0
    return found


def files(folder: Path) -> dict[str, bytes | int]:
    """Every file below a folder, temporary files too, with its bytes. A file of 1 MiB or more has its size instead."""
    found = {}
    for parent, _, names in os.walk(folder):  # it skips folders that are removed meanwhile
        for path in (Path(parent, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                size = path.stat().st_size
                found[str(path.relative_to(folder))] = path.read_bytes() if size < 2**20 else size
    return found


@contextlib.contextmanager
def unchanged(client, *folders: Path):
    """Checks that the block changes nothing in Redis and in the folders."""
    before = contents(client), [files(folder) for folder in folders]
    yield before
    assert (contents(client), [files(folder) for folder in folders]) == before
