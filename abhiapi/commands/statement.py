"""`statement`: one account's month, to send or to file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from abhiapi.commands import library, session
from abhiapi.commands.options import account_argument, json_option, usage_error

if TYPE_CHECKING:
    from abhiapi.db import Tx


@click.command()
@account_argument
@click.option("--month", required=True, metavar="YYYY-MM", help="The month (UTC), such as 2026-11.")
@click.option("--csv", "form", flag_value="csv", help="Print comma-separated values.")
@click.option("--html", "form", flag_value="html", help="Print a page to read and to print.")
@json_option
def statement(account: str, month: str, form: str | None, as_json: bool) -> None:
    """Print an account's statement for a month.

    ACCOUNT is its name, or one of its keys. Opening balance, every entry with the balance after it, closing balance,
    and the sums of each kind. A statement that does not foot is refused. A month of any size passes in bounded memory.

    \b
    Examples:
      abhiapi statement acme --month 2026-11
      abhiapi statement acme --month 2026-11 --csv > acme-2026-11.csv
      abhiapi statement acme --month 2026-11 --html > acme-2026-11.html
    """
    if as_json and form:
        raise click.UsageError("choose one of --csv, --html and --json")
    forms = library.statement_forms
    write = {None: forms.as_text, "csv": forms.as_csv, "html": forms.as_html, "json": forms.as_json}
    chosen = write["json" if as_json else form]

    def op(tx: Tx) -> None:
        owner = session.account(tx, account)
        try:
            found = library.statements.of_month(tx, owner.account_id, month)
        except ValueError as error:
            raise usage_error("--month", error) from error
        for piece in chosen(found, library.statements.lines(tx, found)):
            sys.stdout.write(piece)

    session.read(op)
