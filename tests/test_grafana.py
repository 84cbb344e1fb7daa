"""The dashboard for Grafana asks for what whitepool reports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import AggregateExpr, BinaryExpr, VectorSelector
from workshop import Workshop

import whitepool
from whitepool import telemetry

DASHBOARD = Path(__file__).parent.parent / "examples" / "grafana.json"


@pytest.fixture
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


@pytest.fixture
async def reported() -> dict[str, set[str]]:
    """The labels of each sample that Prometheus gets from a pool, by its name."""
    provider = MeterProvider([PrometheusMetricReader()], shutdown_on_exit=False)
    async with whitepool.open_pool(Workshop().make, name="shop", pool_size=1) as session:
        session = telemetry.instrument(session, meter_provider=provider)
        async with session.worker():
            pass
        text = generate_latest(REGISTRY).decode()
    provider.shutdown()
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("db_client_connection_pool_name") == "shop":
                labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def parse(query: str) -> tuple[set[str], set[str]]:
    """Return the names of metrics and of labels in a query."""
    names, labels = set[str](), set[str]()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, VectorSelector):
            names.add(node.name or "")
            labels.update(matcher.name for matcher in node.matchers.matchers)
        elif isinstance(node, AggregateExpr) and node.modifier:
            labels.update(node.modifier.labels)
        elif isinstance(node, BinaryExpr) and node.modifier and node.modifier.matching:
            labels.update(node.modifier.matching.labels)

    promql_parser.walk(promql_parser.parse(query.replace("$__rate_interval", "5m")), visit)
    return names, labels


def test_a_query_is_understood() -> None:
    """And one that is none is refused."""
    query = 'sum by (le, a) (rate(db_client_x_total{b=~"$pool", c="d"}[5m])) - ignoring (e) whitepool_y'
    assert parse(query) == ({"db_client_x_total", "whitepool_y"}, {"le", "a", "b", "c", "e"})
    with pytest.raises(ValueError):
        parse("sum by (le) (rate(db_client_x_total[$__rate_interval])")


async def test_what_it_asks_for_is_reported(
    dashboard: dict[str, Any], reported: dict[str, set[str]]
) -> None:
    """Each metric exists under that name, with these labels. What matters most is asked for."""
    asked: set[str] = set()
    for panel in dashboard["panels"]:
        assert panel["targets"]
        for target in panel["targets"]:
            names, labels = parse(target["expr"])
            assert names and names <= reported.keys(), target
            used = {*labels, *re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])}
            assert used <= set().union(*(reported[name] for name in names)), target
            # Else it would show the last number for an hour after the service has gone: "up".
            assert target.get("instant", False) == (panel["type"] == "stat"), target
            asked |= names
    (pool,) = (variable for variable in dashboard["templating"]["list"] if variable["name"] == "pool")
    (name, label) = re.fullmatch(r"label_values\((\w+), (\w+)\)", pool["query"]).groups()  # type: ignore[union-attr]
    assert label in reported[name]
    counters = {name for name in reported if re.match(r"whitepool_.*_total$", name)}
    assert asked >= counters - {"whitepool_waited_total", "whitepool_wait_time_seconds_total"}
    for metric in ("count", "pending_requests", "timeouts_total", "wait_time_seconds_bucket"):
        assert f"db_client_connection_{metric}" in asked


def test_it_is_a_dashboard(dashboard: dict[str, Any]) -> None:
    """Panels have numbers of their own and do not overlap; variables that are used are there."""
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken
        taken |= cells
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = re.findall(r"\$\{?(\w+)", DASHBOARD.read_text())
    assert set(used) - {"__rate_interval", "__all"} == variables
