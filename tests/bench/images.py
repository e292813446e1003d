"""Measures what converting an image costs, compared with libvips doing the same work. Then what a worker adds to it.

    python -m tests.bench.images [ROUNDS]

`make bench-images` runs it. Rounds are interleaved, so that other load on the machine affects all alike. Figures are
medians. All run on one core and write 600x600 of the centre as a progressive JPEG, 4:2:0.

libvips    runs in this process, which reuses its memory. It encodes at quality 80, optimised.
pipeline   The same, with the worker's pipeline and its encoder, whose JPEG is smaller and takes more time.
child      The pipeline as in a worker: in a decoder in its sandbox, a new process for each image. Its CPU time is that
           of requester, fork server and decoder.
"""

import io
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from colours import ciede2000, to_lab
from conftest import photograph as portrait
from conftest import until
from drills.images import working
from PIL import BmpImagePlugin, Image, PngImagePlugin, features  # noqa: F401  so that PNG and BMP can be written

from storage import settings
from workers import pipeline

os.environ["VIPS_CONCURRENCY"] = "1"  # read when libvips is loaded
ROUNDS = int(sys.argv[1]) if __name__ == "__main__" and sys.argv[1:] else 15
CHOSEN = settings.load({})
FILES = {  # width, height, kind
    "12 MP JPEG": (4000, 3000, "jpg"),
    "48 MP JPEG": (8000, 6000, "jpg"),
    "12 MP PNG": (4000, 3000, "png"),
    "35 MP BMP": (7000, 5000, "bmp"),
}


