"""`imagegram-storage verify`: a trial. It restores the newest backup into a scratch folder and stores the result.

| trial | the object `verified` in the backup store |
|---|---|
| there was none yet | does not exist |
| is running, or was killed | the result of the trial before |
| could not reach the store | the result of the trial before |
| has restored the newest generation | `ok` true, `good` its number |
| has failed to restore it | `ok` false, `detail` why, `good` as before |
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from redis.exceptions import RedisError

from storage.backup import shards
from storage.backup.aof import Damaged
from storage.backup.restore import Refused, format_utc
from storage.backup.state import TrialResult
from storage.errors import Refusal
from storage.objects import Below, NotFound, ObjectStore
from storage.settings import Settings


async def verify(
    settings: Settings, store: ObjectStore, report: Callable[[str], None] = print, node: str | None = None
) -> bool:
    """Restore the newest generation into a scratch folder, check the data, and put the result into the store.

    In the store of a Cluster it restores all shards, and the result says nothing of single generations: `good` is 0.
    With the id of a `node` it restores the newest generation of that node, and puts the result below that id.

    `report` gets each line of progress and the result. Returns False if the generation cannot be restored. After that
    `good` still names the last good generation, and `retain` removes neither it nor a newer one.

    Raises Unavailable: then nothing is known, and the result of the trial before stays.
    """
    own = Below(store, node) if node else store
    before = await last_result(own)
    settings.data.mkdir(parents=True, exist_ok=True)
    started_at = time.time()
    result: TrialResult = {"time": started_at, "ok": False, "good": before["good"] if before else 0}
    with tempfile.TemporaryDirectory(prefix="verify-", dir=settings.data) as scratch:
        try:
            to = Path(scratch, "redis")
            if node:
                restored = await shards.restore_node(settings, store, to, node, report)
            else:
                restored = await shards.restore_all(settings, store, to, None, report)
        except (Damaged, Refused, NotFound, Refusal, RedisError, OSError) as error:  # OSError: the disk may be full
            result["detail"] = str(error)
        else:
            result["ok"] = True
            result["good"] = restored.generation
            result["second"] = restored.second
            result["counts"] = restored.counts
            result["shards"] = restored.shards
    result["took"] = round(time.time() - started_at, 3)
    await own.put("verified", json.dumps(result).encode())
    report(f"{describe_result(result)}; it took {result['took']:.1f} s")
    return result["ok"]


def describe_result(result: TrialResult) -> str:
    """Return a sentence about the result of a trial.

    >>> describe_result({"time": 1795417200, "ok": False, "good": 1, "detail": "its base is not complete"})
    'FAILED: its base is not complete'
    """
    if not result["ok"]:
        return f"FAILED: {result['detail']}"
    counts = ", ".join(f"{count} {what}" for what, count in result["counts"].items() if what != "flaws")
    flaws = f"{result['counts']['flaws']} FLAWS" if result["counts"]["flaws"] else "0 flaws"
    what = f"{result['shards']} shards" if result.get("shards") else f"generation {result['good']}"
    return f"{what} restored up to {format_utc(result['second'])} ({counts}, {flaws})"


async def last_result(store: ObjectStore) -> TrialResult | None:
    """Read the result of the last trial from the store. Returns None if there is none. Raises Unavailable."""
    try:
        result: TrialResult = json.loads(await store.get("verified"))
    except NotFound:
        return None
    return result
