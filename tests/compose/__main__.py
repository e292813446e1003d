"""`make test-compose`, `make test-compose-cluster`: Dockerfile and docker-compose.yml in a real engine, from outside.

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

from tests.compose import cluster, engine, walk

MODULE = [sys.executable, "-m", "tests.compose"]
WALKS = {"single": walk.walk, "cluster": cluster.walk}


def main(name: str) -> int:
    """Chooses the engine. Removes all traces of an engine of our own."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the `finally` blocks run
    os.chdir(engine.ROOT)
    # Resolved, because the control groups of dockerd are found by this name.
    folder = Path(tempfile.mkdtemp(prefix="imagegram-compose-")).resolve()
    began = time.monotonic()
    try:
        if engine.pulls():
            print("Uses the engine of this machine, with the real images.")
            return walk.main(folder, WALKS[name])
        engine.require_own()
        print("Starts an engine of our own, with stand-in images.", flush=True)
        return engine.run_isolated(folder, *MODULE, "build", str(folder), name)
    except engine.CannotRun as reason:
        print(f"test-compose is skipped: {reason}")
        return 0
    finally:
        shutil.rmtree(folder)
        print(f"{(time.monotonic() - began) / 60:.1f} minutes in all")


def build(folder: Path, walk_name: str) -> int:
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
    return subprocess.run(["unshare", "--net", *MODULE, "walk", str(folder), walk_name]).returncode


def walk_isolated(folder: Path, name: str) -> int:
    """Starts the engine in the network namespace of this process, and runs the walk."""
    engine.run("ip", "link", "set", "lo", "up")
    running = engine.Engine(folder, bridges=True)
    try:
        return walk.main(folder, WALKS[name])
    finally:
        running.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["build", folder, name]:
            sys.exit(build(Path(folder), name))
        case ["walk", folder, name]:
            sys.exit(walk_isolated(Path(folder), name))
        case [name] if name in WALKS:
            sys.exit(main(name))
        case _:
            sys.exit(f"expected one of {', '.join(WALKS)}")
