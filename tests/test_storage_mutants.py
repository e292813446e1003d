"""The model test finds faults: each of `mutants.MUTANTS` is made in memory, and the model must fail.

Here are two that it finds soon. `make drill-sealing` runs all.
"""

import os

import pytest
from model import make_small, run_model
from mutants import MUTANTS, applied

LONG = os.environ.get("LONG")
SOON = ["a compaction does not lower the counts", "a page ends where its first segment ends"]


@pytest.mark.one_redis
@pytest.mark.parametrize("name", MUTANTS if LONG else SOON)
def test_the_model_finds_a_fault(embedded, name, monkeypatch):
    make_small(monkeypatch)
    with applied(MUTANTS[name]):
        for seed in range(1, 6):
            try:
                steps = run_model("valkey", 1, examples=60, steps=80, seed=seed, server=embedded)
            except (Exception, pytest.fail.Exception) as error:
                print(f"{name}: found after {error.steps} steps with seed {seed}")
                return
            print(f"{name}: not found in {steps} steps with seed {seed}")
    raise AssertionError("not found")
