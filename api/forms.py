"""A post by multipart/form-data (RFC 7578): `image`, a file, and `caption`, text, in either order.

The body is parsed as it arrives and goes into an upload chunk by chunk; nothing of it is kept in memory or on disk
here. A form that breaks off or is refused leaves nothing behind.
"""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api import reading
from api.problems import Problem
from storage import posts, uploads
from storage.errors import Empty, TooLarge
from storage.settings import FORM_SLACK, IMAGE_BYTES, TEXT_CHARACTERS

NAME_CHARACTERS = 64  # of a field's name, which a problem repeats
CAPTION_BYTES = 4 * TEXT_CHARACTERS  # UTF-8 has up to 4 bytes a character


def damaged(detail: str, **where: str) -> Problem:
    return Problem(422, "form", detail, where=where)


class Form:
    """What a parser's callbacks have seen so far, part by part."""

    def __init__(self, boundary: bytes):
        self.seen: list[tuple[str, bytes]] = []  # (field, data) in order of arrival
        self.names: set[str] = set()
        self.ended = False
        self._field = ""
        self._header = self._value = b""
        callbacks = {
            "on_part_begin": self._begin,
            "on_header_field": self._on_header,
            "on_header_value": self._on_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers,
            "on_part_data": self._on_data,
            "on_end": self._on_end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError:
            raise damaged("the form's boundary is too long") from None

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        """The (field, data) pairs these bytes bring. Raises Problem 422."""
        self.seen = []
        try:
            self._parser.write(data)
        except FormParserError:
            raise damaged("the form is damaged: its parts or their headers are malformed") from None
        return self.seen

    def _begin(self):
        self._field, self._disposition = "", b""

    def _on_header(self, data, start, end):
        self._header += data[start:end]

    def _on_value(self, data, start, end):
        self._value += data[start:end]

    def _on_header_end(self):
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _on_headers(self):
        kind, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode("utf-8", "replace")[:NAME_CHARACTERS]
        if kind != b"form-data" or self._field not in ("image", "caption"):
            raise damaged(f"a form has the fields image and caption, not {self._field!r}", parameter=self._field)
        if self._field in self.names:
            raise damaged(f"a form has one {self._field}", parameter=self._field)
        self.names.add(self._field)

    def _on_data(self, data, start, end):
        self.seen.append((self._field, data[start:end]))

    def _on_end(self):
        self.ended = True


def boundary(request) -> bytes:
    """Raises TooLarge for a form that is declared too long, Problem 422 for one without boundary."""
    declared = request.headers.get("content-type", "")
    if not declared.isascii():
        raise damaged("the form's boundary is not ASCII")
    _, options = parse_options_header(declared)
    if reading.content_length(request) > IMAGE_BYTES + FORM_SLACK:
        raise TooLarge(f"an image may have up to {IMAGE_BYTES} bytes")
    if not options.get(b"boundary"):
        raise damaged("the form names no boundary")
    return options[b"boundary"]


async def publish(request, user: str) -> tuple[str, str, bool]:
    """Take a form and make a post of it. Returns its id, its caption and whether this was done before.

    A repeated form is answered before its body is read, and not compared with the first. Of two under one
    Idempotency-Key at the same time, the second to end gets the first one's post.
    Raises Problem, TooLarge, Format, Empty, Quota, Busy, NoPost.
    """
    ctx, form, idempotency = request.app.ctx, Form(boundary(request)), reading.idempotency_key(request, body=None)
    if idempotency and (post := await posts.replayed(ctx.db, user, ctx.settings.partitions, idempotency)):
        return post.id, post.caption, True
    partitions, processing = ctx.settings.partitions, ctx.settings.processing
    declared = reading.content_length(request) or IMAGE_BYTES  # of a chunked form nothing is known
    async with uploads.form_upload(ctx.db, ctx.objects, user, partitions, declared, processing) as image:
        caption = await receive(request, form, image)
        try:
            await image.finish()
        except Empty as error:  # of JSON that names an upload it is another member that is wrong
            raise Problem(422, "empty", str(error), where={"parameter": "image"}) from None
        post, how = await posts.create(ctx.db, user, image.upload, caption, idempotency, processing)
    if how == posts.REPLAYED:
        await uploads.discard(ctx.db, ctx.objects, user, image.upload)
        caption = (await posts.read(ctx.db, post)).caption
    return post, caption, how == posts.REPLAYED


async def receive(request, form: Form, image: uploads.Appender) -> str:
    """Write the form's image as it arrives. Returns the caption. Raises Problem, TooLarge, Format."""
    received, caption = 0, bytearray()
    async for body in request.stream:
        received += len(body)
        if received > IMAGE_BYTES + FORM_SLACK:
            raise TooLarge(f"an image may have up to {IMAGE_BYTES} bytes")
        for field, data in form.feed(body):
            if field == "image":
                await image.write(data)
            elif len(caption) + len(data) > CAPTION_BYTES:
                raise reading.invalid(f"caption may have up to {TEXT_CHARACTERS} characters", parameter="caption")
            else:
                caption += data
    if not form.ended:
        raise damaged("the form has no end")
    if "image" not in form.names:
        raise damaged("the form has no image", parameter="image")
    try:
        return reading.text(caption.decode(), "caption", parameter="caption")
    except UnicodeDecodeError:
        raise damaged("caption is not UTF-8", parameter="caption") from None
