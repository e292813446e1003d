"""What a decoder tries once it is taken over; and `python attacks.py ARGUMENTS`, which lets it.

ARGUMENTS are JSON: `where` is "decoder" or "outside", `layers` is "all", "seccomp" or "landlock", and the rest is what
ATTACKS need to know. The process stands for the converter: its environment holds a secret. It prints, for each attack,
"done" or the refusal. Outside is a fork of it without a sandbox, which shows that an attack is one.

A decoder runs them through the real fork server, whose program only puts `run` in the place of the pipeline.
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
PROCESS = os.getpid()  # of the fork server, where it imports this
# Readable memory of this process before anything is denied, where a decoder that is forked from it has it too.
MEMORY = [
    (int(start, 16), int(end, 16))
    for start, end, name in re.findall(r"^(\w+)-(\w+) r.*?(\S*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    if name not in ("[vvar]", "[vvar_vclock]", "[vsyscall]")
]
HARMFUL = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import attacks
attacks.serve()
"""
LAYERS = {  # what is left out
    "all": "",
    "seccomp": "attacks.sandbox.landlock = lambda: None",
    "landlock": "attacks.sandbox.seccomp_filter = lambda: RuntimeError('left out')",
}


def program(layers: str = "all") -> str:
    return HARMFUL.replace("attacks.serve()", f"{LAYERS[layers]}\nattacks.serve()")


def serve() -> None:
    pipeline.convert = run
    sandbox.serve()


def run(file, megapixels, side):
    """The image is a program. What it calls `result` is the detail of a fault, which the requester gets."""
    scope = dict(globals())
    exec(file.read(), scope)
    raise errors.Unusable("done", str(scope["result"]))


def call(name: str, *given) -> int:
    """A system call, without libc."""
    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
    result = LIBC.syscall(ctypes.c_long(number), *given)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def of_libc(name: str, *given) -> int:
    result = getattr(LIBC, name)(*given)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def read_memory(process: int) -> bytes:
    """process_vm_readv(2) of the first bytes of what is mapped at the same place here and there: a library."""
    vector = type("iovec", (ctypes.Structure,), {"_fields_": [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]})
    into = ctypes.create_string_buffer(16)
    here, there = vector(ctypes.addressof(into), 16), vector(ctypes.cast(LIBC.read, ctypes.c_void_p).value, 16)
    of_libc("process_vm_readv", process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    return into.raw


def connect(family: int, address) -> None:
    with socket.socket(family) as connection:
        connection.connect(address)


def find_secret(pattern: str) -> None:
    """A pattern, so that what looks for the secret does not hold it."""
    wanted = re.compile(pattern.encode())
    if not any(wanted.search(ctypes.string_at(start, end - start)) for start, end in MEMORY):
        raise LookupError("not in memory")


def run_thread() -> None:
    thread = threading.Thread(target=str)
    thread.start()
    thread.join()


def pass_away(child: int) -> None:
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


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
    "the converter's memory, by a call": lambda it: read_memory(it["converter"]),
    "the secret in its own memory": lambda it: find_secret(it["pattern"]),
    "ptrace of the converter": lambda it: of_libc("ptrace", 0x4206, it["converter"], None, None),  # SEIZE: no stop
    "ptrace of itself": lambda it: of_libc("ptrace", 0, 0, None, None),  # TRACEME
    "a file of the data": lambda it: Path(it["data"]).read_bytes(),
    "the data folder": lambda it: os.listdir(Path(it["data"]).parent),
    "the size of a file": lambda it: os.stat(it["data"]),
    "/etc/passwd": lambda it: Path("/etc/passwd").read_bytes(),
    "its own image, to write": lambda it: [os.open(f"/proc/self/fd/{n}", os.O_RDWR) for n in range(3, 20)],
    "a new file": lambda it: Path(it["folder"], f"new{os.getpid()}").write_bytes(b"left"),
    "a new file without a name": lambda it: os.open(it["folder"], os.O_TMPFILE | os.O_RDWR),
    "an old file": lambda it: os.open(it["data"], os.O_RDWR),
    "a new folder": lambda it: os.mkdir(Path(it["folder"], f"folder{os.getpid()}")),
    "another mode": lambda it: os.chmod(it["folder"], 0o777),
    "memfd": lambda it: os.memfd_create("left"),
    "exec": lambda it: os.execv("/bin/true", ["true"]),
    "a program": lambda it: subprocess.run(["/bin/true"], check=True),
    "fork": lambda it: pass_away(os.fork()),
    "clone": lambda it: pass_away(call("clone", ctypes.c_long(signal.SIGCHLD), None, None, None, None)),
    "a thread": lambda it: run_thread(),
    "a signal to the converter": lambda it: os.kill(it["converter"], 0),
    "a signal to the fork server": lambda it: os.kill(PROCESS, 0),
    "a signal by pidfd": lambda it: signal.pidfd_send_signal(os.pidfd_open(it["converter"]), 0),
    "code in memory": lambda it: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "priority": lambda it: os.nice(1),
}
# Without seccomp Landlock still denies these, by the version of its ABI from which it does.
BY_LANDLOCK = {
    "TCP": 4,
    "an abstract socket": 6,
    "a signal to the converter": 6,
    "a signal by pidfd": 6,
    "the secret in its own memory": 1,  # by the clean start
    **dict.fromkeys(
        (
            *("its environment", "the converter's environment", "the fork server's environment"),
            *("the converter's memory, by a file", "the converter's memory, by a call", "ptrace of the converter"),
            *("a file of the data", "the data folder", "/etc/passwd", "its own image, to write"),
            *("a new file", "a new file without a name", "an old file", "a new folder", "exec", "a program"),
        ),
        1,
    ),
}
# Of root and of others all work where nothing denies them, but these: `kernel.yama.ptrace_scope` may be set.
MAY_FAIL_OUTSIDE = {
    "ptrace of the converter",
    "the converter's memory, by a file",
    "the converter's memory, by a call",
    "its own image, to write",  # outside there is none
    "another mode",  # only an owner may
}


