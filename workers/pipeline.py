"""From a file as it came to the picture that is shown: one list of steps.

Knows no Redis, no store and no HTTP, and bounds neither its memory nor its time: see sandbox.py. Its system calls are
those that sandbox.py lists: it opens and imports nothing while it decodes, and asks for a file's length by seek.

The picture is shrunk before its colours are converted and its alpha is laid on white, although the other
order reads better: the costly steps then see 600x600 pixels instead of millions. It is shrunk on premultiplied
alpha, where both orders come to the same, and on the values as encoded, not in linear light, as browsers do.
"""

import io
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass
from math import ceil, floor
from typing import BinaryIO

from PIL import Image, ImageCms, ImageFile, features

from workers import colour
from workers.bmp import Bmp
from workers.errors import unusable
from workers.jpeg import Jpeg
from workers.png import MAGIC, Png
from workers.thumbhash import thumbhash

SIDE = 600  # pixels of the picture's sides
GAP = 2  # shrinking by whole numbers, which is quick, ends at twice SIDE; LANCZOS does the rest
STRIP = 64  # rows of shrunk image made at once
Image.MAX_IMAGE_PIXELS = None  # it warns at its value and raises at twice it; _check_size is exact
ImageFile.LOAD_TRUNCATED_IMAGES = False
Image._initialized = 2  # Pillow's own flag for "all plugins are loaded": save() loads no other


DECODERS = {MAGIC: Png, b"\xff\xd8\xff": Jpeg, b"BM": Bmp}

# What Pillow raises on bad data. Not MemoryError, and not an OSError that has an errno: those may pass.
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
    jpeg: bytes  # 600x600, sRGB
    thumbhash: bytes  # 24 of them
    width: int  # of the original, in pixels, as its header says: before it is turned upright
    height: int
    format: str  # of the original: PNG, JPEG or BMP


def convert(file: BinaryIO, megapixels: int, side: int) -> Picture:
    """The picture of an image, which may have so many million pixels and so many pixels a side.

    `file` is one of the file system, because parts of it are mapped.

    Raises Unusable with wrong_format, unsupported, too_many_pixels, too_many_scans, too_costly, truncated or
    undecodable.
    """
    image = _open(file)
    width, height = image.size
    _check_size(width, height, megapixels, side)
    _decode(image)
    turn, profile = _orientation(image.info.get("exif", b"")), image.info.get("icc_profile")
    picture = _cover(image)
    picture = _upright(picture, turn)
    picture = _to_srgb(picture, profile)
    picture = _on_white(picture)
    return Picture(_jpeg(picture), thumbhash(picture), width, height, image.format)


def require_colour_management() -> None:
    """Raise SystemExit where Pillow was built without liblcms2, as it silently is where the headers lack."""
    if not features.check("littlecms2"):
        raise SystemExit(
            "Pillow was built without liblcms2: colours of Display P3, Adobe RGB and CMYK would be wrong"
        )


def _open(file: BinaryIO) -> ImageFile.ImageFile:
    """The image with its header read, and no pixel decoded."""
    file.seek(0)
    head = file.read(8)
    file.seek(0)
    for magic, decoder in DECODERS.items():
        if head.startswith(magic):
            return _permanent(decoder, file)
    raise unusable("wrong_format")


def _check_size(width: int, height: int, megapixels: int, side: int) -> None:
    if max(width, height) > side or width * height > megapixels * 1_000_000:
        raise unusable("too_many_pixels", width=width, height=height, megapixels=megapixels, side=side)




def _decode(image: ImageFile.ImageFile) -> None:
    """All pixels. JPEG decodes to a half, quarter or eighth: the smallest that still leaves GAP."""
    image.draft(None, (GAP * SIDE, GAP * SIDE))
    _permanent(image.load)


def _permanent(read, *given):
    """What `read` returns; where it finds bad data, Unusable."""
    try:
        return read(*given)
    except BAD_DATA as fault:
        if isinstance(fault, OSError) and fault.errno is not None:  # the disk's fault, not the file's
            raise
        cause = f"{type(fault).__name__}: {fault}"
        raise unusable("truncated" if "truncated" in cause.lower() else "undecodable", cause) from fault


