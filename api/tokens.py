"""Who asks: a JWT (RFC 7519) in `Authorization: Bearer` (RFC 6750), signed with HS256."""

import re
import time

import jwt

from api.problems import Problem

ALGORITHM = "HS256"  # fixed: a token does not choose how it is verified (RFC 8725, section 3.1)
SUBJECT = re.compile(r"[\x21-\x7e]{1,255}")  # visible ASCII: it stands in Redis keys and in headers
REMEMBERED = 10_000  # tokens. When there are more, all are forgotten: simpler than an order of age
USUAL = 1024  # characters of a token that is remembered, which bounds their memory at 10 MB
DEVELOPMENT_SECONDS = 24 * 60 * 60


def mint(secret: str, user: str, seconds: int = DEVELOPMENT_SECONDS) -> str:
    """A token for development and tests."""
    return jwt.encode({"sub": user, "exp": int(time.time()) + seconds}, secret, ALGORITHM)


def user(request) -> str:
    """The user whose token the request carries. Raises Problem 401.

    A token that was verified is remembered until it expires: verifying it takes longer than all else of a request.
    """
    ctx, carried = request.app.ctx, request.headers.get("authorization", "")
    found = ctx.verified.get(carried)
    if found and time.time() < found[1]:
        return found[0]
    claims = _verify(carried, ctx.secret)
    if len(carried) <= USUAL:
        if len(ctx.verified) >= REMEMBERED:
            ctx.verified.clear()
        ctx.verified[carried] = claims["sub"], int(claims["exp"])
    return claims["sub"]


def _verify(carried: str, secret: str) -> dict:
    scheme, _, token = carried.partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise _unauthorized("a Bearer token is needed", "")
    if not token.isascii():  # PyJWT would encode it first, which bytes that are no UTF-8 do not survive
        raise _unauthorized("the token is of no use: it is not ASCII", ', error="invalid_token"')
    try:
        claims = jwt.decode(token.strip(), secret, [ALGORITHM], options={"require": ["exp", "sub"]})
    except jwt.InvalidTokenError as error:
        raise _unauthorized(f"the token is of no use: {error}", ', error="invalid_token"') from None
    if not SUBJECT.fullmatch(claims["sub"]):
        raise _unauthorized("`sub` must be 1 to 255 visible ASCII characters", ', error="invalid_token"')
    return claims


def _unauthorized(detail: str, error: str) -> Problem:
    return Problem(401, "unauthorized", detail, {"WWW-Authenticate": f'Bearer realm="imagegram"{error}'})
