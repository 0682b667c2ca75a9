"""What a server tells those who watch it: figures in /metrics, health, and to whom."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests

from abhiapi import alerts, metrics, processes, timers, vitals
from abhiapi.metrics import Metrics
from abhiapi.monitoring import HEALTH_FRESH_S, Monitor
from abhiapi.settings import Settings
from abhiapi.web import create_app
from tests.command_line import CommandLine
from tests.harness import OPERATOR_KEY, Fal, Server, until
from tests.scripted import House


def figures(server: Server) -> dict[str, str]:
    """What /metrics says, by name with labels."""
    text = requests.get(server.url + "/metrics", timeout=30).text
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


@pytest.fixture(scope="module")
def server(fal: Fal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("monitoring")
    with Server.started(folder, fal.url, ABHIAPI_RECONCILE_INTERVAL_S="1") as running:
        yield running


# --- figures ----------------------------------------------------------------------------------------------------


def test_a_call_is_counted_by_its_model_and_its_time_is_divided(server: Server) -> None:
    """Half a second at fal is fal's: what was added here is less than that, and both count the call once."""
    _, key = server.books.account()
    before = figures(server)
    assert server.post(key, weather="delay_s=0.5").status_code == 200
    assert server.post(key, weather="status=422; units=0").status_code == 400
    after = figures(server)

    def more(name: str) -> float:
        return float(after[name]) - float(before.get(name, 0))

    assert more('abhiapi_model_calls_total{end="settled",model="fal-ai/flux/dev"}') == 2
    assert more("abhiapi_fal_seconds_count") == more("abhiapi_added_seconds_count") == 2
    assert more("abhiapi_fal_seconds_sum") >= 0.5
    assert more('abhiapi_fal_seconds_bucket{le="0.1"}') == 1  # fal's half second was not shortened by anything


def test_models_past_the_hundredth_share_one_series() -> None:
    """Whoever calls a thousand models does not make a thousand series, nor keeps anything of each."""
    counted = Metrics()
    for number in range(metrics.MODELS_MAX + 50):
        for _ in range(2):
            counted.count_end(f"acme/model-{number}", "settled")
    counted.count_end("acme/model-0", "released")
    lines = [line for line in counted.text().decode().splitlines() if line.startswith("abhiapi_model_calls_total{")]
    assert len(lines) == metrics.MODELS_MAX + 2
    assert 'abhiapi_model_calls_total{end="settled",model="other"} 100.0' in lines
    assert len(counted._ends) == metrics.MODELS_MAX + 1


def test_open_holds_show_by_state_with_their_age(house: House) -> None:
    monitor = Monitor(house.rt)

    def shown() -> dict[str, str]:
        monitor.look()
        lines = house.rt.metrics.text().decode().splitlines()
        return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))

    def while_running() -> None:
        house.books.clock.tick(7_000)  # type: ignore[attr-defined]
        during.update(shown())

    during: dict[str, str] = {}
    house.fal.when_sent = while_running
    assert house.call().status == 200
    assert during['abhiapi_open_holds{state="running"}'] == "1.0"
    assert during['abhiapi_open_holds_micros{state="running"}'] == str(float(house.last().held_micros))
    assert during['abhiapi_oldest_hold_seconds{state="running"}'] == "7.0"
    assert during['abhiapi_open_holds{state="unknown"}'] == "0.0"
    assert during["abhiapi_database_readable"] == "1.0"


def test_the_figures_of_the_database_are_read_once_for_many_who_ask(house: House) -> None:
    now = [0.0]
    monitor = Monitor(house.rt, lambda: now[0])
    reads = []
    read_aside = house.rt.database.read
    house.rt.database.read = lambda op: (reads.append(op), read_aside(op))[1]  # type: ignore[method-assign, assignment]
    for _ in range(20):
        monitor.look()
    assert len(reads) == 1
    now[0] = 6
    monitor.look()
    assert len(reads) == 2


def test_a_database_that_cannot_be_read_shows_as_such(house: House) -> None:
    monitor = Monitor(house.rt)
    path = house.rt.database.path
    aside = path.rename(path.with_name("aside.db"))
    monitor.look()
    text = house.rt.metrics.text().decode()
    aside.rename(path)
    assert "abhiapi_database_readable 0.0" in text
    assert "abhiapi_open_holds{" not in text


