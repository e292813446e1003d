"""deploy/k8s/: what kubectl renders is valid, safe, closed to those who need nothing of it, and starts what tests run.

There is no Kubernetes here. The containers' own commands run with their own variables, on real servers.
"""

import base64
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import defaultdict
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import kubernetes_validate
import pytest
import redis
import yaml
from clusters import cluster_port
from conftest import ROOT, SERVERS, application, until
from making import make_post, publish
from redis.backoff import NoBackoff
from redis.retry import Retry
from test_deploy import known_settings
from test_docs import BLOCK, section, shell

from deploy.cluster import SHAPES
from storage import check, comments, metrics, posts, settings
from storage.db import forming
from storage.db.cluster import Cluster
from storage.objects import open_store
from storage.retry import retry
from storage.sweep import sweep
from workers.__main__ import STOP_GRACE

K8S = ROOT / "deploy" / "k8s"
OVERLAYS = ("small", "cluster")
OLDEST = "1.29"  # the version that docs/production.md names
COMPONENT = "app.kubernetes.io/component"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PRODUCTION = (ROOT / "docs" / "production.md").read_text()
SCRIPTS = ConfigParser()
SCRIPTS.read(ROOT / "setup.cfg")
# kubectl is in the venv. Debian 12 has one from 2021, which knows less of kustomize.
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
# Secrets that an operator creates besides those of secrets.sh: a certificate, and keys of the object store.
NEVER = Retry(NoBackoff(), 0)  # redis-py would repeat a refused password for seconds
OTHERS = {"tls", "s3-api", "s3-worker", "s3-ship", "s3-operator"}

each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@cache
def rendered(overlay: str) -> list[dict]:
    """What `kubectl apply -k` would send."""
    return list(yaml.safe_load_all(kustomize(K8S / "overlays" / overlay)))


