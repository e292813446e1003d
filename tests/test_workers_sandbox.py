"""A decoder that was taken over can do nothing but answer; tests/attacks.py is what it tries."""

import errno
import json
import os
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import attacks
import psutil
import pytest
from conftest import ROOT, RedisServer, until
from drills.images import working
from making import jpeg

from storage import settings
from storage.settings import MIB
from workers import sandbox

CHOSEN = settings.load({})


@pytest.fixture
def in_decoder(monkeypatch):
    """Runs Python in a decoder, in the place of the pipeline."""
    monkeypatch.setattr(sandbox, "PROGRAM", attacks.program())
    sandbox.stop()
    yield lambda code: attacks.in_decoder(code, CHOSEN)
    sandbox.stop()


def test_the_decoder_may_not_take_more_memory_than_its_images_need(in_decoder):
    assert in_decoder(f"result = len(bytes({900 * MIB}))") == f"done: {900 * MIB}"
    assert in_decoder(f"result = len(bytes({1200 * MIB}))").startswith("too_costly")


def test_the_decoder_may_not_compute_for_ever(in_decoder, monkeypatch):
    monkeypatch.setattr(sandbox, "CPU", 1)
    assert in_decoder("while True: pass") == (
        "too_costly: decoding the image takes too much processor time or memory:"
        " at most 1 seconds and 1081 MiB are allowed"
    )


# Where the tests run as root, attacks run as one who is not, too: there the decoder has the user of its parents. This
# capability lets that user read the interpreter wherever root keeps it; a decoder has it too then, which helps it.
NOBODY = ["setpriv", f"--reuid={sandbox.NOBODY}", f"--regid={sandbox.NOBODY}", "--clear-groups"]
NOBODY += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
USERS = {"this user": []} | ({"nobody": NOBODY} if os.geteuid() == 0 else {})
each_user = pytest.mark.parametrize("user", USERS.values(), ids=USERS)


