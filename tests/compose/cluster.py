"""The walk with the profile `cluster`: a primary is killed, restarted, lost and replaced; new addresses; a restore."""

import json
import time

from tests.compose.engine import run
from tests.compose.walk import (
    WATCHDOG,
    Project,
    Writers,
    blocks,
    call,
    clone,
    kill,
    move,
    nothing_left,
    observe,
    print_figures,
    recovered,
    step,
    tokens,
    until,
)

NODES = [f"node{number}" for number in range(1, 7)]
SERVICES = ["redis", "api", "front", "worker", "form", *NODES, *(f"ship{number}" for number in range(1, 7))]


def walk(project: Project, again: Project) -> None:
    with step("clone, and up with the profile"):
        set_up(project)
    with step("Prometheus reaches all parts"):
        observe(project, shippers=len(NODES))
    writers = Writers(tokens(project))
    try:
        events = [kill(project, writers, part) for part in ("node1", "form", "ship1", "redis")]
        for node in NODES:
            with step(f"{node} restarted"):
                events.append(restart(project, writers, node))
    finally:
        with step("the last image"):
            writers.close()
    assert not writers.faults, writers.faults
    with step("everything acknowledged is there"):
        figures = writers.compare()
    with step("node1 lost, its replica takes its place"):
        replace(project, writers)
    with step("down, up, all at other addresses"):
        readdress(project)
        writers.compare()
    with step("restored in place"):
        assert "refused: " in project.fails("deploy/restore.sh --at 2001-01-01T00:00:00Z")
        project.shell("deploy/restore.sh")
        complete(project)
        writers.compare()
    with step("restored on a new machine, down, up"):
        move(project, again)
        writers.compare()
        again.compose("down")
        again.compose("up", "-d", "--wait")
        complete(again)
        writers.compare()
    with step("nothing is left"):
        again.compose("down", "-v")
        nothing_left()
    print_figures(writers, events, figures)


def set_up(project: Project) -> None:
    """Starts a new site with the variables of the docs."""
    clone(project.folder)
    secret, up = blocks("README.md", "docker compose up")[0].splitlines()
    project.shell(secret)
    variables, show, *_ = blocks("docs/production.md", "COMPOSE_PROFILES=cluster")
    with (project.folder / ".env").open("a") as settings:
        settings.write(f"{variables}\nIMAGEGRAM_WATCHDOG={WATCHDOG}\n")
    project.shell(up)
    status, _ = call("GET", "/readyz")
    assert status == 200, "the Cluster serves as soon as the command has returned"
    services = [json.loads(line) for line in project.compose("ps", "-a", "--format", "json").splitlines()]
    assert sorted(service["Service"] for service in services) == sorted(SERVICES)
    assert {service["State"] for service in services} == {"running"}
    assert project.shell(show.replace("exec", "exec -T")).count("replica") == 3


def complete(project: Project) -> None:
    """Asserts that the Cluster is as it was formed: `cluster show` fails for any problem."""
    shown = project.compose("exec", "-T", "api", "imagegram-storage", "cluster", "show")
    assert shown.count("replica") == 3, shown


def restart(project: Project, writers: Writers, node: str) -> tuple:
    """Restarts a node. A primary hands its slots over first."""
    pid, began = project.pid(node), time.monotonic()
    project.compose("restart", node)
    return recovered(project, writers, f"{node}, restarted", node, pid, began)


def replace(project: Project, writers: Writers) -> None:
    """Follows the commands of the docs. Then all data is there, and each shard takes writes."""
    *_, script = blocks("docs/production.md", "COMPOSE_PROFILES=cluster")[:3]
    killed, failover, back = script.splitlines()
    role = "docker compose exec -T node1 valkey-cli role"
    if not project.shell(role).startswith("master"):  # a restart of its replica came before the replica had all data
        project.shell("docker compose exec -T node1 valkey-cli cluster failover")
        until(lambda: project.shell(role).startswith("master"), 10, "node1 is a primary, as in a new Cluster")
    project.shell(killed)
    until(lambda: call("GET", "/v1/posts")[0] == 503, 10, "a page without a shard is refused")
    project.shell(failover.replace("exec", "exec -T"))
    # Each process of the API finds the new primary by itself.
    until(lambda: {call("GET", "/v1/posts")[0] for _ in range(20)} == {200}, 20, "the replica has taken over")
    writers.compare()
    project.shell(back)
    until(lambda: project.inspect("form")["State"]["Health"]["Status"] == "healthy", 60, "the Cluster is complete")
    complete(project)


def readdress(project: Project) -> None:
    """Ends all containers. Gives their addresses to others, and starts them again."""

    def addresses() -> dict[str, str]:
        return {
            node: network["IPAddress"]
            for node in NODES
            for network in project.inspect(node)["NetworkSettings"]["Networks"].values()
        }

    before = addresses()
    (network,) = project.inspect("node1")["NetworkSettings"]["Networks"]
    image = project.inspect("redis")["Config"]["Image"]
    project.compose("down")
    project.compose("up", "-d", "redis")  # makes the network
    placeholders = []
    try:
        for _ in range(20):
            idle = ["--rm", "--network", network, "--entrypoint", "sleep", image, "600"]
            placeholders.append(run("docker", "run", "-d", *idle).strip())
        project.compose("up", "-d", "--wait")
        assert not set(before.values()) & set(addresses().values())
        complete(project)
    finally:
        run("docker", "rm", "-f", "-v", *placeholders)
