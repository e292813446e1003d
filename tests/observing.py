"""A whole site with a real Prometheus that scrapes it as deploy/observe/ says, and people who use the site."""

import contextlib
import json
import random
import shutil
import subprocess
import threading
from pathlib import Path

import httpx
import yaml
from conftest import NOBODY, ROOT, Site, create_post, free_port, photograph, until, wait_until_processed

OBSERVE = ROOT / "deploy" / "observe"
ALERTS = [rule for group in yaml.safe_load((OBSERVE / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
PANELS = json.loads((OBSERVE / "grafana" / "imagegram.json").read_text())["panels"]
TUS = {"Tus-Resumable": "1.0.0"}


class Prometheus:
    """Debian's Prometheus with the configuration of deploy/observe/, and with other addresses and intervals."""

    def __init__(self, folder: Path, interval: str, **targets: int):
        """`targets`: the port of each job, on 127.0.0.1."""
        configuration = yaml.safe_load((OBSERVE / "prometheus.yml").read_text())
        configuration["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), interval)
        for job in configuration["scrape_configs"]:
            assert [each["names"] for each in job.pop("dns_sd_configs")] == [[job["job_name"]]]
            job["static_configs"] = [{"targets": [f"127.0.0.1:{targets[job['job_name']]}"]}]
        folder.mkdir()
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        shutil.copy(OBSERVE / "alerts.yml", folder)
        self.url = f"http://127.0.0.1:{(port := free_port())}/api/v1"
        options = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "data"}
        options["web.listen-address"] = f"127.0.0.1:{port}"
        self.log = (folder / "log").open("w")
        command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def get(self, path: str, **parameters) -> dict:
        answer = httpx.get(f"{self.url}/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def up(self) -> set[str]:
        """The jobs whose last scrape succeeded."""
        targets = self.get("targets")["activeTargets"]
        return {target["labels"]["job"] for target in targets if target["health"] == "up"}

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)
        self.log.close()


@contextlib.contextmanager
def observed(folder: Path, interval: str, **settings: object):
    """A site with Redis, API, worker and shipper, and its Prometheus. The shipper makes trial restores all the time."""
    ports = {"worker": free_port(), "ship": free_port()}
    site = Site("", folder / "data", worker_metrics=ports["worker"], ship_metrics=ports["ship"], **settings)
    del site.environment["IMAGEGRAM_REDIS_URL"]  # the default: the server in the data folder
    prometheus = Prometheus(folder / "prometheus", interval, api=site.port, **ports)
    try:
        site.start("storage", "redis")
        site.start("storage", "ship")
        site.worker()
        site.api()
        yield site, prometheus
    finally:
        site.close()
        prometheus.close()


class People:
    """Threads that use a site until `close`: they read, comment, upload in two pieces, and ask for what is missing."""

    def __init__(self, site, count: int, pause: float):
        self.site, self.pause, self.ended = site, pause, threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(f"user{n}",)) for n in range(count)]
        for thread in self.threads:
            thread.start()

    def run(self, user: str) -> None:
        with self.site.client(user) as client, contextlib.suppress(httpx.TransportError):
            post = wait_until_processed(client, create_post(client, photograph()))["id"]
            while not self.ended.wait(random.uniform(0, 2 * self.pause)):
                self.act(client, post)

    def act(self, client, post: str) -> None:
        client.get("/v1/posts")
        client.get(f"/v1/posts/{post}")
        client.post(f"/v1/posts/{post}/comments", json={"text": "Hello"})
        if random.random() < 0.1:
            client.get(f"/v1/posts/{NOBODY}")
        if random.random() < 0.1:
            self.upload(client)

    def upload(self, client) -> None:
        image = photograph()
        location = client.post("/v1/uploads", headers={**TUS, "Upload-Length": str(len(image))}).headers["Location"]
        for start, end in ((0, 20_000), (20_000, len(image))):
            headers = {**TUS, "Upload-Offset": str(start), "Content-Type": "application/offset+octet-stream"}
            client.patch(location, headers=headers, content=image[start:end])
        client.post("/v1/posts", json={"upload": location.rpartition("/")[2]})

    def close(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()


def queries() -> list[tuple[str, str]]:
    """The title and the expression of each query of the dashboard."""
    return [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


def wait_for_a_trial(prometheus: Prometheus) -> None:
    def tried() -> bool:
        return bool(prometheus.get("query", query="imagegram_backup_trial_ok == 1")["result"])

    until(tried, 30, "a trial restore")
