"""Object storage: one protocol, `ObjectStore`, with two implementations, `Folder` and `S3`.

    store.py       the protocol, its errors, the rule for names
    folder.py      objects in a folder of this machine
    s3.py          objects in a bucket of S3, or of a server with the same API
    below.py       a folder of a store, as a store
    pagecache.py   reads a file on the event loop if it is in memory

Example:

    store = open_store("file:///var/lib/imagegram/store")
    await store.put("images/p1.jpg", data)
    data = await store.get("images/p1.jpg")
"""

import errno
import os
from pathlib import Path

from obstore.exceptions import BaseError

from storage.objects.below import Below
from storage.objects.folder import Folder
from storage.objects.s3 import S3, in_one_line
from storage.objects.store import (
    Entry,
    Exists,
    Full,
    NotFound,
    ObjectStore,
    Unavailable,
)
from storage.settings import Settings, refused, store_place

__all__ = [
    "S3",
    "Below",
    "Entry",
    "Exists",
    "Folder",
    "Full",
    "NotFound",
    "ObjectStore",
    "Unavailable",
    "open_store",
    "require_stores",
]


def open_store(url: str, min_free: int = 0) -> ObjectStore:
    """Open the store at `file:///absolute/path` or `s3://bucket/prefix`.

    A folder is created if it does not exist. S3 takes credentials, region and endpoint from the AWS_* variables.
    `min_free` is in bytes, for `check_free_space`: of a folder's disk so much should stay free.

    Raises ValueError for any other URL, OSError for a folder that cannot be created, and obstore's BaseError for AWS_*
    variables that cannot be used.
    """
    scheme, bucket, path = store_place(url)
    return Folder(Path(path), min_free) if scheme == "file" else S3(bucket, path)


def require_stores(settings: Settings, *names: str) -> None:
    """Check that a command can open the stores it uses. `names` are of STORE and BACKUP_STORE.

    Raises SystemExit with the name of the variable. A command calls this when it starts: later, the same error would
    look like an outage of the store.
    """
    urls = {"STORE": settings.store_url, "BACKUP_STORE": settings.backup_store_url}
    for name in names:
        url = urls[name]
        try:
            open_store(url)
            scheme, _, path = store_place(url)
            if scheme == "file" and not os.path.isdir(path):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}"
            if url.startswith(settings.data.as_uri() + "/"):  # by default the stores are in the data folder
                raise refused("DATA", str(settings.data), reason) from None
            raise refused(name, url, reason) from None
        except BaseError as error:
            raise refused(name, url, f"check the AWS_* variables: {in_one_line(error)}") from None
