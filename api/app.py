"""The application: routes, Sanic's settings, and the objects that all requests share."""

import asyncio

import orjson
from sanic import Sanic

from api import bodies, comments, cors, description, health, images, metrics, posts, uploads
from api.flights import Flights
from api.jwks import Provider
from api.problems import Errors
from api.reading import JSON_BYTES
from api.waiting import Waiting
from storage import traces
from storage.db import cluster
from storage.limits import Limiter
from storage.objects import open_store
from storage.segments import open_segments
from storage.settings import MIB, Settings, signing_secret

IDLE = 30  # seconds without a byte after which a connection is closed


def create(settings: Settings) -> Sanic:
    """The Sanic application. `app.ctx` holds what its requests share:

    | name | what |
    |---|---|
    | `settings`, `secret` | the settings; the secret that signs tokens |
    | `provider` | the keys of the identity provider; None if tokens are signed with the secret |
    | `log_requests` | whether each request has a line in the log |
    | `verified` | Authorization header → user, and when the token expires (seconds since 1970) |
    | `cors` | the headers of answers, by origin (`api.cors`); empty: none |
    | `db`, `objects`, `segments` | the Redis client; object storage; old comments in it |
    | `limiter` | rate limits; None if there are none |
    | `flights` | reads in progress, which equal requests share |
    | `waiting` | requests that wait until something changes |
    | `receiving`, `committing`, `stopping` | uploads in progress, see `api.bodies` |
    | `pages` | path → the answer of /openapi.json, of /docs and of its files |
    """
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
        # Longer than a proxy keeps idle connections. So the proxy closes them, and never during a request.
        KEEP_ALIVE_TIMEOUT=120,
        GRACEFUL_SHUTDOWN_TIMEOUT=25,
        MOTD=False,
        DEPRECATION_FILTER="ignore",  # on Python 3.14 Sanic calls a function that 3.16 removes; each process would warn
    )
    # Sanic reads two settings for each request, as attributes. If they are none it calls a function, for a µs in all.
    vars(app.config).update(app.config)
    app.ctx.settings = settings
    app.ctx.log_requests = settings.log == "json"
    app.ctx.secret = "" if settings.jwks_url else signing_secret(settings)
    app.ctx.verified = {}
    app.ctx.cors = cors.headers_by_origin(settings.cors_origins) if settings.cors_origins else {}
    if app.ctx.cors:
        app.on_request(cors.answer_preflight)
    for module in (posts, uploads, comments, images, health, metrics, description):
        app.blueprint(module.routes)

    @app.before_server_start
    async def connect(app):
        # Tokens of a key that was removed must not stay valid in the cache.
        app.ctx.provider = Provider(settings.jwks_url, app.ctx.verified.clear) if settings.jwks_url else None
        if app.ctx.provider:
            app.ctx.provider.begin()
        if settings.traces:
            traces.start("imagegram-api")
        app.ctx.db = cluster.connect(settings.redis_url, settings.replicas)
        traces.trace_calls(app.ctx.db)
        app.ctx.objects = open_store(settings.store_url, settings.free_space * MIB)
        app.ctx.segments = open_segments(settings, app.ctx.objects)
        app.ctx.flights = Flights()
        app.ctx.limiter = Limiter(app.ctx.db, settings.limits, settings.partitions) if settings.limits else None
        app.ctx.waiting = Waiting(app.ctx.db, settings.partitions)
        app.ctx.receiving, app.ctx.committing, app.ctx.stopping = set(), set(), False

    @app.before_server_stop
    async def stop(app):
        bodies.stop(app)
        app.ctx.waiting.stop()

    @app.after_server_stop
    async def disconnect(app):
        await bodies.wait_for_commits(app)
        await app.ctx.db.close()
        await asyncio.to_thread(traces.stop)

    return app
