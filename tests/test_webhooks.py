"""Webhooks through a real server: from a submit with `fal_webhook` to the customer's own web server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
from requests.structures import CaseInsensitiveDict

from abhiapi import accounts
from tests.command_line import CommandLine
from tests.harness import ROOT, Books, Fal, Server, environment, free_port, own, until
from tests.receiver import Delivery, Receiver, is_signed
from tests.test_queue import CAT, FLUX_MICROS, MODEL, Jobs, at_once
from tests.test_queue_clients import CLIENTS, TlsFront, ran
from tests.test_queue_settlement import ended

SETTINGS = {"ABHIAPI_WEBHOOK_ALLOW_LOOPBACK": "1", "ABHIAPI_RECONCILE_INTERVAL_S": "1"}


@dataclass
class Site:
    server: Server
    receiver: Receiver

    @property
    def books(self) -> Books:
        return self.server.books

    def job(self, key: str, *, weather: str = "", path: str = "/hook", body: Any = None) -> str:
        """The id of a new job whose end is told to the receiver."""
        submitted = Jobs(self.server, key).submit(
            MODEL, body, weather=weather, params={"fal_webhook": self.receiver.url(path)}
        )
        assert submitted.status_code == 200, submitted.text
        return str(submitted.json()["request_id"])

    def told(self, request_id: str) -> Delivery:
        """The one delivery of a job, properly signed."""
        (delivery,) = self.receiver.delivered(request_id)
        jwks = requests.get(f"{self.server.url}/.well-known/jwks.json", timeout=10).json()
        assert is_signed(jwks, delivery)
        return delivery


@pytest.fixture(scope="module")
def sites(fal: Fal, own_servers: Callable[..., Server]) -> Iterator[Callable[[str, str], Site]]:
    """On each engine a proxy whose address fal knows, and one that fal could not reach.

    The first one's reconciler looks so seldom that fal's webhook is always the first; the other's sees the ends itself.
    """
    made: list[Site] = []
    with ExitStack() as stack:

        @cache
        def of(kind: str, engine: str) -> Site:
            settings = SETTINGS
            if kind == "known":
                port = free_port()
                settings = SETTINGS | {
                    "PORT": str(port),
                    "ABHIAPI_PUBLIC_URL": f"http://127.0.0.1:{port}",
                    "ABHIAPI_FAL_REST_URL": f"{fal.url}/rest",
                    "ABHIAPI_RECONCILE_INTERVAL_S": "3600",
                }
            made.append(Site(own_servers(engine, **settings), stack.enter_context(Receiver.started())))
            return made[-1]

        yield of
        for site in made:
            assert site.books.verify().problems == []


@pytest.fixture
def known_site(engine: str, sites: Callable[[str, str], Site]) -> Site:
    return sites("known", engine)


@pytest.fixture
def hidden_site(engine: str, sites: Callable[[str, str], Site]) -> Site:
    return sites("hidden", engine)


@pytest.fixture(params=["known", "hidden"])
def site(request: pytest.FixtureRequest, engine: str, sites: Callable[[str, str], Site]) -> Site:
    return sites(request.param, engine)


@pytest.mark.engines
def test_fals_own_delivery_reaches_the_customer_with_its_charge(known_site: Site, fal: Fal) -> None:
    """Row 46 of B5: settled although the client never comes back, and fal never hears of the customer's URL."""
    account, key = known_site.books.account(1000)
    request_id = known_site.job(key, path="/hook?token=a%2Bb")
    told = known_site.told(request_id)
    assert told.path == "/hook?token=a%2Bb"
    assert told.headers["x-fal-webhook-user-id"] == account
    assert told.json["_billing"] == {
        "model": "fal-ai/flux/dev", "credits_used": 26.25, "cost_usd": 0.02625, "balance_remaining": 973.75,
    }  # fmt: skip
    assert (told.json["status"], told.json["request_id"]) == ("OK", request_id)
    assert told.json["payload"]["images"]
    assert known_site.books.standing(account) == (1_000_000 - FLUX_MICROS, 0)
    assert fal.calls(f"127.0.0.1%3A{known_site.receiver.port}") == []
    metrics = requests.get(f"{known_site.server.url}/metrics", timeout=10).text
    assert 'abhiapi_webhooks_received_total{status="200"}' in metrics


