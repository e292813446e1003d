"""From an original to the picture that is served, as one list of steps.

| step | image after it |
|---|---|
| `open_image` | header read, no pixel decoded; its reader is chosen by the first bytes of the file |
| `check_size` | the same, or Unusable with too_many_pixels |
| `decode` | all pixels; JPEG at the smallest of 1/1, 1/2, 1/4 and 1/8 that leaves 1,200 pixels a side |
| `crop_and_shrink` | the centre square at 600x600 in L, RGB, RGBX, RGBa or CMYK |
| `turn_upright` | turned by the EXIF orientation |
| `convert_to_srgb` | RGB, or RGBA if it has transparency |
| `lay_on_white` | RGB |
| `encode_jpeg` (encoding.py), `thumbhash` | the two results |

The picture is shrunk before its colours are converted and before its alpha is laid on white, although the other order
reads better. The costly steps then process 600x600 pixels instead of millions. Alpha is premultiplied before shrinking,
which makes both orders equal. Values are averaged as they are encoded, not in linear light, as browsers do.

This module knows no Redis, no store and no HTTP. It limits neither its memory nor its time: sandbox.py does. It may
make only the system calls that sandbox.CALLS lists. Therefore it opens and imports nothing while it decodes, and learns
the length of a file by seeking.
"""

import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import ceil, floor
from typing import BinaryIO, NamedTuple

from PIL import Image, ImageCms, ImageFile, features

from workers import colour
from workers.bmp import Bmp
from workers.encoding import encode_jpeg
from workers.errors import unusable
from workers.jpeg import Jpeg
from workers.png import MAGIC, Png
from workers.scans import looks
from workers.thumbhash import thumbhash

SIDE = 600  # pixels of each side of the picture
# Pillow's name. Shrinking by whole numbers is fast. It stops at this multiple of SIDE, and LANCZOS does the rest.
REDUCING_GAP = 2
STRIP_ROWS = 64  # rows of the shrunk image that are computed at once
Image.MAX_IMAGE_PIXELS = None  # Pillow warns at this value and raises only at twice the value; check_size is exact
ImageFile.LOAD_TRUNCATED_IMAGES = False
Image._initialized = 2  # Pillow's own flag for "all plugins are loaded": save() then loads no other plugin

DECODERS = {MAGIC: Png, b"\xff\xd8\xff": Jpeg, b"BM": Bmp}  # by the first bytes of the file

# What Pillow raises on bad data. MemoryError and an OSError with an errno are not here: another attempt may succeed.
BAD_DATA = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class Picture:
    """What is served of an image."""

    jpeg: bytes  # 600x600 pixels, sRGB
    scans: tuple[int, ...]  # bytes of it that show the whole picture, ascending, see scans.looks
    thumbhash: bytes  # 24 bytes
    width: int  # pixels of the original as its header states them, before it is turned upright
    height: int
    format: str  # of the original: PNG, JPEG or BMP


class Metadata(NamedTuple):
    """What the steps need to know about the original apart from its pixels."""

    orientation: int  # of EXIF, 1 to 8
    profile: bytes | None  # ICC profile; None: the file states no colour space


def convert(file: BinaryIO, megapixels: int, side: int) -> Picture:
    """Returns the picture of an image that has at most `megapixels` million pixels and `side` pixels a side.

    `file` must be a file of the file system, because parts of it are mapped into memory.

    Raises Unusable with wrong_format, unsupported, too_many_pixels, too_many_scans, too_costly, truncated or
    undecodable. Raises MemoryError, and OSError with an errno where reading the file fails.
    """
    original = open_image(file)
    width, height = original.size
    check_size(width, height, megapixels, side)
    metadata = Metadata(_orientation(original.info.get("exif", b"")), original.info.get("icc_profile"))
    image: Image.Image = original
    for step in STEPS:
        image = step(image, metadata)
    jpeg = encode_jpeg(image)
    return Picture(jpeg, looks(jpeg), thumbhash(image), width, height, original.format)


def require_colour_management() -> None:
    """Raises SystemExit where Pillow was built without liblcms2.

    Pillow's build leaves it out without a message where its headers are missing.
    """
    if not features.check("littlecms2"):
        raise SystemExit(
            "Pillow was built without liblcms2: colours of Display P3, Adobe RGB and CMYK would be wrong"
        )


# Steps before pixels are decoded


def open_image(file: BinaryIO) -> ImageFile.ImageFile:
    """Reads the header. Decodes no pixel.

    Raises Unusable with wrong_format, unsupported, too_costly, truncated or undecodable.
    """
    file.seek(0)
    head = file.read(8)
    file.seek(0)
    for magic, decoder in DECODERS.items():
        if head.startswith(magic):
            return _call_decoder(decoder, file)
    raise unusable("wrong_format")


def check_size(width: int, height: int, megapixels: int, side: int) -> None:
    """Raises Unusable with too_many_pixels."""
    if max(width, height) > side or width * height > megapixels * 1_000_000:
        raise unusable("too_many_pixels", width=width, height=height, megapixels=megapixels, side=side)


