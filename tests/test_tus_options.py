"""OPTIONS of tus: the versions, extensions and sizes that this server supports."""

import pytest
from wiretrace import play

OFFER = """
    < 204
    < Tus-Resumable: 1.0.0
    < Tus-Version: 1.0.0
    < Tus-Extension: creation,creation-with-upload,expiration,termination,concatenation
    < Tus-Max-Size: 104857600
    < -Content-Length
"""
REQUESTS = {
    "without version and token": ("> OPTIONS /v1/uploads\n> Tus-Resumable:", None),
    "with another version": ("> OPTIONS /v1/uploads\n> Tus-Resumable: 0.2.2", None),
    "with a token": ("> OPTIONS /v1/uploads", "alice"),
    "of an upload that does not exist": (
        "> OPTIONS /v1/uploads/u00000000000000000000000000-0\n> Tus-Resumable:",
        None,
    ),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_options_returns_what_the_server_supports(serving, case):
    request, user = REQUESTS[case]
    play(serving, request + OFFER, user)
