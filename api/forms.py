"""A post sent as multipart/form-data (RFC 7578): a file `image` and a text `caption`, in either order.

The body is parsed as it arrives and written to an upload chunk by chunk. The server keeps no copy of it in memory or on
its own disk. A form that breaks off or is refused leaves nothing behind.
"""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api import limits, reading
from api.problems import Problem
from storage import posts, uploads
from storage.errors import Empty, TooLarge
from storage.settings import FORM_SLACK, IMAGE_BYTES, TEXT_CHARACTERS

NAME_CHARACTERS = 64  # of a field's name, which a problem repeats
CAPTION_BYTES = 4 * TEXT_CHARACTERS  # UTF-8 has up to 4 bytes a character


def damaged(detail: str, **where: str) -> Problem:
    return Problem(422, "form", detail, where=where)


class Form:
    """A form's parser and what it has parsed so far, part by part."""

    def __init__(self, boundary: bytes):
        self.names: set[str] = set()  # fields that have begun
        self.complete = False
        self._parsed: list[tuple[str, bytes]] = []  # (field, data) in order of arrival
        self._field = ""
        self._disposition = b""
        self._header = self._value = b""
        callbacks = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header_name,
            "on_header_value": self._add_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_data,
            "on_end": self._end,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)
        except FormParserError:
            raise damaged("the form's boundary is too long") from None

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        """Parse bytes of the body. Returns the (field, data) pairs in them. Raises Problem 422."""
        self._parsed = []
        try:
            self._parser.write(data)
        except FormParserError:
            raise damaged("the form is damaged: its parts or their headers are malformed") from None
        return self._parsed

    def _begin_part(self):
        self._field = ""
        self._disposition = b""

    def _add_header_name(self, data, start, end):
        self._header += data[start:end]

    def _add_header_value(self, data, start, end):
        self._value += data[start:end]

    def _end_header(self):
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _end_headers(self):
        kind, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode("utf-8", "replace")[:NAME_CHARACTERS]
        if kind != b"form-data" or self._field not in ("image", "caption"):
            raise damaged(f"a form has the fields image and caption, not {self._field!r}", parameter=self._field)
        if self._field in self.names:
            raise damaged(f"a form has one {self._field}", parameter=self._field)
        self.names.add(self._field)

    def _add_data(self, data, start, end):
        self._parsed.append((self._field, data[start:end]))

    def _end(self):
        self.complete = True


def boundary(request) -> bytes:
    """The form's boundary. Raises Problem 422 if there is none, TooLarge if the declared length is too large."""
    content_type = request.headers.get("content-type", "")
    if not content_type.isascii():
        raise damaged("the form's boundary is not ASCII")
    _, options = parse_options_header(content_type)
    if reading.content_length(request) > IMAGE_BYTES + FORM_SLACK:
        raise TooLarge(f"an image may have up to {IMAGE_BYTES} bytes")
    if not options.get(b"boundary"):
        raise damaged("the form names no boundary")
    return options[b"boundary"]


async def publish(request, user: str) -> tuple[str, str, bool]:
    """Receive a form and make a post of it. Returns the post's id, its caption, and whether it existed already.

    A repeated form is answered before its body is read, so the two bodies are not compared. If two forms with one
    Idempotency-Key arrive at the same time, the one that ends second gets the post of the first.

    Raises Problem, TooLarge, Format, Empty, Quota, Busy, NoPost.
    """
    ctx, form, idempotency = request.app.ctx, Form(boundary(request)), reading.idempotency_key(request, body=None)
    partitions, processing = ctx.settings.partitions, ctx.settings.processing
    if idempotency and (post := await posts.replayed(ctx.db, user, partitions, idempotency)):
        return post.id, post.caption, True
    length = reading.content_length(request) or IMAGE_BYTES  # of a chunked form the length is unknown
    async with (
        limits.paid_body(request, user, IMAGE_BYTES + FORM_SLACK),
        uploads.form_upload(ctx.db, ctx.objects, user, partitions, length, processing) as image,
    ):
        caption = await receive(request, form, image)
        try:
            await image.finish()
        except Empty as error:  # in a JSON body another member would be wrong, so the table of problems does not fit
            raise Problem(422, "empty", str(error), where={"parameter": "image"}) from None
        post, outcome = await posts.create(ctx.db, user, image.upload, caption, idempotency, processing)
    if outcome == posts.REPLAYED:
        await uploads.discard(ctx.db, ctx.objects, user, image.upload)
        caption = (await posts.read(ctx.db, post)).caption
    return post, caption, outcome == posts.REPLAYED


async def receive(request, form: Form, image: uploads.Appender) -> str:
    """Write the form's image as it arrives. Returns the caption. Raises Problem 422, TooLarge, Format."""
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
    if not form.complete:
        raise damaged("the form has no end")
    if "image" not in form.names:
        raise damaged("the form has no image", parameter="image")
    try:
        return reading.text(caption.decode(), "caption", parameter="caption")
    except UnicodeDecodeError:
        raise damaged("caption is not UTF-8", parameter="caption") from None
