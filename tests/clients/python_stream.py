"""Run by tests/test_queue_clients.py: streams of fal's own Python client, at whatever address its environment names."""

import asyncio
import json
import os
import sys

import fal_client

MODEL, CAT = "fal-ai/flux/dev", {"prompt": "a café \N{CAT FACE}", "seed": 7}
CASES = {
    "plain": "",
    "pinged": "pings=1; event_delay_s=0.01",
    "split": "split=1",
    "unended": "unended=1",
    "long": "events=200",
}


async def all_of(weather: str) -> list[object]:
    return [event async for event in fal_client.stream_async(MODEL, arguments=CAT, headers={"x-fal-sandbox": weather})]


async def collect() -> dict[str, object]:
    return {name: await all_of(weather) for name, weather in CASES.items()}


def failure(**options: object) -> list[str]:
    """How a stream ends that does not end well: after how many events, and with which exception."""
    events = 0
    client = fal_client.SyncClient(key=options.pop("key", None))
    try:
        for _ in client.stream(options.pop("model", MODEL), **{"arguments": CAT, **options}):
            events += 1
    except Exception as error:
        return [str(events), type(error).__name__, str(error)]
    return [str(events), "", ""]


told = {
    "sync": {
        name: list(fal_client.stream(MODEL, arguments=CAT, headers={"x-fal-sandbox": weather}))
        for name, weather in CASES.items()
    },
    "async": asyncio.run(collect()),
    "errors": {
        "invalid": failure(arguments={"image_size": "square"}),
        "unknown": failure(model="fal-ai/no-such-model"),
        "cut": failure(headers={"x-fal-sandbox": "cut_after=2"}),
        "poor": failure(key=os.environ["POOR_KEY"]),
    },
}
json.dump(told, sys.stdout)
