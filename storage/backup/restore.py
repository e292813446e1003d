"""`imagegram-storage restore`: makes a data folder for Redis from the backup store, as of any kept second.

A restore puts the files back where Redis expects them and lets Redis load them. It does not know what a record means.

| on disk | state |
|---|---|
| `<folder>` is missing or empty | nothing is restored; a restore may start |
| `<folder>.part` | a restore is running or was broken off; the next restore deletes it |
| `<folder>` with the data | complete: a server has loaded it, and the data were checked |
"""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from aiofiles.base import wrap
from redis.asyncio import Redis
from redis.exceptions import RedisError

from storage import check, files
from storage.backup import aof, chain
from storage.backup.aof import Damaged
from storage.db import client as db_client
from storage.db import server
from storage.objects import ObjectStore, open_store
from storage.settings import Settings

LOAD_SECONDS = 3600  # a server that has not loaded its files by then never will: 10 GiB take minutes


class Refused(Exception):
    """The restore cannot be done as requested. Nothing was written."""


@dataclass
class Restored:
    """What a restore has produced."""

    generation: int
    requested: int | None  # unix second; None for the newest
    second: int  # the newest unix second of which the restored data contain a record
    exact: bool  # no record between `second` and the requested second is missing, as far as the backup knows
    goes_on: bool = False  # the backup also has what was written after the requested second
    reach: float = 0  # unix time at which the newest bytes in the generation were read from Redis' files
    counts: dict[str, int] = field(default_factory=dict)  # "posts", "comments", "open uploads", "flaws"
    shards: int = 0  # of a Cluster; `generation` is 0 then. 0: a single server


