"""JPEG files that are damaged, cut, odd but whole, or of kinds that are not decoded: each made here, byte by byte."""

import random
import re
import struct
import subprocess
import sys
import tempfile

import pytest
from conftest import ROOT
from golden import card, saved
from hostile import many_scans, segment
from PIL import Image, ImageChops
from PIL.JpegImagePlugin import JpegImageFile

from storage import settings
from workers import errors, pipeline, sandbox
from workers.jpeg import Jpeg

EOI = b"\xff\xd9"
SIZE = (640, 480)


def grain(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """A card under noise, so that each block has many bytes in the file."""
    image = card(*size).convert(mode)
    noise = Image.frombytes(mode, SIZE, random.Random(7).randbytes(SIZE[0] * SIZE[1] * len(mode)))
    return Image.blend(image, noise.resize(size), 0.2)


def jpeg(mode: str = "RGB", **how) -> bytes:
    return saved(grain(mode), "JPEG", **{"quality": 80, **how})


def scan(data: bytes) -> int:
    """Where the coded bytes of the first scan begin."""
    at = data.index(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def scan_end(data: bytes) -> int:
    return re.compile(rb"\xff[^\x00\xd0-\xd7]").search(data, scan(data)).start()


def middle(data: bytes) -> int:
    return (scan(data) + scan_end(data)) // 2


def at(data: bytes, place: int, *values: int) -> bytes:
    """The file with these bytes from `place` on instead of its own."""
    return data[:place] + bytes(values) + data[place + len(values) :]


def before(data: bytes, place: int, extra: bytes) -> bytes:
    return data[:place] + extra + data[place:]


def struck(data: bytes) -> bytes:
    """200 bytes in the middle of the first scan are others; none of them begins a marker."""
    chance = random.Random(3)
    return at(data, middle(data), *(chance.randrange(255) for _ in range(200)))


def holed(data: bytes) -> bytes:
    """Without 200 bytes in the middle of the first scan: what follows is shifted, and the last blocks are missing."""
    return data[: middle(data)] + data[middle(data) + 200 :]


def without_interval(data: bytes) -> bytes:
    """Without what stands between the third restart marker and the fourth."""
    return data[: data.index(b"\xff\xd2")] + data[data.index(b"\xff\xd3") :]


def flat(factors: tuple[int, ...], frame=0xC0, precision=8, height=480, after=b"") -> bytes:
    """A grey card in sequential Huffman coding (ITU T.81, annex F), which says "nothing" of each block in two bits.

    `factors` are each component's sampling: 0x21 is two across and one down. `after` follows the scan.
    """
    ways = [divmod(factor, 16) for factor in factors]
    across, down = (8 * max(factors) for factors in zip(*ways, strict=True))
    blocks = -(-640 // across) * -(-480 // down) * sum(x * y for x, y in ways)
    one_code = b"\1" + bytes(15)  # a Huffman table of a single symbol, whose code is one bit, 0
    parts = b"".join(bytes([number, factor, 0]) for number, factor in enumerate(factors))
    begin = bytes([len(factors)]) + b"".join(bytes([number, 0]) for number in range(len(factors))) + b"\0\x3f\0"
    tables = segment(0xDB, b"\0" + b"\1" * 64)
    tables += segment(0xC4, b"\0" + one_code + b"\0") + segment(0xC4, b"\x10" + one_code + b"\0")
    head = segment(frame, struct.pack(">BHHB", precision, height, 640, len(factors)) + parts)
    return b"\xff\xd8" + tables + head + segment(0xDA, begin) + bytes(2 * blocks // 8) + after + EOI


def write(data: bytes, file) -> None:
    file.write(data)
    file.seek(0)


def convert(data: bytes) -> pipeline.Picture:
    with tempfile.TemporaryFile() as file:
        write(data, file)
        return pipeline.convert(file, 100, 30_000)


def fault(data: bytes) -> errors.Unusable:
    with pytest.raises(errors.Unusable) as caught:
        convert(data)
    return caught.value


PLAIN, PROGRESSIVE = jpeg(), jpeg(progressive=True)
KINDS = {
    "baseline": PLAIN,
    "progressive": PROGRESSIVE,
    "4:2:0": jpeg(subsampling="4:2:0"),
    "grey": jpeg("L"),
    "CMYK": jpeg("CMYK"),
    "with restarts": jpeg(restart_marker_blocks=40),
}
WITH_ADOBE = PLAIN[:2] + segment(0xEE, b"Adobe\0\x64\0\0\0\0\1") + PLAIN[20:]  # instead of JFIF's segment
PROFILE = segment(0xE2, b"ICC_PROFILE\0\2\1" + bytes(200))  # the second of one
HEADS = {  # headers that libjpeg warns about, and the same file with a usual one
    "bytes between segments": (before(PLAIN, PLAIN.index(b"\xff\xdb"), b"\0\1\2"), PLAIN),
    "fill bytes": (before(PLAIN, PLAIN.index(b"\xff\xdb"), b"\xff\xff"), PLAIN),
    "another revision of JFIF": (at(PLAIN, 11, 2), PLAIN),
    "an unknown colour transform": (at(WITH_ADOBE, 17, 7), WITH_ADOBE),
    "a damaged profile": (before(PLAIN, 20, PROFILE), PLAIN),
    "unused scan parameters": (at(PLAIN, scan(PLAIN) - 3, 0, 0, 0), PLAIN),  # as some telephones write them
}
ENDS = {
    "bytes behind the end": (PLAIN + b"\xff\xd8 and more", PLAIN),
    "bytes before the end": (before(PLAIN, len(PLAIN) - 2, b"\1\2\3"), PLAIN),
    "bytes behind a scan": (before(PROGRESSIVE, scan_end(PROGRESSIVE), b"\1\2\3"), PROGRESSIVE),
    "no end": (PLAIN[:-2], PLAIN),
    "half an end": (PLAIN[:-1], PLAIN),
}
DAMAGED = {
    **{f"bytes lost, {kind}": holed(data) for kind, data in KINDS.items()},
    **{f"bytes lost behind a harmless fault, {name}": holed(odd) for name, (odd, _) in HEADS.items()},
    "other bytes": struck(PROGRESSIVE),
    "a restart interval less": without_interval(KINDS["with restarts"]),
    "an end in the middle": PLAIN[: middle(PLAIN)] + EOI,
    "a table less": PLAIN.replace(b"\xff\xdb", b"\xff\xef", 1),
    "no scan where libjpeg looks for one": before(PLAIN, 2, b"\xff\xf0\xff\xff")[: 2 + 60_000],
    "no height, and none behind the scan": flat((0x11,), height=0),
    "no component": flat((0x11,)).replace(b"\1\0\x11\0\xff", b"\0\0\x11\0\xff"),
}
CUT = {
    **{f"in the middle, {kind}": data[: middle(data)] for kind, data in KINDS.items()},
    **{f"in the middle, behind a harmless fault, {name}": odd[: middle(odd)] for name, (odd, _) in HEADS.items()},
    "before the scan": PLAIN[: scan(PLAIN)],
    "in a table": PLAIN[: PLAIN.index(b"\xff\xdb") + 20],
    "between scans": PROGRESSIVE[: scan_end(PROGRESSIVE)],
    "between scans, behind a harmless fault": ENDS["bytes behind a scan"][0][:-2],
}
UNSUPPORTED = {
    "a JPEG of 12 bits a sample": flat((0x22, 0x11, 0x11), 0xC1, precision=12),
    "a JPEG of 2 components": flat((0x11, 0x11)),
    "a JPEG with a subsampling by fractions": flat((0x31, 0x21, 0x11)),
    "a JPEG that states its height after its first scan (DNL)": flat((0x11,), height=0, after=segment(0xDC, b"\1\xe0")),
    "a lossless JPEG": flat((0x11,), 0xC3, precision=16),
    "a hierarchical JPEG": before(flat((0x11,)), 2, segment(0xDE, struct.pack(">BHHB3B", 8, 480, 640, 1, 0, 0x11, 0))),
    "a JPEG-LS image": flat((0x11,), 0xF7),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_libjpeg_reports_as_damage_is_refused(name):
    refused = fault(DAMAGED[name])
    assert (refused.code, refused.detail) == ("undecodable", "the image is damaged and cannot be decoded")


@pytest.mark.parametrize("name", CUT)
def test_a_file_that_is_cut_is_told_from_one_that_is_damaged(name):
    assert fault(CUT[name]).code == "truncated"


@pytest.mark.parametrize("name", HEADS | ENDS)
def test_what_cameras_write_and_libjpeg_only_warns_about_is_shown(name):
    odd, usual = (HEADS | ENDS)[name]
    assert convert(odd) == convert(usual)


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_a_valid_file_that_is_not_decoded_says_what_it_is(what):
    refused = fault(UNSUPPORTED[what])
    assert (refused.code, refused.detail) == ("unsupported", f"the file is {what}, which is not supported")


@pytest.mark.parametrize("factors", [(0x31, 0x11, 0x11), (0x11, 0x22, 0x22), (0x12, 0x11, 0x11, 0x11)])
def test_an_unusual_subsampling_is_decoded_too(factors):
    assert convert(flat(factors)) == convert(flat((0x11,) * len(factors)))


def decoded(kind, data: bytes, side: int | None) -> Image.Image:
    with tempfile.TemporaryFile() as file:
        write(data, file)
        image = kind(file)
        if side:
            image.draft(None, (side, side))
        image.load()
        return image.convert("RGB") if image.mode == "RGBX" else image.copy()


ALIKE = KINDS | {
    "4:2:2": jpeg(subsampling="4:2:2"),
    "RGB": jpeg(keep_rgb=True),
    "YCCK": before(jpeg("CMYK"), 2, segment(0xEE, b"Adobe\0\x64\0\0\0\0\2")),
    "Adobe's CMYK": before(jpeg("CMYK"), 2, segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")),
    "arithmetic": flat((0x22, 0x11, 0x11), 0xC9),
    "one pixel": saved(grain().resize((1, 1)), "JPEG"),
    "odd sides": saved(grain().resize((641, 473)), "JPEG", subsampling="4:2:0"),
}


@pytest.mark.parametrize("name", ALIKE)
def test_pixels_are_those_that_pillow_decodes(name):
    for side in (None, 100, 160):
        ours, pillows = decoded(Jpeg, ALIKE[name], side), decoded(JpegImageFile, ALIKE[name], side)
        assert (ours.mode, ours.size) == (pillows.mode, pillows.size)
        extrema = ImageChops.difference(ours, pillows).getextrema()
        assert max(most for _, most in ([extrema] if ours.mode == "L" else extrema)) <= 2


def test_memory_that_libjpeg_lacks_is_no_damage(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "PROGRAM", "from workers import sandbox; sandbox.PIXEL = 1; sandbox.serve()")
    sandbox.stop()
    path = tmp_path / "original"
    path.write_bytes(many_scans(10_000, 10_000, 2))
    with pytest.raises(errors.Unusable) as caught:
        sandbox.convert(path, settings.load({}))
    sandbox.stop()
    assert caught.value.code == "too_costly" and "memory" in caught.value.cause.lower()


def test_decoding_starts_no_thread():
    """numpy, which simplejpeg loads, would start one for each further core; a fork beside threads can lock up."""
    program = "import os, workers.sandbox; print(len(os.listdir('/proc/self/task')))"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, cwd=ROOT, stdout=-1, check=True, env=sandbox.ENVIRONMENT).stdout == b"1\n"
