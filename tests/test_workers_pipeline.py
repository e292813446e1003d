"""Colours and shapes: what each kind of image must look like, by numbers."""

import io
import subprocess
import sys
import tempfile
from pathlib import Path

import colours
import pytest
from colours import ciede2000, to_lab
from golden import CARD, Golden, bmp, card, chunk, exif, goldens, png, rows, runs, saved
from PIL import Image

from workers import errors, pipeline, thumbhash

GOLDENS = goldens()


def convert(data: bytes) -> pipeline.Picture:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return pipeline.convert(file, 100, 30_000)


def shown(picture: pipeline.Picture) -> Image.Image:
    return Image.open(io.BytesIO(picture.jpeg))


def around(image: Image.Image, place: tuple[int, int], reach: int = 50) -> tuple[int, int, int]:
    """The mean colour of a square around a place."""
    x, y = place
    reach = min(reach, x, y, image.width - x, image.height - y)
    return image.resize((1, 1), Image.Resampling.BOX, (x - reach, y - reach, x + reach, y + reach)).getpixel((0, 0))


@pytest.mark.parametrize("golden", GOLDENS.values(), ids=GOLDENS)
def test_a_picture_shows_the_colours_that_were_meant_where_they_were_meant(golden: Golden):
    image = shown(convert(golden.data))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (600, 600))
    for place, truth in golden.truth.items():
        colour = around(image, place)
        difference = ciede2000(to_lab(colour), to_lab(truth))
        assert difference <= golden.bound, f"{colour} at {place}, {difference:.1f} from {truth}"


def test_the_measure_of_colours_is_right():
    """Pairs 1, 7, 17 and 25 of Sharma, Wu and Dalal's table."""
    for one, other, difference in (
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ):
        assert abs(ciede2000(one, other) - difference) < 0.0001


def test_the_whole_centre_square_fills_the_picture_and_nothing_beside_it():
    for size in ((640, 480), (480, 640), (5000, 3751), (30_000, 10)):
        image = shown(convert(saved(card(*size), "PNG")))
        for place, truth in zip(((4, 4), (595, 4), (4, 595), (595, 595)), CARD, strict=True):
            assert ciede2000(to_lab(around(image, place, 4)), to_lab(truth)) < 3, (size, place)