def kustomize(folder: Path) -> str:
    done = subprocess.run(["kubectl", "kustomize", folder], env=ENVIRONMENT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def secrets() -> dict[str, dict[str, str]]:
    """The Secrets that secrets.sh prints, decoded: name → key → text."""
    done = subprocess.run([K8S / "secrets.sh"], env=ENVIRONMENT, text=True, capture_output=True, check=True)
    made = filter(None, yaml.safe_load_all(done.stdout))
    return {
        one["metadata"]["name"]: {key: base64.b64decode(value).decode() for key, value in one["data"].items()}
        for one in made
    }


def of_kind(overlay: str, *kinds: str) -> dict[str, dict]:
    return {one["metadata"]["name"]: one for one in rendered(overlay) if one["kind"] in kinds}


def pods(overlay: str) -> dict[str, dict]:
    """The pod templates by the names of what makes the pods: `metadata` and `spec` of each."""
    found = {name: one["spec"]["template"] for name, one in of_kind(overlay, "Deployment", "StatefulSet").items()}
    jobs = of_kind(overlay, "CronJob").items()
    return found | {name: one["spec"]["jobTemplate"]["spec"]["template"] for name, one in jobs}


def containers(overlay: str) -> list[tuple[str, dict]]:
    """All containers, with the name of what makes their pod."""
    return [(name, one) for name, pod in pods(overlay).items() for one in pod["spec"]["containers"]]


def ours(overlay: str) -> list[tuple[str, dict]]:
    return [(name, one) for name, one in containers(overlay) if "imagegram" in one["image"]]


def variables(overlay: str, container: dict) -> dict[str, str]:
    """The environment of a container, as the kubelet makes it: $(NAME) only of variables above, not of envFrom."""
    maps = of_kind(overlay, "ConfigMap")
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        if "configMapRef" in source:
            found |= maps[source["configMapRef"]["name"]]["data"]
        else:
            assert source["secretRef"]["name"] in OTHERS and source["secretRef"]["optional"]
    above: dict[str, str] = {}
    for one in container.get("env", ()):
        if source := one.get("valueFrom"):
            if key := source.get("secretKeyRef"):
                above[one["name"]] = secrets()[key["name"]][key["key"]]
            elif key := source.get("configMapKeyRef"):
                above[one["name"]] = maps[key["name"]]["data"][key["key"]]
            else:
                assert source["fieldRef"]["fieldPath"] == "status.podIP"
                above[one["name"]] = "127.0.0.1"
        else:
            above[one["name"]] = expanded(one["value"], above)
    return found | above


def expanded(text: str, known: dict[str, str]) -> str:
    return re.sub(r"\$\((\w+)\)", lambda found: known[found[1]], text)


def image_variables() -> dict[str, str]:
    """What the Dockerfile sets."""
    text = re.search(r"^ENV ((?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)[1].replace("\\\n", "")
    return dict(part.split("=", 1) for part in text.split())


def chosen(overlay: str, container: dict) -> settings.Settings:
    return settings.load(image_variables() | variables(overlay, container))


def matches(selector: dict, labels: dict) -> bool:
    """Whether a label selector of Kubernetes selects these labels."""
    wanted = all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())
    rules = selector.get("matchExpressions", ())
    assert all(rule["operator"] == "In" for rule in rules)
    return wanted and all(labels.get(rule["key"]) in rule["values"] for rule in rules)


# What Kubernetes accepts


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
def test_kubernetes_accepts_every_object(version):
    assert f"Kubernetes {OLDEST} or newer" in PRODUCTION
    both = {yaml.dump(one): one for overlay in OVERLAYS for one in rendered(overlay)}
    assert len(both) > 30
    for one in both.values():
        kubernetes_validate.validate(one, version, strict=True)


@each_overlay
def test_every_name_that_an_object_refers_to_exists(overlay):
    maps, services = of_kind(overlay, "ConfigMap"), of_kind(overlay, "Service")
    for name, pod in pods(overlay).items():
        volumes = {one["name"]: one for one in pod["spec"].get("volumes", ())}
        claims = of_kind(overlay, "StatefulSet").get(name, {"spec": {}})["spec"].get("volumeClaimTemplates", ())
        mounted = set()
        for container in pod["spec"]["containers"]:
            mounted |= {one["name"] for one in container["volumeMounts"]}
            variables(overlay, container)  # KeyError for a name that does not exist
        assert mounted == set(volumes) | {one["metadata"]["name"] for one in claims}
        for volume in volumes.values():
            for source in [volume, *volume.get("projected", {}).get("sources", ())]:
                if "configMap" in source:
                    assert source["configMap"]["name"] in maps
                if secret := source.get("secret"):
                    made = secrets()[secret.get("secretName") or secret["name"]]
                    assert {one["key"] for one in secret.get("items", ())} <= set(made)
    for one in of_kind(overlay, "StatefulSet").values():
        service = services[one["spec"]["serviceName"]]["spec"]
        assert service["clusterIP"] == "None" and service["publishNotReadyAddresses"], "a name for each pod, at once"
    for one in of_kind(overlay, "HorizontalPodAutoscaler").values():
        target = of_kind(overlay, one["spec"]["scaleTargetRef"]["kind"])[one["spec"]["scaleTargetRef"]["name"]]
        assert "replicas" not in target["spec"], "each apply would undo the autoscaler"
    ingress = of_kind(overlay, "Ingress")["api"]["spec"]
    for path in ingress["rules"][0]["http"]["paths"]:
        service = path["backend"]["service"]
        assert service["port"]["name"] in [port["name"] for port in services[service["name"]]["spec"]["ports"]]
    assert {one["secretName"] for one in ingress["tls"]} <= OTHERS


@each_overlay
def test_each_selector_selects_the_pods_of_one_component(overlay):
    labels = {name: pod["metadata"]["labels"] for name, pod in pods(overlay).items()}
    for name, one in of_kind(overlay, "Deployment", "StatefulSet").items():
        assert [other for other in labels if matches(one["spec"]["selector"], labels[other])] == [name]
    budgets = of_kind(overlay, "PodDisruptionBudget")
    selectors = [(name, one["spec"]["selector"]) for name, one in budgets.items()]
    selectors += [(name, {"matchLabels": one["spec"]["selector"]}) for name, one in of_kind(overlay, "Service").items()]
    for name, selector in selectors:
        assert {labels[other][COMPONENT] for other in labels if matches(selector, labels[other])} == {name}
    for name, service in of_kind(overlay, "Service").items():
        offered = [
            pod["spec"]["containers"] for other, pod in pods(overlay).items() if labels[other][COMPONENT] == name
        ]
        for port in service["spec"]["ports"]:
            for group in offered:
                assert port["port"] in [one["containerPort"] for each in group for one in each["ports"]]


# Where the nodes of Redis are


def nodes(overlay: str) -> list[str]:
    (found,) = [one["data"] for name, one in of_kind(overlay, "ConfigMap").items() if name.startswith("cluster-")]
    return found["nodes"].split(",")


def zones(statefulset: dict) -> list[str]:
    node = statefulset["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = node["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    (rule,) = term["matchExpressions"]
    assert (rule["key"], rule["operator"]) == ("topology.kubernetes.io/zone", "In")
    return rule["values"]


@each_overlay
def test_the_pods_of_redis_are_the_nodes_and_have_the_shape_of_make_cluster(overlay):
    named = [
        f"{name}-{number}.{one['spec']['serviceName']}:6379"
        for name, one in of_kind(overlay, "StatefulSet").items()
        for number in range(one["spec"]["replicas"])
    ]
    assert sorted(named) == sorted(nodes(overlay))
    shape = SHAPES[overlay]
    assert len(named) == shape.primaries + shape.replicas + shape.arbiters
    pod = pods(overlay)["form"]["spec"]["containers"][0]
    arguments = [expanded(one, variables(overlay, pod)) for one in pod["args"]]
    assert arguments[2:] == ["--primaries", str(shape.primaries), "--arbiters", str(shape.arbiters), "--home"]
    assert chosen(overlay, pod).partitions == shape.partitions


@each_overlay
def test_no_zone_has_two_nodes_of_a_shard_or_two_primaries(overlay):
    """`cluster form` takes the first nodes as primaries, and gives the next ones to them in turn."""
    shape = SHAPES[overlay]
    where = {name: zones(one) for name, one in of_kind(overlay, "StatefulSet").items()}
    holding = [where[node.rpartition("-")[0]] for node in nodes(overlay)[: shape.primaries + shape.replicas]]
    shards = defaultdict(set)
    for number, (zone,) in enumerate(holding):
        shards[number % shape.primaries].add(zone)
    assert [len(found) for found in shards.values()] == [3] * shape.primaries
    assert len({zone for (zone,) in holding[: shape.primaries]}) == shape.primaries
    if shape.arbiters:
        assert [node.startswith("arbiter-") for node in nodes(overlay)[-shape.arbiters :]] == [True, True]
        assert set(where["arbiter"]).isdisjoint(holding[0]) and len(where["arbiter"]) == shape.arbiters
        affinity = pods(overlay)["arbiter"]["spec"]["affinity"]["podAntiAffinity"]
        (apart,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
        assert apart["topologyKey"] == "topology.kubernetes.io/zone"
        assert matches(apart["labelSelector"], pods(overlay)["arbiter"]["metadata"]["labels"])
        assert not matches(apart["labelSelector"], pods(overlay)["redis-b"]["metadata"]["labels"])


def test_the_tests_of_this_file_read_selectors_as_kubernetes_does():
    selector = {"matchLabels": {"a": "1"}, "matchExpressions": [{"key": "b", "operator": "In", "values": ["2", "3"]}]}
    given = ({"a": "1", "b": "3"}, {"a": "1"}, {"b": "2"}, {"a": "1", "b": "4"})
    assert [matches(selector, labels) for labels in given] == [True, False, False, False] and matches({}, {})


# What the containers run


@each_overlay
def test_every_command_is_one_of_the_products(overlay, monkeypatch, capsys):
    """argparse accepts the arguments before --help, and refuses what it does not know."""
    programs = dict(re.findall(r"^(\S+) = (\S+)$", SCRIPTS["options.entry_points"]["console_scripts"], re.MULTILINE))
    run = set()
    for _, container in ours(overlay):
        arguments = [expanded(one, variables(overlay, container)) for one in container.get("args", ())]
        program, *rest = container["command"] + arguments
        module = importlib.import_module(programs[program].partition(":")[0])
        monkeypatch.setattr(sys, "argv", [program, *rest, "--help"])
        with pytest.raises(SystemExit) as end:
            getattr(module, "run", module.main)()
        assert end.value.code == 0, capsys.readouterr().err
        run.add(" ".join([program, *rest]).partition(" --")[0])
    storing = {f"imagegram-storage {verb}" for verb in ("ship", "cluster form", "check", "sweep", "verify")}
    assert run == {"imagegram-api", "imagegram-worker"} | storing


@each_overlay
def test_every_setting_exists_and_its_value_is_accepted(overlay):
    for name, container in ours(overlay):
        given = variables(overlay, container)
        unknown = {variable for variable in given if variable.startswith("IMAGEGRAM_")} - known_settings()
        assert not unknown, name
        found = chosen(overlay, container)
        assert found.store_url.startswith("s3://") and found.backup_store_url.startswith("s3://")
        assert re.fullmatch(r"redis\+cluster://(\w+):[\w-]{43}@(.*)", found.redis_url)[2] == ",".join(nodes(overlay))
        assert re.fullmatch(r"redis://(worker:[\w-]{43}@)?queue:6379", found.queue_url)
        assert found.redis_url.startswith(f"redis+cluster://{container['name']}:"), "each part has its own user"
        assert bool(found.jwt_secret) == (container["name"] == "api")
        assert found.replicas == 1 and found.log == "json"


def test_a_sign_of_a_variable_that_kubernetes_would_not_expand_is_found():
    with pytest.raises(KeyError):
        expanded("redis://$(PASSWORD)@queue", {})


@each_overlay
def test_probes_ask_for_what_there_is(overlay):
    routes = {f"/{route.path}" for route in application().router.routes}
    for name, container in containers(overlay):
        probes = {kind: probe for kind, probe in container.items() if kind.endswith("Probe")}
        for probe in probes.values():
            if asked := probe.get("httpGet"):
                assert asked["path"] in routes
                assert asked["port"] in [port["name"] for port in container["ports"]]
        if name == "api":
            paths = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
            assert paths == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
            assert probes["livenessProbe"]["periodSeconds"] * probes["livenessProbe"]["failureThreshold"] > 30
            (port,) = container["ports"]
            assert chosen(overlay, container).port == port["containerPort"]
        elif "valkey" in container["image"]:
            assert "readinessProbe" in probes and "livenessProbe" in probes
        else:  # they serve no requests. Their watchdogs kill them when they hang
            assert not probes
            ports = {port["name"]: port["containerPort"] for port in container.get("ports", ())}
            found = chosen(overlay, container)
            served = {"worker": found.worker_metrics, "ship": found.ship_metrics}
            assert ports == {part: place[1] for part, place in served.items() if place}
            assert all(place[0] == "0.0.0.0" for place in served.values() if place)


@each_overlay
def test_what_a_watchdog_watches_is_not_process_1(overlay):
    for name, pod in pods(overlay).items():
        watched = any(
            one["command"][-1] in ("imagegram-api", "imagegram-worker", "ship") for one in pod["spec"]["containers"]
        )
        assert pod["spec"].get("shareProcessNamespace", False) or not watched, name


@each_overlay
def test_pods_have_the_time_that_their_end_takes(overlay):
    every = pods(overlay)
    api = every["api"]["spec"]
    pause = int(api["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    patience = application().config.GRACEFUL_SHUTDOWN_TIMEOUT
    assert pause + patience < api["terminationGracePeriodSeconds"]
    assert every["worker"]["spec"]["terminationGracePeriodSeconds"] > STOP_GRACE + 5
    for name in of_kind(overlay, "StatefulSet"):
        assert every[name]["spec"]["terminationGracePeriodSeconds"] >= 60
    rolling = of_kind(overlay, "Deployment")["api"]["spec"]["strategy"]["rollingUpdate"]
    assert rolling["maxUnavailable"] == 0


@each_overlay
def test_images_are_those_of_compose_and_ours_is_named_in_the_overlay(overlay):
    assert {one["image"] for _, one in containers(overlay)} == {
        COMPOSE["redis"]["image"],
        "registry.example/imagegram:0.1.0",
    }


@each_overlay
def test_the_ingress_has_the_limits_of_nginx_and_shows_all_but_what_is_for_the_operator(overlay):
    ingress = of_kind(overlay, "Ingress")["api"]
    said = {name.rpartition("/")[2]: value for name, value in ingress["metadata"]["annotations"].items()}
    conf = (ROOT / "deploy" / "nginx.conf").read_text()
    for name in ("request_buffering", "connect_timeout", "send_timeout", "read_timeout"):
        value = re.search(rf"proxy_{name} (\w+?)s?;", conf)[1]
        assert said[f"proxy-{name.replace('_', '-')}"] == value
    assert said["proxy-body-size"] == re.search(r"client_max_body_size (\w+);", conf)[1]
    paths = ingress["spec"]["rules"][0]["http"]["paths"]
    hidden = set()
    for route in application().router.routes:
        path = f"/{route.path}"
        if not any(
            path == one["path"] or (one["pathType"] == "Prefix" and path.startswith(f"{one['path']}/")) for one in paths
        ):
            hidden.add(path)
    assert hidden == {"/metrics", "/healthz", "/readyz"}


def test_the_autoscaler_of_workers_asks_for_a_metric_that_the_adapter_makes_of_one_that_exists():
    (metric,) = of_kind("small", "HorizontalPodAutoscaler")["worker"]["spec"]["metrics"]
    asked = metric["external"]["metric"]
    (rule,) = yaml.safe_load((K8S / "observe" / "adapter.yml").read_text())["externalRules"]
    assert rule["name"]["as"] == asked["name"] == metrics.OLDEST.name
    assert asked["selector"]["matchLabels"] == {"queue": "images"} and metrics.OLDEST.labels == ("queue",)
    assert rule["seriesQuery"] == f'{metrics.OLDEST.name}{{queue="images"}}'


def test_prometheus_has_a_job_for_each_part_and_scrapes_their_ports(tmp_path):
    text = (K8S / "observe" / "prometheus.yml").read_text()
    # Debian's promtool does not know Kubernetes.
    checked = re.sub(r"kubernetes_sd_configs: .*", "static_configs: [{targets: [x]}]", text)
    (tmp_path / "prometheus.yml").write_text(checked)
    done = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", tmp_path / "prometheus.yml"], capture_output=True
    )
    assert done.returncode == 0, done.stdout
    jobs = {one["job_name"]: one for one in yaml.safe_load(text)["scrape_configs"]}
    ours_too = yaml.safe_load((ROOT / "deploy" / "observe" / "prometheus.yml").read_text())["scrape_configs"]
    assert set(jobs) == {one["job_name"] for one in ours_too}
    ports = {name: port for _, one in containers("small") for port in one.get("ports", ()) for name in [port["name"]]}
    kept = {name: one["relabel_configs"][0]["regex"] for name, one in jobs.items()}
    assert {name: ports[port]["containerPort"] for name, port in kept.items()} == {
        "api": 8000,
        "worker": 9101,
        "ship": 9102,
    }


def test_the_patch_for_bbr_fits_the_deployment_of_an_ingress_controller():
    api = of_kind("small", "Deployment")["api"]
    patch = ["kubectl", "patch", "--local", "-f", "-", "--patch-file", K8S / "edge" / "bbr.yaml", "-o", "yaml"]
    done = subprocess.run(patch, input=yaml.safe_dump(api), env=ENVIRONMENT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    patched = yaml.safe_load(done.stdout)
    kubernetes_validate.validate(patched, kubernetes_validate.latest_version(), strict=True)
    context = patched["spec"]["template"]["spec"]["securityContext"]
    assert context.pop("sysctls") == [{"name": "net.ipv4.tcp_congestion_control", "value": "bbr"}]
    assert patched == api


# What pods may do


@each_overlay
def test_no_pod_may_more_than_it_must(overlay):
    """The rules of the profile "restricted" (Pod Security Standards), and a root file system that is read-only."""
    assert (
        of_kind(overlay, "Namespace")["imagegram"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        == "restricted"
    )
    for name, pod in pods(overlay).items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False, name
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] == 999, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec), name
        for volume in spec.get("volumes", ()):
            assert set(volume) - {"name"} <= {"emptyDir", "ephemeral", "projected", "secret", "configMap"}, name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"], name
            assert not any("hostPort" in port for port in container.get("ports", ())), name
            if "imagegram" in container["image"]:
                assert "/tmp" in [one["mountPath"] for one in container["volumeMounts"]], name
    assert re.search(r"^USER 999$", DOCKERFILE, re.MULTILINE) and COMPOSE["redis"]["user"] == "999"


@each_overlay
def test_passwords_are_only_in_secrets(overlay):
    """Rendering knows no Secret, so nothing that is random may be in it."""
    assert not of_kind(overlay, "Secret")
    for _, container in containers(overlay):
        for one in container.get("env", ()):
            assert "PASSWORD" not in one["name"] or "secretKeyRef" in one["valueFrom"]


OUTSIDE = {  # name: the labels of its namespace
    "ingress controller": {"kubernetes.io/metadata.name": "ingress-nginx"},
    "prometheus": {"kubernetes.io/metadata.name": "monitoring"},
    "name server": {"kubernetes.io/metadata.name": "kube-system"},
    "another namespace": {"kubernetes.io/metadata.name": "default"},
}


def allowed(overlay: str, source: str, target: str, port: int) -> tuple[bool, bool]:
    """Whether the policies of the source and those of the target let a connection through.

    An end is a component, a name in OUTSIDE, or "internet".
    """
    policies = [one["spec"] for one in of_kind(overlay, "NetworkPolicy").values()]

    def peer(rule: dict, end: str) -> bool:
        if "ipBlock" in rule:
            return end == "internet"
        if "namespaceSelector" in rule:
            assert "podSelector" not in rule
            return end in OUTSIDE and matches(rule["namespaceSelector"], OUTSIDE[end])
        return end not in OUTSIDE and end != "internet" and matches(rule["podSelector"], {COMPONENT: end})

    def lets(kind: str, end: str, other: str) -> bool:
        if end in OUTSIDE or end == "internet":
            return True
        of_end = [
            one for one in policies if kind in one["policyTypes"] and matches(one["podSelector"], {COMPONENT: end})
        ]
        side = {"Ingress": "from", "Egress": "to"}[kind]
        return not of_end or any(
            any(peer(one, other) for one in rule[side]) and any(one["port"] == port for one in rule["ports"])
            for policy in of_end
            for rule in policy.get(kind.lower(), ())
        )

    return lets("Egress", source, target), lets("Ingress", target, source)


@each_overlay
def test_only_these_connections_are_allowed(overlay):
    components = {pod["metadata"]["labels"][COMPONENT] for pod in pods(overlay).values()}
    assert components == {"redis", "queue", "api", "worker", "operator"}
    ports = {port["containerPort"] for _, one in containers(overlay) for port in one.get("ports", ())} | {53, 443, 22}
    expected = {(part, "redis", 6379) for part in ("api", "worker", "operator", "redis")}
    expected |= {("redis", "redis", 16379), ("worker", "queue", 6379)}
    expected |= {("ingress controller", "api", 8000)}
    expected |= {("prometheus", "api", 8000), ("prometheus", "worker", 9101), ("prometheus", "redis", 9102)}
    expected |= {(part, "internet", 443) for part in ("api", "worker", "operator", "redis")}
    expected |= {(part, "name server", 53) for part in components}
    for source, target in itertools.product([*components, *OUTSIDE, "internet"], repeat=2):
        for port in ports:
            wanted = (source, target, port) in expected
            for end, let in zip((source, target), allowed(overlay, source, target, port), strict=True):
                # Each end alone refuses what is not needed, also if somebody opens the other.
                assert let == wanted or end not in components, (source, target, port)


def test_the_internet_is_not_the_machines_of_the_cluster():
    """The addresses of pods, machines and their metadata are private (RFC 1918, RFC 6598, RFC 3927)."""
    blocks = re.findall(r"except: \[(.*)\]", (K8S / "base" / "policies.yaml").read_text())
    assert [set(block.split(", ")) for block in blocks] == [
        {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16"}
    ]


# Redis, as its containers start it


def test_each_secret_is_random_and_long_enough():
    done = subprocess.run([K8S / "secrets.sh"], env=ENVIRONMENT, text=True, capture_output=True, check=True)
    assert "CHANGE-ME" not in str(secrets()) and done.stdout.count("kind: Secret") == len(secrets()) == 7
    passwords = [
        value
        for name, made in secrets().items()
        for key, value in made.items()
        if key not in ("users.acl", "replication.conf")
    ]
    assert len(set(passwords)) == len(passwords) == 6 and all(len(value) == 43 for value in passwords)
    again = {one["metadata"]["name"]: one["data"] for one in filter(None, yaml.safe_load_all(done.stdout))}
    for name, made in secrets().items():
        assert all(base64.b64decode(again[name][key]).decode() != value for key, value in made.items())


def test_each_part_has_the_rights_of_the_docs():
    documented = defaultdict(set)
    for user, rule in re.findall(r"^ACL SETUSER (\w+) (.*)$", PRODUCTION, re.MULTILINE):
        documented[user] |= set(re.sub(r"on >\S+|off", "", rule).split())
    lines = (K8S / "users.acl").read_text().splitlines()
    given = {line.split()[1]: set(line.split()[4:]) for line in lines}
    for user in ("api", "ship", "replica", "operator", "default"):
        assert given[user] == documented[user], user
    assert given["worker"] == given["api"] | {"+client|list"}, "RQ, which needs more, has a server of its own"
    queue = secrets()["queue"]["users.acl"].splitlines()[0].split()
    assert (queue[1], set(queue[4:])) == ("worker", documented["worker"])


@pytest.fixture
def started(tmp_path):
    """Starts containers of Valkey by their own command lines, with the embedded server, on free ports of 127.0.0.1."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "valkey-server").symlink_to(SERVERS["valkey"])
    (programs / "valkey-cli").symlink_to("/usr/bin/redis-cli")
    running = []

    def start(name: str, overlay: str = "small"):
        node = Container(overlay, name, tmp_path, programs)
        running.append(node)
        return node

    yield start
    for node in running:
        node.process.kill()
        node.process.wait()


class Container:
    """A container of Valkey. Its volumes are folders of a test."""

    def __init__(self, overlay: str, name: str, folder, programs):
        (pod,) = [pod for maker, pod in pods(overlay).items() if maker == name]
        self.container = pod["spec"]["containers"][0]
        self.port = cluster_port()
        self.folder = folder / str(self.port)
        self.data, self.conf = self.folder / "data", self.folder / "conf"
        self.data.mkdir(parents=True)
        for volume in pod["spec"]["volumes"]:
            for source in volume.get("projected", {}).get("sources", [volume]):
                self.mount(overlay, source)
        path = f"{programs}:{os.environ['PATH']}"
        self.environment = {"PATH": path, **variables(overlay, self.container)}
        self.start()

    def mount(self, overlay: str, source: dict) -> None:
        if "configMap" in source:
            files = of_kind(overlay, "ConfigMap")[source["configMap"]["name"]]["data"]
        elif "secret" in source:
            made = secrets()[source["secret"].get("secretName") or source["secret"]["name"]]
            paths = {one["key"]: one["path"] for one in source["secret"].get("items", ())}
            files = {paths.get(key, key): text for key, text in made.items()}
        else:
            return
        for name, text in files.items():
            (self.conf / name).parent.mkdir(parents=True, exist_ok=True)
            (self.conf / name).write_text(text)

    def start(self, address: str = "127.0.0.1") -> None:
        self.place = f"{address}:{self.port}"
        self.environment["POD_IP"] = address
        command = self.container["command"] + self.container["args"]
        places = {"/data": str(self.data), "/etc/redis": str(self.conf), "6379": str(self.port)}
        # On loopback only. The containers listen on all addresses of their pod.
        places |= {"'*' '-::*'": " ".join({"127.0.0.1": 0, address: 0}), "*": "127.0.0.1", "-::*": "::1"}
        for old, new in places.items():
            command = [
                new if part == old else part.replace(old, new) if len(old) > 4 or old == "6379" else part
                for part in command
            ]
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(command, env=self.environment, cwd=self.folder, stdout=log, stderr=log)

    def probe(self, kind: str) -> bool:
        """Whether a probe of the container succeeds."""
        command = self.container[kind]["exec"]["command"]
        words = [f"valkey-cli -p {self.port}" if part == "valkey-cli" else part for part in command]
        script = words[2].replace("valkey-cli", f"valkey-cli -p {self.port}") if words[0] == "sh" else " ".join(words)
        return subprocess.run(["sh", "-c", script], env=self.environment, capture_output=True).returncode == 0

    def client(self, user: str, password: str) -> redis.Redis:
        return redis.Redis(port=self.port, username=user, password=password, decode_responses=True)


def url(overlay: str, part: str, *running: Container) -> str:
    """The URL of Redis of a part, with the addresses of these containers."""
    (container,) = [one for name, one in ours(overlay) if name == part or (name, part) == ("redis-a", one["name"])]
    places = ",".join(one.place for one in running)
    return chosen(overlay, container).redis_url.replace(",".join(nodes(overlay)), places)


async def test_nodes_form_a_cluster_and_each_part_works_with_its_own_password(started, tmp_path):
    primary, replica = started("redis-a"), started("redis-b")
    for node in (primary, replica):
        until(lambda: node.probe("startupProbe") and node.probe("readinessProbe"), what="the node")  # noqa: B023
    operator = Cluster(url("small", "form", primary, replica), replicas=1)
    await forming.form(operator, 1, 0)
    assert primary.probe("livenessProbe") and replica.probe("readinessProbe")
    store = open_store(tmp_path.as_uri())
    api = Cluster(url("small", "api", primary, replica), replicas=1)
    await posts.delete(api, store, "alice", await make_post(api, "alice"))
    worker = Cluster(url("small", "worker", primary, replica), replicas=1)
    post = await publish(worker, store, "alice", 2)
    page = await posts.feed(api, 1, 10)
    assert [one.id for one in page.posts] == [post]
    report = await check.check(
        Cluster(url("small", "form", primary, replica), undecodable=check.EXACTLY), store, True, False
    )
    assert not report.flaws
    kept = settings.load({"IMAGEGRAM_KEEP_DAYS": "3"}).backup_reach_ms
    await sweep(operator, store, lambda *_: True, kept, remove=True)
    await retry(operator)
    passwords = {name: made["redis-password"] for name, made in secrets().items() if "redis-password" in made}
    ship = primary.client("ship", passwords["ship"])
    assert ship.info("persistence") and ship.execute_command("CLUSTER", "NODES") and ship.bgrewriteaof()
    refused = {
        "ship": [("GET", "x"), ("CLUSTER", "FORGET", "x"), ("CONFIG", "GET", "dir"), ("EVAL", "return 1", "0")],
        "api": [("FLUSHALL",), ("CONFIG", "GET", "dir"), ("CLUSTER", "RESET"), ("SET", "rq:x", "1"), ("ACL", "LIST")],
        "worker": [("FLUSHALL",), ("CLUSTER", "MEET", "127.0.0.1", "1"), ("SHUTDOWN",), ("KEYS", "*")],
        "operator": [("CONFIG", "SET", "dir", "/"), ("ACL", "LIST"), ("SHUTDOWN",), ("FLUSHALL",)],
    }
    for user, commands in refused.items():
        for command in commands:
            with pytest.raises(redis.exceptions.NoPermissionError):
                primary.client(user, passwords[user]).execute_command(*command)
    with pytest.raises(redis.exceptions.AuthenticationError):
        redis.Redis(port=primary.port, retry=NEVER).ping()
    for db in (api, worker, operator):
        await db.close()
    # All get new addresses at once, and know only the old ones of the others.
    for node, address in ((primary, "127.0.0.2"), (replica, "127.0.0.3")):
        node.process.kill()
        node.process.wait()
        node.start(address)
        until(lambda: node.probe("startupProbe"), what="the node")  # noqa: B023
    operator = Cluster(url("small", "form", primary, replica), replicas=1)
    await forming.form(operator, 1, 0)
    api = Cluster(url("small", "api", primary, replica), replicas=1)
    await comments.add(api, "bob", post, "They found one another")
    for db in (api, operator):
        await db.close()
    # A replica that has lost its primary is alive, but restarts and drains wait for it.
    primary.process.kill()
    until(lambda: not replica.probe("readinessProbe"), what="the loss is seen")
    assert replica.probe("livenessProbe") and not primary.probe("livenessProbe")


def test_a_primary_hands_its_slots_over_before_it_ends(started):
    config = ("CONFIG", "GET")
    node = started("redis-a", "cluster")
    # Only the default user may read the configuration, and there is none.
    users = node.conf / "secret" / "users.acl"
    until(lambda: node.probe("startupProbe"), what="the node")
    node.process.kill()
    node.process.wait()
    users.write_text(users.read_text().replace("user default off", "user default on nopass ~* &* +@all"))
    node.start()
    client = redis.Redis(port=node.port, decode_responses=True)
    until(client.ping, what="the node")
    found = {name: client.execute_command(*config, name)[name] for name in CONFIGURED}
    assert found == CONFIGURED
    assert (node.data / "redis" / "nodes.conf").exists() and (node.data / "redis" / "appendonlydir").is_dir()


CONFIGURED = {
    "shutdown-on-sigterm": "failover",
    "cluster-announce-ip": "127.0.0.1",
    "maxmemory": str(2 * 1024**3),
    "appendfsync": "always",
    "min-replicas-to-write": "1",
    "cluster-require-full-coverage": "no",
    "primaryuser": "replica",
}


def test_the_queue_takes_rqs_jobs_by_the_workers_password(started):
    node = started("queue")
    until(lambda: node.probe("readinessProbe"), what="the queue")
    (worker,) = [one for name, one in ours("small") if name == "worker"]
    client = redis.Redis.from_url(chosen("small", worker).queue_url.replace("queue:6379", f"127.0.0.1:{node.port}"))
    assert client.lpush("rq:queue:images", "x") == 1 and client.keys() and client.publish("rq:pubsub:x", "x") == 0
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command("CONFIG", "SET", "dir", "/")
    with pytest.raises(redis.exceptions.AuthenticationError):
        redis.Redis(port=node.port, retry=NEVER).ping()


@pytest.mark.parametrize(
    ("before", "starts", "after"),
    [
        ([], True, ["redis"]),
        (["lost+found"], True, ["lost+found", "redis"]),
        (["lock", "lost+found", "shipping.json"], True, ["lock", "lost+found", "redis", "shipping.json"]),
        (["redis"], True, ["redis"]),
        (["lost+found", "redis.new"], False, ["lost+found", "redis.new"]),
    ],
    ids=["empty volume", "new file system", "shipper was first", "volume with data", "restore that was interrupted"],
)
def test_a_node_makes_its_folder_on_an_empty_volume_only(tmp_path, before, starts, after):
    """An interrupted restore leaves a volume without the folder. An empty Redis would hide that."""
    for name in before:
        (tmp_path / name).mkdir()
    (text,) = pods("small")["redis-a"]["spec"]["containers"][0]["args"]
    begin = text.partition("exec ")[0].replace("/data", str(tmp_path)) + f"cd {tmp_path}/redis"
    assert (subprocess.run(["sh", "-c", begin], capture_output=True).returncode == 0) == starts
    assert sorted(path.name for path in tmp_path.iterdir()) == after


# docs/production.md

# In place of kubectl: renders, and makes Secrets, as kubectl does without a server. Of the other commands kubectl
# itself reads the options. Each command is recorded. The first `wait` for a pod fails: it does not exist yet.
KUBECTL = """#!/bin/sh
case "$*" in *" wait "*) grep -qxF -- "$*" {commands} || {{ echo "$*" >>{commands}; exit 1; }} ;; esac
echo "$*" >>{commands}
case "$1 $2" in
  "apply -k") exec {kubectl} kustomize "$3" ;;
  "apply -f") exec cat "$3" ;;
  "create secret") exec {kubectl} "$@" --dry-run=client --output yaml ;;
  *) exec {kubectl} "$@" --help ;;
