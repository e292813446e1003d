"""Ids, and every name that is built from them: Redis keys and object names. No other file builds a key.

The id of a post is a ULID (https://github.com/ulid/spec) and the number of the post's partition:

    01JD4Q7ZK5W8Y3N6R2T9V0XABC-0
    └───────── ULID ─────────┘ └ partition

A ULID is 48 bits of milliseconds since 1970 and 80 random bits, written as 26 digits of Crockford's base 32. So ids
sort by time. The partition in the id says where the data is, so partitions can be added without moving data. The id of
an upload begins with `u`, so an upload is never taken for a post.

Every key contains its partition as hash tag, as in `feed:{0}`. So all keys that one write touches are in one slot of a
Redis Cluster. docs/keys.md says what each key holds.
"""

import binascii
import re
import secrets
import time
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

from storage.errors import NoComment, NoPost, NoUpload

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32
DIGITS = str.maketrans(ALPHABET, "0123456789ABCDEFGHIJKLMNOPQRSTUV")  # to the digits of int(text, 32)
ID = re.compile(r"(u?)([0-7][0-9A-HJKMNP-TV-Z]{25})-(0|[1-9][0-9]{0,4})")
KEY = re.compile(r"([a-z]+):\{([0-9]{1,5})\}(?::(.*))?", re.DOTALL)
ENTRY = re.compile(rf"[0-9a-f]{{16}} (?!u){ID.pattern}")
COMMENT_ID = re.compile(r"([1-9][0-9]{0,14})-(0|[1-9][0-9]{0,9})")
SEGMENT_NAME = re.compile(r"[1-9][0-9]{0,14}\.[0-9a-f]{16}")


def partition_of_user(user: str, partitions: int) -> int:
    """The partition of a user's new posts, uploads and idempotency keys.

    >>> partition_of_user("alice", 4)
    1

    It is CRC-16/XMODEM modulo the number of partitions. Redis Cluster hashes keys by the same CRC (Redis Cluster
    specification, "Key distribution model").
    """
    return binascii.crc_hqx(user.encode(), 0) % partitions


def new_post_id(partition: int) -> str:
    """A post id that was never used before. Its time is this machine's clock."""
    return f"{_ulid()}-{partition}"


def new_upload_id(partition: int) -> str:
    """An upload id that was never used before. Its time is this machine's clock."""
    return f"u{_ulid()}-{partition}"


def _ulid() -> str:
    number = time.time_ns() // 1_000_000 << 80 | secrets.randbits(80)
    return "".join(ALPHABET[number >> shift & 31] for shift in range(125, -5, -5))


def created_ms(post: str) -> int:
    """When the id of a post or an upload was created, in ms since 1970. The id must be valid.

    >>> created_ms("01JD4Q7ZK5W8Y3N6R2T9V0XABC-0")
    1732104158821
    """
    return int(post.removeprefix("u")[:10].translate(DIGITS), 32)


@lru_cache(1024)  # one call of a script asks several times for the same post
def partition_of_post(post: str) -> int:
    """The partition of a post.

    >>> partition_of_post("01JD4Q7ZK5W8Y3N6R2T9V0XABC-0")
    0

    Raises NoPost where the text is not the id of a post. So a malformed id never reaches Redis.
    """
    parts = ID.fullmatch(post)
    if not parts or parts[1]:
        raise NoPost("no such post")
    return int(parts[3])


def partition_of_upload(upload: str) -> int:
    """The partition of an upload.

    >>> partition_of_upload("u01JD4Q7ZK5W8Y3N6R2T9V0XABC-0")
    0

    Raises NoUpload where the text is not the id of an upload. So a malformed id never reaches Redis.
    """
    parts = ID.fullmatch(upload)
    if not parts or not parts[1]:
        raise NoUpload("no such upload")
    return int(parts[3])


def partition_of(owner_id: str) -> int:
    """The partition of a post or an upload. The id must be valid."""
    return int(ID.fullmatch(owner_id)[3])


def comment_ms(comment: str) -> int:
    """When a comment was written, in ms since 1970.

    >>> comment_ms("1795459382641-0")
    1795459382641

    The id of a comment is the id of its stream entry (Redis, "Streams", "Entry IDs"). Raises NoComment where the text
    is not the id of a comment.
    """
    parts = COMMENT_ID.fullmatch(comment)
    if not parts:
        raise NoComment("no such comment")
    return int(parts[1])


