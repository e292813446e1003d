"""Sends 100 MiB by form and by tus, and to bare Sanic, which writes the same stream to a file with one fsync."""

import contextlib
import secrets
import shutil
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from tests.bench.parts import Api, Bare, Redis
from tests.bench.table import Row

SIZE = 100 * 1024 * 1024  # bytes
PNG = b"\x89PNG\r\n\x1a\n"  # its signature
TOGETHER = 8  # uploads at once
TARGETS = {"form": 0.85, "tus": 0.92}
BOUNDARY = "a-boundary-that-does-not-occur"


def send(port: int, *parts: str | bytes | memoryview) -> str:
    """Sends the parts of a request on a new connection. Returns the answer's header. Raises ValueError if not 2xx."""
    with socket.create_connection(("127.0.0.1", port)) as line:
        for part in parts:
            line.sendall(part.encode() if isinstance(part, str) else part)
        answer = b""
        while b"\r\n\r\n" not in answer:
            received = line.recv(65536)
            if not received:
                raise ConnectionError(answer)
            answer += received
    if not answer.startswith(b"HTTP/1.1 2"):
        raise ValueError(answer)
    return answer.decode()


def header(method: str, path: str, **fields: object) -> str:
    """The header of a request. In the names of fields _ stands for -."""
    fields = {"Host": "127.0.0.1", "Connection": "close", **fields}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n"


def peak_memory(pid: int) -> int:
    """The largest memory in bytes that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def by_form(api: Api, token: dict[str, str], data: memoryview) -> None:
    """Sends an image as a multipart form."""
    begin = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
        "Content-Type: image/png\r\n\r\n"
    ).encode()
    end = f"\r\n--{BOUNDARY}--\r\n".encode()
    fields = {"Content_Type": f"multipart/form-data; boundary={BOUNDARY}", **token}
    length = len(begin) + len(data) + len(end)
    send(api.port, header("POST", "/v1/posts", Content_Length=length, **fields), begin, data, end)


def by_tus(api: Api, token: dict[str, str], data: memoryview) -> None:
    """Sends an image as a resumable upload, in one PATCH."""
    fields = {"Tus_Resumable": "1.0.0", **token}
    answer = send(api.port, header("POST", "/v1/uploads", Upload_Length=len(data), Content_Length=0, **fields))
    location = next(line.split(": ")[1] for line in answer.split("\r\n") if line.lower().startswith("location"))
    fields |= {"Upload_Offset": 0, "Content_Type": "application/offset+octet-stream"}
    send(api.port, header("PATCH", location, Content_Length=len(data), **fields), data)


def send_together(api: Api, data: memoryview) -> float:
    """Sends TOGETHER images at once, by tus and then by form. Returns their MiB a second."""
    began = time.monotonic()
    for way in (by_tus, by_form):
        with ThreadPoolExecutor(TOGETHER) as threads:
            tokens = [api.bearer(f"user{number}") for number in range(TOGETHER)]
            for sent in [threads.submit(way, api, token, data) for token in tokens]:
                sent.result()
    return 2 * TOGETHER * len(data) / (time.monotonic() - began) / (1 << 20)


def measure(rounds: int, size: int = SIZE) -> list[Row]:
    """Sends `size` bytes each way in each round. Memory is that of the API's serving process."""
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
        rates: dict[str, list[float]] = {"bare": [], "form": [], "tus": []}  # MiB/s
        chunks = folder / "store" / "chunks"
        idle = peak_memory(pid)
        together = send_together(api, data)
        growth = peak_memory(pid) - idle
        shutil.rmtree(chunks)
        ways = {
            "bare": lambda: send(bare.port, header("PUT", "/file", Content_Length=size), data),
            "form": lambda: by_form(api, token, data),
            "tus": lambda: by_tus(api, token, data),
        }
        for number in range(rounds + 1):
            for name, transfer in ways.items():
                began = time.monotonic()
                transfer()
                seconds = time.monotonic() - began
                if number:  # the first round warms the caches
                    rates[name].append(size / seconds / (1 << 20))
                # Bare Sanic overwrites one file. On some machines memory that was never used before costs more.
                shutil.rmtree(chunks, ignore_errors=True)
    mib = size >> 20
    rows = [Row(f"{mib} MiB to a file, bare Sanic, one fsync", median(rates["bare"]), unit="MiB/s")]
    for name, target in TARGETS.items():
        ratio = median(a / b for a, b in zip(rates[name], rates["bare"], strict=True))
        note = f"{median(rates[name]):.0f} MiB/s"
        rows.append(Row(f"{mib} MiB by {name}", ratio, target, note=note))
    what = f"{mib} MiB, {TOGETHER} at once: memory of the API grows by"
    rows.append(Row(what, growth / (1 << 20), 64, True, "MiB", note=f"{together:.0f} MiB/s together"))
    return rows
