"""Multipart forms that create posts. One that is refused or breaks off leaves nothing in Redis or in the store."""

import select
import socket
import time
from base64 import b64decode

import httpx
import pytest
from conftest import until
from making import bmp, encode_image, jpeg, png
from PIL import GifImagePlugin, IcoImagePlugin, TiffImagePlugin  # noqa: F401  loads these plugins for encode_image
from state import contents, files, unchanged
from wire import FORM, dial, exchange, form, head, hear, pour, reset

from storage.settings import MIB

BIG = 100 * MIB  # the largest image
BUFFERS = 16 * MIB  # more than what the buffers of both sockets can hold (4 and 6 MiB by default)
SLACK = 64 * 1024  # bytes that a form may have beside its image


def start(site, *headers: str) -> bytes:
    """The head of a form of alice's."""
    return head("POST", "/v1/posts", site.authorization(), *headers)


def send(site, body: bytes, kind: str = FORM):
    return exchange(site.port, start(site, kind, f"Content-Length: {len(body)}") + body)


def assert_problem(answer, status: int, code: str) -> None:
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json"), answer.body
    assert (answer.json()["status"], answer.json()["code"]) == (status, code)


JPEG = jpeg(60, 40)
# One pixel, made by libwebp's lossy encoder. Not every Pillow is compiled with libwebp.
WEBP = b64decode("UklGRiIAAABXRUJQVlA4IBYAAAAwAQCdASoBAAEADsD+JaQAA3AAAAAA")
FIELDS = {
    "no image": ([("caption", None, b"a")], 422, "form"),
    "no fields": ([], 422, "form"),
    "two images": ([("image", "a.jpg", JPEG), ("image", "b.jpg", JPEG)], 422, "form"),
    "two captions": ([("image", "a.jpg", JPEG), ("caption", None, b"a"), ("caption", None, b"b")], 422, "form"),
    "a caption before and after an image": (
        [("caption", None, b"a"), ("image", "a.jpg", JPEG), ("caption", None, b"b")],
        422,
        "form",
    ),
    "another field": ([("image", "a.jpg", JPEG), ("colour", None, b"blue")], 422, "form"),
    "a field without a name": ([("", None, b"a"), ("image", "a.jpg", JPEG)], 422, "form"),
    "a name with a NUL": ([("image\0", "a.jpg", JPEG)], 422, "form"),
    "an empty file": ([("image", "a.jpg", b"")], 422, "empty"),
    "an empty file before a caption": ([("image", "a.jpg", b""), ("caption", None, b"a")], 422, "empty"),
    "text named .jpg": ([("image", "a.jpg", b"this is no picture\n" * 100)], 415, "format"),
    "HTML": ([("image", "a.png", b"<html><script>alert(1)</script>")], 415, "format"),
    "SVG": ([("image", "a.svg", b'<svg xmlns="http://www.w3.org/2000/svg"/>')], 415, "format"),
    "GIF": ([("image", "a.jpg", encode_image("GIF", 60, 40, "teal"))], 415, "format"),
    "WebP": ([("image", "a.png", WEBP)], 415, "format"),
    "TIFF": ([("image", "a.bmp", encode_image("TIFF", 60, 40, "teal"))], 415, "format"),
    "ICO": ([("image", "a.bmp", encode_image("ICO", 60, 40, "teal"))], 415, "format"),
    "a JPEG after a space": ([("image", "a.jpg", b" " + JPEG)], 415, "format"),
    "one byte that might become a BMP": ([("image", "a.bmp", b"B")], 415, "format"),
    "seven bytes that might become a PNG": ([("image", "a.png", png()[:7])], 415, "format"),
    "a caption of 2,201 characters": ([("image", "a.jpg", JPEG), ("caption", None, b"a" * 2201)], 422, "invalid"),
    "a caption of 2,201 characters first": (
        [("caption", None, b"a" * 2201), ("image", "a.jpg", JPEG)],
        422,
        "invalid",
    ),
    "a caption of a MiB": ([("caption", None, b"a" * MIB), ("image", "a.jpg", JPEG)], 422, "invalid"),
    "a caption that is not UTF-8": ([("image", "a.jpg", JPEG), ("caption", None, b"a\xff")], 422, "form"),
    "a caption with half of a surrogate pair": (
        [("image", "a.jpg", JPEG), ("caption", None, b"\xed\xa0\xbd")],
        422,
        "form",
    ),
    "a caption that ends inside a character": (
        [("image", "a.jpg", JPEG), ("caption", None, "é".encode()[:1])],
        422,
        "form",
    ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_form_is_refused_because_of_its_fields(furnished, case):
    parts, status, code = FIELDS[case]
    with unchanged(furnished.server.client, furnished.folder):
        assert_problem(send(furnished, form(*parts)), status, code)


WHOLE = form(("caption", None, b"a"), ("image", "a.jpg", JPEG))
ODD = {
    "is cut in its last boundary": (FORM, WHOLE[:-4], 422, "form"),
    "is cut in its image": (FORM, WHOLE[:-200], 422, "form"),
    "is cut in a header": (FORM, WHOLE[:30], 422, "form"),
    "is empty": (FORM, b"", 422, "form"),
    "ends before it begins": (FORM, b"--frontier--\r\n", 422, "form"),
    "has another boundary": (FORM, WHOLE.replace(b"frontier", b"border"), 422, "form"),
    "has a broken boundary in the middle": (
        FORM,
        WHOLE.replace(b"\r\n--frontier\r\n", b"\r\n--fronter\r\n"),
        422,
        "form",
    ),
    "has a broken last boundary": (FORM, WHOLE.replace(b"frontier--", b"frontie--"), 422, "form"),
    "has no colon in a header": (FORM, WHOLE.replace(b"Disposition:", b"Disposition"), 422, "form"),
    "has a header without an end": (FORM, WHOLE[:60] + b"a" * 100_000, 422, "form"),
    "has a thousand headers": (
        FORM,
        WHOLE.replace(b"Content-Type", b"X: y\r\n" * 1000 + b"Content-Type"),
        422,
        "form",
    ),
    "has no disposition": (FORM, WHOLE.replace(b"Content-Disposition", b"Content-Position"), 422, "form"),
    "names no boundary": ("Content-Type: multipart/form-data", WHOLE, 422, "form"),
    "names an empty boundary": ("Content-Type: multipart/form-data; boundary=", WHOLE, 422, "form"),
    "names a boundary of 300 letters": (
        "Content-Type: multipart/form-data; boundary=" + "a" * 300,
        WHOLE,
        422,
        "form",
    ),
    "names a boundary beyond ASCII": ("Content-Type: multipart/form-data; boundary=\xff", WHOLE, 422, "form"),
    "names a boundary in UTF-8": ("Content-Type: multipart/form-data; boundary=\xe2\x98\x83", WHOLE, 422, "form"),
    "is of a type beyond ASCII": ("Content-Type: \xff", WHOLE, 415, "type"),
    "is of no type": ("X: y", WHOLE, 415, "type"),
    "is url-encoded": ("Content-Type: application/x-www-form-urlencoded", WHOLE, 415, "type"),
    "is a mixed multipart": ("Content-Type: multipart/mixed; boundary=frontier", WHOLE, 415, "type"),
    "is the image itself": ("Content-Type: image/jpeg", JPEG, 415, "type"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_form_is_refused_because_it(furnished, case):
    kind, body, status, code = ODD[case]
    with unchanged(furnished.server.client, furnished.folder):
        assert_problem(send(furnished, body, kind), status, code)


def test_the_parts_of_a_form_may_come_in_any_order_and_in_pieces_of_any_size(furnished):
    caption = "😀" * 2200
    parts = [("image", "☃.jpg", JPEG), ("caption", None, caption.encode())]
    for ordered in (parts, parts[::-1]):
        body = form(*ordered)
        for step in (len(body), 4096, 17):
            with dial(furnished.port) as line:
                line.sendall(start(furnished, FORM, "Transfer-Encoding: chunked"))
                for at in range(0, len(body), step):
                    piece = body[at : at + step]
                    line.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
                line.sendall(b"0\r\n\r\n")
                made = hear(line)
            assert made.status == 201
            assert made.json()["caption"] == caption
            assert httpx.get(furnished.url + made.headers["location"]).json()["caption"] == caption


# Forms that are too large


def form_of(length: int):
    """A form with an image that has `length` bytes in all, in pieces."""
    first = form(("image", "a.bmp", b"BM"), end=False)[:-2]
    last = b"\r\n--frontier--\r\n"
    yield first
    left = length - len(first) - len(last)
    while left > 0:
        yield bytes(min(left, 64 * 1024))
        left -= 64 * 1024
    yield last


def chunked(pieces):
    """A body in chunked encoding, which is made while it is sent. (wiretrace.chunked makes it at once.)"""
    for piece in pieces:
        yield b"%x\r\n%b\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def overhead() -> int:
    """The bytes of a form beside its image."""
    return len(form(("image", "a.bmp", b"")))


@pytest.mark.parametrize("length", [BIG + SLACK + 1, 10 * BIG, 10**17])
def test_a_form_whose_content_length_is_too_large_is_refused_before_its_body_is_read(furnished, length):
    with unchanged(furnished.server.client, furnished.folder):
        began = time.monotonic()
        request = start(furnished, FORM, f"Content-Length: {length}")
        answer, sent = pour(furnished.port, [request, *form_of(3 * BUFFERS)])
        assert_problem(answer, 413, "toolarge")
        assert answer.headers["connection"] == "close"
        assert sent < BUFFERS
        assert time.monotonic() - began < 2


def test_a_form_with_expect_100_continue_that_is_too_large_is_refused_without_a_100(furnished):
    with unchanged(furnished.server.client, furnished.folder), dial(furnished.port) as line:
        line.sendall(start(furnished, FORM, f"Content-Length: {2 * BIG}", "Expect: 100-continue"))
        answer = line.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_a_form_with_expect_100_continue_gets_a_100_before_its_body(furnished):
    with dial(furnished.port) as line:
        line.sendall(start(furnished, FORM, f"Content-Length: {len(WHOLE)}", "Expect: 100-continue"))
        assert line.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        line.sendall(WHOLE)
        assert hear(line).status == 201


def test_an_image_of_more_than_100_mib_is_refused_as_soon_as_that_many_bytes_came(furnished):
    """With a Content-Length and without. The 64 KiB beyond the image are for the other parts of the form."""
    long = overhead() + BIG + 1
    bodies = {
        f"Content-Length: {long}": form_of(long),
        "Transfer-Encoding: chunked": chunked(form_of(2 * BIG)),
    }
    for header, pieces in bodies.items():
        with unchanged(furnished.server.client, furnished.folder):
            request = start(furnished, FORM, header)
            answer, sent = pour(furnished.port, (piece for part in ([request], pieces) for piece in part))
            assert_problem(answer, 413, "toolarge")
            assert sent < BIG + BUFFERS


def test_an_image_of_100_mib_is_accepted(furnished):
    pieces = chunked(form_of(overhead() + BIG))
    request = start(furnished, FORM, "Transfer-Encoding: chunked")
    answer, _ = pour(furnished.port, (piece for part in ([request], pieces) for piece in part))
    assert answer.status == 201
    chunks = [size for name, size in files(furnished.folder / "store").items()]
    assert sum(size if isinstance(size, int) else len(size) for size in chunks) >= BIG
    with furnished.client("alice") as alice:
        assert alice.delete(answer.headers["location"]).status_code == 204


def test_an_endless_image_of_another_format_is_refused_at_its_first_bytes(furnished):
    def endless():
        yield form(("image", "a.bmp", b"GIF89a"), end=False)[:-2]
        for _ in range(1000):
            yield bytes(64 * 1024)

    with unchanged(furnished.server.client, furnished.folder):
        request = start(furnished, FORM, "Transfer-Encoding: chunked")
        answer, sent = pour(furnished.port, (piece for part in ([request], chunked(endless())) for piece in part))
        assert_problem(answer, 415, "format")
        assert sent < BUFFERS


def test_a_form_that_is_refused_because_of_its_head_is_not_read(furnished):
    with unchanged(furnished.server.client, furnished.folder):
        for request, status in [
            (head("POST", "/v1/posts", FORM, f"Content-Length: {BIG}"), 401),
            (head("POST", "/v1/nothing", FORM, f"Content-Length: {BIG}"), 404),
            (head("PUT", "/v1/posts", FORM, f"Content-Length: {BIG}"), 405),
            (start(furnished, "Content-Type: image/jpeg", f"Content-Length: {BIG}"), 415),
        ]:
            answer, sent = pour(furnished.port, [request, *form_of(3 * BUFFERS)])
            assert answer.status == status
            assert sent < BUFFERS


# Forms whose connection is cut


def close(line) -> None:
    """Sends a FIN."""
    line.close()


def half_close(line) -> None:
    """Sends a FIN, and would still read an answer."""
    line.shutdown(socket.SHUT_WR)
    select.select([line], [], [], 10)
    line.close()


@pytest.mark.parametrize("cut", [close, reset, half_close])
@pytest.mark.parametrize("sent", ["only its head", "the head of a part", "5 kB", "a chunk", "several chunks"])
def test_a_form_whose_connection_breaks_leaves_nothing(furnished, cut, sent):
    lengths = {
        "only its head": 0,
        "the head of a part": 40,
        "5 kB": 5000,
        "a chunk": MIB + 5000,
        "several chunks": 3 * MIB + 7,
    }
    client, before = furnished.server.client, (contents(furnished.server.client), files(furnished.folder))
    body = form(("image", "a.bmp", bmp(1200, 1200)))  # 4 MiB
    line = dial(furnished.port)
    line.sendall(start(furnished, FORM, f"Content-Length: {len(body)}") + body[: lengths[sent]])
    until(lambda: client.zcard("due:{0}") > len(before[0].get("due:{0}", [[]])[0]), what="the upload of the form")
    if lengths[sent] > MIB:
        until(lambda: len(files(furnished.folder)) > len(before[1]), what="a chunk")
    cut(line)
    until(lambda: (contents(client), files(furnished.folder)) == before, what="the removal of all that the form left")


def test_forms_that_break_at_any_moment_leave_nothing(furnished):
    """Each form is cut after another delay, so that some are cut during the put of a chunk or the call of a script."""
    client, before = furnished.server.client, (contents(furnished.server.client), files(furnished.folder))
    body = form(("image", "a.bmp", bmp(1200, 1200)))
    for step in range(60):
        line = dial(furnished.port)
        line.sendall(start(furnished, FORM, f"Content-Length: {len(body)}"))
        line.setblocking(False)
        view = memoryview(body)[: -1 - step]
        deadline = time.monotonic() + step * 0.0005
        while view and time.monotonic() < deadline:
            if select.select([], [line], [], 0)[1]:
                view = view[line.send(view[:100_000]) :]
        (reset if step % 2 else close)(line)
    until(lambda: (contents(client), files(furnished.folder)) == before, what="the removal of all that the forms left")
    with unchanged(client, furnished.folder):
        assert_problem(send(furnished, b""), 422, "form")
