"""Calls of a site that are repeated until they are answered, or until the user's patience ends.

| what happens | what the client does |
|---|---|
| the line breaks; nothing comes for 30 s; the answer is not the site's, as that of a Wi-Fi's login page | repeats |
| 408, 502, 503, 504, 507, or 429 with Retry-After | repeats, not before Retry-After |
| any other error | Refused |

A write is sent with an Idempotency-Key, or is a DELETE: repeating it is harmless.
"""

import random
import socket
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime

import httpx

from api.client.settings import Unusable

TEMPORARY = {408, 502, 503, 504, 507}  # docs/api.md, "When to repeat"; and 429 with Retry-After
SILENCE = 30.0  # seconds without a byte, in either direction, after which the line counts as broken
CONNECT = 10.0  # seconds
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts: it doubles each time
WAIT = 25  # seconds of `Prefer: wait` (RFC 7240, section 4.3), the most that a site grants
# Bytes that may wait unsent in the system's buffer (tcp(7)). By default megabytes may: on a slow line they would need
# more than SILENCE to leave after the last one was handed over, and the progress bar would be ahead by as much.
UNSENT = 32 * 1024
POLL = 2.0  # seconds between two calls, where a site neither waits nor sends Retry-After


class Refused(Exception):
    """The site refused for good: repeating does not help. `str()` is the `detail` of its problem (RFC 9457)."""

    def __init__(self, status: int, code: str, detail: str):
        super().__init__(detail)
        self.status, self.code = status, code


class Trouble(Exception):
    """An attempt failed, and a later one may succeed. `after`: seconds that the site asks to wait, or None."""

    def __init__(self, reason: str, after: float | None = None):
        super().__init__(reason)
        self.after = after


class Unreachable(Exception):
    """The site could not be reached, or could not serve, for as long as the user is patient."""


class Patience:
    """Waits between attempts. Raises Unreachable when nothing has succeeded for `seconds`."""

    def __init__(self, seconds: float, note: Callable[[str], None]):
        self.seconds, self.note = seconds, note
        self.renew()

    def renew(self) -> None:
        """Something has succeeded: the time begins anew."""
        self.attempts, self.end = 0, time.monotonic() + self.seconds

    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def wait(self, trouble: Trouble) -> None:
        """Backs off exponentially with jitter, so that clients that were cut off together come back one by one."""
        left = self.end - time.monotonic()
        doubled = FIRST_PAUSE * 2 ** min(self.attempts, 10)  # no higher power: 2**1024 is no float any more
        pause = min(LONGEST_PAUSE, doubled) * random.uniform(0.5, 1)
        if trouble.after is not None:
            pause = trouble.after + random.uniform(0, FIRST_PAUSE)
        if left <= 0 or (trouble.after or 0) > left:
            asked = f" It asks to wait {trouble.after:.0f} s." if trouble.after else ""
            raise Unreachable(f"{trouble}.{asked} Gave up; the limit is {self.seconds:g} s, see --patience")
        pause = min(pause, left)
        self.note(f"{trouble}. Trying again in {pause:.1f} s")
        time.sleep(pause)
        self.attempts += 1


