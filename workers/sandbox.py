"""Decodes each image in a process of its own that can do nothing but decode.

Decoders are large C programs that read what strangers send, so this file assumes that one is taken over.

    converter ──starts, clean environment──► fork server ──forks for each image──► decoder
        │ forks                                   ▲                                    │
    RQ's job ──image, pipe, link (SCM_RIGHTS)─────┘          answer, by the pipe ◄─────┘

A fork of RQ's job would keep in memory what the job knows: the keys of the store, the URL of Redis, the JWT secret.
Therefore the decoder is forked by a **fork server**: a process that is executed anew with an empty environment, has
imported what decoding needs, and never holds a secret or a connection. Executing an interpreter for each image would
be as clean, but importing alone takes 0.1 s of CPU, twice what a photograph of 12 megapixels takes.

The decoder has no descriptor but the image and the pipe, limits of CPU and memory, and where the server is root, the
user `nobody`. A seccomp filter allows the system calls of decoding and nothing else; Landlock denies files, TCP and
signals once more. Its answer is read as JSON, not unpickled, so that it cannot take over its reader.
"""

import ctypes
import gc
import json
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
import traceback
from base64 import b64decode, b64encode
from contextlib import suppress
from dataclasses import replace
from fcntl import F_DUPFD_CLOEXEC
from pathlib import Path

from storage.processes import die_with_parent
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
DETAIL = 1000  # characters of a fault's detail; a sentence is usual
NOBODY = 65534
PR_SET_NO_NEW_PRIVS = 38  # prctl(2): nothing it starts gets more rights than it has
ENVIRONMENT = {  # of the fork server, and all of it
    # A decoder's process is new and touches all its memory for the first time: 9 of 46 ms for 12 megapixels, and 1 in
    # huge pages. glibc asks for them from 2.35 on; for that, large blocks must not have mappings of their own.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.top_pad=67108864",
    # simplejpeg loads numpy, and numpy's OpenBLAS would start a thread for each core; decoders are forked.
    "OPENBLAS_NUM_THREADS": "1",
}
PROGRAM = "from workers import sandbox; sandbox.serve()"  # what the fork server runs
ROOT = Path(__file__).parent.parent  # where `workers` is imported from

# All that decoding in an interpreter that has imported everything calls. Opening and naming a file is not among them,
# nor fstat by a path (newfstatat), which can ask for any path. What only some libraries or machines call stands here
# too, where it can do no harm.
CALLS = (
    *("read", "pread64", "write", "lseek", "close", "fstat"),
    *("brk", "munmap", "mremap", "madvise", "futex", "clock_gettime"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "restart_syscall", "exit", "exit_group"),
)

_libc = ctypes.CDLL(None, use_errno=True)
_server: tuple[socket.socket, subprocess.Popen] | None = None


class NoSandbox(ChildProcessError):
    """This system lets no decoder run under a seccomp filter."""


def convert(path: Path, chosen: Settings) -> Picture:
    """As pipeline.convert, within limits and without rights.

    Raises Unusable, also with too_costly where the limits of CPU time or memory ended it: they count this
    image alone, so trying again does not mend it. Raises ChildProcessError where anything else did, as the
    kernel's own need for memory or a system call that the filter kills.
    """
    request = json.dumps([chosen.image_megapixels, chosen.image_side, CPU, chosen.sandbox == "required"])
    receive, send = os.pipe()
    link, theirs = socket.socketpair()
    with os.fdopen(receive, "rb") as answer, link:
        try:
            with path.open("rb") as image:
                given = [image.fileno(), send, theirs.fileno()]
                socket.send_fds(fork_server(), [request.encode()], given)
        finally:
            os.close(send)
            theirs.close()
        try:
            told = answer.read(ANSWER)
        finally:  # also where a timeout's exception ends the reading
            link.shutdown(socket.SHUT_WR)
            end = link.recv(16).decode()
    if not told:
        if end == str(-signal.SIGXCPU):
            raise _too_costly(chosen, "SIGXCPU")
        if end == str(-signal.SIGSYS):
            raise ChildProcessError("the decoder was killed by its seccomp filter: it made a call of another ABI")
        raise ChildProcessError(f"the decoder ended with {end}" if end else "the fork server of decoders ended")
    try:
        return _read(json.loads(told), chosen)
    except (ValueError, RecursionError):
        raise ChildProcessError("the decoder's answer makes no sense") from None


