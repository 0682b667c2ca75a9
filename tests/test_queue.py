"""fal's queue through the proxy: addresses, who may see a job, and what its answers say it cost."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from abhiapi.web import proxy
from tests.harness import OPERATOR_KEY, Books, Fal, Server, own, until
from tests.plain_session import PlainSession

pytestmark = pytest.mark.engines

MODEL = "/queue/fal-ai/flux/dev"
CAT = {"prompt": "a cat", "image_size": "landscape_4_3"}
FLUX_MICROS = 26_250


class Jobs:
    """A customer of the queue."""

    def __init__(self, server: Server, key: str, *, dialect: str = "fal") -> None:
        self.server = server
        self.session = PlainSession()
        self.session.trust_env = False
        self.session.headers.update({"Authorization": f"Key {key}"} if dialect == "fal" else {"x-api-key": key})

    def submit(self, path: str = MODEL, body: Any = None, *, weather: str = "", **more: Any) -> requests.Response:
        headers = {"x-fal-sandbox": weather} if weather else {}
        return self.session.post(
            self.server.url + path, json=CAT if body is None else body, headers=headers, timeout=60, **more
        )

    def job(self, **more: Any) -> str:
        """The id of a new job."""
        submitted = self.submit(**more)
        assert submitted.status_code == 200, submitted.text
        return str(submitted.json()["request_id"])

    def get(self, path: str, **more: Any) -> requests.Response:
        return self.session.get(path if path.startswith("http") else self.server.url + path, timeout=60, **more)

    def status(self, request_id: str) -> requests.Response:
        return self.get(f"/queue/fal-ai/flux/requests/{request_id}/status")

    def result(self, request_id: str) -> requests.Response:
        return self.get(f"/queue/fal-ai/flux/requests/{request_id}")

    def cancel(self, request_id: str) -> requests.Response:
        url = f"{self.server.url}/queue/fal-ai/flux/requests/{request_id}/cancel"
        return self.session.put(url, timeout=60)

    def completed(self, request_id: str) -> requests.Response:
        """The first status that shows the end."""

        def look() -> requests.Response | None:
            shown = self.status(request_id)
            return shown if shown.json().get("status") == "COMPLETED" else None

        return until(look, what=f"{request_id} is complete")  # type: ignore[return-value]

    def result_when_ready(self, request_id: str) -> requests.Response:
        """The result, asked for without ever asking for the status."""

        def look() -> requests.Response | None:
            shown = self.result(request_id)
            return None if shown.status_code == 400 and "in progress" in shown.text else shown

        return until(look, what="the result is there")  # type: ignore[return-value]


def at_once(count: int, ask: Any) -> list[requests.Response]:
    with ThreadPoolExecutor(min(count, 32)) as pool:
        return list(pool.map(ask, range(count)))


def test_a_job_from_submit_to_result(shared_server: Server, books: Books) -> None:
    account, key = books.account(1000)
    jobs = Jobs(shared_server, key)
    submitted = jobs.submit()
    assert submitted.status_code == 200
    told = submitted.json()
    assert told["status"] == "IN_QUEUE"
    assert told["_billing"] == {
        "model": "fal-ai/flux/dev", "credits_used": 0, "cost_usd": 0, "balance_remaining": 1000,
    }  # fmt: skip
    for name, suffix in (("status_url", "/status"), ("response_url", ""), ("cancel_url", "/cancel")):
        assert told[name] == f"{shared_server.url}/queue/fal-ai/flux/requests/{told['request_id']}{suffix}"
    status = jobs.completed(told["request_id"])
    assert status.status_code == 200
    result = jobs.get(told["response_url"])
    assert result.status_code == 200
    assert result.headers["x-fal-request-id"] == told["request_id"]
    assert result.json()["images"]
    charged = {"model": "fal-ai/flux/dev", "credits_used": 26.25, "cost_usd": 0.02625, "balance_remaining": 973.75}
    assert result.json()["_billing"] == status.json()["_billing"] == charged
    assert result.headers["x-abhiapi-call-id"] == submitted.headers["x-abhiapi-call-id"]
    (call,) = books.calls(account)
    assert (call.mode, call.state, call.charged_micros, call.fal_request_id) == (
        "queue", "settled", FLUX_MICROS, told["request_id"],
    )  # fmt: skip
    assert books.standing(account) == (1_000_000 - FLUX_MICROS, 0)


def test_the_result_is_fals_own_bytes_and_the_bill(shared_server: Server, books: Books, fal: Fal) -> None:
    """Row 41 of B5: nothing of fal's answer is forged; what we know stands in `_billing` alone."""
    _, key = books.account(1000)
    jobs = Jobs(shared_server, key)
    request_id = jobs.job(weather="body=escaped; units=1")
    jobs.completed(request_id)
    direct = requests.get(
        f"{fal.url}/queue/fal-ai/flux/requests/{request_id}", headers={"Authorization": "Key x:y"}, timeout=10
    ).content
    shown = jobs.result(request_id).content
    assert shown.startswith(direct[:-1] + b', "_billing": {')
    assert shown.endswith(b"}}")


