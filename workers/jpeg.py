"""Reads JPEG files (ITU T.81), strictly.

Pillow reads the header, but it swallows libjpeg's warnings: a damaged file then ends as a grey or shifted picture.
simplejpeg raises on them, so it decodes the pixels. It is libjpeg-turbo too, and makes the same pixels.
"""

import re
import struct
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap

import simplejpeg
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from workers.errors import unusable

# Markers (ITU T.81, table B.1): no stuffed byte, no fill byte, no restart.
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
SCANS = 100  # of a progressive JPEG; encoders write about 10

# libjpeg's texts (jerror.h). It words only the first warning about a file.
ENDS = "Premature end of JPEG file"
HARMLESS = re.compile(
    r"Corrupt JPEG data: \d+ extraneous bytes before marker|Inconsistent progression|Invalid SOS parameters"
)
UNKNOWN_SAMPLING = "Could not determine subsampling"  # it is not among those that TurboJPEG has a name for
NO_MEMORY = "Insufficient memory"


class Jpeg(JpegImageFile):
    """The first picture of a JPEG file. Pillow's factory would load the plugin for MPO, which has several.

    The file must be one of the file system. Opening raises Unusable with unsupported, and load() with too_many_scans,
    truncated or undecodable. A colour image has the mode RGBX after load(): these are the bytes as Pillow holds them.
    """

    def _open(self) -> None:
        with self._mapped() as data:
            _check_kind(data)
        super()._open()

    def _mapped(self) -> mmap:
        """The whole file. Its length is given because mmap would ask fstat(2) for it, which the sandbox denies."""
        at, end = self.fp.tell(), self.fp.seek(0, 2)
        self.fp.seek(at)
        return mmap(self.fp.fileno(), end, access=ACCESS_READ)

    def _read_dpi_from_exif(self) -> None:
        """Nobody asks for the resolution, and reading it would load the plugin for TIFF."""

    def load(self):
        if self.tile:
            with self._mapped() as data:
                if self.info.get("progressive"):
                    _check_scans(data)
                clean = _clean(data, self.layers, bool(self.info.get("progressive")))
            image = self._decode(clean)
            if image:
                self.im, self._mode, self._size, self.tile = image.im, image.mode, image.size, []
        return super().load()

    def _decode(self, data: bytes) -> Image.Image | None:
        """All pixels, at the size that draft() chose. None: simplejpeg does not know the subsampling."""
        try:
            return self._pixels(data)
        except ValueError as fault:
            warning = str(fault)
        if NO_MEMORY in warning:
            raise MemoryError(warning)
        if UNKNOWN_SAMPLING in warning:
            return None
        if warning == ENDS and self._has_one_scan(data):  # some encoders write no EOI; nothing else may be missing
            try:
                return self._pixels(data + bytes([0xFF, EOI]))
            except ValueError:
                raise unusable("truncated", warning) from None
        if HARMLESS.match(warning):
            _check_scan_ends(data, warning)
            return self._pixels(data, strict=False)
        raise unusable("truncated" if warning == ENDS else "undecodable", warning)

    def _pixels(self, data: bytes, strict: bool = True) -> Image.Image:
        """Raises ValueError with libjpeg's text; where it is `strict`, also for what libjpeg only warns about."""
        mode = {"RGB": "RGBX"}.get(self.mode, self.mode)
        # TurboJPEG takes the smallest size that is not below this one, so the same. Where draft() chose the full size,
        # no size is given: an image of 1x1 is also 1x1 at an eighth.
        width, height = self.size if self.decoderconfig and self.decoderconfig[0] > 1 else (0, 0)
        pixels = simplejpeg.decode_jpeg(
            data, {"L": "GRAY"}.get(mode, mode), min_width=width, min_height=height, strict=strict
        )
        # As Pillow does, CMYK is taken as Adobe writes it, inverted.
        how = "CMYK;I" if mode == "CMYK" else mode
        return Image.frombuffer(mode, (pixels.shape[1], pixels.shape[0]), pixels, "raw", how, 0, 1)

    def _has_one_scan(self, data: bytes) -> bool:
        """A sequential file whose first scan holds all components (B.2.3): what follows it adds nothing."""
        held = next((data[start + 4] for code, start, _ in _segments(data) if code == SOS), None)
        return not self.info.get("progressive") and held == self.layers


