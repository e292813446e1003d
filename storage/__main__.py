"""`imagegram-storage`, or `python -m storage`: the embedded Redis, its backup, and maintenance of the data.

    redis                              starts the embedded Redis server
    ship                               copies Redis' append-only file to the backup store as it grows
    snapshots                          lists what is in the backup store
    restore [--at TIME] --to FOLDER    writes a data folder for Redis as it was at any kept second
    verify                             tests whether the newest generation can be restored
    check [--repair] [--deep]          checks the invariants of live or restored data
    sweep [--dry-run]                  removes objects that belong to no post and no upload
    retry                              gives posts that failed as `exhausted` new attempts at their image
    script NAME                        prints a Lua script as it is sent to Redis, for `redis-cli --eval`
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from datetime import datetime
from pathlib import Path

from storage import check, processes, retry, sweep
from storage.backup import restore, retain, ship, snapshots, state, verify
from storage.backup.aof import Damaged
from storage.db import server
from storage.db.client import SCRIPTS, Redis
from storage.errors import Unknown, Unreachable
from storage.objects import NotFound, Unavailable, open_store, require_stores
from storage.settings import Settings, load, make_data, refused

STORES = {  # the stores that each command opens
    "ship": ["BACKUP_STORE"],
    "snapshots": ["BACKUP_STORE"],
    "restore": ["STORE", "BACKUP_STORE"],
    "verify": ["STORE", "BACKUP_STORE"],
    "check": ["STORE"],
    "sweep": ["STORE", "BACKUP_STORE"],
}


def main() -> None:
    """The console script `imagegram-storage`."""
    processes.end_after(run)


def run() -> None:
    """Run the command in sys.argv. Raises SystemExit with an error message if the command fails."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="imagegram-storage", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("redis", "ship", "snapshots", "verify", "retry"):
        commands.add_parser(name)
    restore_parser = commands.add_parser("restore")
    restore_parser.add_argument("--at", type=_unix_second, help="such as 2026-11-23T07:00:00Z; without it the newest")
    restore_parser.add_argument("--to", type=Path, required=True, help="an empty or new folder, for Redis' --dir")
    check_parser = commands.add_parser("check")
    check_parser.add_argument("--repair", action="store_true", help="repair derived data")
    check_parser.add_argument("--deep", action="store_true", help="read every object")
    check_parser.add_argument("--folder", type=Path, help="a restored data folder; starts a server for it")
    sweep_parser = commands.add_parser("sweep")
    sweep_parser.add_argument("--dry-run", action="store_true", help="only report what would be removed")
    script_parser = commands.add_parser("script")
    script_parser.add_argument("name", nargs="?", metavar="NAME", help="the name of a file in lua/, without .lua")
    arguments = parser.parse_args()
    if arguments.command == "script":
        if arguments.name not in SCRIPTS:
            script_parser.error(f"NAME must be one of {', '.join(SCRIPTS)}")
        print(SCRIPTS[arguments.name].text, end="")
        return
    settings = load()
    if arguments.command in ("redis", "ship", "verify"):
        make_data(settings)
    if arguments.command == "redis":
        try:
            server.lock_folder(settings.data / "redis")
            command = server.command(settings)
            os.execvp(command[0], command)
        except OSError as error:
            raise refused("DATA", str(settings.data), f"{error.filename}: {error.strerror}") from None
    require_stores(settings, *STORES.get(arguments.command, []))
    if arguments.command == "ship":
        ship.main(settings)
        return
    try:
        work = {"sweep": _sweep, "check": _check, "retry": _retry}.get(arguments.command, _backup)
        asyncio.run(_cancel_on_sigterm(work(arguments, settings)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit("stopped before the command was complete")
    except (restore.Refused, Damaged, NotFound, Unavailable, Unreachable, Unknown, sweep.Mistaken) as error:
        sys.exit(f"{type(error).__name__.lower()}: {error}")
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)


async def _cancel_on_sigterm(work: Coroutine) -> None:
    """Run `work`, and cancel it on SIGTERM as on Ctrl-C.

    By default SIGTERM would end this process at once and leave behind the Redis server that it started.
    """
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    await work


async def _sweep(arguments: argparse.Namespace, settings: Settings) -> None:
    db = Redis(settings.redis_url)
    report = await sweep.sweep(
        db,
        open_store(settings.store_url),
        retain.KeptBackups(open_store(settings.backup_store_url)).may_name,
        settings.backup_reach_ms,
        remove=not arguments.dry_run,
    )
    await db.close()
    _say(f"{'found' if arguments.dry_run else 'removed'}: {report}")


async def _check(arguments: argparse.Namespace, settings: Settings) -> None:
    objects = open_store(settings.store_url)
    async with AsyncExitStack() as stack:
        url = settings.redis_url
        if arguments.folder:
            if not (arguments.folder / "appendonlydir").is_dir():
                raise restore.Refused(f"{arguments.folder} is not a data folder")
            server.lock_folder(arguments.folder)
            url = restore.url(await stack.enter_async_context(restore.running(settings, arguments.folder.absolute())))
        db = Redis(url, undecodable=check.EXACTLY)
        report = await check.check(db, objects, arguments.repair, arguments.deep)
        await db.close()
    for line in report.lines:
        _say(line)
    _say(str(report))
    if report.flaws:
        sys.exit(1)


async def _retry(arguments: argparse.Namespace, settings: Settings) -> None:
    db = Redis(settings.redis_url)
    count = await retry.retry(db)
    await db.close()
    _say(f"{count} posts have new attempts")


async def _backup(arguments: argparse.Namespace, settings: Settings) -> None:
    store = open_store(settings.backup_store_url)
    if arguments.command == "snapshots":
        # Read the last test restore's result from the store: the shipper's state on this machine is up to a minute old.
        last_result = await verify.last_result(store)
        print(snapshots.table(await snapshots.snapshots(store), state.read(settings), last_result))
    elif arguments.command == "verify":
        if not await verify.verify(settings, store, _say):
            sys.exit("the newest generation cannot be restored")
    else:
        done = await restore.restore(settings, store, arguments.to, arguments.at, _say)
        counts = ", ".join(f"{count} {noun}" for noun, count in done.counts.items())
        _say(f"done: {arguments.to} holds all up to {restore.format_utc(done.second)} ({counts})")


def _say(text: str) -> None:
    print(text, flush=True)


def _unix_second(text: str) -> int:
    """The Unix seconds of a time in RFC 3339.

    A time without a zone is refused, because a restore must not be wrong by hours.
    """
    with suppress(ValueError):
        moment = datetime.fromisoformat(text)
        if moment.tzinfo:
            return int(moment.timestamp())
    raise argparse.ArgumentTypeError(f"{text!r}: expected a time with its zone, such as 2026-11-23T07:00:00Z")


if __name__ == "__main__":
    main()
