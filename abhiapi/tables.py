"""The tables of schema.sql as SQLAlchemy Core knows them. schema.sql is the truth; test_schema.py compares.

Owns names and types only. Every column is an integer, a text or a blob, so no value is converted on its way in or
out, whatever the engine.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, LargeBinary, MetaData, Table, Text

metadata = MetaData()


def _table(name: str, columns: str) -> Table:
    """A table from ``"id:int! name:text"``: ``!`` marks the primary key, ``?`` a column that may be NULL."""
    kinds = {"int": BigInteger, "text": Text, "blob": LargeBinary}
    made: list[Column[Any]] = []
    for column in columns.split():
        label, kind = column.rstrip("!?").split(":")
        made.append(Column(label, kinds[kind], primary_key=column.endswith("!"), nullable=column.endswith("?")))
    return Table(name, metadata, *made)


accounts = _table(
    "accounts",
    "account_id:int! name:text plan:text status:text balance_micros:int held_micros:int last_seq:int last_hash:blob"
    " created_at:int alert_below_micros:int?",
)
keys = _table(
    "keys",
    "key_id:int! account_id:int digest:blob last_four:text name:text? status:text created_at:int expires_at:int?"
    " last_used_at:int? replaces_key_id:int? limit_id:int? models:text?",
)
key_limits = _table("key_limits", "limit_id:int! day_limit_micros:int? month_limit_micros:int? created_at:int")
key_spending = _table("key_spending", "limit_id:int! period:text! spent_micros:int")
price_versions = _table(
    "price_versions",
    "price_id:int! model:text unit:text unit_price_usd:text fal_unit_price_usd:text source:text first_used_at:int",
)
own_prices = _table(
    "own_prices",
    "own_price_id:int! model:text unit:text? unit_price_usd:text? margin:text? hold_micros:int? created_at:int",
)
fal_prices = _table(
    "fal_prices",
    "fal_price_id:int! model:text unit:text unit_price_usd:text? standing:text source:text seen_at:int",
)
observed_costs = _table("observed_costs", "model:text! up_to_micros:int! calls:int over_hold:int last_call_id:int")
hold_raises = _table("hold_raises", "raise_id:int! model:text percent:int created_at:int")
timers = _table("timers", "name:text! due_at:int claimed_until:int done_at:int? claimed_by:int?")
processes = _table("processes", "process_id:int! pid:int started_at:int seen_at:int ended_at:int?")
calls = _table(
    "calls",
    "call_id:int! account_id:int key_id:int price_id:int process_id:int mode:text state:text held_micros:int"
    " charged_micros:int refunded_micros:int http_status:int? units:text? usage_source:text? fal_request_id:text?"
    " fal_cost_nano_usd:int? reason:text? deadline_at:int created_at:int finished_at:int?"
    " adjusted_micros:int billed_units:text?",
)
unexplained_events = _table(
    "unexplained_events",
    "request_id:text! model:text units:text cost_nano_usd:int happened_at:int seen_at:int",
)
bookmarks = _table("bookmarks", "name:text! reached_at:int")
entries = _table(
    "entries",
    "account_id:int! seq:int! kind:text amount_micros:int balance_after_micros:int call_id:int? ref:text? note:text?"
    " created_at:int hash:blob",
)
usage_daily = _table(
    "usage_daily",
    "account_id:int! day:int! model:text! key_id:int! calls:int charged_micros:int fal_cost_nano_usd:int",
)
idempotency_keys = _table(
    "idempotency_keys",
    "account_id:int! digest:blob! request_digest:blob call_id:int status:int? headers:text? body:blob? created_at:int",
)
job_inputs = _table("job_inputs", "call_id:int! document:blob")
webhooks = _table(
    "webhooks",
    "call_id:int! account_id:int url:text state:text attempts:int next_attempt_at:int? last_status:int?"
    " last_error:text? created_at:int ended_at:int? payload:blob?",
)
users = _table(
    "users",
    "user_id:int! account_id:int? email:text password_hash:text? is_operator:int session_epoch:int created_at:int"
    " last_login_at:int?",
)
invites = _table(
    "invites",
    "digest:blob! email:text account_id:int? is_operator:int purpose:text created_at:int expires_at:int used_at:int?",
)
playground_keys = _table("playground_keys", "account_id:int! key_id:int")
usage_monthly = _table(
    "usage_monthly",
    "month:text! account_id:int! key_id:int! calls:int charged_micros:int fal_cost_nano_usd:int",
)
usage_totals = _table("usage_totals", "day:int! model:text! calls:int charged_micros:int fal_cost_nano_usd:int")
alerts = _table(
    "alerts",
    "alert_id:int! kind:text subject:text message:text raised_at:int cleared_at:int? announced_at:int?"
    " delivered_at:int? tries:int",
)