@pytest.fixture
def attacked():
    """Lets tests/attacks.py attack a site: a Redis, a port, an abstract socket, and data. All are open to every user,
    for what is tested is the sandbox and not the mode of files."""
    server = RedisServer("valkey")
    listening, abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    with tempfile.TemporaryDirectory(prefix="ig-") as folder, listening, abstract:
        abstract.bind("\0" + folder)
        abstract.listen()
        secret = Path(folder, "secret")
        secret.write_text("of somebody")
        for path in (server.folder.name, server.socket, folder, secret):
            os.chmod(path, 0o777)
        it = {"port": listening.getsockname()[1], "redis": server.socket, "abstract": folder}
        it |= {"data": str(secret), "folder": folder}

        def run(user: list[str], where: str, layers: str = "all") -> dict[str, str]:
            command = [*user, sys.executable, "tests/attacks.py", json.dumps(it | {"where": where, "layers": layers})]
            environment = {"SECRET": secrets.token_hex(16), "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
            ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr
            return json.loads(ran.stdout)

        yield run
    server.close()


@each_user
def test_a_decoder_that_is_taken_over_can_do_nothing(attacked, user):
    """Each attack succeeds outside of the sandbox, by the same user, and fails inside."""
    outside = attacked(user, "outside")
    assert [name for name, told in outside.items() if told != "done" and name not in attacks.MAY_FAIL_OUTSIDE] == []
    for layers in ("all", "seccomp"):
        inside = attacked(user, "decoder", layers)
        assert inside.keys() == outside.keys()
        assert [name for name, told in inside.items() if told == "done"] == []


@each_user
def test_landlock_alone_denies_files_tcp_and_signals(attacked, user):
    abi = sandbox.landlock_abi()
    inside = attacked(user, "decoder", "landlock")
    wrong = {name for name, told in inside.items() if (told != "done") != (abi >= attacks.BY_LANDLOCK[name])}
    assert inside.keys() == attacks.BY_LANDLOCK.keys() and not wrong


def test_a_decoder_may_call_nothing_but_what_is_listed(in_decoder):
    """Every number up to 600, new calls as old ones: io_uring, bpf, keyctl, mount, setns, …"""
    sweep = """
import errno
native = pyseccomp.Arch.NATIVE
# Uprobes' own calls pass every filter; the kernel kills by SIGILL who makes them by himself.
uprobes = {335, 336} if X86_64 else set()
allowed = uprobes | {pyseccomp.resolve_syscall(native, name) for name in (*sandbox.CALLS, "mmap", "mprotect", "fcntl")}
result = []
for number in range(600):
    if number not in allowed:
        ctypes.set_errno(0)
        if LIBC.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6) != -1 or ctypes.get_errno() != errno.EPERM:
            result.append(number)
"""
    assert in_decoder(f"X86_64 = {platform.machine() == 'x86_64'}\n{sweep}") == "done: []"
    for bounded in ("call('fcntl', 0, 8, 1)", "call('mprotect', 0, 0, 4)", "mmap.mmap(-1, 4096, prot=5)"):
        code = f"try:\n    {bounded}\n    result = 'allowed'\nexcept OSError as error:\n    result = error.errno"
        assert in_decoder(code) == f"done: {errno.EPERM}", bounded


def test_a_call_of_another_abi_kills_the_decoder_and_is_told_as_that(in_decoder):
    """Numbers of x32 would pass a filter that compares numbers alone. Other machines have no such calls."""
    call = "result = LIBC.syscall(ctypes.c_long(0x40000000 + 41), 1, 1, 0), ctypes.get_errno()"
    if platform.machine() == "x86_64":
        with pytest.raises(ChildProcessError, match="seccomp"):
            in_decoder(call)
    else:
        assert in_decoder(call) == f"done: {(-1, errno.EPERM)}"


def test_a_decoder_has_a_clean_environment_two_descriptors_and_no_rights(in_decoder):
    here, _ = socket.socketpair()
    here.set_inheritable(True)
    seen = []

    def look():
        server = sandbox._server[1].pid
        decoder = until(lambda: psutil.Process(server).children(), what="the decoder")[0]
        about = Path(f"/proc/{decoder.pid}")
        until(lambda: "Seccomp:\t2" in (about / "status").read_text(), what="its filter")
        links = {int(path.name): os.readlink(path) for path in (about / "fd").iterdir()}
        seen.append(((about / "environ").read_bytes(), links, (about / "status").read_text()))
        decoder.kill()

    assert in_decoder("result = 1") == "done: 1"  # the fork server has started: it runs `ldconfig` at first
    thread = threading.Thread(target=look)
    thread.start()
    with pytest.raises(ChildProcessError, match="ended with -9"):
        in_decoder("while True: pass")
    thread.join()
    environment, links, status = seen[0]
    # glibc ends each of its settings by a zero where it stood.
    given = ":".join(f"{name}={value}" for name, value in sandbox.ENVIRONMENT.items())
    assert environment.strip(b"\0").replace(b"\0", b":") == given.encode()
    kinds = sorted(re.sub(r"[\d\[\]]", "", link) for number, link in links.items() if number > 2)
    assert len(kinds) == 2 and kinds[1] == "pipe:" and kinds[0].startswith("/tmp/")
    assert {links[number] for number in (0, 1, 2)} == {"/dev/null"}
    told = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert told["NoNewPrivs"] == "1" and int(told["CapEff"], 16) == int(told["CapPrm"], 16) == 0
    assert set(told["Uid"].split()) == {str(os.geteuid() or sandbox.NOBODY)}
    assert os.geteuid() or not told["Groups"].strip()


def test_a_decoder_that_crashes_or_fails_is_told_from_a_bad_image(in_decoder):
    for code, told in (("ctypes.string_at(0)", "ended with -11"), ("os._exit(3)", "with 3"), ("1 / 0", "ZeroDivision")):
        with pytest.raises(ChildProcessError, match=told):
            in_decoder(code)


FLOOD = """
while True:
    for number in range(3, 20):
        try:
            os.write(number, bytes(65536))
        except OSError:
            pass
"""
FORGE = """
for number in range(3, 20):
    try:
        os.write(number, {!r})
    except OSError:
        pass
os._exit(0)
"""
FORGED = {
    "no JSON": b"\xff\xd8\xff",
    "nothing known": b"{}",
    "deep": b"[" * 100_000,
    "no JPEG": b'{"picture": ["", "", 1, 1, "PNG"]}',
    "numbers": b'{"picture": [1, 2, 3, 4, 5]}',
    "no text": b'{"unusable": [1, 2, 3]}',
}


@pytest.mark.parametrize("code", [FLOOD, *map(FORGE.format, FORGED.values())], ids=["endless", *FORGED])
def test_an_answer_that_is_none_is_an_error_and_no_picture(code, in_decoder):
    with pytest.raises(ChildProcessError, match="answer"):
        in_decoder(code)


def test_a_timeout_in_the_parent_leaves_no_decoder_behind(in_decoder):
    """As RQ's, which is an exception out of a signal handler."""

    def late(*given):
        raise TimeoutError

    assert in_decoder("result = 1") == "done: 1"
    server, before = psutil.Process(sandbox._server[1].pid), signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(TimeoutError):
            in_decoder("while True: pass")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert server.children() == [] and in_decoder("result = 2") == "done: 2"
    assert sandbox._server[1].pid == server.pid


def test_a_fork_server_that_dies_is_replaced(in_decoder):
    assert in_decoder("result = 1") == "done: 1"
    first = sandbox._server[1]
    decoders = []

    def kill():
        decoders.extend(until(lambda: psutil.Process(first.pid).children(), what="the decoder"))
        first.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(ChildProcessError, match="the fork server of decoders ended"):
        in_decoder("while True: pass")
    thread.join()
    until(lambda: not decoders[0].is_running(), what="the decoder's end")
    assert in_decoder("result = 2") == "done: 2"
    assert sandbox._server[1].pid != first.pid


def test_a_fork_server_ends_with_the_process_that_started_it_however_that_ends(tmp_path):
    program = """
import os, signal, sys
from pathlib import Path
from storage import settings
from workers import sandbox
sandbox.check(settings.load({}))
sandbox.fork_server()
print(sandbox._server[1].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    until(lambda: not psutil.pid_exists(int(ran.stdout)), what="the fork server's end")


# Starting


WITHOUT = """
import errno, runpy, sys
import pyseccomp
rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
for call in sys.argv.pop(1).split(","):
    if call == "seccomp":  # as a kernel without CONFIG_SECCOMP_FILTER
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "seccomp")
        rules.add_rule(pyseccomp.ERRNO(errno.EINVAL), "prctl", pyseccomp.Arg(0, pyseccomp.EQ, 22))
    else:
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), call)
if "convert" not in sys.argv:  # a converter inherits the filter
    rules.load()
