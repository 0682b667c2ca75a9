"""The reconciler: settles jobs that nobody asks about, well before fal forgets their results (fal-protocol 3.9).

Looks at every job that fal works on, several at once, in one process for all. Safe when it runs twice at once or beside
pollers: a job's end is conditional. Nothing is remembered between rounds, so a killed process is resumed by the next
round of any.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import gevent
from gevent.pool import Pool

from abhiapi import jobs, processes, settlement, turns, vitals
from abhiapi.errors import AbhiError, DatabaseUnavailable
from abhiapi.ids import call_text
from abhiapi.jobs import Job
from abhiapi.runtime import Runtime

log = logging.getLogger("abhiapi")

# Looks at fal that run at the same time. Looking is waiting: at 0.15 s an answer, 50 at once need 15 s for a round over
# 5,000 jobs, and 250 need 3. They are fewer than the connections to fal that are kept.
AT_ONCE = 250
PAGE = 500
TURN_PER_MILLE = 800  # of the interval: another process's turn. Who had the last one is given the first chance
LEASE_MIN_MS = 2_000
PAUSE_MS = 500  # between rounds that take as long as the interval
LOOK_MS = 10_000  # and between looks whether it is this process's turn: who has it may be dead


@dataclass(slots=True)
class Round:
    """What one round did, counted up as it goes.

    ``ended`` are the jobs of which nothing is left to find out at fal, whoever was first to see it: settled, released
    or unknown. ``failed`` are those that fal could not tell about just now.
    """

    looked_at: int = 0
    ended: int = 0
    settled: int = 0
    released: int = 0
    unknown: int = 0
    failed: int = 0


def run_in_turn(rt: Runtime) -> Round | None:
    """A round, if one is due and no other process is at it. Raises `DatabaseUnavailable`."""
    interval_ms = rt.settings.reconcile_interval_s * 1000
    lease_ms = max(LEASE_MIN_MS, min(turns.LEASE_MS, interval_ms))
    return turns.take(
        rt,
        vitals.ROUND,
        lambda: run_once(rt),
        interval_ms=interval_ms * TURN_PER_MILLE // 1000,
        lease_ms=lease_ms,
        skew_ms=lease_ms,  # machines whose clocks are further apart look twice, which harms nothing
    )


def pause_ms(rt: Runtime, done: Round | None, took_ms: int) -> int:
    """How long to wait after a round, or after None.

    A process that could look at nothing gives way where there are others, whose way to fal may be better.
    """
    interval_ms = rt.settings.reconcile_interval_s * 1000
    if done is not None and done.failed and not done.looked_at and _has_others(rt):
        return interval_ms
    return max(PAUSE_MS, (interval_ms if done is not None else min(interval_ms, LOOK_MS)) - took_ms)


def _has_others(rt: Runtime) -> bool:
    try:
        return len(rt.reader.read(processes.running)) > 1
    except DatabaseUnavailable:
        return False


def run_once(rt: Runtime, done: Round | None = None) -> Round:
    """Look at every sent job once; those that have completed are settled when it returns.

    ``done`` is what to count in, for somebody who watches.
    """
    done = done or Round()
    pool = Pool(AT_ONCE)

    def look(job: Job) -> None:
        try:
            outcome = settlement.look(rt, job)
            if outcome is not None:
                _count_end(rt, job, done)
        except AbhiError as error:  # fal's or the database's trouble: the next round tries again
            done.failed += 1
            log.info("%s will be looked at again: %s", call_text(job.call.call_id), error.message)
            return
        except Exception:  # a bug in one job's answer must not keep the others from being settled
            done.failed += 1
            log.exception("%s could not be looked at", call_text(job.call.call_id))
            return
        done.looked_at += 1

    after = 0
    while page := rt.reader.read(lambda tx, since=after: jobs.sent_after(tx, since, most=PAGE)):  # type: ignore[misc]
        for job in page:
            pool.spawn(look, job)
            gevent.sleep(0)  # callers' requests come in between
        after = page[-1].call.call_id
    pool.join()
    return done


def _count_end(rt: Runtime, job: Job, done: Round) -> None:
    now = rt.reader.read(lambda tx: jobs.find(tx, job.call.account_id, job.request_id))
    state = None if now is None else now.state
    done.ended += 1
    done.settled += state == "settled"
    done.released += state == "released"
    done.unknown += state == "unknown"
