"""Rows as the JSON that customers and operators read (contract 3.1 and 4): one shape, wherever it is printed.

Amounts become exact Decimals, ids and times texts.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from abhiapi import ids, money
from abhiapi.accounts import Account
from abhiapi.alerts import Alert
from abhiapi.keys import Key
from abhiapi.price_problems import Problem
from abhiapi.pricing import Price, decimal_text
from abhiapi.reports import CallRow, EntryRow, UsageRow
from abhiapi.spending import Limits
from abhiapi.users import Invite, User
from abhiapi.webhooks import WebhookRow
from abhiapi.webhookwire import without_query

Json = dict[str, Any]


def account(row: Account) -> Json:
    return {"account": row.name, "plan": row.plan, "status": row.status, **balance(row, named=False)}


def balance(row: Account, *, named: bool = True) -> Json:
    amounts = {
        "balance": money.credits(row.balance_micros),
        "held": money.credits(row.held_micros),
        "available": money.credits(row.available_micros),
    }
    return {"account": row.name, **amounts} if named else amounts


def key(row: Key, *, now_ms: int, limits: Limits | None = None) -> Json:
    """A key; with its spending limits and its list of models where it has such."""
    return {
        "id": ids.key_text(row.key_id),
        "account": row.account,
        "name": row.name,
        "masked": row.masked,
        "status": row.status_at(now_ms),
        "created_at": ids.time_text(row.created_at),
        "last_used_at": ids.time_text(row.last_used_at),
        "expires_at": ids.time_text(row.expires_at),
        "day_limit": None if limits is None else _credits(limits.day_limit_micros),
        "month_limit": None if limits is None else _credits(limits.month_limit_micros),
        "day_spent": None if limits is None else money.credits(limits.day_spent_micros),
        "month_spent": None if limits is None else money.credits(limits.month_spent_micros),
        "models": None if row.models is None else row.models.split(" "),
    }


def _credits(micros: int | None) -> Decimal | None:
    return None if micros is None else money.credits(micros)


def user(row: User) -> Json:
    return {
        "email": row.email,
        "account": row.account,
        "operator": row.is_operator,
        "created_at": ids.time_text(row.created_at),
        "last_login_at": ids.time_text(row.last_login_at),
    }


def invite(row: Invite, link: str) -> Json:
    """An invitation just made: the only shape that holds its link."""
    return {
        "email": row.email,
        "account": row.account,
        "operator": row.is_operator,
        "link": link,
        "expires_at": ids.time_text(row.expires_at),
    }


def new_key(text: str, row: Key) -> Json:
    """A key just made: the only shape that holds the key itself."""
    return {
        "key": text,
        "id": ids.key_text(row.key_id),
        "account": row.account,
        "name": row.name,
        "expires_at": ids.time_text(row.expires_at),
    }


def call(row: CallRow, *, for_operator: bool = False) -> Json:
    shape: Json = {
        "call_id": ids.call_text(row.call_id),
        "key_id": ids.key_text(row.key_id),
        "model": row.model,
        "mode": row.mode,
        "state": row.state,
        "status": row.status,
        "held": money.credits(row.held_micros),
        "credits": money.credits(row.charged_micros),
        "units": row.units,
        "unit_price_usd": Decimal(row.unit_price_usd),
        "usage_source": row.usage_source,
        "fal_request_id": row.fal_request_id,
        "created_at": ids.time_text(row.created_at),
        "finished_at": ids.time_text(row.finished_at),
    }
    if row.adjusted_micros:
        shape["adjusted"] = money.credits(row.adjusted_micros)
    if row.refunded_micros:
        shape["refunded"] = money.credits(row.refunded_micros)
    if for_operator:
        cost = row.fal_cost_nano_usd
        shape["account"] = row.account
        shape["fal_cost_usd"] = None if cost is None else Decimal(money.nanos_usd_text(cost))
        shape["reason"] = row.reason
    return shape


def entry(row: EntryRow, *, account: str | None = None) -> Json:
    """An entry; with the account's name where those of several stand together."""
    return {
        **({} if account is None else {"account": account}),
        "entry_id": ids.entry_text(row.account_id, row.seq),
        "seq": row.seq,
        "kind": row.kind,
        "credits": money.credits(row.amount_micros),
        "balance_after": money.credits(row.balance_after_micros),
        "call_id": None if row.call_id is None else ids.call_text(row.call_id),
        "ref": row.ref,
        "note": row.note,
        "created_at": ids.time_text(row.created_at),
        "hash": row.hash.hex(),
    }


def usage(row: UsageRow, *, for_operator: bool = False) -> Json:
    shape: Json = {
        "group": row.group,
        "calls": row.calls,
        "credits": money.credits(row.charged_micros),
        "cost_usd": money.usd(row.charged_micros),
    }
    if for_operator:
        shape["fal_cost_usd"] = Decimal(money.nanos_usd_text(row.fal_cost_nano_usd))
        shape["margin_usd"] = Decimal(money.nanos_usd_text(row.margin_nano_usd))
        percent = row.margin_percent
        shape["margin_percent"] = None if percent is None else Decimal(percent)
    return shape


def price(row: Price) -> Json:
    fal_price = row.fal_unit_price_usd
    return {
        "model": row.model,
        "unit": row.unit,
        "unit_price_usd": Decimal(decimal_text(row.unit_price_usd)),
        "fal_unit_price_usd": None if fal_price is None else Decimal(decimal_text(fal_price)),
        "margin": None if row.margin is None else Decimal(decimal_text(row.margin)),
        "source": row.source,
        "updated_at": row.updated_at,
    }


def price_problem(row: Problem) -> Json:
    known = {} if row.price is None else price(row.price)
    return {
        "problem": row.problem,
        "model": row.model,
        **{name: known.get(name) for name in ("unit", "unit_price_usd", "fal_unit_price_usd")},
        "what": row.what,
    }


def hold(row: CallRow, *, now_ms: int) -> Json:
    return {
        "call_id": ids.call_text(row.call_id),
        "account": row.account,
        "model": row.model,
        "credits": money.credits(row.held_micros),
        "age_s": max(0, (now_ms - row.created_at) // 1000),
        "reason": row.reason or {"held": "running", "sent": "queued at fal"}.get(row.state, row.state),
    }


def webhook(row: WebhookRow) -> Json:
    """A webhook as the operator sees it; the query of the customer's URL may hold a secret."""
    return {
        "call_id": ids.call_text(row.call_id),
        "account": row.account,
        "url": without_query(row.url),
        "state": row.state,
        "attempts": row.attempts,
        "next_attempt_at": ids.time_text(row.next_attempt_at) if row.state == "due" else None,
        "last_status": row.last_status,
        "last_error": row.last_error,
        "created_at": ids.time_text(row.created_at),
        "ended_at": ids.time_text(row.ended_at),
        "resendable": row.state != "waiting" and bool(row.has_payload),
    }


def alert(row: Alert) -> Json:
    ended = {"cleared_at": ids.time_text(row.cleared_at), "delivered_at": ids.time_text(row.delivered_at)}
    return alert_event(row) | ended


def alert_event(row: Alert) -> Json:
    """What the operator's webhook gets."""
    return {
        "alert_id": row.alert_id,
        "kind": row.kind,
        "subject": row.subject,
        "message": row.message,
        "raised_at": ids.time_text(row.raised_at),
    }
