"""What the shipper of this machine says of itself, in a file of the data folder."""

import json
import time
from contextlib import suppress
from pathlib import Path

from storage.settings import Settings


def path(settings: Settings) -> Path:
    return settings.data / "shipping.json"


def write(settings: Settings, state: dict) -> None:
    """Keep the state that `read` returns. Not synced: a crash makes it stale anyway."""
    with suppress(OSError):
        draft = path(settings).with_suffix(".tmp")
        draft.write_text(json.dumps(state))
        draft.rename(path(settings))


def read(settings: Settings) -> dict:
    """How the backup stands: `lag` in seconds (None: never caught up), `generation`, `trouble`, `verified`.

    `trouble` says why the lag grows: the store fails, or the first base is on its way. `verified` is what the shipper
    knows, up to RESULT_REFRESH old. The lag of a shipper that died grows by itself.
    """
    try:
        stored = json.loads(path(settings).read_text())
    except (OSError, json.JSONDecodeError):
        stored = {"caught": 0, "generation": None, "trouble": "no shipper has run here", "verified": None}
    caught = stored.pop("caught")
    return {"lag": time.time() - caught if caught else None, **stored}
