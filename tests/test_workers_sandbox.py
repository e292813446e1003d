"""A decoder that an attacker has taken over can do nothing but answer. The attacks are in tests/attacks.py."""

import base64
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
    """Runs Python instead of the pipeline, in a decoder with all layers of the sandbox."""
    monkeypatch.setattr(sandbox, "PROGRAM", attacks.program())
    sandbox.stop()
    yield lambda code: attacks.in_decoder(code, CHOSEN)
    sandbox.stop()


@pytest.fixture
def in_open_decoder(monkeypatch):
    """Runs Python instead of the pipeline, in a decoder without seccomp and Landlock."""
    monkeypatch.setattr(sandbox, "PROGRAM", attacks.program("none"))
    sandbox.stop()
    yield lambda code: attacks.in_decoder(code, settings.load({"IMAGEGRAM_SANDBOX": "optional"}))
    sandbox.stop()


def test_a_decoder_can_allocate_what_its_images_need_and_no_more(in_decoder):
    assert in_decoder(f"result = len(bytes({900 * MIB}))") == f"done: {900 * MIB}"
    assert in_decoder(f"result = len(bytes({1200 * MIB}))").startswith("too_costly")


def test_a_decoder_that_computes_without_end_is_ended(in_decoder, monkeypatch):
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    assert in_decoder("while True: pass") == (
        "too_costly: decoding the image takes too much processor time or memory:"
        " at most 1 seconds and 1081 MiB are allowed"
    )


# Where the tests run as root, decoders become `nobody`. Then the attacks run a second time as `nobody`, so that decoder
# and converter have the same user. The capability lets `nobody` read the interpreter wherever root stores it. A
# decoder has the capability too, which only makes the attacks stronger.
NOBODY = [
    "setpriv",
    f"--reuid={sandbox.NOBODY}",
    f"--regid={sandbox.NOBODY}",
    "--clear-groups",
    "--inh-caps=+dac_override",
    "--ambient-caps=+dac_override",
]
USERS = {"this user": []} | ({"nobody": NOBODY} if os.geteuid() == 0 else {})
SAME_USER = [*USERS.values()][-1]  # decoder and converter have the same user
each_user = pytest.mark.parametrize("user", USERS.values(), ids=USERS)


