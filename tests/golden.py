"""The golden set: images whose right picture is known, because this file creates them.

Where Pillow both writes and reads a format, the bytes are written here by hand. Each image shows the same card: four
colours around the centre, and magenta outside of the centre square. What a picture must show is computed from these
colours and the definition of the format, never by the code under test.

`python tests/golden.py FILE` writes a contact sheet: each image as its values are without any conversion, and its
picture next to it.
"""

import io
import struct
import sys
import tempfile
import zlib
from itertools import product
from pathlib import Path
from typing import NamedTuple

import colours
from colours import Colour
from PIL import (  # noqa: F401
    BmpImagePlugin,
    Image,
    MpoImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
)

from workers import pipeline

CARD = [(200, 60, 50), (60, 150, 70), (50, 80, 170), (225, 205, 80)]  # top left, top right, bottom left, bottom right
CENTRES = [(150, 150), (450, 150), (150, 450), (450, 450)]  # the middle of each of the four fields in the picture
OUTSIDE = (255, 0, 255)


class Golden(NamedTuple):
    data: bytes
    truth: dict[tuple[int, int], Colour]  # the expected colour of the picture around these places
    bound: float = 2.0  # CIEDE2000: JPEG at quality 80 takes up to 1.6 of it; the eye can see 1


def card(width: int, height: int, mode: str = "RGB", colours=CARD, outside=OUTSIDE) -> Image.Image:
    """The card: `colours` are top left, top right, bottom left and bottom right, as values of `mode`."""
    image = Image.new(mode, (width, height), outside)
    side, x, y = min(width, height), width / 2, height / 2
    for (right, below), colour in zip(((0, 0), (1, 0), (0, 1), (1, 1)), colours, strict=True):
        left, top = x - side / 2 * (1 - right), y - side / 2 * (1 - below)
        image.paste(colour, (round(left), round(top), round(left + side / 2), round(top + side / 2)))
    return image


def saved(image: Image.Image, file_format: str, **options) -> bytes:
    """The file as Pillow writes it."""
    file = io.BytesIO()
    if file_format == "JPEG":
        options = {"quality": 95, "subsampling": "4:4:4", **options}
    image.save(file, file_format, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of PNG: length, name, data and checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, kind: int, scans: bytes, *chunks: bytes, interlaced: int = 0) -> bytes:
    """A PNG of colour type `kind`. `scans`: the rows, each after its filter byte. `chunks` come before the pixels."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    parts = [chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(scans)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rows(image: Image.Image, pack=bytes) -> bytes:
    """The image's rows for PNG, with filter type 0. `pack` converts the values of a row to bytes."""
    bands, values = len(image.getbands()), image.tobytes()
    stride = image.width * bands
    return b"".join(b"\0" + pack(values[at : at + stride]) for at in range(0, len(values), stride))


def doubled(values: bytes) -> bytes:
    """Values of 8 bits as 16 bits with a lower byte of 0. 0xff00 is not quite white; truncating would make it white."""
    return b"".join(bytes([value, 0]) for value in values)


def adam7(image: Image.Image) -> bytes:
    """The rows of all passes of an interlaced PNG, with filter type 0."""
    scans = b""
    passes = (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)
    for x, y, dx, dy in passes:
        for row in range(y, image.height, dy):
            scans += b"\0" + b"".join(bytes(image.getpixel((col, row))) for col in range(x, image.width, dx))
    return scans


