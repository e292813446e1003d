"""Ends a process of ours that hangs. Whoever started it then starts it again: Docker, or the worker for its converters.

    process ──a byte for each sign of life──► watchdog: this file as a program
        ▲                                        │ after `limit` seconds without a byte
        └─────── SIGUSR1, then SIGKILL ──────────┘

The watchdog is a process of its own, because a thread or a signal handler of a stopped process does not run. It is a
new program, not a fork: it has no socket, no lock file and no secret of the process it watches. It ends at the end of
the pipe, which closes when the process ends, however that ends. A kernel timer that sends SIGKILL would need no process
at all, but it could not say what happened, and `docker pause` would fire it.

The time is counted in ten short waits. If everything is frozen meanwhile (a suspended laptop, `docker pause`), only the
wait under way is over too early, and one byte begins the count again. One difference of two clocks would kill.
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

log = logging.getLogger("imagegram.watchdog")

WAITS = 10  # without a byte, after which the process is killed
PATIENCE = 4  # limits that work on a running loop may take from one step to the next: 120 s. S3 answers within 66 s
DUMPING = 0.5  # seconds the process has to write where its threads are

_pipe = -1  # the end that signs are written to; -1: no watchdog
_watchdog = None  # its Popen, which would warn if it were collected before its end
_period = 0.0  # seconds between two signs, and of a wait


class Work:
    """Work that is under way on an event loop."""

    def __init__(self, name: str):
        self.name = name
        self.silent = 0  # periods since its last step


_under_way: list[Work] = []
_current: ContextVar[Work | None] = ContextVar("work", default=None)


def start(limit: float) -> None:
    """From now on this process is killed when it gives no sign of life for `limit` seconds. 0: no watchdog."""
    global _pipe, _watchdog, _period
    if not limit:
        return
    import subprocess  # here, because the watchdog runs this file and would be larger by 1 MB

    if os.getpid() == 1:  # signals of its own namespace, even SIGKILL, do not end it: pid_namespaces(7)
        log.warning("it cannot kill process 1: start the container with --init")
    faulthandler.register(signal.SIGUSR1, file=2)
    receive, _pipe = os.pipe()  # closed by exec; forks close it below
    os.set_blocking(_pipe, False)
    _period = limit / WAITS
    _watchdog = subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(__file__), str(limit)],
        stdin=receive,
        stdout=subprocess.DEVNULL,
        cwd="/",
        env={},
        start_new_session=True,  # Ctrl-C and honcho's signals are for the process it watches
    )
    os.close(receive)
    os.register_at_fork(after_in_child=_close_pipe)


def _close_pipe() -> None:
    """In a fork: it would hold the pipe open after its parent's end, and its signs would hide that its parent hangs."""
    global _pipe
    if _pipe >= 0:
        os.close(_pipe)
        _pipe = -1


def alive() -> None:
    """Give a sign of life, for a process without an event loop. Of the main thread only: another hides its hanging."""
    if _pipe < 0 or threading.current_thread() is not threading.main_thread():
        return
    try:
        os.write(_pipe, b".")
    except BlockingIOError:  # the watchdog is stopped, and has unread signs enough
        pass
    except BrokenPipeError:
        log.error("it was ended, so the process it watches ends too")
        _close_pipe()
        os.kill(os.getpid(), signal.SIGTERM)


def watch_loop(loop) -> None:
    """Give signs of life as long as an event loop runs, and kill the process when work on the loop hangs."""
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
    """Work on an event loop that must make a `step` now and then. Pauses do not belong into the block."""
    work = Work(name)
    before = _current.set(work)
    _under_way.append(work)
    try:
        yield
    finally:
        _under_way.remove(work)
        _current.reset(before)


def step() -> None:
    """A step of the work that is under way in this context, if there is any. Also of a thread by asyncio.to_thread."""
    if work := _current.get():
        work.silent = 0


# In the watchdog


def _watch(limit: float) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # systemd signals every process of a service
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
    if select.select([], [2], [], 0)[1]:  # nobody may be reading: then the process may hang for that very reason
        with suppress(OSError):
            os.write(2, f"watchdog: process {parent} gave no sign of life for {limit:g} s: it is killed\n".encode())
    with suppress(ProcessLookupError):
        os.kill(parent, signal.SIGUSR1)  # it writes where its threads are, if it can
        time.sleep(DUMPING)
        if os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)


if __name__ == "__main__":
    _watch(float(sys.argv[1]))