class Site:
    """A site, as one user sees it."""

    def __init__(self, url: str, token: str, patience: float, note: Callable[[str], None]):
        self.url, self.patience, self.note = url, patience, note
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        timeout = httpx.Timeout(SILENCE, connect=CONNECT)
        try:
            self.http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        except (OSError, ImportError, ValueError, httpx.InvalidURL) as error:
            reason = f"{url}, or a proxy or SSL_CERT_FILE of the environment, cannot be used: {error}"
            raise Unusable(reason) from None

    def once(self, method: str, path: str, **given) -> httpx.Response:
        """One attempt. Keyword arguments go to httpx. Raises Refused, Trouble, or Unusable if no host has this name."""
        try:
            answer = self.http.request(method, path, extensions={"trace": _buffer_little}, **given)
        except httpx.RequestError as error:
            raise Trouble(f"{self.url} gives no answer ({error or type(error).__name__})") from None
        except (UnicodeError, httpx.InvalidURL) as error:
            raise Unusable(f"{self.url} is no address of a site: {error}") from None
        if not _is_of_a_site(answer):
            where = f", it leads to {answer.headers['Location']}" if "Location" in answer.headers else ""
            raise Trouble(f"{self.url} answers {answer.status_code}, but not as Imagegram does{where}")
        if not answer.is_error:
            return answer
        problem = _problem(answer)
        after = _seconds(answer.headers.get("Retry-After", ""))
        if answer.status_code in TEMPORARY or (answer.status_code == 429 and after is not None):
            raise Trouble(problem["detail"], after)
        raise Refused(answer.status_code, problem["code"], problem["detail"])

    def call(self, method: str, path: str, key: str = "", **given) -> httpx.Response:
        """The answer to a call that is repeated while there is Trouble. Raises Refused or Unreachable.

        `key` is sent as Idempotency-Key. A DELETE whose answer was lost may be repeated as well: then 404 is success.
        """
        if key:
            given["headers"] = {**given.get("headers", {}), "Idempotency-Key": key}
        patience = Patience(self.patience, self.note)
        while True:
            try:
                return self.once(method, path, **given)
            except Trouble as trouble:
                patience.wait(trouble)
            except Refused as refusal:
                if method == "DELETE" and refusal.status == 404 and patience.attempts:
                    return httpx.Response(204)
                raise

    def wait(self, path: str, **given) -> httpx.Response:
        """A GET that the site may answer later, when there is news. Where it does not wait, this call does.

        Returns each answer that the site gives. `rest` says how long to wait before the next call.
        """
        timeout = httpx.Timeout(SILENCE, connect=CONNECT, read=WAIT + SILENCE)
        return self.call("GET", path, headers={"Prefer": f"wait={WAIT}"}, timeout=timeout, **given)


def _buffer_little(event: str, info: dict) -> None:
    """Sets a socket option of each new connection. httpx itself can set none without losing the proxies of the user's
    environment. This is called at each step of a request ("trace" in the documentation of httpcore)."""
    if event == "connection.connect_tcp.complete":
        connection = info["return_value"].get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)


def rest(answer: httpx.Response) -> None:
    """Sleeps before the next `Site.wait`, unless the site itself has waited (RFC 7240, section 3)."""
    if "Preference-Applied" not in answer.headers:
        after = _seconds(answer.headers.get("Retry-After", ""))
        time.sleep(POLL if after is None else after)


def _is_of_a_site(answer: httpx.Response) -> bool:
    """Whether Imagegram, or the front of one, sent this answer. All of theirs have a Request-Id."""
    if "Request-Id" not in answer.headers:
        return False
    kind = answer.headers.get("Content-Type", "").partition(";")[0]
    if kind == "application/json":
        try:
            return answer.is_success and isinstance(answer.json(), dict)
        except ValueError:
            return False
    if kind in ("application/problem+json", "image/jpeg"):
        return True
    return answer.status_code == 204 or "Tus-Resumable" in answer.headers


def _problem(answer: httpx.Response) -> dict[str, str]:
    """`code` and `detail` of a problem. HEAD has none, because it has no body."""
    try:
        problem = answer.json()
    except ValueError:
        problem = {}
    problem = problem if isinstance(problem, dict) else {}
    fallback = f"the site answers {answer.status_code} {answer.reason_phrase}"
    return {"code": str(problem.get("code", "")), "detail": str(problem.get("detail") or fallback)}


def _seconds(retry_after: str) -> float | None:
    """Retry-After in seconds: a number or a date (RFC 9110, section 10.2.3). None: there is none.

    >>> _seconds("3"), _seconds("Thu, 01 Jan 1970 00:00:00 GMT"), _seconds(""), _seconds("soon")
    (3.0, 0.0, None, None)
    """
    if retry_after.isascii() and retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
