"""Reads Redis' append-only files in `appendonlydir`: the manifest, and the records of an increment.

The format is that of Redis 7.0 and newer and of Valkey: Redis documentation, "Redis persistence", and Redis' aof.c.

| file | format |
|---|---|
| manifest | text; each line names a file: its sequence number, and its type: b(ase), i(ncrement) or h(istory) |
| base | an RDB file |
| increment | commands in RESP, each an array of bulk strings, and annotations |

An annotation is `#TS:<unix second>\\r\\n`, before the first command of each second (`aof-timestamp-enabled`).

This module never writes a record. A restore only cuts an increment after a record.
"""

import mmap
import re
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "appendonly.aof.manifest"  # its name with the default of `appendfilename`
LINE = re.compile(r"file (\S+) seq \d+ type ([bih])")
SECOND = re.compile(rb"#TS:(\d+)$")


class Damaged(Exception):
    """Bytes that neither Redis nor the shipper wrote so: a flipped bit, a missing part, a wrong digest."""


@dataclass(frozen=True)
class Manifest:
    """The names of the files that hold the data, without history files."""

    base: str
    increments: list[str]  # oldest first; Redis appends to the last one

    @property
    def files(self) -> list[str]:
        """Base and increments, in the order in which Redis loads them."""
        return [self.base, *self.increments]


def parse(text: str) -> Manifest | None:
    """Parse a manifest. Returns None if it names no base: Redis is still writing its first one."""
    bases: list[str] = []
    increments: list[str] = []
    for line in text.splitlines():
        if match := LINE.match(line):
            name, kind = match.groups()
            if kind != "h":
                (bases if kind == "b" else increments).append(name)
    return Manifest(bases[0], increments) if bases else None


def render(manifest: Manifest) -> str:
    """Return the text of a manifest, as Redis writes it.

    >>> manifest = Manifest("appendonly.aof.7.base.rdb", ["appendonly.aof.7.incr.aof", "appendonly.aof.8.incr.aof"])
    >>> print(render(manifest), end="")
    file appendonly.aof.7.base.rdb seq 7 type b
    file appendonly.aof.7.incr.aof seq 7 type i
    file appendonly.aof.8.incr.aof seq 8 type i
    >>> parse(render(manifest)) == manifest
    True
    """
    lines = []
    for name in manifest.files:
        sequence, kind = name.rsplit(".", 3)[1:3]  # appendonly.aof.7.base.rdb, appendonly.aof.7.incr.aof
        lines.append(f"file {name} seq {sequence} type {kind[0]}\n")
    return "".join(lines)


@dataclass(frozen=True)
class Walk:
    """What `walk` found in an increment."""

    end: int  # bytes from the start of the file that are complete records, up to the second requested
    second: int | None  # the newest annotation in these bytes (unix seconds), None if there is none
    later: bool  # a record of a later second follows
    torn: bool  # the file ends within a record, an annotation or a transaction


def walk(path: Path, at: int | None = None) -> Walk:
    """Find out how many bytes of an increment are complete records up to the unix second `at`. None means all seconds.

    MULTI, EXEC and the commands between them count as one record, because a restore must contain all of them or none.
    A script that writes more than once is logged as MULTI … EXEC too.

    A crash can tear an annotation, and the next start of Redis appends a new one to it: `#TS:17#TS:1795421000`. This
    skips the torn part, as Redis does when it loads the file.

    The walk uses the length before each argument to find the next one, because the text of a comment may look like an
    annotation or a command. Raises Damaged at the first byte that cannot begin a record, and OSError.
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
            if match := SECOND.search(data[position:line]):
                later = at is not None and int(match[1]) > at
                if later and not multi:
                    break
                second = second if later else int(match[1])
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
    """Return the byte after a command, and the command's first word in capitals.

    `line` is the end of the line with the number of arguments. If the command is torn, the byte returned is beyond
    `size`. Raises ValueError if the bytes are not a command.
    """
    find = data.find
    position = line + 2
    word = b""
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
