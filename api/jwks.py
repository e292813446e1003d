"""The public keys of the identity provider: a JWK Set (RFC 7517), read from IMAGEGRAM_JWKS_URL.

| when | what happens |
|---|---|
| the process starts | the keys are fetched; requests that need them wait for at most WAIT |
| a token names an unknown key | they are fetched again, at most once in PAUSE, and the request waits for it |
| the keys are older than STALE | they are fetched again, and requests go on with those that are there |
| a fetch fails | the keys that are there stay in use |

A timer fetches stale keys, too: verified tokens are cached, and a request with a cached token looks for no key.

A fetch runs in a thread: it may block on the name server, the network or TLS. It ends after DEADLINE, whatever comes.
"""

import asyncio
import logging
import ssl
import threading
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from socket import SHUT_RDWR
from time import monotonic
from urllib.parse import urlsplit

import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

WAIT = 0.8  # seconds that a request waits for a fetch, so that it is answered within a second
PAUSE = 5.0  # seconds between the beginnings of two fetches. Tokens with invented key ids cannot cause more of them
STALE = 300.0  # seconds after which keys are fetched again. A key that the provider has removed is valid for so long
STEP = 2.0  # seconds that one step of a fetch may block
DEADLINE = 5.0  # seconds of a whole fetch
MAX_BYTES = 256 * 1024  # of a JWK Set. A key takes about 500, with a certificate 3,000
MAX_KEYS = 100
KEY_ID_CHARACTERS = 255
# The only algorithm that each kind of key is used for. So a token cannot choose how a key is used (RFC 8725, 3.1).
ALGORITHMS = {("RSA", None): "RS256", ("EC", "P-256"): "ES256", ("OKP", "Ed25519"): "EdDSA"}
PUBLIC = ("kty", "crv", "n", "e", "x", "y")  # the members that are read
RSA_BITS = range(2048, 8192 + 1)  # RFC 7518, section 3.3. Verifying takes 0.06 to 0.7 ms
MEMBER_CHARACTERS = 1400  # of a number of 8192 bits, in Base64

log = logging.getLogger("imagegram.api")

Keys = dict[tuple[str | None, str], object]  # by key id and algorithm


class Provider:
    """The keys of one identity provider, for one event loop. `on_change` is called when other keys were fetched."""

    def __init__(self, url: str, on_change=lambda: None):
        self._url = url
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._keys: Keys = {}
        self._members: list | None = None  # of the keys that are in use, to notice a change
        self._began = self._fetched = -1e9  # times of the event loop
        self._connection: HTTPConnection | None = None  # of the fetch in progress
        self._ended = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None  # the deadline of this fetch, or the next fetch
        self._connect = HTTPConnection
        if urlsplit(url).scheme == "https":  # reading the system's certificates takes 20 ms, so not for each fetch
            self._connect = partial(HTTPSConnection, context=ssl.create_default_context())

    @property
    def ready(self) -> bool:
        """Whether keys were ever fetched."""
        return self._members is not None

    def find(self, key_id: str | None, algorithm: str):
        """The key for a token. None if there is none. Without a key id it is the only key with the algorithm."""
        if self._loop.time() > self._fetched + STALE:
            self.begin()
        if key_id is not None:
            return self._keys.get((key_id, algorithm))
        found = [key for (_, used_for), key in self._keys.items() if used_for == algorithm]
        return found[0] if len(found) == 1 else None

    async def fetch(self) -> None:
        """Fetch the keys again if that is allowed now. Waits until this or another fetch ends, or for WAIT."""
        self.begin()
        if self._connection:
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT):
                    await self._ended.wait()

    def begin(self) -> None:
        """Begin a fetch, unless one is in progress or one began less than PAUSE ago."""
        if self._connection or self._loop.time() < self._began + PAUSE:
            return
        parts = urlsplit(self._url)
        self._connection = self._connect(parts.hostname, parts.port, timeout=STEP)
        self._began = self._loop.time()
        self._ended = asyncio.Event()
        target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
        threading.Thread(target=self._run, args=(self._connection, target), daemon=True).start()
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_later(DEADLINE, self._end, self._connection, TimeoutError("it took too long"))

    def _run(self, connection: HTTPConnection, target: str) -> None:
        """The thread of a fetch."""
        try:
            members, keys = read_keys(download(connection, target))
            result = members, keys
        except Exception as error:  # of any kind: what comes is not ours
            result = error
        with suppress(Exception):
            connection.close()
        with suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._end, connection, result)

    def _end(self, connection: HTTPConnection, result) -> None:
        if connection is not self._connection:  # the thread ended after the deadline
            return
        self._connection = None
        self._timer.cancel()
        self._timer = self._loop.call_later(STALE, self.begin)
        self._ended.set()
        if isinstance(result, Exception):
            log.warning("the keys of %s cannot be read: %s", self._url, str(result) or type(result).__name__)
            with suppress(OSError, AttributeError):  # ends the thread, if it still waits for bytes
                connection.sock.shutdown(SHUT_RDWR)
            return
        members, keys = result
        self._fetched = self._loop.time()
        if members != self._members:
            self._members, self._keys = members, keys
            self._on_change()


