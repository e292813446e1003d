"""Decodes each image in a process of its own that can do nothing but decode.

Decoders are large C programs that read what strangers send. So this file assumes that an attacker has taken one over.

    converter (RQ worker) ──executes, with ENVIRONMENT only──► fork server ──forks for each image──► decoder
        │ forks                                                    ▲                                    │
        ▼                                                          │                                    │
       job ────image, pipe, link (three descriptors, SCM_RIGHTS)───┘                                    │
        ▲                                                                                               │
        └────────────────────────── the answer, one JSON object, by the pipe ───────────────────────────┘

| process | holds | why it is a process |
|---|---|---|
| job | keys of the store, URL of Redis, JWT secret | it is RQ's fork for one attempt |
| fork server | no secret and no connection | a decoder forked from the job would have the job's secrets in its memory |
| decoder | the image and the pipe | each image has its own, so an attack ends with its image |

The fork server is executed as a new program without the converter's environment, and has imported what decoding needs.
A new interpreter for each image would isolate as well. But importing alone takes 0.1 s of CPU, twice as much as a
photograph of 12 megapixels.

What a decoder may do:

| resource | allowed | by |
|---|---|---|
| system calls | CALLS; `mmap` and `mprotect` without PROT_EXEC; `fcntl` with F_DUPFD_CLOEXEC | seccomp |
| files | none. It may read the image, which is open | seccomp, Landlock |
| network, other sockets | none | seccomp; TCP and abstract sockets also Landlock |
| signals, ptrace, memory of other processes | none | seccomp, Landlock |
| new processes and threads, exec | none | seccomp; limits (not for root); exec also Landlock |
| descriptors | the image, the pipe, and /dev/null as 0, 1 and 2 | all others are closed; RLIMIT_NOFILE |
| memory | what it has at the start, BYTES_PER_PIXEL for each permitted pixel, and EXTRA_BYTES | RLIMIT_AS |
| CPU time | CPU_SECONDS | RLIMIT_CPU |
| bytes of files that it writes, core dumps | none | RLIMIT_FSIZE, RLIMIT_CORE |
| user | `nobody` where the fork server is root, else the same user; no new rights | setuid, PR_SET_NO_NEW_PRIVS |
| lifetime | at most that of the fork server and of the request | PR_SET_PDEATHSIG, `link` |

The attacks on this are in tests/attacks.py. The answer of a decoder is read as JSON, never unpickled, so that a decoder
cannot take over its reader.
"""

import ctypes
import gc
import json
import logging
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
from workers.scans import MAX_LOOKS

# Seconds of CPU. The slowest files of 100 megapixels took 30 where this was measured, photographs of that size 3.
CPU_SECONDS = 50
# Bytes a pixel. A progressive CMYK JPEG takes 8 for its coefficients, and a quarter of its pixels is decoded as well.
BYTES_PER_PIXEL = 10
EXTRA_BYTES = 128 * MIB  # bytes: strips of the image, buffers of the decoders
MAX_DESCRIPTORS = 16  # open descriptors; the image and the pipe are two of them
MAX_ANSWER_BYTES = 4 * MIB  # bytes of an answer that are read; usual are 0.1 MiB
MAX_DETAIL = 1000  # characters of a fault's detail; usual is one sentence
NOBODY = 65534  # user and group
PR_SET_NO_NEW_PRIVS = 38  # prctl(2): what the process executes gets no more rights than the process has
ENVIRONMENT = {  # all environment variables of the fork server
    # A decoder is a new process and touches all of its memory for the first time. For 12 megapixels that takes 9 of
    # 46 ms, and 1 ms with huge pages. glibc asks for huge pages from 2.35 on. For that, large blocks must not get
    # mappings of their own.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.top_pad=67108864",
    # simplejpeg loads numpy, whose OpenBLAS would start a thread for each core. A fork of a process with threads can
    # lock up.
    "OPENBLAS_NUM_THREADS": "1",
}
PROGRAM = "from workers import sandbox; sandbox.serve()"  # what the fork server runs
ROOT = Path(__file__).parent.parent  # where `workers` is imported from

# The system calls of decoding, in an interpreter that has imported everything. No call here opens or names a file, not
# even newfstatat, which takes a path. Harmless calls that only some libraries or machines make are here too.
CALLS = (
    *("read", "pread64", "write", "lseek", "close", "fstat"),
    *("brk", "munmap", "mremap", "madvise", "futex", "clock_gettime"),
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "restart_syscall", "exit", "exit_group"),
)

