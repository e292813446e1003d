"""Reads BMP files: headers of OS/2 and Windows, palettes, colour masks and colour spaces.

Sources: Microsoft's "Bitmap Storage", "BITMAPV4HEADER" and "BITMAPV5HEADER"; IBM's "OS/2 2.0 Presentation Manager
Reference", Bitmap File Format. Pillow's reader is not used: it knows only eleven layouts of masks, drops the alpha of
the newer headers and reads no colour space. Pillow's unpackers are used for the layouts that they know.

| bytes of the header | version |
|---|---|
| 12 | OS/2 1.x and Windows 2: BITMAPCOREHEADER |
| 16 to 64 | OS/2 2.x: its end may be left out |
| 40 | Windows 3: BITMAPINFOHEADER |
| 52 | BITMAPV2INFOHEADER: masks of red, green and blue too |
| 56 | BITMAPV3INFOHEADER: a mask of alpha too |
| 108 | BITMAPV4HEADER: endpoints and exponents of the colour space too |
| 124 | BITMAPV5HEADER: an ICC profile too |
"""

import struct
from collections.abc import Callable

from PIL import Image, ImageChops, ImageFile, ImagePalette

import workers.rle  # noqa: F401  registers its decoder
from workers import colour
from workers.errors import unusable

FILE_HEADER = 14  # bytes before the image's header
WINDOWS = (40, 52, 56, 108, 124)  # bytes of the Windows headers
BITS = (1, 2, 4, 8, 16, 24, 32)  # bits of a pixel
RAW, RLE8, RLE4, BITFIELDS, JPEG, PNG, ALPHABITFIELDS = range(7)  # compressions of Windows (biCompression)
HUFFMAN, RLE24 = 3, 4  # compressions of OS/2, with the numbers of BITFIELDS and JPEG
CMYK = (11, 12, 13)  # compressions for printers: plain, RLE8 and RLE4
DEFAULT_MASKS = {16: (0x7C00, 0x3E0, 0x1F, 0), 24: (0xFF0000, 0xFF00, 0xFF, 0), 32: (0xFF0000, 0xFF00, 0xFF, 0)}
# What Pillow unpacks itself: its mode and raw mode, by bits of a pixel and masks of red, green, blue and alpha.
UNPACKERS = {
    (16, DEFAULT_MASKS[16]): ("RGB", "BGR;15"),
    (16, (0xF800, 0x7E0, 0x1F, 0)): ("RGB", "BGR;16"),
    (24, DEFAULT_MASKS[24]): ("RGB", "BGR"),
    (32, DEFAULT_MASKS[32]): ("RGB", "BGRX"),
    (32, (0xFF000000, 0xFF0000, 0xFF00, 0)): ("RGB", "XBGR"),
    (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)): ("RGBA", "BGRA"),
    (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)): ("RGBA", "RGBA"),
    (32, (0xFF000000, 0xFF0000, 0xFF00, 0xFF)): ("RGBA", "ABGR"),
}
# Values of bV4CSType and bV5CSType. PROFILE_LINKED ('LINK') is ignored: it is a path, and a stranger wrote it.
PROFILE_EMBEDDED = 0x4D424544  # 'MBED': the file holds an ICC profile
LCS_CALIBRATED_RGB = 0  # the header states endpoints and exponents
STRIP_BYTES = 1024 * 1024  # bytes of pixels that are unpacked at once; about the size of a processor's cache