def _segments(data: bytes | mmap) -> Iterator[tuple[int, int, int]]:
    """Code, start and end of each marker segment (B.1.1.4), from behind SOI to EOI or the end of the data.

    The coded bytes of a scan follow the end of its SOS. Bytes between other segments are skipped, as libjpeg does.
    """
    at = 2
    while found := MARKER.search(data, at):
        code, at = found[1][0], found.end()
        if code not in (SOI, EOI, TEM):
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
        yield code, found.start(), at
        if code == EOI:
            return


def _check_kind(data: bytes | mmap) -> None:
    """Refuse valid files of kinds that are not decoded. Raises struct.error where the header is cut."""
    height, walk = None, _segments(data)
    for code, start, end in walk:
        if code in UNSUPPORTED:
            raise unusable("unsupported", what=UNSUPPORTED[code])
        if code in FRAMES:  # B.2.2
            precision, height, _, count = struct.unpack_from(">BHHB", data, start + 4)
            if precision == 12:
                raise unusable("unsupported", what="a JPEG of 12 bits a sample")
            if end - start != 10 + 3 * count:
                continue  # damaged
            if count not in (1, 3, 4):
                raise unusable("unsupported", what=f"a JPEG of {count} components")
            factors = [data[at] for at in range(start + 11, end, 3)]
            across, down = [factor >> 4 for factor in factors], [factor & 15 for factor in factors]
            if all(1 <= factor <= 4 for factor in across + down) and any(
                max(ways) % factor for ways in (across, down) for factor in ways
            ):
                raise unusable("unsupported", what="a JPEG with a subsampling by fractions")
        if code == SOS:
            if height == 0 and next(walk, (None,))[0] == DNL:  # B.2.5
                raise unusable("unsupported", what="a JPEG that states its height after its first scan (DNL)")
            return


def _check_scans(data: bytes | mmap) -> None:
    """Refuse a progressive JPEG of endless scans: each is a pass over all pixels, however few bytes it has.

    The limit of CPU time would end it too, but only after that time, and where there is one.
    """
    # Counts those of thumbnails and of what stands behind the picture too; but it is quick.
    if sum(1 for _ in re.finditer(rb"\xff\xda", data)) <= SCANS:
        return
    scans = sum(1 for code, _, _ in _segments(data) if code == SOS)
    if scans > SCANS:
        raise unusable("too_many_scans", scans=scans, most=SCANS)


def _check_scan_ends(data: bytes, warning: str) -> None:
    """Refuse what libjpeg would warn about behind a first `warning`: no EOI, and restarts out of order (B.2.1)."""
    before, begin = None, 0
    for code, start, end in _segments(data):
        if before == SOS and any(
            found[1][0] != 0xD0 + number % 8 for number, found in enumerate(RESTART.finditer(data, begin, start))
        ):
            raise unusable("undecodable", f"{warning}; restart markers are out of order")
        before, begin = code, end
    if before != EOI:
        raise unusable("truncated", f"{warning}; no end of image")


def _clean(data: bytes | mmap, components: int, progressive: bool) -> bytes:
    """The file without metadata, and with a header that libjpeg does not warn about.

    libjpeg words only its first warning, so a harmless one would hide one about damage. Some cameras write bytes
    between segments, another revision of JFIF, an unknown colour transform, or wrong scan parameters in a sequential
    file. libjpeg warns and goes on. The values written here are those that it then assumes.
    """
    parts = [b"\xff\xd8"]
    for code, start, end in _segments(data):
        segment = data[start:end]
        if code == SOS:
            if not progressive:
                segment = segment[:-3] + b"\0\x3f\0"  # B.2.3: Ss, Se, Ah and Al
            return b"".join([*parts, segment, memoryview(data)[end:]])
        if code == APP0 and segment[4:9] == b"JFIF\0":
            segment = segment[:9] + b"\1" + segment[10:]
        elif code == APP14 and segment[4:9] == b"Adobe" and len(segment) >= 16:
            transform = bytes([segment[15] and (2 if components == 4 else 1)])  # as libjpeg takes the unknown ones
            segment = segment[:15] + transform + segment[16:]
        elif APP0 <= code <= APP15 or code == COM:
            continue
        parts.append(segment)
    return b"".join(parts)
