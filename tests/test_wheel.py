"""The wheel is complete: installed in another venv, it serves, uploads, converts, ships, verifies from any folder."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import httpx
import pytest
from conftest import ROOT, free_port, photograph, until

PACKAGES = ("api", "lua", "storage", "workers")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy of what the Dockerfile copies.

    In the checkout setuptools would leave `build/` behind, and would read one that an earlier build left.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, source)
    # Without isolation pip fetches nothing: the setuptools that Sanic requires is installed.
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    (wheel,) = folder.glob("imagegram-*.whl")
    return wheel


def pip(*arguments) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments], check=True)


@pytest.fixture(scope="module")
def scripts(wheel):
    """The console scripts of a new venv, which has the wheel and shares all other packages with the tests."""
    environment = wheel.parent / "venv"
    venv.create(environment)
    pip("--python", environment / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = environment.glob("lib/python3*/site-packages")
    # Python ignores the .pth files of a folder that a .pth file names. So the tests' editable install has no effect.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def test_a_wheel_holds_all_modules_scripts_and_redis_conf_and_nothing_else(wheel):
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".lua", ".conf", ".yaml", ".html", ".js", ".css")
    }
    expected.remove("storage/db/kustomization.yaml")  # kustomize reads it in a checkout
    assert expected >= {"storage/db/redis.conf", "api/openapi.yaml", "api/page/index.html"}
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_the_extra_client_requires_what_the_client_imports_and_the_client_nothing_of_the_servers(wheel, scripts):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        required = re.findall(r"^Requires-Dist: (\w+);.*client", archive.read(metadata).decode(), re.MULTILINE)
    assert sorted(required) == ["httpx", "rich", "tuspy"]
    program = (
        "import sys, api.client.__main__, api.client.uploading; print({'sanic', 'redis', 'PIL'} & sys.modules.keys())"
    )
    assert subprocess.check_output([scripts / "python", "-c", program], text=True) == "set()\n"


def test_an_installed_wheel_serves_uploads_converts_ships_and_verifies(scripts, tmp_path):
    url = f"http://127.0.0.1:{(port := free_port())}"
    environment = {
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "IMAGEGRAM_DATA": "data",  # a relative path, in the empty folder of the test
        "IMAGEGRAM_PORT": str(port),
        "IMAGEGRAM_WORKERS": "1",
        "IMAGEGRAM_VERIFY_EVERY": "1",
    }

    def output(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, env=environment, stdout=-1, text=True, check=True).stdout

    program = "import api, storage, workers; print(api.__file__, storage.__file__, workers.__file__)"
    for file in output("python", "-c", program).split():
        assert file.startswith(f"{scripts.parent}/lib/")
    parts = []
    try:
        for command in ("imagegram-storage redis", "imagegram-api", "imagegram-worker", "imagegram-storage ship"):
            parts.append(subprocess.Popen(command.split(), cwd=tmp_path, env=environment))
        until(lambda: httpx.get(f"{url}/readyz").status_code == 200, what="the API")
        token = output("imagegram-api", "token", "alice").strip()
        environment |= {"IMAGEGRAM_URL": url, "IMAGEGRAM_TOKEN": token, "HOME": str(tmp_path)}
        (tmp_path / "photo.jpg").write_bytes(photograph())
        assert json.loads(output("imagegram", "upload", "photo.jpg", "--json"))["status"] == "ready"
        # The shipper starts `verify` as a process of its own.
        until(lambda: "\nverified 2" in output("imagegram-storage", "snapshots"), 30.0, what="a result of verify")
        heading, generation, *_ = output("imagegram-storage", "snapshots").splitlines()
        assert heading.startswith("generation") and generation.split()[0] == "1"
        counts = "1 posts, 0 comments (0 in Redis, 0 in the store, 0 erased), 0 open uploads"
        assert output("imagegram-storage", "check", "--deep").startswith(f"{counts}: 0 flaws")
    finally:
        for part in reversed(parts):
            part.terminate()
        for part in parts:
            part.wait(15)
