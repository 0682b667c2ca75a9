"""Run by tests/test_queue_clients.py with fal's own Python client, which knows of the proxy by its environment only."""

import json
import os
import sys

import fal_client

MODEL, CAT = "fal-ai/flux/dev", {"prompt": "a cat", "image_size": "landscape_4_3"}
told: dict[str, object] = {"module": fal_client.client.QUEUE_URL_FORMAT}

told["run"] = fal_client.run(MODEL, arguments=CAT)

handle = fal_client.submit(MODEL, arguments=CAT)
first = handle.status(with_logs=True)
events = [type(event).__name__ for event in handle.iter_events(with_logs=True)]
final = fal_client.status(MODEL, handle.request_id, with_logs=True)
told["submit"] = {
    "status_url": handle.status_url,
    "first": type(first).__name__,
    "events": events,
    "final": type(final).__name__,
    "logs": [entry["message"] for entry in final.logs],
    "get": handle.get(),
    "result": fal_client.result(MODEL, handle.request_id),
}

updates: list[str] = []
told["subscribe"] = fal_client.subscribe(
    MODEL, arguments=CAT, with_logs=True, on_queue_update=lambda update: updates.append(type(update).__name__)
)
told["updates"] = sorted(set(updates))
told["subscribe_plain"] = fal_client.subscribe(MODEL, arguments=CAT)

running = fal_client.submit(MODEL, arguments=CAT, headers={"x-fal-sandbox": "queue_until=never-for-python"})
running.cancel()
try:
    running.get()
    told["cancel"] = "no error"
except fal_client.client.FalClientHTTPError as error:
    told["cancel"] = [error.status_code, error.error_type]

errors: dict[str, list[object]] = {}
poor = fal_client.SyncClient(key=os.environ["POOR_KEY"])
told["errors"] = errors
for name, call in {
    "invalid": lambda: fal_client.subscribe(MODEL, arguments={"image_size": "square"}),
    "unpriced": lambda: fal_client.submit("fal-ai/no-such-model", arguments=CAT),
    "invalid_run": lambda: fal_client.run(MODEL, arguments={"image_size": "square"}),
    "poor_run": lambda: poor.run(MODEL, arguments=CAT),
    "poor_submit": lambda: poor.submit(MODEL, arguments=CAT),
    "unknown_job": lambda: fal_client.status(MODEL, "019da0f9-f0d6-7eb0-9e16-d7bcfd663a72"),
    "webhook": lambda: fal_client.submit(MODEL, arguments=CAT, webhook_url="https://10.0.0.1/hook"),
}.items():
    try:
        call()
        errors[name] = []
    except fal_client.client.FalClientHTTPError as error:
        errors[name] = [error.status_code, error.message]

json.dump(told, sys.stdout)
