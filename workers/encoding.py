"""How a picture becomes a JPEG: small, and shown early on a slow connection.

| step | by | what it brings, over 37 photographs |
|---|---|---|
| pixels to a baseline JPEG | jpegli (pyjpegli) | with the next step, 17 % fewer bytes |
| the same, progressive | mozjpeg (mozjpeg-lossless-optimization) | an early first look, a JFIF header |
| a smaller first scan | scans.py | a first look in 14 % of the bytes instead of 19 % |
| colours further forward | scans.py | better looks at half of the bytes |

Where one of the two packages is missing, Pillow encodes, and the worker says so at its start. Then a JPEG has 20 % more
bytes. Both kinds are progressive, with halved colour resolution, and decode everywhere.
"""

import io
import logging

from PIL import Image

from workers.scans import move_colours_forward, shrink_first_scan

try:
    import mozjpeg_lossless_optimization as mozjpeg
    import pyjpegli
except ImportError as error:
    missing: ImportError | None = error
else:
    missing = None

# The lowest quality with which the median SSIMULACRA2 of 37 photographs is not below that of Pillow's 80: 80.84 and
# 80.67; with 80 it is 80.37. `make bench-jpegs` measures 81.
JPEGLI_QUALITY = 81
# For Pillow. Measured with the portrait of `make bench-images`; differences are means in CIEDE2000, of which the eye
# can see 1:
#   quality 90                  44 % larger, nearer to the original by 0.3
#   4:4:4 instead of 4:2:0      18 % larger, nearer to the original by 0.2
#   progressive and optimised   together 5 % smaller, and a browser shows something early
PILLOW_OPTIONS = {"quality": 80, "subsampling": "4:2:0", "progressive": True, "optimize": True}

log = logging.getLogger("imagegram.worker")


def warn_if_missing() -> None:
    """Logs a warning of one line where a package of the better encoder is missing."""
    if missing:
        log.warning("Pillow encodes the JPEGs, with 20 %% more bytes: %s", missing)


def encode_jpeg(image: Image.Image) -> bytes:
    """Returns the JPEG of an image in RGB, without metadata.

    It needs no colour profile: browsers take an image without one as sRGB (CSS Color 4).
    """
    if missing:
        return with_pillow(image)
    baseline = pyjpegli.encode(image.tobytes(), *image.size, quality=JPEGLI_QUALITY)
    return move_colours_forward(shrink_first_scan(mozjpeg.optimize(baseline)))


def with_pillow(image: Image.Image) -> bytes:
    """The same by Pillow."""
    file = io.BytesIO()
    image.info.clear()  # save() would write a comment that came with the original
    image.save(file, "JPEG", **PILLOW_OPTIONS)
    return file.getvalue()
