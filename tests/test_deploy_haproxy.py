"""Nothing depends on which node answers: two nodes of the API behind HAProxy, with deploy/haproxy.cfg."""

import time

import pytest
from conftest import create_post, until, wait_until_processed
from making import jpeg
from nodes import running_nodes
from uploading import BODY, picture
from wire import dial, exchange, head, hear, request

TUS = {"Tus-Resumable": "1.0.0"}


@pytest.fixture(scope="module")
def site(embedded, tmp_path_factory):
    embedded.client.flushall()
    with running_nodes(embedded, tmp_path_factory.mktemp("nodes")) as front:
        yield front


def test_an_upload_goes_on_at_the_other_node_with_each_patch(site):
    image = jpeg(1200, 900)
    clients = [node.client("alice") for node in site.nodes]
    upload = clients[0].post("/v1/uploads", headers={**TUS, "Upload-Length": str(len(image))}).headers["Location"]
    step = len(image) // 5 + 1
    for number, start in enumerate(range(0, len(image), step)):
        headers = {**TUS, "Upload-Offset": str(start), "Content-Type": BODY.partition(": ")[2]}
        answer = clients[number % 2].patch(upload, content=image[start : start + step], headers=headers)
        assert answer.status_code == 204 and answer.headers["Upload-Offset"] == str(min(start + step, len(image)))
        seen = clients[(number + 1) % 2].head(upload, headers=TUS)
        assert seen.headers["Upload-Offset"] == answer.headers["Upload-Offset"]
    post = clients[1].post("/v1/posts", json={"upload": upload.rpartition("/")[2]}).json()
    wait_until_processed(clients[0], post)
    assert clients[1].get(f"/v1/images/{post['id']}.jpg").status_code == 200


def test_a_post_of_one_node_is_commented_and_repeated_at_the_other(site):
    one, other = (node.client("bob") for node in site.nodes)
    post = wait_until_processed(one, create_post(one, jpeg()))
    path = f"/v1/posts/{post['id']}/comments"
    answers = [client.post(path, json={"text": "Hello"}, headers={"Idempotency-Key": '"k"'}) for client in (other, one)]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert answers[0].json() == answers[1].json() and answers[1].headers["Idempotent-Replayed"] == "true"
    assert one.get("/v1/posts").json() == other.get("/v1/posts").json()
    assert one.get(path).headers["ETag"] == other.get(path).headers["ETag"], "caches may ask either"


def test_bodies_stream_through_and_a_body_that_breaks_off_keeps_its_bytes(site):
    image = picture(300_000)
    with site.client("alice") as client:
        upload = client.post("/v1/uploads", headers={**TUS, "Upload-Length": "300000"}).headers["Location"]
        lines = f"Authorization: Bearer {site.token('alice')}", "Tus-Resumable: 1.0.0", BODY, "Upload-Offset: 0"
        with dial(site.port) as line:
            line.sendall(head("PATCH", upload, *lines, "Content-Length: 300000") + image[:100_000])
            time.sleep(0.5)  # so that the bytes are on their way when the connection ends
        until(lambda: client.head(upload, headers=TUS).headers["Upload-Offset"] == "100000", what="the bytes")


def test_a_body_is_asked_for_with_100_continue_only_after_the_token_was_checked(site):
    lines = "Tus-Resumable: 1.0.0", "Upload-Length: 9", "Content-Length: 9", "Expect: 100-continue"
    with dial(site.port) as line:
        line.sendall(head("POST", "/v1/uploads", BODY, *lines))
        assert hear(line).status == 401


def test_haproxy_hides_the_metrics_and_its_own_errors_are_problems(site):
    answer = exchange(site.port, head("GET", "/metrics"))
    assert (answer.status, answer.headers["content-type"]) == (404, "application/problem+json")
    assert (answer.json()["code"], answer.json()["status"]) == ("nowhere", 404)
    assert answer.headers["request-id"] and answer.headers["date"] and answer.headers["cache-control"] == "no-store"
    assert exchange(site.nodes[0].port, request("GET", "/metrics")).status == 200


def test_while_no_node_is_ready_pictures_are_served_and_the_rest_says_why(site, embedded):
    with site.client("dave") as client:
        post = wait_until_processed(client, create_post(client, jpeg()))
        for server in embedded.primaries:
            server.execute_command("CLIENT", "PAUSE", 2000, "ALL")
        until(lambda: client.get("/readyz").status_code == 503, what="the nodes are not ready")
        assert client.get(f"/v1/images/{post['id']}.jpg").status_code == 200
        answer = client.get("/v1/posts")
        assert answer.status_code == 503 and answer.json()["code"] == "unreachable" and answer.headers["Retry-After"]
        until(lambda: client.get("/v1/posts").status_code == 200, what="the feed")


def test_a_node_that_is_stopped_fails_no_request_of_a_client_that_follows_retry_after(site):
    """It stays away. `make drill-restarts` restarts both while many write."""
    with site.client("carol") as client:
        post = create_post(client, jpeg())
        wait_until_processed(client, post)
        path, sent = f"/v1/posts/{post['id']}/comments", []
        stopped = site.nodes[0].processes[0]
        stopped.terminate()
        left = 30
        while left:
            text = f"comment-{len(sent)}"
            answer = client.post(path, json={"text": text}, headers={"Idempotency-Key": f'"{text}"'})
            if answer.status_code in (502, 503, 504):
                time.sleep(int(answer.headers["Retry-After"]))
                continue
            assert answer.status_code == 201
            sent.append(answer.json()["id"])
            left -= stopped.poll() is not None
        shown = client.get(path, params={"limit": 100}).json()["items"]
        assert [row["id"] for row in shown] == sent[::-1][:100]