log = logging.getLogger("imagegram.sandbox")

_libc = ctypes.CDLL(None, use_errno=True)
_server: tuple[socket.socket, subprocess.Popen] | None = None


class NoSandbox(ChildProcessError):
    """On this system a decoder cannot run under a seccomp filter."""


# In the job


def convert(path: Path, chosen: Settings) -> Picture:
    """Returns the picture of the image at `path`, as pipeline.convert does, from a decoder in the sandbox.

    Raises Unusable as pipeline.convert does, and with too_costly where the decoder reached its limit of CPU time or
    memory. The limits count this image only, so another attempt would end the same. Raises ChildProcessError where the
    decoder ended for another reason: the kernel was short of memory, or the filter killed it. Raises NoSandbox, and
    OSError where `path` cannot be opened.
    """
    request = json.dumps([chosen.image_megapixels, chosen.image_side, CPU_SECONDS, chosen.sandbox == "required"])
    receive, send = os.pipe()
    link, server_link = socket.socketpair()
    with os.fdopen(receive, "rb") as answer, link:
        try:
            with path.open("rb") as image:
                descriptors = [image.fileno(), send, server_link.fileno()]
                socket.send_fds(fork_server(), [request.encode()], descriptors)
        finally:
            os.close(send)
            server_link.close()
        try:
            output = answer.read(MAX_ANSWER_BYTES)
        finally:  # also where the exception of a timeout ends the reading
            link.shutdown(socket.SHUT_WR)
            status = link.recv(16).decode()
    if not output:
        if status == str(-signal.SIGXCPU):
            raise _too_costly(chosen, "SIGXCPU")
        if status == str(-signal.SIGSYS):
            raise ChildProcessError("the decoder was killed by its seccomp filter: it made a call of another ABI")
        raise ChildProcessError(f"the decoder ended with {status}" if status else "the fork server of decoders ended")
    try:
        return _parse_answer(json.loads(output), chosen)
    except (ValueError, RecursionError):
        raise ChildProcessError("the decoder's answer is invalid") from None


def _parse_answer(answer: object, chosen: Settings) -> Picture:
    """Returns the picture in a decoder's answer.

    An attacker may have written the answer. So only these shapes are accepted, and the texts are cut to MAX_DETAIL. An
    attacker can still choose the picture, or the text that the author of this post reads.

    | answer | raises |
    |---|---|
    | `{"picture": [jpeg, scans, thumbhash, width, height, format]}`, JPEG and thumbhash in Base64 | |
    | `{"unusable": [code, detail, cause]}` | Unusable |
    | `{"too costly": cause}` | Unusable with too_costly |
    | `{"no sandbox": text}` | NoSandbox |
    | `{"error": traceback}` | ChildProcessError |
    | anything else | ValueError |
    """
    match answer:
        case {"picture": [str(jpeg), [*scans], str(thumbhash), int(width), int(height), str(original_format)]}:
            picture = Picture(b64decode(jpeg), tuple(scans), b64decode(thumbhash), width, height, original_format)
            looks = 0 < len(scans) <= MAX_LOOKS and all(type(end) is int and end > 0 for end in scans)
            looks = looks and scans == sorted(set(scans)) and scans[-1] == len(picture.jpeg)
            if looks and picture.jpeg.startswith(b"\xff\xd8\xff") and len(picture.thumbhash) == 24:
                return picture
        case {"unusable": [str(code), str(detail), str(cause)]}:
            raise Unusable(code, detail[:MAX_DETAIL], cause[:MAX_DETAIL])
        case {"too costly": str(cause)}:
            raise _too_costly(chosen, cause[:MAX_DETAIL])
        case {"no sandbox": str(text)}:
            raise NoSandbox(text)
        case {"error": str(text)}:
            raise ChildProcessError(text)
    raise ValueError("not an answer of a decoder")


def _too_costly(chosen: Settings, cause: str) -> Unusable:
    allowed = f"at most {CPU_SECONDS} seconds and {_memory(chosen.image_megapixels) // MIB} MiB are allowed"
    return unusable("too_costly", cause, allowed)


def _memory(megapixels: int) -> int:
    """Returns how many bytes a decoder may allocate in addition to those it has at its start."""
    return megapixels * 1_000_000 * BYTES_PER_PIXEL + EXTRA_BYTES


# In the converter, in its jobs, and in the worker at its start