def _read(told, chosen: Settings) -> Picture:
    """The picture that a decoder's answer holds. It may have been taken over, so anything else is a ValueError."""
    match told:
        case {"picture": [str(jpeg), str(thumbhash), int(width), int(height), str(format)]}:
            picture = Picture(b64decode(jpeg), b64decode(thumbhash), width, height, format)
            if picture.jpeg.startswith(b"\xff\xd8\xff") and len(picture.thumbhash) == 24:
                return picture
        case {"unusable": [str(code), str(detail), str(cause)]}:
            raise Unusable(code, detail[:DETAIL], cause[:DETAIL])
        case {"too costly": str(cause)}:
            raise _too_costly(chosen, cause[:DETAIL])
        case {"no sandbox": str(text)}:
            raise NoSandbox(text)
        case {"error": str(text)}:
            raise ChildProcessError(text)
    raise ValueError("no answer")


def _too_costly(chosen: Settings, cause: str) -> Unusable:
    allowed = f"at most {CPU} seconds and {_memory(chosen.image_megapixels) // MIB} MiB are allowed"
    return unusable("too_costly", cause, allowed)


def _memory(megapixels: int) -> int:
    """Bytes that a decoder may take beside what it has when it begins."""
    return megapixels * 1_000_000 * PIXEL + SLACK


def fork_server() -> socket.socket:
    """The socket of the fork server. Starts one if this process has inherited none, or if it has ended."""
    global _server
    if _server and not _closed(_server[0]):
        return _server[0]
    stop()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is for the converter, which then ends it
        )
    _server = ours, process
    return ours


def stop() -> None:
    """End the fork server, if there is one."""
    global _server
    if _server:
        control, process = _server
        control.close()
        process.wait()
        _server = None


def _closed(control: socket.socket) -> bool:
    try:
        return not control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


ONE_PIXEL = b"BM:\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\1\0\0\0\1\0\0\0\1\0\x18\0".ljust(58, b"\0")  # a BMP


def check(chosen: Settings) -> None:
    """Decode one pixel as every image is decoded, before there is any.

    Raises SystemExit in one line where that fails. Where only seccomp is missing and the setting accepts that, and
    where Landlock is missing, it prints one line: without Landlock the filter still denies all that Landlock does.
    """
    image = os.memfd_create("pixel")
    os.write(image, ONE_PIXEL)
    try:
        convert(Path(f"/proc/self/fd/{image}"), replace(chosen, sandbox="required"))
    except NoSandbox as lack:
        if chosen.sandbox == "required":
            raise SystemExit(f"worker: {lack}. IMAGEGRAM_SANDBOX=optional accepts that") from None
        print(f"worker: {lack}, which IMAGEGRAM_SANDBOX=optional accepts", flush=True)
    except ChildProcessError as fault:
        raise SystemExit(f"worker: no image can be decoded: {fault}") from None
    finally:
        os.close(image)
        stop()
    if landlock_abi() < 1:
        print("worker: this kernel offers no Landlock; decoders run under seccomp alone", flush=True)


# In the fork server


def serve() -> None:
    """Fork a decoder for each request on stdin, one after the other, until whoever sends them has ended.

    That end of the socket is held by the process that started the server and by its forks, so it closes when all of
    them have ended, however they did. PR_SET_PDEATHSIG would end the server with the thread that started it.

    A request's link is shut by the requester when the answer has come or is no longer wanted, and closed if it ends.
    """
    control = socket.socket(fileno=0)
    try:
        rules: object = seccomp_filter()
    except (ImportError, RuntimeError, OSError) as error:  # pyseccomp raises RuntimeError without libseccomp2
        rules = error
    gc.freeze()  # collecting in a fork would copy the pages of everything that was imported
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, 4096, 3)
        if not request:
            return
        image, send, link = descriptors
        server = os.getpid()
        child = os.fork()
        if child == 0:
            try:
                _be_child(image, send, server, rules, *json.loads(request))
            finally:
                os._exit(1)  # nothing of the server's is run or flushed twice
        os.close(image)
        os.close(send)
        with socket.socket(fileno=link) as requester:
            with suppress(ConnectionError):
                requester.recv(1)
            ended = end(child)
            with suppress(ConnectionError):
                requester.send(str(ended).encode())


