"""The application: routes, settings and what they share."""

import orjson
from sanic import Sanic

from api import bodies, comments, health, images, posts, uploads
from api.flights import Flights
from api.problems import Errors
from api.reading import JSON_BYTES
from storage.db.client import Redis
from storage.objects import open_store
from storage.settings import MIB, Settings, signing_secret

IDLE = 30  # seconds without a byte after which a connection goes


def create(settings: Settings) -> Sanic:
    app = Sanic(
        "imagegram",
        error_handler=Errors(),
        configure_logging=False,
        dumps=orjson.dumps,
        loads=orjson.loads,
        strict_slashes=True,
    )
    app.config.update(
        ACCESS_LOG=False,
        FALLBACK_ERROR_FORMAT="text",
        REQUEST_MAX_SIZE=JSON_BYTES,
        REQUEST_TIMEOUT=IDLE,
        RESPONSE_TIMEOUT=IDLE,
        KEEP_ALIVE_TIMEOUT=120,  # longer than a proxy keeps its idle connections: it closes first, never in mid-request
        GRACEFUL_SHUTDOWN_TIMEOUT=25,
        MOTD=False,
        DEPRECATION_FILTER="ignore",  # on Python 3.14 Sanic calls what 3.16 removes, and each process would say so
    )
    app.ctx.settings = settings
    app.ctx.secret = signing_secret(settings)
    app.ctx.verified = {}  # Authorization header -> user, and when it expires (seconds since 1970)
    for room in (posts, uploads, comments, images, health):
        app.blueprint(room.routes)

    @app.before_server_start
    async def open(app):
        app.ctx.db = Redis(settings.redis_url)
        app.ctx.objects = open_store(settings.store_url, settings.free_space * MIB)
        app.ctx.flights = Flights()
        app.ctx.receiving, app.ctx.committing, app.ctx.stopping = set(), set(), False

    @app.before_server_stop
    async def stop(app):
        bodies.stop(app)

    @app.after_server_stop
    async def close(app):
        await bodies.wait_for_commits(app)
        await app.ctx.db.close()

    return app