def fork_server() -> socket.socket:
    """Returns the socket to the fork server. Starts a server where this process has inherited none, or it has ended."""
    global _server
    if _server and not _is_closed(_server[0]):
        return _server[0]
    stop()
    control, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with server_end:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=server_end,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal must reach the converter only, which then ends the server
        )
    _server = control, process
    return control


def stop() -> None:
    """Ends the fork server, if there is one."""
    global _server
    if _server:
        control, process = _server
        control.close()
        process.wait()
        _server = None


def _is_closed(control: socket.socket) -> bool:
    """Whether the other end of the socket is closed."""
    try:
        return not control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


ONE_PIXEL_BMP = b"BM:\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\1\0\0\0\1\0\0\0\1\0\x18\0".ljust(58, b"\0")


def check(chosen: Settings) -> None:
    """Decodes an image of one pixel at the worker's start, in the same way as every image.

    Raises SystemExit with one line where the sandbox is missing and required, or where the decoder dies. Logs a warning
    of one line where seccomp is missing and IMAGEGRAM_SANDBOX accepts that, and where Landlock is missing: the filter
    alone still denies all that Landlock does.
    """
    image = os.memfd_create("pixel")
    os.write(image, ONE_PIXEL_BMP)
    try:
        convert(Path(f"/proc/self/fd/{image}"), replace(chosen, sandbox="required"))
    except NoSandbox as missing:
        if chosen.sandbox == "required":
            raise SystemExit(f"worker: {missing}. IMAGEGRAM_SANDBOX=optional accepts that") from None
        log.warning("%s, which IMAGEGRAM_SANDBOX=optional accepts", missing)
    except ChildProcessError as fault:
        raise SystemExit(f"worker: no image can be decoded: {fault}") from None
    finally:
        os.close(image)
        stop()
    if landlock_abi() < 1:
        log.warning("this kernel offers no Landlock; decoders run under seccomp alone")


# In the fork server


def serve() -> None:
    """Forks a decoder for each request on stdin, one after the other, until all requesters have ended.

    The other end of that socket is open in the process that started the server and in its forks. So it closes when all
    of them have ended, in whatever way. PR_SET_PDEATHSIG is not used: it would end the server with the thread that
    started it.

    The requester shuts down its end of `link` when it has the answer or no longer needs it. If the requester dies, the
    kernel closes that end. In both cases this server ends the decoder, and then sends the decoder's exit status.
    """
    control = socket.socket(fileno=0)
    try:
        rules: object = seccomp_filter()
    except (ImportError, RuntimeError, OSError) as error:  # pyseccomp raises RuntimeError without libseccomp2
        rules = error
    gc.freeze()  # garbage collection in a fork would copy the memory pages of everything that was imported
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, 4096, 3)
        if not request:
            return
        image, send, link = descriptors
        server = os.getpid()
        child = os.fork()
        if child == 0:
            try:
                _run_decoder(image, send, server, rules, *json.loads(request))
            finally:
                os._exit(1)  # runs no exit handler and flushes no buffer of the server a second time
        os.close(image)
        os.close(send)
        with socket.socket(fileno=link) as requester:
            with suppress(ConnectionError):
                requester.recv(1)
            status = end(child)
            with suppress(ConnectionError):
                requester.send(str(status).encode())


