"""Reads PNG files: chunks, palettes, transparency and colour spaces.

Section numbers are of the PNG specification, third edition. Pillow's reader is not used, because it refuses a file for
a damaged text chunk, accepts an unknown compression method, and supports neither cICP nor a transparent colour of 16
bits. Pillow's decoder is used for the pixels, and gets nothing else of the file. ISA-L inflates them for it.
"""

import struct
import zlib
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap

from PIL import Image, ImageChops, ImageFile, ImagePalette

from workers import colour
from workers.errors import unusable

try:
    from isal import isal_zlib
except ImportError:  # it has wheels for x86-64 and ARM only
    isal_zlib = zlib

MAGIC = b"\x89PNG\r\n\x1a\n"
CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
COLOUR = (b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM")
ANCILLARY = (*COLOUR, b"tRNS", b"eXIf")  # the ancillary chunks that change the picture; all others are not read
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # colour types
MODES = {  # Pillow's mode and raw mode by colour type and bit depth (11.2.1)
    (GREY, 1): ("1", "1"),
    (GREY, 2): ("L", "L;2"),
    (GREY, 4): ("L", "L;4"),
    (GREY, 8): ("L", "L"),
    (GREY, 16): ("I;16", "I;16B"),
    (RGB, 8): ("RGB", "RGB"),
    (RGB, 16): ("RGB", "RGB;16B"),  # the high byte of each sample
    (PALETTE, 1): ("P", "P;1"),
    (PALETTE, 2): ("P", "P;2"),
    (PALETTE, 4): ("P", "P;4"),
    (PALETTE, 8): ("P", "P"),
    (GREY_ALPHA, 8): ("LA", "LA"),
    (GREY_ALPHA, 16): ("RGBA", "LA;16B"),
    (RGB_ALPHA, 8): ("RGBA", "RGBA"),
    (RGB_ALPHA, 16): ("RGBA", "RGBA;16B"),
}
# Pillow's raw mode for the low byte of each sample of a big-endian file. Its name is that of the little-endian format,
# in which the byte at this place is the high one.
LOW_BYTES = "RGB;16L"
# Maximum number of chunks of a file. Encoders put 8 KiB into each chunk; some put 256 bytes, so 100 MiB have 400,000
# chunks. Without a limit, 8 million empty chunks take 27 s.
MAX_CHUNKS = 500_000
STRIP_ROWS = 64  # rows that are compared with a transparent colour at once
SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}  # per pixel, by colour type
# The passes of interlacing (8.1): first column, first row, column step, row step. The last pass is every second row.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
BLOCK = 32768  # compressed bytes that are read at once
MAX_STORED = 65535  # bytes of one block that is not compressed (RFC 1951, 3.2.4)