@pytest.mark.engines
def test_without_an_address_of_ours_the_reconciler_sees_the_end(hidden_site: Site, fal: Fal) -> None:
    account, key = hidden_site.books.account(1000)
    marker = own("hidden webhook")
    request_id = hidden_site.job(key, body=CAT | {"prompt": marker})
    told = hidden_site.told(request_id)
    assert told.json["_billing"]["credits_used"] == 26.25
    assert hidden_site.books.standing(account) == (1_000_000 - FLUX_MICROS, 0)
    assert "fal_webhook" not in str(fal.calls(marker))


@pytest.mark.parametrize(
    ("weather", "status", "micros"),
    [
        ("status=422", 422, 0),
        ("status=422; units=2", 422, 2 * FLUX_MICROS),
        ("status=500", 500, 0),
        ("units=2.5", 200, 65_625),
    ],
)
def test_a_jobs_failure_is_told_with_what_it_cost(site: Site, weather: str, status: int, micros: int) -> None:
    """Row 43 of B5."""
    account, key = site.books.account(1000)
    told = site.told(site.job(key, weather=weather)).json
    assert told["_billing"]["credits_used"] * 1000 == micros
    if status == 200:
        assert told["status"] == "OK"
    else:
        assert (told["status"], told["error"]) == ("ERROR", f"Invalid status code: {status}")
        assert told["payload"]["detail"]
    assert site.books.standing(account) == (1_000_000 - micros, 0)


@pytest.mark.engines
def test_a_cancelled_job_is_told_and_free(site: Site) -> None:
    account, key = site.books.account(1000)
    request_id = site.job(key, weather="queue_until=never-webhook")
    assert Jobs(site.server, key).cancel(request_id).status_code == 202
    told = site.told(request_id).json
    assert (told["status"], told["_billing"]["credits_used"]) == ("ERROR", 0)
    assert site.books.standing(account) == (1_000_000, 0)


@pytest.mark.engines
def test_a_suspended_account_still_hears_of_what_it_paid_for(site: Site, fal: Fal) -> None:
    account, key = site.books.account(1000)
    gate = f"suspended-{account}"
    request_id = site.job(key, weather=f"hold_until={gate}; queue_s=0")

    def suspend(tx: Any) -> None:
        found = accounts.find(tx, account)
        assert found is not None
        accounts.set_status(tx, found.account_id, "suspended")

    site.books.write(suspend)
    fal.release(gate)
    assert site.told(request_id).json["_billing"]["credits_used"] == 26.25


def refusals(site: Site) -> int:
    """How many of fal's deliveries were refused as not fal's."""
    page = requests.get(f"{site.server.url}/metrics", timeout=10).text
    found = re.search(r'received_total\{status="401"\} (\d+)', page)
    return int(found[1]) if found else 0


@pytest.mark.engines
@pytest.mark.parametrize(("weather", "count"), [("twice", "1"), ("bad_signature", "0"), ("stale", "0")])
def test_fals_delivery_counts_once_and_only_if_it_is_fals(known_site: Site, weather: str, count: str) -> None:
    account, key = known_site.books.account(1000)
    request_id = known_site.job(key, weather=f"webhook={weather}")
    refused = refusals(known_site)
    if weather == "twice":
        assert known_site.told(request_id).json["_billing"]["credits_used"] == 26.25
    else:
        until(lambda: refusals(known_site) > refused, what="a refusal")
        assert known_site.books.calls(account)[0].state == "sent"
        Jobs(known_site.server, key).completed(request_id)
    assert known_site.books.standing(account) == (1_000_000 - FLUX_MICROS, 0)
    assert len(known_site.receiver.of(request_id)) == int(count)


@pytest.mark.engines
def test_everybody_who_looks_and_the_webhook_end_a_job_once(site: Site) -> None:
    """Rows 24 and 37: pollers, results, the reconciler and fal's delivery at once."""
    account, key = site.books.account(1000)
    customer = Jobs(site.server, key)
    ids = [site.job(key, weather="run_s=0.3; webhook=twice") for _ in range(3)]
    at_once(60, lambda number: (customer.status if number % 2 else customer.result)(ids[number % 3]))
    for request_id in ids:
        customer.completed(request_id)
    for request_id in ids:
        assert site.told(request_id).json["_billing"]["credits_used"] == 26.25
    charges = [entry for entry in site.books.entries(account) if entry.kind == "charge"]
    assert len(charges) == 3
    assert all(len(site.receiver.of(request_id)) <= 1 for request_id in ids)