@pytest.fixture
def attacked():
    """Runs tests/attacks.py against a site: a Redis, a port, an abstract socket and files.

    All of them are open to every user, because these tests are about the sandbox and not about the mode of files.
    """
    server = RedisServer("valkey")
    listening, abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    with tempfile.TemporaryDirectory(prefix="ig-") as folder, listening, abstract:
        abstract.bind("\0" + folder)
        abstract.listen()
        data, jwt_secret, own = Path(folder, "data"), Path(folder, "jwt_secret"), Path(folder, "own")
        for path in (data, jwt_secret, own):
            path.write_text("of somebody")
        for path in (server.folder.name, server.socket, folder, data, jwt_secret, own):
            os.chmod(path, 0o777)
        if os.geteuid() == 0:
            os.chown(own, sandbox.NOBODY, sandbox.NOBODY)  # decoders are `nobody` then
        it = {
            "port": listening.getsockname()[1],
            "redis": server.socket,
            "abstract": folder,
            "data": str(data),
            "jwt_secret": str(jwt_secret),
            "own": str(own),
            "folder": folder,
        }

        def run(user: list[str], where: str, layers: str = "all") -> dict[str, str]:
            command = [*user, sys.executable, "tests/attacks.py", json.dumps(it | {"where": where, "layers": layers})]
            environment = {"SECRET": secrets.token_hex(16), "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
            ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr
            return json.loads(ran.stdout)

        yield run
    server.close()


def denied_by_yama() -> set[str]:
    """Attacks on another process that this machine denies outside of the sandbox too."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return attacks.OTHER_PROCESS if scope.exists() and int(scope.read_text()) >= 2 else set()


def denied(results: dict[str, str]) -> set[str]:
    assert results.keys() == attacks.ATTACKS.keys()
    return {name for name, result in results.items() if result != "done"} - denied_by_yama()


@each_user
def test_every_attack_succeeds_outside_of_the_sandbox(attacked, user):
    """So the tests below can fail."""
    assert denied(attacked(user, "outside")) == set()


@each_user
@pytest.mark.parametrize("layers", ["all", "seccomp"])
def test_every_attack_fails_in_a_decoder(attacked, user, layers):
    """Each fails with EPERM, not because something is missing that the attack needs."""
    results = attacked(user, "decoder", layers)
    assert results.keys() == attacks.ATTACKS.keys()
    refusals = dict.fromkeys(results, "PermissionError: [Errno 1]")
    refusals |= {
        "the secret in its own memory": "LookupError: not in memory",
        "a thread": "RuntimeError: can't start new thread",
    }
    assert {name: result for name, result in results.items() if not result.startswith(refusals[name])} == {}


def test_without_seccomp_and_landlock_a_decoder_is_denied_only_what_its_limits_deny(attacked):
    results = attacked(SAME_USER, "decoder", "none")
    assert denied(results) == attacks.BY_LIMITS | attacks.BY_CLEAN_START


def test_landlock_alone_denies_files_tcp_and_signals(attacked):
    abi = sandbox.landlock_abi()
    by_landlock = {name for name, version in attacks.BY_LANDLOCK.items() if abi >= version}
    results = attacked(SAME_USER, "decoder", "landlock")
    assert denied(results) == (by_landlock | attacks.BY_LIMITS | attacks.BY_CLEAN_START) - denied_by_yama()


def test_a_decoder_may_call_nothing_but_what_is_listed(in_decoder):
    """Tries every number up to 600, so also calls that nobody thought of: io_uring, bpf, keyctl, mount, setns, …"""
    sweep = """
import base64
import errno
native = pyseccomp.Arch.NATIVE
# The calls of uprobes pass every filter. The kernel kills a process with SIGILL that makes them itself.
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


DENIED_CALLS = {
    "fcntl with F_SETOWN": "system_call('fcntl', 0, 8, 1)",
    "mprotect with PROT_EXEC": "system_call('mprotect', 0, 0, 4)",
    "mmap with PROT_EXEC": "mmap.mmap(-1, 4096, prot=5)",
    "getpid": "system_call('getpid')",
}


@pytest.mark.parametrize("call", DENIED_CALLS.values(), ids=DENIED_CALLS)
def test_a_call_that_decoding_does_not_make_fails(call, in_decoder):
    code = f"try:\n    {call}\n    result = 'allowed'\nexcept OSError as error:\n    result = error.errno"
    assert in_decoder(code) == f"done: {errno.EPERM}"


@pytest.mark.parametrize("call", DENIED_CALLS.values(), ids=DENIED_CALLS)
def test_the_same_call_succeeds_without_seccomp(call, in_open_decoder):
    assert in_open_decoder(f"{call}\nresult = 'allowed'") == "done: allowed"


def test_a_call_of_another_abi_kills_the_decoder_and_the_error_says_so(in_decoder):
    """Numbers of x32 would pass a filter that compares only numbers. Other machines have no such calls."""
    call = "result = LIBC.syscall(ctypes.c_long(0x40000000 + 41), 1, 1, 0), ctypes.get_errno()"
    if platform.machine() == "x86_64":
        with pytest.raises(ChildProcessError, match="seccomp"):
            in_decoder(call)
    else:
        assert in_decoder(call) == f"done: {(-1, errno.EPERM)}"


def test_a_decoder_has_a_clean_environment_two_descriptors_and_no_rights(in_decoder):
    inheritable, _ = socket.socketpair()
    inheritable.set_inheritable(True)
    seen = []

    def inspect():
        server = sandbox._server[1].pid
        decoder = until(lambda: psutil.Process(server).children(), what="the decoder")[0]
        process = Path(f"/proc/{decoder.pid}")
        until(lambda: "Seccomp:\t2" in (process / "status").read_text(), what="its filter")
        links = {int(path.name): os.readlink(path) for path in (process / "fd").iterdir()}
        seen.append(((process / "environ").read_bytes(), links, (process / "status").read_text()))
        decoder.kill()

    assert in_decoder("result = 1") == "done: 1"  # the fork server has started; at first it has `ldconfig` as a child
    thread = threading.Thread(target=inspect)
    thread.start()
    with pytest.raises(ChildProcessError, match="ended with -9"):
        in_decoder("while True: pass")
    thread.join()
    environment, links, status = seen[0]
    # glibc overwrites the colon after each of its settings with a zero byte.
    expected = ":".join(f"{name}={value}" for name, value in sandbox.ENVIRONMENT.items())
    assert environment.strip(b"\0").replace(b"\0", b":") == expected.encode()
    kinds = sorted(re.sub(r"[\d\[\]]", "", link) for number, link in links.items() if number > 2)
    assert len(kinds) == 2 and kinds[1] == "pipe:" and kinds[0].startswith("/tmp/")
    assert {links[number] for number in (0, 1, 2)} == {"/dev/null"}
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["NoNewPrivs"] == "1" and int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert set(fields["Uid"].split()) == {str(os.geteuid() or sandbox.NOBODY)}
    assert os.geteuid() or not fields["Groups"].strip()


@pytest.mark.parametrize(
    ("code", "error"),
    [("ctypes.string_at(0)", "ended with -11"), ("os._exit(3)", "ended with 3"), ("1 / 0", "ZeroDivisionError")],
)
def test_a_decoder_that_crashes_or_fails_is_an_error_and_not_a_bad_image(in_decoder, code, error):
    with pytest.raises(ChildProcessError, match=error):
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
JPEG, HASH = base64.b64encode(b"\xff\xd8\xff\0\0\0\0\0\0").decode(), base64.b64encode(bytes(24)).decode()


def picture(jpeg: str, thumbhash: str, scans: object) -> bytes:
    return json.dumps({"picture": [jpeg, scans, thumbhash, 1, 1, "PNG"]}).encode()


FORGED = {
    "not JSON": b"\xff\xd8\xff",
    "no known key": b"{}",
    "deeply nested": b"[" * 100_000,
    "not a JPEG": picture("", "", [0]),
    "numbers instead of text in a picture": b'{"picture": [1, [2], 3, 4, 5, 6]}',
    "no scans": picture(JPEG, HASH, []),
    "scans that are no list": picture(JPEG, HASH, 9),
    "many scans": picture(JPEG, HASH, [1, 2, 3, 4, 9]),
    "scans out of order": picture(JPEG, HASH, [4, 3, 9]),
    "negative scans": picture(JPEG, HASH, [-1, 9]),
    "scans of another length": picture(JPEG, HASH, [4, 8]),
    "a text among the scans": picture(JPEG, HASH, ["4", 9]),
    "a truth value among the scans": picture(JPEG, HASH, [True, 9]),
    "numbers instead of text in a fault": b'{"unusable": [1, 2, 3]}',
}


@pytest.mark.parametrize("code", [FLOOD, *map(FORGE.format, FORGED.values())], ids=["endless", *FORGED])
def test_an_invalid_answer_is_an_error_and_no_picture(code, in_decoder):
    with pytest.raises(ChildProcessError, match="the decoder's answer is invalid"):
        in_decoder(code)


def test_a_timeout_in_the_parent_leaves_no_decoder_behind(in_decoder):
    """RQ's timeout is an exception that a signal handler raises."""

    def late(*_arguments):
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


def test_a_fork_server_ends_when_the_process_that_started_it_is_killed():
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


# The worker's start


WITHOUT = """
import base64
import errno, runpy, sys
import pyseccomp
rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
for call in sys.argv.pop(1).split(","):
    if call == "seccomp":  # errors of a kernel without CONFIG_SECCOMP_FILTER
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "seccomp")
        rules.add_rule(pyseccomp.ERRNO(errno.EINVAL), "prctl", pyseccomp.Arg(0, pyseccomp.EQ, 22))
    else:
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), call)
if "convert" not in sys.argv:  # the worker; its converters inherit the filter
    rules.load()
sys.argv[0] = "workers"
runpy.run_module("workers", run_name="__main__", alter_sys=True)
"""


def start_worker(lacks: str, tmp_path, **more: str) -> subprocess.Popen:
    """Starts a real worker as if on a kernel that lacks system calls: a filter returns the errors of such a kernel."""
    environment = os.environ | {"IMAGEGRAM_DATA": str(tmp_path)} | more
    command = [sys.executable, "-c", WITHOUT, lacks]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-1, stderr=-1, text=True, start_new_session=True)