class Bmp(ImageFile.ImageFile):
    """A BMP file.

    Raises Unusable: the constructor with undecodable, unsupported or truncated, load() with truncated.
    """

    format = "BMP"
    format_description = "Windows Bitmap"

    def _open(self) -> None:
        head = self.fp.read(FILE_HEADER + max(WINDOWS))
        if len(head) < FILE_HEADER + 4:
            raise unusable("truncated", what=f"a BMP of {len(head)} bytes ends in its header")
        offset, size = struct.unpack_from("<II", head, 10)
        if size != 12 and not 16 <= size <= 64 and size not in WINDOWS:
            what = f"a BMP header of {size} bytes; there are headers of 12, 16 to 64, 108 and 124"
            raise unusable("undecodable", what=what)
        if len(head) < FILE_HEADER + size:
            raise unusable("truncated", what=f"a BMP of {len(head)} bytes ends in its header of {size} bytes")
        header = head[FILE_HEADER : FILE_HEADER + size].ljust(max(WINDOWS), b"\0")
        if size == 12:
            width, height, _, bits = struct.unpack_from("<4H", header, 4)
            compression = colours = 0
        else:
            width, height, _, bits, compression, colours = struct.unpack_from("<iiHHI12xI", header, 4)
        _check_kind(size, bits, compression)
        if width <= 0 or height == 0:
            raise unusable("undecodable", what=f"a BMP of {width} x {height} pixels")
        self._size = width, abs(height)
        self._read_colour_space(header, size)
        direction = 1 if height < 0 else -1  # a negative height: the first row is the top one
        self._stride = (width * bits + 31) // 32 * 4  # bytes from row to row
        self._row = (width * bits + 7) // 8  # bytes of a row that hold pixels
        if bits <= 8:
            start = self._read_palette(offset, size, bits, colours)
            if compression in (RLE8, RLE4):
                decoder, arguments = "bmp_rle", (self.mode, compression == RLE4, direction)
            else:
                decoder, arguments = "raw", (self.mode if bits == 8 else f"P;{bits}", self._stride, direction)
        else:
            masks, masks_end = self._read_masks(head, size, bits, compression)
            start = offset if offset > masks_end else masks_end + 4 * colours
            if (bits, masks) in UNPACKERS:
                self._mode, raw_mode = UNPACKERS[bits, masks]
                decoder, arguments = "raw", (raw_mode, self._stride, direction)
            else:
                self._mode = "RGBA" if masks[3] else "RGB"
                decoder, arguments = "bmp_masks", (bits, masks, self._stride, direction)
        self.tile = [ImageFile._Tile(decoder, (0, 0, *self.size), start, arguments)]

    def _read_palette(self, offset: int, size: int, bits: int, colours: int) -> int:
        """Reads the palette and returns the byte where the pixels begin. An index beyond the palette is black."""
        start = FILE_HEADER + size
        entry = 3 if size == 12 else 4  # bytes of a colour
        most = 1 << bits
        count = min(colours or most, most)
        if offset > start:  # OS/2's files may have fewer colours than their header states
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

    def _read_masks(self, head: bytes, size: int, bits: int, compression: int) -> tuple[tuple[int, int, int, int], int]:
        """Returns the masks of red, green, blue and alpha, and the byte of the file where header and masks end.

        The masks are in the header, or after a header of 40 bytes. Raises Unusable with truncated or undecodable.
        """
        end = FILE_HEADER + size
        if compression == RAW:
            return DEFAULT_MASKS[bits], end
        count = 4 if size >= 56 or (size == 40 and compression == ALPHABITFIELDS) else 3
        try:
            red, green, blue, *alpha = struct.unpack_from(f"<{count}I", head, FILE_HEADER + 40)
        except struct.error:
            raise unusable("truncated", what=f"a BMP of {len(head)} bytes ends in its colour masks") from None
        if size == 40:
            end += 4 * count
        masks = red, green, blue, alpha[0] if alpha else 0
        if not any(masks):  # some programs write zeros, which make no sense as masks
            masks = DEFAULT_MASKS[bits]
        masks_text = " ".join(f"{mask:x}" for mask in masks)
        if bits == 24 and masks != DEFAULT_MASKS[24]:
            what = f"a BMP of 24 bits with the colour masks {masks_text}; it has bytes in one order"
            raise unusable("undecodable", what=what)
        used = 0
        for mask in masks:
            if mask >> bits or used & mask or (mask | mask - 1) + 1 & mask:
                what = f"colour masks {masks_text} that overlap, have gaps, or pass {bits} bits"
                raise unusable("undecodable", what=what)
            used |= mask
        return masks, end

    def _read_colour_space(self, header: bytes, size: int) -> None:
        """Stores the colour space of BITMAPV4HEADER and BITMAPV5HEADER as an ICC profile in `info`."""
        (kind,) = struct.unpack_from("<I", header, 56)
        if size == 124 and kind == PROFILE_EMBEDDED:
            start, length = struct.unpack_from("<II", header, 112)
            self.fp.seek(FILE_HEADER + start)
            profile = self.fp.read(min(length, colour.MAX_PROFILE_BYTES))
            if len(profile) == length and colour.fits(profile, b"RGB "):
                self.info["icc_profile"] = profile
        elif size >= 108 and kind == LCS_CALIBRATED_RGB:
            # Fixed-point numbers: X, Y and Z of each primary with 30 fractional bits, exponents with 16. The
            # header does not state the white; programs take D65.
            ends = [part / 2**30 for part in struct.unpack_from("<9I", header, 60)]
            gammas = [part / 2**16 for part in struct.unpack_from("<3I", header, 96)]
            sums = [sum(ends[at : at + 3]) for at in (0, 3, 6)]
            if all(sums):  # many programs leave all of it 0
                space = [(ends[3 * at] / whole, ends[3 * at + 1] / whole) for at, whole in enumerate(sums)]
                self.info["icc_profile"] = colour.described([colour.D65, *space], gammas, grey=False)

    def load_prepare(self) -> None:
        """Checks that all pixels are in the file. Raises Unusable with truncated.

        Pillow calls it after the size was checked, and before it allocates memory for the pixels.
        """
        decoder, _, start, _ = self.tile[0]
        if decoder != "bmp_rle":  # the length of run-length encoded pixels is known only when they are decoded
            present = max(0, self.fp.seek(0, 2) - start)
            needed = self._stride * (self.height - 1) + self._row  # the last row may lack its padding
            if present < needed:
                raise unusable("truncated", what=f"the file has {present} of the {needed} bytes of pixels")
        super().load_prepare()

    def load_end(self) -> None:
        """Makes an image opaque whose alpha is 0 everywhere: some programs leave it 0 and mean an opaque image."""
        if self.mode == "RGBA" and not self.im.getbbox(True):
            self.putalpha(255)  # not the core image's setmode("RGB"), which Pillow 13 removed