def order(comment: str) -> tuple[int, int]:
    """What comments are ordered by. The id must be valid.

    >>> order("1795459382641-9") < order("1795459382641-10")
    True
    """
    ms, _, sequence = comment.partition("-")
    return int(ms), int(sequence)


# Redis keys. A `…_prefix` is for scripts that read ids in Redis and append them.


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


def segments(post_id: str) -> str:
    return f"segments:{{{partition_of_post(post_id)}}}:{post_id}"


def segments_prefix(partition: int) -> str:
    return f"segments:{{{partition}}}:"


def erased(post_id: str) -> str:
    return f"erased:{{{partition_of_post(post_id)}}}:{post_id}"


def erased_prefix(partition: int) -> str:
    return f"erased:{{{partition}}}:"


def sealing(partition: int) -> str:
    return f"sealing:{{{partition}}}"


def quiet(partition: int) -> str:
    return f"quiet:{{{partition}}}"


def retired(partition: int) -> str:
    return f"retired:{{{partition}}}"


def hidden(post_id: str) -> str:
    return f"hidden:{{{partition_of_post(post_id)}}}:{post_id}"


def hidden_prefix(partition: int) -> str:
    return f"hidden:{{{partition}}}:"


def kept(post_id: str) -> str:
    return f"kept:{{{partition_of_post(post_id)}}}:{post_id}"


def post_and_lists(post_id: str) -> list[str]:
    """The keys with which KEYS of several scripts begin: the post, its comments, and the lists of its partition.

    In this order: post, comments, segments, erased, latest, feed, changes, gone. Raises NoPost where `post_id` is not
    the id of a post.
    """
    partition = partition_of_post(post_id)
    return [*post_and_comments(post_id), feed(partition), changes(partition), gone(partition)]


def post_and_comments(post_id: str) -> list[str]:
    """The first five keys of `post_and_lists`. Raises NoPost where `post_id` is not the id of a post."""
    end = f":{{{partition_of_post(post_id)}}}:{post_id}"  # one search in the id instead of five
    return [f"post{end}", f"comments{end}", f"segments{end}", f"erased{end}", f"latest{end}"]


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


def chunks_prefix(partition: int) -> str:
    return f"chunks:{{{partition}}}:"


def uploads(partition: int, user: str) -> str:
    return f"uploads:{{{partition}}}:{user}"


def rate(partition: int, kind: str, who: str) -> str:
    """What a user or a network address uses of a rate limit. `kind` is the class of the limit, or `address`."""
    return f"rate:{{{partition}}}:{kind}:{who}"


def leaves(partition: int) -> str:
    return f"leaves:{{{partition}}}"


def leaf(partition: int, first: str) -> str:
    """A part of the lists of users' posts. `first` is its lowest possible entry, or "0" for the lowest leaf."""
    return f"leaf:{{{partition}}}:{first}"


def leaf_prefix(partition: int) -> str:
    return f"leaf:{{{partition}}}:"


def entry_prefix(user: str) -> str:
    """What the entries of a user's posts begin with in the leaves.

    >>> entry_prefix("alice")
    '4deaec0cce54da89 '

    It is a digest, so that all entries have the same length, however long the user's name is. In Redis a zset with a
    member of more than 64 bytes takes three times the memory.
    """
    return f"{digest(user.encode())} "


def entry(user: str, post_id: str) -> str:
    """A post in the list of its author's posts: a member of a leaf."""
    return entry_prefix(user) + post_id


def parts(key: str) -> tuple[str, int | None, str]:
    """The kind, the partition and the rest of a key. The rest is an id, a user, `user:digest`
    for an Idempotency-Key, `class:user` for a rate limit, or empty.

    >>> parts("uploads:{0}:alice")
    ('uploads', 0, 'alice')
    >>> parts("rq:workers")  # not a key of this project
    ('', None, '')
    """
    match = KEY.fullmatch(key)
    return (match[1], int(match[2]), match[3] or "") if match else ("", None, "")


def well_formed(key: str) -> bool:
    """Whether a function of this module can have built this key."""
    kind, partition, name = parts(key)
    if kind in ("post", "hidden", "comments", "segments", "erased", "latest", "kept", "upload", "chunks"):
        match = ID.fullmatch(name)
        of_upload = kind in ("upload", "chunks")
        return bool(match) and bool(match[1]) == of_upload and key == f"{kind}:{{{match[3]}}}:{name}"
    if kind == "leaf" and name != "0":
        match = ENTRY.fullmatch(name)
        return bool(match) and int(match[3]) == partition and key == f"leaf:{{{partition}}}:{name}"
    of_user = kind in ("uploads", "making", "once", "rate", "leaf")
    rest = f":{name}" if of_user and name else ""
    return bool(rest) == of_user and key == f"{kind}:{{{partition}}}{rest}"