class Png(ImageFile.ImageFile):
    """The image of a PNG file; of an animated PNG the default image.

    The file must be a file of the file system. Walks all chunks and checks the critical ones before it decodes a pixel.
    A damaged ancillary chunk is ignored, and nothing else is lost (13.1).

    Raises Unusable: the constructor with undecodable, truncated or too_costly, load() with undecodable or truncated.
    """

    format = "PNG"
    format_description = "Portable network graphics"

    def _open(self) -> None:
        # Without a length, mmap would call newfstatat(2), which the sandbox denies.
        self._data = mmap(self.fp.fileno(), self.fp.seek(0, 2), access=ACCESS_READ)
        chunks, idat_start = _read_chunks(self._data)
        header = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
        width, height, depth, colour_type, compression, filtering, interlace = header
        if not (0 < width < 2**31 and 0 < height < 2**31):
            raise unusable("undecodable", what=f"a PNG of {width} x {height} pixels")
        if (colour_type, depth) not in MODES:
            what = f"a PNG of colour type {colour_type} with {depth} bits; there is no such kind"
            raise unusable("undecodable", what=what)
        for field, method, highest in (
            ("compression", compression, 0),
            ("filter", filtering, 0),
            ("interlace", interlace, 1),
        ):
            if method > highest:
                raise unusable("undecodable", what=f"a PNG of {field} method {method}, which is unknown")
        self._size = width, height
        self._mode, raw_mode = MODES[colour_type, depth]
        self._wide_key: bytes | None = None
        self._zlib = isal_zlib
        self._passes = ADAM7 if interlace else ((0, 0, 1, 1),)
        self._pixel_bits = depth * SAMPLES[colour_type]
        if interlace:
            self.decoderconfig = (1,)
        if colour_type == PALETTE:
            self._set_palette(chunks.get(b"PLTE", b""), chunks.get(b"tRNS", b""))
        else:
            self._set_transparent_colour(chunks.get(b"tRNS", b""), colour_type, depth)
        self.info["exif"] = chunks.get(b"eXIf", b"")
        self.info["icc_profile"] = _profile(chunks, colour_type in (GREY, GREY_ALPHA))
        self.tile = [ImageFile._Tile("zip", (0, 0, width, height), idat_start, raw_mode)]

    def _set_palette(self, palette: bytes, alphas: bytes) -> None:
        """Takes PLTE (11.2.2) and tRNS (11.3.1.1)."""
        count = len(palette) // 3
        if not palette:
            raise unusable("undecodable", what="a PNG with palette colours, and without a palette")
        if len(palette) % 3 or count > 256:
            what = f"a palette of {len(palette)} bytes; it has 3 for each of up to 256 colours"
            raise unusable("undecodable", what=what)
        if len(alphas) > count:
            raise unusable("undecodable", what=f"transparency of {len(alphas)} colours for a palette of {count}")
        self.palette = ImagePalette.raw("RGB", palette.ljust(768, b"\0"))  # an index beyond it is black (13.1)
        if alphas:
            self.info["transparency"] = alphas

    def _set_transparent_colour(self, key: bytes, colour_type: int, depth: int) -> None:
        """Takes tRNS (11.3.1.1): the one colour that is transparent, as a value of the decoded image."""
        highest = (1 << depth) - 1
        if colour_type == GREY and len(key) == 2:
            (level,) = struct.unpack(">H", key)
            # The decoded image has 16 bits unscaled. Fewer bits are scaled to 8.
            self.info["transparency"] = level if depth == 16 else (level & highest) * 255 // highest
        if colour_type == RGB and len(key) == 6:
            if depth == 16:
                self._wide_key = key
            else:
                self.info["transparency"] = tuple(level & highest for level in struct.unpack(">3H", key))

    def load(self):
        """Decodes all pixels."""
        tile = self.tile
        try:
            try:
                return self._load()
            except isal_zlib.error:  # zlib decides about data that ISA-L refuses
                self.tile, self._zlib = tile, zlib
                return self._load()
        except (OSError, zlib.error) as fault:
            if getattr(fault, "errno", None) is not None:  # the disk's fault, not the file's
                raise
            raise unusable("undecodable", what="the compressed pixels are damaged") from fault

    def _load(self):
        return self._load_twice() if self.tile and self._wide_key else super().load()

    def _load_twice(self):
        """Decodes RGB with a transparent colour of 16 bits in two passes.

        Pillow decodes 16 bits to 8, either the low or the high bytes. A pixel is transparent where both are the key's.
        """
        file, (tile,) = self.fp, self.tile
        self.tile = [tile._replace(args=LOW_BYTES)]
        super().load()
        opaque = _mask_of_other_colours(self, self._wide_key[1::2])
        self._im = None  # so that only one of the two images takes memory
        self.fp, self.tile = file, [tile]
        super().load()
        self.putalpha(ImageChops.lighter(opaque, _mask_of_other_colours(self, self._wide_key[::2])))
        return super().load()

    def load_seek(self, at: int) -> None:
        """Goes to the chunk that begins at byte `at` of the file. Pillow calls it before it decodes."""
        self._at, self._left = at, 0
        self._stream = self._stored_pixels()

    def load_read(self, _size: int) -> bytes:
        """Returns some more bytes of a zlib stream. Pillow calls it until it has all pixels."""
        return next(self._stream, b"")

    def _stored_pixels(self) -> Iterator[bytes]:
        """Yields the inflated pixels as a zlib stream of blocks that are not compressed (RFC 1950; RFC 1951, 3.2.4).

        Pillow's decoder can only inflate with zlib. That takes three quarters of the time of a photograph. ISA-L takes
        a quarter of zlib's time, and Pillow then only copies. The checksum at the end is not needed: Pillow does not
        read beyond the last row, and each chunk has a checksum of its own.

        Raises zlib.error or isal_zlib.error where the data is damaged, and Unusable with truncated where it is short.
        """
        head = b""
        while len(head) < 2:
            head += self._read_compressed(2 - len(head))
        # Deflate with a window of 32 KiB at most, without a dictionary.
        if int.from_bytes(head, "big") % 31 or head[0] & 15 != 8 or head[0] >> 4 > 7 or head[1] & 32:
            raise zlib.error("the data does not begin as a zlib stream of a PNG")
        yield b"\x78\x01"
        needed = left = self._count_bytes()
        inflater = self._zlib.decompressobj(-zlib.MAX_WBITS)
        while left:
            most = min(left, MAX_STORED)
            part = inflater.decompress(inflater.unconsumed_tail, most)  # also what the inflater still holds
            if not part and inflater.eof:
                raise unusable("truncated", what=f"the pixels inflate to {needed - left} of {needed} bytes")
            part = part or inflater.decompress(self._read_compressed(BLOCK), most)
            left -= len(part)
            if part:
                yield struct.pack("<BHH", 0, len(part), len(part) ^ 0xFFFF) + part

    def _count_bytes(self) -> int:
        """Returns how many bytes the pixels have, with the filter byte of each row."""
        count = 0
        for x, y, dx, dy in self._passes:
            columns, rows = -(-(self.width - x) // dx), -(-(self.height - y) // dy)
            count += rows * (1 + -(-columns * self._pixel_bits // 8)) if columns > 0 and rows > 0 else 0
        return count

    def _read_compressed(self, size: int) -> bytes:
        """Returns up to `size` of the next compressed bytes, from as many IDAT chunks as needed.

        Raises Unusable with truncated where there are no more.
        """
        parts = []
        while size:
            if not self._left:
                length, name = struct.unpack_from(">I4s", self._data, self._at)
                if name != b"IDAT":
                    break
                self._at += 8
                self._left = length
            part = self._data[self._at : self._at + min(size, self._left)]
            parts.append(part)
            size -= len(part)
            self._left -= len(part)
            self._at += len(part) + (0 if self._left else 4)  # after a chunk's data are 4 bytes of CRC
        if not any(parts):
            raise unusable("truncated", what="the compressed pixels end before the last row")
        return b"".join(parts)


def _read_chunks(data: mmap) -> tuple[dict[bytes, bytes], int]:
    """Returns the data of the chunks that decoding needs, by name, and the byte where the first IDAT chunk begins.

    Of several chunks with one name the first counts. A chunk in a place where it is not allowed (5.6) is left out.
    """
    chunks: dict[bytes, bytes] = {}
    idat_start = 0
    for name, start, end in _walk_chunks(data):
        if name in (b"IHDR", b"PLTE") and name in chunks:
            raise unusable("undecodable", what=f"a PNG with two {name.decode()} chunks")
        if name == b"IHDR" and end - start != 13:
            raise unusable("undecodable", what=f"an IHDR chunk of {end - start} bytes; it has 13")
        if name == b"IDAT":
            idat_start = idat_start or start - 8
        too_late = bool(idat_start) and name != b"eXIf"  # some programs write eXIf last
        if name in COLOUR:
            too_late = too_late or b"PLTE" in chunks
        too_early = name == b"tRNS" and chunks[b"IHDR"][9] == PALETTE and b"PLTE" not in chunks
        if not too_late and not too_early and name not in chunks:
            chunks[name] = data[start:end]
    if not idat_start:
        raise unusable("undecodable", what="a PNG without pixels: it has no IDAT chunk")
    return chunks, idat_start


def _walk_chunks(data: mmap) -> Iterator[tuple[bytes, int, int]]:
    """Yields name, start and end of the data of every critical chunk, and of those in ANCILLARY whose CRC is right.

    Raises Unusable with undecodable or truncated where a critical chunk or the sequence of chunks is damaged, and with
    too_costly where there are more than MAX_CHUNKS.
    """
    at, name, count = len(MAGIC), b"", 0
    view = memoryview(data)
    while name != b"IEND":
        count += 1
        if count > MAX_CHUNKS:
            raise unusable("too_costly", what=f"a PNG of more than {MAX_CHUNKS} chunks")
        if len(data) - at < 8:
            raise unusable("truncated", what=f"a PNG that ends after {len(data)} bytes, without its IEND chunk")
        size, name = struct.unpack_from(">I4s", data, at)
        start, end = at + 8, at + 8 + size
        critical = not name[0] & 0x20  # bit 5 of the first letter (5.4)
        if not name.isalpha() or (at == len(MAGIC) and name != b"IHDR"):
            raise unusable("undecodable", what=f"there is no {'IHDR ' if at == len(MAGIC) else ''}chunk at byte {at}")
        if critical and name not in CRITICAL:
            raise unusable("undecodable", what=f"a critical chunk {name.decode()}, which is unknown")
        if end + 4 > len(data):
            present = max(0, len(data) - start)
            what = f"the file has {present} of the {size} bytes of its {name.decode()} chunk"
            raise unusable("truncated", what=what)
        if critical or name in ANCILLARY:
            valid = zlib.crc32(view[at + 4 : end]) == int.from_bytes(view[end : end + 4], "big")
            if critical and not valid:
                what = f"the {name.decode()} chunk at byte {at} is damaged: its checksum is wrong"
                raise unusable("undecodable", what=what)
            if valid:
                yield name, start, end
        at = end + 4


def _mask_of_other_colours(image: Image.Image, key: bytes) -> Image.Image:
    """Returns a mask: 255 where a pixel has another colour than `key` (red, green, blue), else 0."""
    tables = [[255 * (value != level) for value in range(256)] for level in key]
    mask = Image.new("L", image.size)
    for top in range(0, image.height, STRIP_ROWS):
        strip = image.crop((0, top, image.width, min(top + STRIP_ROWS, image.height)))
        red, green, blue = (band.point(table) for band, table in zip(strip.split(), tables, strict=True))
        mask.paste(ImageChops.lighter(ImageChops.lighter(red, green), blue), (0, top))
    return mask


def _profile(chunks: dict[bytes, bytes], grey: bool) -> bytes | None:
    """Returns the ICC profile of the image's colours.

    The first valid chunk in the order of precedence decides (4.3, table 1). Returns None where no chunk states a colour
    space, and AS_SRGB where the colours need no conversion.
    """
    for read in (_profile_of_cicp, _profile_of_iccp, _profile_of_srgb, _profile_of_gama_and_chrm):
        profile = read(chunks, grey)
        if profile is not None:
            return profile
    return None


def _profile_of_cicp(chunks: dict[bytes, bytes], grey: bool) -> bytes | None:
    """11.3.2.6: four code points of ITU-T H.273."""
    points = chunks.get(b"cICP", b"")
    return colour.coded(*points, grey) if len(points) == 4 else None


def _profile_of_iccp(chunks: dict[bytes, bytes], grey: bool) -> bytes | None:
    """11.3.2.3: a name of 1 to 79 bytes, a zero, the compression method 0, the compressed profile."""
    name, _, rest = chunks.get(b"iCCP", b"").partition(b"\0")
    if not 1 <= len(name) <= 79 or rest[:1] != b"\0":
        return None
    try:
        profile = zlib.decompressobj().decompress(rest[1:], colour.MAX_PROFILE_BYTES + 1)
    except zlib.error:
        return None
    return profile if colour.fits(profile, b"GRAY" if grey else b"RGB ") else None


def _profile_of_srgb(chunks: dict[bytes, bytes], grey: bool) -> bytes | None:
    """11.3.2.5: one byte, the rendering intent."""
    return colour.AS_SRGB if len(chunks.get(b"sRGB", b"")) == 1 else None


def _profile_of_gama_and_chrm(chunks: dict[bytes, bytes], grey: bool) -> bytes | None:
    """11.3.2.2 and 11.3.2.1: the exponent, and x and y of white, red, green and blue; both times 100,000."""
    gamma, points = chunks.get(b"gAMA", b""), chunks.get(b"cHRM", b"")
    exponent = space = None
    if len(gamma) == 4 and any(gamma):
        exponent = 100_000 / int.from_bytes(gamma, "big")
    if len(points) == 32:
        values = [part / 100_000 for part in struct.unpack(">8i", points)]
        space = list(zip(values[::2], values[1::2], strict=True))
    if not exponent and not space:
        return None
    return colour.described(space, [exponent] * 3 if exponent else None, grey)
