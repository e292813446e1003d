"""The short form of `make fuzz`."""

from drills.fuzz import fuzz


def test_no_request_is_answered_by_a_fault():
    print(fuzz(1000, seed=2))
