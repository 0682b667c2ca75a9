"""Alerts: told once for each time that something begins, whatever restarts, and never in the way of a call."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gevent
import pytest
import requests

from abhiapi import accounts, admission, alerting, alerts, calls, prices, runtime, turns
from abhiapi.alerts import Alert
from abhiapi.db import Database, Tx
from abhiapi.ids import call_text
from abhiapi.metering import Verdict
from abhiapi.money import Micros
from abhiapi.operator_webhook import OperatorWebhook
from tests.command_line import CommandLine
from tests.harness import Clock, Fal, Server, until
from tests.rows import Customer, credit, server_settings

pytestmark = pytest.mark.engines

DAY_MS = 86_400_000
SECRET_PATH = "/hooks/T0-very-secret"


class Receiver:
    """The operator's end: keeps what it is sent and answers as it is told."""

    def __init__(self) -> None:
        receiver = self
        self.documents: list[dict[str, object]] = []
        self.status = 200

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.documents.append(json.loads(body))
                self.send_response(receiver.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}{SECRET_PATH}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def kinds(self) -> list[object]:
        return [document["kind"] for document in self.documents]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def customer(database: Database, clock: Clock) -> Customer:
    return Customer.new(database, clock, credits=100)


@pytest.fixture
def rt(customer: Customer, database_url: str, clock: Clock) -> Iterator[runtime.Runtime]:
    """A server's parts over the customer's database, without the server."""
    made = runtime.start(server_settings(database_url), now_ms=clock, rules=())
    yield made
    made.close()


def standing(database: Database) -> list[tuple[str, str]]:
    return [(alert.kind, alert.subject) for alert in database.read(alerts.standing)]


def warn_below(customer: Customer, below: Micros | None) -> None:
    account = customer.account()
    customer.write(
        lambda tx: alerts.set_threshold(
            tx, account.account_id, account.name, account.balance_micros, below, now_ms=customer.clock.now_ms
        )
    )


LOW = [("low_balance", "ann")]


def test_a_low_balance_is_raised_at_its_crossing_and_once(database: Database, customer: Customer) -> None:
    warn_below(customer, credit(50))
    customer.settle(credit(50), held_micros=credit(50))
    assert standing(database) == []  # 50 is not below 50
    customer.settle(1, held_micros=1)
    assert standing(database) == LOW
    customer.settle(credit(10), held_micros=credit(10))
    assert len(database.read(lambda tx: alerts.newest(tx, most=10))) == 1


def test_recovery_arms_it_again(database: Database, customer: Customer) -> None:
    warn_below(customer, credit(50))
    for _ in range(3):
        customer.settle(credit(60), held_micros=credit(60))
        assert standing(database) == LOW
        customer.topup(60)
        assert standing(database) == []
    assert len(database.read(lambda tx: alerts.newest(tx, most=10))) == 3


def test_a_threshold_above_the_balance_is_told_at_once_and_lifting_it_ends_it(
    database: Database, customer: Customer
) -> None:
    warn_below(customer, credit(500))
    assert standing(database) == LOW
    warn_below(customer, None)
    assert standing(database) == []
    customer.settle(credit(100), held_micros=credit(100))
    assert standing(database) == []


@pytest.mark.engines("sqlite")  # which tells each statement that it runs
def test_without_a_threshold_the_end_of_a_call_asks_nothing_more(database: Database, customer: Customer) -> None:
    """No statement about alerts or limits is run for who has set neither."""
    call = customer.admit()
    seen: list[str] = []
    with closing(database.connect()) as connection:
        connection.set_trace_callback(seen.append)
        connection.execute("BEGIN IMMEDIATE")
        tx = database.tx(connection)
        calls.admit(tx, customer.admission(customer.open_call()))
        calls.finish(tx, call, Verdict("settled", Micros(5), "1", "fal", 1), now_ms=customer.clock.now_ms)
        tx.write_sums()
        connection.execute("COMMIT")
    tables = ("FROM alerts", "INTO alerts", "UPDATE alerts", "UPDATE key_spending", "INTO key_spending")
    assert [sql for sql in seen if any(table in sql for table in tables)] == []
    assert len(seen) > 5


