"""Resumable uploads: tus 1.0.0 (https://tus.io/protocols/resumable-upload), extensions creation,
creation-with-upload, expiration and termination. No locks, so never 423: the offset moves by compare-and-set.
"""

import binascii
import re
from base64 import b64decode
from email.utils import formatdate

import orjson
from sanic import Blueprint
from sanic.response import HTTPResponse, empty

from api import reading, rendering, tokens
from api.answers import READ
from api.bodies import append
from api.problems import TUS_VERSION as VERSION
from api.problems import Problem, answer_to
from storage import uploads
from storage.errors import NoUpload, Offset, Refusal, TooLarge
from storage.objects import Unavailable
from storage.settings import IMAGE_BYTES

routes = Blueprint("uploads")

CAPABILITIES = {
    "Tus-Version": VERSION,
    "Tus-Extension": "creation,creation-with-upload,expiration,termination",
    "Tus-Max-Size": str(IMAGE_BYTES),
}
BODY = "application/offset+octet-stream"
NUMBER = re.compile(r"0|[1-9][0-9]{0,15}")
KEY = re.compile(r"[!-+\--~]+")  # ASCII, no space and no comma
METADATA_BYTES = 4096


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
    """Upload-Metadata as it was sent: keys, each once, and Base64 values that may be missing. Raises Problem 400."""
    text, seen = request.headers.get("upload-metadata", ""), set()
    malformed = len(text) > METADATA_BYTES
    for pair in text.split(",") if text else ():
        key, _, value = pair.strip(" ").partition(" ")
        try:
            b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            malformed = True
        malformed = malformed or not KEY.fullmatch(key) or key in seen
        seen.add(key)
    if malformed:
        raise Problem(400, "malformed", "Upload-Metadata must be pairs of a key and a Base64 value")
    return text


def expires(ms: int) -> str:
    """An HTTP date (RFC 9110, section 5.6.7)."""
    return formatdate(ms // 1000, usegmt=True)


def no_content(status: int, answer: dict[str, str]) -> HTTPResponse:
    """Headers only, where a body could be. Sanic's `empty` would name its type `None`."""
    return HTTPResponse(b"", status, answer, "text/plain")


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
    user = tokens.user(request)
    length, sent_metadata = number(request, "Upload-Length"), metadata(request)
    if reading.content_length(request) > length:
        raise TooLarge(f"the upload ends at {length}")
    ctx = request.app.ctx
    ctx.objects.check_free_space()
    idempotency = reading.idempotency_key(request, f"{length} {sent_metadata}".encode())
    upload, replayed = await uploads.run_to_completion(
        uploads.create(ctx.db, user, ctx.settings.partitions, length, sent_metadata, idempotency)
    )
    answer = {"Location": f"/v1/uploads/{upload}"}
    if replayed:
        answer["Idempotent-Replayed"] = "true"
    try:
        found = await uploads.run_to_completion(uploads.read(ctx.db, user, upload))
    except NoUpload:  # it has become a post, or was deleted, since it was made
        return no_content(201, answer)
    if request.headers.get("content-type") == BODY and not replayed:
        image = uploads.Appender(ctx.db, ctx.objects, upload, found.offset, length)
        try:
            await append(request, image)
        except (Problem, Refusal, Unavailable) as error:
            # Once it is created the client must learn where. What could not be written now is sent by PATCH.
            refused = answer_to(error)
            if refused.status < 500:
                refused.headers.update(answer)
                return refused
        found = found._replace(offset=image.offset, expires=image.expires or found.expires)
    return no_content(201, {**answer, "Upload-Offset": str(found.offset), "Upload-Expires": expires(found.expires)})


@routes.route("/v1/uploads", methods=READ)
async def list_open(request):
    """Not a call of tus: it needs no Tus-Resumable."""
    ctx = request.app.ctx
    found = await uploads.list_open(ctx.db, tokens.user(request), ctx.settings.partitions)
    body = orjson.dumps({"items": [rendering.upload(row) for row in found]})
    return HTTPResponse(body, 200, {"Cache-Control": "no-store"}, "application/json")


@routes.head("/v1/uploads/<upload>")
async def read(request, upload: str):
    check_version(request)
    found = await uploads.read_when_still(request.app.ctx.db, tokens.user(request), upload)
    answer = {
        "Upload-Offset": str(found.offset),
        "Upload-Length": str(found.length),
        "Upload-Expires": expires(found.expires),
        "Cache-Control": "no-store",
    }
    if found.metadata:
        answer["Upload-Metadata"] = found.metadata
    return no_content(200, answer)


@routes.patch("/v1/uploads/<upload>", stream=True)
async def patch(request, upload: str):
    check_version(request)
    user, ctx = tokens.user(request), request.app.ctx
    # A client that sends and breaks off at once has sent all the same.
    found = await uploads.run_to_completion(uploads.read(ctx.db, user, upload))
    if request.headers.get("content-type") != BODY:
        raise Problem(415, "type", f"a PATCH is sent as {BODY}")
    if number(request, "Upload-Offset") != found.offset:
        raise Offset(f"the upload is at {found.offset}")
    if reading.content_length(request) > found.length - found.offset:
        raise TooLarge(f"the upload ends at {found.length}")
    image = uploads.Appender(ctx.db, ctx.objects, upload, found.offset, found.length)
    await uploads.run_to_completion(image.resume())
    await append(request, image)
    return empty(204, {"Upload-Offset": str(image.offset), "Upload-Expires": expires(image.expires or found.expires)})


@routes.delete("/v1/uploads/<upload>")
async def delete(request, upload: str):
    check_version(request)
    user, ctx = tokens.user(request), request.app.ctx
    await uploads.read(ctx.db, user, upload)
    await uploads.discard(ctx.db, ctx.objects, user, upload)
    return empty()


@routes.post("/v1/uploads/<upload>", stream=True)
async def override_method(request, upload: str):
    """For clients whose network knows only GET and POST (tus, X-HTTP-Method-Override)."""
    verbs = {"HEAD": read, "PATCH": patch, "DELETE": delete}
    verb = verbs.get(request.headers.get("x-http-method-override_method", "").upper())
    if verb is None:
        raise Problem(405, "method", "this address does not take this method", {"Allow": "HEAD, PATCH, DELETE"})
    return await verb(request, upload)
