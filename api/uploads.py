"""Resumable uploads: tus 1.0.0 (https://tus.io/protocols/resumable-upload) with the extensions creation,
creation-with-upload, expiration, termination and concatenation.

There are no locks, so no answer is 423: storage moves the offset by compare-and-set.
"""

import binascii
import re
from base64 import b64decode
from email.utils import formatdate

import orjson
from sanic import Blueprint
from sanic.response import HTTPResponse, empty

from api import limits, reading, rendering
from api.answers import READ
from api.bodies import append
from api.problems import TUS_VERSION as VERSION
from api.problems import Problem, answer_to
from storage import uploads
from storage.errors import Forbidden, NoUpload, Offset, Refusal, TooLarge
from storage.objects import Unavailable
from storage.settings import IMAGE_BYTES, PARTS

routes = Blueprint("uploads")

CAPABILITIES = {
    "Tus-Version": VERSION,
    "Tus-Extension": "creation,creation-with-upload,expiration,termination,concatenation",
    "Tus-Max-Size": str(IMAGE_BYTES),
}
BODY_TYPE = "application/offset+octet-stream"
NUMBER = re.compile(r"0|[1-9][0-9]{0,15}")
METADATA_KEY = re.compile(r"[!-+\--~]+")  # ASCII without space and comma
METADATA_BYTES = 4096
PART = re.compile(r"(?:https?://[^/?#]+)?/v1/uploads/([^/?#]+)")  # an address as in Location, or made absolute
CONCAT_BYTES = 2048  # 127 for each address. HEAD returns it beside the metadata, and proxies limit headers


def check_version(request) -> None:
    """Raises Problem 412 for another version of tus."""
    if request.headers.get("tus-resumable") != VERSION:
        raise Problem(412, "version", f"this server speaks tus {VERSION}", {"Tus-Version": VERSION})


def number(request, name: str) -> int:
    """A header that counts bytes. Raises Problem 400."""
    text = request.headers.get(name, "")
    if not NUMBER.fullmatch(text):
        raise Problem(400, "malformed", f"{name} must be a whole number")
    return int(text)


def metadata(request) -> str:
    """Upload-Metadata as it was sent: pairs of a key, each only once, and a Base64 value, which may be missing.

    Raises Problem 400.
    """
    text, keys = request.headers.get("upload-metadata", ""), set()
    malformed = len(text) > METADATA_BYTES
    for pair in text.split(",") if text else ():
        key, _, value = pair.strip(" ").partition(" ")
        try:
            b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            malformed = True
        malformed = malformed or not METADATA_KEY.fullmatch(key) or key in keys
        keys.add(key)
    if malformed:
        raise Problem(400, "malformed", "Upload-Metadata must be pairs of a key and a Base64 value")
    return text


def concatenation(request) -> tuple[str, list[str]]:
    """Upload-Concat as it was sent, and the ids of the parts, which only a final upload has. Raises Problem 400."""
    text = request.headers.get("upload-concat", "")
    if text in ("", "partial"):
        return text, []
    kind, _, urls = text.partition(";")
    found = [PART.fullmatch(url) for url in urls.split()]
    malformed = len(text) > CONCAT_BYTES or not (text.isascii() and text.isprintable())  # HEAD returns it as it is
    if malformed or kind != "final" or not 0 < len(found) <= PARTS or None in found:
        raise Problem(400, "malformed", f"Upload-Concat must be partial, or final; and 1 to {PARTS} upload addresses")
    if "upload-length" in request.headers:
        raise Problem(400, "malformed", "the length of a final upload is that of its parts: send no Upload-Length")
    return text, [url[1] for url in found]


