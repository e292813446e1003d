"""The program between the two ends of a line. It forwards IP packets of any kind, and delays and loses some of them.

    python -m tests.line.emulator PROFILE SEED FD FD

The file descriptors are those of two TUN devices. Ends at SIGTERM, and then prints JSON: packets forwarded, lost and
dropped by the full queue in each direction, and how late packets were delivered in seconds, at the 99th percentile.
"""

import contextlib
import json
import os
import random
import select
import signal
import sys
import time
from collections import deque
from typing import NamedTuple


class Profile(NamedTuple):
    rate: float  # bit/s in each direction
    delay: float  # seconds in one direction, so a round trip takes twice as long
    loss: float  # share of the packets that are lost, in each direction

    def words(self) -> str:
        return f"{self.rate / 1000:.0f} kbit/s, {2000 * self.delay:.0f} ms, {100 * self.loss:g} % lost"


PROFILES = {
    "EDGE": Profile(200e3, 0.200, 0.01),
    "3G": Profile(750e3, 0.100, 0.015),
    "wifi": Profile(2e6, 0.050, 0.05),
    "self-check": Profile(2e6, 0.020, 0.10),
}
QUEUE = 50  # packets that wait for the line in one direction. One more is dropped
LARGEST = 65536  # bytes of an IP packet


class Direction:
    """One direction of a line. Times are seconds of any clock that does not go back."""

    def __init__(self, profile: Profile, seed: int):
        self.profile = profile
        self.random = random.Random(seed)
        self.leaving: deque[float] = deque()  # when each packet of the queue has left it, ascending
        self.free = 0.0  # when the line has sent the last packet of the queue
        self.dropped = self.lost = 0

    def arrival(self, size: int, now: float) -> float | None:
        """When a packet of `size` bytes arrives that is sent `now`, or None if it does not.

        The queue drops a packet before it takes time of the line. A packet that is lost has taken its time, as on air.
        """
        while self.leaving and self.leaving[0] <= now:
            self.leaving.popleft()
        if len(self.leaving) >= QUEUE:
            self.dropped += 1
            return None
        self.free = max(now, self.free) + size * 8 / self.profile.rate
        self.leaving.append(self.free)
        if self.random.random() < self.profile.loss:
            self.lost += 1
            return None
        return self.free + self.profile.delay


class Forwarder:
    """Moves the packets of one direction from one TUN device to the other."""

    def __init__(self, direction: Direction, source: int, target: int):
        self.direction, self.source, self.target = direction, source, target
        self.coming: deque[tuple[float, bytes]] = deque()  # packets under way, by their arrival
        self.late: list[float] = []  # seconds

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while packet := os.read(self.source, LARGEST):
                if (arrival := self.direction.arrival(len(packet), time.monotonic())) is not None:
                    self.coming.append((arrival, packet))

    def deliver(self) -> float:
        """Delivers what has arrived. Returns in how many seconds the next packet arrives; an hour if there is none."""
        while self.coming:
            late = time.monotonic() - self.coming[0][0]
            if late < 0:
                return -late
            with contextlib.suppress(OSError):  # the device's namespace is gone
                os.write(self.target, self.coming.popleft()[1])
            self.late.append(late)
        return 3600.0

    def report(self) -> dict:
        late = sorted(self.late)
        counted = {"forwarded": len(late), "lost": self.direction.lost, "dropped": self.direction.dropped}
        return {**counted, "late": late[len(late) * 99 // 100] if late else 0.0}


def main() -> None:
    profile, seed, *devices = PROFILES[sys.argv[1]], *map(int, sys.argv[2:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this
    with contextlib.suppress(PermissionError):  # before other processes, so that they do not change the line
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    for device in devices:
        os.set_blocking(device, False)
    ends = devices, devices[::-1]
    both = [Forwarder(Direction(profile, 2 * seed + number), *end) for number, end in enumerate(ends)]
    by_source = {forwarder.source: forwarder for forwarder in both}
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    print("ready", flush=True)
    while not ended:
        pause = min(forwarder.deliver() for forwarder in both)
        for source in select.select(devices, [], [], min(pause, 0.1))[0]:
            by_source[source].read()
    print(json.dumps([forwarder.report() for forwarder in both]), flush=True)


if __name__ == "__main__":
    main()
