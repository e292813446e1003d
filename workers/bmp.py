"""BMP: headers of OS/2 and Windows, palettes, colour masks and colour spaces.

Sources: Microsoft's "Bitmap Storage", "BITMAPV4HEADER" and "BITMAPV5HEADER"; IBM's "OS/2 2.0 Presentation Manager
Reference", Bitmap File Format. Pillow has a reader of its own, which knows eleven layouts of masks, drops the alpha
of the newer headers and reads no colour space. Its unpackers are used here for the layouts that they know.
"""

import struct

from PIL import Image, ImageChops, ImageFile, ImagePalette

import workers.rle  # noqa: F401  registers its decoder
from workers import colour
from workers.errors import unusable

FILE_HEADER = 14  # bytes before the header of the image
WINDOWS = (40, 52, 56, 108, 124)  # bytes of the headers of Windows, versions 3 (40 to 56), 4 and 5
BITS = (1, 2, 4, 8, 16, 24, 32)  # of a pixel
RAW, RLE8, RLE4, BITFIELDS, JPEG, PNG, ALPHABITFIELDS = range(7)  # Windows' compressions
HUFFMAN, RLE24 = 3, 4  # OS/2 has these two in the place of BITFIELDS and JPEG
CMYK = (11, 12, 13)  # for printers: plain, RLE8 and RLE4
NO_MASKS = {16: (0x7C00, 0x3E0, 0x1F, 0), 24: (0xFF0000, 0xFF00, 0xFF, 0), 32: (0xFF0000, 0xFF00, 0xFF, 0)}
# What Pillow unpacks by itself: its mode and raw mode for the masks of red, green, blue and alpha.
UNPACKERS = {
    (16, NO_MASKS[16]): ("RGB", "BGR;15"),
    (16, (0xF800, 0x7E0, 0x1F, 0)): ("RGB", "BGR;16"),
    (24, NO_MASKS[24]): ("RGB", "BGR"),
    (32, NO_MASKS[32]): ("RGB", "BGRX"),
    (32, (0xFF000000, 0xFF0000, 0xFF00, 0)): ("RGB", "XBGR"),
    (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)): ("RGBA", "BGRA"),
    (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)): ("RGBA", "RGBA"),
    (32, (0xFF000000, 0xFF0000, 0xFF00, 0xFF)): ("RGBA", "ABGR"),
}
EMBEDDED = 0x4D424544  # 'MBED': the file holds an ICC profile. 'LINK', the path of one, is ignored: a stranger wrote it
CALIBRATED = 0  # LCS_CALIBRATED_RGB: endpoints and exponents stand in the header


