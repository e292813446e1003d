"""The alert rules fire when they should, and the dashboard's queries find something: with Debian's Prometheus."""

import re
import subprocess

import pytest
import yaml
from conftest import ROOT, until
from observing import ALERTS, OBSERVE, PANELS, People, observed, queries, wait_for_a_trial

from storage import metrics

PRODUCTION = (ROOT / "docs" / "production.md").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
HEALTHY = {
    'up{job="api", instance="a"}': "1",
    'up{job="worker", instance="b"}': "1",
    'up{job="ship", instance="c"}': "1",
    "imagegram_redis_up": "1",
    'imagegram_redis_node_up{node="a:1", instance="a"}': "1",
    'imagegram_redis_node_up{node="b:1", instance="a"}': "1",
    'imagegram_redis_node_up{node="b:1", instance="b"}': "0",  # it reaches this process of the API only
    'imagegram_requests_total{route="/v1/posts", method="GET", status="200"}': "0+1000x{n}",
    'imagegram_requests_total{route="/v1/posts", method="GET", status="503"}': "0+0x{n}",
    'imagegram_request_duration_seconds_bucket{route="/v1/posts", method="GET", le="0.04"}': "0+1000x{n}",
    'imagegram_request_duration_seconds_bucket{route="/v1/posts", method="GET", le="0.05"}': "0+1000x{n}",
    'imagegram_request_duration_seconds_bucket{route="/v1/posts", method="GET", le="0.06"}': "0+1000x{n}",
    'imagegram_request_duration_seconds_bucket{route="/v1/posts", method="GET", le="+Inf"}': "0+1000x{n}",
    # An upload takes as long as its line needs.
    'imagegram_request_duration_seconds_bucket{route="/v1/posts", method="POST", le="0.05"}': "0+0x{n}",
    'imagegram_request_duration_seconds_bucket{route="/v1/posts", method="POST", le="+Inf"}': "0+500x{n}",
    'imagegram_problems_total{code="full"}': "0",
    'imagegram_work_oldest_seconds{queue="images"}': "1",
    'imagegram_images_total{outcome="ready"}': "0+100x{n}",
    'imagegram_images_total{outcome="died"}': "0",
    'imagegram_backup_lag_seconds{job="ship"}': "1",
    "imagegram_backup_trial_ok": "1",
    "imagegram_backup_trial_flaws": "0",
    "imagegram_backup_trial_timestamp_seconds": "0+60x{n}",
    "imagegram_redis_aof_ok": "1",
    "imagegram_redis_memory_bytes": "60",
    "imagegram_redis_memory_limit_bytes": "100",
    "imagegram_redis_fork_seconds": "0.04",
    "imagegram_store_free_bytes": "50",
    "imagegram_store_size_bytes": "100",
}
BUCKET = 'imagegram_request_duration_seconds_bucket{route="/v1/posts", method="GET", le="'
ERRORS = 'imagegram_requests_total{route="/v1/posts", method="GET", status="503"}'
# alert: the series that differ from a healthy site (None: missing), and the labels of the alert
FIRES = {
    "ApiDown": ({'up{job="api", instance="a"}': "0"}, {}),
    "RedisDown": ({"imagegram_redis_up": "0"}, {}),
    "ShardDown": ({'imagegram_redis_node_up{node="a:1", instance="a"}': "0"}, {"node": "a:1"}),
    "Errors": ({ERRORS: "0+2x{n}"}, {}),
    "Slow": ({f'{BUCKET}0.05"}}': "0+980x{n}", f'{BUCKET}0.04"}}': "0+900x{n}"}, {}),
    "StoreFull": ({'imagegram_problems_total{code="full"}': "0+1x{n}"}, {}),
    "WorkerGone": ({'up{job="worker", instance="b"}': None}, {}),
    "WorkWaits": ({'imagegram_work_oldest_seconds{queue="images"}': "300"}, {"queue": "images"}),
    "CommentsWait": ({'imagegram_work_oldest_seconds{queue="comments"}': "3700"}, {}),
    "ImagesFail": ({'imagegram_images_total{outcome="died"}': "0+10x{n}"}, {}),
    "ShipperGone": ({'up{job="ship", instance="c"}': "0"}, {}),
    "BackupLag": ({'imagegram_backup_lag_seconds{job="ship"}': "11"}, {}),
    "RestoreFails": ({"imagegram_backup_trial_flaws": "1"}, {}),
    "NoTrialRestore": ({"imagegram_backup_trial_timestamp_seconds": None}, {}),
    "RedisFile": ({"imagegram_redis_aof_ok": "0"}, {}),
    "RedisMemory": ({"imagegram_redis_memory_bytes": "71"}, {}),
    "SlowFork": ({"imagegram_redis_fork_seconds": "0.041"}, {}),
    "StoreDisk": ({"imagegram_store_free_bytes": "19"}, {}),
}
# A second symptom
ALSO = {
    # One node of a Cluster: it has less memory than the others.
    "RedisMemory": (
        {
            'imagegram_redis_memory_bytes{node="a:1"}': "71",
            'imagegram_redis_memory_limit_bytes{node="a:1"}': "100",
            'imagegram_redis_memory_bytes{node="b:1"}': "60",
            'imagegram_redis_memory_limit_bytes{node="b:1"}': "200",
        },
        {"node": "a:1"},
    ),
    "RedisFile": ({'imagegram_redis_aof_ok{node="a:1"}': "0"}, {"node": "a:1"}),
    "SlowFork": ({'imagegram_redis_fork_seconds{node="a:1"}': "0.063"}, {"node": "a:1"}),
    "BackupLag": ({'imagegram_backup_lag_seconds{job="ship"}': None}, {}),  # it has never caught up
    "RestoreFails": ({"imagegram_backup_trial_ok": "0"}, {}),
    "NoTrialRestore": ({"imagegram_backup_trial_timestamp_seconds": "-90000"}, {}),
}
# What is almost an alert
QUIET = {
    "Errors": {ERRORS: "0+0.5x{n}"},
    "Slow": {f'{BUCKET}0.04"}}': "0+980x{n}", f'{BUCKET}0.05"}}': "0+995x{n}"},
    "BackupLag": {'imagegram_backup_lag_seconds{job="ship"}': "9"},
    "RestoreFails": {"imagegram_backup_trial_ok": None, "imagegram_backup_trial_flaws": None},
    "WorkerGone": {'up{job="worker", instance="another"}': "0"},
    "CommentsWait": {'imagegram_work_oldest_seconds{queue="comments"}': "3500"},
    "ImagesFail": {'imagegram_images_total{outcome="died"}': "0+4x{n}"},
    "RedisMemory": {"imagegram_redis_memory_bytes": None},
    "SlowFork": {"imagegram_redis_fork_seconds": None},
    "StoreDisk": {"imagegram_store_free_bytes": None, "imagegram_store_size_bytes": None},
}
# The same by another reason: there are few requests
FEW = {
    "Slow": {
        'imagegram_requests_total{route="/v1/posts", method="GET", status="200"}': "0+50x{n}",
        f'{BUCKET}0.04"}}': "0+20x{n}",
        f'{BUCKET}0.05"}}': "0+20x{n}",
    },
}


