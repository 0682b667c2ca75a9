"""Counters of a serving process, as Prometheus text. Names are fixed here; nothing in here knows where numbers go."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.02, 0.1, 0.5, 2, 5, 10, 30, 60, 120, 300, 900)
_GROUP_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """What one process counts. A registry of its own, so that tests may have many."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter(
            "abhiapi_calls", "Calls forwarded to fal, by how their hold ended", ["end"], registry=self.registry
        )
        self.ended = {end: self.calls.labels(end) for end in ("settled", "released", "unknown")}
        self.refused = Counter(
            "abhiapi_refused", "Calls refused before fal heard of them, by error type", ["type"], registry=self.registry
        )
        self.limits_fallback = Counter(
            "abhiapi_limits_fallback", "Decisions on limits by this process alone, as Redis was away",
            registry=self.registry,
        )  # fmt: skip
        self.credits = Counter("abhiapi_charged_micros", "Charges, in micros", registry=self.registry)
        self.over_hold = Counter("abhiapi_charges_over_hold", "Charges above their hold", registry=self.registry)
        self.parked = Counter(
            "abhiapi_charges_not_recorded",
            "Answers withheld as the charge could not be written",
            registry=self.registry,
        )
        self.replayed = Counter(
            "abhiapi_replayed", "Answers given again under an Idempotency-Key", registry=self.registry
        )
        self.uploads = Counter(
            "abhiapi_uploads", "Uploads begun at fal, without hold or charge", registry=self.registry
        )
        self.alerts = Counter("abhiapi_alerts", "Alerts told, by kind", ["kind"], registry=self.registry)
        self.swept = Counter("abhiapi_holds_swept", "Holds released by the sweep", registry=self.registry)
        self.webhooks = Counter(
            "abhiapi_webhooks", "Attempts to deliver webhooks to customers, by what came of them", ["outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.webhooks_received = Counter(
            "abhiapi_webhooks_received", "fal's deliveries to us, by our answer", ["status"], registry=self.registry
        )
        syncs = Counter("abhiapi_price_syncs", "Times fal's prices were asked for", ["end"], registry=self.registry)
        self.price_syncs = {end: syncs.labels(end) for end in ("done", "failed")}
        self.prices_refused = Counter(
            "abhiapi_prices_refused", "Prices of fal's that were not taken over", registry=self.registry
        )
        self.fal_seconds = Histogram(
            "abhiapi_fal_seconds", "Time from sending a call to fal's whole answer", buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.fal_wait_seconds = Histogram(
            "abhiapi_fal_wait_seconds", "Time that calls waited for their turn at fal", buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.group_size = Histogram(
            "abhiapi_commit_group_size", "Writes in one commit", buckets=_GROUP_SIZES, registry=self.registry
        )

    def gauge(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A number that is read when somebody looks."""
        Gauge(name, help_text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
