"""DELETE of tus: termination."""

import pytest
from state import contents, files
from uploading import begin, count_chunks, picture
from wiretrace import play

TRACES = {
    "an upload that was not begun": """
        > POST /v1/uploads
        > Upload-Length: 100
        < 201
        < Location: /v1/uploads/<upload>
        > DELETE /v1/uploads/<upload>
        > Content-Length: 0
        < 204
        < Tus-Resumable: 1.0.0
        > HEAD /v1/uploads/<upload>
        < 404
        > PATCH /v1/uploads/<upload>
        > Upload-Offset: 0
        > Content-Type: application/offset+octet-stream
        > [picture]
        < 404
        > DELETE /v1/uploads/<upload>
        < 404
    """,
    "a finished one": """
        > POST /v1/uploads
        > Upload-Length: 100
        > Content-Type: application/offset+octet-stream
        > [picture]
        < 201
        < Location: /v1/uploads/<upload>
        > DELETE /v1/uploads/<upload>
        < 204
        > HEAD /v1/uploads/<upload>
        < 404
    """,
    "by POST, for networks that know no DELETE": """
        > POST /v1/uploads
        > Upload-Length: 100
        < 201
        < Location: /v1/uploads/<upload>
        > POST /v1/uploads/<upload>
        > X-HTTP-Method-Override: DELETE
        < 204
        > HEAD /v1/uploads/<upload>
        < 404
    """,
    "an unknown one": """
        > DELETE /v1/uploads/u00000000000000000000000000-0
        < 404
        < Tus-Resumable: 1.0.0
    """,
    "in another version": """
        > DELETE /v1/uploads/u00000000000000000000000000-0
        > Tus-Resumable: 0.2.2
        < 412
        < Tus-Version: 1.0.0
    """,
}


@pytest.fixture(autouse=True)
def empty(serving):
    serving.server.client.flushall()


@pytest.mark.parametrize("case", TRACES)
def test_delete(serving, case):
    play(serving, TRACES[case], picture=picture(100))
    assert contents(serving.server.client) == {}
    assert not any(name.startswith("store/chunks/") for name in files(serving.folder))


def test_only_its_owner_may(serving):
    known = {"upload": begin(serving, 100)}
    before = contents(serving.server.client)
    play(serving, "> DELETE /v1/uploads/<upload>\n< 404\n< code: noupload", "bob", known)
    play(serving, "> DELETE /v1/uploads/<upload>\n< 401", None, known)
    assert contents(serving.server.client) == before


def test_a_post_keeps_the_bytes_of_its_upload(serving):
    known = play(
        serving,
        """
        > POST /v1/uploads
        > Upload-Length: 100
        > Content-Type: application/offset+octet-stream
        > [picture]
        < 201
        < Location: /v1/uploads/<upload>
        """,
        picture=picture(100),
    )
    play(
        serving,
        """
        > POST /v1/posts
        > Content-Type: application/json
        > [post]
        < 201
        < Location: /v1/posts/<post>
        > DELETE /v1/uploads/<upload>
        < 404
        < code: noupload
        """,
        known=known,
        post=b'{"upload": "%b"}' % known["upload"].encode(),
    )
    assert count_chunks(serving, known["upload"]) == 1