def minutes(duration: str) -> int:
    return int(duration[:-1]) * {"m": 1, "h": 60, "d": 1440}[duration[-1]]


def step_of(alert: dict) -> int:
    """Minutes between two samples: an hour for an alert that takes a day, which promtool would simulate for seconds."""
    return 60 if minutes(alert["for"]) > 60 else 1


def case(alert: dict, changes: dict, labels: dict | None) -> dict:
    """A test for promtool: a site's series, and whether the alert fires when its `for` is over. `labels` None: no."""
    step = step_of(alert)
    end = 15 + minutes(alert["for"]) // step
    series = []
    for name, values in {**HEALTHY, **changes}.items():
        if values:
            values = values.replace("{n}", str(end)) if "+" in values else f"{values}x{end}"
            series.append({"series": name, "values": values})
    expected = []
    if labels is not None:
        summary = alert["annotations"]["summary"]
        for name, value in labels.items():
            summary = summary.replace(f"{{{{ $labels.{name} }}}}", value)
        annotations = {**alert["annotations"], "summary": summary}
        expected.append({"exp_labels": {**alert["labels"], **labels}, "exp_annotations": annotations})
    test = {"eval_time": f"{end * step}m", "alertname": alert["alert"], "exp_alerts": expected}
    return {"interval": f"{step}m", "input_series": series, "alert_rule_test": [test]}


def test_each_alert_fires_on_its_symptom_and_not_on_a_site_that_is_well(tmp_path):
    assert set(FIRES) == {alert["alert"] for alert in ALERTS}
    for step in (1, 60):
        tests = []
        for alert in (alert for alert in ALERTS if step_of(alert) == step):
            tests.append(case(alert, {}, None))
            for changes, labels in (each[alert["alert"]] for each in (FIRES, ALSO) if alert["alert"] in each):
                tests.append(case(alert, changes, labels))
            tests += [case(alert, each[alert["alert"]], None) for each in (QUIET, FEW) if alert["alert"] in each]
        path = tmp_path / f"{step}.yml"
        file = {"rule_files": [str(OBSERVE / "alerts.yml")], "evaluation_interval": f"{step}m", "tests": tests}
        path.write_text(yaml.safe_dump(file))
        run = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr


def test_promtool_accepts_the_configuration_and_the_rules():
    subprocess.run(["promtool", "check", "config", OBSERVE / "prometheus.yml"], check=True, capture_output=True)
    subprocess.run(["promtool", "check", "rules", OBSERVE / "alerts.yml"], check=True, capture_output=True)


def test_each_alert_has_a_severity_a_time_a_sentence_and_a_section_that_says_what_to_do():
    sections = set(
        re.findall(r"^### (\w+)$", PRODUCTION.partition("\n## Alerts\n")[2].partition("\n## ")[0], re.MULTILINE)
    )
    assert sections == {alert["alert"] for alert in ALERTS}
    assert set(re.findall(r'panel\s"([^"]+)"', PRODUCTION)) <= {panel["title"] for panel in PANELS}
    for alert in ALERTS:
        assert set(alert) == {"alert", "expr", "for", "labels", "annotations"}
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert re.fullmatch(r"[A-Z][^{}]*( \{\{.*\}\} [^{}]*)?\.", alert["annotations"]["summary"])
        assert alert["annotations"]["runbook"] == f"docs/production.md#{alert['alert'].lower()}"


def test_alerts_and_dashboard_use_only_metrics_and_labels_that_exist():
    used = set()
    for text in [alert["expr"] for alert in ALERTS] + [expression for _, expression in queries()]:
        for name, labels in re.findall(r"(imagegram_\w+)(\{[^}]*\})?", text):
            metric = metrics.METRICS.get(name) or metrics.METRICS[re.sub("_(bucket|sum|count)$", "", name)]
            used.add(metric.name)
            assert set(re.findall(r"(\w+)[=!]", labels)) <= {*metric.labels, "job"}, text
        for labels in re.findall(r"by \(([^)]*)\)", text):
            assert set(labels.split(", ")) <= {"le", "job"}.union(*(each.labels for each in metrics.METRICS.values()))
    assert len(used) > 20
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "imagegram" and panel["title"]


def test_compose_runs_prometheus_and_grafana_with_these_files_only_if_asked_and_without_rights():
    for name, ports in (
        ("prometheus", "${PROMETHEUS:-127.0.0.1:9090}:9090"),
        ("grafana", "${GRAFANA:-127.0.0.1:3000}:3000"),
    ):
        service = COMPOSE[name]
        assert service["profiles"] == ["observe"] and service["ports"] == [ports]
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["user"] not in ("0", "root")
        for volume in service["volumes"]:
            source, _, mode = volume.partition(":")
            assert source == name or ((ROOT / source).exists() and mode.endswith(":ro"))
    known = yaml.safe_load((OBSERVE / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text())
    assert known["datasources"][0]["uid"] == "imagegram"
    jobs = yaml.safe_load((OBSERVE / "prometheus.yml").read_text())["scrape_configs"]
    ports = {job["job_name"]: job["dns_sd_configs"][0]["port"] for job in jobs}
    assert ports["worker"] == int(COMPOSE["worker"]["environment"]["IMAGEGRAM_WORKER_METRICS"].rpartition(":")[2])
    assert ports["ship"] == int(COMPOSE["ship"]["environment"]["IMAGEGRAM_SHIP_METRICS"].rpartition(":")[2])


@pytest.mark.parametrize(("password", "status"), [("", 1), ("secret", 0)])
def test_grafana_does_not_start_without_a_password(tmp_path, password, status):
    shell, option, script = COMPOSE["grafana"]["entrypoint"]
    script = script.replace("$$", "$").replace("/run.sh", "true")
    run = subprocess.run([shell, option, script], env={"PATH": "/bin", "GF_SECURITY_ADMIN_PASSWORD": password})
    assert run.returncode == status


def test_every_query_of_the_dashboard_finds_something_on_a_site_in_use(tmp_path):
    with observed(tmp_path, "500ms", verify_every=1, workers=2) as (site, prometheus):
        until(lambda: prometheus.up() == {"api", "worker", "ship"}, what="all targets")
        people = People(site, 4, 0.05)
        try:
            wait_for_a_trial(prometheus)
            left = dict.fromkeys(queries())

            def all_found() -> bool:
                for title, expression in list(left):
                    now = prometheus.get("query", query=expression.replace("$__rate_interval", "10s"))["result"]
                    if now and all(sample["value"][1] != "NaN" for sample in now):
                        del left[title, expression]
                return not left

            until(all_found, 30, "a result of every query")
        finally:
            people.close()
        assert not left
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        assert {rule["name"]: rule["health"] for rule in rules} == {alert["alert"]: "ok" for alert in ALERTS}
