"""Object storage in a bucket of S3, or of a server that speaks its protocol."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

from storage import watchdog
from storage.objects.store import (
    LEFTOVER_SECONDS,
    PIECE,
    Entry,
    Exists,
    NotFound,
    Unavailable,
    require_name,
    require_prefix,
)

RETRY_PAUSE = timedelta(milliseconds=50)  # before S3 is asked again
METADATA_SERVICE = "169.254.169.254"  # where S3's client asks for credentials that are in no variable


class S3:
    """Objects in a bucket, by obstore.

    A store that does not answer is given up after 5 s: a person waits. Streams are put in parts; those of a process
    that died stay hidden in the bucket: give it a lifecycle rule (AbortIncompleteMultipartUpload).
    """

    def __init__(self, bucket: str, prefix: str = ""):
        # As config, because client_options would put AWS_ALLOW_HTTP out of force. A whole request may take long
        # (a big object over a slow line), silence within it may not.
        config: Any = {"connect_timeout": "2s", "read_timeout": "5s", "timeout": "60s"}  # obstore's type lacks these
        self._store = obstore.store.S3Store(
            bucket,
            prefix=prefix or None,
            config=config,
            retry_config={
                "max_retries": 2,
                "retry_timeout": timedelta(seconds=5),
                "backoff": {"init_backoff": RETRY_PAUSE},
            },
        )

    async def put(self, name: str, data: bytes | AsyncIterable[bytes]) -> None:
        """Make or replace the object. Raises Unavailable, and what `data` raises: then nothing changed."""
        whole = isinstance(data, bytes)
        with _translate_errors():
            # One part at a time: the memory of one, not of twelve.
            await obstore.put_async(self._store, require_name(name), data, use_multipart=not whole, max_concurrency=1)

    async def create(self, name: str, data: bytes) -> None:
        """Make the object. Raises Exists if the name is taken (never replaces), Unavailable."""
        with _translate_errors():
            await obstore.put_async(self._store, require_name(name), data, mode="create", use_multipart=False)

    async def get(self, name: str) -> bytes:
        """The object's bytes. Raises NotFound, Unavailable."""
        with _translate_errors(missing=NotFound):
            found = await obstore.get_async(self._store, require_name(name))
            return bytes(await found.bytes_async())

    async def read(self, name: str) -> AsyncIterator[bytes]:
        """The object in pieces of at most 1 MiB. Raises NotFound before the first, Unavailable."""
        with _translate_errors(missing=NotFound):
            found = await obstore.get_async(self._store, require_name(name))
            stream = found.stream(min_chunk_size=PIECE // 4)
        while True:
            with _translate_errors():
                piece = await anext(stream, None)
            if piece is None:
                return
            for start in range(0, len(piece), PIECE):
                yield bytes(memoryview(piece)[start : start + PIECE])

    async def size(self, name: str) -> int:
        """Bytes of the object. Raises NotFound, Unavailable."""
        with _translate_errors(missing=NotFound):
            return (await obstore.head_async(self._store, require_name(name)))["size"]

    async def delete(self, names: Iterable[str]) -> None:
        """Remove the objects; one that is missing is as good as removed. Raises Unavailable."""
        with _translate_errors():
            await obstore.delete_async(self._store, [require_name(name) for name in names])

    async def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        """Objects below a folder ("" or a path ending in "/"), ascending by name. Raises Unavailable."""
        stream = obstore.list(self._store, require_prefix(prefix) or None, chunk_size=1000)
        while True:
            with _translate_errors():
                page = await anext(stream, None)
            if page is None:
                return
            for meta in page:
                yield Entry(meta["path"], meta["size"], meta["last_modified"].timestamp())

    async def ping(self) -> None:
        """As a folder's. HEAD would say the same of a bucket that is gone as of an object."""
        async for _ in self.list("none/"):
            return

    def check_free_space(self) -> None:
        """A bucket does not fill up."""

    async def remove_leftovers(self, older: float = LEFTOVER_SECONDS) -> int:
        """0: nothing but the bucket's lifecycle rule sees what puts left that died half way."""
        return 0


@contextmanager
def _translate_errors(missing: type[Exception] = Unavailable) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise missing(in_one_line(error)) from error
    except (AlreadyExistsError, PreconditionError) as error:
        raise Exists(str(error)) from error
    except (BaseError, OSError) as error:
        reason = in_one_line(error)
        if METADATA_SERVICE in reason:
            reason = "no AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are set, and this machine provides none"
        raise Unavailable(reason) from error
    finally:
        watchdog.step()


def in_one_line(error: Exception) -> str:
    """What obstore says, with the code in S3's answer. After an empty line it dumps its structures."""
    return " ".join(str(error).split("\n\n")[0].split())
