"""OPTIONS of tus: what this server offers."""

import pytest
from wiretrace import play

OFFER = """
    < 204
    < Tus-Resumable: 1.0.0
    < Tus-Version: 1.0.0
    < Tus-Extension: creation,creation-with-upload,expiration,termination
    < Tus-Max-Size: 104857600
    < -Content-Length
"""
ASKED = {
    "it needs neither version nor token": ("> OPTIONS /v1/uploads\n> Tus-Resumable:", None),
    "any version is ignored": ("> OPTIONS /v1/uploads\n> Tus-Resumable: 0.2.2", None),
    "a token harms nothing": ("> OPTIONS /v1/uploads", "alice"),
    "of an upload, whether it is there or not": (
        "> OPTIONS /v1/uploads/u00000000000000000000000000-0\n> Tus-Resumable:",
        None,
    ),
}


@pytest.mark.parametrize("case", ASKED)
def test_options_tells_the_offer(serving, case):
    asked, user = ASKED[case]
    play(serving, asked + OFFER, user)
