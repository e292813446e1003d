"""Images that are meant to do harm.

Each ends as a picture or as a fault with a code. Only its decoder may die of it.
"""

import random
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from golden import goldens
from hostile import hostiles, many_scans, mutated

from storage import settings
from workers import errors, pipeline, sandbox

CHOSEN = settings.load({})
GOLDENS = goldens()
HOSTILES = hostiles()


# All that clients may read about each code. Some sentences are followed by the problem of this image, in words.
WHAT = r"(: (?!.*(Error|None|object|0x|__|PIL|Pillow))[A-Za-z0-9 ,;:()'/-]+)?"
SENTENCES = {
    "wrong_format": re.compile("the file is not a PNG, JPEG or BMP image"),
    "unsupported": re.compile("the file is an? [A-Za-z0-9 ()-]+, which is not supported"),
    "too_many_pixels": re.compile(
        r"the image has \d+ x \d+ pixels; at most \d+ million pixels and \d+ pixels a side are accepted"
    ),
    "too_many_scans": re.compile(r"the JPEG has \d+ scans; at most \d+ are accepted"),
    "too_costly": re.compile("decoding the image takes too much processor time or memory" + WHAT),
    "truncated": re.compile("the file ends before the image is complete" + WHAT),
    "undecodable": re.compile("the image is damaged and cannot be decoded" + WHAT),
}


def result_of(tmp_path: Path, data: bytes) -> str:
    """Decodes in the sandbox. Returns `picture`, or the code of the fault, whose sentence it checks."""
    path = tmp_path / "original"
    path.write_bytes(data)
    try:
        picture = sandbox.convert(path, CHOSEN)
    except errors.Unusable as fault:
        assert SENTENCES[fault.code].fullmatch(fault.detail), fault.detail
        return fault.code
    assert picture.jpeg.startswith(b"\xff\xd8\xff") and len(picture.thumbhash) == 24
    return "picture"


@pytest.mark.parametrize("name", HOSTILES)
def test_a_hostile_image_ends_as_expected_within_20_seconds(name, tmp_path):
    data, codes = HOSTILES[name]
    began = time.monotonic()
    assert result_of(tmp_path, data) in codes
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("name", "detail"),
    {
        "HTML with a PNG after it": "the file is not a PNG, JPEG or BMP image",
        "PNG of 30,001 x 1": "the image has 30001 x 1 pixels; at most 100 million pixels and 30000 pixels a side are "
        "accepted",
        "JPEG of 1,000 scans": "the JPEG has 1000 scans; at most 100 are accepted",
        "BMP of 100 megapixels and no pixel": "the file ends before the image is complete: the file has 0 of the"
        " 300000000 bytes of pixels",
        "PNG with a wrong checksum in IDAT": "the image is damaged and cannot be decoded: the IDAT chunk at byte 33 is"
        " damaged: its checksum is wrong",
    }.items(),
)
def test_the_detail_of_a_fault_is_the_sentence_of_its_code(name, detail, tmp_path):
    path = tmp_path / "original"
    path.write_bytes(HOSTILES[name][0])
    with pytest.raises(errors.Unusable) as caught:
        sandbox.convert(path, CHOSEN)
    assert caught.value.detail == detail


def test_mutated_images_end_with_a_picture_or_a_known_fault(tmp_path):
    """A decoder that crashes or fails in another way raises ChildProcessError, which fails this test."""
    others = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # of child processes that other tests had
    chance = random.Random(4)  # seeded: the same images each time
    seeds = [golden.data for golden in GOLDENS.values() if len(golden.data) < 400_000]
    counted = Counter(result_of(tmp_path, mutated(chance.choice(seeds), chance)) for _ in range(600))
    sandbox.stop()  # RUSAGE_CHILDREN includes decoders only after their fork server has ended
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"600 mutated images: {dict(counted)}; the largest child process of this run used {used:.0f} MiB")
    assert counted["picture"] > 100 and counted["undecodable"] > 100
    assert counted.keys() <= {"picture", "undecodable", "truncated", "too_many_pixels", "wrong_format", "unsupported"}
    assert used < max(1100, others + 1)


def test_a_decoder_returns_the_picture_that_the_pipeline_returns(tmp_path):
    for name in ("Display P3 JPEG", "large PNG with alpha", "BMP in RLE8"):
        path = tmp_path / "original"
        path.write_bytes(GOLDENS[name].data)
        with path.open("rb") as file:
            assert sandbox.convert(path, CHOSEN) == pipeline.convert(file, 100, 30_000)


def test_a_decoder_has_the_memory_that_the_largest_image_needs(tmp_path):
    """A progressive CMYK JPEG. Its coefficients stay in memory until the last scan; it decodes to half its sides."""
    path = tmp_path / "original"
    path.write_bytes(many_scans(30_000, 3_333, 11, components=4))
    program = """
import sys
from pathlib import Path
from storage import settings
from workers import sandbox
print(len(sandbox.convert(Path(sys.argv[1]), settings.load({})).thumbhash))
"""
    assert subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, stdout=-1, check=True).stdout == b"24\n"


def test_a_missing_file_is_not_the_images_fault(tmp_path):
    with pytest.raises(FileNotFoundError):
        sandbox.convert(tmp_path / "missing", CHOSEN)