@pytest.mark.parametrize("url", [
    "http://127.0.0.1:9/hook", "http://localhost:9/hook", "http://[::1]/", "http://2130706433/", "http://0x7f.1/",
    "https://10.0.0.1/hook", "http://169.254.169.254/latest/meta-data/", "http://[::ffff:169.254.169.254]/",
    "http://[64:ff9b::a00:1]/", "http://100.100.100.200/", "ftp://example.com/", "https://user:pw@example.com/",
    "https://no-such-host.invalid/hook", "",
])  # fmt: skip
def test_a_url_inside_is_refused_before_fal_hears_of_the_job(
    shared_server: Server, books: Books, fal: Fal, url: str
) -> None:
    """Row 67 of B9, and nothing is held."""
    account, key = books.account(1000)
    prompt = f"webhook to {url}"
    refused = Jobs(shared_server, key).submit(MODEL, CAT | {"prompt": prompt}, params={"fal_webhook": url})
    assert refused.status_code == 400
    assert refused.json()["error"]["type"] == "webhook_url_refused"
    assert not books.calls(account)
    assert not fal.calls(prompt)


def test_the_setting_opens_this_machine_only(hidden_site: Site) -> None:
    _, key = hidden_site.books.account(1000)
    for url in ("http://10.0.0.1/", "http://169.254.169.254/", "http://[::ffff:127.0.0.1]/"):
        refused = Jobs(hidden_site.server, key).submit(params={"fal_webhook": url})
        assert refused.json()["error"]["type"] == "webhook_url_refused"


def test_strangers_at_our_webhook_address_learn_nothing(known_site: Site) -> None:
    _, key = known_site.books.account(1000)
    submitted = Jobs(known_site.server, key).submit(params={"fal_webhook": known_site.receiver.url()})
    call = submitted.headers["x-abhiapi-call-id"]
    for path in (f"{call}/{'0' * 64}", "call_0000000000000/x", "nonsense/x"):
        answer = requests.post(f"{known_site.server.url}/v1/webhooks/fal/{path}", json={}, timeout=10)
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found")
    assert requests.get(f"{known_site.server.url}/v1/webhooks/fal/{call}/x", timeout=10).status_code == 405


def test_the_page_of_keys_is_public_and_outlives_the_server(hidden_site: Site, fal: Fal, tmp_path: Path) -> None:
    page = requests.get(f"{hidden_site.server.url}/.well-known/jwks.json", timeout=10)
    assert page.status_code == 200
    (key,) = page.json()["keys"]
    assert (key["kty"], key["crv"]) == ("OKP", "Ed25519")
    shown = []
    for _ in range(2):
        with Server.started(tmp_path, fal.url) as server:
            shown.append(requests.get(f"{server.url}/.well-known/jwks.json", timeout=10).json())
            assert (tmp_path / "abhiapi.db.webhook-key").stat().st_mode & 0o777 == 0o600
    assert shown[0] == shown[1] != page.json()


def test_a_kill_between_the_charge_and_the_delivery_loses_nothing(fal: Fal, tmp_path: Path) -> None:
    """SIGKILL while customers' servers are being called, and while jobs run: the next process delivers them all."""
    with Receiver.started() as receiver:
        receiver.hold = threading.Event()
        gate = own("webhooks-killed")
        server = Server.start(tmp_path, fal.url, **SETTINGS)
        try:
            site = Site(server, receiver)
            account, key = server.books.account(1000)
            charged = [site.job(key) for _ in range(3)]
            running = [site.job(key, weather=f"hold_until={gate}; queue_s=0") for _ in range(3)]
            until(lambda: len(receiver.deliveries) == 3, what="the first three are being delivered")
        finally:
            server.process.kill()
        assert len([entry for entry in server.books.entries(account) if entry.kind == "charge"]) == 3
        receiver.hold.set()
        receiver.deliveries.clear()
        fal.release(gate)
        with Server.started(tmp_path, fal.url, **SETTINGS) as again:
            for request_id in [*charged, *running]:
                (told,) = receiver.delivered(request_id, within_s=60)
                assert told.json["_billing"]["credits_used"] == 26.25
            until(lambda: again.books.standing(account)[1] == 0, what="no hold is left")
            charges = [entry for entry in again.books.entries(account) if entry.kind == "charge"]
            assert len(charges) == 6
            assert again.books.verify().problems == []


