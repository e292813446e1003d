"""Whether the process lives, and whether it can serve."""

from sanic import Blueprint
from sanic.response import json

routes = Blueprint("health")


@routes.get("/healthz")
async def healthz(request):
    return json({"status": "ok"})


@routes.get("/readyz")
async def readyz(request):
    await request.app.ctx.db.ping()
    return json({"status": "ok", "redis": "ok", "store": await store(request.app.ctx.objects)})


async def store(objects) -> str:
    """Reported, not decisive: reading the feed and commenting work without the store."""
    try:
        async for _ in objects.list("readyz/"):
            break
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "ok"
