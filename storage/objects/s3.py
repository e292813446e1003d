"""Object storage in a bucket of Amazon S3, or of another server with the same API.

| verb | request of the S3 API |
|---|---|
| put, from bytes or a list | PutObject |
| put, from a stream shorter than PART | PutObject |
| put, from a longer one | CreateMultipartUpload, UploadPart, CompleteMultipartUpload |
| create | PutObject with `If-None-Match: *`; 412 Precondition Failed means that the name is taken |
| get, read | GetObject |
| size | HeadObject |
| delete | DeleteObjects |
| list, ping | ListObjectsV2 |
"""

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

PART = 5 * 1024 * 1024  # bytes; parts of an upload may not be smaller, except for the last
RETRY_PAUSE = timedelta(milliseconds=50)  # before the first retry
# The client asks this address (the EC2 instance metadata service) for credentials if no variable holds them.
METADATA_SERVICE = "169.254.169.254"


class S3:
    """An `ObjectStore` whose objects are in a bucket, read and written with obstore.

    A verb raises Unavailable after about 5 s without an answer, because a person may be waiting.

    If a process dies during a put from a stream, the parts that it has uploaded stay in the bucket, hidden and charged
    for. Give the bucket a lifecycle rule that removes them (AbortIncompleteMultipartUpload).
    """

    def __init__(self, bucket: str, prefix: str = ""):
        """Open the store in a bucket. Credentials, region and endpoint come from the AWS_* variables.

        `prefix` is put before every name, with a "/" between. Raises obstore's BaseError for AWS_* variables that
        cannot be used. Sends no request.
        """
        # A whole request may take long (a large object over a slow network), silence within it may not. These are
        # passed as `config`, because `client_options` would override AWS_ALLOW_HTTP. obstore's S3Config lacks them.
        config: Any = {"connect_timeout": "2s", "read_timeout": "5s", "timeout": "60s"}
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

    async def put(self, name: str, data: bytes | list[bytes] | AsyncIterable[bytes]) -> None:
        """Uploads one part of a stream at a time: obstore's default of 12 would need 12 times the memory."""
        name = require_name(name)
        if isinstance(data, (bytes, list)):
            pieces, rest = [data] if isinstance(data, bytes) else data, None
        else:
            pieces, rest = await _read_part(data)
        with _translate_errors():
            if rest is None:
                await obstore.put_async(self._store, name, pieces, use_multipart=False)
            else:
                await obstore.put_async(self._store, name, _chain(pieces, rest), chunk_size=PART, max_concurrency=1)

    async def create(self, name: str, data: bytes) -> None:
        with _translate_errors():
            await obstore.put_async(self._store, require_name(name), data, mode="create", use_multipart=False)

    async def get(self, name: str) -> bytes:
        with _translate_errors(missing=NotFound):
            result = await obstore.get_async(self._store, require_name(name))
            return bytes(await result.bytes_async())

    async def read(self, name: str) -> AsyncIterator[bytes]:
        with _translate_errors(missing=NotFound):
            result = await obstore.get_async(self._store, require_name(name))
            stream = result.stream(min_chunk_size=PIECE // 4)
        while True:
            with _translate_errors():
                piece = await anext(stream, None)
            if piece is None:
                return
            for start in range(0, len(piece), PIECE):
                yield bytes(memoryview(piece)[start : start + PIECE])

    async def size(self, name: str) -> int:
        with _translate_errors(missing=NotFound):
            return (await obstore.head_async(self._store, require_name(name)))["size"]

    async def delete(self, names: Iterable[str]) -> None:
        with _translate_errors():
            await obstore.delete_async(self._store, [require_name(name) for name in names])

    async def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        """Requests 1,000 objects at a time, the most that ListObjectsV2 returns."""
        stream = obstore.list(self._store, require_prefix(prefix) or None, chunk_size=1000)
        while True:
            with _translate_errors():
                page = await anext(stream, None)
            if page is None:
                return
            for meta in page:
                yield Entry(meta["path"], meta["size"], meta["last_modified"].timestamp())

    async def ping(self) -> None:
        """Lists a folder that no object is in. HeadObject gives 404 both for a missing object and a missing bucket."""
        async for _ in self.list("none/"):
            return

    def check_free_space(self) -> None:
        """Does nothing: a bucket does not fill up."""

    async def remove_leftovers(self, older: float = LEFTOVER_SECONDS) -> int:
        """Returns 0: only the bucket's lifecycle rule can remove the parts of an unfinished upload."""
        return 0


async def _read_part(stream: AsyncIterable[bytes]) -> tuple[list[bytes], AsyncIterator[bytes] | None]:
    """The pieces of the first PART bytes of a stream, and the rest, which is None if the stream is shorter."""
    pieces, size, rest = [], 0, aiter(stream)
    async for piece in rest:
        pieces.append(piece)
        size += len(piece)
        if size >= PART:
            return pieces, rest
    return pieces, None


async def _chain(pieces: list[bytes], rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    while pieces:
        yield pieces.pop(0)  # the memory is free as soon as the piece is sent
    async for piece in rest:
        yield piece


@contextmanager
def _translate_errors(missing: type[Exception] = Unavailable) -> Iterator[None]:
    """Translate the errors of obstore.

    | obstore raises | this raises |
    |---|---|
    | FileNotFoundError: no such object or bucket | `missing` |
    | AlreadyExistsError, PreconditionError: the name is taken | Exists |
    | any other BaseError, OSError | Unavailable |
    """
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
    """The message of an error of obstore, with the error code of S3, in one line.

    Leaves out what follows the first empty line: there obstore prints its internal structures.
    """
    return " ".join(str(error).split("\n\n")[0].split())
