"""How does a picture come over a slow line? The first look first, and later only the bytes that are missing.

| file | holds |
|---|---|
| FILE | the best look so far. Every program can show it |
| FILE.BYTES.part | the bytes so far, until the picture is whole. BYTES is its length, so another one has its own |
"""

from pathlib import Path

from api.client.calls import Refused, Site

END = b"\xff\xd9"  # the marker EOI (ITU T.81, B.1.1.3): many programs refuse a JPEG without it


def fetch(site: Site, image: dict, file: Path, look: int | None) -> int:
    """Writes a post's picture to `file`, first its first look and then all of it. Returns how many bytes it has now.

    `image` is that of the post (docs/api.md, "A picture in steps"). With `look`, 1 for the first one, only that look.
    Bytes that an earlier call has stored are not fetched again. Raises Refused, Unreachable, OSError.
    """
    if "scans" not in image:  # an older version made it
        _write(file, site.call("GET", image["url"]).content)
        return file.stat().st_size
    length, looks = image["bytes"], image["scans"]
    part = file.with_name(f"{file.name}.{length}.part")
    data = part.read_bytes() if part.exists() else b""
    whole = file.exists() and file.stat().st_size == length  # from an earlier call: a first look would be worse
    for end in looks[:look][-1:] if look else (length,) if whole else (looks[0], length):
        if len(data) < end and not data.endswith(END):
            data = _load(site, image["url"], data, end, length)
            _write(part, data)
        _write(file, data if data.endswith(END) else data + END)
    if data.endswith(END):
        part.unlink(missing_ok=True)
    return len(data)


def _load(site: Site, address: str, data: bytes, end: int, length: int) -> bytes:
    """Returns a picture up to the byte `end`. `data` is its beginning. If it is another file now, returns all of it."""
    try:
        answer = site.call("GET", address, headers={"Range": f"bytes={len(data)}-{end - 1}"})
    except Refused as refusal:
        if refusal.status != 416:  # 416: it is another file, which has no such bytes
            raise
    else:
        if answer.headers.get("Content-Range", "").endswith(f"/{length}"):
            return data + answer.content
        if answer.status_code == 200:  # a proxy dropped the range
            return answer.content
    return site.call("GET", address).content


def _write(file: Path, data: bytes) -> None:
    """Replaces a file, so that a program that shows it never reads half a look."""
    draft = file.with_name(f".{file.name}.draft")
    draft.write_bytes(data)
    draft.replace(file)