@pytest.mark.parametrize("kind", ["array", "text", "binary"])
def test_a_result_that_is_no_object_is_untouched(shared_server: Server, books: Books, kind: str) -> None:
    account, key = books.account(1000)
    jobs = Jobs(shared_server, key)
    request_id = jobs.job(weather=f"body={kind}; units=2")
    first, second = jobs.result_when_ready(request_id), jobs.result(request_id)
    assert first.content == second.content
    assert b"_billing" not in first.content
    assert first.headers["x-abhiapi-credits-used"] == "52.5"
    assert books.calls(account)[0].charged_micros == 2 * FLUX_MICROS


def test_a_large_result_passes_with_its_bill_at_the_end(shared_server: Server, books: Books) -> None:
    account, key = books.account(1000)
    jobs = Jobs(shared_server, key)
    size = 3_000_000
    result = jobs.result_when_ready(jobs.job(weather=f"size_bytes={size}"))
    assert result.json()["_billing"]["credits_used"] == 26.25
    assert len(result.content) > size
    assert books.calls(account)[0].state == "settled"


@pytest.mark.parametrize("app", ["fal-ai/flux", "fal-ai/flux/dev"])
@pytest.mark.parametrize("end", ["", "/"])
def test_every_address_of_a_job_answers(shared_server: Server, books: Books, app: str, end: str) -> None:
    """Row 26 of B3: by whatever address it is looked at, a job is charged once."""
    account, key = books.account(1000)
    jobs = Jobs(shared_server, key)
    request_id = jobs.job()
    bill = jobs.completed(request_id).json()["_billing"]
    for path in (f"/queue/{app}/requests/{request_id}", f"/fal-ai/queue/requests/{request_id}"):
        for logs in ("", "?logs=1", "?logs=0", "?logs=true", "?logs=false", "?logs=True"):
            shown = jobs.get(f"{path}/status{end}{logs}")
            assert shown.status_code == 200
            assert shown.json()["_billing"] == bill
            assert bool(shown.json()["logs"]) is (logs.lower() in ("?logs=1", "?logs=true"))
        assert jobs.get(f"{path}/response{end}").json()["_billing"] == bill
        assert jobs.session.put(f"{shared_server.url}{path}/cancel{end}", timeout=10).status_code == 400
        stream = jobs.get(f"{path}/status/stream{end}")
        assert stream.headers["content-type"].startswith("text/event-stream")
    assert "images" in jobs.get(f"/queue/{app}/requests/{request_id}{end}").json()
    assert jobs.get(f"/fal-ai/queue/requests/{request_id}{end}").json()["status"] == "COMPLETED"
    assert len([entry for entry in books.entries(account) if entry.kind == "charge"]) == 1


def test_a_job_in_a_namespace_of_three_segments(shared_server: Server, books: Books) -> None:
    """Without a price it is refused before fal hears of it, like any other model."""
    _, key = books.account(1000)
    refused = Jobs(shared_server, key).submit("/queue/workflows/owner/name")
    assert refused.status_code == 404
    assert refused.json()["error"]["type"] == "unpriced_model"


def test_urls_follow_the_name_by_which_the_caller_came(shared_server: Server, books: Books) -> None:
    _, key = books.account(1000)
    jobs = Jobs(shared_server, key)
    jobs.session.headers["Host"] = "fal.example.com:8443"
    told = jobs.submit().json()
    assert told["status_url"].startswith("http://fal.example.com:8443/queue/fal-ai/flux/requests/")
    jobs.session.headers["Host"] = 'evil"/../<script>'
    answer = jobs.submit()
    assert "script" not in answer.text


@pytest.mark.parametrize(
    ("hops", "headers", "base_url"),
    [
        (0, {}, "http://here.example:81"),
        (0, {"HTTP_X_FORWARDED_PROTO": "https", "HTTP_X_FORWARDED_HOST": "evil.example"}, "http://here.example:81"),
        (1, {"HTTP_X_FORWARDED_PROTO": "https"}, "https://here.example:81"),
        (1, {"HTTP_X_FORWARDED_HOST": "evil.example, fal.example.com"}, "http://fal.example.com"),
        (2, {"HTTP_X_FORWARDED_HOST": "evil, outer.example, inner.example"}, "http://outer.example"),
        (2, {"HTTP_X_FORWARDED_HOST": "inner.example"}, "http://here.example:81"),
        (0, {"HTTP_HOST": "a b"}, "http://server:80"),
        (0, {"HTTP_HOST": "[::1]:8000"}, "http://[::1]:8000"),
    ],
)
def test_only_trusted_proxies_say_where_we_are(hops: int, headers: dict[str, str], base_url: str) -> None:
    environ = {"HTTP_HOST": "here.example:81", "SERVER_NAME": "server", "SERVER_PORT": "80"} | headers
    assert proxy.base_url(environ, hops) == base_url


