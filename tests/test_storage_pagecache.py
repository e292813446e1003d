"""What the kernel has in memory is read at once; the rest is left to whoever may wait."""

import os
import secrets

from storage.objects import Folder
from storage.objects.pagecache import LARGEST, read_if_cached


async def test_an_object_is_read_alike_from_memory_and_from_the_disk(tmp_path):
    store, path, data = Folder(tmp_path), tmp_path / "images" / "one.jpg", secrets.token_bytes(100_000)
    await store.put("images/one.jpg", data)
    assert read_if_cached(path) == await store.get("images/one.jpg") == data
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert read_if_cached(path) is None
    assert await store.get("images/one.jpg") == data


def test_what_is_missing_large_or_no_file_is_left_to_a_thread(tmp_path):
    (tmp_path / "large").write_bytes(bytes(LARGEST + 1))
    assert [read_if_cached(tmp_path / name) for name in ("none", "large", ".")] == [None, None, None]
