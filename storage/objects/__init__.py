"""Object storage: a folder, or S3 and what speaks its protocol, behind one protocol, `ObjectStore`."""

import errno
import os
from pathlib import Path

from obstore.exceptions import BaseError

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
    "S3", "Entry", "Exists", "Folder", "Full", "NotFound", "ObjectStore", "Unavailable", "open_store", "require_stores",
]


def open_store(url: str, min_free: int = 0) -> ObjectStore:
    """The store at `file:///absolute/path` or `s3://bucket/prefix` (the rest: the usual AWS_* variables).

    There is `room` in a folder while more than `min_free` bytes of its disk are free.
    Raises ValueError for any other URL, OSError for a folder that is not there and cannot be made, and obstore's
    errors for AWS_* variables of no use.
    """
    scheme, bucket, path = store_place(url)
    return Folder(Path(path), min_free) if scheme == "file" else S3(bucket, path)


def require_stores(settings: Settings, *names: str) -> None:
    """Open the stores of the variables STORE or BACKUP_STORE once, when a command starts that uses them.

    Raises SystemExit with the variable's name: later, an error would be taken for an outage.
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
            if url.startswith(settings.data.as_uri() + "/"):  # as by default
                raise refused("DATA", str(settings.data), reason) from None
            raise refused(name, url, reason) from None
        except BaseError as error:
            raise refused(name, url, f"check the AWS_* variables: {in_one_line(error)}") from None