def download(connection: HTTPConnection, target: str) -> bytes:
    """The body of a 200. Raises ValueError for another answer, also for a redirect, OSError, HTTPException."""
    end = monotonic() + DEADLINE
    connection.request("GET", target, headers={"Accept": "application/json", "Connection": "close"})
    response = connection.getresponse()
    if response.status != 200:
        raise ValueError(f"the answer is {response.status}")
    body = b""
    while data := response.read1(MAX_BYTES):
        body += data
        if monotonic() > end:
            raise TimeoutError("it took too long")
        if len(body) > MAX_BYTES:
            raise ValueError(f"the answer has more than {MAX_BYTES} bytes")
    if response.length:
        raise HTTPException("the answer broke off")
    return body


def read_keys(body: bytes) -> tuple[list, Keys]:
    """The keys of a JWK Set that are of use here, and their members. Others are ignored (RFC 7517, section 5).

    Raises ValueError if it is no JWK Set, or none of its keys is of use.
    """
    document = orjson.loads(body)
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("it is not a JWK Set")
    members, keys = [], {}
    for entry in entries[:MAX_KEYS]:
        with suppress(ValueError, TypeError, KeyError, AttributeError, jwt.PyJWTError):
            key_id, algorithm, public = usable(entry)
            key = jwt.PyJWK(public, algorithm).key
            if isinstance(key, RSAPublicKey) and (key.key_size not in RSA_BITS or key.public_numbers().e >= 2**32):
                raise ValueError("the key is too weak, or verifying with it takes too long")
            if (key_id, algorithm) not in keys:  # of two with the same name the first one counts
                keys[key_id, algorithm] = key
                members.append((key_id, algorithm, public))
    if not keys:
        raise ValueError("it has no key for RS256, ES256 or EdDSA")
    return members, keys


def usable(entry: dict) -> tuple[str | None, str, dict[str, str]]:
    """A key's id, its algorithm, and its public members. Raises ValueError, KeyError if it is not for signatures."""
    algorithm = ALGORITHMS[entry["kty"], entry.get("crv")]
    key_id = entry.get("kid")
    if (
        entry.get("alg", algorithm) != algorithm
        or entry.get("use", "sig") != "sig"
        or "verify" not in entry.get("key_ops", ["verify"])
        or not (key_id is None or (isinstance(key_id, str) and len(key_id) <= KEY_ID_CHARACTERS))
    ):
        raise ValueError("the key is for something else")
    public = {name: entry[name] for name in PUBLIC if name in entry}
    if any(not isinstance(value, str) or len(value) > MEMBER_CHARACTERS for value in public.values()):
        raise ValueError("the key is malformed")
    return key_id, algorithm, public
