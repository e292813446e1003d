"""The objects of the backup store: how a chain is written and read. The package's docstring explains the words.

    generations/00000007                                the description of generation 7
    00000007/appendonly.aof.7.base.rdb/000000000000000  a segment: bytes of this file from byte 0 on
    00000007/appendonly.aof.7.base.rdb/000000004194304  a segment: bytes from byte 4194304 on
    00000007/appendonly.aof.7.base.rdb/000000004711000  the end mark of the base, which has 4711000 bytes
    00000007/appendonly.aof.7.incr.aof/000000000000000  a segment of the first increment
    00000007/appendonly.aof.8.incr.aof/000000000090210  the close mark: generation 8 continues from here

The bytes of each object are:

    a header: one line of JSON, see `Header` and `Description`
    the bytes of the segment, compressed by zlib; a mark and a description have none
    32 bytes: the sha256 of all bytes before

The header names the sha256 of the object before it (`previous`), so an object that was changed, removed or swapped is
found.

At every moment exactly one name is possible for the next object, and objects are created, never replaced. So if two
shippers write the same chain, one of them fails at its next object. This needs no lock, no lease and no clock. A
shipper takes over a chain by creating its next object. There is no separate list of segments, which could differ from
them.
"""

import asyncio
import hashlib
import json
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, TypedDict

from storage.backup.aof import Damaged
from storage.objects import ObjectStore

DESCRIPTIONS = "generations/"
SEGMENT = 4 * 1024 * 1024  # bytes of a file in one object: a put over 10 Mbit/s takes 4 s
READ_AHEAD = 8  # objects fetched at once when a chain is read: hides the latency, takes 8 segments of memory
# Level 1 of zlib, from the standard library: compresses 240 MB/s, and comments become 6.3 times smaller. lzma makes
# them 7.7 times smaller at 40 MB/s, or 9.8 times at 2 MB/s, and would take a core from Redis while a base is shipped.
# Measured on one core.
LEVEL = 1


class Mark(TypedDict, total=False):
    """What a header has in addition if the object is a mark.

    | object | `next` | `closed` | `gap` |
    |---|---|---|---|
    | segment | | | |
    | end mark | the file that Redis wrote next | | |
    | close mark | | number of the generation that continues | whether seconds between the two are missing |
    """

    next: str
    closed: int
    gap: bool


class Header(Mark):
    """The first line of an object of a chain: a segment or a mark."""

    generation: int
    file: str  # name of the file in appendonlydir
    offset: int  # byte of the file at which this object begins
    length: int  # bytes of the file in this object, before compression; 0 for a mark
    prefix: str  # sha256 (hex) of the file from its first byte to the last byte in this object
    previous: str  # sha256 (hex) of the object before, as in its last 32 bytes; "" for the first object of a chain
    time: float  # unix time at which the newest bytes of the chain were read from the file


class Description(TypedDict):
    """What the object `generations/…` says. It exists once the base and its increments are shipped up to now."""

    generation: int
    server: str  # which server wrote the base: "valkey" or "redis"
    version: str  # of that server, for example "9.1.2"
    base: str  # name of the base file
    length: int  # bytes of the base file
    sha256: str  # of the base file (hex)
    second: int  # unix second of the base: it contains nothing newer


def segment_name(generation: int, file: str, offset: int) -> str:
    """The name of an object of a chain. `offset` is the byte of the file at which the object begins.

    >>> segment_name(7, "appendonly.aof.7.base.rdb", 4194304)
    '00000007/appendonly.aof.7.base.rdb/000000004194304'
    """
    return f"{generation:08}/{file}/{offset:015}"


def description_name(generation: int) -> str:
    """The name of the description of a generation.

    >>> description_name(7)
    'generations/00000007'
    """
    return f"{DESCRIPTIONS}{generation:08}"


def seal(header: Header | Description, body: bytes = b"") -> bytes:
    """Return the bytes of an object. The last 32 are their digest (sha256)."""
    data = json.dumps(header).encode() + b"\n" + zlib.compress(body, LEVEL)
    return data + hashlib.sha256(data).digest()


def unseal(name: str, data: bytes) -> tuple[Any, bytes]:
    """Return header and body of an object. `name` is for the error message.

    The header is a Header or a Description: the caller knows which, from the object's name. Raises Damaged if the
    digest does not match.

    >>> unseal("a name", seal({"generation": 7}, b"bytes of a file"))
    ({'generation': 7}, b'bytes of a file')
    """
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise Damaged(f"{name}: its digest does not hold")
    header, _, body = data[:-32].partition(b"\n")
    return json.loads(header), zlib.decompress(body)


@dataclass
class ShippedFile:
    """A file of a chain, as far as it is in the store."""

    name: str
    length: int = 0  # bytes that are in the store
    hasher: "hashlib._Hash" = field(default_factory=hashlib.sha256)  # has hashed these bytes, unless `expected` is set
    expected: str = ""  # sha256 (hex) of these bytes, if the chain was loaded and the file here was not compared yet