sys.argv[0] = "workers"
runpy.run_module("workers", run_name="__main__", alter_sys=True)
"""


def start_worker(lacks: str, tmp_path, **more: str) -> subprocess.Popen:
    """A real worker on a kernel that lacks system calls: a filter that is there before it answers as such one does."""
    environment = os.environ | {"IMAGEGRAM_DATA": str(tmp_path)} | more
    command = [sys.executable, "-c", WITHOUT, lacks]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True, start_new_session=True)


def test_where_the_kernel_offers_no_seccomp_a_worker_says_so_in_one_line_and_ends(tmp_path):
    told, error = (worker := start_worker("seccomp", tmp_path)).communicate(timeout=30)
    assert worker.returncode == 1 and told == ""
    assert re.fullmatch(
        r"worker: decoders cannot run under seccomp here \(.*\)\. IMAGEGRAM_SANDBOX=optional accepts that\n", error
    )


def test_without_libseccomp_a_worker_says_so_in_one_line_and_ends(tmp_path):
    program = "import sys; sys.modules['pyseccomp'] = None; from workers import sandbox; sandbox.serve()"
    code = f"from storage import settings; from workers import sandbox; sandbox.PROGRAM = {program!r}; "
    code += "sandbox.check(settings.load({}))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stdout == "" and ran.stderr.count("\n") == 1
    assert "pyseccomp" in ran.stderr and "IMAGEGRAM_SANDBOX=optional" in ran.stderr


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("seccomp", r"worker: decoders cannot run under seccomp here \(.*\), which IMAGEGRAM_SANDBOX=optional accepts"),
        ("landlock_create_ruleset", "worker: this kernel offers no Landlock; decoders run under seccomp alone"),
    ],
)
def test_what_is_missing_and_accepted_is_said_in_one_line_and_images_are_made(lacks, said):
    with working() as site:
        (post,) = site.publish([jpeg()])
        optional = {"IMAGEGRAM_SANDBOX": "optional"} if lacks == "seccomp" else {}
        worker = start_worker(lacks, site.folder, **site.environment | optional)
        try:
            until(lambda: site.statuses([post])["ready"], what="the image")
        finally:
            worker.terminate()
            told, logged = worker.communicate(timeout=30)
        assert re.fullmatch(said + r"\n", told) and "worker: converters: 1\n" in logged