def _orientation(exif: bytes) -> int:
    """EXIF tag 0x0112 in IFD0 (TIFF 6.0, section 2), 1 to 8; 1 where it is missing or of no use."""
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


SPACES = {"L": b"GRAY", "RGB": b"RGB ", "RGBX": b"RGB ", "CMYK": b"CMYK"}  # of profiles, by mode


def _cover(image: Image.Image) -> Image.Image:
    """The centre square at 600x600, in L, RGB, RGBX, RGBa or CMYK."""
    side = min(image.size)
    x, y = ((length - side) / 2 for length in image.size)
    if side >= SIDE and image.mode in SPACES and not image.has_transparency_data:
        return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, (x, y, x + side, y + side), reducing_gap=GAP)
    # The same by hand. The values are made fit for shrinking strip for strip: at once, a large image's copies would
    # take twice the memory of the image itself. And enlarging, LANCZOS would let in what lies beside the square.
    factor = max(1, side // (GAP * SIDE))
    left, top, right, bottom = floor(x), floor(y), ceil(x + side), ceil(y + side)
    small = None
    for start in range(top, bottom, STRIP * factor):
        strip = _ready(image.crop((left, start, right, min(start + STRIP * factor, bottom)))).reduce(factor)
        if small is None:
            small = Image.new(strip.mode, (strip.width, ceil((bottom - top) / factor)))
        small.paste(strip, (0, (start - top) // factor))
    box = [(start + more) / factor for more in (0, side) for start in (x - left, y - top)]
    return small.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box)


def _ready(image: Image.Image) -> Image.Image:
    """In L, RGB, RGBX, RGBa or CMYK. RGBa is premultiplied: shrinking RGBA would mix in what is invisible."""
    if image.mode == "I;16":
        image = _narrowed(image)
    if image.has_transparency_data:
        return image.convert("RGBA").convert("RGBa")
    return image.convert({"1": "L", "P": "RGB"}.get(image.mode, image.mode))


def _narrowed(image: Image.Image) -> Image.Image:
    """16 bits of grey as 8, in L or LA. convert() alone would cut: all but black would turn white."""
    key = image.info.pop("transparency", None)
    grey = image.point(lambda value: value / 257 + 0.5).convert("L")
    if key is not None:
        grey.putalpha(image.convert("I").point([255 * (value != key) for value in range(65536)], "L"))
    return grey


UPRIGHT = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image, turn: int) -> Image.Image:
    return image if turn == 1 else image.transpose(UPRIGHT[turn])


SRGB = ImageCms.createProfile("sRGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """In RGB or RGBA. A profile of another colour space than the image's, too large or broken is as none."""
    alpha = None
    if image.mode == "RGBa":
        image = image.convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("RGB")
        if colour.fits(profile, b"GRAY"):  # only a grey PNG brings one here
            image = image.convert("L")
    if colour.fits(profile, SPACES[image.mode]):
        with suppress(ImageCms.PyCMSError, OSError):
            image = ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                SRGB,
                # As print programs do: colours in gamut stay exact, and the ink's black becomes the screen's.
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                outputMode="RGB",
                flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
    image = image.convert("RGB")
    if alpha:
        image.putalpha(alpha)
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _jpeg(image: Image.Image) -> bytes:
    """Without metadata. It needs no profile: an image that states nothing is sRGB (CSS Color 4)."""
    out = io.BytesIO()
    image.info.clear()  # save() would write a comment that came with the original
    # Made for slow connections. Of the portrait in `make bench-images`, quality 90 is 44 % larger, and nearer
    # by a mean of 0.3 (CIEDE2000; eyes tell 1 apart); whole colour is 18 % larger, and nearer by 0.2; progressive and
    # optimised together 5 % smaller, and something shows early.
    image.save(out, "JPEG", quality=80, subsampling="4:2:0", progressive=True, optimize=True)
    return out.getvalue()
