"""The backup of a Cluster: each node is shipped, and any second can be restored, across a failover and a migration."""

import asyncio
import json
import re
import time
from argparse import Namespace
from dataclasses import replace

import pytest
from clusters import ClusterNode, ClusterServer
from parts import redis_on, shipped, until
from shards import History, read_folders, read_restored, settings_in, shipping_all, writing_to

from storage.backup import chain, owners, retain, ship, snapshots, state
from storage.backup.restore import Refused
from storage.backup.shards import restore_all, running
from storage.backup.verify import last_result, verify
from storage.db import topology
from storage.objects import Below, open_store


async def next_second() -> int:
    """Waits for the end of this second, and of the next one. Returns the latter."""
    second = int(time.time()) + 1
    await until(lambda: time.time() > second + 1.05, "the end of a second")
    return second


async def migrate(source, target, partition: int) -> None:
    slot = topology.partition_slot(partition)
    source.client.execute_command(*topology.command(target.client.cluster("MYID"), [slot]))
    await until(lambda: not source.client.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot), "the slot was moved")


async def test_a_cluster_is_restored_to_any_second_across_a_migration_and_a_failover(tmp_path):
    cluster = await asyncio.to_thread(ClusterServer, "valkey", 2, 1)
    settings, history = replace(settings_in(tmp_path, "valkey"), replicas=1), History()
    store = open_store(settings.backup_store_url)
    try:
        async with writing_to(cluster, settings, history), shipping_all(cluster, settings) as shippers:
            for shipper in shippers:
                await shipped(shipper)
            await next_second()
            await migrate(cluster.nodes[0], cluster.nodes[1], 0)
            shippers[1].stop.set()  # as if the machine were lost: the last seconds of this primary are not shipped
            lost = await next_second() - 1
            cluster.nodes[1].kill()
            cluster.nodes[3].client.cluster("FAILOVER", "TAKEOVER")
            promoted = await next_second()
            history.stopping = True
            for number in (0, 3):
                await shipped(shippers[number])
                cluster.nodes[number].client.bgrewriteaof()
                await until(lambda one=shippers[number]: one.chain.generation == 2, "a second generation")
        lines = []
        found = await read_restored(settings, "valkey", tmp_path / "lost", lost, lines.append)
        assert history.compare(found, lost) == (0, 0) and sum(map(len, found.values())) > 50
        assert "was its replica then, and has more" in "".join(lines)
        replica = cluster.nodes[2].client.cluster("MYID")
        assert await verify(settings, store, lines.append, replica), "a replica's own chain"
        assert (await last_result(Below(store, replica)))["good"] == 1
        table = await snapshots.cluster_table(store, state.read(settings), None)
        assert f"node {replica}: replica of {cluster.nodes[0].client.cluster('MYID')} since" in table
        assert table.count("open    valkey") == 4 and table.count("0 h ago: generation 1 restored") == 1
        with pytest.raises(Refused, match="the oldest second kept of the whole Cluster is"):
            await restore_all(settings, store, tmp_path / "early", lost - 3600)
        assert not (tmp_path / "early").exists()
        # As of a backup that is so old that only its bases are kept: they are from before the slot was moved.
        await store.delete([entry.name async for entry in store.list() if re.search("/00000001/.*incr", entry.name)])
        old = await restore_all(settings, store, tmp_path / "old", promoted, lines.append)
        assert not old.exact and any("NOT EXACT" in line for line in lines)
        assert set(await read_folders(settings, tmp_path / "old")) == set(history.posts)
    finally:
        cluster.close()


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_a_restored_node_owns_its_slots_and_keeps_its_keys_when_it_meets_others(kind, tmp_path, monkeypatch):
    """Slots of partitions without keys, too, and the last slots, which an arbiter had, stay free.

    Before, the only primary's shipper has started a trial of its own chain, and one of the whole Cluster.
    """
    folder = tmp_path / "node"
    node = ClusterNode(kind, folder)
    settings, history = replace(settings_in(tmp_path, kind), verify_every=kind == "valkey"), History()
    store, identity = open_store(settings.backup_store_url), node.client.cluster("MYID")
    for name in ("store", "backup_store", "redis_server"):
        value = getattr(settings, name, None) or getattr(settings, f"{name}_url", "")
        monkeypatch.setenv(f"IMAGEGRAM_{name.upper()}", value)
    monkeypatch.setenv("IMAGEGRAM_DATA", str(settings.data))
    try:
        node.client.cluster("ADDSLOTSRANGE", 0, 16375)
        await until(lambda: node.client.cluster("INFO")["cluster_state"] == "ok", "the node serves its slots")
        cluster = Namespace(nodes=[node], url=f"redis+cluster://127.0.0.1:{node.port}")
        async with shipping_all(cluster, settings) as shippers, writing_to(cluster, settings, history, 1):
            for place in (Below(store, identity), store) if settings.verify_every else ():
                result = await until(lambda place=place: last_result(place), "a trial", 40)
                assert result["ok"] and result["shards"] == (place is store), result
            await shipped(shippers[0])
    finally:
        node.kill()
    await restore_all(settings, store, tmp_path / "to")
    nodes = [ClusterNode(kind, tmp_path / "to" / "1"), ClusterNode(kind, tmp_path / "empty")]
    try:
        count = nodes[0].client.dbsize()
        nodes[1].client.cluster("MEET", "127.0.0.1", nodes[0].port)
        await until(lambda: nodes[1].client.cluster("SLOTS"), "the other node knows who has the slots")
        assert nodes[0].client.dbsize() == count > 16
        for known in nodes:
            assert [row[:2] for row in known.client.cluster("SLOTS")] == [[0, 16375]]
        assert nodes[0].client.cluster("INFO")["cluster_my_epoch"] > "0"
        assert {name.split(":")[1] for name in nodes[0].client.keys("epoch:*")} == {f"{{{n}}}" for n in range(16)}
    finally:
        for one in nodes:
            one.kill()


