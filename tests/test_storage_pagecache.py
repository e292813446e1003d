"""A file in the kernel's page cache is read at once. Any other file is left to a thread, which may wait."""

import os
import secrets

from storage.objects import Folder
from storage.objects.pagecache import LARGEST, read_if_cached


async def test_an_object_has_the_same_bytes_from_the_page_cache_and_from_the_disk(tmp_path):
    store, path = Folder(tmp_path), tmp_path / "images" / "one.jpg"
    data = secrets.token_bytes(100_000)
    await store.put("images/one.jpg", data)
    assert read_if_cached(path) == await store.get("images/one.jpg") == data
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # removes it from the page cache
    assert read_if_cached(path) is None
    assert await store.get("images/one.jpg") == data


def test_a_missing_file_a_large_file_and_a_folder_are_left_to_a_thread(tmp_path):
    (tmp_path / "large").write_bytes(bytes(LARGEST + 1))
    assert [read_if_cached(tmp_path / name) for name in ("none", "large", ".")] == [None, None, None]
