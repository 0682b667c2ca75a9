"""The queue on the wire, without a network: paths, URLs in answers, and what fal's answers mean for a job."""

from __future__ import annotations

import json
from typing import Any

import gevent
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abhiapi import errors, jsonbytes, queuewire
from abhiapi.polls import OPEN_MAX, POLLS_AT_ONCE, Polls, Shared

JOB = "019da0f9-f0d6-7eb0-9e16-d7bcfd663a72"
BASE, FAL = "https://proxy.example.com", "https://queue.fal.run"


@pytest.mark.parametrize(
    "app", ["fal-ai/flux", "fal-ai/flux/dev/image-to-image", "workflows/o/n", "comfy/o/n", "123-app"]
)
@pytest.mark.parametrize("end", ["", "/"])
@pytest.mark.parametrize(
    ("suffix", "action"),
    [
        ("", "result"),
        ("/response", "result"),
        ("/status", "status"),
        ("/status/stream", "stream"),
        ("/cancel", "cancel"),
    ],
)
def test_every_path_form_names_the_job(app: str, suffix: str, action: str, end: str) -> None:
    assert queuewire.parse(f"/queue/{app}/requests/{JOB}{suffix}{end}") == queuewire.Route(action, JOB)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("suffix", "action"),
    [
        ("", "status"),
        ("/status", "status"),
        ("/status/stream", "stream"),
        ("/response", "result"),
        ("/cancel", "cancel"),
    ],
)
def test_the_short_form_names_the_job(suffix: str, action: str) -> None:
    assert queuewire.parse(f"/fal-ai/queue/requests/{JOB}{suffix}") == queuewire.Route(action, JOB)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "path", ["/fal-ai/flux/dev", "/fal-ai/flux/dev/", "/fal-ai/flux/requests", "/a/requests/b/other"]
)
def test_everything_else_is_a_submit_to_that_path(path: str) -> None:
    assert queuewire.parse("/queue" + path) == queuewire.Route("submit", target=path)


@pytest.mark.parametrize(
    "path",
    [
        "/queue//",
        "/queue/../v1",
        f"/queue/fal-ai/flux/requests/..%2f{JOB}",
        "/%71ueue/fal-ai/flux",
        "/queue/a@b",
    ],
)
def test_paths_that_could_leave_their_host_are_refused(path: str) -> None:
    with pytest.raises(errors.ForbiddenPath):
        queuewire.parse(path)


@pytest.mark.parametrize("path", ["/queue/", "/fal-ai/queue/requests/", f"/fal-ai/queue/requests/{JOB}/other"])
def test_unknown_short_forms_are_no_routes(path: str) -> None:
    with pytest.raises(errors.UnknownRoute):
        queuewire.parse(path)


@pytest.mark.parametrize(
    ("model", "app"),
    [
        ("fal-ai/kling-video/v2.1/pro/image-to-video", "fal-ai/kling-video"),
        ("fal-ai/flux", "fal-ai/flux"),
        ("workflows/owner/name", "workflows/owner/name"),
        ("comfy/owner/name/extra", "comfy/owner/name"),
    ],
)
def test_poll_paths_have_the_app_only(model: str, app: str) -> None:
    assert queuewire.job_path(model, JOB, "status") == f"/{app}/requests/{JOB}/status"


@pytest.mark.parametrize(
    ("query", "wanted"),
    [("logs=1", True), ("logs=true", True), ("logs=True", True), ("logs=0", False), ("logs=false", False), ("", False)],
)
def test_logs_are_asked_for_in_every_spelling(query: str, wanted: bool) -> None:
    assert queuewire.wants_logs(query) is wanted


def rewritten(document: bytes) -> bytes:
    return queuewire.rewritten(document, fal_url=FAL, base_url=BASE, model="fal-ai/flux/dev", request_id=JOB)


def test_only_the_urls_at_the_top_are_changed() -> None:
    document = (
        b'{ "status_url" :"https:\\/\\/queue.fal.run/fal-ai/flux/requests/R/status", "n":[1.0,1E400,{"cancel_url":'
        b'"https://queue.fal.run/x"}],"text":"status_url","response_url":null,"cancel_url":"https://queue.fal.run/c"}\n'
    )
    assert rewritten(document) == (
        b'{ "status_url" :"https://proxy.example.com/queue/fal-ai/flux/requests/R/status", "n":[1.0,1E400,'
        b'{"cancel_url":"https://queue.fal.run/x"}],"text":"status_url","response_url":null,'
        b'"cancel_url":"https://proxy.example.com/queue/c"}\n'
    )


@pytest.mark.parametrize("url", ["https://queue.falrun.com/a/requests/R", "https://queue.fal.run.evil/a", "/relative"])
def test_no_url_leads_past_this_service(url: str) -> None:
    """fal's backup domain, a look-alike, or anything else: the job's own address here stands for it."""
    document = json.dumps({"status_url": url, "response_url": url, "cancel_url": url}).encode()
    here = f"{BASE}/queue/fal-ai/flux/requests/{JOB}"
    shown = {"status_url": f"{here}/status", "response_url": here, "cancel_url": f"{here}/cancel"}
    assert json.loads(rewritten(document)) == shown


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just("status_url"), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text() | st.sampled_from(["status_url", "x"]), json_values, max_size=5), st.booleans())
def test_rewriting_changes_top_level_strings_and_nothing_else(value: dict[str, Any], is_ascii: bool) -> None:
    try:
        document = json.dumps(value, ensure_ascii=is_ascii).encode()
    except UnicodeEncodeError:
        return
    changed = jsonbytes.with_strings(document, lambda name, text: "new" if name == "status_url" else None)
    wanted = {name: "new" if name == "status_url" and isinstance(was, str) else was for name, was in value.items()}
    assert json.loads(changed) == wanted
    assert jsonbytes.with_strings(document, lambda name, text: None) == document


