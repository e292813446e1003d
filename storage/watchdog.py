"""Kills a process of this project that hangs. Docker then restarts it, or the worker does for its converters.

    process ──a byte for each sign of life──► watchdog: this file as a program
        ▲                                        │ after `limit` seconds without a byte
        └─────── SIGUSR1, then SIGKILL ──────────┘

The watchdog is a separate process, because threads and signal handlers of a stopped process do not run. It is a new
program instead of a fork, so it has no socket, no lock file and no secret of the process that it watches. It ends when
the pipe is closed. The kernel closes the pipe when the watched process ends, for whatever reason.

A kernel timer that sends SIGKILL would need no process at all. It was rejected: it cannot log what happened, and
`docker pause` would make it fire.

The watchdog counts ten short waits. If the whole machine is frozen in between (a suspended laptop, `docker pause`),
only the current wait ends too early, and the next byte restarts the count. A comparison of two clock times would kill
the process instead.
"""

import faulthandler
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, which the watchdog's process would import for nothing
if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

log = logging.getLogger("imagegram.watchdog")

WAITS = 10  # the process is killed after this many waits without a byte
# Work on an event loop may take this many limits from one step to the next: 120 s by default. S3 answers within 66 s.
PATIENCE = 4
DUMPING = 0.5  # seconds that the process gets to write the stacks of its threads

_pipe = -1  # file descriptor for the signs of life; -1: there is no watchdog
_watchdog = None  # the Popen of the watchdog. Popen warns if it is garbage-collected before its process ends
_period = 0.0  # seconds between two signs of life, which is also the length of a wait


class Work:
    """Work in progress on an event loop."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.silent = 0  # periods since its last `step`


_under_way: list[Work] = []
_current: ContextVar[Work | None] = ContextVar("work", default=None)


def start(limit: float) -> None:
    """Start the watchdog: it kills this process after `limit` seconds without a sign of life. 0: no watchdog.

    The process must then call `watch_loop` or `alive`. Ten signs of life in `limit` seconds are enough.
    """
    global _pipe, _watchdog, _period
    if not limit:
        return
    import subprocess  # not at the top: the watchdog runs this file too, and would take 1 MB more memory

    if os.getpid() == 1:  # signals from its own namespace, even SIGKILL, do not end process 1: pid_namespaces(7)
        log.warning("the watchdog cannot kill process 1: start the container with --init")
    faulthandler.register(signal.SIGUSR1, file=2)
    receive, _pipe = os.pipe()  # exec closes both ends; a fork closes its copy in `_close_pipe`
    os.set_blocking(_pipe, False)
    _period = limit / WAITS
    _watchdog = subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(__file__), str(limit)],
        stdin=receive,
        stdout=subprocess.DEVNULL,
        cwd="/",
        env={},
        start_new_session=True,  # Ctrl-C and honcho's signals must not reach the watchdog
    )
    os.close(receive)
    os.register_at_fork(after_in_child=_close_pipe)


def _close_pipe() -> None:
    """Close the pipe in a fork.

    A fork would keep the pipe open after its parent has ended. Its signs of life would hide that its parent hangs.
    """
    global _pipe
    if _pipe >= 0:
        os.close(_pipe)
        _pipe = -1


def alive() -> None:
    """Give a sign of life, for a process without an event loop.

    Only calls by the main thread count: another thread would hide that the main thread hangs.
    """
    if _pipe < 0 or threading.current_thread() is not threading.main_thread():
        return
    try:
        os.write(_pipe, b".")
    except BlockingIOError:  # the pipe is full, because the watchdog is stopped: it has enough signs of life to read
        pass
    except BrokenPipeError:
        log.error("the watchdog has ended, so this process ends too")
        _close_pipe()
        os.kill(os.getpid(), signal.SIGTERM)


def watch_loop(loop: "AbstractEventLoop") -> None:
    """Give signs of life as long as an event loop runs. Kill the process if a `working` block makes no `step`."""
    if _pipe < 0:
        return
    alive()
    for work in _under_way:
        work.silent += 1
        if work.silent > PATIENCE * WAITS:
            limit = round(PATIENCE * WAITS * _period)
            log.error("%s made no step for %d s: the process is killed", work.name, limit)
            faulthandler.dump_traceback(file=2)
            os.kill(os.getpid(), signal.SIGKILL)
    loop.call_later(_period, watch_loop, loop)


@contextmanager
def working(name: str) -> Iterator[None]:
    """Mark work on an event loop that must call `step` at least once in PATIENCE limits. Pause outside the block.

        with watchdog.working("shipping"):
            for piece in pieces:
                await send(piece)
                watchdog.step()
    """
    work = Work(name)
    before = _current.set(work)
    _under_way.append(work)
    try:
        yield
    finally:
        _under_way.remove(work)
        _current.reset(before)


def step() -> None:
    """Report progress of the `working` block of this context, if there is one.

    It also works in a thread that was started by asyncio.to_thread, which copies the context.
    """
    if work := _current.get():
        work.silent = 0


# The functions below run in the watchdog's process.


def _watch(limit: float) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # systemd sends signals to all processes of a service
        signal.signal(signum, signal.SIG_IGN)
    parent = os.getppid()
    silent = 0  # waits without a byte
    while silent < WAITS:
        if select.select([0], [], [], limit / WAITS)[0]:
            if not os.read(0, 65536):
                return
            silent = 0
        else:
            silent += 1
    if os.getppid() != parent:
        return
    # Write only if that does not block. If nobody reads stderr, that may be the reason why the process hangs.
    if select.select([], [2], [], 0)[1]:
        with suppress(OSError):
            os.write(2, f"watchdog: process {parent} gave no sign of life for {limit:g} s: it is killed\n".encode())
    with suppress(ProcessLookupError):
        os.kill(parent, signal.SIGUSR1)  # faulthandler writes the stacks of its threads, if it still can
        time.sleep(DUMPING)
        if os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)


if __name__ == "__main__":
    _watch(float(sys.argv[1]))
