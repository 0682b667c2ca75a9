"""A statement as people keep it: plain text, CSV, JSON and a page to print. Pieces of text as they come, of any length.

The page is one file without scripts or anything from elsewhere; what comes from customers is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import date, timedelta
from html import escape
from typing import Any

import simplejson

from abhiapi import csvtext, ids, money
from abhiapi.days import month_after, parse_month
from abhiapi.statements import KINDS, Line, Statement

COLUMNS = ("created_at", "kind", "model", "call_id", "ref", "note", "credits", "balance")
_NAMES = {"topup": "Top-ups", "charge": "Charges", "refund": "Refunds", "adjustment": "Adjustments"}
_KIND = {"topup": "top-up"}
CREDITS_NOTE = "Amounts are credits; 1 credit is 0.001 US dollars. Times are UTC."


def shape(statement: Statement) -> dict[str, Any]:
    """What stands around the entries, as JSON."""
    return {
        "account": statement.account,
        "month": statement.month,
        "opening_balance": money.credits(statement.opening_micros),
        "closing_balance": money.credits(statement.closing_micros),
        "totals": {
            kind: {"entries": part.entries, "credits": money.credits(part.amount_micros)}
            for kind in KINDS
            if (part := statement.sums.get(kind)) is not None
        },
    }


def line_shape(line: Line) -> dict[str, Any]:
    return {
        "created_at": ids.time_text(line.created_at),
        "kind": line.kind,
        "model": line.model,
        "call_id": None if line.call_id is None else ids.call_text(line.call_id),
        "ref": line.ref,
        "note": line.note,
        "credits": money.credits(line.amount_micros),
        "balance": money.credits(line.balance_after_micros),
    }


def as_json(statement: Statement, lines: Iterable[Line]) -> Iterator[str]:
    """One JSON object, its entries last."""
    head = simplejson.dumps(shape(statement), use_decimal=True)
    yield head[:-1] + ', "entries": ['
    for number, line in enumerate(lines):
        yield (", " if number else "") + simplejson.dumps(line_shape(line), use_decimal=True)
    yield "]}\n"


def as_csv(statement: Statement, lines: Iterable[Line]) -> Iterator[str]:
    """A record for each entry, between the opening and the closing balance."""
    days = parse_month(statement.month)
    yield csvtext.line(COLUMNS)
    yield csvtext.line([f"{days}T00:00:00.000Z", "opening", *[None] * 5, money.credits(statement.opening_micros)])
    for line in lines:
        yield csvtext.line(list(line_shape(line).values()))
    end = f"{month_after(days)}T00:00:00.000Z"
    yield csvtext.line([end, "closing", *[None] * 5, money.credits(statement.closing_micros)])


def as_text(statement: Statement, lines: Iterable[Line]) -> Iterator[str]:
    """Aligned columns; what may be long stands last, so that nothing is cut."""
    amounts = [statement.opening_micros, statement.closing_micros]
    amounts += [part.amount_micros for part in statement.sums.values()]
    width = max(len(_amount(micros)) + 2 for micros in amounts)
    first, last = _days(statement)
    yield f"Statement of {_plain(statement.account)}, {first} to {last}\n{CREDITS_NOTE}\n\n"
    yield f"{'TIME':<19}  {'KIND':<10}  {'CREDITS':>{width}}  {'BALANCE':>{width}}  {'CALL':<18}  FOR\n"
    yield f"{'':<19}  {'opening':<10}  {'':>{width}}  {_amount(statement.opening_micros):>{width}}\n"
    for line in lines:
        call = "-" if line.call_id is None else ids.call_text(line.call_id)
        amount, after = _amount(line.amount_micros), _amount(line.balance_after_micros)
        row = f"{_time(line)}  {line.kind:<10}  {amount:>{width}}  {after:>{width}}  {call:<18}  {_plain(_about(line))}"
        yield row.rstrip() + "\n"
    yield f"{'':<19}  {'closing':<10}  {'':>{width}}  {_amount(statement.closing_micros):>{width}}\n\n"
    for name, entries, amount in _summary(statement):
        yield f"{name:<16}  {entries:>8}  {amount:>{width}}\n"


def as_html(statement: Statement, lines: Iterable[Line]) -> Iterator[str]:
    """A page to read on any screen and to print."""
    first, last = _days(statement)
    title = f"Statement {statement.month} · {escape(statement.account)}"
    yield _HEAD.replace("TITLE", title)
    yield (
        f'<header><p class="brand">AbhiAPI</p><h1>Statement</h1>'
        f"<dl><div><dt>Account</dt><dd>{escape(statement.account)}</dd></div>"
        f"<div><dt>Period</dt><dd>{_long(first)} to {_long(last)}</dd></div></dl></header>\n"
        '<table class="sums"><caption>Summary</caption><tbody>'
    )
    for name, entries, amount in _summary(statement):
        strong = ' class="end"' if name.endswith("balance") else ""
        yield f"<tr{strong}><th scope=row>{name}</th><td class=n>{entries}</td><td class=n>{_signed(amount)}</td></tr>"
    yield (
        "</tbody></table>\n<h2>Entries</h2>\n<table class=entries><thead><tr><th scope=col>Time (UTC)</th>"
        "<th scope=col>Entry</th><th scope=col class=n>Credits</th><th scope=col class=n>Balance</th></tr></thead>"
        f"<tbody>\n{_mark(str(first), 'Opening balance', statement.opening_micros)}"
    )
    for line in lines:
        what, small = _described(line)
        yield (
            f"<tr><td class=t>{_time(line)}</td><td><span class=k>{what}</span>{small}</td>"
            f"<td class=n>{_signed(_amount(line.amount_micros))}</td>"
            f"<td class=n>{_signed(_amount(line.balance_after_micros))}</td></tr>\n"
        )
    yield _mark(str(last), "Closing balance", statement.closing_micros)
    yield f"</tbody></table>\n<footer>{CREDITS_NOTE}</footer>\n"
    yield "</main></body></html>\n"


def _summary(statement: Statement) -> Iterator[tuple[str, str, str]]:
    """(name, number of entries, amount) from the opening balance down to the closing one."""
    yield "Opening balance", "", _amount(statement.opening_micros)
    for kind in KINDS:
        if (part := statement.sums.get(kind)) is not None:
            yield _NAMES[kind], f"{part.entries:,}", _amount(part.amount_micros)
    yield "Closing balance", "", _amount(statement.closing_micros)


def _about(line: Line) -> str:
    return " · ".join(part for part in (line.model, line.ref, line.note) if part)


def _described(line: Line) -> tuple[str, str]:
    """What an entry is about, and the small print under it, as HTML."""
    what = line.model or _NAMES[line.kind].removesuffix("s")
    if line.model and line.kind != "charge":
        what = f"{_NAMES[line.kind].removesuffix('s')} · {line.model}"
    small = [part for part in (line.ref, line.note) if part]
    if line.call_id is not None:
        small.append(ids.call_text(line.call_id))
    return escape(what), f"<small>{escape(' · '.join(small))}</small>" if small else ""


def _mark(day: str, name: str, micros: int) -> str:
    amount = _signed(_amount(micros))
    return f"<tr class=end><td class=t>{day}</td><td>{name}</td><td></td><td class=n>{amount}</td></tr>\n"


def _amount(micros: int) -> str:
    """Credits as accounts show them: thousands apart, always three decimals, so that the points stand in a column."""
    sign = "-" if micros < 0 else ""
    whole, fraction = divmod(abs(micros), money.MICROS_PER_CREDIT)
    return f"{sign}{whole:,}.{fraction:03}"


def _signed(text: str) -> str:
    """An amount with a real minus sign."""
    return text.replace("-", "\N{MINUS SIGN}")


def _time(line: Line) -> str:
    return (ids.time_text(line.created_at) or "")[:19].replace("T", " ")


def _plain(text: str) -> str:
    """Text that cannot steer a terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _days(statement: Statement) -> tuple[date, date]:
    first = parse_month(statement.month)
    return first, month_after(first) - timedelta(days=1)


