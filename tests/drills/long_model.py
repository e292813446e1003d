"""The long form of the model test: 20,000 steps, on each server and on a Cluster of three shards.

    python -m pytest -s tests/drills/long_model.py
"""

import time

import pytest
from conftest import start_server
from model import make_small, run_model

RUNS = [("valkey", 1, 6000), ("valkey", 3, 4000), ("redis", 3, 4000), ("fake", 3, 3000), ("cluster-valkey", 3, 3000)]


@pytest.mark.parametrize(("kind", "partitions", "wanted"), RUNS)
def test_the_long_form_of_the_model_succeeds(kind, partitions, wanted, monkeypatch):
    make_small(monkeypatch)
    steps, seed, begun = 0, 0, time.monotonic()
    server = start_server(kind)
    try:
        while steps < wanted:
            seed += 1
            steps += run_model(kind, partitions, examples=10, steps=100, seed=seed, server=server)
    finally:
        server.close()
    print(f"{kind}, {partitions} partitions: {steps} steps with seeds 1 to {seed} in {time.monotonic() - begun:.0f} s")
