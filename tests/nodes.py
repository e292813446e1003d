"""Two nodes of the API behind Debian's HAProxy, with deploy/haproxy.cfg. The store is S3: they share no folder."""

import contextlib
import subprocess
from pathlib import Path

import parts
import pytest
from conftest import ROOT, Site, free_port, until
from wire import exchange, head


class Front:
    """HAProxy before the nodes of a site."""

    def __init__(self, folder, *nodes: Site):
        self.port, self.token = free_port(), nodes[0].token
        self.url = f"http://127.0.0.1:{self.port}"
        conf = (ROOT / "deploy" / "haproxy.cfg").read_text()
        for deployed, tested, count in [
            ("bind :8080", f"bind 127.0.0.1:{self.port}", 1),
            ("inter 2s fastinter 500ms", "inter 100ms", 2),
            *((f"api{n}:8000", f"127.0.0.1:{node.port}", 3) for n, node in enumerate(nodes, 1)),
        ]:
            assert conf.count(deployed) == count
            conf = conf.replace(deployed, tested)
        (folder / "haproxy.cfg").write_text(conf)
        self.process = subprocess.Popen(["/usr/sbin/haproxy", "-f", folder / "haproxy.cfg"])
        until(lambda: exchange(self.port, head("GET", "/healthz")).status == 200, what="HAProxy")

    client = Site.client

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@contextlib.contextmanager
def running_nodes(server, folder: Path, **settings: object):
    """HAProxy, and behind it two nodes, each with an API and a worker. They are in `nodes` of what this yields."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as running:
        shared = {"store": parts.s3_url(patch), "proxies": 1, **settings}
        nodes = [Site(server.url, folder / str(number), **shared) for number in range(2)]
        for node in nodes:
            running.callback(node.close)
            node.folder.mkdir()
            node.api()
            node.worker()
        front = Front(folder, *nodes)
        running.callback(front.close)
        front.nodes = nodes
        yield front


def restart(front: Front, number: int) -> None:
    """Stops the API of a node by SIGTERM, and starts it again. Returns when it is ready."""
    node = front.nodes[number]
    stopped = node.processes[0]
    stopped.terminate()
    assert stopped.wait(30) == 0
    node.processes[0] = node.api()
    node.processes.pop()