def _long(day: date) -> str:
    return f"{day.day} {day:%B %Y}"


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>TITLE</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer"><style>
:root{color-scheme:light dark;--ink:#1a1d21;--soft:#5c6570;--line:#dfe3e8;--page:#fff;--band:#f5f7f9;--accent:#2456c8}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#9aa4af;--line:#343a42;--page:#15181c;--band:#1d2126;
--accent:#8fb0ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",Roboto,sans-serif}
main{max-width:52rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
.brand{margin:0;color:var(--accent);font-weight:600;letter-spacing:.02em}
h1{margin:.1rem 0 1rem;font-size:1.9rem;line-height:1.2}
h2{margin:2.25rem 0 .5rem;font-size:1.1rem}
dl{display:flex;flex-wrap:wrap;gap:.5rem 2.5rem;margin:0 0 1.75rem}
dt{color:var(--soft);font-size:.8rem}dd{margin:0;font-weight:600;overflow-wrap:anywhere}
table{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{position:absolute;left:-9999px}
th,td{padding:.45rem .75rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:500}thead th{color:var(--soft);font-size:.8rem;border-bottom-color:var(--soft)}
.sums{max-width:27rem}.sums td:nth-child(2){color:var(--soft)}
.n{text-align:right;white-space:nowrap}.t{color:var(--soft);white-space:nowrap}
.k{overflow-wrap:anywhere}small{display:block;color:var(--soft);overflow-wrap:anywhere}
.end th,.end td{font-weight:600;background:var(--band)}
footer{margin-top:1.5rem;color:var(--soft);font-size:.85rem}
@media (max-width:36rem){main{padding:1.25rem .75rem 3rem}.entries th,.entries td{padding:.45rem .35rem;
font-size:.85rem}.t{white-space:normal;min-width:5.2rem}}
@media print{@page{margin:16mm 14mm}:root{--ink:#000;--soft:#444;--line:#bbb;--page:#fff;--band:#f0f0f0;--accent:#000}
body{font-size:10pt}main{max-width:none;padding:0}thead{display:table-header-group}tr{break-inside:avoid}
h2{break-after:avoid}.end th,.end td{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
</style></head><body><main>
"""