esac
"""


def own_overlay(home: Path) -> Path:
    """The overlay that the docs show, in a copy of the files."""
    text = section(PRODUCTION, "## With Kubernetes")
    (block,) = [found for _, _, found in BLOCK.findall(text) if found.startswith("    resources:")]
    for folder in ("deploy/k8s", "storage/db"):
        shutil.copytree(ROOT / folder, home / folder)
    own = home / "deploy" / "k8s" / "overlays" / "own"
    own.mkdir()
    (own / "kustomization.yaml").write_text(textwrap.dedent(block))
    return own


def test_the_commands_of_the_docs_are_kubectls_and_name_what_there_is(tmp_path):
    script = "".join(shell(section(PRODUCTION, "## With Kubernetes")))
    stub = tmp_path / "bin" / "kubectl"
    stub.parent.mkdir()
    kubectl = shutil.which("kubectl", path=ENVIRONMENT["PATH"])
    stub.write_text(KUBECTL.format(kubectl=kubectl, commands=tmp_path / "commands"))
    stub.chmod(0o755)
    own_overlay(tmp_path)
    environment = {**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "commands").read_text()
    assert set(re.findall(r"cronjob/(\w+)", commands)) <= set(of_kind("small", "CronJob"))
    assert re.findall(r"create secret generic (s3-\w+)", commands) == ["s3-api", "s3-worker", "s3-ship", "s3-operator"]
    assert commands.count(" wait ") == 6, "each restart waits until the new pod exists and is ready"
    (selected,) = re.findall(r"delete pod --selector (\S+)", commands)
    wanted = {"matchLabels": dict([selected.split("=")])}
    assert {name for name, pod in pods("small").items() if matches(wanted, pod["metadata"]["labels"])} == set(
        of_kind("small", "StatefulSet")
    )
    deleted = re.findall(r"delete pod (\w\S+)", commands)
    assert [f"{pod}.redis:6379" for pod in reversed(deleted)] == nodes("small")[:3], "the primary is the last one"
    namespaces = re.findall(r"--namespace (\S+)", commands)
    assert set(namespaces) == set(of_kind("small", "Namespace"))


def test_an_overlay_of_ones_own_as_the_docs_show_it_changes_the_image_the_settings_and_the_host(tmp_path):
    printed = kustomize(own_overlay(tmp_path))
    made = list(yaml.safe_load_all(printed))
    (found,) = [one for one in made if one["kind"] == "ConfigMap" and one["metadata"]["name"].startswith("settings")]
    assert found["data"]["IMAGEGRAM_STORE"] == "s3://your-bucket/store" and found["data"]["IMAGEGRAM_REPLICAS"] == "1"
    assert printed.count("configMapRef") == printed.count(found["metadata"]["name"]) - 1
    assert "registry.example" not in printed and "your-registry/imagegram:0.1.0" in printed
    assert "imagegram.example" not in printed and printed.count("your-host.example") == 2
    assert len(made) == len(rendered("small"))