async def test_a_base_that_was_written_while_slots_were_moved_to_the_node_is_loaded(tmp_path):
    cluster = await asyncio.to_thread(ClusterServer, "valkey", 2, 0)
    source, target = cluster.nodes
    try:
        for number in range(300):
            source.client.set(f"{number}{{0}}", "moved")
        target.client.set("own{1}", "kept")
        source.client.config_set("rdb-key-save-delay", "3000")  # microseconds: the move takes a second
        source.client.execute_command(*topology.command(target.client.cluster("MYID"), [topology.partition_slot(0)]))

        def moving(state: str) -> bool:
            return state in str(target.client.execute_command("CLUSTER", "GETSLOTMIGRATIONS"))

        await until(lambda: moving("receiving-snapshot"), "a part of the slot has come")
        target.client.bgrewriteaof()
        await until(lambda: len(list(target.folder.glob("appendonlydir/*.2.base.rdb"))), "the base")
        assert moving("receiving-snapshot")
        await until(lambda: moving("success"), "the slot was moved")
    finally:
        for node in cluster.nodes:
            node.kill()
    (target.folder / "nodes.conf").unlink()
    (target.folder / "server").write_text("valkey 9.1.2\n")
    async with running(settings_in(tmp_path, "valkey"), target.folder) as client:
        assert await client.dbsize() == 301
    cluster.close()


A, B, C = "a" * 40, "b" * 40, "c" * 40


def record(looked: float, seen: float, epoch: int, *slots: tuple[int, int], follows: str = "") -> owners.Record:
    return {"looked": looked, "seen": seen, "follows": follows, "epoch": epoch, "slots": list(slots)}


@pytest.mark.parametrize(
    "end, slot_0, slot_9",
    [
        (50, (A,), (A,)),
        (100.5, (A, B), (A,)),  # slot 0 was moved between the two looks
        (150, (B,), (A,)),
        (199.5, (B,), (C,)),  # C was promoted between the two looks, and A's record still says that it is its own
        (250, (B,), (C,)),
    ],
)
def test_the_chain_that_has_a_slot_at_a_second_follows_from_the_records(end, slot_0, slot_9):
    records = {
        A: [record(10, 10, 1, (0, 99)), record(100, 101, 1, (1, 99))],
        B: [record(10, 10, 2, (100, 16383)), record(100, 101, 2, (0, 0), (100, 16383))],
        C: [record(10, 10, 1, follows=A), record(199, 200, 3, (1, 99))],
    }
    found = owners.candidates(records, end, set(records))
    assert (found[0], found[9], found[200]) == (slot_0, slot_9, (B,))


def test_a_slot_whose_node_has_no_record_of_it_may_be_in_any_primary_that_has_data_of_then():
    records = {
        A: [record(10, 10, 1, (0, 99)), record(100, 101, 1, (1, 99))],
        B: [record(10, 10, 2, (100, 16375))],
        C: [record(10, 10, 3, (16376, 16383))],  # an arbiter
    }
    found = owners.candidates(records, 200, {A, B})
    assert (found[0], found[1], found[16380]) == ((A, B), (A,), ())
    assert owners.known_from(records, 200) == 200


def test_before_all_nodes_were_recorded_it_is_not_known_who_had_what():
    records = {A: [record(10, 10, 1, (0, 99))], B: [record(20, 20, 2, (100, 16383))]}
    assert owners.known_from(records, 15) == 20
    records[A].append(record(30, 31, 1, (0, 50)))
    records[C] = [record(40, 40, 3, (51, 99))]  # a node that was added: it got the slots from A
    assert owners.known_from(records, 25) == 25


async def test_records_go_when_no_backup_needs_them_and_a_node_that_left_when_no_backup_of_then_is_kept(tmp_path):
    settings = replace(settings_in(tmp_path, "valkey"), keep_seconds=0, keep_days=0)
    store = open_store(settings.backup_store_url)
    for node in (A, B):
        for seen in (10, 20, 30):
            one = record(seen, seen, 1, (0, seen))
            await store.create(owners.name(node, one), owners.encode(one))
        await store.create(f"{node}/{chain.description_name(1)}", chain.seal({"second": 25}))
    view = owners.view(f"{A} 127.0.0.1:1@2 myself,master - 0 0 1 connected 0-30\n")
    await retain.remove_old_records(store, view)
    assert [one["seen"] for one in (await owners.read(store))[A]] == [20, 30]
    assert [one["second"] for one in await retain.descriptions_of_all(store)] == [25, 25]
    for ok in (False, True):
        assert B in await owners.nodes(store)
        await store.put("verified", json.dumps({"time": time.time() + 60, "ok": ok, "good": 0}).encode())
        await retain.remove_gone_nodes(store, settings, {A})
    assert set(await owners.nodes(store)) == {A} and not [entry async for entry in store.list(f"{B}/")]


async def test_a_shipper_of_a_cluster_must_know_its_node_and_a_server_that_is_no_node_is_refused(tmp_path):
    settings = settings_in(tmp_path, "valkey")
    with pytest.raises(SystemExit, match="IMAGEGRAM_REDIS_NODE"):
        ship.main(replace(settings, redis_url="redis+cluster://127.0.0.1:1"))
    store = open_store(settings.backup_store_url)
    async with redis_on(settings):
        with pytest.raises(ship.Stopped, match="no node of a Cluster"):
            await ship.Shipper(replace(settings, redis_node=("127.0.0.1", 1)), store).run()
    assert not [entry async for entry in store.list()]
