"""`imagegram-storage restore` and `verify`: a Redis data folder from the backup store, as of any kept second.

Puts the files back where Redis expects them and lets Redis load them: nothing here knows what a record does.
The folder gets its name only after a server has loaded it and the data were checked; until then it is called
`<folder>.part`, which a broken-off restore leaves behind and the next one removes.
"""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
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

LOAD_SECONDS = 3600  # a server that has not loaded by then never will: 10 GiB take minutes


class Refused(Exception):
    """The restore cannot be done as asked; nothing was written."""


@dataclass
class Restored:
    generation: int
    requested: int | None  # unix second; None: the newest
    second: int  # the newest second of which something is in
    exact: bool  # nothing between `second` and the second asked for is missing
    counts: dict[str, int] = field(default_factory=dict)


def clock(second: float) -> str:
    return datetime.fromtimestamp(int(second), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def restore(
    settings: Settings,
    store: ObjectStore,
    to: Path,
    at: int | None = None,
    report: Callable[[str], None] = print,
) -> Restored:
    """Make `to` the data folder of a Redis that holds all of the seconds up to and including `at`.

    Raises Refused; Damaged if anything in the store is not what was put; NotFound, Unavailable.
    """
    to = to.absolute()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise Refused(f"{to} is not empty")
    described = await chain.descriptions(store)
    number = _choose_generation(described, at)
    description = described[number]
    _require_fitting_server(settings, description)
    report(f"generation {number}, begun {clock(description['second'])} by {description['server']}")
    part = to.with_name(to.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    folder = part / "appendonlydir"
    folder.mkdir(parents=True)
    names, mark = await _download(store, description, folder, report)
    kept, restored = await wrap(_truncate)(folder, names, description, at)
    await wrap(_write_manifest)(part, kept, description)
    following = min((other for other in described if other > number), default=None)
    if at is not None and following and not restored.exact:
        restored.exact = mark.get("closed") == following and not mark["gap"]
        if not restored.exact:
            report(
                f"NOT EXACT: nothing is kept of the time from {clock(restored.second)}"
                f" to {clock(described[following]['second'])}; this is the state at its beginning"
            )
    else:
        restored.exact = True
    report("starting a server on it")
    async with running(settings, part) as redis:
        restored.counts = await _check_data(redis, settings, report)
    await wrap(_rename_into_place)(part, to)
    return restored


def _choose_generation(described: Mapping[int, chain.Description], at: int | None) -> int:
    """The newest generation, or the newest whose base holds nothing later than the second asked for."""
    if not described:
        raise Refused("the backup store holds no generation")
    fit = [number for number, one in described.items() if at is None or one["second"] <= at]
    if not fit:
        raise Refused(f"the oldest second kept is {clock(min(one['second'] for one in described.values()))}")
    return max(fit)


def _require_fitting_server(settings: Settings, description: chain.Description) -> None:
    here = server.identify(server.server_program(settings))
    major, minor, patch = map(int, description["version"].split("."))
    wrote = server.Server(description["server"], (major, minor, patch))
    if here.family != wrote.family or here.version < wrote.version:
        raise Refused(
            f"{wrote} wrote this backup, the server here is {here}:"
            " set IMAGEGRAM_REDIS_SERVER to one of that family, no older"
        )


async def _download(
    store: ObjectStore, description: chain.Description, folder: Path, report: Callable[[str], None]
) -> tuple[list[str], chain.Header]:
    """Write the files of the chain. Returns their names in order, and the last header."""
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
                report(f"{size / (1 << 20):.0f} MiB, now {header['file']} of {clock(header['time'])}")
            if header.get("next") and len(names) == 1 and header["prefix"] != description["sha256"]:
                raise Damaged(f"{header['file']}: not the base that was described")
    finally:
        if file:
            file.close()
    if header is None or (len(names) == 1 and "next" not in header):
        raise Damaged(f"generation {description['generation']}: its base is not whole")
    report(f"{size / (1 << 20):.1f} MiB read, all digests hold")
    return names, header


def _truncate(
    folder: Path, names: list[str], description: chain.Description, at: int | None
) -> tuple[list[str], Restored]:
    """Cut the increments after the second, or after the last whole record. Returns the files left."""
    restored = Restored(description["generation"], at, description["second"], False)
    kept = [names[0]]
    for name in names[1:]:
        found = aof.walk(folder / name, at)
        kept.append(name)
        restored.second = max(restored.second, found.second or 0)
        if found.later or found.torn:
            os.truncate(folder / name, found.end)
            for after in names[len(kept) :]:
                os.unlink(folder / after)
            restored.exact = found.later
            if found.torn and len(kept) < len(names):
                raise Damaged(f"{name}: ends within a record, and other files follow")
            break
    if len(kept) == 1:  # only the base is kept: Redis wants an increment to go on with
        sequence = names[0].split(".")[-3]
        kept.append(f"appendonly.aof.{sequence}.incr.aof")
        (folder / kept[1]).touch()
    return kept, restored


def _write_manifest(part: Path, names: list[str], description: chain.Description) -> None:
    """What makes it a data folder: bytes first, then the manifest that names them, then the folders."""
    folder = part / "appendonlydir"
    manifest = folder / aof.MANIFEST
    manifest.write_text(aof.render(aof.Manifest(names[0], names[1:])))
    wrote = part / "server"
    wrote.write_text(f"{description['server']} {description['version']}\n")
    for path in [*(folder / name for name in names), manifest, wrote, folder, part]:
        files.sync(path)


def _rename_into_place(part: Path, to: Path) -> None:
    os.rename(part, to)  # takes the place of an empty folder
    files.sync(to.parent)


@asynccontextmanager
async def running(settings: Settings, folder: Path) -> AsyncIterator[Redis]:
    """A client of a server of its own on `folder`, which nobody else can reach; it is stopped afterwards.

    Raises Damaged with the server's last words if it does not load.
    """
    with tempfile.TemporaryDirectory(prefix="imagegram-") as scratch:
        socket, log_file = Path(scratch, "redis.sock"), Path(scratch, "log")
        Path(scratch, "redis").symlink_to(folder)  # a data folder whose paths are short enough for a socket
        command = server.command(replace(settings, data=Path(scratch)))
        own = [
            "--unixsocket",
            str(socket),
            "--logfile",
            "",
        ]  # of options given twice the server takes the last
        with log_file.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                *command, *own, stdout=file, stderr=file, stdin=asyncio.subprocess.DEVNULL
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
    """Where the server is that `running` started."""
    return f"unix://{quote(client.connection_pool.connection_kwargs['path'])}"


async def _is_loaded(client: Redis) -> bool:
    try:
        return not (await client.info("persistence"))["loading"]
    except (RedisError, OSError):
        return False


async def _check_data(client: Redis, settings: Settings, report: Callable[[str], None]) -> dict[str, int]:
    """The one place where the data model comes in: fit the data to the store's objects, check and count.

    A missing original is told of and stands in nobody's way: it is not the backup that lacks it.
    """
    db = db_client.Redis(url(client), undecodable=check.EXACTLY)
    try:
        found = await check.fit_restored(db, open_store(settings.store_url), settings.partitions)
    finally:
        await db.close()
    for line in found.lines:
        report(f"FLAW: {line}")
    return {"posts": found.posts, "comments": found.comments, "open uploads": found.uploads, "flaws": found.flaws}