def end(child: int) -> int:
    """Kill a decoder if it lives. Returns how it ended, as os.waitstatus_to_exitcode."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def seccomp_filter():
    """What a decoder may call. All else fails with EPERM, and a call of another ABI (32 bits, x32) kills.

    EPERM, not death: libraries ask for much that they can do without, as for the kind of a terminal, and a new one
    may ask for more. A decoder that was taken over gains nothing from being told no.
    """
    import pyseccomp  # not on top: it needs libseccomp2, which a setting may do without

    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(1))  # EPERM
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    for call in CALLS:
        rules.add_rule(pyseccomp.ALLOW, call)
    for call in ("mmap", "mprotect"):  # memory that is written is never executed
        rules.add_rule(pyseccomp.ALLOW, call, pyseccomp.Arg(2, pyseccomp.MASKED_EQ, mmap.PROT_EXEC, 0))
    rules.add_rule(pyseccomp.ALLOW, "fcntl", pyseccomp.Arg(1, pyseccomp.EQ, F_DUPFD_CLOEXEC))  # Python's mmap
    return rules


# In the decoder


def _be_child(
    image: int, send: int, server: int, rules, megapixels: int, side: int, cpu: int, required: bool
) -> None:
    os.dup2(1, 0)  # /dev/null
    os.dup2(1, 2)
    _close_all_but(image, send)
    with open(image, "rb") as file, open(send, "wb") as answer:
        try:
            limit(_memory(megapixels), cpu, server)
            deny(rules, required)
            made = pipeline.convert(file, megapixels, side)
            jpeg, thumbhash = b64encode(made.jpeg).decode(), b64encode(made.thumbhash).decode()
            told = {"picture": [jpeg, thumbhash, made.width, made.height, made.format]}
        except NoSandbox as lack:
            told = {"no sandbox": str(lack)}
        except Unusable as fault:
            told = {"unusable": [fault.code, fault.detail, fault.cause]}
        except MemoryError as fault:
            told = {"too costly": f"MemoryError: {fault}"}
        except Exception:
            told = {"error": traceback.format_exc()}
        answer.write(json.dumps(told).encode())


def _close_all_but(*kept: int) -> None:
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor not in kept:
            with suppress(OSError):  # the one that listed them
                os.close(descriptor)


def limit(memory: int, cpu: int, parent: int) -> None:
    """Give this process `memory` bytes beside what it has, `cpu` seconds, and no new file or process, for good."""
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
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + cpu, int(used) + cpu + 1))  # SIGXCPU, then SIGKILL
    if os.geteuid() == 0:
        # Refused where a container took the right away: root then stays root, and may start processes.
        with suppress(OSError):
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    die_with_parent(signal.SIGKILL, parent)  # last: a change of user takes it back


def deny(rules, required: bool) -> None:
    """Take everything from this process but decoding, for good.

    Raises NoSandbox if it is required and seccomp is missing.
    """
    landlock()
    try:
        if isinstance(rules, Exception):
            raise rules
        rules.load()
    except (ImportError, RuntimeError, OSError) as error:
        if required:
            raise NoSandbox(f"decoders cannot run under seccomp here ({error})") from error


def landlock() -> None:
    """Deny files, TCP, and signals and abstract sockets of others, as far as the kernel's Landlock knows them.

    By hand, since denying all takes two calls: the bindings on PyPI are for rules, and new. A ruleset that names
    rights and has no rule denies them (landlock(7)); the numbers of the calls are the same on every machine.
    """
    abi = landlock_abi()
    if abi < 1:
        return
    files = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)  # rights of this ABI, one bit each
    handled = (ctypes.c_uint64 * 3)((1 << files) - 1, 0b11, 0b11)  # files; bind and connect; sockets and signals
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = _syscall(444, handled, ctypes.c_size_t(size), 0)  # landlock_create_ruleset
    if ruleset < 0 or _syscall(446, ruleset, 0) != 0:  # landlock_restrict_self
        raise OSError(ctypes.get_errno(), "Landlock could not be used")
    os.close(ruleset)


def landlock_abi() -> int:
    """The version of Landlock that the kernel offers; -1 for none."""
    return _syscall(444, None, ctypes.c_size_t(0), 1)


def _syscall(number: int, *given) -> int:
    return _libc.syscall(ctypes.c_long(number), *given)
