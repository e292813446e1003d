"""Measures the worker's encoder of JPEGs beside Pillow's, which the workers used before.

    python -m tests.bench.jpegs [ROUNDS]

`make bench-jpegs` runs it. The photographs are those of three Debian packages with wallpapers, and the portrait of
matplotlib. Drawings in these packages are left out. Both encoders get the same 600x600 pixels, which the pipeline made.

bytes         of one JPEG
SSIMULACRA2   how near it is to these pixels for a person: 100 is equal, 90 cannot be told apart, 70 is good
CPU           ms of encoding alone, and of a whole conversion in its sandbox. Rounds are interleaved.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT
from PIL import Image, PngImagePlugin  # noqa: F401  so that PNG can be written
from ssimulacra2 import compute_ssimulacra2

from tests.bench import images
from workers import encoding, pipeline, scans

ROUNDS = int(sys.argv[1]) if __name__ == "__main__" and sys.argv[1:] else 15
CACHE = ROOT / ".cache" / "photographs"
PACKAGES = {  # of Debian: where its photographs are
    "mate-backgrounds": "usr/share/backgrounds/mate/nature/*.jpg",
    "lomiri-wallpapers-16.04": "usr/share/backgrounds/*.jpg",
    "plasma-workspace-wallpapers": "usr/share/wallpapers/*/contents/images/*.jpg",
}
DRAWN = {  # by name of the file, or of the wallpaper
    *("analogpattern_by_Peter_Nerlich", "umang_by_Abhishek_Mudgal", "Autumn", "Flow", "Honeywave", "PastelHills"),
    *("SafeLanding", "Shell", "Volna"),
}
WAYS = {"before": encoding.with_pillow, "now": encoding.encode_jpeg}


def photographs() -> list[Path]:
    """Returns the files, one for each photograph. Downloads the packages the first time; installs nothing."""
    if not CACHE.exists():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=folder, check=True)
            for package in Path(folder).glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", package, Path(folder, "all")], check=True)
            CACHE.mkdir(parents=True)
            for pattern in PACKAGES.values():
                largest = {}
                for path in sorted(Path(folder, "all").glob(pattern), key=lambda path: path.stat().st_size):
                    largest[path.parts[-4] if "contents" in path.parts else path.stem] = path
                for name in sorted(largest.keys() - DRAWN):
                    (CACHE / f"{name}.jpg").write_bytes(largest[name].read_bytes())
            (CACHE / "portrait.jpg").write_bytes(images.portrait())
    return sorted(CACHE.iterdir())


def pixels(path: Path) -> Image.Image:
    """What the pipeline gives to the encoder."""
    with path.open("rb") as file:
        image = original = pipeline.open_image(file)
        exif, profile = original.info.get("exif", b""), original.info.get("icc_profile")
        for step in pipeline.STEPS:
            image = step(image, pipeline.Metadata(pipeline._orientation(exif), profile))
    return image


def compare_encoders(files: list[Path]) -> None:
    """Prints two tables: bytes, SSIMULACRA2 and CPU, and what the looks show, as medians over the photographs."""
    rows: dict[str, list[tuple]] = {way: [] for way in WAYS}
    looks: dict[tuple[str, str], list[tuple]] = {}
    with tempfile.TemporaryDirectory() as folder:
        exact, encoded = Path(folder, "exact.png"), Path(folder, "encoded.jpg")
        for path in files:
            image = pixels(path)
            image.save(exact)
            for way, encode in WAYS.items():
                jpeg = encode(image)
                encoded.write_bytes(jpeg)
                rows[way].append((len(jpeg), compute_ssimulacra2(exact, encoded), cpu(encode, image)))
                ends = scans.looks(jpeg)[:-1]
                for name, end in zip(("first", "second", "third"), ends, strict=False):
                    encoded.write_bytes(jpeg[:end] + b"\xff\xd9")
                    score = compute_ssimulacra2(exact, encoded)
                    looks.setdefault((way, name), []).append((end, end / len(jpeg), score))
    print(f"{len(files)} photographs\n")
    print("| medians | bytes | SSIMULACRA2 | CPU, ms |\n|-|-|-|-|")
    for way, results in rows.items():
        size, score, took = map(statistics.median, zip(*results, strict=True))
        print(f"| {way} | {size:.0f} | {score:.2f} | {took * 1000:.1f} |")
    print("\n| look | photographs | bytes | share of the file | SSIMULACRA2 |\n|-|-|-|-|-|")
    for (way, name), results in looks.items():
        size, share, score = map(statistics.median, zip(*results, strict=True))
        print(f"| {way}, {name} | {len(results)} | {size:.0f} | {share:.3f} | {score:.1f} |")
    before, now = ([row[0] for row in rows[way]] for way in WAYS)
    ratio = statistics.median(new / old for old, new in zip(before, now, strict=True))
    print(f"\nbytes now ÷ before: median {ratio:.3f}, all together {sum(now) / sum(before):.3f}\n")


def cpu(encode, image: Image.Image) -> float:
    """Returns CPU seconds of encoding, the least of five: the others include what else the machine does."""
    took = []
    for _ in range(5):
        began = time.process_time()
        encode(image)
        took.append(time.process_time() - began)
    return min(took)


def compare_conversions(folder: Path) -> None:
    """Prints the CPU time of converting a 12 MP JPEG in its sandbox with each encoder, and their ratio."""
    path = folder / "image.jpg"
    images.photograph(4000, 3000).save(path, quality=90)
    prepares = {"before": "pipeline.encode_jpeg = encoding.with_pillow", "now": ""}
    converters = {}
    for way, prepare in prepares.items():
        (folder / way).mkdir()
        converters[way] = images.start_converter(folder / way, prepare)
    took: dict[str, list[float]] = {way: [] for way in prepares}
    for _ in range(ROUNDS):
        for way, converter in converters.items():
            took[way].append(images.with_sandbox(path, converter)[1])
    for converter in converters.values():
        converter.stdin.close()
        converter.wait()
    before, now = (statistics.median(took[way]) * 1000 for way in prepares)
    ratio = statistics.median(new / old for old, new in zip(took["before"], took["now"], strict=True))
    print(f"12 MP JPEG, CPU of its conversion: {before:.1f} ms before, {now:.1f} ms now, ÷ {ratio:.2f}")


def main() -> None:
    compare_encoders(photographs())
    with tempfile.TemporaryDirectory() as folder:
        compare_conversions(Path(folder))


if __name__ == "__main__":
    main()
