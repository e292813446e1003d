"""`make run`: starts honcho, and ends all parts when honcho, make or the terminal has ended.

    make ─► this process ─► honcho ─► redis, api, worker, ship: each in a session of its own

honcho starts each part below a process that ignores signals. If honcho is killed with `kill -9`, nobody ends the parts:
they would go on serving and hold the port and the data folder. So this process ends them. It becomes the parent of
every process below it that loses its own parent: prctl(2), PR_SET_CHILD_SUBREAPER.

| what ends | what happens |
|---|---|
| make | the kernel sends SIGTERM to this process (prctl(2), PR_SET_PDEATHSIG), which sends it to honcho |
| this process | the kernel sends SIGTERM to honcho, which ends the parts |
| honcho | this process ends the parts that are left |
| a part | honcho ends the other parts, then itself |
| the terminal, or the reader of the output | this process sees it with poll(2), and sends SIGTERM to honcho |

In the last case honcho fails at the first line that it writes, before it has ended the parts. So this process kills a
honcho that does not end in time, and then ends the parts that are left.
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
GRACE = 5.0  # seconds from SIGTERM to SIGKILL of a part; honcho uses the same
HONCHO_GRACE = 7  # seconds from SIGTERM to SIGKILL of honcho: more than GRACE, which honcho gives its parts
STDOUT = 1  # file descriptor
POLL = 0.05  # seconds between two reads of the processes that are left


def start_honcho(procfile: Path) -> int:
    """Start honcho with the processes of a file. Returns its process id."""
    supervisor = os.getpid()
    honcho = os.fork()
    if honcho == 0:
        die_with_parent(signal.SIGTERM, supervisor)
        program = str(Path(sys.executable).with_name("honcho"))
        os.execv(program, [program, "--env", "/dev/null", "start", "--procfile", str(procfile)])
    return honcho


def read_processes() -> tuple[dict[int, list[int]], set[int]]:
    """Read all processes of this machine from proc(5), /proc/[pid]/stat.

    Returns the children of each process, and the processes that lead a session.
    """
    children, leaders = defaultdict(list), set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            _, parent, _, session, *_ = (process / "stat").read_text().rpartition(")")[2].split()
            children[int(parent)].append(int(process.name))
            if session == process.name:
                leaders.add(int(process.name))
    return children, leaders


def find_parts(children: dict[int, list[int]], leaders: set[int], process: int) -> Iterator[int]:
    """Yield the topmost session leaders below a process. A leader ends the processes below itself."""
    for child in children[process]:
        if child in leaders:
            yield child
        else:
            yield from find_parts(children, leaders, child)


def descendants(children: dict[int, list[int]], process: int) -> Iterator[int]:
    """Yield all processes below a process, each before its own children."""
    for child in children[process]:
        yield child
        yield from descendants(children, child)


def end_remaining_parts() -> None:
    """End all processes below this one. Returns when there are none.

    Sends SIGTERM to each part once. After GRACE seconds, sends SIGKILL to every process that is left.
    """
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


def main(procfile: Path = Path("Procfile")) -> None:
    """Run honcho until it ends, then end the parts that it has left.

    Raises SystemExit with the status of honcho. If a signal has ended honcho, the status is 128 + the signal's number.
    """
    make = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    die_with_parent(signal.SIGTERM, make)
    honcho = start_honcho(procfile)
    # A process group of its own: after `kill -9` of the terminal's whole job, this process is left and ends the parts.
    os.setpgid(0, 0)
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
    waits.register(STDOUT, 0)  # no events requested: poll(2) always reports POLLERR and POLLHUP
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