def format_utc(second: float) -> str:
    """Format a unix second as UTC (RFC 3339, section 5.6).

    >>> format_utc(1795417200)
    '2026-11-23T07:00:00Z'
    """
    return datetime.fromtimestamp(int(second), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def restore(
    settings: Settings,
    store: ObjectStore,
    to: Path,
    at: int | None = None,
    report: Callable[[str], None] = print,
) -> Restored:
    """Restore a single server into `to`, which becomes a data folder of Redis, as of the end of second `at`.

    `to` must be missing or empty. `at` is in unix seconds, None for the newest. `report` gets each line of progress.

    Raises Refused if `to` is not empty, the store has nothing of that second, or the server here cannot read the
    backup. Raises Damaged if the store does not contain what the shipper put, or the server does not load it. Also
    raises NotFound, Unavailable and OSError.
    """
    to, part = begin(to)
    restored = await write_folder(settings, store, part, at, report)
    report("starting a server on it")
    async with running(settings, part) as redis:
        restored.counts = await check_data(redis, settings, range(settings.partitions), report)
    await wrap(finish)(part, to)
    return restored


def begin(to: Path) -> tuple[Path, Path]:
    """The absolute path of `to`, and of the folder in which the data grow. Raises Refused if `to` is not empty."""
    to = to.absolute()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise Refused(f"{to} is not empty")
    part = to.with_name(to.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    return to, part


async def write_folder(
    settings: Settings, store: ObjectStore, part: Path, at: int | None, report: Callable[[str], None]
) -> Restored:
    """Write the files of a chain, cut after second `at`, into the new folder `part`, where a server can load them."""
    described = await chain.descriptions(store)
    number = _choose_generation(described, at)
    description = described[number]
    _require_fitting_server(settings, description)
    report(f"generation {number}, begun {format_utc(description['second'])} by {description['server']}")
    folder = part / "appendonlydir"
    folder.mkdir(parents=True)
    names, last = await _download(store, description, folder, report)
    remaining, restored = await wrap(_truncate)(folder, names, description, at)
    await wrap(_write_manifest)(part, remaining, description)
    following = min((other for other in described if other > number), default=None)
    restored.reach = last["time"]
    restored.goes_on = restored.exact or ("closed" in last and last["closed"] == following and not last["gap"])
    restored.exact = restored.goes_on or at is None or following is None
    if following and not restored.exact:
        report(
            f"NOT EXACT: the backup has nothing of the time from {format_utc(restored.second)}"
            f" to {format_utc(described[following]['second'])}; this is the state at its beginning"
        )
    return restored


def _choose_generation(described: Mapping[int, chain.Description], at: int | None) -> int:
    """Return the newest generation whose base contains nothing later than second `at`."""
    if not described:
        raise Refused("the backup store holds no generation")
    candidates = [number for number, description in described.items() if at is None or description["second"] <= at]
    if not candidates:
        oldest = min(description["second"] for description in described.values())
        raise Refused(f"the oldest second kept is {format_utc(oldest)}")
    return max(candidates)


def _require_fitting_server(settings: Settings, description: chain.Description) -> None:
    """Raise Refused unless the server here is of the family that wrote the backup, and not older."""
    installed = server.identify(server.server_program(settings))
    major, minor, patch = map(int, description["version"].split("."))
    writer = server.Server(description["server"], (major, minor, patch))
    if installed.family != writer.family or installed.version < writer.version:
        raise Refused(
            f"{writer} wrote this backup, the server here is {installed}:"
            " set IMAGEGRAM_REDIS_SERVER to a server of the same family that is not older"
        )


async def _download(
    store: ObjectStore, description: chain.Description, folder: Path, report: Callable[[str], None]
) -> tuple[list[str], chain.Header]:
    """Write the files of a chain into `folder`. Returns their names in order, and the header of the last object."""
    names: list[str] = []
    header: chain.Header | None = None
    file: BinaryIO | None = None
    size, reported_at = 0, time.monotonic()
    try:
        async for header, body in chain.read(store, description["generation"], description["base"]):
            if file is None or header["file"] != names[-1]:
                if file:
                    file.close()
                names.append(header["file"])
                file = open(folder / Path(header["file"]).name, "xb")  # noqa: SIM115
            await wrap(file.write)(body)
            size += len(body)
            if time.monotonic() - reported_at >= 1:
                reported_at = time.monotonic()
                report(f"{size / (1 << 20):.0f} MiB, now {header['file']} of {format_utc(header['time'])}")
            if header.get("next") and len(names) == 1 and header["prefix"] != description["sha256"]:
                raise Damaged(f"{header['file']}: is not the base in the description")
    finally:
        if file:
            file.close()
    if header is None or (len(names) == 1 and "next" not in header):
        raise Damaged(f"generation {description['generation']}: its base is not complete")
    report(f"{size / (1 << 20):.1f} MiB read, all digests hold")
    return names, header


def _truncate(
    folder: Path, names: list[str], description: chain.Description, at: int | None
) -> tuple[list[str], Restored]:
    """Cut the increments after second `at`, or after the last complete record. Returns the names of the files left."""
    restored = Restored(description["generation"], at, description["second"], False)
    remaining = [names[0]]
    for name in names[1:]:
        walk = aof.walk(folder / name, at)
        remaining.append(name)
        restored.second = max(restored.second, walk.second or 0)
        if walk.later or walk.torn:
            os.truncate(folder / name, walk.end)
            for after in names[len(remaining) :]:
                os.unlink(folder / after)
            restored.exact = walk.later
            if walk.torn and len(remaining) < len(names):
                raise Damaged(f"{name}: ends within a record, and other files follow")
            break
    if len(remaining) == 1:  # only the base is left, and Redis expects an increment to append to
        sequence = names[0].split(".")[-3]
        remaining.append(f"appendonly.aof.{sequence}.incr.aof")
        (folder / remaining[1]).touch()
    return remaining, restored


def _write_manifest(part: Path, names: list[str], description: chain.Description) -> None:
    """Write the manifest and the file `server`, and make everything durable: files first, then the folders."""
    folder = part / "appendonlydir"
    manifest = folder / aof.MANIFEST
    manifest.write_text(aof.render(aof.Manifest(names[0], names[1:])))
    marker = part / "server"
    marker.write_text(f"{description['server']} {description['version']}\n")
    for path in [*(folder / name for name in names), manifest, marker, folder, part]:
        files.sync(path)


def finish(part: Path, to: Path) -> None:
    """Give the complete folder its name."""
    os.rename(part, to)  # rename(2) replaces an empty folder
    files.sync(to.parent)


@asynccontextmanager
async def running(settings: Settings, folder: Path, *options: str) -> AsyncIterator[Redis]:
    """Run a server on a data folder, and yield a client of it. The server is stopped afterwards.

    `options` are further ones of the server, for example `("--cluster-enabled", "yes")`.

    Nobody else can reach the server: its socket is in a temporary folder. Raises Damaged with the last lines of the
    server's log if it does not load the folder.
    """
    with tempfile.TemporaryDirectory(prefix="imagegram-") as scratch:
        socket, log_file = Path(scratch, "redis.sock"), Path(scratch, "log")
        # server.command needs a data folder whose path is short enough for a socket.
        Path(scratch, "redis").symlink_to(folder)
        command = server.command(replace(settings, data=Path(scratch), redis_node=None))
        own = ["--unixsocket", str(socket), "--logfile", ""]  # if an option is given twice, the server takes the last
        with log_file.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                *command, *own, *options, stdout=file, stderr=file, stdin=asyncio.subprocess.DEVNULL
            )
        client = Redis(unix_socket_path=str(socket))
        try:
            deadline = time.monotonic() + LOAD_SECONDS
            while not await _is_loaded(client):
                if process.returncode is not None or time.monotonic() > deadline:
                    tail = log_file.read_text(errors="replace").strip().splitlines()[-5:]
                    raise Damaged("the server does not load it: " + " | ".join(tail))
                await asyncio.sleep(0.02)
            yield client
        finally:
            await client.aclose()
            with suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


def url(client: Redis) -> str:
    """The URL of the server that `running` started."""
    return f"unix://{quote(client.connection_pool.connection_kwargs['path'])}"


async def _is_loaded(client: Redis) -> bool:
    try:
        return not (await client.info("persistence"))["loading"]
    except (RedisError, OSError):
        return False


async def check_data(
    client: Redis, settings: Settings, partitions: Iterable[int], report: Callable[[str], None]
) -> dict[str, int]:
    """Make the restored data fit the objects in the store, check them, and count them. See `check.fit_restored`.

    This is the only part of a restore that knows the data model. A missing original is reported as a flaw, but the
    restore does not fail: originals are not part of the backup.
    """
    db = db_client.Redis(url(client), undecodable=check.EXACTLY)
    try:
        result = await check.fit_restored(db, open_store(settings.store_url), partitions)
    finally:
        await db.close()
    for line in result.lines:
        report(f"FLAW: {line}")
    return {"posts": result.posts, "comments": result.comments, "open uploads": result.uploads, "flaws": result.flaws}