@pytest.mark.parametrize("width", [600, 1300, 3000])
def test_sixteen_bits_of_grey_become_eight_by_scaling(width):
    """From black on the left to white on the right, in steps of 1/65535."""
    row = b"\0" + b"".join((65535 * x // (width - 1)).to_bytes(2, "big") for x in range(width))
    image = shown(convert(png(width, width, 16, 0, row * width)))
    for x in range(10, 600, 29):
        assert abs(image.getpixel((x, 300))[0] - 255 * (x + 0.5) / 600) <= 1.5


def test_what_is_invisible_leaves_no_dark_line_at_the_edge_of_what_is_not():
    for size in ((640, 480), (2600, 2500)):
        pale = card(*size, "RGBA", [(240, 240, 240, 255), (0, 0, 0, 0)] * 2, (0, 0, 0, 0))
        image = shown(convert(saved(pale, "PNG")))
        assert min(image.getpixel((x, 300))[0] for x in range(600)) >= 232


def test_a_picture_carries_nothing_but_itself():
    picture = convert(GOLDENS["JPEG with GPS"].data)
    image = shown(picture)
    assert set(image.info) == {"jfif", "jfif_version", "jfif_unit", "jfif_density", "progressive", "progression"}
    assert not image.getexif()
    assert b"maker" not in picture.jpeg and b"person" not in picture.jpeg and b"ICC" not in picture.jpeg


def test_a_picture_says_what_its_original_was():
    facts = {}
    for name in ("JPEG of orientation 6", "PNG of 30,000x10", "BMP in RLE8", "JPEG reduced while decoding", "MPO"):
        picture = convert(GOLDENS[name].data)
        facts[name] = (picture.width, picture.height, picture.format)
    assert facts == {
        "JPEG of orientation 6": (640, 480, "JPEG"),
        "PNG of 30,000x10": (30_000, 10, "PNG"),
        "BMP in RLE8": (640, 480, "BMP"),
        "JPEG reduced while decoding": (5000, 3751, "JPEG"),
        "MPO": (640, 480, "JPEG"),
    }


def test_run_lengths_show_each_pixel_in_its_place():
    """Stripes of one pixel, of which the first seven come as they are: an odd stretch."""
    stripes = Image.frombytes("P", (600, 600), bytes((x + y) % 3 for y in range(600) for x in range(600)))
    plain = convert(bmp(stripes, 8, bytes, CARD))
    for bits, compression in ((8, 1), (4, 2)):
        for top_down in (False, True):
            how = {"compression": compression, "top_down": top_down}
            data = bmp(stripes, bits, lambda row, bits=bits: runs(row, bits), CARD, **how)
            assert convert(data).jpeg == plain.jpeg


def test_rows_that_run_lengths_leave_out_are_of_the_first_colour():
    image = Image.new("P", (600, 600), 1)
    data = bmp(image, 8, lambda row: b"", CARD, 1)[:-2]
    for body in (b"\0\1", b"\0\2\0\xff\0\1", b"\0\2\xff\xff" * 3):
        picture = convert(data + body)
        assert ciede2000(to_lab(around(shown(picture), (300, 300))), to_lab(CARD[0])) < 2
    with pytest.raises(errors.Unusable, match="truncated"):
        convert(data + b"\xff\1")


@pytest.mark.parametrize(("mode", "own"), [("L", b"GRAY"), ("RGB", b"RGB "), ("RGBa", b"RGB "), ("CMYK", b"CMYK")])
def test_a_profile_is_never_applied_to_pixels_of_another_colour_space(monkeypatch, mode, own):
    """Pillow to 12.1 would read past its buffers there, which no look at the picture shows."""
    applied = []

    def apply(image, profile, *given, **options):
        applied.append((profile.profile.xcolor_space.encode(), profile.profile.device_class.encode()))
        return image.convert("RGB")

    monkeypatch.setattr(pipeline.ImageCms, "profileToProfile", apply)
    whole, display = colours.P3_PROFILE, b"mntr"
    for space in (b"GRAY", b"RGB ", b"CMYK", b"Lab ", b"XYZ ", b"YCbr", b"HSV ", b"CMY ", b"3CLR", b"4CLR", b"1CLR"):
        for kind in (display, b"link", b"abst", b"nmcl"):
            pipeline._to_srgb(Image.new(mode, (8, 8)), whole[:12] + kind + space + whole[20:])
    assert applied == [(own, display)]


def test_two_runs_make_the_same_bytes():
    for name in ("Display P3 JPEG", "large PNG with alpha"):
        assert convert(GOLDENS[name].data) == convert(GOLDENS[name].data)


def test_broken_exif_is_as_none():
    whole = saved(card(64, 48), "PNG")
    entry = b"\x01\x12\0\3\0\0\0\1\0"
    for tags in (b"", b"MM\0*", b"MM\0*\0\0\0\x08\xff\xff", b"MM\0*\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\1" + entry,
                 b"MM\0*\0\0\0\x08\0\1" + entry + b"\x09\0\0"):  # fmt: skip
        picture = convert(whole[:33] + chunk(b"eXIf", tags) + whole[33:])
        assert around(shown(picture), (150, 150)) == around(shown(convert(whole)), (150, 150))


def test_a_thumbhash_is_the_published_one():
    """Made of the same 32x32 values by `thumbhash` 0.1.2 from PyPI, a port of evanw/thumbhash."""
    assert thumbhash.thumbhash(card(600, 600)).hex() == "1d1906470e717a86d067978778a88678889608b78e8ffa08"
    assert len(convert(GOLDENS["plain JPEG"].data).thumbhash) == 24


def test_three_decoders_are_loaded_and_no_other_and_decoding_loads_nothing_more(tmp_path):
    """In a process of its own: tests load more than workers do."""
    for number, golden in enumerate(GOLDENS.values()):
        (tmp_path / str(number)).write_bytes(golden.data)
    program = """
import sys
import tempfile
from pathlib import Path
from workers import pipeline
before = set(sys.modules)
for path in Path(sys.argv[1]).iterdir():
    with path.open("rb") as file:
        pipeline.convert(file, 100, 30_000)
print(sorted(set(sys.modules) - before))
print(sorted(name for name in sys.modules if name.startswith("PIL.") and name.endswith("Plugin")))
"""
    root = Path(__file__).parent.parent
    ran = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=root, stdout=-1, text=True, check=True)
    decoders = ["PIL.BmpImagePlugin", "PIL.JpegImagePlugin", "PIL.PngImagePlugin"]
    assert ran.stdout == f"[]\n{decoders}\n"


def test_without_colour_management_nothing_starts(monkeypatch):
    pipeline.require_colour_management()
    monkeypatch.setattr(pipeline.features, "check", lambda feature: feature != "littlecms2")
    with pytest.raises(SystemExit, match="liblcms2"):
        pipeline.require_colour_management()


def test_interlaced_files_are_really_interlaced():
    """The golden set's own check: Pillow reads the same pixels of both."""
    image = card(64, 48)
    assert Image.open(io.BytesIO(GOLDENS["interlaced PNG"].data)).convert("RGB").tobytes() == image.tobytes()
    assert png(64, 48, 8, 2, rows(image)) != GOLDENS["interlaced PNG"].data
    assert exif(6)[0x0112] == 6
