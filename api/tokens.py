"""Who sends a request: a JWT (RFC 7519) in `Authorization: Bearer` (RFC 6750), signed with HS256."""

import re
import time

import jwt

from api.problems import Problem
from storage.settings import Settings, signing_secret

ALGORITHM = "HS256"  # fixed: a token must not choose how it is verified (RFC 8725, section 3.1)
USER = re.compile(r"[\x21-\x7e]{1,255}")  # visible ASCII, because it becomes part of Redis keys and of headers
CACHED = 10_000  # verified tokens. When there are more, all are dropped: simpler than tracking their age
CACHED_CHARACTERS = 1024  # a longer token is not cached. This bounds the memory at 10 MB
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
    jwt.InvalidAlgorithmError: f"it is not signed with {ALGORITHM}",
    jwt.InvalidTokenError: "it is malformed",
}


def mint(settings: Settings, user: str, seconds: int = DEVELOPMENT_SECONDS) -> str:
    """A token for development and tests, valid for `seconds`, with the configured issuer and audience."""
    claims = {"sub": user, "exp": int(time.time()) + seconds, "iss": settings.jwt_issuer, "aud": settings.jwt_audience}
    return jwt.encode({name: value for name, value in claims.items() if value}, signing_secret(settings), ALGORITHM)


def user(request) -> str:
    """The user whose token the request carries, and who is then `request.ctx.user`. Raises Problem 401.

    A verified token is cached until it expires, leeway included: verifying it takes longer than the rest of a request.
    """
    ctx, header = request.app.ctx, request.headers.get("authorization", "")
    cached = ctx.verified.get(header)
    if cached and time.time() < cached[1]:
        request.ctx.user = cached[0]
        return cached[0]
    claims = _verify(header, ctx.secret, ctx.settings)
    if len(header) <= CACHED_CHARACTERS:
        if len(ctx.verified) >= CACHED:
            ctx.verified.clear()
        ctx.verified[header] = claims["sub"], int(claims["exp"]) + LEEWAY
    request.ctx.user = claims["sub"]
    return claims["sub"]


def known(request) -> str | None:
    """The user whose token the request carries. None if it has no token, or one that is not valid."""
    try:
        return user(request)
    except Problem:
        return None


def _verify(header: str, secret: str, settings: Settings) -> dict:
    """The token's claims. Raises Problem 401."""
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise _unauthorized("a Bearer token is needed", "")
    if not token.isascii():  # PyJWT encodes the token first, which fails for bytes that are not UTF-8
        raise _unauthorized("the token is not accepted: it is not ASCII", ', error="invalid_token"')
    try:
        claims = jwt.decode(
            token.strip(),
            secret,
            [ALGORITHM],
            issuer=settings.jwt_issuer or None,
            audience=settings.jwt_audience or None,
            leeway=LEEWAY,
            # verify_aud: PyJWT would otherwise refuse every token that names an audience if none is configured.
            options={"require": ["exp", "sub"], "verify_aud": bool(settings.jwt_audience)},
        )
    except jwt.InvalidTokenError as error:
        reason = next(reason for kind, reason in REASONS.items() if isinstance(error, kind))
        raise _unauthorized(f"the token is not accepted: {reason}", ', error="invalid_token"') from None
    if not USER.fullmatch(claims["sub"]):
        raise _unauthorized("`sub` must be 1 to 255 visible ASCII characters", ', error="invalid_token"')
    return claims


def _unauthorized(detail: str, error: str) -> Problem:
    return Problem(401, "unauthorized", detail, {"WWW-Authenticate": f'Bearer realm="imagegram"{error}'})
