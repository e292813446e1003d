"""Processes of the operating system: how to end them, how to follow a parent's end, which ones listen on a port."""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # prctl(2)

_libc = ctypes.CDLL(None)


def end_after(command: Callable[[], None]) -> NoReturn:
    """Run a command, then exit with the status of its SystemExit, or with 0. Skips Python's finalization.

    obstore runs its own threads for S3. If one of them is still busy while Python finalizes, it aborts the process with
    SIGABRT, although all work was done. This happened in 3 of 70 runs of `imagegram-storage snapshots`.
    """
    status = 0
    try:
        command()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    with suppress(OSError):  # the reader of the output may have gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def die_with_parent(signum: int, parent: int) -> None:
    """Ask the kernel to send this process `signum` when the process `parent` ends, for whatever reason.

    Exits with status 1 if the parent has already ended. The kernel watches the thread that forked, not the whole
    process (PR_SET_PDEATHSIG in prctl(2)). So the parent must fork in a thread that lives as long as the parent itself.
    """
    _libc.prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it ended before the call above
        os._exit(1)


def listening(port: int) -> list[int]:
    """Ids of the processes that listen on a TCP port, in ascending order.

    Processes of other users are left out, unless this process may read their file descriptors. Source: proc(5),
    /proc/[pid]/net/tcp and /proc/[pid]/fd.
    """
    sockets = set()
    pids = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with suppress(OSError):
            for fields in map(str.split, table.read_text().splitlines()[1:]):
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:  # 0A: TCP_LISTEN
                    sockets.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has ended, or belongs to another user
            if any(os.readlink(file) in sockets for file in (process / "fd").iterdir()):
                pids.add(int(process.name))
    return sorted(pids)
