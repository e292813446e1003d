"""What the picture of each kind of image must look like, measured in colours, and the refusals of PNG and BMP files."""

import io
import random
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from itertools import product
from pathlib import Path

import colours
import pytest
from colours import ciede2000, to_lab
from golden import (
    CARD,
    Golden,
    bmp,
    card,
    chunk,
    damaged,
    goldens,
    masked,
    packed,
    png,
    rows,
    runs,
    saved,
)
from PIL import Image

from workers import bmp as bmp_module
from workers import errors, pipeline, thumbhash
from workers import png as png_module

GOLDENS = goldens()


def convert(data: bytes) -> pipeline.Picture:
    """The picture of a file, from the pipeline in this process."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return pipeline.convert(file, 100, 30_000)


def decoded(picture: pipeline.Picture) -> Image.Image:
    """The JPEG of a picture, decoded."""
    return Image.open(io.BytesIO(picture.jpeg))


def mean_colour(image: Image.Image, place: tuple[int, int], reach: int = 50) -> tuple[int, int, int]:
    """The mean colour of the square within `reach` pixels around a place."""
    x, y = place
    reach = min(reach, x, y, image.width - x, image.height - y)
    return image.resize((1, 1), Image.Resampling.BOX, (x - reach, y - reach, x + reach, y + reach)).getpixel((0, 0))


@pytest.mark.parametrize("golden", GOLDENS.values(), ids=GOLDENS)
def test_a_picture_has_the_expected_colours_at_the_expected_places(golden: Golden):
    image = decoded(convert(golden.data))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (600, 600))
    for place, expected in golden.truth.items():
        colour = mean_colour(image, place)
        difference = ciede2000(to_lab(colour), to_lab(expected))
        assert difference <= golden.bound, f"{colour} at {place}, {difference:.1f} from {expected}"


def test_ciede2000_gives_the_published_differences():
    """Pairs 1, 7, 17 and 25 of the table of Sharma, Wu and Dalal (2005)."""
    for one, other, difference in (
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 0, 0), (50, -1, 2), 2.3669),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ):
        assert abs(ciede2000(one, other) - difference) < 0.0001


def test_the_centre_square_fills_the_picture_to_its_corners():
    for size in ((640, 480), (480, 640), (5000, 3751), (30_000, 10)):
        image = decoded(convert(saved(card(*size), "PNG")))
        for place, expected in zip(((4, 4), (595, 4), (4, 595), (595, 595)), CARD, strict=True):
            assert ciede2000(to_lab(mean_colour(image, place, 4)), to_lab(expected)) < 3, (size, place)


@pytest.mark.parametrize("width", [600, 1300, 3000])
def test_sixteen_bits_of_grey_become_eight_by_scaling(width):
    """From black on the left to white on the right, in steps of 1/65535."""
    row = b"\0" + b"".join((65535 * x // (width - 1)).to_bytes(2, "big") for x in range(width))
    image = decoded(convert(png(width, width, 16, 0, row * width)))
    for x in range(10, 600, 29):
        assert abs(image.getpixel((x, 300))[0] - 255 * (x + 0.5) / 600) <= 1.5


def test_invisible_pixels_leave_no_dark_line_at_the_edge_of_visible_ones():
    for size in ((640, 480), (2600, 2500)):
        pale = card(*size, "RGBA", [(240, 240, 240, 255), (0, 0, 0, 0)] * 2, (0, 0, 0, 0))
        image = decoded(convert(saved(pale, "PNG")))
        assert min(image.getpixel((x, 300))[0] for x in range(600)) >= 232


@pytest.mark.parametrize(
    ("name", "metadata"), [("JPEG with GPS", [b"Exif", b"maker", b"person"]), ("Display P3 JPEG", [b"ICC_PROFILE"])]
)
def test_a_picture_has_no_metadata_of_its_original(name, metadata):
    picture = convert(GOLDENS[name].data)
    for text in metadata:
        assert text in GOLDENS[name].data and text not in picture.jpeg
    image = decoded(picture)
    assert set(image.info) == {"jfif", "jfif_version", "jfif_unit", "jfif_density", "progressive", "progression"}
    assert not image.getexif()


def test_a_picture_states_size_and_format_of_its_original():
    stated = {}
    for name in ("JPEG of orientation 6", "PNG of 30,000x10", "BMP in RLE8", "JPEG reduced while decoding", "MPO"):
        picture = convert(GOLDENS[name].data)
        stated[name] = (picture.width, picture.height, picture.format)
    assert stated == {
        "JPEG of orientation 6": (640, 480, "JPEG"),
        "PNG of 30,000x10": (30_000, 10, "PNG"),
        "BMP in RLE8": (640, 480, "BMP"),
        "JPEG reduced while decoding": (5000, 3751, "JPEG"),
        "MPO": (640, 480, "JPEG"),
    }


def test_run_lengths_put_each_pixel_in_its_place():
    """Stripes of one pixel. The first seven of a row are stored as they are, which is an odd number."""
    stripes = Image.frombytes("P", (600, 600), bytes((x + y) % 3 for y in range(600) for x in range(600)))
    plain = convert(bmp(stripes, 8, bytes, CARD))
    for bits, compression in ((8, 1), (4, 2)):
        for top_down in (False, True):
            options = {"compression": compression, "top_down": top_down}
            data = bmp(stripes, bits, lambda row, bits=bits: runs(row, bits), CARD, **options)
            assert convert(data).jpeg == plain.jpeg


def test_rows_that_run_lengths_leave_out_have_the_first_colour():
    image = Image.new("P", (600, 600), 1)
    data = bmp(image, 8, lambda row: b"", CARD, 1)[:-2]
    for body in (b"\0\1", b"\0\2\0\xff\0\1", b"\0\2\xff\xff" * 3):
        picture = convert(data + body)
        assert ciede2000(to_lab(mean_colour(decoded(picture), (300, 300))), to_lab(CARD[0])) < 2
    with pytest.raises(errors.Unusable, match="truncated"):
        convert(data + b"\xff\1")


def test_masks_of_any_width_and_place_are_decoded_as_defined(monkeypatch):
    """Compares random pixels, decoded in strips of a few rows, with the definition: value / mask * 255."""
    monkeypatch.setattr(bmp_module, "STRIP_BYTES", 1000)
    chance = random.Random(1)
    for bits in (16, 32):
        for _ in range(30):
            cuts = sorted(chance.sample(range(bits + 1), chance.choice((6, 8))))
            masks = [(1 << end) - (1 << start) for start, end in zip(cuts[::2], cuts[1::2], strict=True)]
            chance.shuffle(masks)
            size = (37, 41)
            image = Image.frombytes("RGBA" if bits == 32 else "LA", size, chance.randbytes(37 * 41 * bits // 8))
            with tempfile.TemporaryFile() as file:
                file.write(bmp(image, bits, bytes, (), 3, masks, size=124 if len(masks) == 4 else 40))
                opened = pipeline.open_image(file)
                opened.load()
            assert opened.size == size and len(opened.getbands()) == len(masks)
            for x, y in product((0, 17, 36), range(41)):
                pixel = int.from_bytes(bytes(image.getpixel((x, y))), "little")
                for value, mask in zip(opened.getpixel((x, y)), masks, strict=True):
                    assert abs(value - (pixel & mask) / mask * 255) <= 1, (bits, masks)


def test_a_bmp_whose_alpha_is_0_everywhere_shows_its_colours():
    hidden = card(64, 48, "RGBA", [(*colour, 0) for colour in CARD], (0, 0, 0, 0))
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF << 24)
    picture = convert(bmp(hidden, 32, lambda row: masked(row, masks, 32), (), 3, masks, size=124))
    assert ciede2000(to_lab(mean_colour(decoded(picture), (150, 150))), to_lab(CARD[0])) < 2


def test_headers_of_all_sizes_and_palettes_of_any_length_show_the_same():
    index = card(64, 48, "P", (0, 1, 2, 3), 3)
    for bits in (2, 4, 8):
        pack = lambda row, bits=bits: packed(row, bits)  # noqa: E731
        whole = convert(bmp(index, bits, pack, [*CARD, *CARD * 63][: 1 << bits])).jpeg
        for size in (12, 16, 20, 40, 44, 52, 56, 64, 108, 124):
            assert convert(bmp(index, bits, pack, CARD, size=size)).jpeg == whole
    assert convert(bmp(index, 8, bytes, CARD * 75)).jpeg == whole  # 300 colours
    short = convert(bmp(index, 8, bytes, CARD[:3]))
    assert ciede2000(to_lab(mean_colour(decoded(short), (450, 450))), to_lab((0, 0, 0))) < 2
    no_offset = bytearray(bmp(index, 8, bytes, CARD))
    no_offset[10:14] = bytes(4)
    assert convert(bytes(no_offset)).jpeg == whole


def bmp_of(bits: int, compression: int = 0, size: int = 40, width: int = 64, masks=(), more=bytes(9000)) -> bytes:
    """A BMP of 48 rows with a header of `size` bytes, `masks` in or after it, and then the bytes `more`."""
    head = struct.pack("<IiiHH6I", size, width, 48, 1, bits, compression, 0, 0, 0, 0, 0)
    head = (head + struct.pack(f"<{len(masks)}I", *masks)).ljust(size, b"\0")
    return struct.pack("<2sIHHI", b"BM", 0, 0, 0, 0) + head + more


def sentence(fault: str) -> str:
    """The text of a fault with its sentence, from `code: what`."""
    code, _, what = fault.partition(": ")
    beginning = errors.SENTENCES[code].removesuffix("{what}, which is not supported")
    return f"{code}: {beginning}{what}" if code == "unsupported" else f"{code}: {beginning}: {what}"


def check_refusal(data: bytes, fault: str) -> None:
    """Checks that the text of the fault begins with its sentence and with `fault`, which is `code: what`."""
    with pytest.raises(errors.Unusable) as refusal:
        convert(data)
    assert str(refusal.value).startswith(sentence(fault))


REFUSED_BMPS = {
    "64 bits": (bmp_of(64), "unsupported: a BMP of 64 bits a pixel, which"),
    "Huffman": (bmp_of(1, 3, 64), "unsupported: a BMP with the Huffman compression of OS/2, which"),
    "RLE24": (bmp_of(24, 4, 64), "unsupported: a BMP with the RLE24 compression of OS/2, which"),
    "JPEG": (bmp_of(0, 4, 124), "unsupported: a BMP that holds a JPEG"),
    "PNG": (bmp_of(0, 5, 40), "unsupported: a BMP that holds a PNG"),
    "CMYK": (bmp_of(32, 11, 124), "unsupported: a BMP of CMYK colours"),
    "7 bits": (bmp_of(7), "undecodable: a BMP of 7 bits a pixel; it has 1, 2, 4, 8, 16, 24 or 32"),
    "RLE8 of 4 bits": (bmp_of(4, 1), "undecodable: a BMP of compression 1 and 4 bits a pixel"),
    "masks of 8 bits": (bmp_of(8, 3), "undecodable: a BMP of compression 3 and 8 bits a pixel"),
    "compression 99": (bmp_of(24, 99), "undecodable: a BMP of compression 99 and 24 bits a pixel"),
    "a header of 66": (bmp_of(24, 0, 66), "undecodable: a BMP header of 66 bytes; there are headers of 12, "),
    "overlap": (bmp_of(16, 3, 40, 64, (0xF800, 0xFE0, 31)), "undecodable: colour masks f800 fe0 1f 0 that"),
    "gaps": (bmp_of(32, 3, 40, 64, (0xF0F, 0xF0, 0)), "undecodable: colour masks f0f f0 0 0 that overlap, have"),
    "wide": (bmp_of(16, 3, 40, 64, (31, 0x3E0, 0x1FC00)), "undecodable: colour masks 1f 3e0 1fc00 0 that over"),
    "24 with masks": (bmp_of(24, 3, 40, 64, (255, 0xFF00, 0xFF0000)), "undecodable: a BMP of 24 bits with the"),
    "no width": (bmp_of(24, width=0), "undecodable: a BMP of 0 x 48 pixels"),
    "negative width": (bmp_of(24, width=-64), "undecodable: a BMP of -64 x 48 pixels"),
    "cut pixels": (bmp_of(24, more=bytes(100)), "truncated: the file has 100 of the 9216 bytes of pixels"),
    "cut header": (bmp_of(24)[:40], "truncated: a BMP of 40 bytes ends in its header of 40 bytes"),
    "cut at once": (b"BM123", "truncated: a BMP of 5 bytes ends in its header"),
    "cut masks": (bmp_of(16, 3)[:60], "truncated: a BMP of 60 bytes ends in its colour masks"),
    "cut runs": (bmp_of(8, 1, more=bytes(1024 + 2)), "truncated: the run lengths end in row 2 of 48"),
}


@pytest.mark.parametrize("name", REFUSED_BMPS)
def test_the_refusal_of_a_bmp_names_its_problem(name):
    check_refusal(*REFUSED_BMPS[name])


@pytest.mark.parametrize(
    ("mode", "spaces"),
    [("L", [b"GRAY"]), ("RGB", [b"RGB "]), ("RGBa", [b"RGB ", b"GRAY"]), ("CMYK", [b"CMYK"])],
)
def test_a_profile_is_never_applied_to_pixels_of_another_colour_space(monkeypatch, mode, spaces):
    """Pillow up to 12.1 would read past its buffers, and no check of the picture would notice that."""
    applied = []

    def apply(image, profile, *_arguments, **_options):
        space = profile.profile.xcolor_space.encode()
        assert space == {"L": b"GRAY", "RGB": b"RGB ", "CMYK": b"CMYK"}[image.mode]
        applied.append((space, profile.profile.device_class.encode()))
        return image.convert("RGB")

    monkeypatch.setattr(pipeline.ImageCms, "profileToProfile", apply)
    whole = colours.P3_PROFILE
    for space in (b"RGB ", b"GRAY", b"CMYK", b"Lab ", b"XYZ ", b"YCbr", b"HSV ", b"CMY ", b"3CLR", b"4CLR", b"1CLR"):
        for device_class in (b"mntr", b"link", b"abst", b"nmcl"):
            profile = whole[:12] + device_class + space + whole[20:]
            pipeline.convert_to_srgb(Image.new(mode, (8, 8)), pipeline.Metadata(1, profile))
    assert applied == [(space, b"mntr") for space in spaces]


CHUNKS = b"tEXt zTXt iTXt iCCP cICP eXIf pHYs gAMA cHRM sRGB tRNS bKGD hIST tIME acTL fcTL sPLT abcd"


@pytest.mark.parametrize("name", CHUNKS.split())
def test_a_damaged_ancillary_chunk_is_ignored(name):
    whole = png(64, 48, 8, 2, rows(card(64, 48)))
    plain = convert(whole).jpeg
    end = len(whole) - 12
    for content in (b"", b"\0", b"a", b"a\0\0" + bytes(50), b"\xff" * 70):
        for extra in (chunk(name, content), damaged(chunk(name, content))):
            assert convert(whole[:33] + extra + whole[33:]).jpeg == plain
            assert convert(whole[:end] + extra + whole[end:]).jpeg == plain
    cut = whole[:33] + struct.pack(">I", 2**31) + name + whole[33:]
    with pytest.raises(errors.Unusable, match=f"truncated: .* the file has .* bytes of its {name.decode()} chunk"):
        convert(cut)


def test_a_damaged_transparent_colour_is_ignored():
    def with_key(key: bytes) -> bytes:
        return convert(png(64, 48, 8, 2, rows(card(64, 48)), key)).jpeg

    key = chunk(b"tRNS", struct.pack(">3H", *CARD[0]))
    assert with_key(damaged(key)) == with_key(b"") != with_key(key)


PLAIN = png(64, 48, 8, 2, rows(card(64, 48)))
PLTE = chunk(b"PLTE", bytes(9))
INDEXED = rows(card(64, 48, "P", (0, 1, 2, 0), 0))


def indexed(*chunks: bytes) -> bytes:
    return png(64, 48, 8, 3, INDEXED, *chunks)


def with_header_byte(place: int, value: int) -> bytes:
    """A PNG with another value at one byte of its IHDR chunk, whose checksum is right."""
    fields = bytearray(PLAIN[16:29])
    fields[place] = value
    return PLAIN[:8] + chunk(b"IHDR", bytes(fields)) + PLAIN[33:]


def with_wrong_checksum(data: bytes, name: bytes) -> bytes:
    """The PNG with a wrong checksum of the chunk of this name."""
    start = data.index(name)
    end = start + 4 + int.from_bytes(data[start - 4 : start], "big")
    return data[:end] + damaged(data[end : end + 4]) + data[end + 4 :]


IDAT = chunk(b"IDAT", zlib.compress(rows(card(64, 48))))
REFUSED_PNGS = {
    "no palette": (indexed(), "undecodable: a PNG with palette colours, and without a palette"),
    "palette after the pixels": (indexed()[:-12] + PLTE + indexed()[-12:], "undecodable: a PNG with palette colours"),
    "palette of 10 bytes": (indexed(chunk(b"PLTE", bytes(10))), "undecodable: a palette of 10 bytes; it has 3 for"),
    "palette of 257": (indexed(chunk(b"PLTE", bytes(771))), "undecodable: a palette of 771 bytes; it has 3 for each"),
    "two palettes": (indexed(PLTE, PLTE), "undecodable: a PNG with two PLTE chunks"),
    "long tRNS": (indexed(PLTE, chunk(b"tRNS", bytes(4))), "undecodable: transparency of 4 colours for a palette"),
    "compression": (with_header_byte(10, 0x80), "undecodable: a PNG of compression method 128, which is unknown"),
    "filter": (with_header_byte(11, 1), "undecodable: a PNG of filter method 1, which is unknown"),
    "interlace": (with_header_byte(12, 2), "undecodable: a PNG of interlace method 2, which is unknown"),
    "depth": (with_header_byte(8, 4), "undecodable: a PNG of colour type 2 with 4 bits; there is no such kind"),
    "colour type": (with_header_byte(9, 5), "undecodable: a PNG of colour type 5 with 8 bits; there is no such kind"),
    "no width": (with_header_byte(3, 0), "undecodable: a PNG of 0 x 48 pixels"),
    "too wide": (with_header_byte(0, 0x80), "undecodable: a PNG of 2147483712 x 48 pixels"),
    "header of 12": (PLAIN[:8] + chunk(b"IHDR", bytes(12)) + PLAIN[33:], "undecodable: an IHDR chunk of 12 bytes; it"),
    "two headers": (PLAIN[:33] + PLAIN[8:], "undecodable: a PNG with two IHDR chunks"),
    "another chunk first": (
        PLAIN[:8] + chunk(b"CgBI", b"") + PLAIN[8:],
        "undecodable: there is no IHDR chunk at byte 8",
    ),
    "unknown critical": (PLAIN[:33] + chunk(b"ABCD", b"") + PLAIN[33:], "undecodable: a critical chunk ABCD, which"),
    "no chunk": (PLAIN[:33] + bytes(20) + PLAIN[33:], "undecodable: there is no chunk at byte 33"),
    "damaged IHDR": (
        with_wrong_checksum(PLAIN, b"IHDR"),
        "undecodable: the IHDR chunk at byte 8 is damaged: its checksum is wrong",
    ),
    "damaged PLTE": (with_wrong_checksum(indexed(PLTE), b"PLTE"), "undecodable: the PLTE chunk at byte 33 is damaged"),
    "damaged IDAT": (
        with_wrong_checksum(PLAIN, b"IDAT"),
        "undecodable: the IDAT chunk at byte 33 is damaged: its checksum is wrong",
    ),
    "damaged IEND": (
        with_wrong_checksum(PLAIN, b"IEND"),
        f"undecodable: the IEND chunk at byte {len(PLAIN) - 12} is damaged",
    ),
    "no pixels": (PLAIN[:33] + PLAIN[-12:], "undecodable: a PNG without pixels: it has no IDAT chunk"),
    "no end": (PLAIN[:-12], f"truncated: a PNG that ends after {len(PLAIN) - 12} bytes, without its IEND chunk"),
    "cut": (PLAIN[:60], f"truncated: the file has 19 of the {len(IDAT) - 12} bytes of its IDAT chunk"),
    "pixels cut": (PLAIN[:33] + chunk(b"IDAT", IDAT[8:60]) + PLAIN[-12:], "truncated: the compressed pixels end"),
    "rows too few": (png(64, 48, 8, 2, rows(card(64, 24))), "truncated: the pixels inflate to 4632 of 9264 bytes"),
    "no zlib": (PLAIN[:33] + chunk(b"IDAT", bytes(99)) + PLAIN[-12:], "undecodable: the compressed pixels are damaged"),
    "filter type 9": (png(64, 48, 8, 2, b"\x09" + rows(card(64, 48))[1:]), "undecodable: the compressed pixels are"),
}


@pytest.mark.parametrize("name", REFUSED_PNGS)
def test_the_refusal_of_a_png_names_its_problem(name):
    check_refusal(*REFUSED_PNGS[name])


def test_pixels_may_be_in_any_number_of_consecutive_chunks():
    pixels = IDAT[8:-4]
    for length in (1, 7, 1000):
        parts = [chunk(b"IDAT", pixels[at : at + length]) + chunk(b"IDAT", b"") for at in range(0, len(pixels), length)]
        assert convert(PLAIN[:33] + b"".join(parts) + PLAIN[-12:]).jpeg == convert(PLAIN).jpeg
    late = PLAIN[:33] + chunk(b"IDAT", pixels[:60]) + chunk(b"tEXt", b"a") + chunk(b"IDAT", pixels[60:]) + PLAIN[-12:]
    with pytest.raises(errors.Unusable, match="truncated"):  # no other chunk is allowed between them (5.6)
        convert(late)


@pytest.mark.parametrize("interlaced", [0, 1])
def test_a_png_whose_pixels_are_one_byte_short_is_refused_whatever_its_shape(interlaced):
    """Pillow would leave the last pixel black."""
    passes = png_module.ADAM7 if interlaced else ((0, 0, 1, 1),)
    for (kind, depth), (width, height) in product(png_module.MODES, ((1, 1), (2, 1), (1, 2), (5, 1), (1, 5), (7, 9))):
        bits = depth * png_module.SAMPLES[kind]
        lines = [(len(range(x, width, dx)), len(range(y, height, dy))) for x, y, dx, dy in passes]
        palette = (chunk(b"PLTE", bytes(768)),) if kind == 3 else ()
        for value in (b"\0", b"\xff"):
            scans = b""
            for columns, count in lines:
                scans += (b"\0" + (value * columns * bits)[: -(-columns * bits // 8)]) * count if columns else b""
            for complete, data in ((True, scans), (False, scans[:-1])):
                with tempfile.TemporaryFile() as file:
                    file.write(png(width, height, depth, kind, data, *palette, interlaced=interlaced))
                    file.flush()
                    image = pipeline.open_image(file)
                    if complete:
                        image.load()
                    else:
                        with pytest.raises(errors.Unusable, match="truncated"):
                            image.load()


def pixels_of(data: bytes, inflate) -> bytes | str:
    """The decoded pixels of a PNG, or the code of its refusal."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            image = pipeline.open_image(file)
            image._zlib = inflate
            return image.load() and image.tobytes()
        except errors.Unusable as refusal:
            return refusal.code