def _call_decoder(call: Callable, *arguments):
    """Returns what `call` returns. Raises Unusable where `call` finds bad data."""
    try:
        return call(*arguments)
    except BAD_DATA as fault:
        if isinstance(fault, OSError) and fault.errno is not None:  # the disk's fault, not the file's
            raise
        cause = f"{type(fault).__name__}: {fault}"
        raise unusable("truncated" if "truncated" in cause.lower() else "undecodable", cause) from fault


def _orientation(exif: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8: tag 0x0112 in IFD0 (TIFF 6.0, section 2). 1 if it is missing or broken."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, at)
            if tag == 0x0112 and kind == 3 and value in UPRIGHT:
                return value
    except struct.error:
        pass
    return 1


# Steps of pixels: each takes the image of the step before and the original's metadata, and returns the next image


def decode(image: Image.Image, _metadata: Metadata) -> Image.Image:
    """Decodes all pixels. A JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves REDUCING_GAP * SIDE pixels a side.

    Raises Unusable with too_many_scans, truncated or undecodable.
    """
    image.draft(None, (REDUCING_GAP * SIDE, REDUCING_GAP * SIDE))
    _call_decoder(image.load)
    return image


PROFILE_SPACES = {"L": b"GRAY", "RGB": b"RGB ", "RGBX": b"RGB ", "CMYK": b"CMYK"}  # ICC colour space by Pillow's mode


def crop_and_shrink(image: Image.Image, _metadata: Metadata) -> Image.Image:
    """Returns the centre square at 600x600, in L, RGB, RGBX, RGBa or CMYK."""
    side = min(image.size)
    x, y = ((length - side) / 2 for length in image.size)
    if side >= SIDE and image.mode in PROFILE_SPACES and not image.has_transparency_data:
        square = (x, y, x + side, y + side)
        return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, square, reducing_gap=REDUCING_GAP)
    # The same, without Pillow's resize() of the whole image, for two reasons. First, the values must be made ready for
    # shrinking, and the copies of a large image would take twice the memory of the image itself; so this goes strip by
    # strip. Second, when an image is enlarged, LANCZOS would mix in pixels from outside of the square.
    factor = max(1, side // (REDUCING_GAP * SIDE))
    left, top, right, bottom = floor(x), floor(y), ceil(x + side), ceil(y + side)
    small = None
    for start in range(top, bottom, STRIP_ROWS * factor):
        strip = _ready_to_shrink(image.crop((left, start, right, min(start + STRIP_ROWS * factor, bottom))))
        strip = strip.reduce(factor)
        if small is None:
            small = Image.new(strip.mode, (strip.width, ceil((bottom - top) / factor)))
        small.paste(strip, (0, (start - top) // factor))
    box = [(start + more) / factor for more in (0, side) for start in (x - left, y - top)]
    return small.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box)


def _ready_to_shrink(image: Image.Image) -> Image.Image:
    """Returns the image in L, RGB, RGBX, RGBa or CMYK.

    RGBa is RGBA with premultiplied alpha. Shrinking RGBA itself would mix the colours of invisible pixels in.
    """
    if image.mode == "I;16":
        image = _grey_of_8_bits(image)
    if image.has_transparency_data:
        return image.convert("RGBA").convert("RGBa")
    return image.convert({"1": "L", "P": "RGB"}.get(image.mode, image.mode))


def _grey_of_8_bits(image: Image.Image) -> Image.Image:
    """Returns 16 bits of grey as L or LA.

    Pillow's convert() would not scale: it clips every value above 255, so all but the darkest pixels turn white.
    """
    key = image.info.pop("transparency", None)
    grey = image.point(lambda value: value / 257 + 0.5).convert("L")
    if key is not None:
        grey.putalpha(image.convert("I").point([255 * (value != key) for value in range(65536)], "L"))
    return grey


UPRIGHT = {  # what turns an image of this EXIF orientation upright (EXIF 2.32, table 6)
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_upright(image: Image.Image, metadata: Metadata) -> Image.Image:
    """Turns or mirrors the image as its EXIF orientation says."""
    turn = UPRIGHT[metadata.orientation]
    return image if turn is None else image.transpose(turn)


SRGB = ImageCms.createProfile("sRGB")


def convert_to_srgb(image: Image.Image, metadata: Metadata) -> Image.Image:
    """Returns the image in RGB or RGBA, with the values of sRGB.

    A profile that is too large, broken or made for another colour space than the image's is ignored.
    """
    alpha, profile = None, metadata.profile
    if image.mode == "RGBa":
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
        if colour.fits(profile, b"GRAY"):  # only a grey PNG brings such a profile here
            image = image.convert("L")
    if colour.fits(profile, PROFILE_SPACES[image.mode]):
        with suppress(ImageCms.PyCMSError, OSError):
            image = ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                SRGB,
                # As print programs do: colours in gamut stay exact, and the ink's black becomes the screen's black.
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                outputMode="RGB",
                flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
    image = image.convert("RGB")
    if alpha:
        image.putalpha(alpha)
    return image


def lay_on_white(image: Image.Image, _metadata: Metadata) -> Image.Image:
    """Returns the image in RGB, on a white background if it has transparency."""
    if image.mode == "RGB":
        return image
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


STEPS: tuple[Callable[[Image.Image, Metadata], Image.Image], ...] = (
    decode,
    crop_and_shrink,
    turn_upright,
    convert_to_srgb,
    lay_on_white,
)
