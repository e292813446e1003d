"""`imagegram-storage`, or `python -m storage`: the embedded Redis, its backup, and maintenance of the data.

    redis                              starts the embedded Redis server
    ship                               copies Redis' append-only file to the backup store as it grows
    snapshots                          lists what is in the backup store
    restore [--at TIME] --to FOLDER    writes a data folder for Redis as it was at any kept second
    verify [--node ID]                 tests whether the newest backup can be restored
    check [--repair] [--deep]          checks the invariants of live or restored data
    sweep [--dry-run]                  removes objects that belong to no post and no upload
    retry                              gives posts that failed as `exhausted` new attempts at their image
    show ID [--json]                   shows all that is known of a post or a comment, hidden or not
    hide ID                            hides a post or a comment from everybody; nothing of it is lost
    unhide ID                          shows a hidden post or comment again
    delete ID                          deletes a post or a comment, as its author would
    export USER FILE                   writes all that a user has posted into a zip file
    erase USER [--yes]                 removes all that a user has posted; without --yes only counts it
    erase --again [--yes]              repeats all erasures, after a restore
    cluster show                       shows the nodes of a Redis Cluster, and what is wrong with its shape
    cluster form --primaries N         makes a Cluster of the nodes in IMAGEGRAM_REDIS_URL, or completes it
    cluster plan N                     prints the slots that each of N primaries should have
    cluster place [--yes]              moves partitions until all primaries have as many; without --yes only shows it
    script NAME                        prints a Lua script as it is sent to Redis, for `redis-cli --eval`

ID is the id of a post, or POST/COMMENT.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from datetime import datetime
from pathlib import Path

from storage import check, erasure, export, keys, moderation, processes, retry, sweep
from storage.backup import owners, restore, retain, shards, ship, snapshots, state, verify
from storage.backup.aof import Damaged
from storage.db import forming, server, topology
from storage.db.client import SCRIPTS, now_ms
from storage.db.cluster import Cluster, connect
from storage.errors import Refusal, Unknown, Unreachable
from storage.objects import NotFound, Unavailable, open_store, require_stores
from storage.progress import Progress
from storage.segments import Segments
from storage.settings import Settings, load, make_data, refused
from storage.times import format_ms

STORES = {  # the stores that each command opens
    "ship": ["BACKUP_STORE"],
    "snapshots": ["BACKUP_STORE"],
    "restore": ["STORE", "BACKUP_STORE"],
    "verify": ["STORE", "BACKUP_STORE"],
    "check": ["STORE"],
    "sweep": ["STORE", "BACKUP_STORE"],
    **dict.fromkeys(("show", "hide", "delete", "export"), ["STORE"]),
    "erase": ["STORE", "BACKUP_STORE"],
}

REFUSED = (restore.Refused, topology.Refused, sweep.Mistaken, export.Busy)
CONTINUE = ("export", "erase")  # commands that go on where they were broken off


def main() -> None:
    """The console script `imagegram-storage`."""
    processes.end_after(run)


def run() -> None:
    """Run the command in sys.argv. Raises SystemExit with an error message if the command fails."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="imagegram-storage", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("redis", "ship", "snapshots", "retry"):
        commands.add_parser(name)
    verify_parser = commands.add_parser("verify")
    verify_parser.add_argument("--node", help="the id of a node of a Cluster; without it all shards are restored")
    restore_parser = commands.add_parser("restore")
    restore_parser.add_argument("--at", type=_unix_second, help="such as 2026-11-23T07:00:00Z; without it the newest")
    restore_parser.add_argument("--to", type=Path, required=True, help="an empty or new folder, for Redis' --dir")
    check_parser = commands.add_parser("check")
    check_parser.add_argument("--repair", action="store_true", help="repair derived data")
    check_parser.add_argument("--deep", action="store_true", help="read every object")
    check_parser.add_argument("--folder", type=Path, help="a restored data folder; starts a server for it")
    sweep_parser = commands.add_parser("sweep")
    sweep_parser.add_argument("--dry-run", action="store_true", help="only report what would be removed")
    for name in ("show", "hide", "unhide", "delete"):
        one_parser = commands.add_parser(name)
        one_parser.add_argument("id", metavar="ID", help="the id of a post, or POST/COMMENT")
        if name == "show":
            one_parser.add_argument("--json", action="store_true", help="print JSON")
    export_parser = commands.add_parser("export")
    export_parser.add_argument("user", metavar="USER", type=_user)
    export_parser.add_argument("file", metavar="FILE", type=Path, help="a zip file that does not exist yet")
    erase_parser = commands.add_parser("erase")
    erase_parser.add_argument("user", metavar="USER", nargs="?", type=_user)
    erase_parser.add_argument("--again", action="store_true", help="all users that were erased before")
    erase_parser.add_argument("--yes", action="store_true", help="really remove it")
    cluster_commands = commands.add_parser("cluster").add_subparsers(dest="cluster", required=True)
    cluster_commands.add_parser("show")
    form_parser = cluster_commands.add_parser("form")
    form_parser.add_argument("--primaries", metavar="N", type=_count, required=True, help="primaries that hold data")
    form_parser.add_argument("--home", action="store_true", help="the first N nodes become the primaries again")
    plan_parser = cluster_commands.add_parser("plan")
    plan_parser.add_argument("primaries", metavar="N", type=_count, help="primaries that hold data")
    numbers = range(topology.ARBITERS + 1)
    for one_parser in (form_parser, plan_parser):
        one_parser.add_argument("--arbiters", type=int, choices=numbers, default=0, help="primaries that only vote")
    place_parser = cluster_commands.add_parser("place")
    place_parser.add_argument("--without", metavar="HOST:PORT", default="", help="a primary that shall hold nothing")
    place_parser.add_argument("--yes", action="store_true", help="really move them")
    script_parser = commands.add_parser("script")
    script_parser.add_argument("name", nargs="?", metavar="NAME", help="the name of a file in lua/, without .lua")
    arguments = parser.parse_args()
    if arguments.command == "script":
        if arguments.name not in SCRIPTS:
            script_parser.error(f"NAME must be one of {', '.join(SCRIPTS)}")
        print(SCRIPTS[arguments.name].text, end="")
        return
    if arguments.command == "erase" and bool(arguments.user) == arguments.again:
        erase_parser.error("either USER or --again is required")
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
        work = WORK.get(arguments.command, _backup)
        asyncio.run(_cancel_on_sigterm(work(arguments, settings)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        hint = "; the same command again continues" if arguments.command in CONTINUE else ""
        sys.exit(f"stopped before the command was complete{hint}")
    except (*REFUSED, Damaged, NotFound, Unavailable, Refusal) as error:
        again = arguments.command in CONTINUE and isinstance(error, (Unavailable, Unreachable, Unknown))
        hint = "; the same command again continues" if again else ""
        sys.exit(f"{type(error).__name__.lower()}: {error}{hint}")
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)


async def _cancel_on_sigterm(work: Coroutine) -> None:
    """Run `work`, and cancel it on SIGTERM as on Ctrl-C.

    By default SIGTERM would end this process at once and leave behind the Redis server that it started.
    """
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    await work


async def _sweep(arguments: argparse.Namespace, settings: Settings) -> None:
    db = connect(settings.redis_url, settings.replicas)
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
        db = connect(url, settings.replicas, check.EXACTLY)
        report = await check.check(db, objects, arguments.repair, arguments.deep)
        await db.close()
    for line in report.lines:
        _say(line)
    _say(str(report))
    if report.flaws:
        sys.exit(1)


async def _retry(arguments: argparse.Namespace, settings: Settings) -> None:
    db = connect(settings.redis_url, settings.replicas)
    count = await retry.retry(db)
    await db.close()
    _say(f"{count} posts have new attempts")


async def _moderate(arguments: argparse.Namespace, settings: Settings) -> None:
    db, objects = connect(settings.redis_url, settings.replicas), open_store(settings.store_url)
    segments = Segments(objects)
    post, _, comment = arguments.id.partition("/")
    if "/" in arguments.id:
        keys.comment_ms(comment)
    if arguments.command == "show":
        known = await moderation.show(db, objects, segments, post, comment)
        _say(json.dumps(known, indent=2) if arguments.json else moderation.render(known))
    elif arguments.command == "hide":
        _say(await moderation.hide(db, objects, segments, post, comment))
    elif arguments.command == "unhide":
        _say(await moderation.unhide(db, segments, post, comment))
    else:
        _say(await moderation.delete(db, objects, segments, post, comment, settings.backup_reach_ms))
    await db.close()


async def _export(arguments: argparse.Namespace, settings: Settings) -> None:
    db = connect(settings.redis_url, settings.replicas)
    objects = open_store(settings.store_url)
    with Progress() as progress:
        about = await export.export(db, objects, Segments(objects), arguments.user, arguments.file, progress)
    await db.close()
    counts = ", ".join(f"{about[name]} {name}" for name in export.ROWS)
    missing = len(about["posts_without_original"])
    _say(f"{arguments.file}: {counts}" + (f"; {missing} posts have no original any more" if missing else ""))
    _end_if_unreadable(about.get("posts_with_unreadable_comments", []))  # rows of an older version have none


async def _erase(arguments: argparse.Namespace, settings: Settings) -> None:
    db, objects = connect(settings.redis_url, settings.replicas), open_store(settings.store_url)
    segments, reach = Segments(objects), settings.backup_reach_ms
    with Progress() as progress:
        if arguments.again:
            users, counts = await erasure.erase_again(db, objects, segments, reach, progress, arguments.yes)
            who = f"{users} users that were erased before"
        else:
            counts = await erasure.erase(db, objects, segments, arguments.user, reach, progress, arguments.yes)
            who = moderation.printable(arguments.user)
    numbers = ", ".join(f"{count} {what}" for what, count in counts.items())
    _say(f"{'removed' if arguments.yes else 'found'} of {who}: {numbers}")
    if not arguments.yes:
        _say("nothing was removed: add --yes to remove it")
    elif arguments.again:
        may_name = retain.KeptBackups(open_store(settings.backup_store_url)).may_name
        old = await erasure.forget_old(db, objects, settings.partitions, may_name, reach)
        _say(f"forgot {old} records of erasures that no backup can undo any more")
    else:
        gone = format_ms(now_ms(db) + reach)
        _say(f"the last backup that names it is gone at {gone}, if trial restores succeed until then; originals too")
        _say("a restore to before now brings it back: run `imagegram-storage erase --again --yes` after one")
        _say("a token that is still valid can post again: revoke it at its issuer, then run this command once more")
    await db.close()
    _end_if_unreadable(sorted(counts.unreadable))


def _end_if_unreadable(posts: list[str]) -> None:
    """End with an error status if some comments of these posts are in segments that are missing or damaged."""
    for post in posts:
        _say(f"NOT COMPLETE: some comments of {post} cannot be read: run imagegram-storage check --deep")
    if posts:
        sys.exit(1)


async def _cluster(arguments: argparse.Namespace, settings: Settings) -> None:
    if arguments.cluster == "plan":
        for slots in topology.placement(arguments.primaries, arguments.arbiters):
            _say(topology.written(slots))
        return
    db = connect(settings.redis_url)
    if not isinstance(db, Cluster):
        raise SystemExit("IMAGEGRAM_REDIS_URL names no Cluster: redis+cluster://host:port,host:port,…")
    if arguments.cluster == "form":
        await forming.form(db, arguments.primaries, arguments.arbiters, _say)
        if arguments.home:
            await forming.bring_home(db, arguments.primaries, _say)
    members = await topology.read(db)
    if arguments.cluster == "place":
        planned = topology.moves(members, settings.partitions, arguments.without)
        places = {member.id: member.place for member in members}
        for (source, target), slots in planned.items():
            _say(f"{places[source]}: {' '.join(topology.command(target, slots))}")
        if arguments.yes:
            await forming.move(db, members, planned, settings.partitions, _say)
        elif planned:
            _say("nothing was moved: add --yes to move it")
        else:
            _say("nothing to move")
    else:
        _say(topology.table(members, settings.partitions))
        for problem in (found := topology.problems(members, settings.partitions, settings.replicas)):
            _say(f"PROBLEM: {problem}")
        if found:
            sys.exit(1)
    await db.close()


async def _backup(arguments: argparse.Namespace, settings: Settings) -> None:
    store = open_store(settings.backup_store_url)
    if arguments.command == "snapshots":
        # Read the last test restore's result from the store: the shipper's state on this machine is up to a minute old.
        last_result = await verify.last_result(store)
        if await owners.nodes(store):
            print(await snapshots.cluster_table(store, state.read(settings), last_result))
        else:
            print(snapshots.table(await snapshots.snapshots(store), state.read(settings), last_result))
    elif arguments.command == "verify":
        if not await verify.verify(settings, store, _say, arguments.node):
            sys.exit("the newest generation cannot be restored")
    else:
        done = await shards.restore_all(settings, store, arguments.to, arguments.at, _say)
        counts = ", ".join(f"{count} {noun}" for noun, count in done.counts.items())
        _say(f"done: {arguments.to} holds all up to {restore.format_utc(done.second)} ({counts})")
        later = [one for one in await erasure.records(open_store(settings.store_url)) if one.last >= done.second * 1000]
        if later:
            _say(f"{len(later)} users were erased after that: start, then run `imagegram-storage erase --again --yes`")


WORK = {
    "sweep": _sweep,
    "check": _check,
    "retry": _retry,
    "cluster": _cluster,
    "export": _export,
    "erase": _erase,
    **dict.fromkeys(("show", "hide", "unhide", "delete"), _moderate),
}  # the other commands are those of the backup


def _say(text: str) -> None:
    print(text, flush=True)


def _user(text: str) -> str:
    if text != text.encode(errors="replace").decode():
        raise argparse.ArgumentTypeError("it is not UTF-8")
    return text


def _count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 1 to 999")
    return int(text)


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
