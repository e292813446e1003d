"""JPEGs of the pictures: small, progressive, the same in every decoder, and whole after their first scan."""

import base64
import io
import logging
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import playwright
import pyjpegli
import pytest
import simplejpeg
from conftest import ROOT, photograph, until
from drills.images import working
from golden import card
from PIL import Image
from playwright.sync_api import sync_playwright
from ssimulacra2 import compute_ssimulacra2

from workers import encoding, scans
from workers.scans import SOF2, SOS


def cut(image: Image.Image, *box: int) -> Image.Image:
    return image.convert("RGB").resize((600, 600), Image.Resampling.LANCZOS, box)


PORTRAIT = Image.open(io.BytesIO(photograph()))  # 512x600
# Its parts are photographs of their own: one is sharp, one is smooth, one has both.
PHOTOGRAPHS = {
    "portrait": cut(PORTRAIT, 0, 44, 512, 556),
    "face": cut(PORTRAIT, 100, 0, 400, 300),
    "uniform": cut(PORTRAIT, 150, 250, 450, 550),
    "flag": cut(PORTRAIT, 0, 0, 300, 300),
}
GRADIENT = Image.merge("RGB", [Image.linear_gradient("L").resize((600, 600)).rotate(90 * n) for n in range(3)])
NOISE = Image.frombytes("RGB", (600, 600), np.random.default_rng(1).bytes(3 * 600 * 600))
TEAL = Image.new("RGB", (600, 600), "teal")
OTHERS = {"card": card(600, 600), "one colour": TEAL, "gradient": GRADIENT, "noise": NOISE}
GREY = {"grey": PHOTOGRAPHS["portrait"].convert("L").convert("RGB")}
PICTURES = PHOTOGRAPHS | OTHERS | GREY


def with_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def scan_ends(data: bytes) -> list[int]:
    return [part.end for part in scans.segments(data) if part.marker == SOS]