def test_a_restart_repeats_no_announcement_and_forgets_none(
    rt: runtime.Runtime, database: Database, customer: Customer, database_url: str, clock: Clock
) -> None:
    warn_below(customer, credit(500))
    assert alerting.run_once(rt, None) == 1
    assert alerting.run_once(rt, None) == 0
    again = runtime.start(server_settings(database_url), now_ms=clock, rules=())
    try:
        assert alerting.run_once(again, None) == 0
        assert again.standing == set(LOW)
        database.write(lambda tx: alerts.raise_(tx, "below_cost", "m", "words", now_ms=clock.now_ms))
        assert alerting.run_once(again, None) == 1
    finally:
        again.close()


def test_the_webhook_gets_each_alert_once(rt: runtime.Runtime, customer: Customer, receiver: Receiver) -> None:
    warn_below(customer, credit(500))
    webhook = OperatorWebhook(receiver.url)
    for _ in range(3):
        alerting.run_once(rt, webhook)
    (document,) = receiver.documents
    assert document == {
        "alert_id": 1,
        "kind": "low_balance",
        "subject": "ann",
        "message": "the balance of 'ann' is 100 credits, below 500",
        "raised_at": "2026-11-18T11:06:40.000Z",
    }


@pytest.mark.engines("sqlite")  # hundreds of looks, of which few write
def test_a_webhook_that_fails_is_tried_again_ever_more_seldom_and_five_times_at_most(
    rt: runtime.Runtime, customer: Customer, receiver: Receiver, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    warn_below(customer, credit(500))
    webhook = OperatorWebhook(receiver.url)
    receiver.status = 500
    tried_at = []
    start = clock.now_ms
    for _ in range(1000):
        before = len(receiver.documents)
        alerting.run_once(rt, webhook)
        if len(receiver.documents) > before:
            tried_at.append((clock.now_ms - start) // 1000)
        clock.tick(15_000)
        if len(tried_at) == alerts.TRIES and clock.now_ms - start > 6_000_000:
            break
    assert tried_at == [0, 15, 60, 240, 960]
    assert SECRET_PATH not in caplog.text
    assert "did not take alert 1: status 500" in caplog.text


def test_a_webhook_that_is_gone_delays_nothing_and_shows_no_address(
    rt: runtime.Runtime, customer: Customer, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    warn_below(customer, credit(500))
    assert alerting.run_once(rt, OperatorWebhook("http://127.0.0.1:9" + SECRET_PATH)) == 1
    assert "ConnectionError" in caplog.text
    assert SECRET_PATH not in caplog.text
    (alert,) = database.read(alerts.standing)
    assert (alert.tries, alert.delivered_at) == (1, None)


class Interrupted(OperatorWebhook):
    """A webhook in whose midst other processes have their look."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self.documents: list[dict[str, object]] = []
        self._meanwhile = meanwhile

    def post(self, document: dict[str, object]) -> str | None:
        self.documents.append(document)
        self._meanwhile()
        return None


@pytest.fixture
def other(rt: runtime.Runtime, database_url: str, clock: Clock) -> Iterator[runtime.Runtime]:
    """A second process over the same database."""
    made = runtime.start(server_settings(database_url), now_ms=clock, rules=())
    yield made
    made.close()


def raised(rt: runtime.Runtime, kind: str, subject: str) -> None:
    rt.write(lambda tx: alerts.raise_(tx, kind, subject, "words", now_ms=rt.now_ms()))


@pytest.mark.parametrize("age_ms", [0, 3_600_000])
def test_of_two_processes_one_posts_an_alert(
    rt: runtime.Runtime, other: runtime.Runtime, clock: Clock, age_ms: int
) -> None:
    """However long ago it was announced: what is on its way is nobody else's."""
    for number in range(5):
        raised(rt, "below_cost", f"m{number}")
    alerting.run_once(rt, None)
    clock.tick(age_ms)
    theirs = Interrupted(lambda: None)
    ours = Interrupted(lambda: alerting.run_once(other, theirs))
    alerting.run_once(rt, ours)
    alerting.run_once(other, theirs)
    assert sorted(str(document["subject"]) for document in ours.documents + theirs.documents) == [
        f"m{number}" for number in range(5)
    ]


def test_what_a_process_was_posting_when_it_died_is_posted_by_another(
    rt: runtime.Runtime, other: runtime.Runtime, clock: Clock
) -> None:
    class Death(BaseException):
        pass

    def die() -> None:
        raise Death

    raised(rt, "below_cost", "m")
    theirs = Interrupted(lambda: None)
    with pytest.raises(Death):
        alerting.run_once(rt, Interrupted(die))
    alerting.run_once(other, theirs)
    assert theirs.documents == []
    clock.tick(turns.LEASE_MS + alerting.FIRST_PAUSE_MS)
    alerting.run_once(other, theirs)
    assert len(theirs.documents) == 1


def test_a_charge_that_waits_in_one_process_is_not_over_for_another(
    rt: runtime.Runtime, other: runtime.Runtime, database: Database, clock: Clock
) -> None:
    rt.parked = 1
    raised(rt, "parked_charge", "charges")
    for _ in range(100):
        clock.tick(5_000)
        alerting.run_once(other, None)
        alerting.run_once(rt, None)
        assert standing(database) == [("parked_charge", "charges")]
    rt.parked = 0
    clock.tick(alerting.quiet_ms("parked_charge", rt.settings) + alerting.RENEWED_MS)
    alerting.run_once(other, None)
    assert standing(database) == []
    assert len(database.read(lambda tx: alerts.newest(tx, most=10))) == 1


def test_a_proxy_that_one_process_saw_is_not_over_for_another(
    rt: runtime.Runtime, other: runtime.Runtime, database: Database, clock: Clock
) -> None:
    raised(rt, "unexpected_proxy", "proxy")
    for _ in range(30):
        rt.proxy_seen_at = clock.tick(3_600_000)
        alerting.run_once(rt, None)
        alerting.run_once(other, None)
        assert standing(database) == [("unexpected_proxy", "proxy")]
    clock.tick(alerting.PROXY_FORGOTTEN_MS + 1)
    alerting.run_once(other, None)
    assert standing(database) == []
    assert len(database.read(lambda tx: alerts.newest(tx, most=10))) == 1


def test_a_proxy_that_has_been_told_of_ends_its_alert(
    rt: runtime.Runtime, database: Database, database_url: str, clock: Clock
) -> None:
    raised(rt, "unexpected_proxy", "proxy")
    told = runtime.start(server_settings(database_url, ABHIAPI_TRUSTED_PROXIES="1"), now_ms=clock, rules=())
    try:
        clock.tick(alerting.quiet_ms("unexpected_proxy", told.settings) + 1)
        alerting.run_once(told, None)
        assert standing(database) == []
    finally:
        told.close()


def test_a_redirect_is_not_followed_and_counts_as_not_taken(receiver: Receiver) -> None:
    receiver.status = 302
    assert OperatorWebhook(receiver.url).post({"kind": "x"}) == "status 302"
    assert len(receiver.documents) == 1


def test_holds_that_could_not_settle_are_told_by_model_until_the_operator_has_spoken(
    rt: runtime.Runtime, customer: Customer, database: Database
) -> None:
    """Row 21: nothing that is unsettled goes unnoticed."""
    first, second = customer.admit(10), customer.admit(20)
    for call in (first, second):
        customer.finish(call, Verdict("unknown", reason="no_units"))
    assert alerting.run_once(rt, None) == 1
    (alert,) = database.read(alerts.standing)
    assert (alert.kind, alert.subject) == ("unknown_hold", first.model)
    assert call_text(first.call_id) in alert.message
    customer.finish(first, Verdict("released", reason="operator"))
    assert alerting.run_once(rt, None) == 0
    customer.finish(second, Verdict("released", reason="operator"))
    alerting.run_once(rt, None)
    assert standing(database) == []


def test_the_age_of_the_oldest_hold_is_a_metric_and_after_a_day_an_alert(
    rt: runtime.Runtime, customer: Customer, database: Database, clock: Clock
) -> None:
    """Row 21."""
    customer.admit(10, deadline_in_ms=9 * DAY_MS)
    clock.tick(3_600_000)
    alerting.run_once(rt, None)
    assert b"abhiapi_oldest_open_hold_seconds 3600.0" in rt.metrics.text()
    assert standing(database) == []
    clock.tick(DAY_MS)
    alerting.run_once(rt, None)
    assert standing(database) == [("old_hold", "holds")]
    assert b'abhiapi_alerts_total{kind="old_hold"} 1.0' in rt.metrics.text()


def test_an_old_alert_is_not_sent_to_a_webhook_that_has_just_been_set(
    rt: runtime.Runtime, customer: Customer, receiver: Receiver, clock: Clock
) -> None:
    warn_below(customer, credit(500))
    alerting.run_once(rt, None)
    clock.tick(2 * DAY_MS)
    alerting.run_once(rt, OperatorWebhook(receiver.url))
    assert receiver.documents == []


def written(rt: runtime.Runtime) -> None:
    """What was to be written off the path of calls is written: the writer takes one after the other."""
    gevent.sleep(0)
    rt.write(lambda tx: None)


def test_a_free_call_does_not_end_a_price_below_cost(rt: runtime.Runtime, database: Database) -> None:
    """Else each paid call after a free one would be told anew."""
    call = calls.OpenCall(1, 1, 1, "m", Micros(0))
    for charge, cost in [(5, 9_000), (0, 0), (5, 9_000), (0, 0)]:
        verdict = Verdict("settled", Micros(charge), "1", "fal", cost)
        admission.count(rt, call, verdict, admission.Outcome(Micros(charge), Micros(0)))
        written(rt)
    told = database.read(lambda tx: alerts.newest(tx, most=10))
    assert [(alert.kind, alert.cleared_at) for alert in told] == [("below_cost", None)]
    admission.count(rt, call, Verdict("settled", Micros(9), "1", "fal", 9_000), admission.Outcome(Micros(9), Micros(0)))
    written(rt)
    assert standing(database) == []


@pytest.mark.parametrize(
    ("tries", "after_ms", "due"), [(0, 0, True), (1, 14_999, False), (1, 15_000, True), (4, 960_000, True)]
)
def test_when_a_try_is_due(tries: int, after_ms: int, due: bool) -> None:
    alert = Alert(1, "k", "s", "m", 1000, None, 1000, None, tries)
    assert alerting.is_due(alert, 1000 + after_ms) is due


def test_a_server_tells_of_everything_that_goes_wrong(
    fal: Fal, tmp_path: Path, receiver: Receiver, database_url: str
) -> None:
    """The log, the metrics and the webhook, each once; and again after a restart only what is new."""
    settings = {
        "ABHIAPI_ALERT_WEBHOOK_URL": receiver.url,
        "ABHIAPI_RECONCILE_INTERVAL_S": "1",
        "ABHIAPI_DATABASE_URL": database_url,
    }
    with Server.started(tmp_path, fal.url, **settings) as server:
        name, key = server.books.account(1000)

        def prepare(tx: Tx) -> None:
            account = accounts.find(tx, name)
            assert account is not None
            alerts.set_threshold(
                tx, account.account_id, name, account.balance_micros, credit(990), now_ms=server.books.clock()
            )
            prices.set_own(
                tx, "fal-ai/flux/dev", unit=None, unit_price_usd=Decimal("0.0200001"), margin=None, hold_micros=None,
                now_ms=server.books.clock(),
            )  # fmt: skip

        server.books.write(prepare)
        assert server.post(key).status_code == 200  # below cost, and the balance falls below the threshold
        assert server.post(key, weather="status=403").status_code == 502
        assert server.post(key, weather="status=403").status_code == 502
        server.post(
            key, "/fal-ai/creative-upscaler", {"image_url": "https://e.com/a.jpg", "scale": 2}, weather="units=none"
        )
        wanted = {"below_cost", "low_balance", "fal_account", "unknown_hold"}
        until(lambda: set(receiver.kinds()) >= wanted, what=f"every alert at the webhook: {receiver.kinds()}")
        assert sorted(map(str, receiver.kinds())) == sorted(wanted)
        log = server.process.output()
        for kind in wanted:
            assert log.count(f"alert {kind}: ") == 1, log
        metrics = requests.get(server.url + "/metrics", timeout=10).text
        assert 'abhiapi_alerts_total{kind="fal_account"} 1.0' in metrics
        assert SECRET_PATH not in log + metrics
        assert server.post(key).status_code == 200  # fal takes calls again
        until(lambda: ("fal_account", "fal") not in standing(server.books.database), what="the account is well again")
        assert server.process.stop() == 0
        again = Server.start(tmp_path, fal.url, **settings)
        try:
            assert again.post(key, weather="status=403").status_code == 502
            until(lambda: receiver.kinds().count("fal_account") == 2, what="the second time is told")
            assert len(receiver.documents) == len(wanted) + 1
            assert again.books.verify().problems == []
        finally:
            again.process.kill()


def test_the_commands_set_and_show(tmp_path: Path, database_url: str) -> None:
    cli = CommandLine(tmp_path, database_url)
    cli("accounts", "create", "acme")
    assert cli.json("accounts", "alert", "acme", "--below", "500")["alert_below"] == 500
    (shown,) = cli.json("alerts", "list")["alerts"]
    assert (shown["kind"], shown["subject"], shown["cleared_at"]) == ("low_balance", "acme", None)
    assert "low_balance" in cli("alerts", "list").stdout
    cli("topup", "acme", "500")
    assert cli.json("alerts", "list") == {"alerts": []}
    assert "nothing needs you" in cli("alerts", "list").stderr
    assert cli.json("alerts", "list", "--all")["alerts"][0]["cleared_at"] is not None
    assert cli.json("accounts", "alert", "acme", "--below", "none")["alert_below"] is None
    assert "--below" in cli("accounts", "alert", "acme", "--below", "lots").misused()


def test_keys_are_limited_and_listed_at_the_command_line(tmp_path: Path, database_url: str) -> None:
    """Row 22: what was set is read back."""
    cli = CommandLine(tmp_path, database_url)
    cli("keys", "create", "acme", "--day-limit", "500", "--month-limit", "5000")
    (key,) = cli.json("keys", "list")
    assert (key["day_limit"], key["month_limit"], key["day_spent"], key["models"]) == (500, 5000, 0, None)
    assert cli.json("keys", "limit", "key_1", "--day", "26.25")["day_limit"] == Decimal("26.25")
    assert cli.json("keys", "limit", "key_1", "--month", "none") | {"day_limit": 0} == key | {
        "day_limit": 0,
        "month_limit": None,
    }
    allowed = cli.json("keys", "models", "key_1", "--allow", "fal-ai/flux/*", "--allow", "fal-ai/kling")
    assert allowed["models"] == ["fal-ai/flux/*", "fal-ai/kling"]
    assert cli.json("keys", "models", "key_1") == allowed
    assert "fal-ai/flux/* fal-ai/kling" in cli("keys", "list").stdout
    rotated = cli.json("keys", "rotate", "key_1")
    assert (rotated["id"], rotated["models"]) == ("key_2", allowed["models"])
    assert [row["day_limit"] for row in cli.json("keys", "list")] == [Decimal("26.25")] * 2
    assert cli.json("keys", "models", "key_2", "--any")["models"] is None
    for wrong in (["limit", "key_1"], ["limit", "key_1", "--day", "-5"], ["models", "key_1", "--allow", "a b"],
                  ["models", "key_1", "--any", "--allow", "x"], ["limit", "key_1", "--budget", "5"]):  # fmt: skip
        assert cli("keys", *wrong).exit_code == 2, wrong
