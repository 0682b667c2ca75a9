"""`ledger`: every movement of credit, and the proof that the books add up."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from abhiapi.commands import library, session
from abhiapi.commands.options import account_argument, json_option, page_options, usage_error
from abhiapi.commands.output import print_csv, print_json, print_json_lines, print_rows, say
from abhiapi.errors import Refused

if TYPE_CHECKING:
    from abhiapi.db import Tx
    from abhiapi.reports import EntryRow

COLUMNS = ("entry_id", "created_at", "kind", "credits", "balance_after", "call_id", "ref", "note")
EXPORTED = (
    *("account", "entry_id", "seq", "kind", "credits", "balance_after"),
    *("call_id", "ref", "note", "created_at", "hash"),
)


@click.group()
def ledger() -> None:
    """The ledger: every movement of credit, never edited.

    \b
    Examples:
      abhiapi ledger show acme
      abhiapi ledger export > ledger.csv
      abhiapi ledger verify
    """


@ledger.command("show")
@account_argument
@page_options
@json_option
def show_ledger(account: str, limit: int, cursor: str | None, as_json: bool) -> None:
    """Show an account's entries, newest first.

    ACCOUNT is its name, or one of its keys.

    \b
    Examples:
      abhiapi ledger show acme
      abhiapi ledger show acme --limit 500 --json
    """
    if cursor is not None and not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
        raise usage_error("--cursor", ValueError("it is none of ours: give next_cursor of the page before"))

    def op(tx: Tx) -> list[EntryRow]:
        before = library.reports.FIRST if cursor is None else int(cursor)
        account_id = session.account(tx, account).account_id
        return library.reports.newest_entries(tx, account_id, before=before, most=limit + 1)

    found = session.read(op)
    more = str(found[limit - 1].seq) if len(found) > limit else None
    rows = [library.shapes.entry(row) for row in found[:limit]]
    print_rows(rows, COLUMNS, as_json=as_json, none="no entries", envelope={"entries": rows, "next_cursor": more})
    if more and not as_json:
        say(f"older ones: --cursor {more}")


@ledger.command("export")
@json_option
def export_ledger(as_json: bool) -> None:
    """Print every entry of every account.

    Oldest first, as comma-separated values; with --json, one JSON object a line. The export is one consistent
    moment of the ledger, whatever is written meanwhile, and a ledger of any size passes in bounded memory.

    \b
    Examples:
      abhiapi ledger export > ledger.csv
      abhiapi ledger export --json | gzip > ledger.jsonl.gz
    """

    def op(tx: Tx) -> None:
        rows = (library.shapes.entry(row, account=name) for row, name in library.reports.all_entries(tx))
        if as_json:
            print_json_lines(rows)
        else:
            print_csv(rows, EXPORTED)

    session.read(op)


@ledger.command("verify")
@json_option
def verify_ledger(as_json: bool) -> None:
    """Recount the whole ledger.

    Balances, holds, charges, refunds, daily usage and the chain of hashes are computed anew and compared. Runs
    beside a serving proxy. Exits with 1 and names what differs if anything does.

    \b
    Examples:
      abhiapi ledger verify
      abhiapi ledger verify --json | jq .ok
    """
    shows_progress = sys.stderr.isatty()

    def progress(entries: int) -> None:
        if shows_progress:
            click.echo(f"\r{entries} entries ", nl=False, err=True)

    finding = session.read(lambda tx: library.audit.verify(tx, progress=progress))
    if shows_progress:
        click.echo("\r\033[K", nl=False, err=True)
    if as_json:
        print_json(
            {
                "ok": finding.ok,
                "accounts": finding.accounts,
                "entries": finding.entries,
                "problems": finding.problems,
            }
        )
    else:
        for problem in finding.problems:
            click.echo(problem)
        if finding.ok:
            click.echo(f"ok: {finding.entries} entries of {finding.accounts} accounts add up")
    if not finding.ok:
        raise Refused(
            f"the ledger does not add up ({len(finding.problems)} problems): keep a copy of the database as it is, "
            "and compare it with your backups"
        )
