"""What `make run` starts: runs honcho, and ends all of its parts when honcho, make or the terminal has ended.

honcho starts each part in a session of its own, below a process that ignores signals. After kill -9 of honcho nobody
would end the parts: they would go on serving and hold port and data. Therefore every process below this one that loses
its parent becomes its child (prctl(2), PR_SET_CHILD_SUBREAPER), and it ends what honcho has left. When make ends, this
process gets SIGTERM. When this process ends, honcho gets SIGTERM, and ends its parts itself.

honcho cannot end its parts once its output is gone (a closed terminal, a broken pipe): it fails at the first line that
it writes. So this process watches the output too, and kills a honcho that does not end.
"""

import ctypes
import os
import select
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from storage.processes import die_with_parent

PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
GRACE = 5.0  # seconds from SIGTERM to SIGKILL, as honcho has it
HONCHO_GRACE = 7  # seconds from SIGTERM to SIGKILL of honcho, which has those of its parts in between
STDOUT = 1  # file descriptor
POLL = 0.05  # seconds between two looks at what is left


def start_honcho() -> int:
    """Start honcho; its process id."""
    supervisor = os.getpid()
    honcho = os.fork()
    if honcho == 0:
        die_with_parent(signal.SIGTERM, supervisor)
        program = str(Path(sys.executable).with_name("honcho"))
        os.execv(program, [program, "--env", "/dev/null", "start"])
    return honcho


def read_processes() -> tuple[dict[int, list[int]], set[int]]:
    """The children of every process of this machine, and the processes that lead a session: proc(5), stat."""
    children, leaders = defaultdict(list), set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            _, parent, _, session, *_ = (process / "stat").read_text().rpartition(")")[2].split()
            children[int(parent)].append(int(process.name))
            if session == process.name:
                leaders.add(int(process.name))
    return children, leaders


def find_parts(children: dict[int, list[int]], leaders: set[int], process: int) -> Iterator[int]:
    """The first session leaders below a process. What is below those is theirs to end."""
    for child in children[process]:
        if child in leaders:
            yield child
        else:
            yield from find_parts(children, leaders, child)


def descendants(children: dict[int, list[int]], process: int) -> Iterator[int]:
    for child in children[process]:
        yield child
        yield from descendants(children, child)


def end_remaining_parts() -> None:
    """Send SIGTERM to each part once, after GRACE SIGKILL to all, until nothing is below this process."""
    signalled: set[int] = set()
    deadline = time.monotonic() + GRACE
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        children, leaders = read_processes()
        if not children[os.getpid()]:
            return
        late = time.monotonic() > deadline
        if late:
            remaining = list(descendants(children, os.getpid()))
        else:
            remaining = [part for part in find_parts(children, leaders, os.getpid()) if part not in signalled]
        for process in remaining:
            signalled.add(process)
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL if late else signal.SIGTERM)
        time.sleep(POLL)


def main() -> None:
    make = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    die_with_parent(signal.SIGTERM, make)
    honcho = start_honcho()
    os.setpgid(0, 0)  # so that kill -9 of the terminal's whole job leaves this process, which ends the parts
    honcho_fd = os.pidfd_open(honcho)

    def send(signum: int) -> None:
        with suppress(ProcessLookupError):  # it has ended
            signal.pidfd_send_signal(honcho_fd, signum)

    def stop(*_) -> None:
        send(signal.SIGTERM)
        signal.alarm(HONCHO_GRACE)

    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, stop)
    signal.signal(signal.SIGALRM, lambda *_: send(signal.SIGKILL))
    waits = select.poll()
    waits.register(honcho_fd, select.POLLIN)
    waits.register(STDOUT, 0)  # only that it is gone
    while honcho_fd not in (ready := [file for file, _ in waits.poll()]):
        if STDOUT in ready:
            waits.unregister(STDOUT)
            stop()
    status = os.waitstatus_to_exitcode(os.waitpid(honcho, 0)[1])
    signal.alarm(0)
    end_remaining_parts()
    raise SystemExit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
