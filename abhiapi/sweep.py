"""Holds that nobody will end: those of dead processes, and its own past their deadline; and idempotency keys.

A held call's answer was not seen by anybody and never will be, so its hold is released (contract 3.5, last row). A
submit is another matter: fal may have accepted the job, which then runs and costs, so its hold stands for the operator.
What a living process is at is left to it, whatever the clock here says: it knows which charges wait for the database.
Run when a process starts and on a timer; safe to run in several at once, since ending a hold is conditional.
"""

from __future__ import annotations

import logging

from abhiapi import calls, idempotency, processes
from abhiapi.db import Tx
from abhiapi.metering import SUBMIT_UNKNOWN, released
from abhiapi.runtime import Runtime

log = logging.getLogger("abhiapi")

BATCH = 200  # holds released in one transaction
KEYS_BATCH = 50  # idempotency keys removed in one: with the largest answers 4 ms of the event loop
GRACE_MS = 30_000  # an answer may still be on its way to the ledger for this long after the deadline


def run_once(runtime: Runtime) -> int:
    """End every hold that has nobody left to end it, or leave it to the operator; how many."""
    count = _sweep_overdue(runtime)
    pids = {process.process_id: process.pid for process in runtime.reader.read(processes.running)}
    pids |= dict(runtime.reader.read(calls.holding_processes))
    pids.pop(runtime.process_id, None)
    for process_id in sorted(runtime.database.dead(pids)):
        count += _sweep_process(runtime, process_id)
    if count:
        runtime.metrics.swept.inc(count)
        log.warning("ended %d holds whose process or time was over", count)
    return count


def forget_old_keys(runtime: Runtime) -> None:
    """Remove idempotency keys that have had their day, with the answers kept under them.

    On the timer only: after a day's pause there may be many, and a start should not wait for them.
    """
    while expired := runtime.reader.read(lambda tx: idempotency.expired(tx, now_ms=runtime.now_ms(), most=KEYS_BATCH)):
        runtime.write(lambda tx, gone=expired: idempotency.forget(tx, gone), patience_s=30)  # type: ignore[misc]


def _sweep_overdue(runtime: Runtime) -> int:
    def release(tx: Tx) -> int:
        now = runtime.now_ms()
        found = calls.overdue(tx, runtime.process_id, now_ms=now - GRACE_MS, most=BATCH)
        return _release(tx, [call for call in found if call.call_id not in runtime.working_on], calls.OVERDUE, now)

    return _until_none_left(runtime, release)


def _sweep_process(runtime: Runtime, process_id: int) -> int:
    def release(tx: Tx) -> int:
        return _release(tx, calls.of_process(tx, process_id, most=BATCH), calls.PROCESS_DIED, runtime.now_ms())

    count = _until_none_left(runtime, release)
    runtime.write(lambda tx: processes.end(tx, process_id, now_ms=runtime.now_ms()), patience_s=30)
    return count


def _until_none_left(runtime: Runtime, release_batch: calls.BatchOp) -> int:
    count = 0
    while batch := runtime.write(release_batch, patience_s=30):
        count += batch
    return count


def _release(tx: Tx, found: list[calls.OpenCall], reason: str, now_ms: int) -> int:
    for call in found:
        verdict = SUBMIT_UNKNOWN if calls.is_queued(tx, call.call_id) else released(reason)
        calls.finish(tx, call, verdict, now_ms=now_ms)
    return len(found)
