"""`/healthz`: the process is alive. `/readyz`: it can serve."""

import asyncio

from sanic import Blueprint
from sanic.response import json

from api.answers import READ
from api.rendering import timestamp
from storage import gauges
from storage.backup import state as shipper
from storage.objects import Unavailable

STORE_TIMEOUT = 1.0  # seconds. A probe rarely waits more than two for its answer
SLOW_FORK = 0.04  # seconds. Every call waits for it, and has 50 ms. The alert SlowFork has the same limit
NO_STORE = {"Cache-Control": "no-store"}

routes = Blueprint("health")


@routes.route("/healthz", methods=READ)
async def healthz(request):
    return json({"status": "ok"}, headers=NO_STORE)


@routes.route("/readyz", methods=READ)
async def readyz(request):
    """200 if Redis answers, or most primaries of a Cluster. Raises Unreachable if not.

    Without object storage the feed and comments still work. Without a backup everything works. Without a shard of a
    Cluster, what is in the others works, on every process of the API alike. So these three are only reported, and so is
    a slow fork.
    """
    ctx = request.app.ctx
    body = {"status": "ok", "redis": await redis(ctx.db), "store": await store(ctx.objects)}
    return json({**body, "backup": backup(ctx.settings)}, headers=NO_STORE)


async def redis(db, slow: float = SLOW_FORK) -> str:
    """`ok`, or which primaries of a Cluster do not answer, and whose last fork took longer than `slow` seconds.

    Raises Unreachable where Redis, or most of the primaries, do not answer.
    """
    silent, forks = await asyncio.gather(db.ping(), gauges.forks(db))
    report = [f"no answer from {', '.join(silent)}"] if silent else []
    for place, seconds in forks:
        if seconds > slow:
            fork = f"the last fork{place and ' of '}{place} took {seconds * 1000:.0f} ms"
            report.append(f"{fork}: see SlowFork in docs/production.md")
    return "; ".join(report) or "ok"


async def store(objects) -> str:
    """`ok`, or why object storage does not answer."""
    try:
        async with asyncio.timeout(STORE_TIMEOUT):
            await objects.ping()
    except TimeoutError:
        return f"no answer in {STORE_TIMEOUT:.0f} s"
    except Unavailable as error:
        return str(error)
    return "ok"


def backup(settings) -> dict:
    """What the shipper of this machine reports.

    `lag` is in seconds, null if nothing was ever shipped. `trouble` is empty or says why the lag grows. `verified` is
    the result of the last trial restore, null if there was none.
    """
    state = shipper.read(settings)
    lag, trial = state["lag"], state["verified"]
    if trial:
        flaws, detail = trial.get("counts", {}).get("flaws"), trial.get("detail", "")
        trial = {"at": timestamp(int(trial["time"] * 1000)), "ok": trial["ok"], "flaws": flaws, "detail": detail}
    return {"lag": lag and round(lag, 3), "trouble": state["trouble"], "verified": trial}
