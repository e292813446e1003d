"""Whether the process lives, and whether it can serve."""

import asyncio

from sanic import Blueprint
from sanic.response import json

from api.answers import READ
from api.rendering import timestamp
from storage.backup import state as shipper
from storage.objects import Unavailable

STORE_TIMEOUT = 1.0  # seconds the store has for its answer: whoever asks has seldom more than two for his
NO_STORE = {"Cache-Control": "no-store"}

routes = Blueprint("health")


@routes.route("/healthz", methods=READ)
async def healthz(request):
    return json({"status": "ok"}, headers=NO_STORE)


@routes.route("/readyz", methods=READ)
async def readyz(request):
    """Redis decides. Without the store reading the feed and commenting work, without a backup all does."""
    ctx = request.app.ctx
    await ctx.db.ping()
    told = {"status": "ok", "redis": "ok", "store": await store(ctx.objects), "backup": backup(ctx.settings)}
    return json(told, headers=NO_STORE)


async def store(objects) -> str:
    try:
        async with asyncio.timeout(STORE_TIMEOUT):
            await objects.ping()
    except TimeoutError:
        return f"no answer in {STORE_TIMEOUT:.0f} s"
    except Unavailable as error:
        return str(error)
    return "ok"


def backup(settings) -> dict:
    """`lag` in seconds, null where nothing was ever shipped; `verified`: how the last restore on trial ended."""
    state = shipper.read(settings)
    lag, proof = state["lag"], state["verified"]
    if proof:
        flaws, detail = proof.get("counts", {}).get("flaws"), proof.get("detail", "")
        proof = {"at": timestamp(int(proof["time"] * 1000)), "ok": proof["ok"], "flaws": flaws, "detail": detail}
    return {"lag": lag and round(lag, 3), "trouble": state["trouble"], "verified": proof}
