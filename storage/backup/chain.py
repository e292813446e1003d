"""What a backup consists of: generations, and the chain of objects that each of them is.

    generations/00000007                                the description, created when the base is complete
    00000007/appendonly.aof.7.base.rdb/000000000000000  a segment: bytes of that file from that offset on
    00000007/appendonly.aof.7.base.rdb/000000004194304  …
    00000007/appendonly.aof.7.base.rdb/000000004711000  the end mark: the file ended here, and which is next
    00000007/appendonly.aof.7.incr.aof/000000000000000  …
    00000007/appendonly.aof.8.incr.aof/000000000090210  the close mark: generation 8 goes on from here

An object is a line of JSON, the bytes compressed, and the sha256 of both; its line names the sha256 of the
object before. At every moment there is exactly one name that the next object can have. Objects are created,
never replaced, so of two writers one fails at its next object: no lock, no lease, no clock. Taking over
from a chain is one more object at its end. No list of segments stands beside them that could differ.
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
SEGMENT = 4 * 1024 * 1024  # bytes of a file in one object: what a put over 10 Mbit/s brings through in 4 s
READ_AHEAD = 8  # objects fetched at once when a chain is read: hides the store's latency for 8 segments of memory
# zlib at level 1, of the standard library: 240 MB/s, comments become 6.3 times smaller. lzma packs 7.7 times at
# 40 MB/s, 9.8 times at 2 MB/s, and would take a core from Redis while a base is shipped (measured on one core).
LEVEL = 1


class Mark(TypedDict, total=False):
    """What ends a file or a chain."""

    next: str  # the file that goes on where this one ended
    closed: int  # the generation that goes on where this one ended
    gap: bool  # beside `closed`: that generation does not hold all that was written after this one


class Header(Mark):
    """The first line of an object of a chain."""

    generation: int
    file: str
    offset: int  # bytes of the file before these
    length: int  # bytes of the file in this object
    prefix: str  # sha256, hex, of the file up to and with these bytes
    previous: str  # digest, hex, of the object before; empty: this is the first of its chain
    time: float  # unix time at which the newest bytes of the chain were read


class Description(TypedDict):
    """A generation that is complete."""

    generation: int
    server: str  # valkey or redis
    version: str  # of the server, 9.1.2
    base: str  # name of the base file
    length: int  # its bytes
    sha256: str  # of the base file, hex
    second: int  # unix second: the base holds nothing newer


def segment_name(generation: int, file: str, offset: int) -> str:
    return f"{generation:08}/{file}/{offset:015}"


def description_name(generation: int) -> str:
    return f"{DESCRIPTIONS}{generation:08}"


def seal(header: Header | Description, body: bytes = b"") -> bytes:
    """The bytes of an object. Its last 32 are its digest."""
    data = json.dumps(header).encode() + b"\n" + zlib.compress(body, LEVEL)
    return data + hashlib.sha256(data).digest()


def unseal(name: str, data: bytes) -> tuple[Any, bytes]:
    """Header and body of an object. Raises Damaged.

    The object's name says whether the header is a Header or a Description.
    """
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise Damaged(f"{name}: its digest does not hold")
    header, _, body = data[:-32].partition(b"\n")
    return json.loads(header), zlib.decompress(body)


@dataclass
class ShippedFile:
    """A file of the chain, as far as it is in the store."""

    name: str
    length: int = 0  # bytes
    hasher: "hashlib._Hash" = field(default_factory=hashlib.sha256)  # of those bytes
    expected: str = ""  # what `hasher` must come to, where the chain was found in the store


@dataclass
class Chain:
    """A generation as its writer sees it: where its next object goes."""

    generation: int
    files: list[ShippedFile]  # the base, then the increments; the last is being copied
    previous: str = ""  # digest of the last object, hex
    read_at: float = 0.0  # unix time at which the newest of its bytes were read
    second: int = 0  # unix second of the base: it holds nothing newer, and the chain before reaches up to it
    closed: int | None = None  # the generation that goes on after the close mark
    diverged: bool = False  # the files at hand are not those that were copied
    end: Header | None = None  # header of the last object, if the chain was found in the store

    @property
    def base(self) -> str:
        return self.files[0].name

    @property
    def current(self) -> ShippedFile:
        return self.files[-1]


async def descriptions(store: ObjectStore) -> dict[int, Description]:
    """Every generation that is complete, oldest first. Raises Damaged, Unavailable."""
    names = [entry.name async for entry in store.list(DESCRIPTIONS)]
    return {int(name.removeprefix(DESCRIPTIONS)): unseal(name, await store.get(name))[0] for name in names}


async def _offsets(store: ObjectStore, generation: int) -> dict[str, list[int]]:
    files: dict[str, list[int]] = {}
    async for entry in store.list(f"{generation:08}/"):
        _, file, offset = entry.name.split("/")
        files.setdefault(file, []).append(int(offset))
    return files


async def load(store: ObjectStore, generation: int) -> Chain | None:
    """The chain so far, None if it has no object yet. Reads the first and last objects of each file only.

    Raises Damaged, Unavailable.
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
        copied = ShippedFile(file, header["offset"] + header["length"], expected=header["prefix"])
        if chain is None:
            chain = Chain(generation, [copied])
        else:
            chain.files.append(copied)
        chain.end, chain.previous, chain.read_at = header, digest, header["time"]
        chain.closed, file = header.get("closed"), header.get("next")
    if file and chain:  # an end mark is the last object: its next file has none yet
        chain.files.append(ShippedFile(file, expected=hashlib.sha256().hexdigest()))
    return chain


async def read(store: ObjectStore, generation: int, base: str) -> AsyncIterator[tuple[Header, bytes]]:
    """Headers and bytes of a chain in order, each verified against all that it names.

    Raises Damaged where a digest, an offset or a link does not hold, or an object is missing that others
    follow; NotFound and Unavailable.
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
                wanted = {
                    "generation": generation,
                    "file": file,
                    "offset": position,
                    "length": len(body),
                    "prefix": digest.hexdigest(),
                    "previous": previous,
                }
                if following or segment_name(generation, file, position) != name:
                    raise Damaged(f"{name}: does not go on where the one before ended")
                if wrong := [key for key, value in wanted.items() if header.get(key) != value]:
                    raise Damaged(f"{name}: {', '.join(wrong)} is not that of the chain")
                yield header, body
                previous, position = data[-32:].hex(), position + len(body)
                following = header.get("next") or header.get("closed")
        file = following if isinstance(following, str) else None
    if waiting:
        raise Damaged(f"generation {generation}: an object before {min(waiting)} is missing")


async def load_newest(store: ObjectStore) -> Chain | None:
    """The chain that a writer has to go on from or to close.

    That is the newest described generation; or, if a writer died between closing it and describing its
    successor, that successor, whose `second` is 0. Raises Damaged, Unavailable.
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
    """A number above all generations, described or not. Raises Unavailable."""
    names = [entry.name async for entry in store.list(DESCRIPTIONS)]
    number = max((int(name.removeprefix(DESCRIPTIONS)) for name in names), default=0) + 1
    while [name async for name in store.list(f"{number:08}/")]:
        number += 1
    return number
