"""What the shipper of this machine says of itself, in a file of the data folder."""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import NotRequired, TypedDict

from storage.settings import Settings


class TrialResult(TypedDict):
    """How a restore on trial ended, as `verify` puts it in the store."""

    time: float  # unix seconds at which it began
    ok: bool
    good: int  # the newest generation that a trial has restored, 0 if none
    took: NotRequired[float]  # seconds
    detail: NotRequired[str]  # why it failed
    second: NotRequired[int]  # if it did not fail: the newest second restored
    counts: NotRequired[dict[str, int]]  # posts, comments, open uploads, flaws


class State(TypedDict):
    """What `read` returns."""

    lag: float | None  # seconds; None: never caught up
    generation: int | None
    trouble: str
    verified: TrialResult | None


class StoredState(TypedDict):
    """What the file holds."""

    caught: float  # unix time at which all that could be read was in the store; 0: never
    generation: int | None
    trouble: str
    verified: TrialResult | None


def path(settings: Settings) -> Path:
    return settings.data / "shipping.json"


def write(settings: Settings, state: StoredState) -> None:
    """Keep the state that `read` returns. Not synced: a crash makes it stale anyway."""
    with suppress(OSError):
        draft = path(settings).with_suffix(".tmp")
        draft.write_text(json.dumps(state))
        draft.rename(path(settings))


def read(settings: Settings) -> State:
    """How the backup stands: `lag` in seconds (None: never caught up), `generation`, `trouble`, `verified`.

    `trouble` says why the lag grows: the store fails, or the first base is on its way. `verified` is what the shipper
    knows, up to RESULT_REFRESH old. The lag of a shipper that died grows by itself.
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
