"""What making a picture costs, beside libvips doing the same work, in one run.

`make bench-images`. Rounds are interleaved, so that what else the machine does meets all alike; figures are medians.
Both are held to one core and write the same JPEG: 600x600 of the centre, quality 80, 4:2:0, progressive, optimised.
"""

import os
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["VIPS_CONCURRENCY"] = "1"

import pyvips  # noqa: E402
from PIL import Image, features  # noqa: E402

from storage import settings  # noqa: E402
from workers import pipeline, sandbox  # noqa: E402

ROUNDS = int(sys.argv[1]) if __name__ == "__main__" and sys.argv[1:] else 15
CHOSEN = settings.load({})
FILES = {
    "12 MP JPEG": (4000, 3000, "jpg"),
    "48 MP JPEG": (8000, 6000, "jpg"),
    "12 MP PNG": (4000, 3000, "png"),
    "35 MP BMP": (7000, 5000, "bmp"),
}


def photograph(width: int, height: int) -> Image.Image:
    """Clouds of four sizes over each other and the grain of a sensor: compresses about as photographs do."""
    chance, image = random.Random(1), Image.new("RGB", (width, height), "grey")
    for step, share in ((500, 0.7), (60, 0.3), (8, 0.12), (1, 0.03)):
        size = (width // step, height // step)
        clouds = Image.frombytes("RGB", size, chance.randbytes(3 * size[0] * size[1]))
        image = Image.blend(image, clouds.resize((width, height), Image.Resampling.BICUBIC), share)
    return image


def with_pipeline(path: Path) -> bytes:
    with path.open("rb") as file:
        return pipeline.convert(file, CHOSEN.image_megapixels, CHOSEN.image_side).jpeg


def with_sandbox(path: Path) -> bytes:
    return sandbox.convert(path, CHOSEN).jpeg


def with_libvips(path: Path) -> bytes:
    image = pyvips.Image.thumbnail(str(path), 600, height=600, crop="centre", fail_on="truncated")
    if image.hasalpha():
        image = image.flatten(background=255)
    return image.jpegsave_buffer(Q=80, interlace=True, optimize_coding=True, subsample_mode="on", keep="none")


def cpu() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    pyvips.cache_set_max(0)
    print(f"Pillow {pipeline.Image.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}, ", end="")
    print(f"libvips {pyvips.version(0)}.{pyvips.version(1)}.{pyvips.version(2)}; {ROUNDS} rounds, ms of wall (CPU)\n")
    print("| image | bytes | pipeline | in its child | libvips | pipeline : libvips | picture's bytes |")
    print("|-|-|-|-|-|-|-|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (width, height, kind) in FILES.items():
            path = Path(folder, f"image.{kind}")
            photograph(width, height).save(path, **({"quality": 90} if kind == "jpg" else {}))
            ways = [with_pipeline, with_sandbox] + ([with_libvips] if kind != "bmp" else [])  # it reads no BMP
            taken = {way: [] for way in ways}
            for _ in range(ROUNDS):
                for way in ways:
                    wall, used = time.perf_counter(), cpu()
                    made = way(path)
                    taken[way].append((time.perf_counter() - wall, cpu() - used, len(made)))
            middle = {way: list(map(statistics.median, zip(*rows, strict=True))) for way, rows in taken.items()}
            cells = [f"{wall * 1000:.0f} ({used * 1000:.0f})" for wall, used, _ in middle.values()] + ["-"]
            ratio = middle[with_pipeline][0] / middle[with_libvips][0] if with_libvips in middle else None
            sizes = " : ".join(str(int(middle[way][2])) for way in ways if way != with_sandbox)
            print(f"| {name} | {path.stat().st_size} | {' | '.join(cells[:3])} | ", end="")
            print(f"{f'{ratio:.2f}' if ratio else '-'} | {sizes} |", flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