@dataclass
class Chain:
    """What the shipper must know about a generation to write its next object."""

    generation: int
    files: list[ShippedFile]  # the base, then the increments; only the last one still grows
    previous: str = ""  # sha256 (hex) of the last object
    read_at: float = 0.0  # unix time at which the newest of its bytes were read from a file
    # Unix second of the base: it contains nothing newer, and the chain before reaches up to it. 0 if the chain was
    # loaded and has no description.
    second: int = 0
    closed: int | None = None  # the generation that continues after the close mark; None without a close mark
    diverged: bool = False  # the files here are not those that were shipped, so nothing is appended but a close mark
    end: Header | None = None  # header of the last object, if the chain was loaded from the store

    @property
    def base(self) -> str:
        """Name of the base file."""
        return self.files[0].name

    @property
    def current(self) -> ShippedFile:
        """The file to which the next object belongs."""
        return self.files[-1]


async def descriptions(store: ObjectStore) -> dict[int, Description]:
    """Return the description of each generation by its number, oldest first.

    Raises Damaged, NotFound if a description is removed meanwhile, and Unavailable.
    """
    names = [entry.name async for entry in store.list(DESCRIPTIONS)]
    return {int(name.removeprefix(DESCRIPTIONS)): unseal(name, await store.get(name))[0] for name in names}


async def _offsets(store: ObjectStore, generation: int) -> dict[str, list[int]]:
    """Return the offsets of the objects of each file of a chain, in ascending order."""
    files: dict[str, list[int]] = {}
    async for entry in store.list(f"{generation:08}/"):
        _, file, offset = entry.name.split("/")
        files.setdefault(file, []).append(int(offset))
    return files


async def load(store: ObjectStore, generation: int) -> Chain | None:
    """Load a chain as far as it is in the store. Returns None if it has no objects.

    Reads only the first and the last object of each file. Raises Damaged, NotFound and Unavailable.
    """
    file: str | None = None
    ends: dict[str, tuple[Header, str]] = {}
    header: Header
    for name, offsets in (await _offsets(store, generation)).items():
        for offset in (offsets[0], offsets[-1]):
            object_name = segment_name(generation, name, offset)
            data = await store.get(object_name)
            header, _ = unseal(object_name, data)
            ends[name] = header, data[-32:].hex()
            if not header["previous"]:
                file = name
    chain: Chain | None = None
    while file in ends:
        header, digest = ends[file]
        shipped = ShippedFile(file, header["offset"] + header["length"], expected=header["prefix"])
        if chain is None:
            chain = Chain(generation, [shipped])
        else:
            chain.files.append(shipped)
        chain.end, chain.previous, chain.read_at = header, digest, header["time"]
        chain.closed, file = header.get("closed"), header.get("next")
    if file and chain:  # the last object is an end mark: the next file has no object yet
        chain.files.append(ShippedFile(file, expected=hashlib.sha256().hexdigest()))
    return chain


async def read(store: ObjectStore, generation: int, base: str) -> AsyncIterator[tuple[Header, bytes]]:
    """Yield headers and bytes of a chain in order, and verify each object against the ones before it.

    `base` is the name of the first file. Raises Damaged if a digest, an offset or a link does not match, or if an
    object is missing and later ones exist. Also raises NotFound and Unavailable.
    """
    waiting = await _offsets(store, generation)
    file: str | None = base
    previous = ""
    while file in waiting:
        offsets = waiting.pop(file)
        names = [segment_name(generation, file, offset) for offset in offsets]
        position, digest = 0, hashlib.sha256()
        following: str | int | None = None
        for start in range(0, len(names), READ_AHEAD):
            window = names[start : start + READ_AHEAD]
            for name, data in zip(window, await asyncio.gather(*map(store.get, window)), strict=True):
                header: Header
                header, body = unseal(name, data)
                digest.update(body)
                expected = {
                    "generation": generation,
                    "file": file,
                    "offset": position,
                    "length": len(body),
                    "prefix": digest.hexdigest(),
                    "previous": previous,
                }
                if following or segment_name(generation, file, position) != name:
                    raise Damaged(f"{name}: does not continue where the object before ended")
                if wrong := [key for key, value in expected.items() if header.get(key) != value]:
                    raise Damaged(f"{name}: {', '.join(wrong)} does not match the chain")
                yield header, body
                previous, position = data[-32:].hex(), position + len(body)
                following = header.get("next") or header.get("closed")
        file = following if isinstance(following, str) else None
    if waiting:
        raise Damaged(f"generation {generation}: an object before {min(waiting)} is missing")


async def load_newest(store: ObjectStore) -> Chain | None:
    """Load the chain that a shipper has to continue or to close. Returns None if the store has no generation.

    | the store | returns |
    |---|---|
    | the newest generation with a description has no close mark | that generation |
    | it has one, because a shipper died before it described the next generation | the next, with `second` 0 |

    Raises Damaged, NotFound and Unavailable.
    """
    described = await descriptions(store)
    if not described:
        return None
    chain = await load(store, max(described))
    if chain:
        chain.second = described[max(described)]["second"]
    while chain and chain.closed:
        chain = await load(store, chain.closed)
    return chain


async def unused_number(store: ObjectStore) -> int:
    """Return the number for a new generation: above all described ones, and without objects in the store.

    A shipper that died may have left objects under a number that was never described. Raises Unavailable.
    """
    names = [entry.name async for entry in store.list(DESCRIPTIONS)]
    number = max((int(name.removeprefix(DESCRIPTIONS)) for name in names), default=0) + 1
    while [name async for name in store.list(f"{number:08}/")]:
        number += 1
    return number