def test_background_work_shows_when_it_last_came_through(server: Server) -> None:
    works = {f'abhiapi_last_round_timestamp_seconds{{work="{work}"}}' for work in ("sweep", "reconcile", "alerts")}
    until(lambda: works <= figures(server).keys(), what="each has come through once")
    noted = server.books.read(lambda tx: timers.done_at(tx, vitals.ROUND))
    assert noted is not None
    assert server.books.clock() - noted < 600_000


def test_drift_of_the_last_comparison_stands_until_one_finds_none(tmp_path: Path) -> None:
    cli = CommandLine(tmp_path)
    cli("accounts", "create", "ann")

    def told() -> list[str]:
        return [alert.message for alert in cli.database.read(alerts.standing)]

    for message in ("1 units_differ", "1 units_differ", "2 units_differ", None):
        cli.database.write(lambda tx, now=message: alerts.retell(tx, "bill_drift", "fal", now, now_ms=1))  # type: ignore[misc]
        assert told() == ([] if message is None else [message])
    assert len(cli.database.read(lambda tx: alerts.newest(tx, most=9))) == 2  # the same words are no news


# --- health -----------------------------------------------------------------------------------------------------


def test_a_flood_of_health_checks_is_one_write_a_second(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a verdict is never older than that: neither the good one nor the bad one."""
    now, writes = [0.0], []
    seen = processes.seen
    monkeypatch.setattr(processes, "seen", lambda tx, *a, **more: (writes.append(a), seen(tx, *a, **more)))
    monitor = Monitor(house.rt, lambda: now[0])
    assert [monitor.trouble() for _ in range(50)] == [None] * 50
    assert len(writes) == 1
    with closing(sqlite3.connect(house.rt.database.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        now[0] += HEALTH_FRESH_S
        assert monitor.trouble() is not None
        other.execute("ROLLBACK")
    assert monitor.trouble() is not None  # a moment later the old verdict stands
    now[0] += HEALTH_FRESH_S
    assert monitor.trouble() is None


# --- to whom ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        *({f"X-Forwarded-{what}": "1"} for what in ("For", "Host", "Proto", "Port")),
        {"Forwarded": "for=1.2.3.4"},
        {"Via": "1.1 x"},
        {"X-Real-IP": "1.2.3.4"},
        {"Host": "fal.example.com"},
    ],
    ids=lambda headers: next(iter(headers)),
)
def test_metrics_are_nobodys_behind_a_proxy(shared_server: Server, headers: dict[str, str]) -> None:
    """Every peer of a proxy on this machine is loopback; so whatever gives a proxy away counts."""
    assert requests.get(shared_server.url + "/metrics", headers=headers, timeout=30).status_code == 404
    assert requests.get(shared_server.url + "/metrics", timeout=30).status_code == 200


@pytest.mark.parametrize(
    "setting", [{"ABHIAPI_TRUSTED_PROXIES": "1"}, {"ABHIAPI_PUBLIC_URL": "https://fal.example.com"}], ids=str
)
def test_metrics_need_a_token_where_the_settings_tell_of_a_proxy(
    house: House, tmp_path: Path, setting: dict[str, str]
) -> None:
    """nginx that is told nothing sets no header at all, and speaks HTTP/1.0 from loopback."""

    def status(token: str = "", **environ: Any) -> int:
        more = {"ABHIAPI_METRICS_TOKEN": token} if token else {}
        settings = Settings.from_env({"FAL_KEY": OPERATOR_KEY, **setting, **more})
        rt = house.rt
        rt.settings = settings
        rt.metrics = Metrics()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return create_app(rt).test_client().get("/metrics", headers=headers, environ_overrides=environ).status_code

    assert status() == 404
    assert status("a-token") == 200
    setting.clear()
    assert status() == 200
    assert status(SERVER_PROTOCOL="HTTP/1.0") == 404


def test_a_proxy_that_the_settings_do_not_know_of_is_told_once(server: Server) -> None:
    for _ in range(3):
        requests.get(server.url + "/v1/prices", headers={"X-Forwarded-For": "203.0.113.9"}, timeout=30)
    until(lambda: "alert unexpected_proxy" in server.process.output(), what="the operator is told")
    assert server.process.output().count("alert unexpected_proxy") == 1
