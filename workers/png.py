"""PNG: chunks, palettes, transparency and colour spaces. Section numbers are of the PNG specification, 3rd edition.

Pillow's reader refuses a file with a damaged chunk of text, accepts one with an unknown compression method, and knows
neither cICP nor a transparent colour of 16 bits. Its decoder is used here, and sees nothing but the pixels.
"""

import struct
import zlib
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap

from PIL import Image, ImageChops, ImageFile, ImagePalette

from workers import colour
from workers.errors import unusable

MAGIC = b"\x89PNG\r\n\x1a\n"
CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
COLOUR = (b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM")
ANCILLARY = (*COLOUR, b"tRNS", b"eXIf")  # those that a picture depends on; the others are passed over unread
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # colour types
MODES = {  # Pillow's mode and raw mode for a colour type and its bits (11.2.1)
    (GREY, 1): ("1", "1"),
    (GREY, 2): ("L", "L;2"),
    (GREY, 4): ("L", "L;4"),
    (GREY, 8): ("L", "L"),
    (GREY, 16): ("I;16", "I;16B"),
    (RGB, 8): ("RGB", "RGB"),
    (RGB, 16): ("RGB", "RGB;16B"),  # the high byte of each value
    (PALETTE, 1): ("P", "P;1"),
    (PALETTE, 2): ("P", "P;2"),
    (PALETTE, 4): ("P", "P;4"),
    (PALETTE, 8): ("P", "P"),
    (GREY_ALPHA, 8): ("LA", "LA"),
    (GREY_ALPHA, 16): ("RGBA", "LA;16B"),
    (RGB_ALPHA, 8): ("RGBA", "RGBA"),
    (RGB_ALPHA, 16): ("RGBA", "RGBA;16B"),
}
LOW = "RGB;16L"  # Pillow's raw mode for the low byte of each value, as it is the high one of a file of the other order
# Chunks of a file. Encoders put 8 KiB into each and some put 256 bytes, of which 100 MiB are 400,000 chunks. Without a
# limit, 8 million empty ones take 27 s.
CHUNKS = 500_000
ROWS = 64  # compared with a transparent colour at once
SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}  # of a pixel
# Of each pass the first column and row, and the steps to the next (8.1). The last is all of each second row.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
BLOCK = 8192  # bytes inflated at once; they become at most 1,032 times as many
UNSET = (90, 165, 91, 164)  # values of a pixel that is not decoded yet


