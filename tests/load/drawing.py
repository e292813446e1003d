"""Draws pictures for `make demo`: landscapes, nights, bubbles, flowers, tiles, waves, fractals. Only with Pillow."""

import colorsys
import io
import math
import random

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

SIZES = [(1600, 1200), (1200, 1600), (1280, 720), (1080, 1080), (900, 1350), (1500, 500), (640, 480)]
SIDE = 1000  # a PNG or a BMP is drawn no larger: encoding a PNG takes four times as long as a JPEG
ROTATED = 6  # EXIF's Orientation of a photo that was taken with the camera upright
ORIENTATION = 0x0112  # its number in EXIF


def picture(rng: random.Random) -> tuple[str, str, bytes]:
    """A picture that depends on `rng` alone: what it shows, its file ending, and its bytes."""
    draw = rng.choice(DRAWINGS)
    ending = rng.choices(["jpg", "png", "bmp"], [6, 3, 1])[0]
    width, height = rng.choice(SIZES)
    if ending != "jpg":
        scale = min(1, SIDE / max(width, height))
        width, height = int(width * scale), int(height * scale)
    image = draw(rng, width, height)
    file, given = io.BytesIO(), {}
    if ending == "jpg":
        given = {"quality": rng.choice([75, 85, 92]), "progressive": rng.random() < 0.5}
        if rng.random() < 0.2:
            image, exif = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
            exif[ORIENTATION] = ROTATED
            given["exif"] = exif
    image.save(file, {"jpg": "JPEG", "png": "PNG", "bmp": "BMP"}[ending], **given)
    return draw.__name__, ending, file.getvalue()


def colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    """Red, green and blue. All arguments are 0 to 1; a hue beyond begins again."""
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def gradient(width: int, height: int, top: tuple, bottom: tuple) -> Image.Image:
    ramp = Image.linear_gradient("L").resize((width, height))
    return ImageOps.colorize(ramp, top, bottom)


def ridge(rng: random.Random, width: int, height: int, base: float, rough: float) -> list[tuple[float, float]]:
    """The outline of hills from the left to the right, closed at the bottom."""
    waves = [(rng.uniform(1, 7), rng.uniform(0, 6.3), rng.uniform(0.2, 1)) for _ in range(5)]
    points = [(0, height)]
    for x in range(0, width + 8, 8):
        y = sum(size * math.sin(speed * x / width * 6.3 + phase) / speed for speed, phase, size in waves)
        points.append((x, height * (base + rough * y)))
    return [*points, (width, height)]


def hills(rng: random.Random, width: int, height: int) -> Image.Image:
    hue = rng.random()
    image = gradient(width, height, colour(hue, 0.5, 0.95), colour(hue + 0.12, 0.35, 1))
    draw = ImageDraw.Draw(image)
    x, y, r = (
        rng.uniform(0.2, 0.8) * width,
        rng.uniform(0.15, 0.4) * height,
        min(width, height) * rng.uniform(0.05, 0.12),
    )
    for halo in range(6, 0, -1):
        draw.ellipse(
            (x - r * halo / 2, y - r * halo / 2, x + r * halo / 2, y + r * halo / 2), colour(hue + 0.12, 0.08 * halo, 1)
        )
    layers = rng.randint(4, 7)
    for layer in range(layers):
        near = layer / layers
        draw.polygon(
            ridge(rng, width, height, 0.4 + 0.55 * near, 0.06),
            colour(hue + 0.3 * near, 0.3 + 0.4 * near, 0.85 - 0.6 * near),
        )
    return image


