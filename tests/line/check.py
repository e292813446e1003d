"""Checks that a line has the rate, the delay, the loss and the queue of its profile, in both directions.

    unshare --net python -m tests.line.check

Each end sends numbered UDP packets with their time, and notes when those of the other end come. Both ends have the same
clock. The seed determines which packets are lost.
"""

import json
import os
import socket
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

from tests.line.emulator import PROFILES, QUEUE
from tests.line.network import SITE, Line, prepare

PROFILE = "self-check"
PORT = 7000
HEADERS = 28  # bytes of IPv4 and UDP
STAMP = struct.Struct("!Id")  # number, time of sending
# The packets: a few on an idle line, more at once than the queue takes, and many with time between them.
SINGLE, BURST, MANY = range(0, 20), range(20, 20 + QUEUE + 30), range(100, 700)
LARGE = 1000  # bytes of the data of a packet of BURST; others have only a stamp
PAUSES = {SINGLE: 0.01, BURST: 0.0, MANY: 0.001}  # seconds between two packets


def send(end: socket.socket, other: tuple[str, int]) -> None:
    for numbers, pause in PAUSES.items():
        for number in numbers:
            end.sendto(STAMP.pack(number, time.monotonic()).ljust(LARGE if numbers is BURST else 0), other)
            if pause:
                time.sleep(pause)
        time.sleep(0.25)  # longer than a full queue takes


def receive(end: socket.socket, came: dict[int, tuple[float, float]]) -> None:
    """Notes for each packet when it was sent and when it came, until none has come for long."""
    end.settimeout(10)
    while True:
        try:
            number, sent = STAMP.unpack_from(end.recv(2048))
        except TimeoutError:
            return
        came[number] = sent, time.monotonic()
        end.settimeout(0.6)


def exchange(own: str, other: str) -> dict[int, tuple[float, float]]:
    """Sends and receives, before other processes of the machine, so that BURST leaves at once and times are exact.

    The site waits for the client's first packet. Before it nobody would receive what it sends.
    """
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))  # of this thread and of those that it starts
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.settimeout(10)
        end.bind((own, PORT))
        if own == SITE:
            end.recv(1, socket.MSG_PEEK)
        came: dict[int, tuple[float, float]] = {}
        sender = threading.Thread(target=send, args=(end, (other, PORT)))
        sender.start()
        receive(end, came)
        sender.join()
    return came


def problems(came: dict[int, tuple[float, float]]) -> list[str]:
    """What is wrong with one direction."""
    profile, found = PROFILES[PROFILE], []

    def compare(what: str, value: float, wanted: float, tolerance: float) -> None:
        if abs(value - wanted) > tolerance:
            found.append(f"{what} is {value:.4f}, not {wanted:.4f}")

    alone = profile.delay + (STAMP.size + HEADERS) * 8 / profile.rate
    compare("delay in s", median(at - sent for n, (sent, at) in came.items() if n in SINGLE), alone, 0.003)
    gap = median(came[n + 1][1] - at for n, (_, at) in came.items() if n in BURST and n + 1 in came)
    compare("rate in Mbit/s", (LARGE + HEADERS) * 8 / gap / 1e6, profile.rate / 1e6, 0.04 * profile.rate / 1e6)
    compare("the last packet of a full queue", max(n for n in came if n in BURST) - BURST[0], QUEUE, 3)
    many = len(MANY) - sum(n in MANY for n in came)
    compare("share of lost packets", many / len(MANY), profile.loss, 0.04)
    return found


def run() -> None:
    """Raises AssertionError if a line is not what it should be. Takes about two seconds."""
    with Line(PROFILE, "cubic", seed=1) as line, ThreadPoolExecutor() as threads:
        far = threads.submit(line.run, sys.executable, "-m", "tests.line.check", line.address, SITE)
        here = threads.submit(exchange, SITE, line.address).result()
        there = json.loads(far.result().stdout)
    found = {"to the site": problems(here), "from the site": problems({int(n): pair for n, pair in there.items()})}
    assert not any(found.values()), found


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(exchange(*sys.argv[1:])))
    else:
        prepare()
        run()
