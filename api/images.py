"""Served images: 600x600 JPEGs that never change. Originals are never served.

The object store is asked, not Redis: an image is there from just before its post shows until its post is deleted.
"""

import re

from sanic import Blueprint
from sanic.response import HTTPResponse, empty

from api.answers import READ, FastResponse, encode_headers
from api.headers import list_header, matches_etag
from api.problems import problem
from storage import posts
from storage.errors import NoImage
from storage.objects import NotFound

routes = Blueprint("images")

HEADERS = {
    "Cache-Control": "public, max-age=31536000, immutable",
    "Accept-Ranges": "bytes",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Content-Disposition": "inline",
}
RANGE = re.compile(r"bytes=(?!-$)([0-9]{0,18})-([0-9]{0,18})")


@routes.route("/v1/images/<name:.+\\.jpg>", methods=READ)
async def image(request, name: str):
    post = name.removesuffix(".jpg")
    try:
        data = await posts.image(request.app.ctx.objects, post)
    except NotFound:
        return await missing(request, post)
    # Strong: the id names the bytes, which never change; the length tells apart what a restore made anew.
    headers = {**HEADERS, "ETag": f'"{post}-{len(data):x}"'}
    if matches_etag(list_header(request, "if-none-match"), headers["ETag"]):
        return empty(304, headers)
    asked = RANGE.fullmatch(request.headers.get("range", ""))
    if asked and request.method == "GET" and request.headers.get("if-range", headers["ETag"]) == headers["ETag"]:
        return part(data, asked[1], asked[2], headers)
    return FastResponse(encode_headers({**headers, "Content-Type": "image/jpeg"}), 200, data)


def part(data: bytes, first: str, last: str, headers: dict[str, str]) -> HTTPResponse:
    """A single range (RFC 9110, section 14). Several at once are answered with the whole, as section 14.2 allows."""
    if first:
        start, stop = int(first), min(int(last or len(data)) + 1, len(data))
    else:
        start, stop = max(0, len(data) - int(last or 0)), len(data)
    if start >= stop:
        if first and last and int(last) < int(first):  # not a range at all: ignored
            return HTTPResponse(data, 200, headers, "image/jpeg")
        return problem(416, "range", "the image has no such bytes", {"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return HTTPResponse(data[start:stop], 206, headers, "image/jpeg")


async def missing(request, post: str) -> HTTPResponse:
    row = await posts.read(request.app.ctx.db, post)
    if row.status == "processing":
        return problem(404, NoImage.word.lower(), "the image is being made", {"Retry-After": "1"})
    raise NoImage("this post has no image")
