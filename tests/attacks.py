"""What an attacker tries who has taken over a decoder; and `python attacks.py ARGUMENTS`, which runs the attacks.

ARGUMENTS are a JSON object:

| key | value |
|---|---|
| `where` | "decoder": in the sandbox; "outside": in a plain fork of this process, where the attacks must succeed |
| `layers` | a key of LAYERS: which layers of the sandbox a decoder has |
| others | what ATTACKS need to know |

The process stands for the converter, so its environment holds a secret. It prints one JSON object: for each attack
"done" or the refusal.

A decoder runs the attacks through the real fork server. Only the program of that server differs: it replaces the
pipeline by `run`.
"""

import ctypes
import json
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pyseccomp

from storage import settings
from workers import errors, pipeline, sandbox

LIBC = ctypes.CDLL(None, use_errno=True)
PROCESS = os.getpid()  # of the fork server, where it imports this module
PR_SET_PTRACER = 0x59616D61  # prctl(2), for Yama
PTRACE_TRACEME, PTRACE_SEIZE = 0, 0x4206  # SEIZE does not stop the other process
# Readable memory of this process before anything is denied. A decoder that is forked from it has the same memory.
MEMORY = [
    (int(start, 16), int(end, 16))
    for start, end, name in re.findall(r"^(\w+)-(\w+) r.*?(\S*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    if name not in ("[vvar]", "[vvar_vclock]", "[vsyscall]")
]
FORK_SERVER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import attacks
attacks.serve()
"""
NO_LANDLOCK = "attacks.sandbox.landlock = lambda: None"
NO_SECCOMP = "attacks.sandbox.seccomp_filter = lambda: RuntimeError('left out')"
LAYERS = {  # what a decoder has, and the code that leaves out the rest. The limits are always there
    "all": "",
    "seccomp": NO_LANDLOCK,
    "landlock": NO_SECCOMP,
    "none": f"{NO_LANDLOCK}\n{NO_SECCOMP}",
}


def program(layers: str = "all") -> str:
    """The program of a fork server whose decoders run their image as Python, with these layers."""
    return FORK_SERVER.replace("attacks.serve()", f"{LAYERS[layers]}\nattacks.serve()")


def serve() -> None:
    pipeline.convert = run
    sandbox.serve()


def run(file, megapixels, side):
    """Runs the image as a program. The variable `result` of the program is the detail of the fault that is raised."""
    scope = dict(globals())
    exec(file.read(), scope)
    raise errors.Unusable("done", str(scope["result"]))


def system_call(name: str, *arguments) -> int:
    """A system call that libc has no function for, or whose function does something else."""
    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    result = LIBC.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def libc_call(name: str, *arguments) -> int:
    result = getattr(LIBC, name)(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def read_memory(process: int, address: int) -> bytes:
    """process_vm_readv(2) of 16 bytes of another process."""
    vector = type("iovec", (ctypes.Structure,), {"_fields_": [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]})
    buffer = ctypes.create_string_buffer(16)
    local = vector(ctypes.addressof(buffer), 16)
    remote = vector(address, 16)
    libc_call("process_vm_readv", process, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    return buffer.raw


def connect(family: int, address) -> None:
    with socket.socket(family) as connection:
        connection.connect(address)


def find_secret(pattern: str) -> None:
    """Searches this process' memory. It takes a pattern, so that the search itself does not hold the secret."""
    secret = re.compile(pattern.encode())
    if not any(secret.search(ctypes.string_at(start, end - start)) for start, end in MEMORY):
        raise LookupError("not in memory")


def run_thread() -> None:
    thread = threading.Thread(target=str)
    thread.start()
    thread.join()


def end_child(child: int) -> None:
    """Ends the child of a fork(2), in the child and in its parent."""
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def reopen_to_write(path: str) -> None:
    """Opens a file to write through a descriptor that is open to read, as the image of a decoder is."""
    for name in range(3, 20):
        if Path(f"/proc/self/fd/{name}").exists():
            os.open(f"/proc/self/fd/{name}", os.O_RDWR)
            return
    os.open(f"/proc/self/fd/{os.open(path, os.O_RDONLY)}", os.O_RDWR)


ATTACKS = {
    "TCP": lambda it: connect(socket.AF_INET, ("127.0.0.1", it["port"])),
    "Redis' socket": lambda it: connect(socket.AF_UNIX, it["redis"]),
    "an abstract socket": lambda it: connect(socket.AF_UNIX, "\0" + it["abstract"]),
    "UDP": lambda it: socket.socket(type=socket.SOCK_DGRAM).sendto(b"secret", ("127.0.0.1", it["port"])),
    "socketpair": lambda it: socket.socketpair(),
    "listen": lambda it: socket.create_server(("127.0.0.1", 0)),
    "its environment": lambda it: Path("/proc/self/environ").read_bytes(),
    "the converter's environment": lambda it: Path(f"/proc/{it['converter']}/environ").read_bytes(),
    "the fork server's environment": lambda it: Path(f"/proc/{PROCESS}/environ").read_bytes(),
    "the converter's memory, by a file": lambda it: os.open(f"/proc/{it['converter']}/mem", os.O_RDONLY),
    "the converter's memory, by a call": lambda it: read_memory(it["converter"], it["address"]),
    "the secret in its own memory": lambda it: find_secret(it["pattern"]),
    "ptrace of the converter": lambda it: libc_call("ptrace", PTRACE_SEIZE, it["converter"], None, None),
    "ptrace of itself": lambda it: libc_call("ptrace", PTRACE_TRACEME, 0, None, None),
    "the JWT secret's file": lambda it: Path(it["jwt_secret"]).read_bytes(),
    "a file of the data": lambda it: Path(it["data"]).read_bytes(),
    "the data folder": lambda it: os.listdir(Path(it["data"]).parent),
    "the size of a file": lambda it: os.stat(it["data"]),
    "/etc/passwd": lambda it: Path("/etc/passwd").read_bytes(),
    "its own image, to write": lambda it: reopen_to_write(it["data"]),
    "a new file": lambda it: Path(it["folder"], f"new{os.getpid()}").write_bytes(b"left"),
    "a new file without a name": lambda it: os.open(it["folder"], os.O_TMPFILE | os.O_RDWR),
    "an old file": lambda it: os.open(it["data"], os.O_RDWR),
    "a new folder": lambda it: os.mkdir(Path(it["folder"], f"folder{os.getpid()}")),
    "another mode": lambda it: os.chmod(it["own"], 0o777),
    "memfd": lambda it: os.memfd_create("left"),
    "exec": lambda it: os.execv("/bin/true", ["true"]),
    "a program": lambda it: subprocess.run(["/bin/true"], check=True),
    "fork": lambda it: end_child(os.fork()),
    "clone": lambda it: end_child(system_call("clone", ctypes.c_long(signal.SIGCHLD), None, None, None, None)),
    "a thread": lambda it: run_thread(),
    "a signal to the converter": lambda it: os.kill(it["converter"], 0),
    "a signal to the fork server": lambda it: os.kill(PROCESS, 0),
    "a signal by pidfd": lambda it: signal.pidfd_send_signal(os.pidfd_open(it["converter"]), 0),
    "code in memory": lambda it: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "priority": lambda it: os.nice(1),
}
# The clean start of the fork server denies this, and neither seccomp nor Landlock.
BY_CLEAN_START = {"the secret in its own memory"}
# The limits of a decoder deny these too: RLIMIT_FSIZE and RLIMIT_NPROC.
BY_LIMITS = {"a new file", "a program", "fork", "clone", "a thread"}
# What Landlock denies, by the lowest version of its ABI that does.
BY_LANDLOCK = {
    "TCP": 4,
    "listen": 4,
    "an abstract socket": 6,
    "a signal to the converter": 6,
    "a signal to the fork server": 6,
    "a signal by pidfd": 6,
    "its environment": 1,
    "the converter's environment": 1,
    "the fork server's environment": 1,
    "the converter's memory, by a file": 1,
    "the converter's memory, by a call": 1,
    "ptrace of the converter": 1,
    "the JWT secret's file": 1,
    "a file of the data": 1,
    "the data folder": 1,
    "/etc/passwd": 1,
    "its own image, to write": 1,
    "a new file": 1,
    "a new file without a name": 1,
    "an old file": 1,
    "a new folder": 1,
    "exec": 1,
    "a program": 1,
}
OTHER_PROCESS = {  # attacks that Yama may deny outside of a sandbox too, where `kernel.yama.ptrace_scope` is 2 or 3
    "ptrace of the converter",
    "the converter's memory, by a file",
    "the converter's memory, by a call",
}


def attempt(name: str, it: dict) -> str:
    """Runs an attack. Returns "done", or the refusal as `PermissionError: …`."""
    try:
        ATTACKS[name](it)
    except (OSError, LookupError, RuntimeError, subprocess.SubprocessError) as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    return "done"


def attempt_in_fork(name: str, it: dict) -> str:
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        os.set_inheritable(send, False)
        os.write(send, attempt(name, it).encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as answer:
        output = answer.read()
    _, status = os.waitpid(child, 0)
    return output or ("done" if status == 0 else f"ended with {status}")  # after exec nothing writes the output


def in_decoder(code: str, chosen: settings.Settings) -> str:
    """Returns what comes of a decoder that runs `code`: "done: " and its variable `result`, or another fault."""
    with tempfile.NamedTemporaryFile() as image:
        image.write(code.encode())
        image.flush()
        try:
            sandbox.convert(Path(image.name), chosen)
        except errors.Unusable as fault:
            return str(fault)
    raise AssertionError("the program returned a picture")


def main() -> None:
    it = json.loads(sys.argv[1])
    it["converter"] = os.getpid()
    it["address"] = ctypes.cast(LIBC.read, ctypes.c_void_p).value  # readable memory of the converter
    it["pattern"] = "".join(f"[{letter}]" for letter in os.environ["SECRET"])
    LIBC.prctl(PR_SET_PTRACER, ctypes.c_ulong(-1))  # any process: so that Yama does not hide what the sandbox denies
    if it["where"] == "outside":
        print(json.dumps({name: attempt_in_fork(name, it) for name in ATTACKS}))
        return
    sandbox.PROGRAM = program(it["layers"])
    without_seccomp = NO_SECCOMP in LAYERS[it["layers"]]
    chosen = settings.load({"IMAGEGRAM_SANDBOX": "optional" if without_seccomp else "required"})
    results = {}
    for name in ATTACKS:
        try:
            results[name] = in_decoder(f"result = attempt({name!r}, {it!r})", chosen).removeprefix("done: ")
        except ChildProcessError as fault:  # after a successful exec nothing writes the output
            results[name] = "done" if str(fault) == "the decoder ended with 0" else str(fault)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
