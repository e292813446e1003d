"""Short forms of the drills: a few rounds of each, on both servers. `make drill` runs the long forms, with figures."""

import pytest

from tests.drills import crashes, faults

SHORT = {
    "kill": lambda server: crashes.kill(server, rounds=3),
    "machine": lambda server: crashes.machine(server, rounds=1),
    "cut": lambda server: faults.cut(server, tail=2048, anywhere=5),
    "scale": lambda server: faults.scale(server, posts=20, comment_count=2000),
}


@pytest.mark.parametrize("server", ["valkey", "redis"])
@pytest.mark.parametrize("drill", SHORT)
async def test_the_short_form_of_a_drill_succeeds(drill, server):
    assert await SHORT[drill](server)
