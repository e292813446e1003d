"""`make test-compose`: the shipped Dockerfile and docker-compose.yml, started by a real engine and walked through.

Exit status 0 also where no engine can run; then it says why.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from tests.compose import engine, walk

MODULE = [sys.executable, "-m", "tests.compose"]


def main() -> int:
    """Chooses the engine, and leaves no trace of an own one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what stands under `finally` happens
    os.chdir(engine.ROOT)
    # Resolved: dockerd and the control groups are found again by this name.
    folder = Path(tempfile.mkdtemp(prefix="imagegram-compose-")).resolve()
    began = time.monotonic()
    try:
        if engine.pulls():
            print("The engine of this machine, with the real images.")
            return walk.main(folder)
        engine.require_own()
        print("An engine of our own, with stand-in images.", flush=True)
        return engine.own(folder, *MODULE, "build", str(folder))
    except engine.CannotRun as reason:
        print(f"test-compose is skipped: {reason}")
        return 0
    finally:
        shutil.rmtree(folder)
        print(f"{(time.monotonic() - began) / 60:.1f} minutes in all")


def build(folder: Path) -> int:
    """Makes all images on this machine's network, then walks in a network that has no way out."""
    base = engine.bootstrap()
    with walk.step("the engine"):
        engine.install_compose(folder)
        builder = engine.Engine(folder, bridges=False)
    try:
        with walk.step("stand-in images"):
            engine.finish(base)
            engine.build_standins(folder)
        with walk.step("the image"):
            services = yaml.safe_load((engine.ROOT / "docker-compose.yml").read_text())["services"].values()
            (name,) = {service["image"] for service in services if "build" in service}
            walk.clone(folder / "build")
            engine.run("docker", "build", "--network", "host", "-t", name, folder / "build")
    finally:
        builder.close()
    return subprocess.run(["unshare", "--net", *MODULE, "walk", str(folder)]).returncode


def inside(folder: Path) -> int:
    engine.run("ip", "link", "set", "lo", "up")
    running = engine.Engine(folder, bridges=True)
    try:
        return walk.main(folder)
    finally:
        running.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["build", folder]:
            sys.exit(build(Path(folder)))
        case ["walk", folder]:
            sys.exit(inside(Path(folder)))
        case _:
            sys.exit(main())
