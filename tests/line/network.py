"""Network namespaces and the lines between them. Nothing of it outlives this program, however it ends."""

import contextlib
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path

from storage import processes

ROOT = Path(__file__).parents[2]
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000  # linux/if_tun.h
SITE = "10.77.0.1"  # the address of the site for all clients

_numbers = count(1)


def ip(*arguments: str, of: int | None = None) -> None:
    """Runs ip(8) in this network namespace, or in that of the process `of`."""
    enter = ["nsenter", f"--net=/proc/{of}/ns/net"] if of else []
    subprocess.run([*enter, "ip", *arguments], check=True)


def prepare() -> None:
    """Makes this process' network namespace ready for a site. Ends the program if the namespace is not a new one."""
    if os.geteuid() or os.readlink("/proc/self/ns/net") == os.readlink(f"/proc/{os.getppid()}/ns/net"):
        sys.exit("run it as root in a network namespace of its own: unshare --net python -m tests.line")
    ip("link", "set", "lo", "up")
    ip("address", "add", f"{SITE}/32", "dev", "lo")
    # Otherwise the kernel would begin a connection with the slow start threshold of the last one to the same address.
    Path("/proc/sys/net/ipv4/tcp_no_metrics_save").write_text("1")


def open_device(name: str) -> int:
    """Creates a TUN device. It vanishes when the file descriptor that is returned is closed."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return device


class Line:
    """A line to a client's network namespace. `report` has after the end what the emulator says."""

    def __init__(self, profile: str, congestion: str, seed: int):
        """`congestion` is the congestion control of both ends, for TCP."""
        self.ending = partial(processes.die_with_parent, signal.SIGKILL, os.getpid())  # for whatever it starts
        self.number = next(_numbers)
        self.profile, self.congestion, self.seed = profile, congestion, seed
        self.address = f"10.78.{self.number >> 8}.{self.number & 255}"  # of the client
        self.report: list[dict] = []

    def __enter__(self) -> "Line":
        with contextlib.ExitStack() as stack:
            command = ["unshare", "--net", "sh", "-c", "echo apart; exec sleep infinity"]
            self.client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=self.ending)
            stack.callback(self._kill, self.client)
            assert self.client.stdout.readline() == "apart\n"
            ends = f"site{self.number}", f"client{self.number}"
            devices = [open_device(end) for end in ends]
            try:
                ip("link", "set", ends[1], "netns", str(self.client.pid))
                self._connect(None, ends[0], SITE, self.address)
                self._connect(self.client.pid, ends[1], self.address, SITE)
                command = [sys.executable, "-m", "tests.line.emulator", self.profile, str(self.seed)]
                self.emulator = subprocess.Popen(
                    [*command, *map(str, devices)],
                    cwd=ROOT,
                    pass_fds=devices,
                    stdout=subprocess.PIPE,
                    text=True,
                    preexec_fn=self.ending,
                )
            finally:
                for device in devices:
                    os.close(device)
            stack.callback(self._kill, self.emulator)
            assert self.emulator.stdout.readline() == "ready\n"
            self.stack = stack.pop_all()
        return self

    def _connect(self, of: int | None, device: str, address: str, other: str) -> None:
        """Brings up one end. The route names the congestion control, because the system's default may be another.

        Without an address of IPv6 the kernel itself sends nothing, so a seed loses the same packets each time.
        """
        if of:
            ip("link", "set", "lo", "up", of=of)
            ip("address", "add", f"{address}/32", "dev", device, of=of)
        ip("link", "set", device, "addrgenmode", "none", of=of)
        ip("link", "set", device, "up", of=of)
        ip("route", "add", f"{other}/32", "dev", device, "src", address, "congctl", self.congestion, of=of)

    @staticmethod
    def _kill(process: subprocess.Popen) -> None:
        process.kill()
        process.wait()
        process.stdout.close()

    def __exit__(self, *_) -> None:
        self.emulator.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired, ValueError):
            self.report = json.loads(self.emulator.communicate(timeout=5)[0])
        self.stack.close()

    def run(self, *command: str, **given) -> subprocess.CompletedProcess:
        """Runs a command in the client's namespace. Raises CalledProcessError if it fails."""
        enter = ["nsenter", f"--net=/proc/{self.client.pid}/ns/net"]
        return subprocess.run(
            [*enter, *command], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE, preexec_fn=self.ending, **given
        )


