"""`imagegram-storage verify`: restores the newest backup on trial and keeps the result in the store."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from redis.exceptions import RedisError

from storage.backup.aof import Damaged
from storage.backup.restore import Refused, clock, restore
from storage.backup.state import TrialResult
from storage.errors import Refusal
from storage.objects import NotFound, ObjectStore
from storage.settings import Settings


async def verify(settings: Settings, store: ObjectStore, report: Callable[[str], None] = print) -> bool:
    """Restore the newest into a scratch folder, check it, keep the result in the store, and report it.

    False if it cannot be restored. A failure leaves the last good generation standing as such: `retain`
    removes nothing from there on. Raises Unavailable: then nothing is known, and the last result stands.
    """
    before = await last_result(store)
    settings.data.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    result: TrialResult = {"time": begun, "ok": False, "good": before["good"] if before else 0}
    with tempfile.TemporaryDirectory(prefix="verify-", dir=settings.data) as scratch:
        try:
            done = await restore(settings, store, Path(scratch, "redis"), None, report)
        except (Damaged, Refused, NotFound, Refusal, RedisError, OSError) as error:  # the disk may be full, too
            result["detail"] = str(error)
        else:
            result["ok"] = True
            result["good"] = done.generation
            result["second"] = done.second
            result["counts"] = done.counts
    result["took"] = round(time.time() - begun, 3)
    await store.put("verified", json.dumps(result).encode())
    report(f"{describe_result(result)}; it took {result['took']:.1f} s")
    return result["ok"]


def describe_result(result: TrialResult) -> str:
    """For people: how a restore on trial ended, by what `verify` has put in the store."""
    if not result["ok"]:
        return f"FAILED: {result['detail']}"
    counts = ", ".join(f"{count} {what}" for what, count in result["counts"].items() if what != "flaws")
    flaws = f"{result['counts']['flaws']} FLAWS" if result["counts"]["flaws"] else "0 flaws"
    return f"generation {result['good']} restored up to {clock(result['second'])} ({counts}, {flaws})"


async def last_result(store: ObjectStore) -> TrialResult | None:
    """The last result of `verify`, None if there is none."""
    try:
        result: TrialResult = json.loads(await store.get("verified"))
    except NotFound:
        return None
    return result