def attempt(name: str, it: dict) -> str:
    try:
        ATTACKS[name](it)
    except (OSError, LookupError, RuntimeError, subprocess.SubprocessError) as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    return "done"


def attempt_in_fork(name: str, it: dict) -> str:
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.set_inheritable(send, False)
        told = attempt(name, it)
        os.write(send, told.encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as answer:
        told = answer.read()
    _, status = os.waitpid(child, 0)
    return told or ("done" if status == 0 else f"ended with {status}")  # exec leaves nobody who tells


def in_decoder(code: str, chosen: settings.Settings) -> str:
    """What comes of a decoder that runs `code`: a fault's code, with what it calls `result` as detail."""
    with tempfile.NamedTemporaryFile() as image:
        image.write(code.encode())
        image.flush()
        try:
            sandbox.convert(Path(image.name), chosen)
        except errors.Unusable as fault:
            return str(fault)


def main() -> None:
    it = json.loads(sys.argv[1])
    it["converter"] = os.getpid()
    it["pattern"] = "".join(f"[{letter}]" for letter in os.environ["SECRET"])
    if it["where"] == "outside":
        print(json.dumps({name: attempt_in_fork(name, it) for name in ATTACKS}))
        return
    sandbox.PROGRAM = program(it["layers"])
    chosen = settings.load({"IMAGEGRAM_SANDBOX": "optional" if it["layers"] == "landlock" else "required"})
    names = dict(BY_LANDLOCK if it["layers"] == "landlock" else ATTACKS)
    for name in names:
        names[name] = in_decoder(f"result = attempt({name!r}, {it!r})", chosen).removeprefix("done: ")
    print(json.dumps(names))


if __name__ == "__main__":
    main()