def test_where_the_kernel_offers_no_seccomp_a_worker_says_so_in_one_line_and_ends(tmp_path):
    worker = start_worker("seccomp", tmp_path)
    output, error = worker.communicate(timeout=30)
    assert worker.returncode == 1 and output == ""
    assert re.fullmatch(
        r"worker: decoders cannot run under seccomp here \(.*\)\. IMAGEGRAM_SANDBOX=optional accepts that\n", error
    )


def test_without_libseccomp_a_worker_says_so_in_one_line_and_ends():
    program = "import sys; sys.modules['pyseccomp'] = None; from workers import sandbox; sandbox.serve()"
    code = f"from storage import settings; from workers import sandbox; sandbox.PROGRAM = {program!r}; "
    code += "sandbox.check(settings.load({}))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stdout == "" and ran.stderr.count("\n") == 1
    assert "pyseccomp" in ran.stderr and "IMAGEGRAM_SANDBOX=optional" in ran.stderr


@pytest.mark.parametrize(
    ("lacks", "line"),
    [
        ("seccomp", r"decoders cannot run under seccomp here \(.*\), which IMAGEGRAM_SANDBOX=optional accepts"),
        ("landlock_create_ruleset", "this kernel offers no Landlock; decoders run under seccomp alone"),
    ],
)
def test_a_missing_layer_that_is_accepted_is_logged_in_one_line_and_images_are_created(lacks, line):
    with working() as site:
        (post,) = site.publish([jpeg()])
        optional = {"IMAGEGRAM_SANDBOX": "optional"} if lacks == "seccomp" else {}
        worker = start_worker(lacks, site.folder, **site.environment | optional)
        try:
            until(lambda: site.statuses([post])["ready"], what="the image")
        finally:
            worker.terminate()
            output, logged = worker.communicate(timeout=30)
        assert output == ""
        assert len(re.findall(rf"^WARNING imagegram\.sandbox: {line}$", logged, re.MULTILINE)) == 1
        assert "INFO imagegram.worker: converters: 1\n" in logged
