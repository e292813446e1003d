"""JPEG files, created here byte by byte.

| table | files | end with |
|---|---|---|
| DAMAGED | bytes are lost or changed | undecodable |
| CUT | the end is missing | truncated |
| HEADS, ENDS | unusual but complete: libjpeg only warns | the picture of the usual file |
| UNSUPPORTED | valid, but of a kind that is not decoded | unsupported |
| ALIKE | usual | Pillow's pixels |
"""

import os
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


def noisy_card(mode: str = "RGB") -> Image.Image:
    """A card under noise, so that each block has many bytes in the file."""
    noise = Image.frombytes(mode, SIZE, random.Random(7).randbytes(SIZE[0] * SIZE[1] * len(mode)))
    return Image.blend(card(*SIZE).convert(mode), noise, 0.2)


def jpeg(mode: str = "RGB", **options) -> bytes:
    return saved(noisy_card(mode), "JPEG", **{"quality": 80, **options})


def scan_start(data: bytes) -> int:
    """The byte where the coded bytes of the first scan begin."""
    sos = data.index(b"\xff\xda")
    return sos + 2 + int.from_bytes(data[sos + 2 : sos + 4], "big")


def scan_end(data: bytes) -> int:
    """The byte where they end: the next marker that is not a restart."""
    return re.compile(rb"\xff[^\x00\xd0-\xd7]").search(data, scan_start(data)).start()


def middle(data: bytes) -> int:
    """The byte in the middle of the first scan."""
    return (scan_start(data) + scan_end(data)) // 2


def overwritten(data: bytes, place: int, *values: int) -> bytes:
    """The file with other bytes from `place` on."""
    return data[:place] + bytes(values) + data[place + len(values) :]


def inserted(data: bytes, place: int, extra: bytes) -> bytes:
    """The file with extra bytes before `place`."""
    return data[:place] + extra + data[place:]


def with_random_bytes(data: bytes) -> bytes:
    """The file with 200 random bytes in the middle of the first scan. None of them begins a marker."""
    chance = random.Random(3)
    return overwritten(data, middle(data), *(chance.randrange(255) for _ in range(200)))


def with_gap(data: bytes) -> bytes:
    """The file without 200 bytes in the middle of the first scan. Later blocks are shifted; the last are missing."""
    return data[: middle(data)] + data[middle(data) + 200 :]


def without_interval(data: bytes) -> bytes:
    """The file without the bytes between the third restart marker and the fourth."""
    return data[: data.index(b"\xff\xd2")] + data[data.index(b"\xff\xd3") :]