def test_a_status_stream_leads_here_and_ends_with_the_bill(shared_server: Server, books: Books, fal: Fal) -> None:
    account, key = books.account(1000)
    jobs = Jobs(shared_server, key)
    gate = own("stream-shown")
    request_id = jobs.job(weather=f"hold_until={gate}; queue_s=0.1")
    events = []
    with jobs.get(f"/queue/fal-ai/flux/requests/{request_id}/status/stream?logs=1", stream=True) as stream:
        for line in stream.iter_lines(chunk_size=None):
            if line.startswith(b"data: "):
                events.append(json.loads(line[6:]))
                if events[-1]["status"] == "IN_PROGRESS":
                    assert books.calls(account)[0].state == "sent"
                    fal.release(gate)
                if events[-1]["status"] == "COMPLETED":
                    assert books.calls(account)[0].state == "settled"
            elif line.startswith(b": _billing "):
                events.append(json.loads(line[11:]))
    assert [event.get("status") for event in events] == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED", None]
    assert {event["status_url"].split("/requests")[0] for event in events[:3]} == {
        f"{shared_server.url}/queue/fal-ai/flux"
    }
    assert events[3] == jobs.status(request_id).json()["_billing"]


def test_a_status_that_has_shown_the_end_never_goes_back(shared_server: Server, books: Books, fal: Fal) -> None:
    """Row 25 of B3: an answer kept from before the job's end, of either kind of status, is not shown after it."""
    _, key = books.account(1000)
    jobs = Jobs(shared_server, key)
    gate = own("shown-late")
    request_id = jobs.job(weather=f"hold_until={gate}; queue_s=0")
    paths = [f"/queue/fal-ai/flux/requests/{request_id}/status?logs={logs}" for logs in (0, 1)]
    for path in paths:
        assert jobs.get(path).json()["_billing"]["credits_used"] == 0
    fal.release(gate)
    result = jobs.result_when_ready(request_id)
    for path in paths:
        shown = jobs.get(path)
        assert (shown.status_code, shown.json()["status"]) == (200, "COMPLETED")
        assert shown.json()["_billing"] == result.json()["_billing"]


def test_every_answer_about_a_job_names_it_and_its_call(shared_server: Server, books: Books, fal: Fal) -> None:
    """fal-protocol 10.2, no. 9, and row 28 of B3: refusals of our own as well as what fal sends without a name."""
    _, key = books.account(1000)
    jobs = Jobs(shared_server, key)
    gate = own("named")
    submitted = jobs.submit(weather=f"hold_until={gate}; queue_s=0")
    request_id = submitted.json()["request_id"]
    base = f"/queue/fal-ai/flux/requests/{request_id}"
    status, early = jobs.status(request_id), jobs.result(request_id)
    fal.release(gate)
    result = jobs.result_when_ready(request_id)
    locked = {"match": f"queue/cancel/{request_id}", "status": 403}
    requests.post(fal.url + "/_sandbox/weather", json=locked, timeout=10).raise_for_status()
    refused = jobs.cancel(request_id)
    answers = [submitted, status, early, result, refused, jobs.cancel(request_id), jobs.get(f"{base}/status/stream")]
    assert [answer.status_code for answer in answers] == [200, 202, 400, 200, 502, 400, 200]
    for answer in answers:
        assert answer.headers["x-fal-request-id"] == request_id
        assert answer.headers["x-abhiapi-call-id"] == submitted.headers["x-abhiapi-call-id"]


def test_polls_use_up_no_minute(fal: Fal, shared_server: Server, books: Books) -> None:
    _, key = books.account(1000)
    jobs = Jobs(shared_server, key)
    before = int(jobs.submit().headers["X-RateLimit-Remaining"])
    request_id = jobs.job()
    at_once(50, lambda _: jobs.status(request_id))
    assert int(jobs.submit().headers["X-RateLimit-Remaining"]) == before - 2


