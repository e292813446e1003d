"""The shape of a Cluster: `imagegram-storage cluster` forms it, says what is wrong, and moves partitions."""

import asyncio
import os
import shutil
import subprocess
import sys

import pytest
from clusters import ClusterNode
from conftest import until

from storage.db import forming, topology
from storage.db.cluster import SLOTS, Cluster


@pytest.fixture
def nodes(tmp_path):
    """Starts nodes that do not know each other yet."""
    started = []

    def start(count: int, kind: str = "valkey", *options: str) -> list[ClusterNode]:
        new = []
        for _ in range(count):
            started.append(ClusterNode(kind, tmp_path / str(len(started)), *options))
            new.append(started[-1])
        return new

    yield start
    for node in started:
        node.kill()


def url(nodes) -> str:
    return "redis+cluster://" + ",".join(f"localhost:{node.port}" for node in nodes)


def run(nodes, *command: str, **variables: str) -> tuple[int, str]:
    """Runs `imagegram-storage cluster` for these nodes."""
    queue = "unix:///nowhere"
    environment = {"IMAGEGRAM_REDIS_URL": url(nodes), "IMAGEGRAM_QUEUE_URL": queue, "PYTHONPATH": ":".join(sys.path)}
    program = [sys.executable, "-m", "storage", "cluster", *command]
    done = subprocess.run(program, env={**environment, **variables}, text=True, capture_output=True, timeout=100)
    return done.returncode, done.stdout + done.stderr


def test_each_primary_gets_every_nth_partition_and_each_slot_has_one_owner():
    for primaries, arbiters in ((1, 0), (1, 2), (3, 0), (5, 1)):
        shares = topology.placement(primaries, arbiters)
        assert sorted(slot for share in shares for slot in share) == list(range(SLOTS))
        assert shares[primaries:] == [[slot] for slot in range(SLOTS - arbiters, SLOTS)]
        for number, share in enumerate(shares[:primaries]):
            held = topology.partitions_in(set(share), topology.PLACED)
            assert held == list(range(number, topology.PLACED, primaries))


def test_no_partition_that_is_dealt_out_has_a_slot_of_an_arbiter():
    last = set(range(SLOTS - topology.ARBITERS, SLOTS))
    assert topology.partitions_in(last, topology.PLACED) == []


def test_a_replica_goes_where_fewest_are_then_to_another_machine_then_to_the_first_in_the_url():
    def member(name: str, host: str, primary: str = "") -> topology.Member:
        return topology.Member(name, host, 6379, {"slave" if primary else "master"}, primary)

    view = [member("c", "h3"), member("a", "h1"), member("b", "h2"), member("new", "h4")]
    data = ["b", "a", "c"]
    chosen = [forming._needs_replica(view, "new", data).id]
    view.append(member("r1", "h5", "b"))
    chosen.append(forming._needs_replica(view, "new", data).id)
    view[-2] = member("new", "h1")
    chosen.append(forming._needs_replica(view, "new", data).id)
    assert chosen == ["b", "a", "c"]


@pytest.mark.parametrize("kind", [os.environ.get("CLUSTER", "valkey")], ids="cluster-{}".format)
def test_a_small_site_is_formed_completed_and_survives_its_primary(nodes, kind):
    first = nodes(4, kind)
    code, output = run(first, "form", "--primaries", "1", "--arbiters", "2")
    assert (code, output.count(": 1 slots"), output.count(": a replica of")) == (0, 2, 1), output
    code, output = run(first, "show", IMAGEGRAM_REPLICAS="1")
    assert code == 1 and "1 replicas: with IMAGEGRAM_REPLICAS=1 it needs 2" in output
    complete = first + nodes(1, kind)
    code, output = run(complete, "form", "--primaries", "1", "--arbiters", "2", IMAGEGRAM_REPLICAS="1")
    assert (code, output.count(": a replica of"), output.count("PROBLEM")) == (0, 1, 0), output
    first[0].kill()
    until(lambda: "does not answer" in run(complete, "show")[1], 20, "the loss is seen")
    code, output = run(complete, "form", "--primaries", "1", "--arbiters", "2")
    assert code == 1 and f"node 127.0.0.1:{first[0].port} does not answer" in output
    first[0].start()
    until(lambda: run(complete, "show")[0] == 0, 20, "the lost node is a replica")
    code, output = run(complete, "form", "--primaries", "1", "--arbiters", "2", "--home")
    assert code == 0 and f"localhost:{first[0].port}: a primary again" in output, output
    assert first[0].client.info("replication")["connected_slaves"] in (1, 2)
    code, output = run(complete, "form", "--primaries", "1", "--arbiters", "2", "--home")
    assert code == 0 and "again" not in output, output


def test_an_arbiter_that_lost_its_disk_is_an_arbiter_again(nodes):
    """As a replica it could not vote. Then the site would have no majority when its primary is lost."""
    five = nodes(5)
    shape = ("form", "--primaries", "1", "--arbiters", "2")
    assert run(five, *shape)[0] == 0
    lost = five[-1]
    old = lost.client.cluster("MYID")
    lost.kill()
    shutil.rmtree(lost.folder)
    lost.folder.mkdir()
    lost.start()
    code, output = run(five, *shape)
    assert (code, output.count("PROBLEM"), output.count("replica of")) == (0, 0, 0), output
    assert f"localhost:{lost.port}: in place of an arbiter that is lost" in output
    known = lost.client.cluster("NODES")
    assert output.count("  arbiter ") == 2 and len(known) == 5 and old not in str(known), output


