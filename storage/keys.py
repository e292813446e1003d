"""Ids, and every name made from them: Redis keys and objects. Nothing else builds a key.

An id is a ULID (https://github.com/ulid/spec: 48 bits of milliseconds, 80 random bits, 26 digits of Crockford's
base 32) and the partition it lives in: `01JD4Q7ZK5W8Y3N6R2T9V0XABC-0`. Ids sort by time, and say where to look,
so partitions can be added without moving anything. An upload's id begins with `u`, so that the two never mix.

Every key carries its partition as hash tag: all that one write touches lies in one slot of a Redis Cluster.
What the keys hold stands in docs/keys.md.
"""

import binascii
import re
import secrets
import time
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

from storage.errors import NoComment, NoPost, NoUpload

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
DIGITS = str.maketrans(ALPHABET, "0123456789ABCDEFGHIJKLMNOPQRSTUV")  # as `int` reads base 32
ID = re.compile(r"(u?)([0-7][0-9A-HJKMNP-TV-Z]{25})-(0|[1-9][0-9]{0,4})")
KEY = re.compile(r"([a-z]+):\{([0-9]{1,5})\}(?::(.*))?", re.DOTALL)
COMMENT_ID = re.compile(r"([1-9][0-9]{0,14})-(0|[1-9][0-9]{0,9})")


def partition_of_user(user: str, partitions: int) -> int:
    """Where a user's new posts, uploads and idempotency keys live: CRC-16/XMODEM, as Redis Cluster hashes keys."""
    return binascii.crc_hqx(user.encode(), 0) % partitions


def new_post_id(partition: int) -> str:
    return f"{_ulid()}-{partition}"


def new_upload_id(partition: int) -> str:
    return f"u{_ulid()}-{partition}"


def _ulid() -> str:
    number = time.time_ns() // 1_000_000 << 80 | secrets.randbits(80)
    return "".join(ALPHABET[number >> shift & 31] for shift in range(125, -5, -5))


def created_ms(post: str) -> int:
    """When an id was minted, in milliseconds since 1970."""
    return int(post.removeprefix("u")[:10].translate(DIGITS), 32)


@lru_cache(1024)  # asked for each key of a call
def partition_of_post(post: str) -> int:
    """The partition a post id names. Raises NoPost where it is no post id."""
    parts = ID.fullmatch(post)
    if not parts or parts[1]:
        raise NoPost("no such post")
    return int(parts[3])


def partition_of_upload(upload: str) -> int:
    """The partition an upload id names. Raises NoUpload where it is no upload id."""
    parts = ID.fullmatch(upload)
    if not parts or not parts[1]:
        raise NoUpload("no such upload")
    return int(parts[3])


def partition_of(owner_id: str) -> int:
    """The partition that the id of a post or an upload names; it must be one."""
    return int(ID.fullmatch(owner_id)[3])


def comment_ms(comment: str) -> int:
    """When a comment was written, in milliseconds since 1970. Raises NoComment where it is no comment id."""
    parts = COMMENT_ID.fullmatch(comment)
    if not parts:
        raise NoComment("no such comment")
    return int(parts[1])


# Redis keys


def feed(partition: int) -> str:
    return f"feed:{{{partition}}}"


def changes(partition: int) -> str:
    return f"changes:{{{partition}}}"


def gone(partition: int) -> str:
    return f"gone:{{{partition}}}"


def due(partition: int) -> str:
    return f"due:{{{partition}}}"


def making(partition: int, user: str) -> str:
    return f"making:{{{partition}}}:{user}"


def making_prefix(partition: int) -> str:
    return f"making:{{{partition}}}:"


def turns(partition: int) -> str:
    return f"turns:{{{partition}}}"


def epoch(partition: int) -> str:
    return f"epoch:{{{partition}}}"


def restored(partition: int) -> str:
    return f"restored:{{{partition}}}"


def post(post_id: str) -> str:
    return f"post:{{{partition_of_post(post_id)}}}:{post_id}"


def comments(post_id: str) -> str:
    return f"comments:{{{partition_of_post(post_id)}}}:{post_id}"


def latest(post_id: str) -> str:
    return f"latest:{{{partition_of_post(post_id)}}}:{post_id}"


def post_prefix(partition: int) -> str:
    return f"post:{{{partition}}}:"


def latest_prefix(partition: int) -> str:
    return f"latest:{{{partition}}}:"


def comments_prefix(partition: int) -> str:
    return f"comments:{{{partition}}}:"


def upload(upload_id: str) -> str:
    return f"upload:{{{partition_of_upload(upload_id)}}}:{upload_id}"


def upload_prefix(partition: int) -> str:
    return f"upload:{{{partition}}}:"


def chunks(upload_id: str) -> str:
    return f"chunks:{{{partition_of_upload(upload_id)}}}:{upload_id}"


def uploads(partition: int, user: str) -> str:
    return f"uploads:{{{partition}}}:{user}"


def parts(key: str) -> tuple[str, int | None, str]:
    """Kind, partition and id of a key; of one that is none of these an empty kind."""
    match = KEY.fullmatch(key)
    return (match[1], int(match[2]), match[3] or "") if match else ("", None, "")


def well_formed(key: str) -> bool:
    """Whether a key is one that the functions above may have made."""
    kind, partition, name = parts(key)
    if kind in ("post", "comments", "latest", "upload", "chunks"):
        match = ID.fullmatch(name)
        of_upload = kind in ("upload", "chunks")
        return bool(match) and bool(match[1]) == of_upload and key == f"{kind}:{{{match[3]}}}:{name}"
    of_user = kind in ("uploads", "making", "once")
    rest = f":{name}" if of_user and name else ""
    return bool(rest) == of_user and key == f"{kind}:{{{partition}}}{rest}"


class IdempotencyKey(NamedTuple):
    """An Idempotency-Key, as storage sees it."""

    scoped_key: str  # the method, path and key of a user's request, which it belongs to
    digest: str  # of what it asked for, to tell a repetition from another request; "-" compares nothing


def once(partition: int, user: str, scoped_key: str) -> str:
    """16 bytes of digest: the key itself may be 255 bytes long, and is paid for in memory for a day."""
    return f"once:{{{partition}}}:{user}:{digest(scoped_key.encode(), 16)}"


def digest(data: bytes, size: int = 8) -> str:
    """BLAKE2b in hexadecimal; 8 bytes tell apart what one user sends under one key."""
    return blake2b(data, digest_size=size).hexdigest()


# Objects


def chunk(upload_id: str, name: str) -> str:
    return f"chunks/{upload_id}/{name}"


def chunk_name(offset: int) -> str:
    """A name never used before: two requests at one offset put two objects, and the script chooses one."""
    return f"{offset}-{secrets.token_hex(8)}"


def original(post_id: str) -> str:
    return f"originals/{post_id}"


def image(post_id: str) -> str:
    return f"images/{post_id}.jpg"


IMAGES, ORIGINALS = "images/", "originals/"
OBJECTS = ("chunks/", IMAGES, ORIGINALS)  # the folders of all of them


def owner(name: str) -> str:
    """The id of the upload or post that an object's name names."""
    return name.split("/")[1].removesuffix(".jpg")
