"""The reconciler: settles jobs that nobody asks about, well before fal forgets their results (fal-protocol 3.9).

Looks at every job that fal works on, several at once. Safe when it runs twice at once or beside pollers: a job's end
is conditional. Nothing is remembered between rounds, so a killed process is resumed by the next one's first round.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import gevent
from gevent.pool import Pool

from abhiapi import jobs, settlement
from abhiapi.errors import AbhiError
from abhiapi.ids import call_text
from abhiapi.jobs import Job
from abhiapi.runtime import Runtime

log = logging.getLogger("abhiapi")

# Looks at fal that run at the same time. Looking is waiting: at 0.15 s an answer, 50 at once need 15 s for a round over
# 5,000 jobs, and 250 need 3. They are fewer than the connections to fal that are kept.
AT_ONCE = 250
PAGE = 500


@dataclass(slots=True)
class Round:
    """What one round did. ``failed`` counts jobs that fal could not tell about just now."""

    looked_at: int = 0
    ended: int = 0
    failed: int = 0


def run_once(rt: Runtime) -> Round:
    """Look at every sent job once; those that have completed are settled when it returns."""
    done = Round()
    pool = Pool(AT_ONCE)

    def look(job: Job) -> None:
        try:
            outcome = settlement.look(rt, job)
        except AbhiError as error:  # fal's or the database's trouble: the next round tries again
            done.failed += 1
            log.info("%s will be looked at again: %s", call_text(job.call.call_id), error.message)
            return
        except Exception:  # a bug in one job's answer must not keep the others from being settled
            done.failed += 1
            log.exception("%s could not be looked at", call_text(job.call.call_id))
            return
        done.looked_at += 1
        done.ended += outcome is not None

    after = 0
    while page := rt.reader.read(lambda tx, since=after: jobs.sent_after(tx, since, most=PAGE)):  # type: ignore[misc]
        for job in page:
            pool.spawn(look, job)
            gevent.sleep(0)  # callers' requests come in between
        after = page[-1].call.call_id
    pool.join()
    return done
