"""Reads JPEG files (ITU T.81), and refuses damaged ones.

Pillow reads the header. It does not decode the pixels, because it ignores libjpeg's warnings: a damaged file would
become a grey or shifted picture. simplejpeg raises on these warnings, so it decodes the pixels. It uses libjpeg-turbo
as Pillow does, and returns the same pixels. Section and table numbers are of ITU T.81.
"""

import re
import struct
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap

import simplejpeg
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from workers.errors import unusable

# Markers (table B.1): 0xFF and a code. Excluded are a stuffed byte (0x00), a fill byte (0xFF) and restart markers.
MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)
RESTART = re.compile(rb"\xff([\xd0-\xd7])")
FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # SOF of Huffman and arithmetic coding, sequential and progressive
SOI, EOI, SOS, DNL, TEM = 0xD8, 0xD9, 0xDA, 0xDC, 0x01
APP0, APP14, APP15, COM = 0xE0, 0xEE, 0xEF, 0xFE
LOSSLESS, HIERARCHICAL = "a lossless JPEG", "a hierarchical JPEG"
UNSUPPORTED = {
    0xC3: LOSSLESS,
    0xCB: LOSSLESS,
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF, 0xDE), HIERARCHICAL),  # differential frames, DHP
    0xF7: "a JPEG-LS image",  # ITU T.87, table C.1
}
MAX_SCANS = 100  # maximum number of scans of a progressive JPEG; encoders write about 10

# Texts of libjpeg (jerror.h). libjpeg reports only the text of its first warning about a file.
FILE_ENDS = "Premature end of JPEG file"
HARMLESS = re.compile(
    r"Corrupt JPEG data: \d+ extraneous bytes before marker|Inconsistent progression|Invalid SOS parameters"
)
UNKNOWN_SAMPLING = "Could not determine subsampling"  # TurboJPEG has no name for this subsampling
NO_MEMORY = "Insufficient memory"


class Jpeg(JpegImageFile):
    """The first picture of a JPEG file. Pillow's Image.open() would load the plugin for MPO files, which have several.

    The file must be a file of the file system. The constructor raises Unusable with unsupported, and struct.error or
    IndexError for a frame header that is cut, which the pipeline reports as undecodable. load() raises Unusable with
    too_many_scans, truncated or undecodable.

    A colour image has the mode RGBX after load(): Pillow holds RGB in four bytes a pixel, and simplejpeg writes these
    four bytes.
    """

    def _open(self) -> None:
        with self._mapped() as data:
            _check_kind(data)
        super()._open()

    def _mapped(self) -> mmap:
        """Maps the whole file. Without a length, mmap would call newfstatat(2), which the sandbox denies."""
        position = self.fp.tell()
        length = self.fp.seek(0, 2)
        self.fp.seek(position)
        return mmap(self.fp.fileno(), length, access=ACCESS_READ)

    def _read_dpi_from_exif(self) -> None:
        """Does nothing. The resolution is never used, and reading it would load Pillow's plugin for TIFF."""

    def load(self):
        """Decodes all pixels at the size that draft() chose."""
        if self.tile:
            progressive = bool(self.info.get("progressive"))
            with self._mapped() as data:
                if progressive:
                    _check_scans(data)
                clean = _clean(data, self.layers, progressive)
            image = self._decode(clean)
            if image:
                self.im, self._mode, self._size, self.tile = image.im, image.mode, image.size, []
        return super().load()

    def _decode(self, data: bytes) -> Image.Image | None:
        """Decodes all pixels at the size that draft() chose. Returns None where simplejpeg lacks the subsampling.

        Pillow then decodes the file. Raises Unusable, and MemoryError where libjpeg ran out of memory.
        """
        try:
            return self._pixels(data)
        except ValueError as fault:
            warning = str(fault)
        if NO_MEMORY in warning:
            raise MemoryError(warning)
        if UNKNOWN_SAMPLING in warning:
            return None
        # Some encoders write no EOI. Everything before it must be there.
        if warning == FILE_ENDS and self._has_one_scan(data):
            try:
                return self._pixels(data + bytes([0xFF, EOI]))
            except ValueError:
                raise unusable("truncated", warning) from None
        if HARMLESS.match(warning):
            _check_scan_ends(data, warning)
            return self._pixels(data, strict=False)
        raise unusable("truncated" if warning == FILE_ENDS else "undecodable", warning)

    def _pixels(self, data: bytes, strict: bool = True) -> Image.Image:
        """Raises ValueError with libjpeg's text. `strict`: also where libjpeg only warns."""
        mode = {"RGB": "RGBX"}.get(self.mode, self.mode)
        # TurboJPEG takes the smallest size that is not below the given one, which is the size that draft() chose. Where
        # draft() chose the full size, no size is given: an image of 1x1 pixel also has 1x1 pixel at 1/8.
        width, height = self.size if self.decoderconfig and self.decoderconfig[0] > 1 else (0, 0)
        pixels = simplejpeg.decode_jpeg(
            data, {"L": "GRAY"}.get(mode, mode), min_width=width, min_height=height, strict=strict
        )
        # CMYK is read inverted, because Adobe writes it so; Pillow does the same.
        raw_mode = "CMYK;I" if mode == "CMYK" else mode
        return Image.frombuffer(mode, (pixels.shape[1], pixels.shape[0]), pixels, "raw", raw_mode, 0, 1)

    def _has_one_scan(self, data: bytes) -> bool:
        """Whether the file is sequential and its first scan holds all components (B.2.3). No later scan adds to it."""
        components = next((data[start + 4] for code, start, _ in _segments(data) if code == SOS), None)
        return not self.info.get("progressive") and components == self.layers


