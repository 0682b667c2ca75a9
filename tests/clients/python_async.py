"""Run by tests/test_queue_clients.py: the asynchronous half of fal's own Python client."""

import asyncio
import json
import os
import sys

import fal_client

MODEL, CAT = "fal-ai/flux/dev", {"prompt": "a cat", "image_size": "landscape_4_3"}


async def main() -> dict[str, object]:
    told: dict[str, object] = {"run": await fal_client.run_async(MODEL, arguments=CAT)}
    handle = await fal_client.submit_async(MODEL, arguments=CAT)
    events = [type(event).__name__ async for event in handle.iter_events(with_logs=True)]
    final = await fal_client.status_async(MODEL, handle.request_id, with_logs=True)
    told["submit"] = {
        "events": events,
        "final": type(final).__name__,
        "logs": [entry["message"] for entry in final.logs],
        "get": await handle.get(),
        "result": await fal_client.result_async(MODEL, handle.request_id),
    }
    told["subscribe"] = await fal_client.subscribe_async(MODEL, arguments=CAT)
    running = await fal_client.submit_async(MODEL, arguments=CAT, headers={"x-fal-sandbox": "queue_until=never-async"})
    await fal_client.cancel_async(MODEL, running.request_id)
    try:
        await running.get()
        told["cancel"] = "no error"
    except fal_client.client.FalClientHTTPError as error:
        told["cancel"] = [error.status_code, error.error_type]
    together = await asyncio.gather(*(fal_client.subscribe_async(MODEL, arguments=CAT) for _ in range(5)))
    told["together"] = [answer["_billing"]["credits_used"] for answer in together]
    errors: dict[str, list[object]] = {}
    told["errors"] = errors
    poor = fal_client.AsyncClient(key=os.environ["POOR_KEY"])
    for name, call in {
        "invalid": fal_client.subscribe_async(MODEL, arguments={"image_size": "square"}),
        "unpriced": fal_client.run_async("fal-ai/no-such-model", arguments=CAT),
        "unknown_job": fal_client.result_async(MODEL, "019da0f9-f0d6-7eb0-9e16-d7bcfd663a72"),
        "poor_run": poor.run(MODEL, arguments=CAT),
        "poor_submit": poor.submit(MODEL, arguments=CAT),
    }.items():
        try:
            await call
            errors[name] = []
        except fal_client.client.FalClientHTTPError as error:
            errors[name] = [error.status_code, error.message]
    return told


json.dump(asyncio.run(main()), sys.stdout)
