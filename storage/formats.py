"""Recognizes an image's format by its first bytes. Its file name and its declared media type are ignored."""

MAGIC = {
    b"\x89PNG\r\n\x1a\n": "PNG",  # PNG, section 5.2
    b"\xff\xd8\xff": "JPEG",  # JPEG (ITU-T T.81), B.1.1.3: SOI, and the first byte of the next marker
    b"BM": "BMP",  # BITMAPFILEHEADER, bfType
}
LONGEST_MAGIC = max(map(len, MAGIC))  # bytes that are always enough for `sniff`


def sniff(head: bytes) -> str | None:
    """The format of an image that begins with `head`.

    | `head` | result |
    |---|---|
    | begins as a PNG, JPEG or BMP does | "PNG", "JPEG" or "BMP" |
    | too short to decide | "" |
    | anything else | None |

    >>> sniff(b"BM6"), sniff(b"\\x89P"), sniff(b"GIF89a")
    ('BMP', '', None)
    """
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            return name
    return "" if any(magic.startswith(head) for magic in MAGIC) else None
