"""Tells an image's format from its first bytes, whatever its name or declared type says."""

MAGIC = {
    b"\x89PNG\r\n\x1a\n": "PNG",  # PNG, section 5.2
    b"\xff\xd8\xff": "JPEG",  # JPEG (T.81), B.1.1.3: SOI and the next marker's first byte
    b"BM": "BMP",
}
LONGEST_MAGIC = max(map(len, MAGIC))


def sniff(head: bytes) -> str | None:
    """PNG, JPEG or BMP; empty where more bytes are needed to tell; None where it is none of them."""
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            return name
    return "" if any(magic.startswith(head) for magic in MAGIC) else None