def test_isal_and_zlib_show_the_same_pixels_and_refuse_the_same_damaged_ones():
    """The checksums of the chunks are right, so that only the inflater can see the damage."""
    chance, ends = random.Random(8), Counter()
    for number in range(400):
        width, height = chance.choice([(1, 1), (40, 30), (200, 150)])
        row = bytes(chance.choices(range(chance.choice([2, 256])), k=3 * width))
        scans = b"".join(b"\0" + row[at % 7 :] + row[: at % 7] for at in range(height))
        deflate = zlib.compressobj(chance.choice([0, 1, 9]), 8, chance.choice([9, 15]), 9, chance.choice([0, 2, 4]))
        stream = bytearray(deflate.compress(scans) + deflate.flush())
        for _ in range(number % 3):
            stream[chance.randrange(len(stream))] ^= 1 << chance.randrange(8)
        if number % 5 == 0:
            del stream[chance.randrange(len(stream)) :]
        data = png(width, height, 8, 2, b"").replace(chunk(b"IDAT", zlib.compress(b"")), chunk(b"IDAT", bytes(stream)))
        shown, expected = (pixels_of(data, inflate) for inflate in (png_module.isal_zlib, zlib))
        assert shown == expected, number
        ends[shown if isinstance(shown, str) else "picture"] += 1
    assert png_module.isal_zlib is not zlib and min(ends.values()) > 20 and len(ends) == 3, ends


