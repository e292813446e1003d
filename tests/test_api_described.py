"""A short run of the part of `make fuzz` that makes its requests from the description of the API."""

from drills.described import explore


def test_every_answer_to_requests_made_from_the_description_is_described(embedded, tmp_path):
    embedded.client.flushall()
    seen = explore(embedded, tmp_path, examples=4, scenarios=8)
    reached = {("createPost", 201), ("readPost", 200), ("deletePost", 204), ("createUpload", 201), ("listUploads", 200)}
    assert seen.keys() >= reached