def _segments(data: bytes | mmap) -> Iterator[tuple[int, int, int]]:
    """Yields code, start and end of each marker segment (B.1.1.4), from SOI (excluded) to EOI or the end of the data.

    The coded bytes of a scan begin at the end of its SOS segment. Bytes between other segments are skipped, as libjpeg
    skips them.
    """
    at = 2
    while marker := MARKER.search(data, at):
        code, at = marker[1][0], marker.end()
        if code not in (SOI, EOI, TEM):
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
        yield code, marker.start(), at
        if code == EOI:
            return


def _check_kind(data: bytes | mmap) -> None:
    """Refuses valid files of kinds that are not decoded.

    Raises Unusable with unsupported, and struct.error where the frame header is cut.
    """
    height = None
    segments = _segments(data)
    for code, start, end in segments:
        if code in UNSUPPORTED:
            raise unusable("unsupported", what=UNSUPPORTED[code])
        if code in FRAMES:  # the frame header (B.2.2)
            precision, height, _, count = struct.unpack_from(">BHHB", data, start + 4)
            if precision == 12:
                raise unusable("unsupported", what="a JPEG of 12 bits a sample")
            if end - start != 10 + 3 * count:
                continue  # damaged: decoding reports it
            if count not in (1, 3, 4):
                raise unusable("unsupported", what=f"a JPEG of {count} components")
            factors = [data[at] for at in range(start + 11, end, 3)]
            horizontal = [factor >> 4 for factor in factors]
            vertical = [factor & 15 for factor in factors]
            if all(1 <= factor <= 4 for factor in horizontal + vertical) and any(
                max(direction) % factor for direction in (horizontal, vertical) for factor in direction
            ):
                raise unusable("unsupported", what="a JPEG with a subsampling by fractions")
        if code == SOS:
            if height == 0 and next(segments, (None,))[0] == DNL:  # B.2.5
                raise unusable("unsupported", what="a JPEG that states its height after its first scan (DNL)")
            return


def _check_scans(data: bytes | mmap) -> None:
    """Raises Unusable with too_many_scans. Each scan is a pass over all pixels, however few bytes it has.

    The limit of CPU time would stop such a file too, but only after that time, and only in the sandbox.
    """
    # This count is too high where thumbnails or data after the picture hold scans. But it is fast.
    if sum(1 for _ in re.finditer(rb"\xff\xda", data)) <= MAX_SCANS:
        return
    scans = sum(1 for code, _, _ in _segments(data) if code == SOS)
    if scans > MAX_SCANS:
        raise unusable("too_many_scans", scans=scans, most=MAX_SCANS)


def _check_scan_ends(data: bytes, warning: str) -> None:
    """Finds what libjpeg would report after its first `warning`: no EOI, and restarts out of order (B.2.1).

    Raises Unusable with truncated or undecodable.
    """
    code_before, scan_start = None, 0
    for code, start, end in _segments(data):
        if code_before == SOS and any(
            restart[1][0] != 0xD0 + number % 8
            for number, restart in enumerate(RESTART.finditer(data, scan_start, start))
        ):
            raise unusable("undecodable", f"{warning}; restart markers are out of order")
        code_before, scan_start = code, end
    if code_before != EOI:
        raise unusable("truncated", f"{warning}; no end of image")


def _clean(data: bytes | mmap, components: int, progressive: bool) -> bytes:
    """Returns the file without metadata, and with a header that libjpeg does not warn about.

    libjpeg reports only its first warning. A harmless warning would hide one about damage. Harmless ones come from
    cameras, and libjpeg goes on after each. The values written here are those that libjpeg then assumes:

    | libjpeg warns about | written instead |
    |---|---|
    | bytes between segments | nothing |
    | another revision of JFIF than 1 | revision 1 |
    | an unknown colour transform in Adobe's segment | YCCK (2) for four components, else YCbCr (1) |
    | unusual scan parameters in a sequential file | 0, 63, 0 (B.2.3: Ss, Se, Ah and Al) |
    """
    parts = [b"\xff\xd8"]
    for code, start, end in _segments(data):
        segment = data[start:end]
        if code == SOS:
            if not progressive:
                segment = segment[:-3] + b"\0\x3f\0"
            return b"".join([*parts, segment, memoryview(data)[end:]])
        if code == APP0 and segment[4:9] == b"JFIF\0":
            segment = segment[:9] + b"\1" + segment[10:]
        elif code == APP14 and segment[4:9] == b"Adobe" and len(segment) >= 16:
            transform = bytes([segment[15] and (2 if components == 4 else 1)])
            segment = segment[:15] + transform + segment[16:]
        elif APP0 <= code <= APP15 or code == COM:
            continue
        parts.append(segment)
    return b"".join(parts)