ROUTES = [
    (method, form)
    for method, forms in (
        (
            "GET",
            [
                "/queue/fal-ai/flux/requests/{}",
                "/queue/fal-ai/flux/requests/{}/",
                "/queue/fal-ai/flux/dev/requests/{}",
                "/queue/fal-ai/flux/requests/{}/response",
                "/queue/fal-ai/flux/requests/{}/response/",
                "/queue/fal-ai/flux/requests/{}/status",
                "/queue/fal-ai/flux/dev/requests/{}/status?logs=1",
                "/queue/fal-ai/flux/requests/{}/status/",
                "/queue/fal-ai/flux/requests/{}/status/stream",
                "/queue/fal-ai/flux/requests/{}/status/stream/?logs=1",
                "/queue/fal-ai/flux/dev/requests/{}/status/stream",
                "/queue/comfy/o/n/requests/{}",
                "/queue/workflows/o/n/requests/{}/status",
                "/queue/requests/{}",
                "/fal-ai/queue/requests/{}",
                "/fal-ai/queue/requests/{}/",
                "/fal-ai/queue/requests/{}/status/?logs=True",
                "/fal-ai/queue/requests/{}/response/",
                "/fal-ai/queue/requests/{}/status",
                "/fal-ai/queue/requests/{}/status/stream",
                "/fal-ai/queue/requests/{}/response",
            ],
        ),
        (
            "PUT",
            [
                "/queue/fal-ai/flux/requests/{}/cancel",
                "/queue/fal-ai/flux/requests/{}/cancel/",
                "/queue/fal-ai/flux/dev/requests/{}/cancel",
                "/queue/workflows/o/n/requests/{}/cancel",
                "/fal-ai/queue/requests/{}/cancel",
                "/fal-ai/queue/requests/{}/cancel/",
            ],
        ),
    )
    for form in forms
]


@pytest.mark.parametrize(("method", "form"), ROUTES)
def test_anothers_job_is_an_unknown_one(shared_server: Server, books: Books, fal: Fal, method: str, form: str) -> None:
    """Row 57 of B8: the same bytes, the same headers, and fal is not asked."""
    _, owner = books.account(1000)
    _, other = books.account(1000)
    request_id = Jobs(shared_server, owner).job(weather="hold_until=never-mine; queue_s=0")
    unknown = "019da0f9-f0d6-7eb0-9e16-d7bcfd663a72"
    stranger = Jobs(shared_server, other).session
    foreign = stranger.request(method, shared_server.url + form.format(request_id), timeout=10)
    missing = stranger.request(method, shared_server.url + form.format(unknown), timeout=10)
    assert foreign.status_code == 404
    assert foreign.json()["status"] == "NOT_FOUND"
    assert foreign.content == missing.content
    assert {n: v for n, v in foreign.headers.items() if n != "Date"} == {
        n: v for n, v in missing.headers.items() if n != "Date"
    }
    asked = [call for call in fal.calls(request_id) if call["method"] in ("GET", "PUT")]
    assert not [call for call in asked if "/cancel" in call["path"] or "/stream" in call["path"]]
    assert not fal.calls(unknown)
    Jobs(shared_server, owner).cancel(request_id)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/queue/fal-ai/flux/requests/x/status"),
        ("GET", "/fal-ai/queue/requests/x/cancel"),
        ("DELETE", "/queue/a/b/requests/x"),
        ("HEAD", "/queue/fal-ai/flux/dev"),
        ("OPTIONS", "/queue/fal-ai/flux/dev"),
    ],
)
def test_a_wrong_method_is_405(shared_server: Server, books: Books, method: str, path: str) -> None:
    _, key = books.account(10)
    assert Jobs(shared_server, key).session.request(method, shared_server.url + path, timeout=10).status_code == 405


def test_nobody_gets_in_without_a_key(shared_server: Server) -> None:
    for method, path in [("POST", MODEL), *ROUTES]:
        reply = requests.request(method, shared_server.url + path.format("x"), timeout=10)
        assert reply.status_code == 401
        assert reply.json()["error"]["type"] == "missing_key"


def test_a_job_that_cannot_be_paid_never_reaches_fal(shared_server: Server, books: Books, fal: Fal) -> None:
    _, key = books.account(1)
    marker = own("too-dear-a-job")
    refused = Jobs(shared_server, key).submit(body={"prompt": marker})
    assert refused.status_code == 402
    assert not fal.calls(marker)


def test_fal_sees_the_operators_credential_only(shared_server: Server, books: Books, fal: Fal) -> None:
    _, key = books.account(1000)
    jobs = Jobs(shared_server, key)
    marker = own("whose-key-is-this")
    request_id = jobs.job(body={"prompt": marker})
    jobs.completed(request_id)
    jobs.result(request_id)
    jobs.cancel(request_id)
    seen = fal.calls(request_id) + fal.calls(marker)
    assert len(seen) >= 4
    for call in seen:
        sent = {name.lower(): value for name, value in call["headers"]}
        assert sent["authorization"] == f"Key {OPERATOR_KEY}"
        assert key not in str(call)


def test_the_books_are_right_after_all_of_it(books: Books) -> None:
    assert books.verify().problems == []