def test_two_conversions_give_the_same_bytes():
    for name in ("Display P3 JPEG", "large PNG with alpha"):
        assert convert(GOLDENS[name].data) == convert(GOLDENS[name].data)


def test_broken_exif_is_ignored():
    whole = saved(card(64, 48), "PNG")
    entry = b"\x01\x12\0\3\0\0\0\1\0"
    for tags in (
        b"",
        b"MM\0*",
        b"MM\0*\0\0\0\x08\xff\xff",
        b"MM\0*\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\0\1" + entry,
        b"MM\0*\0\0\0\x08\0\1" + entry + b"\x09\0\0",
    ):
        picture = convert(whole[:33] + chunk(b"eXIf", tags) + whole[33:])
        assert mean_colour(decoded(picture), (150, 150)) == mean_colour(decoded(convert(whole)), (150, 150))


def test_a_thumbhash_is_that_of_the_published_package():
    """The expected hash is from `thumbhash` 0.1.2 on PyPI, a port of evanw/thumbhash, for the same 32x32 values."""
    assert thumbhash.thumbhash(card(600, 600)).hex() == "1d1906470e717a86d067978778a88678889608b78e8ffa08"
    assert len(convert(GOLDENS["plain JPEG"].data).thumbhash) == 24


def test_only_pillows_jpeg_plugin_is_loaded_and_decoding_imports_nothing(tmp_path):
    """In a process of its own, because tests import more than workers do."""
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
    assert ran.stdout == "[]\n['PIL.JpegImagePlugin']\n"


def test_a_pillow_without_colour_management_is_refused_at_the_start(monkeypatch):
    pipeline.require_colour_management()
    monkeypatch.setattr(pipeline.features, "check", lambda feature: feature != "littlecms2")
    with pytest.raises(SystemExit, match="liblcms2"):
        pipeline.require_colour_management()


def test_the_interlaced_png_of_the_golden_set_is_interlaced():
    """A check of the golden set itself: the header says so, and Pillow reads the right pixels."""
    opened = Image.open(io.BytesIO(GOLDENS["interlaced PNG"].data))
    assert opened.info["interlace"] == 1
    assert opened.convert("RGB").tobytes() == card(64, 48).tobytes()
