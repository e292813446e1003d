"""The wheel is complete: installed elsewhere, it serves, converts, ships and restores on trial from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import httpx
import pytest
from conftest import ROOT, free_port, photograph, until


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of what the Dockerfile copies: setuptools leaves `build/` behind, and reads an old one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for room in ("api", "lua", "storage", "workers"):
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, source)
    # Without isolation: the setuptools that Sanic requires is here, and nothing has to be fetched.
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    (wheel,) = folder.glob("imagegram-*.whl")
    return wheel


def pip(*given) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *given], check=True)


@pytest.fixture(scope="module")
def scripts(wheel):
    """The console scripts of a new venv: it has the wheel itself, and all other packages from the one of the tests."""
    made = wheel.parent / "venv"
    venv.create(made)
    pip("--python", made / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = made.glob("lib/python3*/site-packages")
    # A folder that a .pth file names has its own .pth files ignored, also that of an editable install.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return made / "bin"


def test_a_wheel_holds_the_rooms_and_what_they_read(wheel):
    wanted = {
        str(path.relative_to(ROOT))
        for room, kind in (("api", ".py"), ("lua", ".lua"), ("storage", ".py"), ("workers", ".py"))
        for path in (ROOT / room).rglob(f"*{kind}")
    }
    with zipfile.ZipFile(wheel) as packed:
        found = {name for name in packed.namelist() if ".dist-info/" not in name}
    assert found == wanted | {"storage/db/redis.conf"}


def test_a_wheel_that_is_installed_elsewhere_serves_converts_and_ships(scripts, tmp_path):
    url = f"http://127.0.0.1:{(port := free_port())}"
    environment = {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "IMAGEGRAM_DATA": "data",  # in the folder of the test, where nothing else is
        "IMAGEGRAM_PORT": str(port),
        "IMAGEGRAM_WORKERS": "1",
        "IMAGEGRAM_VERIFY_EVERY": "1",
    }

    def says(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, env=environment, stdout=-1, text=True, check=True).stdout

    program = "import api, storage, workers; print(api.__file__, storage.__file__, workers.__file__)"
    for file in says("python", "-c", program).split():
        assert file.startswith(f"{scripts.parent}/lib/")
    parts = []
    try:
        for command in ("imagegram-storage redis", "imagegram-api", "imagegram-worker", "imagegram-storage ship"):
            parts.append(subprocess.Popen(command.split(), cwd=tmp_path, env=environment))
        until(lambda: httpx.get(f"{url}/readyz").status_code == 200, what="the API")
        user = {"Authorization": f"Bearer {says('imagegram-api', 'token', 'alice').strip()}"}
        sent = httpx.post(f"{url}/v1/posts", headers=user, files={"image": photograph()})
        post = f"{url}/v1/posts/{sent.json()['id']}"
        until(lambda: httpx.get(post).json()["status"] == "ready", what="the image")
        # Verified by a process that the shipper started.
        until(lambda: "\nverified 2" in says("imagegram-storage", "snapshots"), 30.0, what="a restore on trial")
        heading, generation, *_ = says("imagegram-storage", "snapshots").splitlines()
        assert heading.startswith("generation") and generation.split()[0] == "1"
        assert says("imagegram-storage", "check", "--deep").startswith("1 posts, 0 comments, 0 open uploads: 0 flaws")
    finally:
        for part in reversed(parts):
            part.terminate()
        for part in parts:
            part.wait(15)
