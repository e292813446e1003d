"""100 MiB sent by form and by tus, beside bare Sanic that writes the same stream to a file with one fsync."""

import contextlib
import secrets
import shutil
import socket
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.bench.parts import Api, Bare, Redis
from tests.bench.table import Row

SIZE = 100 * 1024 * 1024
PNG = b"\x89PNG\r\n\x1a\n"
BOUNDARY = "a-boundary-that-does-not-occur"


def ask(port: int, head: str, body: memoryview | bytes = b"", *more: bytes) -> str:
    """One request, on a connection of its own; the answer's header. Raises where it is no success."""
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(head.encode())
        line.sendall(body)
        for part in more:
            line.sendall(part)
        said = b""
        while b"\r\n\r\n" not in said:
            received = line.recv(65536)
            if not received:
                raise ConnectionError(said)
            said += received
    if not said.startswith(b"HTTP/1.1 2"):
        raise ValueError(said)
    return said.decode()


def header(method: str, path: str, **fields: object) -> str:
    named = {"Host": "127.0.0.1", "Connection": "close", **{k.replace("_", "-"): v for k, v in fields.items()}}
    return f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in named.items()) + "\r\n"


def peak(pid: int) -> int:
    """The largest memory a process has had since `forget`, bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def forget(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def by_form(api: Api, token: dict[str, str], data: memoryview) -> None:
    """Send an image as a form."""
    begin = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode()
    end = f"\r\n--{BOUNDARY}--\r\n".encode()
    fields = {"Content_Type": f"multipart/form-data; boundary={BOUNDARY}", **token}
    length = len(begin) + len(data) + len(end)
    ask(api.port, header("POST", "/v1/posts", Content_Length=length, **fields), begin, data, end)


def by_tus(api: Api, token: dict[str, str], data: memoryview) -> None:
    """Send an image as a resumable upload, in one PATCH."""
    fields = {"Tus_Resumable": "1.0.0", **token}
    made = ask(api.port, header("POST", "/v1/uploads", Upload_Length=len(data), Content_Length=0, **fields))
    where = next(line.split(": ")[1] for line in made.split("\r\n") if line.lower().startswith("location"))
    fields |= {"Upload_Offset": 0, "Content_Type": "application/offset+octet-stream"}
    ask(api.port, header("PATCH", where, Content_Length=len(data), **fields), data)


def measure(rounds: int, size: int = SIZE) -> list[Row]:
    data = memoryview(PNG + secrets.token_bytes(1 << 20) * (size >> 20))[:size]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ig-")))
        redis = Redis()
        stack.callback(redis.close)
        api, bare = Api(redis, folder), Bare(folder, {})
        stack.callback(api.close)
        stack.callback(bare.close)
        token = api.bearer("uploader")
        (pid,) = api.pids()
        taken = {"bare": [], "form": [], "tus": []}
        grew = {"form": 0, "tus": 0}

        ways = {
            "bare": lambda: ask(bare.port, header("PUT", "/file", Content_Length=size), data),
            "form": lambda: by_form(api, token, data),
            "tus": lambda: by_tus(api, token, data),
        }
        for number in range(rounds + 1):
            for name, send in ways.items():
                forget(pid)
                before, began = peak(pid), time.monotonic()
                send()
                seconds = time.monotonic() - began
                if number:  # the first of each warms
                    taken[name].append(size / seconds / (1 << 20))
                    if name in grew:
                        grew[name] = max(grew[name], peak(pid) - before)
                # As bare Sanic writes its one file again: on some machines memory that was never used costs more.
                shutil.rmtree(folder / "store" / "chunks", ignore_errors=True)
    mib = size >> 20
    rows = [Row(f"{mib} MiB to a file, bare Sanic, one fsync", median(taken["bare"]), unit="MiB/s")]
    for name in ("form", "tus"):
        ratio = median(a / b for a, b in zip(taken[name], taken["bare"], strict=True))
        note = f"{median(taken[name]):.0f} MiB/s"
        rows.append(Row(f"{mib} MiB by {name}", ratio, 0.85, note=note))
        rows.append(Row(f"{mib} MiB by {name}: memory of the API grows by", grew[name] / (1 << 20), 16, True, "MiB"))
    return rows