def expires(ms: int) -> str:
    """An HTTP date (RFC 9110, section 5.6.7) from ms since 1970."""
    return formatdate(ms // 1000, usegmt=True)


def no_content(status: int, headers: dict[str, str]) -> HTTPResponse:
    """A response without a body, for a status that allows one. Sanic's `empty` would send the content type `None`."""
    return HTTPResponse(b"", status, headers, "text/plain")


@routes.on_response
async def add_version(request, response):
    response.headers["Tus-Resumable"] = VERSION


@routes.options("/v1/uploads")
@routes.options("/v1/uploads/<upload>", name="options_of_one")
async def options(request, upload: str = ""):
    return empty(204, CAPABILITIES)


@routes.post("/v1/uploads", stream=True)
async def create(request):
    check_version(request)
    user = await limits.admit(request, "upload")
    concat, parts = concatenation(request)
    length, sent_metadata = 0 if parts else number(request, "Upload-Length"), metadata(request)
    if reading.content_length(request) > length:
        raise TooLarge(f"the upload ends at {length}")
    ctx = request.app.ctx
    ctx.objects.check_free_space()
    idempotency = reading.idempotency_key(request, f"{length} {sent_metadata}{concat and ' ' + concat}".encode())
    if parts:
        opening = uploads.concatenate(ctx.db, ctx.objects, user, parts, concat, sent_metadata, idempotency)
    else:
        opening = uploads.create(
            ctx.db, user, ctx.settings.partitions, length, sent_metadata, idempotency, partial=bool(concat)
        )
    upload, replayed = await uploads.run_to_completion(opening)
    headers = {"Location": f"/v1/uploads/{upload}"}
    if replayed:
        headers["Idempotent-Replayed"] = "true"
    try:
        state = await uploads.run_to_completion(uploads.read(ctx.db, user, upload))
    except NoUpload:  # a repeated request: the upload has become a post, or was deleted
        return no_content(201, headers)
    if request.headers.get("content-type") == BODY_TYPE and not replayed and not parts:
        image = uploads.Appender(ctx.db, ctx.objects, upload, state.offset, length, bool(concat))
        try:
            async with limits.paid_body(request, user, length):
                await append(request, image)
        except (Problem, Refusal, Unavailable) as error:
            # The upload exists, so the client must learn its address. It can send the bytes again by PATCH.
            refusal = answer_to(error)
            if refusal.status < 500:
                refusal.headers.update(headers)
                return refusal
        state = state._replace(offset=image.offset, expires=image.expires or state.expires)
    return no_content(201, {**headers, "Upload-Offset": str(state.offset), "Upload-Expires": expires(state.expires)})


@routes.route("/v1/uploads", methods=READ)
async def list_open(request):
    """The user's open uploads. This call is not part of tus, so it needs no Tus-Resumable."""
    ctx = request.app.ctx
    rows = await uploads.list_open(ctx.db, await limits.admit(request, "read"), ctx.settings.partitions)
    body = orjson.dumps({"items": [rendering.upload(row) for row in rows]})
    return HTTPResponse(body, 200, {"Cache-Control": "no-store"}, "application/json")


@routes.head("/v1/uploads/<upload>")
async def read(request, upload: str):
    check_version(request)
    user = await limits.admit(request, "read")
    db = request.app.ctx.db
    try:
        state = await uploads.read_when_still(db, user, upload)
    except NoUpload:
        state = await uploads.read_used_part(db, user, upload)
    headers = {
        "Upload-Offset": str(state.offset),
        "Upload-Length": str(state.length),
        "Upload-Expires": expires(state.expires),
        "Cache-Control": "no-store",
    }
    if state.metadata:
        headers["Upload-Metadata"] = state.metadata
    if state.concat:
        headers["Upload-Concat"] = state.concat
    return no_content(200, headers)


@routes.patch("/v1/uploads/<upload>", stream=True)
async def patch(request, upload: str):
    check_version(request)
    ctx = request.app.ctx
    # If the client breaks off now, its bytes are already in the receive buffer and must still be committed.
    user = await uploads.run_to_completion(limits.admit(request, "upload"))
    state = await uploads.run_to_completion(uploads.read(ctx.db, user, upload))
    if state.concat.startswith("final"):
        raise Forbidden("a final upload takes no bytes")
    if request.headers.get("content-type") != BODY_TYPE:
        raise Problem(415, "type", f"a PATCH is sent as {BODY_TYPE}")
    if number(request, "Upload-Offset") != state.offset:
        raise Offset(f"the upload is at {state.offset}")
    if reading.content_length(request) > state.length - state.offset:
        raise TooLarge(f"the upload ends at {state.length}")
    image = uploads.Appender(ctx.db, ctx.objects, upload, state.offset, state.length, state.concat == "partial")
    await uploads.run_to_completion(image.resume())
    async with limits.paid_body(request, user, state.length - state.offset):
        await append(request, image)
    return empty(204, {"Upload-Offset": str(image.offset), "Upload-Expires": expires(image.expires or state.expires)})


@routes.delete("/v1/uploads/<upload>")
async def delete(request, upload: str):
    check_version(request)
    user, ctx = await limits.admit(request, "upload"), request.app.ctx
    await uploads.read(ctx.db, user, upload)
    await uploads.discard(ctx.db, ctx.objects, user, upload)
    return empty()


@routes.post("/v1/uploads/<upload>", stream=True)
async def override_method(request, upload: str):
    """For clients whose network passes only GET and POST (tus, X-HTTP-Method-Override)."""
    handlers = {"HEAD": read, "PATCH": patch, "DELETE": delete}
    handler = handlers.get(request.headers.get("x-http-method-override", "").upper())
    if handler is None:
        raise Problem(405, "method", "this address does not take this method", {"Allow": "HEAD, PATCH, DELETE"})
    return await handler(request, upload)
