"""Who sends a request: a JWT (RFC 7519) in `Authorization: Bearer` (RFC 6750).

It is signed with HS256 and the secret, or, if IMAGEGRAM_JWKS_URL is set, with RS256, ES256 or EdDSA and a key of the
identity provider (api/jwks.py).
"""

import re
import time

import jwt

from api.jwks import ALGORITHMS, Provider
from api.problems import Problem
from storage.settings import Settings, signing_secret

ALGORITHM = "HS256"  # fixed: a token must not choose how it is verified (RFC 8725, section 3.1)
PROVIDER_ALGORITHMS = tuple(ALGORITHMS.values())  # a tuple: what is searched may be a list, which has no hash
CHALLENGE, INVALID = 'Bearer realm="imagegram"', ', error="invalid_token"'  # RFC 6750, section 3
USER = re.compile(r"[\x21-\x7e]{1,255}")  # visible ASCII, because it becomes part of Redis keys and of headers
CACHED = 10_000  # verified tokens. When there are more, all are dropped: simpler than tracking their age
# A longer token is not cached. This bounds the memory at 20 MB. Those of identity providers have 800 to 1,500.
CACHED_CHARACTERS = 2048
DEVELOPMENT_SECONDS = 24 * 60 * 60
LEEWAY = 30  # seconds by which the issuer's clock may differ, for exp, nbf and iat (RFC 7519, section 4.1.4)

# Why a token is refused, in our words: PyJWT's may quote Python's errors. A subclass stands before its base.
REASONS = {
    jwt.ExpiredSignatureError: "it has expired",
    jwt.ImmatureSignatureError: "it is not valid yet",
    jwt.InvalidAudienceError: "it is for another audience",
    jwt.InvalidIssuerError: "it comes from another issuer",
    jwt.MissingRequiredClaimError: "a claim is missing",
    jwt.exceptions.InvalidSubjectError: "`sub` must be a string",
    jwt.InvalidSignatureError: "its signature is wrong",
    jwt.InvalidAlgorithmError: "it is signed with another algorithm",
    jwt.InvalidTokenError: "it is malformed",
}


def mint(settings: Settings, user: str, seconds: int = DEVELOPMENT_SECONDS) -> str:
    """A token for development and tests, valid for `seconds`, with the configured issuer and audience."""
    claims = {settings.jwt_user_claim: user, "exp": int(time.time()) + seconds}
    claims |= {"iss": settings.jwt_issuer, "aud": settings.jwt_audience}
    return jwt.encode({name: value for name, value in claims.items() if value}, signing_secret(settings), ALGORITHM)


async def user(request) -> str:
    """The user whose token the request carries, and who is then `request.ctx.user`. Raises Problem 401, Problem 503.

    503: the keys of the identity provider were never read. A token with an unknown key waits until they are read again.
    """
    try:
        return _user(request)
    except UnknownKey:
        await request.app.ctx.provider.fetch()
        return _user(request)


def known(request) -> str | None:
    """The user whose token the request carries. None without a token, or with one that is not valid."""
    try:
        return _user(request)
    except Problem:
        return None


def _user(request) -> str:
    """Like `user`, with the keys that are known. Raises UnknownKey.

    A verified token is cached until it expires, leeway included: verifying it takes longer than the rest of a request.
    """
    ctx, header = request.app.ctx, request.headers.get("authorization", "")
    cached = ctx.verified.get(header)
    if cached and time.time() < cached[1]:
        request.ctx.user = cached[0]
        return cached[0]
    claims = _verify(header, ctx)
    name = claims[ctx.settings.jwt_user_claim]
    if len(header) <= CACHED_CHARACTERS:
        if len(ctx.verified) >= CACHED:
            ctx.verified.clear()
        ctx.verified[header] = name, int(claims["exp"]) + LEEWAY
    request.ctx.user = name
    return name


def _verify(header: str, ctx) -> dict:
    """The token's claims. Raises Problem 401, UnknownKey.

    A token is at most 8 KiB long, because Sanic refuses longer headers. Checking it takes less than a ms.
    """
    settings, claim = ctx.settings, ctx.settings.jwt_user_claim
    scheme, _, token = header.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise _unauthorized("a Bearer token is needed", "")
    if not token.isascii():  # PyJWT encodes the token first, which fails for bytes that are not UTF-8
        raise _refused("it is not ASCII")
    try:
        key, algorithm = _provider_key(token, ctx.provider) if ctx.provider else (ctx.secret, ALGORITHM)
        claims = jwt.decode(
            token,
            key,
            [algorithm],
            issuer=settings.jwt_issuer or None,
            audience=settings.jwt_audience or None,
            leeway=LEEWAY,
            # verify_aud: PyJWT would otherwise refuse every token that names an audience if none is configured.
            options={"require": ["exp", claim], "verify_aud": bool(settings.jwt_audience)},
        )
    except jwt.InvalidTokenError as error:
        raise _refused(next(reason for kind, reason in REASONS.items() if isinstance(error, kind))) from None
    if not isinstance(claims[claim], str) or not USER.fullmatch(claims[claim]):
        raise _unauthorized(f"`{claim}` must be 1 to 255 visible ASCII characters", INVALID)
    return claims


def _provider_key(token: str, provider: Provider) -> tuple[object, str]:
    """The key that a token names, and the only algorithm of that key. Raises InvalidTokenError, UnknownKey.

    Only `alg` and `kid` of the token's header are read. A key, or the address of one, in the token itself would be the
    sender's choice (`jwk`, `jku`, `x5c`, `x5u`; RFC 8725, section 3.10).
    """
    header = jwt.get_unverified_header(token)
    algorithm, key_id = header.get("alg"), header.get("kid")
    if algorithm not in PROVIDER_ALGORITHMS:
        raise jwt.InvalidAlgorithmError
    key = provider.find(key_id, algorithm)
    if key is None:
        raise UnknownKey(provider.ready)
    return key, algorithm


class UnknownKey(Problem):
    """The token's key is not known. It may be a new one."""

    def __init__(self, ready: bool):
        if ready:
            detail = "the token is not accepted: it is signed with an unknown key"
            super().__init__(401, "unauthorized", detail, {"WWW-Authenticate": CHALLENGE + INVALID})
        else:
            super().__init__(503, "unreachable", "the identity provider cannot be reached: tokens cannot be checked")


def _refused(reason: str) -> Problem:
    return _unauthorized(f"the token is not accepted: {reason}", INVALID)


def _unauthorized(detail: str, error: str) -> Problem:
    return Problem(401, "unauthorized", detail, {"WWW-Authenticate": CHALLENGE + error})