class Bmp(ImageFile.ImageFile):
    """A BMP file. Raises Unusable with undecodable, unsupported or truncated."""

    format = "BMP"
    format_description = "Windows Bitmap"

    def _open(self) -> None:
        head = self.fp.read(FILE_HEADER + max(WINDOWS))
        if len(head) < FILE_HEADER + 4:
            raise unusable("truncated", what=f"a BMP of {len(head)} bytes ends in its header")
        offset, size = struct.unpack_from("<II", head, 10)
        if size != 12 and not 16 <= size <= 64 and size not in WINDOWS:
            raise unusable("undecodable", what=f"a BMP header of {size} bytes; they have 12, 16 to 64, 108 or 124")
        if len(head) < FILE_HEADER + size:
            raise unusable("truncated", what=f"a BMP of {len(head)} bytes ends in its header of {size} bytes")
        info = head[FILE_HEADER : FILE_HEADER + size].ljust(max(WINDOWS), b"\0")
        if size == 12:
            width, height, _, bits = struct.unpack_from("<4H", info, 4)
            compression = colours = 0
        else:
            width, height, _, bits, compression, colours = struct.unpack_from("<iiHHI12xI", info, 4)
        _check_kind(size, bits, compression)
        if width <= 0 or height == 0:
            raise unusable("undecodable", what=f"a BMP of {width} x {height} pixels")
        self._size = width, abs(height)
        self._profile(info, size)
        direction = 1 if height < 0 else -1
        if bits <= 8:
            start = self._palette(offset, size, bits, colours)
            rle = compression in (RLE8, RLE4)
            raw = self.mode if rle or bits == 8 else f"P;{bits}"
        else:
            masks, start = self._masks(head, size, bits, compression)
            start = offset if offset > start else start + 4 * colours
            rle, unpacker = False, UNPACKERS.get((bits, masks))
            self._mode, raw = unpacker or ("RGBA" if masks[3] else "RGB", None)
        self._stride = (width * bits + 31) // 32 * 4
        self._row = (width * bits + 7) // 8
        if rle:
            how = "bmp_rle", (raw, compression == RLE4, direction)
        elif raw:
            how = "raw", (raw, self._stride, direction)
        else:
            how = "bmp_masks", (bits, masks, self._stride, direction)
        self.tile = [ImageFile._Tile(how[0], (0, 0, *self.size), start, how[1])]

    def _palette(self, offset: int, size: int, bits: int, colours: int) -> int:
        """Read the palette; return where the pixels are. A pixel of a colour that it lacks is black."""
        start, entry, most = FILE_HEADER + size, 3 if size == 12 else 4, 1 << bits
        count = min(colours or most, most)
        if offset > start:  # OS/2's files may have fewer than they should
            count = min(count, (offset - start) // entry)
        else:
            offset = start + count * entry
        self.fp.seek(start)
        values = self.fp.read(count * entry)
        ramp = bytes(range(len(values) // entry))
        grey = bits == 8 and all(values[band::entry][: len(ramp)] == ramp for band in range(3))
        self._mode = "P"
        if grey and not self.info.get("icc_profile"):
            self._mode = "L"
        else:
            self.palette = ImagePalette.raw("BGR" if entry == 3 else "BGRX", values.ljust(256 * entry, b"\0"))
        return offset

    def _masks(self, head: bytes, size: int, bits: int, compression: int) -> tuple[tuple[int, ...], int]:
        """The masks of red, green, blue and alpha, and where they end: in the header, or behind one of 40 bytes."""
        end = FILE_HEADER + size
        if compression == RAW:
            return NO_MASKS[bits], end
        count = 4 if size >= 56 or (size == 40 and compression == ALPHABITFIELDS) else 3
        try:
            masks = struct.unpack_from(f"<{count}I", head, FILE_HEADER + 40)
        except struct.error:
            raise unusable("truncated", what=f"a BMP of {len(head)} bytes ends in its colour masks") from None
        if size == 40:
            end += 4 * count
        masks = (*masks, 0)[:4]
        if not any(masks):  # nobody can mean that; some programs write it
            masks = NO_MASKS[bits]
        told = " ".join(f"{mask:x}" for mask in masks)
        if bits == 24 and masks != NO_MASKS[24]:
            what = f"a BMP of 24 bits with the colour masks {told}; it has bytes in one order"
            raise unusable("undecodable", what=what)
        used = 0
        for mask in masks:
            if mask >> bits or used & mask or (mask | mask - 1) + 1 & mask:
                raise unusable("undecodable", what=f"colour masks {told} that overlap, have gaps, or pass {bits} bits")
            used |= mask
        return masks, end

    def _profile(self, info: bytes, size: int) -> None:
        """The colour space of headers of version 4 and 5, as an ICC profile."""
        (kind,) = struct.unpack_from("<I", info, 56)
        if size == 124 and kind == EMBEDDED:
            start, length = struct.unpack_from("<II", info, 112)
            self.fp.seek(FILE_HEADER + start)
            profile = self.fp.read(min(length, colour.PROFILE))
            if len(profile) == length and colour.fits(profile, b"RGB "):
                self.info["icc_profile"] = profile
        elif size >= 108 and kind == CALIBRATED:
            # Numbers with 30 and 16 bits behind the point. The white is not told, and nobody takes another than D65.
            ends = [part / 2**30 for part in struct.unpack_from("<9I", info, 60)]
            gammas = [part / 2**16 for part in struct.unpack_from("<3I", info, 96)]
            sums = [sum(ends[at : at + 3]) for at in (0, 3, 6)]
            if all(sums):  # many programs leave it all 0
                space = [(ends[3 * at] / whole, ends[3 * at + 1] / whole) for at, whole in enumerate(sums)]
                self.info["icc_profile"] = colour.described([colour.D65, *space], gammas, grey=False)

    def load_prepare(self) -> None:
        """Called after the size was checked, and before the memory for the pixels is taken."""
        decoder, _, start, _ = self.tile[0]
        if decoder != "bmp_rle":  # how long those are, only decoding tells
            there = max(0, self.fp.seek(0, 2) - start)
            needed = self._stride * (self.height - 1) + self._row  # the last row need not be filled up
            if there < needed:
                raise unusable("truncated", what=f"{there} of the {needed} bytes of pixels are there")
        super().load_prepare()

    def load_end(self) -> None:
        """Makes an image opaque whose alpha hides all of it: some programs leave alpha 0 and do not mean it."""
        if self.mode == "RGBA" and not self.im.getbbox(True):
            self.putalpha(255)  # not the core image's setmode("RGB"), which Pillow 13 no longer has


def _check_kind(size: int, bits: int, compression: int) -> None:
    os2 = size not in WINDOWS and size != 12
    if bits == 64:
        raise unusable("unsupported", what="a BMP of 64 bits a pixel")
    if compression == HUFFMAN and bits == 1:
        raise unusable("unsupported", what="a BMP with the Huffman compression of OS/2")
    if compression == RLE24 and (os2 or size == 40 and bits == 24):
        raise unusable("unsupported", what="a BMP with the RLE24 compression of OS/2")
    if compression in (JPEG, PNG):
        held = "JPEG" if compression == JPEG else "PNG"
        raise unusable("unsupported", what=f"a BMP that holds a {held} (send the {held} itself)")
    if compression in CMYK:
        raise unusable("unsupported", what="a BMP of CMYK colours")
    if bits not in BITS:
        raise unusable("undecodable", what=f"a BMP of {bits} bits a pixel; it has 1, 2, 4, 8, 16, 24 or 32")
    allowed = {RAW: BITS, RLE8: (8,), RLE4: (4,)}
    if not os2:
        allowed |= {BITFIELDS: (16, 24, 32), ALPHABITFIELDS: (16, 32)}
    if bits not in allowed.get(compression, ()):
        raise unusable("undecodable", what=f"a BMP of compression {compression} and {bits} bits a pixel")


class Masks(ImageFile.PyDecoder):
    """Pixels of 16 or 32 bits in which masks mark red, green, blue and alpha, each of any width and place.

    Pillow's images of a byte a pixel do the work, a plane for each byte of a pixel: fast without numpy. 100 megapixels
    take about 3 s.
    """

    _pulls_fd = True

    def decode(self, buffer) -> tuple[int, int]:
        bits, masks, stride, direction = self.args
        width, height = self.state.xsize, self.state.ysize
        bytes_of = "LA" if bits == 16 else "RGBA"
        channels = [_channel(mask) for mask in masks[: len(self.mode)]]
        rows = max(1, STRIP // stride)
        for top in range(0, height, rows):
            count = min(rows, height - top)
            data = self.fd.read(count * stride).ljust(count * stride, b"\0")
            planes = Image.frombytes(bytes_of, (width, count), data, "raw", bytes_of, stride, direction).split()
            strip = Image.merge(self.mode, [channel(planes) for channel in channels])
            y = top if direction == 1 else height - top - count
            self.im.paste(strip.im, (0, y, width, y + count))
        return -1, 0


STRIP = 1024 * 1024  # bytes of pixels unpacked at once: about what the processor's cache holds


def _channel(mask: int):
    """A function from planes, one for each byte of a pixel, to the values under the mask, as 8 bits."""
    place, width = (mask & -mask).bit_length() - 1, mask.bit_count()
    if width == 0:
        return lambda planes: Image.new("L", planes[0].size)
    if width > 8:  # the highest 8
        place, width = place + width - 8, 8
    most, (plane, shift) = (1 << width) - 1, divmod(place, 8)
    scale = [round(min(value, most) * 255 / most) for value in range(256)]
    if shift + width <= 8:
        table = [scale[value >> shift & most] for value in range(256)]
        return lambda planes: planes[plane].point(table)
    lower = [value >> shift for value in range(256)]
    upper = [value << 8 - shift & most for value in range(256)]
    return lambda planes: ImageChops.add(planes[plane].point(lower), planes[plane + 1].point(upper)).point(scale)


Image.register_decoder("bmp_masks", Masks)
