"""A day at the simulator: a thousand calls of all kinds, faults included, and books that agree with fal's bill.

What issue after issue promised, in one place: `reconcile` finds nothing that is not explained, the margin report's
cost is fal's own bill to the nano-dollar, every hold has ended, and the ledger verifies.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import requests

from abhiapi import reports
from abhiapi.reports import UsageRow
from tests.command_line import CommandLine, finish
from tests.harness import Fal, Server, until
from tests.test_queue import Jobs

CALLS = int(os.environ.get("DAY", "1000"))  # DAY=10000 is a busy one
AT_ONCE = 16
MODELS: dict[str, dict[str, Any]] = {
    "fal-ai/flux/dev": {"prompt": "a day", "image_size": "square_hd"},
    "fal-ai/flux/schnell": {"prompt": "a day", "num_images": 2},
    "fal-ai/nano-banana": {"prompt": "a day"},
    "fal-ai/recraft/v3/text-to-image": {"prompt": "a day"},
    "fal-ai/kling-video/v2.1/master/text-to-video": {"prompt": "a day", "duration": "5"},
    "fal-ai/esrgan": {"image_url": "https://example.com/a.png"},
}
# How often each happens to a sync call, and to a job's result.
WEATHER = {
    "": 60, "status=500": 4, "status=503": 2, "status=422": 3, "status=422; units=1": 2, "units=0": 2,
    "units=none": 6, "units=twice": 2, "units=NaN": 2, "units_factor=2.5": 3, "body=empty; units=1": 1,
    "drop=before_headers": 3, "drop=in_headers": 2, "drop=in_body": 3, "length=long": 2, "garbage=1": 1,
    "chunked=1": 3, "encoding=gzip": 2, "delay_s=4.5": 1,
}  # fmt: skip
OF_JOBS = {"": 60, "status=500": 5, "status=422": 4, "status=422; units=1": 3, "units=none": 5, "units_factor=3": 3}
OF_STREAMS = {"": 20, "cut_after=2": 4, "units=none": 5, "status=500": 2, "events=9": 3, "status=422": 2}


@pytest.fixture
def day(tmp_path: Path) -> Iterator[tuple[Server, Fal]]:
    """A simulator whose bill is this day's alone."""
    with Fal.started(tmp_path) as fal:
        settings = {"ABHIAPI_UPSTREAM_TIMEOUT_S": "4", "ABHIAPI_RECONCILE_INTERVAL_S": "1"}
        with Server.started(tmp_path, fal.url, **settings) as server:
            yield server, fal


def drawn(chance: random.Random, weights: dict[str, int]) -> str:
    return chance.choices(list(weights), list(weights.values()))[0]


def one(server: Server, key: str, number: int) -> str:
    """One customer's call; what kind it was."""
    chance = random.Random(number)  # the same day every time
    model = chance.choice(list(MODELS))
    kind = chance.choices(("sync", "stream", "polled", "forgotten", "cancelled", "refused"), (55, 12, 12, 12, 5, 4))[0]
    jobs = Jobs(server, key)
    path, body = f"/queue/{model}", MODELS[model]
    if kind == "sync":
        server.post(key, f"/{model}", body, weather=drawn(chance, WEATHER))
    elif kind == "refused":
        server.post(key, f"/{model}", {"prompt": 7}) if number % 2 else server.post(key, "/acme/nothing")
    elif kind == "stream":
        try:
            server.post(key, "/fal-ai/flux/dev/stream", MODELS["fal-ai/flux/dev"], weather=drawn(chance, OF_STREAMS))
        except requests.RequestException:  # a stream that was cut at fal is cut here
            pass
    else:
        submitted = jobs.submit(path, body, weather=drawn(chance, OF_JOBS))
        told = submitted.json()
        assert submitted.status_code == 200, told
        if kind == "cancelled":
            jobs.session.put(told["cancel_url"], timeout=60)
        elif kind == "polled":
            until(lambda: jobs.get(told["status_url"]).json()["status"] == "COMPLETED", what="the job is complete")
            jobs.get(told["response_url"])
    return kind


def reconciled(server: Server, *arguments: str) -> dict[str, Any]:
    env = {name: value for name, value in server.env.items() if name.startswith(("ABHIAPI_", "FAL_"))}
    done = finish(CommandLine(server.folder).start("reconcile", "--json", *arguments, **env))
    assert done.exit_code == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout, parse_float=Decimal)
    return told


def test_a_day_adds_up_to_fals_own_bill(day: tuple[Server, Fal]) -> None:
    server, fal = day
    keys = [server.books.account(50_000_000)[1] for _ in range(6)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        kinds = Counter(pool.map(lambda number: one(server, keys[number % len(keys)], number), range(CALLS)))
    assert min(kinds.values()) > 20
    until(lambda: not in_flight(server), what="every job was looked at", within_s=60)

    told = reconciled(server)
    assert told["drift"] == []
    assert (told["failed"], told["open"], told["pending"]) == (0, 0, 0)
    assert told["adjusted"] + told["settled"] + told["losses"] > 0  # the faults did happen
    assert server.books.read(reports.open_holds) == []

    bill = requests.get(f"{fal.url}/_sandbox/bill", timeout=30).json()
    assert told["events"] == bill["calls"] > CALLS // 2
    total = whole(server)
    assert total.fal_cost_nano_usd == bill["cost_nano_usd"]
    assert total.charged_micros == sum(
        -row.amount_micros
        for row, _ in server.books.read(lambda tx: list(reports.all_entries(tx)))
        if row.kind != "topup"
    )
    again = reconciled(server, "--since", "2d")
    assert (again["adjusted"], again["settled"], again["drift"]) == (0, 0, [])
    assert whole(server) == total
    assert server.books.verify().problems == []


def in_flight(server: Server) -> list[str]:
    """States of the calls that will still end by themselves."""
    return [row.state for row in server.books.read(reports.open_holds) if row.state in ("held", "sent")]


def whole(server: Server) -> UsageRow:
    return server.books.read(lambda tx: reports.total(reports.usage(tx, "model")))