class IdempotencyKey(NamedTuple):
    """An Idempotency-Key with the request that it belongs to (draft-ietf-httpapi-idempotency-key-header).

    The same key of the same user for another method or path is another key.
    """

    scoped_key: str  # method, path and key, with a space between: "POST /v1/posts 7c2f"
    digest: str  # of the request's body: tells a repetition from another request. "-": the body is not compared


def once(partition: int, user: str, scoped_key: str) -> str:
    """The key that remembers what a request with an Idempotency-Key created.

    It contains a digest of 16 bytes instead of the client's key. That may be 255 bytes long, and it would take memory
    for a day.
    """
    return f"once:{{{partition}}}:{user}:{digest(scoped_key.encode(), 16)}"


def digest(data: bytes, size: int = 8) -> str:
    """BLAKE2b of `size` bytes (RFC 7693), in hexadecimal.

    8 bytes are enough to tell apart the bodies that one user sends under one idempotency key.
    """
    return blake2b(data, digest_size=size).hexdigest()


# Objects


def chunk(upload_id: str, name: str) -> str:
    """The object of a chunk, given its name in the list of an upload. A chunk of a part names the part, too.

    >>> chunk("u01JD4Q7ZK5W8Y3N6R2T9V0XABD-0", "u01JD4Q7ZK5W8Y3N6R2T9V0XABC-0/0-8f2c")
    'chunks/u01JD4Q7ZK5W8Y3N6R2T9V0XABC-0/0-8f2c'
    """
    return f"chunks/{name}" if "/" in name else f"chunks/{upload_id}/{name}"


def chunk_name(offset: int) -> str:
    """A name for a chunk that begins at `offset` bytes. It was never used before.

    Two requests at one offset store two objects. The script append_chunk accepts one of them.
    """
    return f"{offset}-{secrets.token_hex(8)}"


def original(post_id: str) -> str:
    return f"originals/{post_id}"


# Addresses that a post's JPEG can have. 1: it was made once. 2: it was made again with other bytes. Whoever erases a
# JPEG tries all of them, because nothing remembers the version of a deleted post.
IMAGE_VERSIONS = 2


def image(post_id: str, version: int = 1) -> str:
    """The name of a post's JPEG. Its address is the same behind `/v1/`.

    >>> image("01JD4Q7ZK5W8Y3N6R2T9V0XABC-0"), image("01JD4Q7ZK5W8Y3N6R2T9V0XABC-0", 2)
    ('images/01JD4Q7ZK5W8Y3N6R2T9V0XABC-0.jpg', 'images/01JD4Q7ZK5W8Y3N6R2T9V0XABC-0.2.jpg')
    """
    return f"images/{post_id}.jpg" if version == 1 else f"images/{post_id}.{version}.jpg"


def images(post_id: str) -> list[str]:
    """All names that a post's JPEG can have, the oldest first."""
    return [image(post_id, version) for version in range(1, IMAGE_VERSIONS + 1)]


def erasure(user_digest: str) -> str:
    return f"erasures/{user_digest}"


NO_SEGMENT = "-"  # in the place of a name, where all comments of a segment were erased


def segment(post_id: str, name: str) -> str:
    return f"comments/{post_id}/{name}"


def segment_name(first: str) -> str:
    """A name for a segment whose oldest comment is `first`. It was never used before.

    A segment that was written again without deleted comments is another object. So the names of a post's segments begin
    with a time, in ms since 1970, and end with 16 random digits.
    """
    return f"{comment_ms(first)}.{secrets.token_hex(8)}"


IMAGES, ORIGINALS, ERASURES = "images/", "originals/", "erasures/"
SEGMENTS = "comments/"
OBJECTS = ("chunks/", IMAGES, ORIGINALS, SEGMENTS)  # the folders of all objects that belong to a post or an upload


def owner(name: str) -> str:
    """The id of the post or the upload that an object belongs to.

    >>> owner("images/01JD4Q7ZK5W8Y3N6R2T9V0XABC-0.jpg")
    '01JD4Q7ZK5W8Y3N6R2T9V0XABC-0'
    """
    return name.split("/")[1].partition(".")[0]
