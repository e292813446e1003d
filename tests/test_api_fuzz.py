"""A short run of `make fuzz`."""

from drills.fuzz import fuzz


def test_random_requests_cause_no_internal_error():
    print(fuzz(1000, seed=2))