def photograph(width: int, height: int) -> Image.Image:
    """Clouds of three sizes over each other, and grain as of a sensor. Compresses about as well as a photograph."""
    chance, image = random.Random(1), Image.new("RGB", (width, height), "grey")
    for step, share in ((500, 0.7), (60, 0.3), (8, 0.12), (1, 0.03)):
        size = (width // step, height // step)
        clouds = Image.frombytes("RGB", size, chance.randbytes(3 * size[0] * size[1]))
        image = Image.blend(image, clouds.resize((width, height), Image.Resampling.BICUBIC), share)
    return image


def with_pipeline(path: Path) -> bytes:
    with path.open("rb") as file:
        return pipeline.convert(file, CHOSEN.image_megapixels, CHOSEN.image_side).jpeg


# A program that converts each file whose path comes on standard input and prints wall time, CPU time and size. The fork
# server writes its CPU time and that of its decoders to a file, because they are not children of this program.
CONVERTER = """
import resource, sys, time
from pathlib import Path
from storage import settings
from workers import sandbox

USED = '''
import resource

def cpu():
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
'''
exec(USED)
sandbox.PROGRAM = USED + f'''
from pathlib import Path
from workers import encoding, pipeline, sandbox
{sys.argv[2]}

def end(child, end=sandbox.end):
    ended = end(child)
    Path({sys.argv[1]!r}).write_text(str(cpu()))
    return ended

sandbox.end = end
sandbox.serve()
'''
Path(sys.argv[1]).write_text("0")
for line in sys.stdin:
    sandbox.fork_server()
    wall, used = time.perf_counter(), cpu() + float(Path(sys.argv[1]).read_text())
    picture = sandbox.convert(Path(line.strip()), settings.load({}))
    wall, used = time.perf_counter() - wall, cpu() + float(Path(sys.argv[1]).read_text()) - used
    print(wall, used, len(picture.jpeg), flush=True)
"""


def start_converter(folder: Path, prepare: str = "") -> subprocess.Popen:
    """`prepare`: what its fork server runs at its start."""
    command = [sys.executable, "-c", CONVERTER, folder / "used", prepare]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def with_sandbox(path: Path, converter: subprocess.Popen) -> tuple[float, float, int]:
    """Converts a file in a decoder. Returns wall time and CPU time in seconds, and the JPEG's bytes."""
    print(path, file=converter.stdin, flush=True)
    wall, used, size = converter.stdout.readline().split()
    return float(wall), float(used), int(size)


def with_libvips(path: Path) -> bytes:
    import pyvips  # here, because other parts of the bench import this module and do not need it

    image = pyvips.Image.thumbnail(str(path), 600, height=600, crop="centre", fail_on="truncated")
    if image.hasalpha():
        image = image.flatten(background=255)
    return image.jpegsave_buffer(Q=80, interlace=True, optimize_coding=True, subsample_mode="on", keep="none")


def cpu() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def in_process(convert, path: Path) -> tuple[float, float, int]:
    """Converts a file in this process. Returns wall time and CPU time in seconds, and the JPEG's bytes."""
    wall, used = time.perf_counter(), cpu()
    jpeg = convert(path)
    return time.perf_counter() - wall, cpu() - used, len(jpeg)


def compare_with_libvips(folder: Path) -> None:
    """Prints a table: the cost of each file of FILES each way, and the ratios of the CPU times."""
    import pyvips

    pyvips.cache_set_max(0)
    print(f"Pillow {pipeline.Image.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}, ", end="")
    print(f"libvips {pyvips.version(0)}.{pyvips.version(1)}.{pyvips.version(2)}; {ROUNDS} rounds, ms of wall (CPU)\n")
    print("| image | bytes | libvips | pipeline | ÷ libvips | in its child | ÷ libvips | picture's bytes |")
    print("|-|-|-|-|-|-|-|-|")
    converter = start_converter(folder)
    for name, (width, height, kind) in FILES.items():
        path = folder / f"image.{kind}"
        photograph(width, height).save(path, **({"quality": 90} if kind == "jpg" else {}))
        ways = {
            "libvips": lambda path: in_process(with_libvips, path),
            "pipeline": lambda path: in_process(with_pipeline, path),
            "child": lambda path: with_sandbox(path, converter),
        }
        if kind == "bmp":
            del ways["libvips"]  # it cannot read BMP
        results = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, convert in ways.items():
                results[way].append(convert(path))
        middle = {way: list(map(statistics.median, zip(*rows, strict=True))) for way, rows in results.items()}
        cells = {way: f"{wall * 1000:.0f} ({used * 1000:.0f})" for way, (wall, used, _) in middle.items()}
        peer = middle.get("libvips")
        ratio = {way: f"{middle[way][1] / peer[1]:.2f}" if peer else "-" for way in ("pipeline", "child")}
        sizes = " : ".join(str(int(middle[way][2])) for way in ("libvips", "pipeline") if way in middle)
        print(f"| {name} | {path.stat().st_size} | {cells.get('libvips', '-')} | {cells['pipeline']} | ", end="")
        print(f"{ratio['pipeline']} | {cells['child']} | {ratio['child']} | {sizes} |", flush=True)
        path.unlink()
    converter.stdin.close()
    converter.wait()


def by_a_worker(count: int, size: tuple[int, int], quality: int = 90) -> str:
    """Measures real workers on a folder store: what a job adds to a conversion, and images a second on all cores."""
    with working(converters=len(os.sched_getaffinity(0))) as site:
        path = site.folder / "image.jpg"
        photograph(*size).save(path, quality=quality)
        ids = site.publish([path.read_bytes()] * count)
        timed = site.folder / "timed"
        timed.touch()
        site.environment.update(TIMED=str(timed), PYTHONPATH="tests")
        site.start("tests.bench.timed")
        until(lambda: timed.read_text().count("\n") > 4, what="the first images")
        first = timed.read_text().count("\n")
        began = time.perf_counter()
        until(lambda: "processing" not in site.statuses(ids), 300, "all images")
        rate = (count - first) / (time.perf_counter() - began)
        rows = [tuple(map(float, line.split())) for line in timed.read_text().splitlines()]
    added = [total - conversion for total, conversion in rows]
    conversion = statistics.median(row[1] for row in rows) * 1000
    return (
        f"{size[0] * size[1] / 1e6:.0f} MP JPEG, {count} jobs on {len(os.sched_getaffinity(0))} cores at once:"
        f" {rate:.1f} images/s, conversion {conversion:.0f} ms,"
        f" the rest of the job {statistics.median(added) * 1000:.1f} ms (p95 {sorted(added)[-count // 20] * 1000:.1f})"
    )


def compare_qualities() -> None:
    """Prints a table: size and colour error of a real photograph with other JPEG options than the pipeline's."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(portrait())
        file.flush()
        picture = pipeline.crop_and_shrink(pipeline.open_image(file), pipeline.Metadata(1, None)).convert("RGB")
    places = [(x, y) for x in range(0, 600, 12) for y in range(0, 600, 12)]
    before = [to_lab(picture.getpixel(place)) for place in places]
    print("| picture of a portrait | bytes | mean CIEDE2000 | p95 |\n|-|-|-|-|")
    for quality, subsampling, progressive in (
        *((quality, "4:2:0", True) for quality in (70, 75, 80, 85, 90)),
        *((80, "4:4:4", True), (80, "4:2:0", False)),
    ):
        out = io.BytesIO()
        options = {"quality": quality, "subsampling": subsampling, "progressive": progressive, "optimize": progressive}
        picture.save(out, "JPEG", **options)
        after = Image.open(out).convert("RGB")
        errors = [ciede2000(lab, to_lab(after.getpixel(place))) for lab, place in zip(before, places, strict=True)]
        kind = "progressive, optimised" if progressive else "baseline"
        print(f"| quality {quality}, {subsampling}, {kind} | {out.tell()} | ", end="")
        print(f"{statistics.mean(errors):.2f} | {sorted(errors)[-len(errors) // 20]:.2f} |")


def main() -> None:
    compare_qualities()
    print()
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    with tempfile.TemporaryDirectory() as folder:
        compare_with_libvips(Path(folder))
    os.sched_setaffinity(0, cores)
    print()
    for size in ((4000, 3000), (1600, 1200)):
        print(by_a_worker(12 * ROUNDS, size), flush=True)


if __name__ == "__main__":
    main()
