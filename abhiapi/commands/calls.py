"""`calls`: what customers called, and how it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from abhiapi import ids
from abhiapi.commands import library, session
from abhiapi.commands.options import Text, call_argument, json_option, page_options, usage_error
from abhiapi.commands.output import print_one, print_rows, say

if TYPE_CHECKING:
    from abhiapi.db import Tx
    from abhiapi.reports import CallRow

COLUMNS = ("call_id", "created_at", "account", "model", "state", "status", "credits")


@click.group()
def calls() -> None:
    """Calls: what was called, and how it ended.

    \b
    Examples:
      abhiapi calls list --account acme
      abhiapi calls show call_01jd3k9x2m4q7
    """


@calls.command("list")
@click.option("--account", metavar="ACCOUNT", type=Text(), help="Only this account: its name, or one of its keys.")
@page_options
@json_option
def list_calls(account: str | None, limit: int, cursor: str | None, as_json: bool) -> None:
    """List calls, newest first.

    \b
    Examples:
      abhiapi calls list --limit 10
      abhiapi calls list --account acme --json | jq '.calls[] | select(.state == "unknown")'
    """
    before = library.reports.FIRST if cursor is None else ids.parse_call(cursor)
    if before is None:
        raise usage_error("--cursor", ValueError("it is none of ours: give next_cursor of the page before"))

    def op(tx: Tx) -> list[CallRow]:
        account_id = None if account is None else session.account(tx, account).account_id
        return library.reports.newest_calls(tx, account_id=account_id, before=before, most=limit + 1)

    found = session.read(op)
    more = ids.call_text(found[limit - 1].call_id) if len(found) > limit else None
    rows = [library.shapes.call(row, for_operator=True) for row in found[:limit]]
    print_rows(rows, COLUMNS, as_json=as_json, none="no calls", envelope={"calls": rows, "next_cursor": more})
    if more and not as_json:
        say(f"older ones: --cursor {more}")


@calls.command("show")
@call_argument
@json_option
def show_call(call_id: str, as_json: bool) -> None:
    """Show all that is known of one call.

    CALL_ID is in the header x-abhiapi-call-id of the call's answer, and in `abhiapi calls list`.

    \b
    Examples:
      abhiapi calls show call_01jd3k9x2m4q7
      abhiapi calls show call_01jd3k9x2m4q7 --json | jq .fal_request_id
    """
    number = session.call_id(call_id)
    row = session.read(lambda tx: library.reports.call(tx, number))
    if row is None:
        raise session.no_such_call(call_id)
    print_one(library.shapes.call(row, for_operator=True), as_json=as_json)
