"""A folder of an object store, as a store of its own."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable

from storage.objects.store import Entry, ObjectStore, require_name


class Below:
    """An `ObjectStore` whose objects are those of `store` below `folder`, for example "a" or "a/b"."""

    def __init__(self, store: ObjectStore, folder: str):
        """Raises ValueError if `folder` is not a valid name."""
        self._store = store
        self._prefix = require_name(folder) + "/"
        self.ping = store.ping
        self.check_free_space = store.check_free_space

    async def put(self, name: str, data: bytes | list[bytes] | AsyncIterable[bytes]) -> None:
        await self._store.put(self._prefix + name, data)

    async def create(self, name: str, data: bytes) -> None:
        await self._store.create(self._prefix + name, data)

    async def get(self, name: str) -> bytes:
        return await self._store.get(self._prefix + name)

    def read(self, name: str) -> AsyncIterator[bytes]:
        return self._store.read(self._prefix + name)

    async def size(self, name: str) -> int:
        return await self._store.size(self._prefix + name)

    async def delete(self, names: Iterable[str]) -> None:
        await self._store.delete([self._prefix + name for name in names])

    async def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        async for entry in self._store.list(self._prefix + prefix):
            yield Entry(entry.name.removeprefix(self._prefix), entry.size, entry.modified)
