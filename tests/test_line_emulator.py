"""The emulated slow line of `make line`: its rate, queue, loss and delay, and that nothing of it is left behind."""

import os
import subprocess
import sys

import psutil
import pytest
from conftest import ROOT, until

from tests.line.emulator import PROFILES, QUEUE, Direction, Profile

PERFECT = Profile(rate=1e6, delay=0.1, loss=0.0)


def test_packets_arrive_at_the_rate_of_the_line_and_later_by_its_delay():
    line = Direction(PERFECT, seed=1)
    assert [line.arrival(1250, now=5.0) for _ in range(3)] == pytest.approx([5.11, 5.12, 5.13])
    assert line.arrival(125, now=9.0) == pytest.approx(9.101), "an idle line begins at once"


def test_a_full_queue_drops_packets_until_one_has_left_and_they_take_no_time_of_the_line():
    line = Direction(PERFECT, seed=1)
    arrivals = [line.arrival(1250, now=0.0) for _ in range(QUEUE + 10)]
    assert None not in arrivals[:QUEUE] and arrivals[QUEUE:] == [None] * 10 and line.dropped == 10
    assert line.arrival(1250, now=0.0101) == pytest.approx(arrivals[QUEUE - 1] + 0.01)
    assert line.arrival(1250, now=0.0102) is None, "it is full again"


@pytest.mark.parametrize("name", PROFILES)
def test_as_many_packets_are_lost_as_the_profile_says_and_the_same_ones_for_the_same_seed(name):
    def lost(seed: int) -> list[int]:
        line = Direction(PROFILES[name], seed)
        return [n for n in range(20_000) if line.arrival(1500, now=n * 1.0) is None]

    assert len(lost(1)) / 20_000 == pytest.approx(PROFILES[name].loss, rel=0.15)
    assert lost(1) == lost(1) != lost(2)


COMMAND = ["unshare", "--net", sys.executable, "-m", "tests.line.check"]

if os.geteuid() == 0:  # only root may create TUN devices

    def test_a_real_line_between_two_network_namespaces_is_what_it_says():
        subprocess.run(COMMAND, cwd=ROOT, check=True)

    def test_nothing_of_a_line_is_left_after_kill_9():
        """Its devices and namespaces end with the last process that has them."""
        program = psutil.Popen(COMMAND, cwd=ROOT, stderr=subprocess.DEVNULL)
        until(lambda: len(program.children()) == 3, what="the client's namespace, the client, and the emulator")
        started = program.children()
        program.kill()
        assert psutil.wait_procs([program, *started], 10)[1] == []
