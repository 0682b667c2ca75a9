"""`reconcile`: the jobs of fal's queue are looked at now, and those that have completed are settled."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import click

from abhiapi.commands import session
from abhiapi.commands.options import json_option
from abhiapi.commands.output import print_one, say
from abhiapi.errors import Refused

if TYPE_CHECKING:
    from abhiapi.reconcile import Round

log = logging.getLogger("abhiapi")


@click.command()
@json_option
def reconcile(as_json: bool) -> None:
    """Settle the jobs of fal's queue now.

    Asks fal about every open job, 250 at a time, and ends the holds of those that have completed: as a charge
    (settled), without one (released), or as the operator's to look into (unknown, see `abhiapi holds list`). The
    server does the same every few seconds; this is safe beside it, and beside another of its kind. Needs FAL_KEY.
    Jobs that still run are left open.

    Charges are not compared with fal's billing events yet: adjusted is 0, and drift is null because it was not
    looked for. Exits with 1 when jobs could not be looked at.

    \b
    Examples:
      abhiapi reconcile
      abhiapi reconcile --json | jq .settled
    """
    import gevent

    from abhiapi import reconcile as reconciler
    from abhiapi import runtime

    settings = session.settings()
    session.open_database()
    brief = _FirstOfItsKind()
    # The sockets to fal are gevent's own (`http_adapter`), so nothing has to be patched for them to wait side by side.
    rt = runtime.start(settings, is_command=True)
    done = reconciler.Round()
    watcher = gevent.spawn(_watch, done)
    log.addFilter(brief)
    try:
        reconciler.run_once(rt, done)
    finally:
        watcher.kill()
        rt.close()
        log.removeFilter(brief)
    shape = {
        "settled": done.settled,
        "released": done.released,
        "adjusted": 0,
        "drift": None,
        "unknown": done.unknown,
        "open": done.looked_at - done.ended + done.left,
        "failed": done.failed,
    }
    print_one(shape, as_json=as_json)
    if done.left:
        say(f"{done.left} jobs told no units: the server that took them knows what they asked for, and settles them")
    if done.failed:
        raise Refused(f"{done.failed} jobs could not be looked at: fal or the database was in trouble, run it again")


def _watch(done: Round) -> None:
    """Say how far it is: after a second, then every five."""
    import gevent

    gevent.sleep(1)
    while True:
        looked = done.looked_at + done.left + done.failed
        say(f"{looked} jobs looked at, {done.ended} of them ended, {done.failed} failed")
        gevent.sleep(5)


class _FirstOfItsKind(logging.Filter):
    """What may be said of each of five thousand jobs is said of the first."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        is_first = record.msg not in self._said
        self._said.add(record.msg)
        return is_first
