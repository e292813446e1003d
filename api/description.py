"""The description of the API: `api/openapi.yaml`, served as JSON at /openapi.json."""

from functools import cache
from pathlib import Path

import yaml
from sanic import Blueprint

from api.answers import READ, Answer, json_answer

FILE = Path(__file__).with_name("openapi.yaml")
CACHED = "public, max-age=300"  # seconds. It changes only with the server's version, and mostly by additions

routes = Blueprint("description")


@cache
def load() -> dict:
    """The description, without the parts that YAML has merged into others."""
    with FILE.open("rb") as file:
        description = yaml.load(file, yaml.CSafeLoader)
    del description["x-shared"]
    return description


@routes.before_server_start
async def prepare(app):
    app.ctx.description = json_answer(load(), {"Cache-Control": CACHED})


@routes.route("/openapi.json", methods=READ)
async def read(request):
    answer: Answer = request.app.ctx.description
    return await answer.respond(request)