def flat(factors: tuple[int, ...], frame=0xC0, precision=8, height=480, after=b"") -> bytes:
    """A grey card of 640x480 in sequential Huffman coding (ITU T.81, annex F). Each block is two bits: no coefficient.

    `factors`: the sampling of each component; 0x21 is two horizontal and one vertical. `frame`: the code of the SOF
    marker. `height`: what the frame header states. `after`: bytes after the scan.
    """
    samplings = [divmod(factor, 16) for factor in factors]
    unit_width, unit_height = (8 * max(direction) for direction in zip(*samplings, strict=True))
    blocks = -(-640 // unit_width) * -(-480 // unit_height) * sum(x * y for x, y in samplings)
    one_code = b"\1" + bytes(15)  # a Huffman table with a single symbol, whose code is one bit, 0
    components = b"".join(bytes([number, factor, 0]) for number, factor in enumerate(factors))
    scan_components = b"".join(bytes([number, 0]) for number in range(len(factors)))
    tables = segment(0xDB, b"\0" + b"\1" * 64)
    tables += segment(0xC4, b"\0" + one_code + b"\0") + segment(0xC4, b"\x10" + one_code + b"\0")
    frame_header = segment(frame, struct.pack(">BHHB", precision, height, 640, len(factors)) + components)
    scan_header = segment(0xDA, bytes([len(factors)]) + scan_components + b"\0\x3f\0")
    return b"\xff\xd8" + tables + frame_header + scan_header + bytes(2 * blocks // 8) + after + EOI


def write(data: bytes, file) -> None:
    file.write(data)
    file.seek(0)


def convert(data: bytes) -> pipeline.Picture:
    """The picture of the file, from the pipeline in this process."""
    with tempfile.TemporaryFile() as file:
        write(data, file)
        return pipeline.convert(file, 100, 30_000)


def fault(data: bytes) -> errors.Unusable:
    """The fault that the pipeline must raise."""
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
PROFILE = segment(0xE2, b"ICC_PROFILE\0\2\1" + bytes(200))  # its number is 2 of 1
HEADS = {  # a file whose header libjpeg warns about, and the same file with a usual header
    "bytes between segments": (inserted(PLAIN, PLAIN.index(b"\xff\xdb"), b"\0\1\2"), PLAIN),
    "fill bytes": (inserted(PLAIN, PLAIN.index(b"\xff\xdb"), b"\xff\xff"), PLAIN),
    "another revision of JFIF": (overwritten(PLAIN, 11, 2), PLAIN),
    "an unknown colour transform": (overwritten(WITH_ADOBE, 17, 7), WITH_ADOBE),
    "a damaged profile": (inserted(PLAIN, 20, PROFILE), PLAIN),
    "unused scan parameters": (overwritten(PLAIN, scan_start(PLAIN) - 3, 0, 0, 0), PLAIN),  # as some phones write them
}
ENDS = {  # a file with an unusual end, and the same file with a usual end
    "bytes after the end": (PLAIN + b"\xff\xd8 and more", PLAIN),
    "bytes before the end": (inserted(PLAIN, len(PLAIN) - 2, b"\1\2\3"), PLAIN),
    "bytes after a scan": (inserted(PROGRESSIVE, scan_end(PROGRESSIVE), b"\1\2\3"), PROGRESSIVE),
    "no end": (PLAIN[:-2], PLAIN),
    "half an end": (PLAIN[:-1], PLAIN),
}
DAMAGED = {
    **{f"bytes lost, {kind}": with_gap(data) for kind, data in KINDS.items()},
    **{f"bytes lost after a harmless fault, {name}": with_gap(odd) for name, (odd, _) in HEADS.items()},
    "random bytes": with_random_bytes(PROGRESSIVE),
    "a missing restart interval": without_interval(KINDS["with restarts"]),
    "an end in the middle": PLAIN[: middle(PLAIN)] + EOI,
    "a missing table": PLAIN.replace(b"\xff\xdb", b"\xff\xef", 1),
    "no scan where libjpeg looks for one": inserted(PLAIN, 2, b"\xff\xf0\xff\xff")[: 2 + 60_000],
    "no height, and none after the scan": flat((0x11,), height=0),
    "no component": flat((0x11,)).replace(b"\1\0\x11\0\xff", b"\0\0\x11\0\xff"),
}
CUT = {
    **{f"in the middle, {kind}": data[: middle(data)] for kind, data in KINDS.items()},
    **{f"in the middle, after a harmless fault, {name}": odd[: middle(odd)] for name, (odd, _) in HEADS.items()},
    "before the scan": PLAIN[: scan_start(PLAIN)],
    "in a table": PLAIN[: PLAIN.index(b"\xff\xdb") + 20],
    "between scans": PROGRESSIVE[: scan_end(PROGRESSIVE)],
    "between scans, after a harmless fault": ENDS["bytes after a scan"][0][:-2],
}
UNSUPPORTED = {
    "a JPEG of 12 bits a sample": flat((0x22, 0x11, 0x11), 0xC1, precision=12),
    "a JPEG of 2 components": flat((0x11, 0x11)),
    "a JPEG with a subsampling by fractions": flat((0x31, 0x21, 0x11)),
    "a JPEG that states its height after its first scan (DNL)": flat((0x11,), height=0, after=segment(0xDC, b"\1\xe0")),
    "a lossless JPEG": flat((0x11,), 0xC3, precision=16),
    "a hierarchical JPEG": inserted(
        flat((0x11,)), 2, segment(0xDE, struct.pack(">BHHB3B", 8, 480, 640, 1, 0, 0x11, 0))
    ),
    "a JPEG-LS image": flat((0x11,), 0xF7),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_undecodable(name):
    refused = fault(DAMAGED[name])
    assert (refused.code, refused.detail) == ("undecodable", "the image is damaged and cannot be decoded")


@pytest.mark.parametrize("name", CUT)
def test_a_cut_file_is_truncated_and_not_undecodable(name):
    assert fault(CUT[name]).code == "truncated"


@pytest.mark.parametrize("name", HEADS | ENDS)
def test_an_unusual_but_complete_file_gives_the_same_picture_as_the_usual_file(name):
    odd, usual = (HEADS | ENDS)[name]
    assert convert(odd) == convert(usual)


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_the_refusal_of_an_unsupported_file_names_its_kind(what):
    refused = fault(UNSUPPORTED[what])
    assert (refused.code, refused.detail) == ("unsupported", f"the file is {what}, which is not supported")


@pytest.mark.parametrize("factors", [(0x31, 0x11, 0x11), (0x11, 0x22, 0x22), (0x12, 0x11, 0x11, 0x11)])
def test_an_unusual_subsampling_gives_the_same_picture_as_none(factors):
    assert convert(flat(factors)) == convert(flat((0x11,) * len(factors)))


def decoded(reader, data: bytes, side: int | None) -> Image.Image:
    """All pixels as RGB, L or CMYK. `side`: pixels a side that draft() is asked for; None: the full size."""
    with tempfile.TemporaryFile() as file:
        write(data, file)
        image = reader(file)
        if side:
            image.draft(None, (side, side))
        image.load()
        return image.convert("RGB") if image.mode == "RGBX" else image.copy()


ALIKE = KINDS | {
    "4:2:2": jpeg(subsampling="4:2:2"),
    "RGB": jpeg(keep_rgb=True),
    "YCCK": inserted(jpeg("CMYK"), 2, segment(0xEE, b"Adobe\0\x64\0\0\0\0\2")),
    "Adobe's CMYK": inserted(jpeg("CMYK"), 2, segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")),
    "arithmetic": flat((0x22, 0x11, 0x11), 0xC9),
    "one pixel": saved(noisy_card().resize((1, 1)), "JPEG"),
    "odd sides": saved(noisy_card().resize((641, 473)), "JPEG", subsampling="4:2:0"),
}


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("side", [None, 100, 160])
def test_no_value_differs_by_more_than_2_from_what_pillow_decodes(name, side):
    ours, pillows = decoded(Jpeg, ALIKE[name], side), decoded(JpegImageFile, ALIKE[name], side)
    assert (ours.mode, ours.size) == (pillows.mode, pillows.size)
    extrema = ImageChops.difference(ours, pillows).getextrema()
    assert max(most for _, most in ([extrema] if ours.mode == "L" else extrema)) <= 2


def test_a_file_that_libjpeg_has_no_memory_for_is_too_costly_and_not_undecodable(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "PROGRAM", "from workers import sandbox; sandbox.BYTES_PER_PIXEL = 1; sandbox.serve()")
    sandbox.stop()
    path = tmp_path / "original"
    path.write_bytes(many_scans(10_000, 10_000, 2))
    with pytest.raises(errors.Unusable) as caught:
        sandbox.convert(path, settings.load({}))
    sandbox.stop()
    assert caught.value.code == "too_costly" and "memory" in caught.value.cause.lower()


COUNT_THREADS = """
import os, sys
from workers import pipeline, sandbox
with open(sys.argv[1], "rb") as file:
    pipeline.convert(file, 100, 30_000)
print(len(os.listdir("/proc/self/task")))
"""


def test_decoding_starts_no_thread(tmp_path):
    """simplejpeg loads numpy, which would start threads. A fork of a process with threads can lock up."""
    path = tmp_path / "original"
    path.write_bytes(PLAIN)

    def threads(environment: dict[str, str]) -> int:
        command = [sys.executable, "-c", COUNT_THREADS, path]
        return int(subprocess.run(command, cwd=ROOT, stdout=-1, check=True, env=environment).stdout)

    assert threads(sandbox.ENVIRONMENT) == 1
    if len(os.sched_getaffinity(0)) > 1:
        assert threads({}) > 1, "the environment of the fork server is the reason"
