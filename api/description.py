"""The description of the API: `api/openapi.yaml`, as JSON at /openapi.json and as a page at /docs.

The page shows it in Swagger UI, whose files come from the distribution swagger-ui-py. Nothing is loaded from another
host.
"""

from functools import cache
from hashlib import blake2b
from html import escape
from importlib.metadata import distribution
from pathlib import Path
from string import Template

import yaml
from sanic import Blueprint
from sanic.exceptions import NotFound

from api.answers import READ, Answer, json_answer

FILE = Path(__file__).with_name("openapi.yaml")
PAGE = Path(__file__).with_name("page")
# How long caches may use it without asking. It changes only with the server's version, and mostly by additions.
CACHED = {"Cache-Control": "public, max-age=300"}
# The address of a file has a digest of its contents.
IMMUTABLE = {"Cache-Control": "public, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".png": "image/png"}
# Swagger UI draws its icons from data: URLs. It sets styles by the DOM, which needs no permission.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

routes = Blueprint("description")


@cache
def load() -> dict:
    """The description, without the parts that YAML has merged into others."""
    with FILE.open("rb") as file:
        description = yaml.load(file, yaml.CSafeLoader)
    del description["x-shared"]
    return description


def files() -> dict[str, Path]:
    """The files of the page, by their names in its template."""
    swagger = Path(str(distribution("swagger-ui-py").locate_file("swagger_ui/static")))
    return {
        "favicon": swagger / "favicon-32x32.png",
        "swagger_css": swagger / "swagger-ui.css",
        "swagger_js": swagger / "swagger-ui-bundle.js",
        "page_css": PAGE / "page.css",
        "page_js": PAGE / "page.js",
    }


def rows(entries: dict[str, list[str]]) -> str:
    """Rows of a table. Each begins with its key, which is also the row's anchor."""
    return "\n".join(
        f'<tr id="{key}"><td><code>{key}</code></td>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for key, cells in entries.items()
    )


def tables() -> dict[str, str]:
    """The tables of the page, by their names in its template. The `type` of a problem leads to its row in `codes`."""
    schemas = load()["components"]["schemas"]
    codes = {
        code: [", ".join(map(str, entry["status"])), entry["meaning"], entry["client"]]
        for code, entry in schemas["Code"]["x-codes"].items()
    }
    failures = schemas["Failure"]["properties"]["code"]["x-meanings"]
    return {"codes": rows(codes), "failures": rows({code: [meaning] for code, meaning in failures.items()})}


@routes.before_server_start
async def prepare(app):
    """Read all files once: `app.ctx.pages` has the answers by path."""
    pages, addresses = {"/openapi.json": json_answer(load(), CACHED)}, {}
    for name, path in files().items():
        body = path.read_bytes()
        address = f"/docs/{path.stem}.{blake2b(body, digest_size=6).hexdigest()}{path.suffix}"
        addresses[name] = address
        pages[address] = Answer(body, IMMUTABLE, content_type=TYPES[path.suffix])
    html = Template((PAGE / "index.html").read_text()).substitute(addresses, **tables())
    headers = {**CACHED, "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
    pages["/docs"] = Answer(html.encode(), headers, content_type="text/html; charset=utf-8")
    app.ctx.pages = pages


@routes.route("/openapi.json", methods=READ, name="json")
@routes.route("/docs", methods=READ, name="page")
@routes.route("/docs/<file>", methods=READ, name="file")
async def read(request, file: str = ""):
    if request.path not in request.app.ctx.pages:
        raise NotFound("no such file")
    return await request.app.ctx.pages[request.path].respond(request)
