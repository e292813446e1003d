"""Decodes an image in a process of its own that has little to lose.

Decoders are large C programs that read what strangers send. The child has limits, no connection, no file but
the image and the pipe its answer leaves by, and where the parent is root, no more rights than `nobody`. Its
answer is read as JSON, not unpickled: a decoder that was taken over cannot so take over its parent.

Not a jail: it may read what anybody may read. Containers and seccomp profiles are the installation's choice.
"""

import ctypes
import json
import os
import resource
import signal
import traceback
from base64 import b64decode, b64encode
from contextlib import suppress
from pathlib import Path

from storage.settings import MIB, Settings
from workers import pipeline
from workers.errors import Unusable, unusable
from workers.pipeline import Picture

CPU = (
    50  # seconds; the slowest files of 100 megapixels took 30 where this was measured, photographs of them 3
)
PIXEL = (
    10  # bytes: a progressive CMYK JPEG is held as 8 of coefficients, and decoded to a quarter beside them
)
SLACK = 128 * MIB  # bytes: strips of the image, buffers of the decoders
FILES = 16  # open at once; the image and the pipe are two
ANSWER = 4 * MIB  # bytes of an answer that are read; 0.1 MiB is usual
NOBODY = 65534
PR_SET_PDEATHSIG = 1  # prctl(2): the child does not outlive its parent, however that ended
PR_SET_NO_NEW_PRIVS = 38  # prctl(2): nothing it starts gets more rights than it has


def convert(path: Path, chosen: Settings) -> Picture:
    """As pipeline.convert, within limits.

    Raises Unusable, also with too_costly where the limits of CPU time or memory ended it: they count this
    image alone, so trying again does not mend it. Raises ChildProcessError where anything else did, as the
    kernel's own need for memory.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _be_child(path, chosen, send)
        finally:
            os._exit(1)  # nothing of the parent's is run or flushed twice
    os.close(send)
    try:
        with os.fdopen(receive, "rb") as answer:
            told = answer.read(ANSWER)
    finally:
        os.kill(child, signal.SIGKILL)  # also where a timeout's exception ends the reading
        _, status = os.waitpid(child, 0)
    if not told:
        end = os.waitstatus_to_exitcode(status)
        if end == -signal.SIGXCPU:
            raise _too_costly(chosen, "SIGXCPU")
        raise ChildProcessError(f"the decoder ended with {end}")
    match json.loads(told):
        case {"picture": [jpeg, thumbhash, width, height, format]}:
            return Picture(b64decode(jpeg), b64decode(thumbhash), width, height, format)
        case {"unusable": [code, detail, cause]}:
            raise Unusable(code, detail, cause)
        case {"error": text}:
            raise ChildProcessError(text)


def _be_child(path: Path, chosen: Settings, send: int) -> None:
    with path.open("rb") as file:
        _close_all_but(file.fileno(), send)
        limit(_memory(chosen))
        try:
            made = pipeline.convert(file, chosen.image_megapixels, chosen.image_side)
            jpeg, thumbhash = b64encode(made.jpeg).decode(), b64encode(made.thumbhash).decode()
            told = {"picture": [jpeg, thumbhash, made.width, made.height, made.format]}
        except Unusable as fault:
            told = {"unusable": [fault.code, fault.detail, fault.cause]}
        except MemoryError as fault:
            costly = _too_costly(chosen, f"MemoryError: {fault}")
            told = {"unusable": [costly.code, costly.detail, costly.cause]}
        except Exception:
            told = {"error": traceback.format_exc()}
        with os.fdopen(send, "wb") as answer:
            answer.write(json.dumps(told).encode())


def _memory(chosen: Settings) -> int:
    """Bytes that a child may take beside what it has when it begins."""
    return chosen.image_megapixels * 1_000_000 * PIXEL + SLACK


def _too_costly(chosen: Settings, cause: str) -> Unusable:
    allowed = f"at most {CPU} seconds and {_memory(chosen) // MIB} MiB are allowed"
    return unusable("too_costly", cause, allowed)


def _close_all_but(*kept: int) -> None:
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor not in kept:
            with suppress(OSError):  # the one that listed them
                os.close(descriptor)


def limit(memory: int) -> None:
    """Give this process `memory` bytes beside what it has, CPU seconds, and no new file or process, for good."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for what, most in {
        resource.RLIMIT_AS: has + memory,
        resource.RLIMIT_FSIZE: 0,  # bytes of a file; pipes are none
        resource.RLIMIT_NOFILE: FILES,
        resource.RLIMIT_NPROC: 0,  # processes and threads more. Does not bind root
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(what, (most, most))
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + CPU, int(used) + CPU + 1))  # SIGXCPU, then SIGKILL
    if os.geteuid() == 0:
        # Refused where a container took the right away: root then stays root, and may start processes.
        with suppress(OSError):
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    process = ctypes.CDLL(None)
    process.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    process.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # last: a change of user takes it back
