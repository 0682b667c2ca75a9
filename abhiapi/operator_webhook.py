"""The operator's own URL for alerts: one POST of JSON at a time, bounded in time. Its address is a secret of theirs."""

from __future__ import annotations

from collections.abc import Mapping

import gevent
import requests

from abhiapi.db import assert_no_transaction

CONNECT_S, READ_S, WHOLE_S = 5, 10, 20


class OperatorWebhook:
    def __init__(self, url: str) -> None:
        self._url = url
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy and no credentials of the machine's

    def post(self, document: Mapping[str, object]) -> str | None:
        """Deliver; None when it was taken (2xx), else what went wrong, without the URL."""
        assert_no_transaction()
        try:
            with gevent.Timeout(WHOLE_S, requests.Timeout()):
                reply = self._session.post(
                    self._url, json=dict(document), timeout=(CONNECT_S, READ_S), allow_redirects=False, stream=True
                )
                reply.close()
        except requests.RequestException as error:  # its text holds the URL
            return type(error).__name__
        return None if 200 <= reply.status_code < 300 else f"status {reply.status_code}"

    def close(self) -> None:
        self._session.close()
