"""Run by tests/test_webhooks.py with fal's own Python client: a job whose end is told to WEBHOOK_URL, and a refusal."""

import json
import os
import sys

import fal_client

MODEL, CAT = "fal-ai/flux/dev", {"prompt": "a cat", "image_size": "landscape_4_3"}
told: dict[str, object] = {
    "request_id": fal_client.submit(MODEL, arguments=CAT, webhook_url=os.environ["WEBHOOK_URL"]).request_id
}
try:
    fal_client.submit(MODEL, arguments=CAT, webhook_url="https://10.0.0.1/hook")
except fal_client.client.FalClientHTTPError as error:
    told["refused"] = [error.status_code, error.message]
json.dump(told, sys.stdout)