@pytest.mark.parametrize("document", [b"", b"[]", b'"x"', b'{"status_url":', b'{"status_url":"\xff"}', b"nginx"])
def test_what_is_no_object_passes_unchanged(document: bytes) -> None:
    assert rewritten(document) == document


@pytest.mark.parametrize(
    ("status", "units", "has_id", "body", "meaning"),
    [
        (200, ["1"], True, b"", "final"),
        (204, [], True, b"", "final"),
        (422, [], True, b'{"detail":[]}', "final"),
        (422, ["2"], True, b"", "final"),
        (499, [], True, b'{"detail":"Request was cancelled"}', "final"),
        (400, [], True, b'{"detail":"bad input"}', "final"),
        (400, [], True, b'{"detail": "Request is still in progress"}', "pending"),
        (404, [], False, b'{"status": "NOT_FOUND"}', "gone"),
        (404, [], True, b'{"detail":"Path /x not found"}', "final"),
        (500, [], True, b'{"detail":"x"}', "final"),
        (503, [], False, b"<center>nginx</center>", "retry"),
        (401, [], True, b"", "retry"),
        (403, [], True, b"", "retry"),
        (429, [], True, b"", "retry"),
        (302, [], True, b"", "retry"),
    ],
)
def test_what_an_answer_to_the_result_means(
    status: int, units: list[str], has_id: bool, body: bytes, meaning: str
) -> None:
    assert queuewire.meaning(status, units, has_id, body) == meaning


@pytest.mark.parametrize(
    ("status", "failed"),
    [
        (b'{"status":"COMPLETED","error":"Invalid status code: 500"}', True),
        (b'{"status":"COMPLETED","error":"Request timed out","error_type":"request_timeout"}', True),
        (b'{"status":"COMPLETED","error":"Invalid status code: 422"}', False),  # may cost money
        (b'{"status":"COMPLETED","error":"Request was cancelled","error_type":"client_cancelled"}', False),
        (b'{"status":"COMPLETED","error":null,"error_type":["request_timeout"]}', False),
        (b'{"status":"COMPLETED"}', False),
        (b'{"status":"IN_PROGRESS","error":"Invalid status code: 500"}', False),
        (b"nginx", False),
    ],
)
def test_which_statuses_tell_of_an_end_that_costs_nothing(status: bytes, failed: bool) -> None:
    assert queuewire.has_failed(status) is failed


@pytest.mark.parametrize(
    ("body", "request_id"),
    [
        (b'{"request_id":"%s"}' % JOB.encode(), JOB),
        (b'{"request_id":"../x"}', None),
        (b'{"request_id":7}', None),
        (b"{}", None),
        (b"[]", None),
        (b'{"request_id":""}', None),
    ],
)
def test_only_a_plain_id_makes_a_job(body: bytes, request_id: str | None) -> None:
    assert queuewire.request_id_of(body) == request_id


def test_those_who_wait_share_one_answer() -> None:
    now, asked = [0.0], []
    shared: Shared[int] = Shared(0.3, now=lambda: now[0])

    def fetch() -> int:
        asked.append(1)
        gevent.sleep(0)
        return len(asked)

    waiting = [gevent.spawn(shared.get, "job", fetch) for _ in range(50)]
    gevent.joinall(waiting, raise_error=True)
    assert {greenlet.value for greenlet in waiting} == {1}
    now[0] = 0.29
    assert shared.get("job", fetch) == 1
    now[0] = 0.31
    assert shared.get("job", fetch) == 2
    shared.forget("job")
    assert shared.get("job", fetch) == 3


def test_a_failure_is_told_to_all_who_wait_and_not_kept() -> None:
    shared: Shared[int] = Shared(10)

    def fail() -> int:
        gevent.sleep(0)
        raise errors.UpstreamBroken("broken")

    waiting = [gevent.spawn(shared.get, "job", fail) for _ in range(3)]
    gevent.joinall(waiting)
    assert all(isinstance(greenlet.exception, errors.UpstreamBroken) for greenlet in waiting)
    assert shared.get("job", lambda: 7) == 7


def test_old_answers_are_forgotten() -> None:
    now = [0.0]
    shared: Shared[int] = Shared(0.3, now=lambda: now[0])
    for number in range(1000):
        now[0] += 0.1
        shared.get(number, lambda: 1)
    assert len(shared._entries) < 100


def test_floods_of_polls_are_refused() -> None:
    polls = Polls()

    def flood() -> None:
        for _ in range(20 * POLLS_AT_ONCE):
            polls.allow(1)

    with pytest.raises(errors.RateLimited):
        flood()
    polls.allow(2)


def test_open_streams_are_bounded_for_each_account() -> None:
    polls = Polls()
    closing = [polls.opened(1) for _ in range(OPEN_MAX)]
    with pytest.raises(errors.TooManyConcurrent):
        polls.check_open(1)
    polls.check_open(2)
    closing.pop()()
    polls.check_open(1)
