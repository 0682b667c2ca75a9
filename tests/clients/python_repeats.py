"""Run by tests/test_idempotency_clients.py: fal's own Python client behind a network that loses answers."""

import json
import os
import sys

import fal_client

MODEL, CAT = "fal-ai/flux/dev", {"prompt": os.environ["PROMPT"], "image_size": "landscape_4_3"}
WITH_KEYS = bool(os.environ.get("WITH_KEYS"))


def headers(name: str) -> dict[str, str]:
    return {"Idempotency-Key": f"{os.environ['PROMPT']} {name}"} if WITH_KEYS else {}


handle = fal_client.submit(MODEL, arguments=CAT, headers=headers("submit"))
told = {
    "run": fal_client.run(MODEL, arguments=CAT, headers=headers("run")),
    "get": handle.get(),
    "subscribe": fal_client.subscribe(MODEL, arguments=CAT, headers=headers("subscribe")),
}
json.dump(told, sys.stdout)