def night(rng: random.Random, width: int, height: int) -> Image.Image:
    hue = rng.uniform(0.55, 0.8)
    image = gradient(width, height, colour(hue, 0.9, 0.12), colour(hue + 0.1, 0.6, 0.5))
    draw = ImageDraw.Draw(image)
    for _ in range(width * height // 4000):
        x, y, bright = rng.uniform(0, width), rng.uniform(0, height * 0.8), rng.randint(120, 255)
        size = rng.choice([1, 1, 1, 2, 4])
        draw.ellipse((x, y, x + size, y + size), (bright, bright, min(255, bright + 30)))
    x, y, r = rng.uniform(0.35, 0.65) * width, rng.uniform(0.2, 0.4) * height, min(width, height) * 0.1
    draw.ellipse((x - r, y - r, x + r, y + r), (250, 245, 220))
    draw.ellipse((x - 0.5 * r, y - 1.1 * r, x + 1.5 * r, y + 0.9 * r), image.getpixel((1, int(y))))
    draw.polygon(ridge(rng, width, height, 0.8, 0.08), colour(hue, 0.8, 0.06))
    return image


def bubbles(rng: random.Random, width: int, height: int) -> Image.Image:
    hue = rng.random()
    image = gradient(width, height, colour(hue, 0.8, 0.35), colour(hue + 0.15, 0.7, 0.75))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(rng.randint(40, 90)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.01, 0.12) * min(width, height)
        tint = colour(hue + rng.uniform(0, 0.3), 0.5, 1)
        draw.ellipse((x - r, y - r, x + r, y + r), (*tint, 60), (*tint, 180), 3)
        draw.ellipse((x - 0.5 * r, y - 0.6 * r, x - 0.2 * r, y - 0.3 * r), (255, 255, 255, 150))
    return image


def flowers(rng: random.Random, width: int, height: int) -> Image.Image:
    hue = rng.random()
    image = gradient(width, height, colour(0.33, 0.35, 0.95), colour(0.36, 0.6, 0.55))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(12, 40)):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.03, 0.13) * min(width, height)
        petals, turn, tint = rng.randint(3, 6), rng.uniform(0, 6.3), colour(hue + rng.uniform(-0.12, 0.12), 0.65, 1)
        outline = []
        for step in range(120):
            angle = step / 120 * 2 * math.pi
            far = r * (0.45 + 0.55 * abs(math.cos(petals * angle / 2 + turn)))
            outline.append((x + far * math.cos(angle), y + far * math.sin(angle)))
        draw.polygon(outline, tint, colour(hue, 0.8, 0.6))
        draw.ellipse((x - r / 4, y - r / 4, x + r / 4, y + r / 4), colour(0.13, 0.8, 1))
    return image


def tiles(rng: random.Random, width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), (24, 24, 24))
    draw = ImageDraw.Draw(image)
    palette = [(245, 243, 235)] * 4 + [colour(rng.random(), 0.85, 0.9) for _ in range(4)]

    def split(left: float, top: float, right: float, bottom: float, depth: int) -> None:
        wide = right - left > bottom - top
        if depth and (right - left if wide else bottom - top) > 120:
            part = rng.uniform(0.3, 0.7)
            if wide:
                middle = left + part * (right - left)
                split(left, top, middle, bottom, depth - 1)
                split(middle, top, right, bottom, depth - 1)
            else:
                middle = top + part * (bottom - top)
                split(left, top, right, middle, depth - 1)
                split(left, middle, right, bottom, depth - 1)
        else:
            draw.rectangle((left + 5, top + 5, max(left + 5, right - 5), max(top + 5, bottom - 5)), rng.choice(palette))

    split(0, 0, width, height, rng.randint(4, 7))
    return image


def waves(rng: random.Random, width: int, height: int) -> Image.Image:
    hue = rng.uniform(0.45, 0.65)
    image = gradient(width, height, colour(0.1, 0.4, 1), colour(hue, 0.4, 0.9))
    draw = ImageDraw.Draw(image)
    rows = rng.randint(12, 22)
    for row in range(rows):
        y = height * (0.25 + 0.8 * row / rows)
        high, long, phase = height * 0.03, rng.uniform(60, 160), rng.uniform(0, 6.3)
        crest = [(x, y + high * abs(math.sin(x / long + phase))) for x in range(0, width + 6, 6)]
        draw.polygon(
            [(0, height), *crest, (width, height)],
            colour(hue + 0.1 * row / rows, 0.5 + 0.02 * row, 0.95 - 0.6 * row / rows),
        )
        draw.line(crest, (255, 255, 255), 3)
    return image


def fractal(rng: random.Random, width: int, height: int) -> Image.Image:
    x, y, across = rng.choice(
        [(-0.745, 0.11, 0.02), (-0.16, 1.035, 0.04), (-0.1011, 0.9563, 0.05), (0.285, 0.01, 0.02), (-0.6, 0, 2.6)]
    )
    across *= rng.uniform(0.8, 1.6)
    down = across * height / width
    small = width // 2, height // 2
    values = Image.effect_mandelbrot(small, (x - across / 2, y - down / 2, x + across / 2, y + down / 2), 120)
    hue = rng.random()
    coloured = ImageOps.colorize(
        ImageOps.equalize(values), colour(hue, 0.9, 0.1), colour(hue + 0.4, 0.25, 1), colour(hue + 0.15, 0.9, 0.8)
    )
    soft = coloured.resize((width, height), Image.Resampling.BICUBIC)
    return ImageChops.screen(soft, soft.filter(ImageFilter.BoxBlur(12)).point(lambda value: value // 3))


DRAWINGS = [hills, night, bubbles, flowers, tiles, waves, fractal]
