"""The short form of the model test. tests/model.py has the rules.

The steps are the same each time, so a failure comes with the change that causes it. `make drill-sealing` takes others.
"""

import pytest
from model import make_small, run_model


@pytest.mark.parametrize(("kind", "partitions"), [("fake", 1), ("fake", 3), ("valkey", 1), ("valkey", 3), ("redis", 1)])
def test_the_feed_the_comments_and_the_lists_of_users_always_equal_a_plain_model(kind, partitions, monkeypatch):
    make_small(monkeypatch)
    run_model(kind, partitions, examples=8, steps=50, seed=1)
