"""The state of the shipper on this machine, in the file `shipping.json` of the data folder."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import NotRequired, TypedDict

from storage.metrics import LAG, TRIAL, TRIAL_FLAWS, TRIAL_OK, Reading
from storage.settings import Settings


class TrialResult(TypedDict):
    """How a trial (`verify`) ended. The object `verified` in the backup store holds it as JSON.

    | | `ok` | `good` | also |
    |---|---|---|---|
    | restored | true | the generation restored | `second`, `counts` |
    | not restored | false | as in the result before, 0 if there was none | `detail` |
    """

    time: float  # unix seconds at which the trial began
    ok: bool
    good: int  # the newest generation that a trial has restored
    took: NotRequired[float]  # seconds
    detail: NotRequired[str]  # why the restore failed
    second: NotRequired[int]  # the newest unix second restored
    shards: NotRequired[int]  # how many a Cluster has; 0 for a single generation
    counts: NotRequired[dict[str, int]]  # "posts", "comments", "open uploads", "flaws"


class State(TypedDict):
    """How far the backup is."""

    lag: float | None  # seconds of data that a lost machine would cost; None if the shipper has never caught up
    generation: int | None  # the one being written
    trouble: str  # why the lag grows: the store is unavailable, or a first base is being shipped; "" if it does not
    verified: TrialResult | None  # the last trial, as the shipper read it at most RESULT_REFRESH (60 s) ago


class StoredState(TypedDict):
    """The content of the file, in JSON. See `State`."""

    caught: float  # unix time at which everything readable was in the store; 0 if that never was so
    generation: int | None
    trouble: str
    verified: TrialResult | None


def path(settings: Settings) -> Path:
    """Where the file is."""
    return settings.data / "shipping.json"


def write(settings: Settings, state: StoredState) -> None:
    """Replace the file. Does nothing if it cannot be written.

    The file is not synced to the disk, because after a crash it is out of date anyway.
    """
    with suppress(OSError):
        draft = path(settings).with_suffix(".tmp")
        draft.write_text(json.dumps(state))
        draft.rename(path(settings))


def read(settings: Settings) -> State:
    """Read the file. Without a file, the trouble is that no shipper has run here.

    The lag counts from the moment at which the shipper had caught up, so it also grows if the shipper has died.
    """
    try:
        stored: StoredState = json.loads(path(settings).read_text())
    except (OSError, json.JSONDecodeError):
        stored = {"caught": 0, "generation": None, "trouble": "no shipper has run here", "verified": None}
    return {
        "lag": time.time() - stored["caught"] if stored["caught"] else None,
        "generation": stored["generation"],
        "trouble": stored["trouble"],
        "verified": stored["verified"],
    }


def gauges(settings: Settings) -> list[Reading]:
    """The state as metrics. What is not known is left out."""
    state = read(settings)
    readings: list[Reading] = []
    if state["lag"] is not None:
        readings.append((LAG, (), state["lag"]))
    if trial := state["verified"]:
        readings += [(TRIAL, (), trial["time"]), (TRIAL_OK, (), float(trial["ok"]))]
        if "counts" in trial:
            readings.append((TRIAL_FLAWS, (), float(trial["counts"]["flaws"])))
    return readings
