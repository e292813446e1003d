"""What .ci/setup installs: only files whose hashes are in requirements.lock."""

import os
import shutil
import subprocess
import venv
import zipfile
from hashlib import sha256
from pathlib import Path

import pip
from conftest import ROOT

METADATA = "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
RECORD = "tiny.py,,\ntiny-1.0.dist-info/METADATA,,\ntiny-1.0.dist-info/WHEEL,,\ntiny-1.0.dist-info/RECORD,,\n"


def test_setup_installs_no_file_whose_hash_is_not_in_the_lock(tmp_path):
    """A project with one dependency, a wheel beside it. No registry is asked."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "setup", tmp_path / ".ci")
    wheel = tmp_path / "wheels" / "tiny-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "")
        for name, text in (("METADATA", METADATA), ("WHEEL", WHEEL), ("RECORD", RECORD)):
            archive.writestr(f"tiny-1.0.dist-info/{name}", text)
    environment = {"PATH": os.environ["PATH"], "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent)}
    venv.create(tmp_path / ".venv")
    (packages,) = tmp_path.glob(".venv/lib/python3*/site-packages")
    (packages / "pip").symlink_to(Path(pip.__file__).parent)  # installing it takes some seconds

    def setup(digest: str) -> tuple[str, bool]:
        """What setup says with this hash in the lock, and whether the wheel was installed."""
        (tmp_path / "requirements.lock").write_text(f"# run\ntiny==1.0 --hash=sha256:{digest}\n# test\n")
        run = subprocess.run([tmp_path / ".ci" / "setup", "run"], env=environment, capture_output=True, text=True)
        assert run.returncode  # in any case: there is no project to install
        return run.stderr, (packages / "tiny.py").exists()

    said, found = setup("0" * 64)
    assert "DO NOT MATCH THE HASHES" in said and not found
    said, found = setup(sha256(wheel.read_bytes()).hexdigest())
    assert "HASHES" not in said and found
