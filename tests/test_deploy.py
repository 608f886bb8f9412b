"""The files of deploy/, compose.yaml and the Dockerfile name what exists: metrics, files, addresses, commands."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from rec.__main__ import COMMANDS
from rec.ops.serving import metrics
from tests.conftest import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "rec.json"
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())


def expressions() -> dict[str, str]:
    """Every query of the dashboard and the alerts, by what shows it."""
    queries = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            queries[f"{panel['title']}, {target['legendFormat']}"] = target["expr"]
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]:
        for rule in group["rules"]:
            queries[rule["alert"]] = rule["expr"]
    return queries


def exported() -> set[str]:
    """The names of all metrics at /metrics."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    names = set()
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            names |= {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
    return names


@pytest.mark.parametrize("name", expressions())
def test_queries_are_of_metrics_that_the_server_has(name: str) -> None:
    assert set(re.findall(r"\brec_\w+", expressions()[name])) <= exported()


def test_every_metric_is_on_the_dashboard() -> None:
    shown = DASHBOARD.read_text()
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported()}
    assert [name for name in families if name not in shown] == []


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs Debian's prometheus")
@pytest.mark.parametrize(
    "command",
    ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"],
)
def test_prometheus_takes_its_files_and_the_alerts_fire(command: str) -> None:
    done = subprocess.run(
        ["promtool", *command.split()], cwd=PROMETHEUS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_what_compose_mounts_and_runs_exists(service: str) -> None:
    settings = COMPOSE["services"][service]
    for volume in settings["volumes"]:
        source = volume.partition(":")[0]
        assert (ROOT / source).is_dir() if source.startswith(".") else source in COMPOSE["volumes"]
    if settings.get("image") == "rec":
        assert settings["command"][0] in COMMANDS
    for text in settings.get("command", []):
        for host in re.findall(r"http://([\w-]+):", text):
            assert host in COMPOSE["services"]


def test_prometheus_and_grafana_ask_services_of_compose() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    targets = config["scrape_configs"][0]["static_configs"][0]["targets"]
    sources = ROOT / "deploy" / "grafana" / "provisioning" / "datasources" / "prometheus.yaml"
    (source,) = yaml.safe_load(sources.read_text())["datasources"]
    hosts = [target.partition(":")[0] for target in targets]
    hosts.append(source["url"].removeprefix("http://").partition(":")[0])
    assert set(hosts) <= COMPOSE["services"].keys()
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}


def test_the_image_copies_what_exists_and_is_not_ignored() -> None:
    text = (ROOT / "Dockerfile").read_text()
    allowed = re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.M)
    sources = [
        word for line in re.findall(r"^COPY ([^-].*) \S+$", text, re.M) for word in line.split()
    ]
    assert sources
    for source in sources:
        assert (ROOT / source).exists() and Path(source).parts[0] in allowed