class Png(ImageFile.ImageFile):
    """The image of a PNG file; of an animated one the default image.

    Raises Unusable with undecodable, truncated or too_costly.

    All chunks are walked and the critical ones checked before a pixel is decoded. What is wrong with an ancillary
    chunk costs only what that chunk says (13.1).
    """

    format = "PNG"
    format_description = "Portable network graphics"

    def _open(self) -> None:
        # mmap would ask fstat(2) for the length, which the sandbox denies.
        self._data = mmap(self.fp.fileno(), self.fp.seek(0, 2), access=ACCESS_READ)
        kept, start = _kept(self._data)
        width, height, depth, kind, compression, filtering, interlace = struct.unpack(">IIBBBBB", kept[b"IHDR"])
        if not (0 < width < 2**31 and 0 < height < 2**31):
            raise unusable("undecodable", what=f"a PNG of {width} x {height} pixels")
        if (kind, depth) not in MODES:
            raise unusable("undecodable", what=f"a PNG of colour type {kind} with {depth} bits; there is no such kind")
        methods = ("compression", compression, 0), ("filter", filtering, 0), ("interlace", interlace, 1)
        for what, method, most in methods:
            if method > most:
                raise unusable("undecodable", what=f"a PNG of {what} method {method}, which is unknown")
        self._size = width, height
        self._mode, raw = MODES[kind, depth]
        self._wide_key = None
        self._passes = ADAM7 if interlace else ((0, 0, 1, 1),)
        self._bits = depth * SAMPLES[kind]
        if interlace:
            self.decoderconfig = (1,)
        if kind == PALETTE:
            self._palette(kept.get(b"PLTE", b""), kept.get(b"tRNS", b""))
        else:
            self._key(kept.get(b"tRNS", b""), kind, depth)
        self.info["exif"] = kept.get(b"eXIf", b"")
        self.info["icc_profile"] = _profile(kept, kind in (GREY, GREY_ALPHA))
        self.tile = [ImageFile._Tile("zip", (0, 0, width, height), start, raw)]

    def _palette(self, palette: bytes, alphas: bytes) -> None:
        count = len(palette) // 3
        if not palette:
            raise unusable("undecodable", what="a PNG with palette colours, and without a palette")
        if len(palette) % 3 or count > 256:
            what = f"a palette of {len(palette)} bytes; it has 3 for each of up to 256 colours"
            raise unusable("undecodable", what=what)
        if len(alphas) > count:
            raise unusable("undecodable", what=f"transparency of {len(alphas)} colours for a palette of {count}")
        self.palette = ImagePalette.raw("RGB", palette.ljust(768, b"\0"))  # indices beyond are black (13.1)
        if alphas:
            self.info["transparency"] = alphas

    def _key(self, key: bytes, kind: int, depth: int) -> None:
        """The colour that is transparent, in the values of the decoded image (11.3.1.1)."""
        most = (1 << depth) - 1
        if kind == GREY and len(key) == 2:
            (level,) = struct.unpack(">H", key)
            # 16 bits stay as they are in the decoded image, and fewer become 8.
            self.info["transparency"] = level if depth == 16 else (level & most) * 255 // most
        if kind == RGB and len(key) == 6:
            if depth == 16:
                self._wide_key = key
            else:
                self.info["transparency"] = tuple(level & most for level in struct.unpack(">3H", key))

    def load(self):
        try:
            return self._load_twice() if self.tile and self._wide_key else super().load()
        except (OSError, zlib.error) as fault:
            if getattr(fault, "errno", None) is not None:  # the disk's fault, not the file's
                raise
            raise unusable("undecodable", what="the compressed pixels are damaged") from fault

    def _load_twice(self):
        """A transparent colour of 16 bits costs a second pass: Pillow decodes RGB to 8 bits, high or low ones."""
        file, (tile,) = self.fp, self.tile
        self.tile = [tile._replace(args=LOW)]
        super().load()
        seen = _differing(self, self._wide_key[1::2])
        self._im = None  # so that only one of the two takes memory
        self.fp, self.tile = file, [tile]
        super().load()
        self.putalpha(ImageChops.lighter(seen, _differing(self, self._wide_key[::2])))
        return super().load()

    def load_prepare(self) -> None:
        """Mark the pixel that is decoded last: Pillow leaves the rest black where the compressed data is too short."""
        super().load_prepare()
        x, y, dx, dy = [one for one in self._passes if one[0] < self.width and one[1] < self.height][-1]
        self._last = (x + (self.width - 1 - x) // dx * dx, y + (self.height - 1 - y) // dy * dy)
        bands = len(self.getbands())
        self.im.putpixel(self._last, UNSET[0] if bands == 1 else UNSET[:bands])
        self._unset, self._start = self.im.getpixel(self._last), self.tile[0].offset

    def load_end(self) -> None:
        """Where the mark is still there, which a pixel may have too, count what the data inflates to."""
        if self.im.getpixel(self._last) != self._unset:
            return
        needed = 0
        for x, y, dx, dy in self._passes:
            columns, rows = -(-(self.width - x) // dx), -(-(self.height - y) // dy)
            needed += rows * (1 + -(-columns * self._bits // 8)) if columns > 0 and rows > 0 else 0
        self.load_seek(self._start)
        inflater, there = zlib.decompressobj(), 0
        while there < needed and not inflater.eof:
            there += len(inflater.decompress(self.load_read(BLOCK)))
        if there < needed:
            raise unusable("truncated", what=f"the pixels inflate to {there} of {needed} bytes")

    def load_seek(self, at: int) -> None:
        """Go to the chunk that begins at `at`."""
        self._at, self._left = at, 0

    def load_read(self, size: int) -> bytes:
        """Up to so many of the next compressed bytes, out of as many IDAT chunks as it takes."""
        parts = []
        while size:
            if not self._left:
                length, name = struct.unpack_from(">I4s", self._data, self._at)
                if name != b"IDAT":
                    break
                self._at, self._left = self._at + 8, length
            part = self._data[self._at : self._at + min(size, self._left)]
            parts.append(part)
            size -= len(part)
            self._left -= len(part)
            self._at += len(part) + (0 if self._left else 4)  # behind a chunk is its sum
        if not any(parts):
            raise unusable("truncated", what="the compressed pixels end before the last row")
        return b"".join(parts)


def _kept(data: mmap) -> tuple[dict[bytes, bytes], int]:
    """The chunks that decoding needs, the first of each kind, and where the first of IDAT begins.

    Chunks in a place where they are not allowed (5.6) are left out.
    """
    kept, pixels = {}, 0
    for name, start, end in _walked(data):
        if name in (b"IHDR", b"PLTE") and name in kept:
            raise unusable("undecodable", what=f"a PNG with two {name.decode()} chunks")
        if name == b"IHDR" and end - start != 13:
            raise unusable("undecodable", what=f"an IHDR chunk of {end - start} bytes; it has 13")
        if name == b"IDAT":
            pixels = pixels or start - 8
        late = pixels if name != b"eXIf" else 0  # some programs write it last
        if name in COLOUR:
            late = late or b"PLTE" in kept
        early = name == b"tRNS" and kept[b"IHDR"][9] == PALETTE and b"PLTE" not in kept
        if not late and not early and name not in kept:
            kept[name] = data[start:end]
    if not pixels:
        raise unusable("undecodable", what="a PNG without pixels: it has no IDAT chunk")
    return kept, pixels


def _walked(data: mmap) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the data of each chunk that is wanted: critical ones, and ancillary ones with a right sum.

    Raises Unusable where a critical chunk or the order of bytes is damaged, and with too_costly for too many chunks.
    """
    at, name, view, count = len(MAGIC), b"", memoryview(data), 0
    while name != b"IEND":
        count += 1
        if count > CHUNKS:
            raise unusable("too_costly", what=f"a PNG of more than {CHUNKS} chunks")
        if len(data) - at < 8:
            raise unusable("truncated", what=f"a PNG that ends after {len(data)} bytes, without its IEND chunk")
        size, name = struct.unpack_from(">I4s", data, at)
        start, end = at + 8, at + 8 + size
        critical = not name[0] & 0x20  # 5.4
        if not name.isalpha() or (at == len(MAGIC) and name != b"IHDR"):
            raise unusable("undecodable", what=f"at byte {at} is no {'IHDR ' if at == len(MAGIC) else ''}chunk")
        if critical and name not in CRITICAL:
            raise unusable("undecodable", what=f"a critical chunk {name.decode()}, which is unknown")
        if end + 4 > len(data):
            there = max(0, len(data) - start)
            name = name.decode()
            raise unusable("truncated", what=f"{there} of the {size} bytes of its {name} chunk are there")
        if critical or name in ANCILLARY:
            whole = zlib.crc32(view[at + 4 : end]) == int.from_bytes(view[end : end + 4], "big")
            if critical and not whole:
                what = f"the {name.decode()} chunk at byte {at} is damaged: its sum is wrong"
                raise unusable("undecodable", what=what)
            if whole:
                yield name, start, end
        at = end + 4


def _differing(image: Image.Image, key: bytes) -> Image.Image:
    """255 where a pixel is of another colour than this, else 0."""
    tables = [[255 * (value != level) for value in range(256)] for level in key]
    made = Image.new("L", image.size)
    for top in range(0, image.height, ROWS):
        strip = image.crop((0, top, image.width, min(top + ROWS, image.height)))
        red, green, blue = (band.point(table) for band, table in zip(strip.split(), tables, strict=True))
        made.paste(ImageChops.lighter(ImageChops.lighter(red, green), blue), (0, top))
    return made


def _profile(kept: dict[bytes, bytes], grey: bool) -> bytes | None:
    """The ICC profile of an image's colours; None where nothing says, and AS_SRGB where they need no conversion.

    The first chunk in the order of precedence that can be understood decides (4.3, table 1).
    """
    for read in (_coded, _embedded, _standard, _described):
        found = read(kept, grey)
        if found is not None:
            return found
    return None


def _coded(kept: dict[bytes, bytes], grey: bool) -> bytes | None:
    points = kept.get(b"cICP", b"")
    return colour.coded(*points, grey) if len(points) == 4 else None


def _embedded(kept: dict[bytes, bytes], grey: bool) -> bytes | None:
    name, _, rest = kept.get(b"iCCP", b"").partition(b"\0")
    if not 1 <= len(name) <= 79 or rest[:1] != b"\0":  # the compression method
        return None
    try:
        profile = zlib.decompressobj().decompress(rest[1:], colour.PROFILE + 1)
    except zlib.error:
        return None
    return profile if colour.fits(profile, b"GRAY" if grey else b"RGB ") else None


def _standard(kept: dict[bytes, bytes], grey: bool) -> bytes | None:
    return colour.AS_SRGB if len(kept.get(b"sRGB", b"")) == 1 else None


def _described(kept: dict[bytes, bytes], grey: bool) -> bytes | None:
    gamma, points = kept.get(b"gAMA", b""), kept.get(b"cHRM", b"")
    exponent = space = None
    if len(gamma) == 4 and any(gamma):
        exponent = 100_000 / int.from_bytes(gamma, "big")
    if len(points) == 32:
        values = [part / 100_000 for part in struct.unpack(">8i", points)]
        space = list(zip(values[::2], values[1::2], strict=True))
    if not exponent and not space:
        return None
    return colour.described(space, exponent and [exponent] * 3, grey)