PILLOW = encoding.with_pillow(PICTURES["grey"])
JPEGS = {name: encoding.encode_jpeg(image) for name, image in PICTURES.items()}


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_begins_with_jfif_is_progressive_and_has_no_metadata(name):
    data = JPEGS[name]
    assert data.startswith(b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01") and data.endswith(b"\xff\xd9")
    markers = {part.marker for part in scans.segments(data)}
    assert SOF2 in markers and markers <= {0xE0, 0xDB, SOF2, 0xC4, SOS}
    assert Image.open(io.BytesIO(data)).layer == [(1, 2, 2, 0), (2, 1, 1, 1), (3, 1, 1, 1)]


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_a_photograph_has_fewer_bytes_than_pillow_makes_and_is_as_near_to_its_pixels(name):
    """`make bench-jpegs` measures more photographs, with SSIMULACRA2."""
    image, other = PICTURES[name], encoding.with_pillow(PICTURES[name])
    assert len(JPEGS[name]) < 0.92 * len(other)
    exact = np.asarray(image).astype(int)
    assert np.abs(with_pillow(JPEGS[name]) - exact).mean() < 1.3 * np.abs(with_pillow(other) - exact).mean()


def in_chromium(data: bytes) -> np.ndarray:
    program = """async url => {
        const image = new Image(); image.src = url; await image.decode();
        const canvas = document.createElement("canvas"); canvas.width = canvas.height = 600;
        const context = canvas.getContext("2d"); context.drawImage(image, 0, 0);
        return btoa(Array.from(context.getImageData(0, 0, 600, 600).data, byte => String.fromCharCode(byte)).join(""));
    }"""
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page()
        pixels = page.evaluate(program, "data:image/jpeg;base64," + base64.b64encode(data).decode())
        browser.close()
    return np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(600, 600, 4)[:, :, :3]


def in_javascript(data: bytes) -> np.ndarray:
    """jpeg-js, which has nothing of libjpeg. Playwright brings it along."""
    driver = Path(playwright.__file__).parent / "driver"
    program = f"""
const {{ jpegjs }} = require({str(driver / "package/lib/utilsBundle.js")!r});
const picture = jpegjs.decode(require("fs").readFileSync(0), {{ useTArray: true, formatAsRGBA: false }});
process.stdout.write(Buffer.from(picture.data));
"""
    ran = subprocess.run([driver / "node", "-e", program], input=data, stdout=-1, check=True)
    return np.frombuffer(ran.stdout, np.uint8).reshape(600, 600, 3)


DECODERS = {  # the mean distance to what Pillow shows, of 255. jpeg-js does not smooth the colours it enlarges
    "libjpeg-turbo": (lambda data: simplejpeg.decode_jpeg(data, strict=True), 0.5),
    "jpegli": (lambda data: np.frombuffer(pyjpegli.decode(data)[0], np.uint8).reshape(600, 600, 3), 1.5),
    "Chromium": (in_chromium, 1.0),
    "jpeg-js": (in_javascript, 2.5),
}


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_shows_the_same(decoder):
    decode, distance = DECODERS[decoder]
    for name in ("face",) if decoder in ("Chromium", "jpeg-js") else PHOTOGRAPHS:
        assert np.abs(decode(JPEGS[name]) - with_pillow(JPEGS[name])).mean() < distance, name


def test_the_first_scan_shows_the_whole_picture_in_15_percent_of_the_bytes_and_the_second_is_better_by_40():
    shares = {name: [end / len(JPEGS[name]) for end in scan_ends(JPEGS[name])] for name in PHOTOGRAPHS}
    assert statistics.median(share[0] for share in shares.values()) <= scans.FIRST_SHARE
    assert statistics.median(share[1] for share in shares.values()) <= 0.40
    for name in PHOTOGRAPHS:
        data, whole = JPEGS[name], with_pillow(JPEGS[name])
        looks = [with_pillow(data[:end] + b"\xff\xd9") for end in scan_ends(data)]
        squares = (looks[0] - whole).reshape(5, 120, 5, 120, 3).mean((1, 3))
        assert np.abs(squares).max() < 8, "a part of the picture is missing, or has another colour"
        distances = [np.abs(look - whole).mean() for look in looks]
        assert distances[1] < 0.7 * distances[0] and distances[-1] == 0
        assert distances == sorted(distances, reverse=True)


@pytest.mark.parametrize("encode", [encoding.encode_jpeg, encoding.with_pillow])
def test_each_look_shows_the_whole_picture_better_than_the_one_before_in_two_decoders(encode, tmp_path):
    data = encode(PHOTOGRAPHS["face"].copy())
    looks = scans.looks(data)
    assert 3 <= len(looks) <= scans.MAX_LOOKS and looks[-1] == len(data)
    assert looks[0] <= 0.16 * len(data) and looks[1] <= 0.4 * len(data)
    exact, look = tmp_path / "exact.png", tmp_path / "look.jpg"
    PHOTOGRAPHS["face"].save(exact)
    scores, shown = [], []
    for end in looks:
        look.write_bytes(data[:end] + b"\xff\xd9")
        scores.append(compute_ssimulacra2(exact, look))
        shown.append(in_javascript(look.read_bytes()).astype(int))
    assert scores == sorted(scores) and min(np.diff(scores)) > 5, scores
    distances = [np.abs(picture - shown[-1]).mean() for picture in shown]
    assert distances == sorted(distances, reverse=True), distances
    squares = (shown[0] - shown[-1]).reshape(5, 120, 5, 120, 3).mean((1, 3))
    assert np.abs(squares).max() < 8, "a part of the picture is missing, or has another colour"


def test_a_file_that_is_small_or_has_no_scans_of_the_whole_picture_has_one_look():
    file = io.BytesIO()
    PHOTOGRAPHS["face"].save(file, "JPEG", quality=80)
    for data in (JPEGS["one colour"], file.getvalue()):
        assert scans.looks(data) == (len(data),)


@pytest.mark.parametrize("name", PICTURES)
def test_a_smaller_first_scan_changes_no_pixel(name, monkeypatch):
    plain = encoding.mozjpeg.optimize(pyjpegli.encode(PICTURES[name].tobytes(), 600, 600, quality=81))
    monkeypatch.setattr(scans, "FIRST_BYTES", 0)
    for share in (1, 0.18, 0.12, 0):  # left out: none to all of the 3 lowest bits
        monkeypatch.setattr(scans, "FIRST_SHARE", share)
        split = scans.shrink_first_scan(plain)
        assert (split == plain) == (scan_ends(plain)[0] <= share * len(plain))
        assert scan_ends(split)[0] <= scan_ends(plain)[0]
        ordered = scans.move_colours_forward(split)
        assert len(ordered) == len(split)
        for changed in (split, ordered):
            assert (simplejpeg.decode_jpeg(changed, strict=True) == simplejpeg.decode_jpeg(plain, strict=True)).all()


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"progressive": True, "subsampling": 0}], ids=["baseline", "4:2:0", "4:4:4"]
)
def test_a_jpeg_with_other_scans_stays_as_it_is(options):
    for mode in ("RGB", "L"):
        file = io.BytesIO()
        PHOTOGRAPHS["face"].convert(mode).save(file, "JPEG", **options)
        assert scans.shrink_first_scan(file.getvalue()) == file.getvalue()


WITHOUT = """
import sys
block = f"import sys; sys.modules[{sys.argv[1]!r}] = None\\n"
exec(block)
from workers import __main__ as worker, sandbox
sandbox.PROGRAM = block + sandbox.PROGRAM
sys.argv[:2] = ["workers"]
worker.main()
"""


@pytest.mark.parametrize("package", ["pyjpegli", "mozjpeg_lossless_optimization"])
def test_without_a_package_pillow_encodes_and_the_worker_says_so_at_its_start(package):
    with working() as site:
        (post,) = site.publish([photograph()])
        command, environment = [sys.executable, "-c", WITHOUT, package], os.environ | site.environment
        worker = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=-1, text=True, start_new_session=True)
        try:
            until(lambda: site.statuses([post])["ready"], what="the image")
        finally:
            worker.terminate()
            logged = worker.communicate(timeout=30)[1]
        served = (site.folder / "store" / "images" / f"{post}.jpg").read_bytes()
    assert len(re.findall(rf"^WARNING imagegram.worker: Pillow encodes .*: .*{package}.*$", logged, re.MULTILINE)) == 1
    assert Image.open(io.BytesIO(served)).quantization == Image.open(io.BytesIO(PILLOW)).quantization


def test_with_both_packages_the_worker_says_nothing(caplog):
    caplog.set_level(logging.INFO)
    encoding.warn_if_missing()
    assert encoding.missing is None and not caplog.records
