"""Served images: 600x600 JPEGs that never change. Originals are never served.

A JPEG that is made again with other bytes gets another address, `{post}.2.jpg`. The JPEG of the old address stays for a
day at least, until `imagegram-storage sweep` removes it. Then the old address leads to the new one.

A handler asks object storage, not Redis: an image is there from just before its post is ready until the post is
deleted.
"""

import re

from sanic import Blueprint
from sanic.response import HTTPResponse, empty

from api import limits
from api.answers import READ, FastResponse, encode_head
from api.headers import list_header, matches_etag
from api.problems import problem
from storage import keys, posts
from storage.errors import NoImage, NoPost
from storage.objects import NotFound

routes = Blueprint("images")

CROSS_ORIGIN = "Cross-Origin-Resource-Policy"
HEADERS = {
    "Cache-Control": "public, max-age=31536000, immutable",
    "Accept-Ranges": "bytes",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Content-Disposition": "inline",
    # Lets pages with `Cross-Origin-Embedder-Policy: require-corp` show images by a plain <img>, as all other pages may.
    # A redirect needs it as well.
    CROSS_ORIGIN: "cross-origin",
}
# By what is between the id and `.jpg` in the address.
VERSIONS = {"": 1, **{f".{version}": version for version in range(2, keys.IMAGE_VERSIONS + 1)}}
HEAD = encode_head(200, {**HEADERS, "Content-Type": "image/jpeg"})
RANGE = re.compile(r"bytes=(?!-$)([0-9]{0,18})-([0-9]{0,18})")


@routes.route("/v1/images/<name:.+\\.jpg>", methods=READ)
async def image(request, name: str):
    ctx, (post, dot, number) = request.app.ctx, name.removesuffix(".jpg").partition(".")
    version = VERSIONS.get(dot + number)
    if not version:
        raise NoPost("no such post")
    if ctx.limiter and (ticket := limits.begin_read(request)):
        await limits.end_read(request, ticket)
        request.stream.limits = ""  # caches store this answer, and would repeat what it says about one client
    try:
        jpeg = await posts.image(ctx.objects, post, version)
    except NotFound:
        return await missing(request, post, version)
    # A strong tag: the bytes of an address never change. After a restore the image is made again, maybe by another
    # version of the encoder. The length tells the two apart.
    etag = f'"{name[:-4]}-{len(jpeg):x}"'
    headers = {**HEADERS, "ETag": etag}
    if matches_etag(list_header(request, "if-none-match"), etag):
        return empty(304, headers)
    bounds = RANGE.fullmatch(request.headers.get("range", ""))
    if bounds and request.method == "GET" and request.headers.get("if-range", etag) == etag:
        return part(jpeg, bounds[1], bounds[2], headers)
    response = FastResponse(HEAD, 200, jpeg)
    response.headers["ETag"] = etag
    return response


def part(jpeg: bytes, first: str, last: str, headers: dict[str, str]) -> HTTPResponse:
    """One range of the image: 206, or 416 if no byte is in it (RFC 9110, section 14).

    `first` and `last` are byte positions; an empty `first` means the last `last` bytes. A request for several ranges
    does not come here: it gets the whole image, as section 14.2 allows.
    """
    if first:
        start, stop = int(first), min(int(last or len(jpeg)) + 1, len(jpeg))
    else:
        start, stop = max(0, len(jpeg) - int(last or 0)), len(jpeg)
    if start >= stop:
        if first and last and int(last) < int(first):  # not a valid range, so the header is ignored
            return HTTPResponse(jpeg, 200, headers, "image/jpeg")
        return problem(416, "range", "the image has no such bytes", {"Content-Range": f"bytes */{len(jpeg)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(jpeg)}"
    return HTTPResponse(jpeg[start:stop], 206, headers, "image/jpeg")


async def missing(request, post: str, version: int) -> HTTPResponse:
    """404, with Retry-After while the image is being made; 307 if it has another address. Raises NoPost, NoImage."""
    row = await posts.read(request.app.ctx.db, post)
    if row.image and row.image.version != version:
        headers = {"Location": f"/v1/{keys.image(post, row.image.version)}", "Cache-Control": "no-cache"}
        return empty(307, headers | {CROSS_ORIGIN: HEADERS[CROSS_ORIGIN]})
    if row.status == "processing":
        return problem(404, NoImage.word.lower(), "the image is being made", {"Retry-After": "1"})
    raise NoImage("this post has no image")
