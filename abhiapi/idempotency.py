"""Idempotency keys as rows: which call a caller's key stands for, what was asked for under it, and the answer it got.

Functions take an open transaction. A row is written in the transaction that holds the call's credit, so that neither
is ever there without the other. It is not touched when the call ends: whether a key is free again is read from its
call, so a crash, a sweep and the operator's word free it just as an ordinary end does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import bindparam, delete, insert, literal_column, or_, select, update

from abhiapi import tables, wire
from abhiapi.db import Tx
from abhiapi.money import Micros

KEPT_MS = 24 * 3_600_000

_k = tables.idempotency_keys.c
_c = tables.calls.c
_p = tables.price_versions.c
_r = tables.processes.c

_OF_KEY = (_k.account_id == bindparam("account"), _k.digest == bindparam("key_digest"))
# A call that is held or unknown may still be charged.
_MAY_BE_CHARGED = _c.state.in_([literal_column("'held'"), literal_column("'unknown'")])

_FIND = (
    select(
        _k.request_digest, _k.call_id, _k.created_at, _k.status, _k.headers, _k.body, _c.state, _c.held_micros,
        _c.charged_micros, _c.fal_request_id, _p.model, _c.mode, _c.process_id, _r.ended_at,
    )
    .join_from(tables.idempotency_keys, tables.calls, _k.call_id == _c.call_id)
    .join(tables.price_versions, _c.price_id == _p.price_id)
    .join(tables.processes, _c.process_id == _r.process_id)
    .where(*_OF_KEY)
)  # fmt: skip
_TAKEN_BY = select(_k.call_id, _k.status).where(*_OF_KEY)
_TAKE = insert(tables.idempotency_keys).values(
    {name: bindparam(name) for name in ("account_id", "digest", "request_digest", "call_id", "created_at")}
)
_FORGET = delete(tables.idempotency_keys).where(*_OF_KEY, _k.call_id == bindparam("call"))
_STATE = select(_c.state).where(_c.call_id == bindparam("call"))
_KEEP = (
    update(tables.idempotency_keys)
    .where(*_OF_KEY, _k.call_id == bindparam("call"), _k.status.is_(None))
    .values(status=bindparam("with_status"), headers=bindparam("with_headers"), body=bindparam("with_body"))
)
_EXPIRED = (
    select(_k.account_id, _k.digest, _k.call_id)
    .join_from(tables.idempotency_keys, tables.calls, _k.call_id == _c.call_id)
    .where(_k.created_at <= bindparam("until"), or_(_k.status.is_not(None), ~_MAY_BE_CHARGED))
    .order_by(_k.created_at)
    .limit(bindparam("most"))
)


class KeyTaken(Exception):
    """Another request was faster with the same key: nothing was written, and its answer is there or waited for."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A key that a call is to be written down under.

    ``replaces``: the call it stood for, seen to have freed it; ``was_answered``: with an answer that has had its day.
    """

    account_id: int
    digest: bytes
    request_digest: bytes
    replaces: int | None
    was_answered: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as it left."""

    status: int
    headers: wire.Headers
    body: bytes


@dataclass(frozen=True, slots=True)
class Found:
    """A key that was used before, and how its call stands."""

    request_digest: bytes
    call_id: int
    created_at: int
    answer: Answer | None
    state: str
    held_micros: Micros
    charged_micros: Micros
    fal_request_id: str | None
    model: str
    mode: str
    process_id: int
    process_ended_at: int | None

    def is_free(self, now_ms: int) -> bool:
        """Whether the key may be used anew: a day has passed, or its call cost nothing and fal gave no last word."""
        if self.answer is None and self.state in ("held", "unknown"):
            return False  # however old: it may still be charged
        return self.created_at <= now_ms - KEPT_MS or (self.answer is None and self.state == "released")


def find(tx: Tx, account_id: int, digest: bytes) -> Found | None:
    """What an account's key stands for; None where it was not used, or is forgotten."""
    row = tx.one(_FIND, account=account_id, key_digest=digest)
    if row is None:
        return None
    asked, call_id, created_at, status, headers, body, *call = row
    answer = None if status is None else Answer(status, [(name, value) for name, value in json.loads(headers)], body)
    return Found(asked, call_id, created_at, answer, *call)


def check_free(tx: Tx, claim: Claim) -> None:
    """Raises `KeyTaken` where the key stands for another call than the one that it may be taken from, or that one's
    answer has been kept since it was looked at."""
    row = tx.one(_TAKEN_BY, account=claim.account_id, key_digest=claim.digest)
    if row is not None and (row[0] != claim.replaces or (row[1] is not None and not claim.was_answered)):
        raise KeyTaken


def take(tx: Tx, claim: Claim, call_id: int, *, now_ms: int) -> None:
    """Let the key stand for a call that is written in this transaction."""
    if claim.replaces is not None:
        tx.run(_FORGET, account=claim.account_id, key_digest=claim.digest, call=claim.replaces)
    tx.run(
        _TAKE,
        account_id=claim.account_id,
        digest=claim.digest,
        request_digest=claim.request_digest,
        call_id=call_id,
        created_at=now_ms,
    )


def keep(tx: Tx, claim: Claim, call_id: int, answer: Answer, *, is_last_word: bool) -> bool:
    """Keep a call's answer for whoever asks again; whether it was.

    One that is not fal's last word is kept only where it was charged: else asking again runs the call anew.
    """
    row = tx.one(_STATE, call=call_id)
    if row is None or (row[0] == "released" and not is_last_word):
        return False
    kept = tx.run(
        _KEEP,
        account=claim.account_id,
        key_digest=claim.digest,
        call=call_id,
        with_status=answer.status,
        with_headers=json.dumps(answer.headers),
        with_body=answer.body,
    )
    return kept == 1


def expired(tx: Tx, *, now_ms: int, most: int) -> list[tuple[int, bytes, int]]:
    """Keys that have had their day, oldest first: (account, digest, call). Those of calls that may still be charged
    are left alone."""
    return [(row[0], row[1], row[2]) for row in tx.all(_EXPIRED, until=now_ms - KEPT_MS, most=most)]


def forget(tx: Tx, keys: Sequence[tuple[int, bytes, int]]) -> None:
    for account_id, digest, call_id in keys:
        tx.run(_FORGET, account=account_id, key_digest=digest, call=call_id)