def packed(indices: bytes, bits: int) -> bytes:
    """A row of palette indices with `bits` bits each, the highest bit first."""
    whole = "".join(f"{index:0{bits}b}" for index in indices)
    return int(whole.ljust(-(-len(whole) // 8) * 8, "0"), 2).to_bytes(-(-len(whole) // 8), "big")


def bmp(
    image: Image.Image,
    bits: int,
    pack,
    palette=(),
    compression=0,
    masks=(),
    top_down=False,
    size=40,
    space=b"",
    after=b"",
) -> bytes:
    """A BMP.

    `pack` converts the values of a row to bytes. `size`: bytes of the header. `space`: the bytes of the header after
    four masks. `after`: the bytes of the file after the pixels.
    """
    stride = image.width * len(image.getbands())
    values = image.tobytes()
    lines = [pack(values[at : at + stride]) for at in range(0, len(values), stride)]
    if not top_down:
        lines.reverse()
    if compression in (1, 2):
        body = b"".join(lines) + b"\0\1"
    else:
        body = b"".join(line.ljust(-(-len(line) // 4) * 4, b"\0") for line in lines)
    colours = b"".join(bytes([b, g, r, 0])[: 3 if size == 12 else 4] for r, g, b in palette)
    fields = b"".join(struct.pack("<I", mask) for mask in masks) + space
    height = -image.height if top_down else image.height
    resolution = 2835  # points a metre
    head = struct.pack("<IiiHHII", size, image.width, height, 1, bits, compression, len(body))
    head += struct.pack("<iiII", resolution, resolution, len(palette), 0)
    if size == 12:
        head = struct.pack("<I4H", size, image.width, image.height, 1, bits)
    head = head + fields if size == 40 else (head + fields).ljust(size, b"\0")[:size]
    start = 14 + len(head) + len(colours)
    return struct.pack("<2sIHHI", b"BM", start + len(body), 0, 0, start) + head + colours + body + after


def under(value: int, mask: int) -> int:
    """A value of 8 bits, scaled to the bits under a mask."""
    return round(value * ((1 << mask.bit_count()) - 1) / 255) * (mask & -mask)


def masked(values: bytes, masks, bits: int) -> bytes:
    """A row of RGB or RGBA as pixels of 16 or 32 bits."""
    bands, row = 4 if masks[3:] and masks[3] else 3, b""
    for at in range(0, len(values), bands):
        row += sum(map(under, values[at : at + bands], masks)).to_bytes(bits // 8, "little")
    return row


def unmasked(colour: Colour, masks) -> Colour:
    """The colour that a reader gets after a colour was stored under masks."""
    pairs = zip(colour, masks[:3], strict=True)
    return tuple(round(under(value, mask) / mask * 255) if mask else 0 for value, mask in pairs)


def embedded(profile: bytes, pixels: int, kind: int = 0x4D424544) -> bytes:
    """The colour space of a BITMAPV5HEADER, with a profile after `pixels` bytes of pixels."""
    return struct.pack("<I48x4I", kind, 4, 124 + pixels, len(profile), 0)


def calibrated(points, gamma: float) -> bytes:
    """The colour space of a BITMAPV4HEADER: x, y and z of red, green and blue, and an exponent."""
    ends = [round(part * 2**30) for x, y in points for part in (x, y, 1 - x - y)]
    return struct.pack("<I9I3I", 0, *ends, *[round(gamma * 65536)] * 3)


def runs(indices: bytes, bits: int) -> bytes:
    """A row in RLE8 or RLE4: the first seven values as they are, which is an odd number, and the rest as runs."""
    plain = packed(indices[:7], bits)
    line, at = b"\0\7" + plain + bytes(len(plain) % 2), 7
    while at < len(indices):
        length = 1
        while at + length < len(indices) and length < 255 and indices[at + length] == indices[at]:
            length += 1
        line += bytes([length, indices[at] * (0x11 if bits == 4 else 1)])
        at += length
    return line + b"\0\0"


def triples(values: bytes) -> list[bytes]:
    return [values[at : at + 3] for at in range(0, len(values), 3)]


def blue_first(values: bytes) -> bytes:
    """A row of RGB as pixels of 24 bits, in BMP's order."""
    return b"".join(pixel[::-1] for pixel in triples(values))


def short(values: bytes, red: int, green: int, blue: int) -> bytes:
    """A row of pixels of 16 bits, with these numbers of bits for each colour."""
    pixels = [(r >> 8 - red << green + blue) | (g >> 8 - green << blue) | b >> 8 - blue for r, g, b in triples(values)]
    return struct.pack(f"<{len(pixels)}H", *pixels)


def five_bits(colour: Colour) -> Colour:
    return tuple((value >> 3) * 255 // 31 for value in colour)


# The sides of the scene that the first row and the first column of the file show, by orientation (EXIF 2.32, table 6).
SIDES = {
    1: "top left",
    2: "top right",
    3: "bottom right",
    4: "bottom left",
    5: "left top",
    6: "right top",
    7: "right bottom",
    8: "left bottom",
}
OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}


def stored(orientation: int) -> list[Colour]:
    """The card's colours in the order of a file of this orientation."""
    first_row, first_column = SIDES[orientation].split()
    order = []
    for row, column in product((first_row, OPPOSITE[first_row]), (first_column, OPPOSITE[first_column])):
        order.append(CARD[2 * ("bottom" in (row, column)) + ("right" in (row, column))])
    return order


def exif(orientation: int, gps: bool = False) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    if gps:
        tags[0x8825] = {1: "N", 2: (48.0, 51.0, 29.0), 3: "E", 4: (2.0, 17.0, 40.0)}
        tags[0x010F] = "A maker of cameras"
    return tags


def shows(*colours: Colour) -> dict[tuple[int, int], Colour]:
    """The truth of a picture with these four colours; without arguments, those of the card."""
    return dict(zip(CENTRES, colours or CARD, strict=True))


def through(matrix, tone, colour: Colour) -> Colour:
    """A colour of another RGB space, converted to sRGB. `tone` is the space's transfer function."""
    return colours.from_xyz(colours.times(matrix, [tone(value / 255) for value in colour]))


def inks(*printed: tuple[int, int, int, int]) -> dict[tuple[int, int], Colour]:
    """The truth of a picture with these four inks: cyan, magenta, yellow and black, each 0 or 1."""
    labs = [colours.ink_lab(*ink) for ink in printed]
    return shows(*(colours.from_lab((light / 2.55, a - 128, b - 128)) for light, a, b in labs))


# For BMP: name, bits of a pixel, masks of red, green, blue and alpha, bytes of the header.
MASKS = [
    ("4-4-4-4 bits", 16, (0xF00, 0xF0, 0xF, 0xF000), 124),
    ("5-5-5-1 bits", 16, (0x7C00, 0x3E0, 0x1F, 0x8000), 108),
    ("4-4-4 bits in the middle", 16, (0xF << 10, 0xF << 2, 0xF << 6), 40),
    ("3-10-3 bits", 16, (0xE000, 0x1FF8, 7), 40),
    ("16 bits, 5-6-5, alpha 0", 16, (0xF800, 0x7E0, 0x1F, 0), 124),
    ("10-10-10-2 bits", 32, (0x3FF, 0x3FF << 10, 0x3FF << 20, 3 << 30), 108),
    ("7-18-7 bits", 32, (0xFE000000, 0x1FFFF80, 0x7F), 40),
    ("8-8-8-8 bits in version 3", 32, (0xFF0000, 0xFF00, 0xFF, 0xFF << 24), 56),
    ("8-8-8-8 bits in version 5", 32, (0xFF << 8, 0xFF << 24, 0xFF << 16, 0xFF), 124),
    ("8-8-8-8 bits with masks after the header", 32, (0xFF, 0xFF00, 0xFF0000, 0xFF << 24), 40),
    ("8-8-8 bits in version 2", 32, (0xFF, 0xFF00, 0xFF0000), 52),
    ("6-7-8-5 bits across bytes", 32, (0x3F << 5, 0x7F << 12, 0xFF << 20, 0xF << 28), 124),
    ("8-8-0 bits", 16, (0xFF00, 0xFF, 0), 40),
]
P3_POINTS = [(0.3127, 0.3290), (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)]  # white, red, green, blue


def gama(exponent: float) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", round(100_000 / exponent)))


def chrm(points) -> bytes:
    return chunk(b"cHRM", struct.pack(">8i", *(round(100_000 * part) for point in points for part in point)))


def iccp(profile: bytes, name: bytes = b"card") -> bytes:
    return chunk(b"iCCP", name + b"\0\0" + zlib.compress(profile))


def cicp(primaries: int, transfer: int, matrix: int = 0, full: int = 1) -> bytes:
    return chunk(b"cICP", bytes([primaries, transfer, matrix, full]))


def damaged(chunk: bytes) -> bytes:
    """The chunk with a wrong checksum. It works with the last bytes of a chunk too."""
    return chunk[:-1] + bytes([chunk[-1] ^ 1])


def bt709(value: float) -> float:
    return value / 4.5 if value < 0.081 else ((value + 0.099) / 1.099) ** (1 / 0.45)


def narrow(value: float) -> float:
    """The transfer function of sRGB in narrow range: 16 is black, 235 is white."""
    return colours.linear(min(1, max(0, (value * 255 - 16) / 219)))


def power(exponent: float):
    return lambda value: value**exponent


def described():
    """For PNG: name, chunks, and the matrix and the transfer function that they describe. None, None is sRGB."""
    p3, adobe, srgb = iccp(colours.P3_PROFILE), iccp(colours.ADOBE_PROFILE), chunk(b"sRGB", b"\0")
    as_p3, as_adobe = (colours.P3, colours.linear), (colours.ADOBE, power(colours.ADOBE_GAMMA))
    half = power(1.6)
    none = (None, None)
    return [
        ("gAMA of 1.6", [gama(1.6)], colours.SRGB, half),
        ("gAMA of linear light", [gama(1)], colours.SRGB, power(1)),
        ("gAMA of 2.2", [gama(2.2)], *none),
        ("gAMA and cHRM of sRGB", [gama(2.2), chrm([(0.3127, 0.329), (0.64, 0.33), (0.3, 0.6), (0.15, 0.06)])], *none),
        ("gAMA and cHRM of Display P3", [gama(2.2), chrm(P3_POINTS)], *as_p3),
        ("cHRM of Display P3", [chrm(P3_POINTS)], *as_p3),
        ("gAMA of 1.6 and cHRM of Display P3", [chrm(P3_POINTS), gama(1.6)], colours.P3, half),
        ("gAMA of 0", [chunk(b"gAMA", bytes(4))], *none),
        ("gAMA of too much", [chunk(b"gAMA", b"\0\0\0\1")], *none),
        ("gAMA of 3 bytes", [chunk(b"gAMA", bytes(3))], *none),
        ("cHRM of one point", [chrm([(0.3, 0.3)] * 4)], *none),
        ("cHRM of zeros", [chrm([(0, 0)] * 4)], *none),
        ("cHRM of great numbers", [chunk(b"cHRM", b"\x7f\xff\xff\xff" * 8)], *none),
        ("two gAMA", [gama(1.6), gama(1)], colours.SRGB, half),
        ("sRGB and other chunks", [gama(1.6), chrm(P3_POINTS), srgb], *none),
        ("iCCP and other chunks", [gama(1.6), srgb, adobe], *as_adobe),
        ("two iCCP", [adobe, p3], *as_adobe),
        ("cICP and other chunks", [gama(1.6), srgb, adobe, cicp(12, 13)], *as_p3),
        ("cICP of sRGB and iCCP", [cicp(1, 13), adobe], *none),
        ("cICP of BT.709", [cicp(1, 1)], colours.SRGB, bt709),
        ("cICP of BT.2020", [cicp(9, 14)], colours.BT2020, bt709),
        ("cICP of BT.2020 in linear light", [cicp(9, 8)], colours.BT2020, power(1)),
        ("cICP of narrow sRGB", [cicp(1, 13, 0, 0)], colours.SRGB, narrow),
        ("cICP of YCbCr, and iCCP", [cicp(9, 16, 9), p3], *as_p3),
        ("cICP of no known kind, and gAMA", [cicp(2, 2), gama(1.6)], colours.SRGB, half),
        ("damaged cICP and iCCP, and gAMA", [damaged(cicp(9, 16)), damaged(p3), gama(1.6)], colours.SRGB, half),
        ("iCCP without zlib, and gAMA", [chunk(b"iCCP", b"a\0\0" + bytes(9)), gama(1.6)], colours.SRGB, half),
        ("iCCP of another method, and gAMA", [chunk(b"iCCP", b"a\0\1"), gama(1.6)], colours.SRGB, half),
        ("iCCP without a name, and gAMA", [iccp(colours.P3_PROFILE, b""), gama(1.6)], colours.SRGB, half),
        ("iCCP for grey, and gAMA", [iccp(colours.GREY_PROFILE), gama(1.6)], colours.SRGB, half),
    ]


def goldens() -> dict[str, Golden]:
    """All images by name."""
    rgb, small = card(640, 480), card(64, 48)
    grey = [40, 110, 180, 240]
    pale = card(64, 48, "L", grey, 0)
    greys = [(value,) * 3 for value in grey]
    images = {}

    def add(name: str, data: bytes, truth: dict[tuple[int, int], Colour], bound: float = 2.0) -> None:
        images[name] = Golden(data, truth, bound)

    add("plain JPEG", saved(rgb, "JPEG"), shows())
    add("progressive JPEG", saved(rgb, "JPEG", progressive=True), shows())
    add("JPEG reduced while decoding", saved(card(5000, 3751), "JPEG"), shows())
    for orientation in range(1, 9):
        turned = card(640, 480, colours=stored(orientation))
        add(f"JPEG of orientation {orientation}", saved(turned, "JPEG", exif=exif(orientation)), shows())
    add("PNG of orientation 6", saved(card(640, 480, colours=stored(6)), "PNG", exif=exif(6)), shows())
    metadata = {"exif": exif(1, gps=True), "comment": b"by a person"}
    add("JPEG with GPS", saved(card(1300, 1000), "JPEG", **metadata), shows())

    # Colours of other spaces
    for name, matrix, tone, profile in (
        ("Display P3", colours.P3, colours.linear, colours.P3_PROFILE),
        ("Adobe RGB", colours.ADOBE, lambda value: value**colours.ADOBE_GAMMA, colours.ADOBE_PROFILE),
    ):
        truth = shows(*(through(matrix, tone, colour) for colour in CARD))
        add(f"{name} JPEG", saved(rgb, "JPEG", icc_profile=profile), truth)
        add(f"{name} PNG", saved(rgb, "PNG", icc_profile=profile), truth)
        clear = card(640, 480, "RGBA", [(*colour, 255) for colour in CARD], (0, 0, 0, 0))
        add(f"{name} PNG with alpha", saved(clear, "PNG", icc_profile=profile), truth)
        add(f"{name} PNG with palette", saved(rgb.quantize(8), "PNG", icc_profile=profile), truth)
    tone = [round(255 * colours.encoded((value / 255) ** colours.GREY_GAMMA)) for value in grey]
    for file_format in ("JPEG", "PNG"):
        image = saved(card(640, 480, "L", grey, 0), file_format, icc_profile=colours.GREY_PROFILE)
        add(f"grey {file_format} with profile", image, shows(*((value,) * 3 for value in tone)))
    printed = ((1, 0, 0, 0), (0, 1, 1, 0), (1, 1, 0, 0), (0, 0, 0, 1))
    ink = card(640, 480, "CMYK", [tuple(255 * part for part in one) for one in printed], (0, 0, 0, 0))
    add("CMYK JPEG with profile", saved(ink, "JPEG", icc_profile=colours.cmyk_profile()), inks(*printed))
    simple = shows((0, 255, 255), (255, 0, 0), (0, 0, 255), (0, 0, 0))
    add("CMYK JPEG without profile", saved(ink, "JPEG"), simple)
    wrong = {
        "JPEG with a profile for CMYK": colours.cmyk_profile(),
        "JPEG with a profile for grey": colours.GREY_PROFILE,
        "JPEG with a broken profile": colours.P3_PROFILE[:200] + bytes(300),
        "JPEG with a large profile": colours.P3_PROFILE + bytes(1100 * 1024),
    }
    for name, profile in wrong.items():
        add(name, saved(rgb, "JPEG", icc_profile=profile), shows())
    add("PNG with a large profile", saved(rgb, "PNG", icc_profile=colours.P3_PROFILE + bytes(1100 * 1024)), shows())

    # Transparent pixels become white. Invisible pixels are black here, and must not show.
    seen = [(200, 60, 50, 255), (0, 0, 0, 0), (50, 80, 170, 128), (225, 205, 80, 0)]
    white = (255, 255, 255)
    truth = shows((200, 60, 50), white, (152, 167, 212), white)
    add("PNG with alpha", saved(card(640, 480, "RGBA", seen, (0, 0, 0, 0)), "PNG"), truth)
    add("large PNG with alpha", saved(card(3000, 2500, "RGBA", seen, (0, 0, 0, 0)), "PNG"), truth)
    large = card(3000, 2500, "RGBA", seen, (0, 0, 0, 0))
    add("16-bit PNG with alpha", png(640, 480, 16, 6, rows(large.resize((640, 480), 0), doubled)), truth)
    ghost = card(640, 480, "LA", [(40, 255), (0, 0), (180, 128), (240, 0)], (0, 0))
    truth = shows((40,) * 3, white, (217,) * 3, white)
    add("grey PNG with alpha", saved(ghost, "PNG"), truth)
    add("16-bit grey PNG with alpha", png(640, 480, 16, 4, rows(ghost, doubled)), truth)
    index = card(640, 480, "P", (0, 1, 2, 3), 4)
    palette = b"".join(bytes(colour) for colour in (*CARD, OUTSIDE))
    few = card(640, 480, "P", (0, 1, 2, 3), 3)
    for bits in (2, 4, 8):
        scans = rows(few, lambda row, bits=bits: packed(row, bits))
        add(f"PNG with palette of {bits} bits", png(640, 480, bits, 3, scans, chunk(b"PLTE", palette)), shows())
    cut = shows(CARD[0], white, (152, 167, 212), CARD[3])
    keyed = (chunk(b"PLTE", palette), chunk(b"tRNS", bytes([255, 0, 128])))
    add("PNG with palette and tRNS", png(640, 480, 8, 3, rows(index), *keyed), cut)
    key = shows(CARD[0], white, *CARD[2:])
    add("RGB PNG with tRNS", png(640, 480, 8, 2, rows(rgb), chunk(b"tRNS", struct.pack(">3H", *CARD[1]))), key)
    wide = chunk(b"tRNS", struct.pack(">3H", *(value * 256 for value in CARD[1])))
    add("16-bit RGB PNG with tRNS", png(640, 480, 16, 2, rows(rgb, doubled), wide), key)
    level = card(640, 480, "L", grey, 0)
    key = shows(greys[0], white, *greys[2:])
    add("grey PNG with tRNS", png(640, 480, 8, 0, rows(level), chunk(b"tRNS", struct.pack(">H", grey[1]))), key)
    wide = chunk(b"tRNS", struct.pack(">H", grey[1] * 256))
    add("16-bit grey PNG with tRNS", png(640, 480, 16, 0, rows(level, doubled), wide), key)
    few = card(640, 480, "L", (0, 1, 2, 3), 3)
    thirds = shows((0,) * 3, white, (170,) * 3, white)
    scans = rows(few, lambda row: packed(row, 2))
    add("2-bit grey PNG with tRNS", png(640, 480, 2, 0, scans, chunk(b"tRNS", b"\0\1")), thirds)

    # All 16 bits count: the third colour differs from the transparent one only in its low bytes
    five = card(64, 48, "P", (0, 1, 2, 3), 4)
    wide = [bytes(6), b"\x3c\0\x96\0\x46\0", b"\x3c\0\x96\0\x46\1", b"\xe1\0\xcd\0\x50\0", b"\xff" * 6]
    truth = shows((0, 0, 0), white, (60, 150, 70), (225, 205, 80))
    scans = rows(five, lambda row: b"".join(wide[index] for index in row))
    add("16-bit RGB PNG with tRNS and its neighbour", png(64, 48, 16, 2, scans, chunk(b"tRNS", wide[1])), truth)
    wide = [bytes(2), b"\x6e\x80", b"\x6e\x81", b"\xf0\0", b"\xff\xff"]
    truth = shows((0,) * 3, white, (110,) * 3, (239,) * 3)
    scans = rows(five, lambda row: b"".join(wide[index] for index in row))
    add("16-bit grey PNG with tRNS and its neighbour", png(64, 48, 16, 0, scans, chunk(b"tRNS", wide[1])), truth)
    high = chunk(b"tRNS", struct.pack(">3H", *(value | 0xA500 for value in CARD[1])))
    add("RGB PNG with tRNS of too many bits", png(64, 48, 8, 2, rows(small), high), shows(CARD[0], white, *CARD[2:]))
    few_colours = (chunk(b"PLTE", palette[:9]), chunk(b"tRNS", b"\xff\0"))
    truth = shows(CARD[0], white, CARD[2], (0, 0, 0))
    add("PNG with palette, tRNS and no colour for an index", png(64, 48, 8, 3, rows(five), *few_colours), truth)

    # Colours that PNG describes by numbers
    for name, chunks, matrix, tone in described():
        meaning = (matrix, tone) if matrix else (colours.SRGB, colours.linear)
        truth = shows(*(through(*meaning, colour) for colour in CARD))
        add(f"PNG with {name}", png(64, 48, 8, 2, rows(small), *chunks), truth)
    tone = [round(255 * colours.encoded((value / 255) ** 1.6)) for value in grey]
    truth = shows(*((value,) * 3 for value in tone))
    add("grey PNG with gAMA", png(64, 48, 8, 0, rows(pale), gama(1.6)), truth)
    ghost = card(64, 48, "LA", [(value, 255) for value in grey], (0, 0))
    add("grey PNG with alpha and gAMA", png(64, 48, 8, 4, rows(ghost), gama(1.6)), truth)
    truth = shows(*(through(colours.SRGB, power(1.6), colour) for colour in CARD))
    add("PNG with palette and gAMA", png(64, 48, 8, 3, rows(five), gama(1.6), chunk(b"PLTE", palette)), truth)
    too_late = (chunk(b"PLTE", palette), gama(1.6), iccp(colours.P3_PROFILE), cicp(9, 16))
    add("PNG with palette and colours after it", png(64, 48, 8, 3, rows(five), *too_late), shows())
    tone = [round(255 * colours.encoded((value / 255) ** colours.GREY_GAMMA)) for value in grey]
    truth = shows(*((value,) * 3 for value in tone))
    add("grey PNG with alpha and profile", png(64, 48, 8, 4, rows(ghost), iccp(colours.GREY_PROFILE)), truth)
    # 203 and 100 cd/m2 in PQ, and 203 in HLG (ITU-R BT.2408, table 1). A white sheet has 203 and becomes white; half of
    # its light becomes half.
    bright = card(64, 48, "L", (0, 148, 130, 255), 0)
    half = round(255 * colours.encoded(100 / 203))
    add("PNG in PQ", png(64, 48, 8, 0, rows(bright), cicp(9, 16)), shows((0,) * 3, white, (half,) * 3, white))
    bright = card(64, 48, "L", (0, 191, 255, 255), 0)
    add("PNG in HLG", png(64, 48, 8, 0, rows(bright), cicp(9, 18)), shows((0,) * 3, white, white, white))

    # Depths
    two = card(640, 480, "L", (0, 255, 255, 0), 0).convert("1", dither=Image.Dither.NONE)
    chess = shows((0,) * 3, white, white, (0,) * 3)
    add("1-bit PNG", saved(two, "PNG"), chess)
    add("grey JPEG", saved(level, "JPEG"), shows(*greys))
    add("16-bit grey PNG", png(640, 480, 16, 0, rows(level, doubled)), shows(*greys))
    add("16-bit RGB PNG", png(640, 480, 16, 2, rows(rgb, doubled)), shows())
    add("interlaced PNG", png(64, 48, 8, 2, adam7(small), interlaced=1), shows())

    # BMP
    for top_down in (False, True):
        order = ", top-down" if top_down else ""
        add(f"BMP of 24 bits{order}", bmp(rgb, 24, blue_first, top_down=top_down), shows())
        add(f"BMP of 8 bits{order}", bmp(index, 8, bytes, (*CARD, OUTSIDE), top_down=top_down), shows())
    add("BMP of 32 bits", bmp(rgb, 32, lambda row: b"".join(pixel[::-1] + b"\0" for pixel in triples(row))), shows())
    add("BMP of 4 bits", bmp(index, 4, lambda row: packed(row, 4), (*CARD, OUTSIDE)), shows())
    pair = card(640, 480, "P", (0, 1, 1, 0), 0)
    add("BMP of 1 bit", bmp(pair, 1, lambda row: packed(row, 1), CARD[:2]), shows(*(CARD[i] for i in (0, 1, 1, 0))))
    coarse = shows(*map(five_bits, CARD))
    add("BMP of 16 bits", bmp(rgb, 16, lambda row: short(row, 5, 5, 5)), coarse)
    fields = bmp(rgb, 16, lambda row: short(row, 5, 6, 5), compression=3, masks=(0xF800, 0x7E0, 0x1F))
    add("BMP of 16 bits, 5-6-5", fields, coarse, 3.0)  # green has 6 bits here
    add("BMP in RLE8", bmp(index, 8, lambda row: runs(row, 8), (*CARD, OUTSIDE), 1), shows())
    add("BMP in RLE4", bmp(index, 4, lambda row: runs(row, 4), (*CARD, OUTSIDE), 2), shows())

    for name, bits, masks, size in MASKS:
        seen = CARD
        kind = "RGBA" if masks[3:] and masks[3] else "RGB"
        if kind == "RGBA":
            seen = [(*CARD[0], 255), (0, 0, 0, 0), (*CARD[2], 255), (*CARD[3], 255)]
        image = card(64, 48, kind, seen, (0,) * len(kind))
        truth = [white if colour == (0, 0, 0, 0) else unmasked(colour[:3], masks) for colour in seen]
        pack = lambda row, masks=masks, bits=bits: masked(row, masks, bits)  # noqa: E731
        compression = 6 if size == 40 and len(masks) == 4 else 3
        add(f"BMP of {name}", bmp(image, bits, pack, (), compression, masks, size=size), shows(*truth))
    content = {"space": embedded(colours.P3_PROFILE, 48 * 192), "after": colours.P3_PROFILE}
    truth = shows(*(through(colours.P3, colours.linear, colour) for colour in CARD))
    add("BMP with Display P3", bmp(small, 24, blue_first, masks=(0,) * 4, size=124, **content), truth)
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF << 24)
    clear = card(64, 48, "RGBA", [(*colour, 255) for colour in CARD], (0, 0, 0, 0))
    content["space"] = embedded(colours.P3_PROFILE, 48 * 256)
    data = bmp(clear, 32, lambda row: masked(row, masks, 32), (), 3, masks, size=124, **content)
    add("BMP with alpha and Display P3", data, truth)
    content["space"] = embedded(colours.P3_PROFILE, 48 * 64 + 1024)
    ramp = [(value,) * 3 for value in range(256)]
    add("grey BMP with Display P3", bmp(pale, 8, bytes, ramp, masks=(0,) * 4, size=124, **content), shows(*greys))
    for name, profile, kind in (
        ("a profile for grey", colours.GREY_PROFILE, 0x4D424544),
        ("a link to a profile", b"c:\\profile.icm\0", 0x4C494E4B),
        ("half a profile", colours.P3_PROFILE[:100], 0x4D424544),
    ):
        content = {"space": embedded(profile.ljust(300, b"\0"), 48 * 192, kind), "after": profile}
        add(f"BMP with {name}", bmp(small, 24, blue_first, masks=(0,) * 4, size=124, **content), shows())
    for size in (108, 124):
        own = calibrated(P3_POINTS[1:], 1.6)
        truth = shows(*(through(colours.P3, power(1.6), colour) for colour in CARD))
        add(f"BMP calibrated in {size} bytes", bmp(small, 24, blue_first, masks=(0,) * 4, size=size, space=own), truth)
    no_space = {
        "no endpoints": calibrated([(0, 0)] * 3, 1.6)[:4] + bytes(48),
        "one colour": calibrated([(0.3, 0.3)] * 3, 1.6),
        "no exponent": calibrated(P3_POINTS[1:], 0),
    }
    for name, own in no_space.items():
        add(f"BMP calibrated with {name}", bmp(small, 24, blue_first, masks=(0,) * 4, size=108, space=own), shows())

    # Shapes
    one = (60, 150, 70)
    for name, size in {"1x501": (1, 501), "501x1": (501, 1), "1x1": (1, 1)}.items():
        image = Image.new("RGB", size, OUTSIDE)
        image.putpixel((size[0] // 2, size[1] // 2), one)
        add(f"PNG of {name}", saved(image, "PNG"), dict.fromkeys([*CENTRES, (2, 2), (597, 597)], one))
    for name, size in {"30,000x10": (30000, 10), "10x30,000": (10, 30000), "20x20": (20, 20)}.items():
        add(f"PNG of {name}", saved(card(*size), "PNG"), shows())
        add(f"JPEG of {name}", saved(card(*size), "JPEG"), shows())

    # Files with several pictures: the first counts
    other = Image.new("RGB", rgb.size)
    add("animated PNG", saved(rgb, "PNG", save_all=True, append_images=[other]), shows())
    add("MPO", saved(rgb, "MPO", save_all=True, append_images=[other], quality=95), shows())
    return images


def sheet(width: int = 64) -> Image.Image:
    """The contact sheet in the order of the names: each image without any conversion of its values, and its picture."""
    pairs = []
    for _, golden in sorted(goldens().items()):
        try:
            original = Image.open(io.BytesIO(golden.data))
        except UnidentifiedImageError:
            original = Image.new("RGB", (4, 3), "grey")
        original = original.convert("RGB").resize((width, width * 3 // 4))
        with tempfile.TemporaryFile() as file:
            file.write(golden.data)
            picture = Image.open(io.BytesIO(pipeline.convert(file, 100, 30_000).jpeg))
        pairs.append((original, picture.resize((width * 3 // 4,) * 2)))
    cell, columns = (width * 7 // 4 + 14, width * 3 // 4 + 10), 7
    whole = Image.new("RGB", (cell[0] * columns, cell[1] * -(-len(pairs) // columns)), (120, 120, 120))
    for place, (original, picture) in enumerate(pairs):
        x, y = place % columns * cell[0] + 5, place // columns * cell[1] + 5
        whole.paste(original, (x, y))
        whole.paste(picture, (x + width + 2, y))
    return whole


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(saved(sheet(), "JPEG", quality=70, optimize=True))
