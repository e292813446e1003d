"""Writes docs/images/thumbhash.png: a photograph as it is served, and next to it its decoded thumbhash.

    python tests/thumbhash_picture.py

The decoder follows the description of the format (https://github.com/evanw/thumbhash), not the encoder in workers/.
"""

import io
import sys
import tempfile
from math import cos, pi
from pathlib import Path

from PIL import BmpImagePlugin, Image, PngImagePlugin  # noqa: F401  the pipeline loads neither

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SIDE = 240  # pixels of each of the two pictures


def decode(thumbhash: bytes, side: int = 32) -> Image.Image:
    """Returns the picture of a square, opaque thumbhash, with `side` pixels a side."""
    first = int.from_bytes(thumbhash[:3], "little")
    second = int.from_bytes(thumbhash[3:5], "little")
    light, yellow_blue, red_green = first & 63, first >> 6 & 63, first >> 12 & 63
    assert not first >> 23, "it has no transparency"
    waves = max(3, second & 7)
    levels = [nibble / 7.5 - 1 for byte in thumbhash[5:] for nibble in (byte & 15, byte >> 4)]

    def channel(mean: float, count: int, scale: float):
        """The sum of the channel's waves, as a function of x and y."""
        places = [(x, y) for y in range(count) for x in range(count - y) if x or y]
        heights = [levels.pop(0) * scale for _ in places]

        def at(x: float, y: float) -> float:
            return mean + sum(
                2 * height * cos(pi / side * (x + 0.5) * right) * cos(pi / side * (y + 0.5) * down)
                for (right, down), height in zip(places, heights, strict=True)
            )

        return at

    l_at = channel(light / 63, waves, (first >> 18 & 31) / 31)
    p_at = channel(yellow_blue / 31.5 - 1, 3, (second >> 3 & 63) / 63 * 1.25)
    q_at = channel(red_green / 31.5 - 1, 3, (second >> 9 & 63) / 63 * 1.25)
    picture = Image.new("RGB", (side, side))
    for y in range(side):
        for x in range(side):
            l, p, q = l_at(x, y), p_at(x, y), q_at(x, y)  # noqa: E741
            blue = l - 2 / 3 * p
            red = (3 * l - blue + q) / 2
            picture.putpixel((x, y), tuple(round(255 * min(1, max(0, value))) for value in (red, red - q, blue)))
    return picture


def main() -> None:
    from conftest import photograph

    from workers.pipeline import convert

    with tempfile.TemporaryFile() as file:
        file.write(photograph())
        file.seek(0)
        picture = convert(file, 100, 30_000)
    sheet = Image.new("RGB", (2 * SIDE + 10, SIDE), "white")
    sheet.paste(Image.open(io.BytesIO(picture.jpeg)).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (0, 0))
    sheet.paste(decode(picture.thumbhash).resize((SIDE, SIDE), Image.Resampling.BICUBIC), (SIDE + 10, 0))
    sheet.quantize(256).save(ROOT / "docs" / "images" / "thumbhash.png", optimize=True)


if __name__ == "__main__":
    main()
