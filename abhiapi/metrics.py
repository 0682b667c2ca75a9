"""Counters of a serving process, as Prometheus text. Names are fixed here; nothing in here knows where numbers go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

MODELS_MAX = 100  # with a series of their own; calls of further models are counted as "other"
OTHER = "other"
_ADDED_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)
_SECONDS = (0.005, 0.02, 0.1, 0.5, 2, 5, 10, 30, 60, 120, 300, 900)
_GROUP_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Sample:
    """A number that somebody else knows, as it is shown. Those of one name stand side by side."""

    name: str
    help_text: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


class _Watched(Collector):
    """Numbers that are asked for when somebody looks."""

    def __init__(self, samples: Callable[[], Iterable[Sample]]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[GaugeMetricFamily]:
        families: dict[str, GaugeMetricFamily] = {}
        for sample in self._samples():
            family = families.get(sample.name)
            if family is None:
                names = [name for name, _ in sample.labels]
                family = families[sample.name] = GaugeMetricFamily(sample.name, sample.help_text, labels=names)
            family.add_metric([value for _, value in sample.labels], sample.value)
        yield from families.values()

    def describe(self) -> Iterator[GaugeMetricFamily]:
        yield from ()


class Metrics:
    """What one process counts. A registry of its own, so that tests may have many."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter(
            "abhiapi_calls", "Calls forwarded to fal, by how their hold ended", ["end"], registry=self.registry
        )
        self.ended = {end: self.calls.labels(end) for end in ("settled", "released", "unknown")}
        self._by_model = Counter(
            "abhiapi_model_calls", "Calls that ended, by model and by what became of their hold", ["model", "end"],
            registry=self.registry,
        )  # fmt: skip
        self._ends: dict[tuple[str, str], Counter] = {}
        self._models: set[str] = set()
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
        sign_ins = Counter(
            "abhiapi_sign_ins",
            "Tries to sign in to the dashboard, by what came of them",
            ["end"],
            registry=self.registry,
        )
        self.sign_ins = {end: sign_ins.labels(end) for end in ("done", "failed", "throttled")}
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
        self.added_seconds = Histogram(
            "abhiapi_added_seconds", "Time that a call spent here: before it was sent to fal, and settling it",
            buckets=_ADDED_SECONDS, registry=self.registry,
        )  # fmt: skip
        troubles = Counter(
            "abhiapi_database_errors", "Writes given up, by why: busy, or unavailable", ["kind"], registry=self.registry
        )
        self.database_errors = {kind: troubles.labels(kind) for kind in ("busy", "unavailable")}
        self.rounds = Gauge(
            "abhiapi_last_round_timestamp_seconds", "When each kind of background work last came through", ["work"],
            registry=self.registry,
        )  # fmt: skip
        self.fal_wait_seconds = Histogram(
            "abhiapi_fal_wait_seconds", "Time that calls waited for their turn at fal", buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.group_size = Histogram(
            "abhiapi_commit_group_size", "Writes in one commit", buckets=_GROUP_SIZES, registry=self.registry
        )
        ProcessCollector(registry=self.registry)  # memory, processor, open files

    def count_end(self, model: str, end: str) -> None:
        """A call that ended, under its model or, past so many of them, with all the others."""
        child = self._ends.get((model, end))
        if child is None:
            if model not in self._models:
                if len(self._models) < MODELS_MAX:
                    self._models.add(model)
                else:
                    model = OTHER
            child = self._by_model.labels(model, end)
            if model != OTHER:  # what is asked for once each must not pile up here
                self._ends[model, end] = child
        child.inc()

    def gauge(self, name: str, help_text: str, value: Callable[[], float]) -> None:
        """A number that is read when somebody looks."""
        Gauge(name, help_text, registry=self.registry).set_function(value)

    def watch(self, samples: Callable[[], Iterable[Sample]]) -> None:
        """Numbers of which there are more or fewer from time to time."""
        self.registry.register(_Watched(samples))

    def text(self) -> bytes:
        return generate_latest(self.registry)
