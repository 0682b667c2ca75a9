"""The simulator's queue by itself: what the tests of the proxy take for fal's."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests

from tests.harness import until
from tests.receiver import Receiver, is_signed
from tests.sandbox_client import CAT, FLUX, TIMEOUT_S, Fal, sim, simulator_url

__all__ = ["sim", "simulator_url"]  # fixtures

QUEUE = "/queue" + FLUX


def submitted(sim: Fal, weather: str = "", **more: Any) -> dict[str, Any]:
    reply = sim.post(QUEUE, CAT, weather, **more)
    assert reply.status_code == 200
    told: dict[str, Any] = reply.json()
    return told


def completed(sim: Fal, job: dict[str, Any]) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        reply = sim.get(job["status_url"])
        assert reply.status_code == (200 if reply.json()["status"] == "COMPLETED" else 202)
        return reply.json() if reply.status_code == 200 else None

    return until(look, what="the job completes")  # type: ignore[return-value]


def test_a_job_goes_through_its_states_and_is_billed_once(sim: Fal) -> None:
    job = submitted(sim, "queue_until=q1; hold_until=r1")
    base = f"{sim.url}/queue/fal-ai/flux/requests/{job['request_id']}"
    assert job == {
        "status": "IN_QUEUE", "request_id": job["request_id"], "response_url": base, "status_url": f"{base}/status",
        "cancel_url": f"{base}/cancel", "queue_position": 1,
    }  # fmt: skip
    assert sim.get(job["response_url"]).status_code == 400
    assert sim.get(job["response_url"]).json() == {"detail": "Request is still in progress"}
    sim.session.post(sim.url + "/_sandbox/release", json={"name": "q1"}, timeout=TIMEOUT_S)
    running = until(lambda: "logs" in (shown := sim.get(f"{base}/status?logs=1").json()) and shown, what="it runs")
    assert running["status"] == "IN_PROGRESS"
    assert [entry["message"] for entry in running["logs"]] == ["started"]
    assert sim.bill()["calls"] == 0
    sim.session.post(sim.url + "/_sandbox/release", json={"name": "r1"}, timeout=TIMEOUT_S)
    done = completed(sim, job)
    assert done["logs"] is None
    assert "error" not in done
    for path in (base, f"{base}/response", f"{base}/", base.replace("flux/", "flux/dev/")):
        result = sim.get(path)
        assert result.headers["x-fal-billable-units"] == "1"
        assert result.headers["x-fal-request-id"] == job["request_id"]
        assert len(result.json()["images"]) == 1
    assert [one["request_id"] for one in sim.bill()["billed"]] == [job["request_id"]]


def test_a_job_that_nobody_asks_about_is_billed(sim: Fal) -> None:
    job = submitted(sim)
    until(lambda: sim.bill()["calls"] == 1, what="it is billed")
    assert sim.bill()["billed"][0]["request_id"] == job["request_id"]


def test_bad_input_fails_in_the_result(sim: Fal) -> None:
    reply = sim.post(QUEUE, {"image_size": "square"})
    assert reply.status_code == 200
    assert completed(sim, reply.json())["error"] == "Invalid status code: 422"
    assert sim.get(reply.json()["response_url"]).status_code == 422
    assert sim.bill()["calls"] == 0


@pytest.mark.parametrize(
    ("status", "kind"), [(504, "request_timeout"), (503, "runner_scheduling_failure"), (500, None)]
)
def test_a_failed_job_is_completed_with_an_error(sim: Fal, status: int, kind: str | None) -> None:
    job = submitted(sim, f"status={status}")
    assert completed(sim, job).get("error_type") == kind
    assert sim.get(job["response_url"]).status_code == status
    assert sim.bill()["calls"] == 0


def test_cancelling(sim: Fal) -> None:
    queued = submitted(sim, "queue_until=never")
    assert sim.session.put(queued["cancel_url"], timeout=TIMEOUT_S).status_code == 202
    assert completed(sim, queued)["error_type"] == "client_cancelled"
    assert sim.get(queued["response_url"]).status_code == 499
    late = sim.session.put(queued["cancel_url"], timeout=TIMEOUT_S)
    assert (late.status_code, late.json()) == (400, {"status": "ALREADY_COMPLETED"})
    stubborn = submitted(sim, "queue_s=0; hold_until=stubborn; ignores_cancel=1")
    until(lambda: sim.get(stubborn["status_url"]).json()["status"] == "IN_PROGRESS", what="it runs")
    assert sim.session.put(stubborn["cancel_url"], timeout=TIMEOUT_S).status_code == 202
    sim.session.post(sim.url + "/_sandbox/release", json={"name": "stubborn"}, timeout=TIMEOUT_S)
    assert "error" not in completed(sim, stubborn)
    assert sim.bill()["calls"] == 1


def test_a_stream_shows_each_state_and_ends(sim: Fal) -> None:
    job = submitted(sim, "queue_s=0.2; run_s=0.2")
    stream = sim.get(job["status_url"] + "/stream")
    assert stream.headers["content-type"].startswith("text/event-stream")
    shown = [json.loads(line[6:])["status"] for line in stream.text.splitlines() if line.startswith("data: ")]
    assert shown == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]


def test_an_unknown_job_is_not_found(sim: Fal) -> None:
    for suffix in ("", "/response", "/status", "/status/stream"):
        reply = sim.get(f"{QUEUE}/requests/no-such-job{suffix}")
        assert (reply.status_code, reply.json()) == (404, {"status": "NOT_FOUND"})
    job = submitted(sim)
    completed(sim, job)
    assert sim.session.delete(sim.url + "/_sandbox/jobs", timeout=TIMEOUT_S).json() == {"jobs": []}
    assert sim.get(job["status_url"]).status_code == 404


def test_strangers_and_wrong_methods_are_refused(sim: Fal) -> None:
    job = submitted(sim)
    assert requests.get(job["status_url"], timeout=TIMEOUT_S).status_code == 401
    assert requests.post(sim.url + QUEUE, json=CAT, timeout=TIMEOUT_S).status_code == 401
    assert sim.session.post(job["status_url"], timeout=TIMEOUT_S).status_code == 405
    assert sim.post("/queue/fal-ai/no-such-model", CAT).status_code == 404


def test_weather_ahead_is_for_one_kind_of_poll(sim: Fal) -> None:
    job = submitted(sim)
    completed(sim, job)
    sim.order({"match": "queue/result", "status": 503, "body": "html"})
    assert sim.get(job["status_url"]).status_code == 200
    trouble = sim.get(job["response_url"])
    assert trouble.status_code == 503
    assert "x-fal-request-id" not in trouble.headers
    assert sim.get(job["response_url"]).status_code == 200


@pytest.mark.parametrize(
    ("weather", "count", "genuine"),
    [("", 1, True), ("webhook=twice", 2, True), ("webhook=bad_signature", 1, False), ("webhook=stale", 1, False)],
)
def test_a_webhook_is_called_as_fal_does(sim: Fal, weather: str, count: int, genuine: bool) -> None:
    with Receiver.started() as receiver:
        job = submitted(sim, weather, params={"fal_webhook": receiver.url()})
        for told in receiver.delivered(job["request_id"], count):
            assert told.json["payload"] == sim.get(job["response_url"]).json()
            assert {name: told.json[name] for name in ("request_id", "status")} == {
                "request_id": job["request_id"], "status": "OK",
            }  # fmt: skip
            for path in ("/.well-known/jwks.json", "/rest/.well-known/jwks.json"):
                assert is_signed(sim.get(sim.url + path).json(), told) is genuine


def test_a_webhook_is_repeated_until_it_is_taken(sim: Fal) -> None:
    with Receiver.started() as receiver:
        receiver.statuses = [500, 500]
        job = submitted(sim, "status=500", params={"fal_webhook": receiver.url()})
        last = receiver.delivered(job["request_id"], 3)[-1]
        assert (last.json["status"], last.json["error"]) == ("ERROR", "Invalid status code: 500")


def test_the_simulator_calls_this_machine_only(sim: Fal) -> None:
    with Receiver.started() as receiver:
        completed(sim, submitted(sim, "webhook=none", params={"fal_webhook": receiver.url()}))
        completed(sim, submitted(sim, params={"fal_webhook": "http://93.184.216.34/"}))
        assert receiver.deliveries == []
