"""Calls as they begin and end, for somebody who watches: what is new since the last look, from the books alone.

Read-only; takes an open transaction. A look reads the ids of the last half minute from their index and the few open
calls from theirs, and then only the rows that it has something new to tell of: it costs the same at ten million calls.
A call is known by its id, which is made when its request comes in, while its row is written when its body has been
read; so ids are looked at again for a while. A call whose body took longer is seen when it is open at a look.
"""

from __future__ import annotations

from sqlalchemy import bindparam, literal_column, select

from abhiapi import reports, tables
from abhiapi.calls import OPEN
from abhiapi.db import Tx
from abhiapi.reports import CallRow

AGAIN_MS = 30_000
MOST = 20_000  # ids in one look
_ID_PER_MS = 1 << 20  # ids of calls sort by time (`ids.CallIds`)

_c = tables.calls.c
_IDS_SINCE = (
    select(_c.call_id).where(_c.call_id > bindparam("since")).order_by(_c.call_id.desc()).limit(bindparam("most"))
)
# Few, and from their own index (see `reports._OPEN_HOLDS`).
_OPEN = (
    select(_c.call_id, _c.state)
    .where(_c.state.in_([literal_column(f"'{state}'") for state in OPEN]))
    .order_by(_c.call_id + 0)
)


class Following:
    """What has been told so far. Begin with `begin`, then `look` again and again."""

    def __init__(self) -> None:
        self._told: dict[int, str] = {}  # the state in which a call was last told, of those that may be told again

    def begin(self, tx: Tx, *, now_ms: int, last: int) -> list[CallRow]:
        """The newest calls, oldest first. Of older ones nothing is told unless they end from now on."""
        recent, still_open = self._seen(tx, now_ms)
        self._told = dict.fromkeys(recent, "over") | still_open
        return list(reversed(reports.newest_calls(tx, most=last))) if last else []

    def look(self, tx: Tx, *, now_ms: int) -> list[CallRow]:
        """Calls that have begun, ended, or otherwise changed their state since the last look, oldest first."""
        recent, still_open = self._seen(tx, now_ms)
        changed = [
            call_id
            for call_id in sorted(recent | still_open.keys() | self._told.keys())
            if self._is_news(call_id, still_open.get(call_id))
        ]
        rows = [row for call_id in changed if (row := reports.call(tx, call_id)) is not None]
        self._told |= {row.call_id: row.state for row in rows}
        self._told = {
            call_id: state for call_id, state in self._told.items() if call_id in recent or call_id in still_open
        }
        return rows

    def _is_news(self, call_id: int, state: str | None) -> bool:
        """``state``: of a call that is open. An end is told once."""
        told = self._told.get(call_id)
        return told is None or (told in OPEN and told != state)

    def _seen(self, tx: Tx, now_ms: int) -> tuple[set[int], dict[int, str]]:
        since = max(now_ms - AGAIN_MS, 0) * _ID_PER_MS
        recent = {row[0] for row in tx.all(_IDS_SINCE, since=since, most=MOST)}
        return recent, {row[0]: row[1] for row in tx.all(_OPEN)}
