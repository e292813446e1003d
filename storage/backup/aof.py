"""Redis' append-only files as they lie in `appendonlydir`: the manifest, and a walk over the records.

Writes no record of its own. The format is that of Redis 7.0 and later and of Valkey (aof.c): a manifest
names one base and the increments after it, in order. A base is an RDB file. An increment is a row of commands
in RESP and of annotations, `#TS:<unix second>\\r\\n`, one before the first command of each second.
"""

import mmap
import re
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "appendonly.aof.manifest"  # as `appendfilename` makes it by default
LINE = re.compile(r"file (\S+) seq \d+ type ([bih])")
SECOND = re.compile(rb"#TS:(\d+)$")


class Damaged(Exception):
    """Bytes that no writer of ours leaves: a flipped bit, a missing piece, a digest that does not hold."""


@dataclass(frozen=True)
class Manifest:
    base: str
    increments: list[str]

    @property
    def files(self) -> list[str]:
        return [self.base, *self.increments]


def parse(text: str) -> Manifest | None:
    """The manifest, without its history files. None while it names no base: Redis is still at its first."""
    bases: list[str] = []
    increments: list[str] = []
    for line in text.splitlines():
        if found := LINE.match(line):
            name, kind = found.groups()
            if kind != "h":
                (bases if kind == "b" else increments).append(name)
    return Manifest(bases[0], increments) if bases else None


def render(manifest: Manifest) -> str:
    lines = []
    for name in manifest.files:
        sequence, kind = name.rsplit(".", 3)[1:3]  # appendonly.aof.7.base.rdb, appendonly.aof.7.incr.aof
        lines.append(f"file {name} seq {sequence} type {kind[0]}\n")
    return "".join(lines)


@dataclass(frozen=True)
class Walk:
    end: int  # bytes from the start that are whole records, of seconds up to the one asked for
    second: int | None  # the newest annotation among them
    later: bool  # a record of a later second follows
    torn: bool  # the file ends within a record, an annotation or a transaction


def walk(path: Path, at: int | None = None) -> Walk:
    """How much of an increment is whole, and no newer than the unix second `at` (None: all).

    What is between MULTI and EXEC is one record, as a script is: in or out. An annotation torn by a crash and
    followed by the next start's (`#TS:17#TS:1795421000`) is passed over, as Redis does when it loads.
    The walk goes by the lengths before each argument, because a comment may contain what looks like an
    annotation or a command. Raises Damaged at the first byte that cannot begin a record.
    """
    if not path.stat().st_size:
        return Walk(0, None, False, False)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _walk(data, len(data), at, path.name)


def _walk(data: mmap.mmap, size: int, at: int | None, name: str) -> Walk:
    find = data.find
    position = end = 0
    second = None
    multi = False
    later = False
    while position < size and not (later and not multi):
        line = find(b"\r\n", position)
        if line < 0:
            break
        start = data[position]
        if start == 0x23:  # '#'
            if found := SECOND.search(data[position:line]):
                later = at is not None and int(found[1]) > at
                if later and not multi:
                    break
                second = second if later else int(found[1])
            position = line + 2
        elif start == 0x2A:  # '*'
            try:
                position, word = _command(data, size, line, int(data[position + 1 : line]))
            except ValueError:
                raise Damaged(f"{name}: no record begins at byte {position}") from None
            if position > size:
                break
            if word == b"MULTI":
                multi = True
            elif word == b"EXEC":
                multi = False
        else:
            raise Damaged(f"{name}: no record begins at byte {position}")
        if not multi:
            end = position
    return Walk(end, second, later, not later and end < size)


def _command(data: mmap.mmap, size: int, line: int, arguments: int) -> tuple[int, bytes]:
    """Where the command ends (beyond `size`: it is torn) and its first word. Raises ValueError."""
    find = data.find
    position, word = line + 2, b""
    for number in range(arguments):
        line = find(b"\r\n", position)
        if line < 0:
            return size + 1, word
        if data[position] != 0x24:  # '$'
            raise ValueError
        start = line + 2
        position = start + int(data[position + 1 : line]) + 2
        if number == 0:
            word = data[start : position - 2].upper()
    return position, word