@pytest.mark.engines
def test_the_operator_sees_and_resends(hidden_site: Site, tmp_path: Path) -> None:
    cli = CommandLine(tmp_path, hidden_site.server.env["ABHIAPI_DATABASE_URL"])
    gate = own("resend")
    account, key = hidden_site.books.account(1000)
    submitted = Jobs(hidden_site.server, key).submit(
        MODEL,
        weather=f"hold_until={gate}; queue_s=0",
        params={"fal_webhook": hidden_site.receiver.url("/x?token=secret")},
    )
    call_id, request_id = submitted.headers["x-abhiapi-call-id"], submitted.json()["request_id"]

    def listed(*arguments: str) -> dict[str, Any] | None:
        found: list[dict[str, Any]] = cli.json("webhooks", "list", "--account", account, *arguments)["webhooks"]
        assert len(found) <= 1
        return found[0] if found else None

    assert "has not ended" in cli("webhooks", "resend", call_id).refused()
    assert listed("--state", "waiting") is not None
    assert listed("--state", "delivered") is None
    requests.post(f"{hidden_site.server.env['ABHIAPI_FAL_RUN_URL']}/_sandbox/release", json={"name": gate}, timeout=10)
    row = until(lambda: listed("--state", "delivered"), what="it is delivered")
    assert row is not None
    assert (row["call_id"], row["attempts"], row["last_status"], row["resendable"]) == (call_id, 1, 200, True)
    assert row["url"] == hidden_site.receiver.url("/x")
    done = cli("webhooks", "list", "--account", account)
    assert "secret" not in done.stdout + json.dumps(row)
    assert cli.json("webhooks", "resend", call_id)["state"] == "due"
    first, second = hidden_site.receiver.delivered(request_id, 2)
    assert first.body == second.body
    assert "no webhook was asked for" in cli("webhooks", "resend", "call_0000000000001").refused()
    assert cli("webhooks", "list", "--state", "sent").misused()


@pytest.mark.engines
def test_many_jobs_that_end_at_once_are_all_told(known_site: Site, fal: Fal) -> None:
    account, key = known_site.books.account(5000)
    gate = own("all-at-once")
    ids = [one.json()["request_id"] for one in at_once(
        100,
        lambda _: Jobs(known_site.server, key).submit(
            weather=f"hold_until={gate}; queue_s=0", params={"fal_webhook": known_site.receiver.url()}
        ),
    )]  # fmt: skip
    fal.release(gate)
    for request_id in ids:
        assert len(known_site.receiver.delivered(request_id, within_s=30)) == 1
    assert known_site.books.standing(account) == (5_000_000 - 100 * FLUX_MICROS, 0)
    assert ended(known_site.books, account).state == "settled"


def test_the_docs_lines_work(hidden_site: Site, fal: Fal) -> None:
    page = (ROOT / "docs/webhooks.md").read_text()
    (submit,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    (check,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    server, (_, key) = hidden_site.server, hidden_site.books.account(1000)
    submit = submit.replace("https%3A%2F%2Fyou.example.com%2Fhook", quote(hidden_site.receiver.url(), safe=""))
    submit = submit.replace("https://fal.example.com", server.url).replace("sk-fal-your-key", key)
    done = subprocess.run(["bash", "-c", submit], env=server.env, capture_output=True, timeout=60, check=True)
    told = hidden_site.told(json.loads(done.stdout)["request_id"])
    names: dict[str, Any] = {}
    exec(check.replace("https://fal.example.com", server.url), names)
    headers = CaseInsensitiveDict(told.headers)
    assert names["is_genuine"](headers, told.body)
    assert not names["is_genuine"](headers, told.body.replace(b"26.25", b"0.25"))
    headers["x-fal-webhook-timestamp"] = "1"
    assert not names["is_genuine"](headers, told.body)


def is_told_of(site: Site, told: dict[str, Any]) -> None:
    assert site.told(told["request_id"]).json["_billing"]["credits_used"] == 26.25
    status, message = told["refused"]
    assert status == 400
    assert "not at a public address" in message


def test_fals_python_client(site: Site, tmp_path: Path) -> None:
    tls = TlsFront(tmp_path)
    tls.lead_to(site.server.url)
    _, key = site.books.account(1000)
    env = environment(
        FAL_KEY=key,
        FAL_QUEUE_RUN_HOST=f"{tls.address}/queue",
        SSL_CERT_FILE=str(tls.authority_file),
        WEBHOOK_URL=site.receiver.url(),
        NO_PROXY="127.0.0.1",
    )
    try:
        is_told_of(site, json.loads(ran([sys.executable, str(CLIENTS / "webhook.py")], env)))
    finally:
        tls.close()


def test_fals_javascript_client(site: Site, node_folder: Path) -> None:
    shutil.copy(CLIENTS / "webhook.mjs", node_folder)
    _, key = site.books.account(1000)
    env = environment(KEY=key, BASE_URL=site.server.url, WEBHOOK_URL=site.receiver.url())
    is_told_of(site, json.loads(ran(["node", "webhook.mjs"], env, node_folder)))