def test_partitions_move_to_a_new_primary_and_back_and_one_is_emptied(nodes):
    old = nodes(3)
    assert run(old, "form", "--primaries", "3")[0] == 1  # without replicas
    every = old + nodes(1)
    assert run(every, "form", "--primaries", "4")[0] == 1
    code, output = run(every, "place", IMAGEGRAM_PARTITIONS="16")
    assert code == 0 and "nothing was moved" in output
    assert every[3].client.cluster("NODES")[f"127.0.0.1:{every[3].port}"]["slots"] == []
    code, output = run(every, "place", "--yes", IMAGEGRAM_PARTITIONS="16")
    assert code == 0, output
    assert _partitions(every) == [4, 4, 4, 4]
    assert run(every, "place", IMAGEGRAM_PARTITIONS="16") == (0, "nothing to move\n")
    place = f"127.0.0.1:{every[3].port}"
    code, output = run(every, "place", "--yes", "--without", place, IMAGEGRAM_PARTITIONS="16")
    assert code == 0 and sorted(_partitions(every)) == [0, 5, 5, 6]
    assert every[3].client.cluster("NODES")[place]["slots"] == []
    for node in every:
        node.client.acl_setuser("mover", True, True, keys="*", commands=["+@all", "-cluster|getslotmigrations"])
    mover = url(every).replace("://", "://mover:any@")
    code, output = run(every, "place", "--yes", IMAGEGRAM_REDIS_URL=mover, IMAGEGRAM_PARTITIONS="16")
    assert code == 1 and "does not move slots: " in output and "Traceback" not in output, output


def _partitions(nodes) -> list[int]:
    counts = []
    for node in nodes:
        ((_, about),) = [(_, about) for _, about in node.client.cluster("NODES").items() if "myself" in about["flags"]]
        slots = {slot for pair in about["slots"] for slot in range(int(pair[0]), int(pair[-1]) + 1)}
        counts.append(len(topology.partitions_in(slots, 16)))
    return counts


def test_redis_is_not_asked_to_move_slots_key_by_key(nodes):
    old = nodes(3, "redis")
    assert run(old, "form", "--primaries", "2", "--arbiters", "1")[0] == 1
    place = f"127.0.0.1:{old[0].port}"
    code, output = run(old, "place", "--yes", "--without", place)
    assert code == 1 and "refused: " in output and "does not move slots: " in output
    assert old[0].client.cluster("NODES")[place]["slots"]


def test_slots_are_not_given_away_while_a_node_that_may_have_them_does_not_answer(nodes, monkeypatch):
    """It may be new, or have been restored: then it has slots and data of which the others do not know."""
    both = nodes(2)
    both[1].client.cluster("ADDSLOTSRANGE", 100, SLOTS - 1)
    both[1].kill()
    monkeypatch.setattr(forming, "FORM_SECONDS", 0.5)
    for held in ((), range(100)):
        if held:
            both[0].client.cluster("ADDSLOTS", *held)
        with pytest.raises(topology.Refused, match="when all nodes answer"):
            asyncio.run(forming.form(Cluster(url(both)), 2, 0))
        assert both[0].client.cluster("INFO")["cluster_slots_assigned"] == str(len(held))
    both[1].start()
    monkeypatch.undo()
    asyncio.run(forming.form(Cluster(url(both)), 2, 0))
    assert [len(node.client.cluster("SLOTS")) for node in both] == [2, 2]


def test_why_a_node_cannot_be_used_is_one_line(nodes):
    (single,) = nodes(1, "valkey", "--cluster-enabled", "no")
    for command in (["show"], ["form", "--primaries", "1"]):
        code, output = run([single], *command)
        assert code == 1 and "cluster support disabled" in output and "Traceback" not in output
    wrong = url([single]).replace("://", "://nobody:wrong@")
    code, output = run([single], "show", IMAGEGRAM_REDIS_URL=wrong)
    assert code == 1 and "username-password" in output and output.count("\n") == 1, output


async def test_two_forms_at_once_make_one_shape_which_is_shown_also_if_the_first_node_is_new(nodes):
    every = nodes(6)
    clients = [Cluster(url(every)) for _ in range(2)]
    reports = [[], []]
    forms = (forming.form(db, 3, 0, report.append) for db, report in zip(clients, reports, strict=True))
    for error in await asyncio.gather(*forms, return_exceptions=True):
        assert error is None or (isinstance(error, topology.Refused) and "already busy" in str(error)), error
    await forming.form(clients[0], 3, 0, lambda line: None)
    late = Cluster(url([*nodes(1), *every]))
    members = await topology.read(late)
    assert topology.problems(members, 16, 0) == [] and len(members) == 6
    for db in (*clients, late):
        await db.close()


def test_a_single_server_has_no_shape(tmp_path):
    command = [sys.executable, "-m", "storage", "cluster", "show"]
    done = subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}, text=True, capture_output=True, cwd=tmp_path)
    expected = "IMAGEGRAM_REDIS_URL names no Cluster: redis+cluster://host:port,host:port,…\n"
    assert (done.returncode, done.stderr) == (1, expected)