def _check_kind(size: int, bits: int, compression: int) -> None:
    """Refuses combinations of header, bits and compression. Raises Unusable with unsupported or undecodable."""
    os2 = size not in WINDOWS and size != 12
    if bits == 64:
        raise unusable("unsupported", what="a BMP of 64 bits a pixel")
    if compression == HUFFMAN and bits == 1:
        raise unusable("unsupported", what="a BMP with the Huffman compression of OS/2")
    if compression == RLE24 and (os2 or size == 40 and bits == 24):
        raise unusable("unsupported", what="a BMP with the RLE24 compression of OS/2")
    if compression in (JPEG, PNG):
        content = "JPEG" if compression == JPEG else "PNG"
        raise unusable("unsupported", what=f"a BMP that holds a {content} (send the {content} itself)")
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
    """Decodes pixels of 16 or 32 bits in which masks mark red, green, blue and alpha, each of any width and place.

    Each byte of a pixel becomes an image of its own, a plane. Pillow's operations on planes do the work: fast without
    numpy. 100 megapixels take about 3 s.

    Arguments, as Pillow passes them in `args`: bits of a pixel; masks of red, green, blue and alpha; bytes from row to
    row; 1 where the first row is the top one, -1 where it is the bottom one.
    """

    _pulls_fd = True

    def decode(self, buffer) -> tuple[int, int]:
        """Returns (-1, 0), Pillow's sign for "done"."""
        bits, masks, stride, direction = self.args
        width, height = self.state.xsize, self.state.ysize
        plane_mode = "LA" if bits == 16 else "RGBA"  # one band for each byte of a pixel
        channels = [_channel_of(mask) for mask in masks[: len(self.mode)]]
        rows = max(1, STRIP_BYTES // stride)
        for top in range(0, height, rows):
            count = min(rows, height - top)
            data = self.fd.read(count * stride).ljust(count * stride, b"\0")
            planes = Image.frombytes(plane_mode, (width, count), data, "raw", plane_mode, stride, direction).split()
            strip = Image.merge(self.mode, [channel(planes) for channel in channels])
            y = top if direction == 1 else height - top - count
            self.im.paste(strip.im, (0, y, width, y + count))
        return -1, 0


def _channel_of(mask: int) -> Callable[[tuple[Image.Image, ...]], Image.Image]:
    """Returns a function from the planes, one for each byte of a pixel, to the bits under the mask scaled to 0 to 255.

    Of a mask with more than 8 bits it takes the highest 8, which may be in two neighbouring bytes.
    """
    place, width = (mask & -mask).bit_length() - 1, mask.bit_count()
    if width == 0:
        return lambda planes: Image.new("L", planes[0].size)
    if width > 8:
        place, width = place + width - 8, 8
    most = (1 << width) - 1
    plane, shift = divmod(place, 8)
    scale = [round(min(value, most) * 255 / most) for value in range(256)]
    if shift + width <= 8:
        table = [scale[value >> shift & most] for value in range(256)]
        return lambda planes: planes[plane].point(table)
    lower = [value >> shift for value in range(256)]
    upper = [value << 8 - shift & most for value in range(256)]
    return lambda planes: ImageChops.add(planes[plane].point(lower), planes[plane + 1].point(upper)).point(scale)


Image.register_decoder("bmp_masks", Masks)
