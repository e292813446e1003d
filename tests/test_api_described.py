"""A short run of the part of `make fuzz` that makes its requests from the description of the API."""

from drills.described import explore


def test_every_answer_to_requests_made_from_the_description_is_described(embedded, tmp_path):
    embedded.client.flushall()
    print(explore(embedded, tmp_path, examples=4, scenarios=8))
