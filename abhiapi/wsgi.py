"""The application of a serving process: settings from the environment, runtime, timers, `create_app`.

Imported by each worker after gevent has patched the standard library. `app.py` and the installed command both
point here.
"""

from __future__ import annotations

from time import monotonic

import gevent

from abhiapi import alerting, monitoring, reconcile, runtime, sweep, sync, webhook_delivery
from abhiapi.errors import AbhiError, DatabaseUnavailable
from abhiapi.operator_webhook import OperatorWebhook
from abhiapi.settings import Settings
from abhiapi.web import create_app

PRICES_LOOK_S = 60  # how often a server looks whether fal's prices are due
LOCK_LOOK_S = 3  # how often a server looks whether it is still seen to live
SWEEP_MAX_S = 10  # between sweeps: what a dead process held is free within a minute


def sweep_for_ever(rt: runtime.Runtime) -> None:
    """Look for holds that nobody will end, as often as the settings say, or more often."""
    while True:
        gevent.sleep(min(SWEEP_MAX_S, rt.settings.reconcile_interval_s))
        try:
            sweep.run_once(rt)
            sweep.forget_old_keys(rt)
            monitoring.came_through(rt, "sweep")
        except AbhiError as error:  # the database's trouble: the next round tries again
            runtime.log.warning("the sweep will be tried again: %s", error.message)
        except Exception:  # a bug, or trouble of the system's: without this line no hold would ever be swept again
            runtime.log.exception("the sweep failed and will be tried again")


def live_for_ever(rt: runtime.Runtime) -> None:
    """Keep the lock that says that this process lives; beside the sweep, which may take longer than that lasts."""
    while True:
        gevent.sleep(LOCK_LOOK_S)
        try:
            rt.lock.keep()
        except AbhiError as error:
            runtime.log.warning("the lock of this process will be looked at again: %s", error.message)
        except Exception:  # as above: without this line others would take this process for dead
            runtime.log.exception("keeping the lock of this process failed and will be tried again")


def reconcile_for_ever(rt: runtime.Runtime) -> None:
    """Settle jobs that nobody asks about; beside the sweep, since a round takes as long as fal takes to answer."""
    while True:
        started = monotonic()
        done = None
        try:
            done = reconcile.run_in_turn(rt)
            monitoring.show_round(rt)
        except AbhiError as error:
            runtime.log.warning("open jobs will be looked at again: %s", error.message)
        except Exception:  # as above: without this line no job would ever be looked at again
            runtime.log.exception("the round over the open jobs failed and will be tried again")
        took_ms = int((monotonic() - started) * 1000)
        gevent.sleep(reconcile.pause_ms(rt, done, took_ms) / 1000)


def sync_for_ever(rt: runtime.Runtime) -> None:
    """Take fal's prices over when they are due: at the very first start, and then from day to day."""
    while True:
        try:
            sync.run_if_due(rt)
            monitoring.came_through(rt, "prices")
        except AbhiError as error:
            runtime.log.warning("fal's prices will be asked for again: %s", error.message)
        except Exception:  # as above: without this line prices would drift from fal's in silence
            runtime.log.exception("taking fal's prices over failed and will be tried again")
        gevent.sleep(min(PRICES_LOOK_S, rt.settings.prices_sync_s))


def alert_for_ever(rt: runtime.Runtime) -> None:
    """Tell the operator what needs one; beside everything else, since a webhook takes as long as it likes."""
    url = rt.settings.alert_webhook_url
    webhook = None if url is None else OperatorWebhook(url)
    while True:
        try:
            alerting.run_once(rt, webhook)
            monitoring.came_through(rt, "alerts")
        except AbhiError as error:
            runtime.log.warning("alerts will be looked at again: %s", error.message)
        except Exception:  # as above: without this line nobody would ever be told of anything again
            runtime.log.exception("the look for alerts failed and will be tried again")
        gevent.sleep(rt.settings.reconcile_interval_s)


rt = runtime.start(Settings.from_env())
try:
    sweep.run_once(rt)  # holds of a process that was killed end before the first call comes in
except DatabaseUnavailable as error:  # away again already: the timer tries again
    runtime.log.warning("the sweep will be tried again: %s", error.message)
gevent.spawn(live_for_ever, rt)
gevent.spawn(sweep_for_ever, rt)
gevent.spawn(reconcile_for_ever, rt)
gevent.spawn(webhook_delivery.Deliveries(rt).run_for_ever)
gevent.spawn(alert_for_ever, rt)
if rt.settings.prices_sync_s:
    gevent.spawn(sync_for_ever, rt)
app = create_app(rt)
