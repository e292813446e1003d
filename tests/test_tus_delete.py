"""DELETE of tus: it ends an upload and removes its bytes (the extension termination)."""

import pytest
from state import contents, files, unchanged
from uploading import begin_finished, count_chunks, picture
from wiretrace import play

TRACES = {
    "an upload without bytes": """
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
    "a finished upload": """
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
    "by POST with an override, for networks that block DELETE": """
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
    "an unknown upload": """
        > DELETE /v1/uploads/u00000000000000000000000000-0
        < 404
        < Tus-Resumable: 1.0.0
    """,
    "in another version of tus": """
        > DELETE /v1/uploads/u00000000000000000000000000-0
        > Tus-Resumable: 0.2.2
        < 412
        < Tus-Version: 1.0.0
    """,
}


pytestmark = pytest.mark.usefixtures("empty")


@pytest.mark.parametrize("case", TRACES)
def test_a_delete_is_answered_as_in_the_trace(serving, case):
    play(serving, TRACES[case], picture=picture(100))
    assert contents(serving.server.client) == {}
    assert not any(name.startswith("store/chunks/") for name in files(serving.folder))


def test_only_the_owner_may_delete_an_upload(serving):
    known = {"upload": begin_finished(serving)}
    with unchanged(serving.server.client, serving.folder):
        play(serving, "> DELETE /v1/uploads/<upload>\n< 404\n< code: noupload", "bob", known)
        play(serving, "> DELETE /v1/uploads/<upload>\n< 401", None, known)


def test_an_upload_that_became_a_post_cannot_be_deleted(serving):
    known = {"upload": begin_finished(serving)}
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
