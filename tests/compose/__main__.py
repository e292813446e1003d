"""`make test-compose`: starts the Dockerfile and docker-compose.yml with a real engine and tests them from outside.

The exit status is also 0 if no engine can run on this machine. Then it prints the reason.
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
    """Chooses the engine. Removes all traces of an engine of our own."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the `finally` blocks run
    os.chdir(engine.ROOT)
    # Resolved, because the control groups of dockerd are found by this name.
    folder = Path(tempfile.mkdtemp(prefix="imagegram-compose-")).resolve()
    began = time.monotonic()
    try:
        if engine.pulls():
            print("Uses the engine of this machine, with the real images.")
            return walk.main(folder)
        engine.require_own()
        print("Starts an engine of our own, with stand-in images.", flush=True)
        return engine.run_isolated(folder, *MODULE, "build", str(folder))
    except engine.CannotRun as reason:
        print(f"test-compose is skipped: {reason}")
        return 0
    finally:
        shutil.rmtree(folder)
        print(f"{(time.monotonic() - began) / 60:.1f} minutes in all")


def build(folder: Path) -> int:
    """Builds all images on this machine's network. Then runs the walk in a network namespace without a way out."""
    base = engine.bootstrap()
    with walk.step("the engine"):
        engine.install_compose(folder)
        builder = engine.Engine(folder, bridges=False)
    try:
        with walk.step("stand-in images"):
            engine.finish_bootstrap(base)
            engine.build_standins(folder)
        with walk.step("the image"):
            services = yaml.safe_load((engine.ROOT / "docker-compose.yml").read_text())["services"].values()
            (name,) = {service["image"] for service in services if "build" in service}
            walk.clone(folder / "build")
            engine.run("docker", "build", "--network", "host", "-t", name, folder / "build")
    finally:
        builder.close()
    return subprocess.run(["unshare", "--net", *MODULE, "walk", str(folder)]).returncode


def walk_isolated(folder: Path) -> int:
    """Starts the engine in the network namespace of this process, and runs the walk."""
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
            sys.exit(walk_isolated(Path(folder)))
        case _:
            sys.exit(main())
