"""The command line: `abhiapi` after installation, `python cli.py` from a checkout.

Shells, no decisions: every command opens the database, calls the library and prints. Data goes to stdout, messages
to stderr; exit 0 done, 1 refused or failed, 2 wrong usage or settings. What a command needs of the library is
imported when it runs (see `library`), so that `--help` and shell completion are quick.
"""

from __future__ import annotations

import click

from abhiapi import __version__
from abhiapi.commands.accounts import accounts
from abhiapi.commands.alerts import alerts
from abhiapi.commands.backup import backup, restore
from abhiapi.commands.calls import calls
from abhiapi.commands.doctor import doctor
from abhiapi.commands.holds import holds
from abhiapi.commands.keys import keys
from abhiapi.commands.ledger import ledger
from abhiapi.commands.migrate_to import migrate_to
from abhiapi.commands.money import adjust, balance, refund, topup
from abhiapi.commands.output import Program
from abhiapi.commands.price_checks import check_prices, replay_prices
from abhiapi.commands.price_sync import diff_prices, sync_prices
from abhiapi.commands.prices import estimate, prices
from abhiapi.commands.reconcile import reconcile
from abhiapi.commands.serve import sandbox, serve
from abhiapi.commands.statement import statement
from abhiapi.commands.tail import tail
from abhiapi.commands.usage import usage
from abhiapi.commands.users import invite_user, list_users, make_operator
from abhiapi.commands.webhooks import webhooks


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="abhiapi", message="%(prog)s %(version)s")
def main() -> None:
    """AbhiAPI: a transparent, prepaid proxy in front of fal.ai.

    The database is named by ABHIAPI_DATABASE_URL; one that does not exist is created. Amounts are credits: 1 credit
    is 0.001 USD. Every command that prints takes --json.

    \b
    Examples:
      abhiapi serve --sandbox --demo          try it, without fal and without spending
      abhiapi keys create acme                a key for a customer
      abhiapi topup acme 5000                 credit for their calls
      abhiapi usage --account acme --by model

    \b
    Completion of commands and options, for your shell's start-up file:
      bash  eval "$(_ABHIAPI_COMPLETE=bash_source abhiapi)"
      zsh   eval "$(_ABHIAPI_COMPLETE=zsh_source abhiapi)"
      fish  _ABHIAPI_COMPLETE=fish_source abhiapi | source
    """


for _command in (
    *(serve, accounts, keys, topup, balance, usage, statement, calls, tail, webhooks, holds, ledger, refund, adjust),
    *(prices, estimate, reconcile, alerts, doctor, backup, restore, migrate_to, sandbox),
):
    main.add_command(_command)
for _command in (sync_prices, diff_prices, check_prices, replay_prices):
    prices.add_command(_command)
for _command in (invite_user, make_operator, list_users):
    accounts.add_command(_command)
