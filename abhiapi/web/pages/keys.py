"""Keys: made, replaced, stopped. By the functions that the command line uses; a key itself is shown once.

Each change has a page of its own that asks whether it is meant, so that none needs a script.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from flask import request

from abhiapi import ids, keys, reports, spending
from abhiapi.db import Tx
from abhiapi.errors import BadRequest, NotFound, Refused
from abhiapi.keys import Key
from abhiapi.money import Micros
from abhiapi.web.caller import base_url, runtime
from abhiapi.web.pages.desk import Desk, Reply, Role, go, must_not_be_suspended, render, visitor

SPENT_DAYS = 30
KEYS_MAX = 20  # active at once, made here: limits are per key, and nobody should get round them by making keys
GRACES_H = {"0": "at once", "1": "in an hour", "24": "in a day", "168": "in a week"}


class Change(NamedTuple):
    """A change of a key: what it is called, what it means, whose statuses allow it, and what was done then."""

    button: str
    meaning: str
    status: str
    allowed: tuple[str, ...]
    done: str
    is_grave: bool = False


CHANGES = {
    "disable": Change(
        "Disable", "Calls with it are refused until you enable it again.", "disabled", ("active",), "is disabled"
    ),
    "enable": Change("Enable", "Calls with it are answered again.", "active", ("disabled",), "is enabled"),
    "revoke": Change(
        "Revoke",
        "Calls with it are refused for ever. This cannot be undone. Your credit stays.",
        "revoked",
        ("active", "disabled", "expired"),
        "is revoked",
        is_grave=True,
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    key: Key
    status: str
    spent_micros: Micros
    calls: int
    limits: spending.Limits | None  # of its own, set by the operator


def add_to(desk: Desk) -> None:
    desk.add(Role.CUSTOMER, "/keys", list_keys, nav="Keys")
    desk.add(Role.CUSTOMER, "/keys/new", create_key, methods=("POST",))
    desk.add(Role.CUSTOMER, "/keys/<key_id>/rotate", rotate_key, methods=("GET", "POST"))
    desk.add(Role.CUSTOMER, "/keys/<key_id>/<any(disable, enable, revoke):change>", change_key, methods=("GET", "POST"))


def list_keys() -> Reply:
    return _page()


def create_key() -> Reply:
    must_not_be_suspended()
    rt, account_id = runtime(), visitor().account_id
    try:
        name = keys.label(request.form.get("name", ""))
        made = rt.write(lambda tx: _create(tx, account_id, name, rt.now_ms()))
    except (BadRequest, Refused) as error:
        return _page(problem=error.message[:1].upper() + error.message[1:] + ".")
    return render("key_made.html", key=made[0], row=made[1], replaced=None, base_url=base_url())


def rotate_key(key_id: str) -> Reply:
    must_not_be_suspended()
    rt, account_id = runtime(), visitor().account_id
    key = rt.reader.read(lambda tx: _own(tx, account_id, key_id))
    if request.method == "GET":
        _must_be(key.status_at(rt.now_ms()), ("active",), key)
        if rt.reader.read(lambda tx: keys.playground_key_id(tx, account_id)) == key.key_id:
            raise Refused("The playground's key is this dashboard's own: revoke it, and the playground gets a new one.")
        return render("key_rotate.html", row=key, graces=GRACES_H)
    grace = request.form.get("grace", "")
    if grace not in GRACES_H:
        raise BadRequest("Choose when the old key stops working.")
    now = rt.now_ms()

    def op(tx: Tx) -> tuple[str, Key, Key]:
        old = _own(tx, account_id, key_id)
        made, row = keys.rotate(tx, old, grace_ms=int(grace) * 3_600_000, now_ms=now)
        return made, row, keys.by_id(tx, old.key_id)

    made, row, old = rt.write(op)
    return render("key_made.html", key=made, row=row, replaced=old, works_on=grace != "0", base_url=base_url())


def change_key(key_id: str, change: str) -> Reply:
    wanted, account_id, rt = CHANGES[change], visitor().account_id, runtime()
    if change == "enable":
        must_not_be_suspended()
    now = rt.now_ms()

    def look(tx: Tx) -> Key:
        key = _own(tx, account_id, key_id)
        _must_be(key.status_at(now), wanted.allowed, key)
        return key

    if request.method == "GET":
        return render("key_change.html", row=rt.reader.read(look), change=change, wanted=wanted)
    key = rt.write(lambda tx: keys.set_status(tx, look(tx), wanted.status))
    return go("pages.keys_list_keys", f"{_called(key)} {wanted.done}.")


def _page(*, problem: str | None = None) -> Reply:
    who, rt = visitor(), runtime()
    now = rt.now_ms()
    account_id = who.account_id
    rows, own = rt.read_aside(lambda tx: (_rows(tx, account_id, now), keys.playground_key_id(tx, account_id)))
    return render(
        "keys.html",
        status=422 if problem else 200,
        rows=rows,
        playground_key_id=own,
        problem=problem,
        plan=rt.limits.plans[who.account.plan],
        spent_days=SPENT_DAYS,
        label_max=keys.LABEL_MAX,
        keys_max=KEYS_MAX,
    )


def _rows(tx: Tx, account_id: int, now_ms: int) -> list[Row]:
    """The account's keys, those that work first and the newest of them before the others."""
    since = datetime.fromtimestamp(now_ms // 1000, UTC).date() - timedelta(days=SPENT_DAYS - 1)
    used = {row.group: row for row in reports.usage(tx, "key", account_id=account_id, since=since)}
    rows = []
    for key in keys.listed(tx, account_id):
        usage = used.get(ids.key_text(key.key_id))
        spent = (usage.charged_micros, usage.calls) if usage else (Micros(0), 0)
        rows.append(Row(key, key.status_at(now_ms), *spent, spending.of_key(tx, key.key_id, now_ms=now_ms)))
    return sorted(rows, key=lambda row: (row.status != "active", -row.key.key_id))


def _create(tx: Tx, account_id: int, name: str | None, now_ms: int) -> tuple[str, Key]:
    working = [key for key in keys.listed(tx, account_id) if key.status_at(now_ms) in ("active", "disabled")]
    if len(working) >= KEYS_MAX:
        raise Refused(f"an account has at most {KEYS_MAX} keys that work: revoke one first")
    return keys.create(tx, account_id, name=name, expires_at=None, now_ms=now_ms)


def _own(tx: Tx, account_id: int, text: str) -> Key:
    """A key of this account; anybody else's is unknown here. Raises `NotFound`."""
    number = ids.parse_key_id(text)
    key = keys.find(tx, text) if number is not None else None
    if key is None or key.account_id != account_id:
        raise NotFound("No key of yours has that id.")
    return key


def _must_be(status: str, allowed: tuple[str, ...], key: Key) -> None:
    if status not in allowed:
        raise Refused(f"{_called(key)} is {status}: this cannot be done with it any more.")


def _called(key: Key) -> str:
    return f"The key {key.name!r}" if key.name else f"The key {ids.key_text(key.key_id)}"