def end(child: int) -> int:
    """Kills a decoder if it is still running. Returns its exit status, or the negative number of the signal."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def seccomp_filter():
    """Returns the pyseccomp.SyscallFilter of decoders.

    A call that is not allowed fails with EPERM. A call of another ABI (32 bits, x32) kills the process, because its
    numbers mean other calls. EPERM instead of death, because libraries try many calls that they can do without, as for
    the kind of a terminal, and a new version may try more. An attacker gains nothing from the error.

    Raises ImportError, RuntimeError or OSError where libseccomp2 is missing.
    """
    import pyseccomp  # not at the top of the file: libseccomp2 may be missing where a setting accepts that

    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(1))  # EPERM
    rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
    for call in CALLS:
        rules.add_rule(pyseccomp.ALLOW, call)
    for call in ("mmap", "mprotect"):  # no memory becomes executable, so no code that the decoder wrote
        rules.add_rule(pyseccomp.ALLOW, call, pyseccomp.Arg(2, pyseccomp.MASKED_EQ, mmap.PROT_EXEC, 0))
    rules.add_rule(pyseccomp.ALLOW, "fcntl", pyseccomp.Arg(1, pyseccomp.EQ, F_DUPFD_CLOEXEC))  # of Python's mmap
    return rules


# In the decoder


def _run_decoder(
    image: int, send: int, server: int, rules, megapixels: int, side: int, cpu: int, required: bool
) -> None:
    """Gives up all rights, decodes the image and writes the answer. See _parse_answer for its format."""
    os.dup2(1, 0)  # 1 is /dev/null
    os.dup2(1, 2)
    _close_all_but(image, send)
    with open(image, "rb") as file, open(send, "wb") as answer:
        try:
            limit(_memory(megapixels), cpu, server)
            deny(rules, required)
            picture = pipeline.convert(file, megapixels, side)
            jpeg, thumbhash = b64encode(picture.jpeg).decode(), b64encode(picture.thumbhash).decode()
            size = picture.width, picture.height
            output: dict[str, object] = {"picture": [jpeg, picture.scans, thumbhash, *size, picture.format]}
        except NoSandbox as missing:
            output = {"no sandbox": str(missing)}
        except Unusable as fault:
            output = {"unusable": [fault.code, fault.detail, fault.cause]}
        except MemoryError as fault:
            output = {"too costly": f"MemoryError: {fault}"}
        except Exception:
            output = {"error": traceback.format_exc()}
        answer.write(json.dumps(output).encode())


def _close_all_but(*needed: int) -> None:
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > 2 and descriptor not in needed:
            with suppress(OSError):  # the descriptor that listdir() had open
                os.close(descriptor)


def limit(memory: int, cpu: int, parent: int) -> None:
    """Limits this process for the rest of its life, and makes it die with the process `parent`.

    `memory`: bytes in addition to those it has. `cpu`: seconds in addition to those it has used. It can write no byte
    of a file and start no process or thread. If it is root, it becomes `nobody`.
    """
    current = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for limited, most in {
        resource.RLIMIT_AS: current + memory,
        resource.RLIMIT_FSIZE: 0,  # bytes of a file; pipes are not limited
        resource.RLIMIT_NOFILE: MAX_DESCRIPTORS,
        resource.RLIMIT_NPROC: 0,  # more processes and threads. The kernel does not limit root
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(limited, (most, most))
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + cpu, int(used) + cpu + 1))  # SIGXCPU, then SIGKILL
    if os.geteuid() == 0:
        # Refused where the container took this right from root. Then the decoder stays root, and RLIMIT_NPROC does not
        # limit it.
        with suppress(OSError):
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    die_with_parent(signal.SIGKILL, parent)  # last, because the kernel clears it when the user changes


def deny(rules, required: bool) -> None:
    """Denies this process everything but decoding for the rest of its life: Landlock first, then seccomp.

    `rules`: what seccomp_filter() returned, or the exception it raised. Raises NoSandbox where seccomp is missing and
    `required`.
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
    """Denies files, TCP, and signals and abstract sockets of other processes, as far as the kernel's Landlock can.

    | ABI | Linux | denies |
    |---|---|---|
    | 1, 2, 3 | 5.13, 5.19, 6.2 | files: 13, 14, 15 rights |
    | 4 | 6.7 | TCP: bind and connect |
    | 5 | 6.10 | ioctl on devices: a 16th right |
    | 6 | 6.12 | abstract sockets and signals |

    A ruleset that handles rights and has no rule denies them all (landlock(7)). That takes only two system calls, whose
    numbers are the same on every machine. So this uses no binding from PyPI: they are made for rules, and new.

    Raises OSError where the kernel offers Landlock and refuses it.
    """
    abi = landlock_abi()
    if abi < 1:
        return
    file_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)  # one bit each
    # struct landlock_ruleset_attr: rights of files; of TCP (bind, connect); scopes (abstract sockets, signals).
    handled = (ctypes.c_uint64 * 3)((1 << file_rights) - 1, 0b11, 0b11)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = _syscall(444, handled, ctypes.c_size_t(size), 0)  # landlock_create_ruleset
    if ruleset < 0 or _syscall(446, ruleset, 0) != 0:  # landlock_restrict_self
        raise OSError(ctypes.get_errno(), "Landlock could not be used")
    os.close(ruleset)


def landlock_abi() -> int:
    """Returns the ABI version of Landlock that the kernel offers, or -1."""
    return _syscall(444, None, ctypes.c_size_t(0), 1)


def _syscall(number: int, *arguments) -> int:
    return _libc.syscall(ctypes.c_long(number), *arguments)
