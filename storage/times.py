"""Times as people read them."""

from datetime import UTC, datetime


def format_ms(ms: int) -> str:
    """A time in ms since 1970 as UTC, to the second (RFC 3339, section 5.6).

    >>> format_ms(1795417200123)
    '2026-11-23T07:00:00Z'
    """
    return datetime.fromtimestamp(ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
