"""fal's prices taken over: asked for page by page, judged as a whole, written in one transaction or not at all.

The network comes first and the transaction after it, so that nothing is locked while fal answers. In a server the
work is claimed, so that one process does it, once a day, and its failure changes nothing but a line in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from abhiapi import costs, fal_prices, timers
from abhiapi.db import Tx
from abhiapi.errors import AbhiError
from abhiapi.platform_api import MODELS_PER_CALL, WHOLE_TIMEOUT_S, PlatformApi
from abhiapi.price_sync import Answer, Plan, Quote, plan
from abhiapi.price_terms import MODEL_ID, PriceRule
from abhiapi.runtime import Runtime

log = logging.getLogger("abhiapi")

TIMER = "prices"
SOURCE = "fal api"
LEASE_MS = 2 * WHOLE_TIMEOUT_S * 1000
RETRY_MS = 900_000  # a failed sync is tried again after this
WRITE_PATIENCE_S = 60
NAMED_MAX = 10  # models that one line of the log names

Progress = Callable[[int, int], None]


def fetched(api: PlatformApi, progress: Progress = lambda done, of: None) -> Answer:
    """All models and all prices. ``progress`` hears of (models priced, models listed). Raises `PlatformError`."""
    listed: list[str] = []
    for page in api.models():
        listed += page
        progress(0, len(listed))
    quotes: dict[str, Quote] = {}
    models = [model for model in listed if MODEL_ID.fullmatch(model)]
    for start in range(0, len(models), MODELS_PER_CALL):
        batch = models[start : start + MODELS_PER_CALL]
        quotes.update((quote.model, quote) for quote in api.prices(batch))
        progress(start + len(batch), len(models))
    return Answer(listed, quotes)


def planned(tx: Tx, answer: Answer, rules: Iterable[PriceRule], *, force: bool = False) -> Plan:
    """What an answer would change. Raises `BadPriceAnswer`."""
    return plan(fal_prices.newest(tx), rules, answer, source=SOURCE, force=force)


def applied(
    tx: Tx, answer: Answer, rules: Iterable[PriceRule], *, now_ms: int, interval_s: int, force: bool = False
) -> Plan:
    """Write down what an answer changes, all of it. Raises `BadPriceAnswer`, with nothing written."""
    made = planned(tx, answer, rules, force=force)
    fal_prices.append(tx, made.words, now_ms=now_ms)
    timers.done(tx, TIMER, now_ms=now_ms, due_in_ms=interval_s * 1000)
    return made


def run_if_due(rt: Runtime) -> Plan | None:
    """Take fal's prices over if it is time and no other process is at it; what was done. Raises nothing of fal's."""
    interval_s, now = rt.settings.prices_sync_s, rt.now_ms()
    claimed = rt.write(
        lambda tx: timers.claim(
            tx, TIMER, process_id=rt.process_id, now_ms=now, lease_ms=LEASE_MS, interval_ms=interval_s * 1000
        ),
        patience_s=WRITE_PATIENCE_S,
    )
    if not claimed:
        return None
    api = PlatformApi(rt.settings.fal_api_url, rt.settings.fal_key or "")
    try:
        answer = fetched(api)
        made = rt.write(lambda tx: _daily(tx, rt, answer), patience_s=WRITE_PATIENCE_S)
    except AbhiError as error:
        rt.metrics.price_syncs["failed"].inc()
        log.error("fal's prices were not taken over, the old ones stay: %s", error.message)
        due_in_ms = min(RETRY_MS, interval_s * 1000)
        rt.write(lambda tx: timers.failed(tx, TIMER, now_ms=rt.now_ms(), due_in_ms=due_in_ms), patience_s=60)
        return None
    finally:
        api.close()
    rt.metrics.price_syncs["done"].inc()
    rt.metrics.prices_refused.inc(len(made.refused))
    _tell(made)
    return made


def _daily(tx: Tx, rt: Runtime, answer: Answer) -> Plan:
    costs.age(tx)
    return applied(tx, answer, rt.rules, now_ms=rt.now_ms(), interval_s=rt.settings.prices_sync_s)


def _tell(made: Plan) -> None:
    log.info(
        "fal's prices taken over: %d models, %d new, %d changed, %d gone, %d refused, %d placeholders",
        made.listed,
        len(made.new),
        len(made.changed),
        len(made.gone),
        len(made.refused),
        len(made.placeholder),
    )
    for change in made.refused[:NAMED_MAX]:
        log.warning("fal's price of %s was refused: %s", change.model, change.why)
    if len(made.refused) > NAMED_MAX:
        log.warning("and %d more: `abhiapi prices diff` shows them", len(made.refused) - NAMED_MAX)
