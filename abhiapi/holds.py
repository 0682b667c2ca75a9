"""The operator's word on a hold that cannot end by itself: as a charge, or as a release. Takes an open transaction."""

from __future__ import annotations

from dataclasses import dataclass

from abhiapi import calls, ids, reports
from abhiapi.db import Database, Tx
from abhiapi.errors import NotFound, Refused
from abhiapi.metering import Verdict
from abhiapi.money import Micros
from abhiapi.reports import CallRow, EntryRow


class StillServed(Refused):
    """The call is under the hands of the process that serves it, whose own end of it would then be lost."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A call as it was, the entry that charged it (None: nothing to charge), and the balance afterwards."""

    call: CallRow
    entry: EntryRow | None
    balance_micros: Micros


def end(
    tx: Tx, database: Database, call_id: int, charge_micros: Micros | None, *, force: bool = False, now_ms: int
) -> Ended:
    """End a hold as a charge, or (None) as a release; what was seen of fal's answer stays with the call.

    Raises `NotFound`, `calls.CallEnded`, and `StillServed` unless forced.
    """
    row = reports.call(tx, call_id)
    if row is None:
        raise NotFound(f"no call has the id {ids.call_text(call_id)}")
    open_call = calls.open_call(tx, call_id)
    if not force:
        _check_abandoned(tx, database, row, now_ms)
    verdict = Verdict(
        "released" if charge_micros is None else "settled",
        charge_micros or Micros(0),
        fal_cost_nano_usd=row.fal_cost_nano_usd,
        reason="operator",
    )
    source = None if charge_micros is None else "operator"
    balance = calls.finish(tx, open_call, verdict, now_ms=now_ms, usage_source=source)
    return Ended(row, reports.charge_of(tx, call_id), balance)


def _check_abandoned(tx: Tx, database: Database, row: CallRow, now_ms: int) -> None:
    process_id, pid, deadline_at = reports.keeper(tx, row.call_id)
    if row.state == "unknown" or now_ms > deadline_at or database.is_dead(process_id, pid):
        return
    raise StillServed(
        f"{ids.call_text(row.call_id)} is still being served and ends by itself, at the latest by "
        f"{ids.time_text(deadline_at)}; what fal charges for it would not be taken any more"
    )
