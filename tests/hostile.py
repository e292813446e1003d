"""Creates images that are meant to do harm, and damages images at random."""

import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO

from golden import card, chunk, png, rows, saved


def segment(marker: int, body: bytes) -> bytes:
    """A marker segment of JPEG (ITU T.81, B.1.1.4)."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def many_scans(width: int, height: int, scans: int, components: int = 3) -> bytes:
    """A progressive JPEG (ITU T.81, annex G) of one grey. Each scan covers all blocks in a few bytes."""
    blocks = -(-width // 8) * -(-height // 8)
    one_code = b"\1" + bytes(15)  # a Huffman table with a single symbol, whose code is one bit, 0
    tables = segment(0xC4, b"\x00" + one_code + b"\0") + segment(0xC4, b"\x10" + one_code + b"\xe0")
    frame_components = b"".join(bytes([number, 0x11, 0]) for number in range(1, components + 1))
    frame = segment(0xC2, struct.pack(">BHHB", 8, height, width, components) + frame_components)
    scan_components = b"".join(bytes([number, 0]) for number in range(1, components + 1))
    runs = "".join("0" + "1" * 14 for _ in range(-(-blocks // 32767)))  # EOB14: the next 32,767 blocks end here
    runs = int(runs.ljust(-(-len(runs) // 8) * 8, "1"), 2).to_bytes(-(-len(runs) // 8), "big")
    runs = runs.replace(b"\xff", b"\xff\0")
    file = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + frame + tables
    file += segment(0xDA, bytes([components]) + scan_components + bytes(3)) + bytes(-(-blocks * components // 8))
    for number in range(scans - 1):
        file += segment(0xDA, bytes([1, number % components + 1, 0, 1, 63, 0])) + runs
    return file + b"\xff\xd9"


def grey_png(width: int, height: int, depth: int = 1) -> bytes:
    """A black PNG, compressed as far as deflate can: to a thousandth."""
    compressor, row = zlib.compressobj(), bytes(1 + -(-width * depth // 8))
    scans = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", scans) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def bmp_header(width: int, height: int, bits: int = 24, compression: int = 0) -> bytes:
    """The headers of a BMP of Windows 3, without pixels."""
    head = struct.pack("<2sIHHI", b"BM", 1000, 0, 0, 54)
    return head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)


def inflating(name: bytes, front: bytes, size: int, times: int = 1) -> bytes:
    """A small PNG with `times` chunks of this name. Each is `front` and then data that inflates to `size` bytes."""
    bomb = chunk(name, front + zlib.compress(bytes(size), 9)) * times
    return png(64, 48, 8, 2, rows(card(64, 48)), bomb)


def png_boundaries(data: bytes) -> Iterator[int]:
    """The bytes where the chunks of a PNG begin."""
    at = 8
    while at < len(data):
        yield at
        at += 12 + int.from_bytes(data[at : at + 4], "big")


def jpeg_boundaries(data: bytes) -> Iterator[int]:
    """The bytes where the markers of a JPEG begin."""
    return (found.start() for found in re.finditer(rb"\xff[^\0\xff]", data))


def mutated(data: bytes, chance) -> bytes:
    """The file with 1 to 16 random changes: a byte replaced, or up to 63 bytes removed, repeated or set to one value.

    In 70 % of the PNG files the checksums are right again. Otherwise a reader would only ever see wrong checksums.
    `chance` is a random.Random.
    """
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at, length = chance.randrange(len(changed)), chance.randrange(1, 64)
        match chance.randrange(5):
            case 0 | 1:
                changed[at] = chance.randrange(256)
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = changed[at : at + length]
            case 4:
                changed[at : at + length] = chance.choice((b"\0", b"\xff", b"\x7f")) * length
        changed = changed or bytearray(b"BM")
    if data.startswith(b"\x89PNG") and chance.random() < 0.7:
        at = 8
        while at + 12 <= len(changed):
            end = at + 8 + int.from_bytes(changed[at : at + 4], "big")
            if end + 4 > len(changed):
                break
            changed[end : end + 4] = struct.pack(">I", zlib.crc32(changed[at + 4 : end]))
            at = end + 4
    return bytes(changed)


def with_zip(data: bytes) -> bytes:
    """The file with a ZIP archive after it."""
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("autorun.inf", "[autorun]")
    return data + archive.getvalue()


def hostiles() -> dict[str, tuple[bytes, set[str]]]:
    """Each image by its name, with the codes that it may end with; `picture` where a picture must be created."""
    small = saved(card(64, 48), "PNG")
    jpeg = saved(card(640, 480), "JPEG")
    progressive, sides = saved(card(640, 480), "JPEG", progressive=True), struct.pack(">HH", 480, 640)
    fine, many = {"picture"}, {"too_many_pixels"}
    undecodable, truncated = {"undecodable"}, {"truncated"}
    apng = saved(card(64, 48), "PNG", save_all=True, append_images=[card(64, 48, outside=(0, 0, 0))])
    moves = b"\0\2\xff\xff" * 10_000
    images = {
        "PNG of 60,000 x 60,000": (grey_png(60_000, 60_000), many),
        "PNG of 30,001 x 1": (grey_png(30_001, 1), many),
        "PNG of 10,001 x 10,000": (grey_png(10_001, 10_000), many),
        "PNG of 10,000 x 10,000": (grey_png(10_000, 10_000), fine),
        "JPEG of 65,500 x 65,500": (jpeg.replace(sides, struct.pack(">HH", 65_500, 65_500)), many),
        "JPEG of no height": (jpeg.replace(sides, struct.pack(">HH", 0, 640)), undecodable),
        "BMP of 2,147,483,647 x 2,147,483,647": (bmp_header(2**31 - 1, 2**31 - 1), many),
        "BMP of negative width": (bmp_header(-100, 100), undecodable),
        "BMP of -2,147,483,648 high": (bmp_header(100, -(2**31)), many),
        "BMP of 100 megapixels and no pixel": (bmp_header(10_000, 10_000), truncated),
        "BMP of 100 megapixels in RLE8 and no pixel": (bmp_header(10_000, 10_000, 8, 1) + bytes(2000), truncated),
        "BMP of moves without pixels": (bmp_header(10_000, 10_000, 8, 1) + bytes(1024) + moves, fine),
        "BMP with a JPEG in it": (bmp_header(640, 480, 0, 4) + jpeg, {"unsupported"}),
        "BMP with a PNG in it": (bmp_header(64, 48, 0, 5) + small, {"unsupported"}),
        "BMP of 7 bits": (bmp_header(64, 48, 7), undecodable),
        "zTXt bomb": (inflating(b"zTXt", b"a\0\0", 100_000_000), fine),
        "iTXt bomb": (inflating(b"iTXt", b"a\0\1\0\0\0", 100_000_000), fine),
        "iCCP bomb": (inflating(b"iCCP", b"a\0\0", 100_000_000), fine),
        "many zTXt bombs": (inflating(b"zTXt", b"a\0\0", 4_000_000, 20), fine),
        "PNG of 600,000 empty chunks": (small[:33] + chunk(b"IDAT", b"") * 600_000 + small[33:], {"too_costly"}),
        "JPEG of 1,000 scans": (many_scans(10_000, 10_000, 1_000), {"too_many_scans"}),
        "JPEG of 1,000 scans over few pixels": (many_scans(100, 100, 1_000), {"too_many_scans"}),
        "JPEG of 100 scans": (many_scans(3000, 3000, 100), fine),
        "JPEG with another of 1,000 scans after it": (progressive + many_scans(100, 100, 1_000), fine),
        "PNG with a ZIP after it": (with_zip(small), fine),
        "JPEG with HTML in it": (jpeg[:2] + segment(0xFE, b"<html><script>alert(1)</script>") + jpeg[2:], fine),
        "HTML with a PNG after it": (b"<html>" + small, {"wrong_format"}),
        "GIF": (b"GIF89a\1\0\1\0\0\0\0,\0\0\0\0\1\0\1\0\0\2\0;", {"wrong_format"}),
        "nothing": (b"", {"wrong_format"}),
        "BM and no more": (b"BM", truncated),
        "PNG without pixels": (small[:33] + chunk(b"IEND", b""), undecodable),
        "animated PNG cut in its second frame": (apng[:-60], truncated),
    }
    for at in png_boundaries(small):
        name = small[at + 4 : at + 8].decode()
        for cut in (at, at + 4, at + 8, at + 9):
            images[f"PNG cut at byte {cut}, in {name}"] = small[:cut], truncated
        wrong = bytearray(small)
        wrong[at + 8 + int.from_bytes(small[at : at + 4], "big")] ^= 1
        images[f"PNG with a wrong checksum in {name}"] = bytes(wrong), undecodable
    for kind, data in {"baseline": jpeg, "progressive": progressive}.items():
        for at in jpeg_boundaries(data):
            for cut in {at, at + 2, at + 3} & set(range(3, len(data))):
                images[f"{kind} JPEG cut at byte {cut}"] = data[:cut], undecodable | truncated
    # A sequential JPEG may lack its EOI marker: its one scan has all pixels. A progressive one may lack scans too.
    images["baseline JPEG without EOI"] = jpeg[:-2], fine
    images["progressive JPEG without EOI"] = progressive[:-2], truncated
    del images[f"baseline JPEG cut at byte {len(jpeg) - 2}"]
    return images
