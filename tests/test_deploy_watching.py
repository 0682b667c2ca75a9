"""The dashboard and the alert rules in deploy/: every query can be read, and asks for figures and labels that exist."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import pytest
import requests
import yaml

from abhiapi.alerts import KINDS
from abhiapi.errors import UpstreamBroken
from abhiapi.metrics import Metrics
from abhiapi.monitoring import samples
from abhiapi.vitals import Holds, Vitals
from tests.harness import ROOT, Server

BOARD = ROOT / "deploy/grafana/abhiapi.json"
RULES = ROOT / "deploy/prometheus/alerts.yml"
_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_WORDS = frozenset(
    "sum by max min rate increase topk histogram_quantile max_over_time time and or on ignoring without bool".split()
)


def board_queries() -> Iterator[str]:
    for panel in json.loads(BOARD.read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def rules() -> list[dict[str, str]]:
    found: list[dict[str, str]] = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    return found


def known() -> dict[str, set[str]]:
    """Every series that a server shows, with its labels: a counter has all that it may have once something happened."""
    metrics = Metrics()
    metrics.count_end("a", "settled")
    metrics.refused.labels(UpstreamBroken.type)
    metrics.alerts.labels("old_hold")
    metrics.rounds.labels("sweep")
    metrics.webhooks.labels("delivered")
    metrics.webhooks_received.labels("200")
    for name in re.findall(r'metrics\.gauge\(\s*"(\w+)"', (ROOT / "abhiapi/runtime.py").read_text()):
        metrics.gauge(name, "as runtime.start adds it", lambda: 0)
    seen = Vitals({"sent": Holds(1, 2, 3)}, {"due": 1, "waiting": 0}, 1, dict.fromkeys(KINDS, 1), 1, 1, 1)
    metrics.watch(lambda: samples(seen, 10))
    found: dict[str, set[str]] = {"up": {"job", "instance"}}
    for line in metrics.text().decode().splitlines():
        if not line.startswith("#"):
            name, labels = re.fullmatch(rf"({_NAME})(?:{{(.*)}})? .*", line).groups()  # type: ignore[union-attr]
            found.setdefault(name, {"job", "instance"}).update(re.findall(rf"({_NAME})=", labels or ""))
    return found


QUERIES = [*board_queries(), *(rule["expr"] for rule in rules())]


@pytest.mark.parametrize("query", QUERIES)
def test_each_query_asks_for_what_there_is(query: str) -> None:
    series = known()
    bare = re.sub(r"\[[^\]]*\]|\"[^\"]*\"", " ", query)
    grouped = {label for group in re.findall(r"\bby \(([^)]*)\)", bare) for label in re.findall(_NAME, group)}
    selectors = re.findall(rf"({_NAME})\s*(?:{{([^}}]*)}})?", re.sub(r"\bby \([^)]*\)", " ", bare))
    asked = [(name, labels) for name, labels in selectors if name not in _WORDS]
    assert asked
    for name, labels in asked:
        assert name in series, name
        assert set(re.findall(_NAME, labels)) <= series[name]
    assert grouped <= {"le"}.union(*(series[name] for name, _ in asked))


def test_a_server_tells_all_that_is_asked_for(shared_server: Server) -> None:
    """But for what has no value before it happened: an alert, a backup, a look at fal's bill."""
    happens = {"abhiapi_alerts_open", "abhiapi_backup_timestamp_seconds", "abhiapi_bill_compared_timestamp_seconds"}
    _, key = shared_server.books.account(100)
    assert shared_server.post(key).status_code == 200
    page = requests.get(f"{shared_server.url}/metrics", timeout=10).text
    told = set(re.findall(r"^# TYPE (\w+)", page, re.MULTILINE)) | {"up"}
    asked = {name for query in QUERIES for name in re.findall(r"\b(?:abhiapi_\w+|process_\w+|up)\b", query)}
    assert len(asked) > 30
    assert {name for name in asked if re.sub("_(bucket|sum|count)$", "", name) not in told} <= happens


@pytest.mark.parametrize("query", QUERIES)
def test_each_query_is_whole(query: str) -> None:
    """Brackets pair, and counters and histograms are asked for by their rate."""
    waiting = []
    for character in re.sub(r"\"[^\"]*\"", "", query):
        if character in "([{":
            waiting.append(character)
        elif character in ")]}":
            assert waiting.pop() + character in ("()", "[]", "{}")
    assert waiting == []
    for name in re.findall(rf"({_NAME}(?:_total|_bucket|_sum|_count))(?:{{[^}}]*}})?(?!\s*(?:{{[^}}]*}})?\[)", query):
        assert re.search(rf"{name}({{[^}}]*}})?\[", query), name


def test_states_and_kinds_in_the_queries_are_those_there_are() -> None:
    text = " ".join(QUERIES)
    assert set(re.findall(r'state="(\w+)"', text)) <= {"running", "queued", "unknown"}
    assert set(re.findall(r'end="(\w+)"', text)) <= set(Metrics().ended)


def test_every_rule_says_how_bad_it_is_and_what_it_means() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) > 10
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")  # type: ignore[index]
        assert rule["annotations"]["summary"]  # type: ignore[index]


def test_panels_have_places_of_their_own() -> None:
    panels = json.loads(BOARD.read_text())["panels"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.skipif(which("promtool") is None, reason="promtool (Debian's prometheus) is not installed")
def test_prometheus_itself_reads_the_rules_and_the_queries(tmp_path: Path) -> None:
    recorded = [
        {"record": f"board:query{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(board_queries())
    ]
    board = tmp_path / "board.yml"
    board.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": recorded}]}))
    subprocess.run(["promtool", "check", "rules", str(RULES), str(board)], check=True, capture_output=True, timeout=60)
